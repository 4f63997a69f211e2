"""Admission by predicted finish: who is taken in, when it is its turn, what is dropped unstarted.

Joins the pure parts: the queue (order and places), the forecast (run times), the estimator
(how many at a time are worth it), and the calls that wait for each other. An invocation is admitted
when ``queue + start + run`` ends before its deadline, as far as that can be told; what cannot is
refused at once, while another node still can.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from capability_schemas.errors import DeadlineExceeded, FoamError, Overloaded
from capability_schemas.functions import FunctionSpec
from capability_schemas.task import DEFAULT_TIMEOUT_MS
from node_agent.admission.concurrency import ConcurrencyEstimator
from node_agent.admission.forecast import Forecast, Prediction, Work
from node_agent.admission.queue import AdmissionQueue, Entry
from node_agent.pool.pool import InstancePool
from node_agent.runtimes.base import Final as FinalPiece

_LEAST_TICK_S: Final = 0.005


@dataclass(slots=True, kw_only=True)
class Ticket:
    """An admitted call, until its place is free again.

    Attributes:
        entry: Its place in the queue.
        spec: The function.
        work: What is known about the run.
        prediction: How long it will take.
        wait_ms: Predicted wait, the start of an instance included, milliseconds.
        finish_ms: Predicted time from admission to the end, milliseconds; None when unknown.
        admitted_at: UTC milliseconds.
        begin: Called when it is its turn.
        drop: Called when it cannot end in time any more, before it has begun.
        level: How many ran when it began.
    """

    entry: Entry
    spec: FunctionSpec
    work: Work
    prediction: Prediction
    wait_ms: float = 0.0
    finish_ms: float | None = None
    admitted_at: int
    begin: Callable[[], None]
    drop: Callable[[FoamError], None]
    level: int = 1

    def check_time(self, now: int) -> None:
        """Check that there is time left for the run.

        Raises:
            DeadlineExceeded: There is not.
        """
        left_ms = self.entry.deadline - now
        if left_ms <= self.prediction.least_ms:
            raise _no_time(self.spec.name, self.prediction, max(0, left_ms))


@dataclass(slots=True)
class _Measured:
    """What was measured of a group: an estimator for each function, for their runs differ."""

    most: int
    estimators: dict[str, ConcurrencyEstimator] = field(default_factory=dict)

    @property
    def limit(self) -> int | None:
        limits = [one.limit for one in self.estimators.values() if one.measured]
        return max(limits, default=None)


class Admission:
    """What waits and runs on a node; owned by the agent's event loop.

    Attributes:
        forecast: What is known about run times.
        functions: What is offered, by name.

    Args:
        queue: Order and places; configured here.
        pool: The instances; told here what is offered.
        clock: UTC milliseconds.
    """

    def __init__(
        self, *, queue: AdmissionQueue, pool: InstancePool, clock: Callable[[], int]
    ) -> None:
        self.forecast = Forecast()
        self.functions: Mapping[str, FunctionSpec] = {}
        self._queue = queue
        self._pool = pool
        self._clock = clock
        self._tickets: dict[str, Ticket] = {}
        self._measured: dict[str, _Measured] = {}
        self._changed = asyncio.Event()

    def configure(self, functions: Mapping[str, FunctionSpec], *, edited: set[str]) -> None:
        """Say what is offered from now on; what is taken already goes its way.

        Args:
            functions: By name.
            edited: Names whose figures no longer hold.
        """
        self.functions = dict(functions)
        groups: dict[str, dict[str, int]] = {}
        for spec in functions.values():
            groups.setdefault(self._pool.group_of(spec), {})[spec.name] = spec.concurrency
        for name in edited:
            self.forecast.forget(name)
        self._measured = {
            name: self._measured[name]
            if name in self._measured and self._measured[name].most == max(lanes.values())
            else _Measured(most=max(lanes.values()))
            for name, lanes in groups.items()
        }
        self._pool.offer(functions.values())
        self._queue.configure(groups)
        for name, measured in self._measured.items():
            self._queue.limit_places(name, measured.limit)

    def admit(
        self,
        key: str,
        spec: FunctionSpec,
        work: Work,
        *,
        deadline: int,
        priority: int,
        begin: Callable[[], None],
        drop: Callable[[FoamError], None],
        nested: bool = False,
    ) -> Ticket:
        """Take a call in; call `dispatch` when the caller is ready for ``begin``.

        Args:
            key: Its identity.
            spec: Its function, offered now.
            work: What is known about the run.
            deadline: UTC milliseconds.
            priority: 0 to 9.
            begin: Called when it is its turn.
            drop: Called when it cannot end in time any more, before it has begun.
            nested: Whether something that runs here waits for it.

        Raises:
            DeadlineExceeded: The deadline has passed, or the run alone takes longer.
            Overloaded: There is no room, or the wait makes it too late.
        """
        now = self._clock()
        prediction = self.forecast.predict(spec.name, work, info=self._pool.info(spec), now=now)
        # Whoever waits for a place gets an instance with it.
        waits = not self._queue.is_free(self._pool.group_of(spec), spec.name)
        start_ms = 0.0 if waits else self._pool.start_ms(spec)
        run_ms = prediction.run_ms
        entry = Entry(
            key=key,
            group=self._pool.group_of(spec),
            function=spec.name,
            priority=priority,
            deadline=deadline,
            run_ms=None if run_ms is None else run_ms + (start_ms or 0.0),
            least_ms=prediction.least_ms,
            nested=nested,
        )
        wait_ms = self._queue.wait_ms(entry, now=now)
        self._check_finish(entry, spec, prediction, wait_ms, start_ms or 0.0)
        self._queue.offer(entry, now=now)
        known = run_ms is not None and start_ms is not None and (wait_ms > 0 or not waits)
        ticket = self._tickets[key] = Ticket(
            entry=entry,
            spec=spec,
            work=work,
            prediction=prediction,
            wait_ms=wait_ms + (start_ms or 0.0),
            finish_ms=wait_ms + (start_ms or 0.0) + (run_ms or 0.0) if known else None,
            admitted_at=now,
            begin=begin,
            drop=drop,
        )
        return ticket

    def wait_ms(self, spec: FunctionSpec) -> float | None:
        """Predict how long an ordinary call would wait if it came now, milliseconds.

        It stands behind all that waits at its priority, and needs an instance where none is free.

        Args:
            spec: Its function, offered now.

        Returns:
            None when an instance would have to be started whose start was never measured.
        """
        now, group = self._clock(), self._pool.group_of(spec)
        if self._queue.is_free(group, spec.name):
            return self._pool.start_ms(spec)
        entry = Entry(key="", group=group, function=spec.name, deadline=now + DEFAULT_TIMEOUT_MS)
        return self._queue.wait_ms(entry, now=now)

    def dispatch(self) -> None:
        """Drop what is hopeless, and begin whatever has a free place."""
        self._drop_hopeless()
        while (entry := self._queue.take(now=self._clock())) is not None:
            ticket = self._tickets[entry.key]
            ticket.level = self._queue.running_in(entry.group)
            ticket.begin()
        self._changed.set()

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a call out that has not begun; returns whether it waited."""
        waited = self._queue.remove(ticket.entry.key) is not None
        if waited:
            del self._tickets[ticket.entry.key]
            self._changed.set()
        return waited

    def ended(self, ticket: Ticket, final: FinalPiece | None, *, run_ms: float) -> None:
        """Take in how a run went; its place is not free before `free`.

        Args:
            ticket: The call.
            final: The end of its answer; None when it failed or was stopped.
            run_ms: From the call of the instance on, milliseconds.
        """
        if final is None:
            return
        now, spec, group = self._clock(), ticket.spec, ticket.entry.group
        self.forecast.learn(
            spec.name,
            ticket.work,
            run_ms=run_ms,
            usage=final.usage,
            timing=final.timing,
            now=now,
        )
        if ticket.finish_ms is not None:
            self.forecast.judge(
                predicted_ms=ticket.finish_ms, actual_ms=float(now - ticket.admitted_at)
            )
        measured = self._measured.get(group)
        if measured is None or measured.most == 1:
            return
        estimator = measured.estimators.setdefault(spec.name, ConcurrencyEstimator(measured.most))
        level = round((ticket.level + self._queue.running_in(group)) / 2)
        estimator.ended(level=min(level, measured.most), run_ms=run_ms, now=now)
        self._queue.limit_places(group, measured.limit)

    def cut(self, ticket: Ticket, *, ran_ms: float) -> None:
        """Take in that a run was stopped, or its time was over, before it ended.

        Args:
            ticket: The call.
            ran_ms: From the call of the instance on, milliseconds.
        """
        self.forecast.learn_cut(
            ticket.spec.name,
            ticket.work,
            ran_ms=ran_ms,
            predicted_ms=ticket.prediction.run_ms,
            now=self._clock(),
        )

    def free(self, ticket: Ticket, *, run_ms: float | None) -> None:
        """Free the place of a call that ran; `dispatch` gives it to the next.

        Args:
            ticket: The call.
            run_ms: How long it ran, milliseconds; None when that says nothing.
        """
        self._tickets.pop(ticket.entry.key, None)
        self._queue.finished(ticket.entry.key, run_ms=run_ms)

    async def watch(self) -> None:
        """Drop what waits in vain; runs until cancelled."""
        while True:
            self._changed.clear()
            start_by = self._queue.next_start_by
            if start_by is None:
                await self._changed.wait()
                continue
            left_s = max(_LEAST_TICK_S, (start_by - self._clock()) / 1000)
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            except TimeoutError:
                self._drop_hopeless()

    def _drop_hopeless(self) -> None:
        now = self._clock()
        for entry in self._queue.hopeless(now=now):
            ticket = self._tickets.pop(entry.key)
            left_ms = max(0, entry.deadline - now)
            if left_ms:
                ticket.drop(_no_time(entry.function, ticket.prediction, left_ms))
            else:
                ticket.drop(DeadlineExceeded("the deadline passed in the queue"))

    def _check_finish(
        self,
        entry: Entry,
        spec: FunctionSpec,
        prediction: Prediction,
        wait_ms: float,
        start_ms: float,
    ) -> None:
        left_ms = entry.deadline - self._clock()
        if left_ms <= 0:
            return  # the queue says so
        run_ms = prediction.run_ms or 0.0
        needed_ms = run_ms if prediction.sure else prediction.least_ms
        if wait_ms + start_ms + needed_ms <= left_ms:
            return
        if needed_ms > left_ms:
            raise _no_time(entry.function, prediction, left_ms)
        retry_ms = self._queue.retry_ms(entry.group, wait_ms)
        if start_ms:
            self._pool.prepare(spec)
            retry_ms = max(retry_ms, math.ceil(start_ms))
        raise Overloaded(
            f"{entry.function} would end in {wait_ms + start_ms + needed_ms:.0f} ms (wait"
            f" {wait_ms:.0f}, start {start_ms:.0f}, run {needed_ms:.0f}), {left_ms} ms are left",
            retry_after_ms=retry_ms,
        )


def _no_time(function: str, prediction: Prediction, left_ms: int) -> DeadlineExceeded:
    predicted_ms = round(prediction.run_ms or prediction.least_ms)
    return DeadlineExceeded(
        f"{function} takes about {predicted_ms} ms, {left_ms} ms were left: not begun",
        predicted_ms=predicted_ms,
        left_ms=left_ms,
    )
