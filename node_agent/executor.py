"""Admits invocations, runs them in the order of the queue, and answers for every attempt once."""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import structlog

from broker.fair_memory import FairMemory
from broker.lifecycle import Service
from capability_schemas.errors import (
    ConfigurationError,
    ErrorCode,
    ExecutionFailed,
    FoamError,
    NotFound,
    Overloaded,
)
from capability_schemas.functions import FunctionSpec, check_input, effective_input
from capability_schemas.invocation import Control, Invocation
from capability_schemas.provenance import Signer
from node_agent.admission.calls import CALLER, Caller
from node_agent.admission.control import Admission
from node_agent.admission.forecast import Forecast, work_of
from node_agent.admission.peers import PeerBook
from node_agent.continuation import size_of
from node_agent.invocation import (
    OVERTAKEN,
    Asked,
    Execution,
    Outcome,
    OutcomeMemory,
    Standing,
    key_of,
)
from node_agent.pool.pool import InstancePool
from node_agent.reporter import Reporter
from node_agent.runtimes.base import Runtime
from node_agent.settings import NodeSettings
from node_agent.stream import Post, ReplyStream

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Ended = Callable[[Execution, Outcome], None]
"""Told about every execution that has ended."""


@dataclass(slots=True)
class ExecutionCounters:
    """What happened since the agent started.

    Attributes:
        duplicates: Invocations that were known already.
        refused: Invocations turned away.
        finished: Invocations that ended with a terminal event of this node.
        unsure: Invocations whose answer was not sure enough and went to the router.
        failed: Invocations handed back to the router.
        dropped: Invocations ended without a word: superseded, or cut off from the broker.
        given_back: Invocations that had not begun and were given back when the router asked.
    """

    duplicates: int = 0
    refused: int = 0
    finished: int = 0
    unsure: int = 0
    failed: int = 0
    dropped: int = 0
    given_back: int = 0


class Executor(Service):
    """The executions of a node; all state is owned by the event loop it is started on.

    Args:
        settings: The node's settings.
        functions: What it offers, by name, each checked by its runtime.
        runtimes: Runtime by name.
        post: Where events go.
        crowded: Whether the session holds so much that streams have to pause.
        reporter: What routers hear.
        admission: Who is taken in; told here what is offered.
        pool: The instances, started and stopped by somebody else.
        peers: Nodes to name when something is refused.
        on_ended: Told about every execution that has ended.
        on_change: Called when something began, ended or was queued.
        signer: Signs the results; None: they go unsigned.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        settings: NodeSettings,
        functions: Mapping[str, FunctionSpec],
        runtimes: Mapping[str, Runtime],
        post: Post,
        crowded: Callable[[], bool] = lambda: False,
        reporter: Reporter,
        admission: Admission,
        pool: InstancePool,
        peers: PeerBook,
        on_ended: Ended,
        on_change: Callable[[], None],
        signer: Signer | None = None,
        clock: Callable[[], int],
    ) -> None:
        super().__init__(service_id=settings.node)
        self.counters = ExecutionCounters()
        self.accepting = True
        self._settings = settings
        self._functions = functions
        self._runtimes = runtimes
        self._post = post
        self._crowded = crowded
        self._reporter = reporter
        self._admission = admission
        self._pool = pool
        self._peers = peers
        self._on_ended = on_ended
        self._on_change = on_change
        self._signer = signer
        self._clock = clock
        self._live: dict[str, Execution] = {}  # until the instance is free again
        self._current: dict[tuple[str, str], Execution] = {}  # until the outcome is known
        self._outcomes = OutcomeMemory(limit=settings.outcome_limit)
        self._disowned: FairMemory[int] = FairMemory(limit=settings.outcome_limit)
        self._idle = asyncio.Event()
        self._idle.set()
        self._numbers = itertools.count(1)
        admission.configure(functions, edited=set())

    def replace(self, functions: Mapping[str, FunctionSpec]) -> None:
        """Offer other functions from now on; what was taken before ends as it began.

        Args:
            functions: All that the node offers, by name, each checked by its runtime (which may
                look at files, and thus block).

        Raises:
            ConfigurationError: One names a runtime that is not there; nothing has changed then.
        """
        for spec in functions.values():
            if spec.runtime not in self._runtimes:
                raise ConfigurationError(f"{spec.name}: there is no runtime {spec.runtime!r} here")
        before, self._functions = self._functions, dict(functions)
        edited = {name for name, spec in before.items() if functions.get(name) != spec}
        self._admission.configure(functions, edited=edited)
        self._admission.dispatch()

    @property
    def forecast(self) -> Forecast:
        """What is known about run times, and how far predictions were off."""
        return self._admission.forecast

    def take(self, invocation: Invocation, reply: str, *, repeated: bool = False) -> None:
        """Take an invocation: admit it, refuse it, or answer again for an attempt known already.

        Args:
            invocation: What the router asks for.
            reply: Topic of this node's events, checked.
            repeated: Whether this very message was taken before: it must not run once more when
                its outcome has been forgotten meanwhile.
        """
        if self._is_known(invocation):
            return
        if invocation.attempt <= self._disowned_attempt((invocation.client, invocation.task)):
            self._pass_over(invocation)
            return
        if repeated:
            self.counters.duplicates += 1
            return
        try:
            self._admit(invocation, reply)
        except FoamError as exc:
            self.counters.refused += 1
            outcome = Outcome(
                status="refused",
                code=exc.code.value,
                reason=exc.message,
                retry_after_ms=exc.detail.get("retry_after_ms"),
                peer=self._peers.best(invocation.function, now=self._clock()),
            )
            self._outcomes.record(invocation, outcome)
            self._reporter.ended(invocation, outcome)

    def cancel(self, control: Control) -> None:
        """Stop the attempts of a task that a ``cancel`` order names.

        When another node has the answer (`OVERTAKEN`), only those that can be given back.
        """
        for execution in list(self._live.values()):
            invocation = execution.invocation
            if invocation.task != control.task or control.client not in (None, invocation.client):
                continue
            if control.attempt is not None and invocation.attempt > control.attempt:
                continue
            if control.reason == OVERTAKEN and not execution.can_yield:
                continue
            self._stop(execution, control.reason or "by order")

    def give_back(self, control: Control) -> None:
        """Give a task back that has not begun, for another node is idle; else say that it has.

        The refusal costs nobody anything: the client has seen nothing of it, and the router asks
        for it by a ``return`` order.
        """
        for execution in list(self._live.values()):
            invocation = execution.invocation
            if (invocation.client, invocation.task) != (control.client, control.task):
                continue
            if control.attempt not in (None, invocation.attempt):
                continue
            ticket = execution.ticket
            if ticket is None or not self._admission.withdraw(ticket):
                if self._current.get((invocation.client, invocation.task)) is execution:
                    self._reporter.admitted(invocation, wait_ms=0.0)
                continue
            execution.stop("superseded")  # it never says anything
            outcome = Outcome(
                status="refused",
                code=ErrorCode.OVERLOADED.value,
                reason="given back as asked: it had not begun",
                seq=invocation.seq,
            )
            self._conclude(execution, outcome)
            self._forget(execution)
            self._on_change()

    def account_for(self, control: Control) -> None:
        """Tell a router how the attempts stand that it asks about; see `account`."""
        if control.sender is None:
            return
        for whose in control.tasks or ():
            self.account(whose, None, router=control.sender)
        if control.client is not None and control.task is not None:
            whose = control.client, control.task
            self.account(whose, control.attempt, router=control.sender)

    def account(self, whose: tuple[str, str], attempt: int | None, *, router: str) -> None:
        """Tell a router, which may have missed it, how an attempt stands: once more how it ended.

        Nothing is begun by that. What is said to be unknown must not begin afterwards, when an
        invocation that the question overtook arrives: the router goes on without this node.

        Args:
            whose: Client and task.
            attempt: Which one; the latest when None, and nothing is said when there is none.
            router: Who asks.
        """
        current = self._current.get(whose)
        if attempt is None and current is not None:
            attempt = current.invocation.attempt
        attempt = attempt or self._outcomes.latest_attempt(whose)
        if not attempt:
            return
        asked = Asked(client=whose[0], task=whose[1], attempt=attempt, router=router)
        ended = self._outcomes.find(asked)
        if ended is not None:
            if ended.status == "dropped":  # nobody was told before, for nobody wanted to know
                ended = replace(ended, status="failed", code=ErrorCode.NODE_LOST.value)
            self._reporter.repeat(asked, ended)
            return
        running = self._live.get(key_of(asked))
        if running is not None:
            running.asked_by = router
        else:
            self._disowned.put(whose, max(attempt, self._disowned_attempt(whose)))
        self._reporter.stands(asked, seq=None if running is None else running.seq)

    def standing(self, whose: tuple[str, str]) -> Standing:
        """Tell how a task stands here, whoever asked for it.

        Args:
            whose: Client and task.
        """
        current = self._current.get(whose)
        if current is not None:
            return Standing(current.invocation.attempt, running=current.invocation)
        leaving = (
            execution.invocation.attempt
            for execution in self._live.values()
            if (execution.invocation.client, execution.invocation.task) == whose
        )
        attempt = max(self._outcomes.latest_attempt(whose), *leaving, 0)
        disowned = self._disowned_attempt(whose)
        if disowned > attempt:  # the next one is another than a router was told of
            return Standing(disowned, outcome=Outcome(status="refused"))
        asked = Asked(client=whose[0], task=whose[1], attempt=attempt, router="")
        return Standing(attempt, outcome=self._outcomes.find(asked))

    def stop_all(self, reason: str) -> int:
        """Stop everything, for a reason of `Execution.stop`; returns how many there were."""
        executions = list(self._live.values())
        for execution in executions:
            self._stop(execution, reason)
        return len(executions)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs or waits.

        Args:
            timeout_s: Longest wait, seconds.

        Returns:
            Whether that is so. Cancellation is safe.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _on_start(self) -> None:
        self.spawn(self._admission.watch(), name="deadlines")

    def _is_known(self, invocation: Invocation) -> bool:
        """Answer for an attempt that runs or has ended here, or is older than one that does."""
        current = self._current.get((invocation.client, invocation.task))
        if current is None and key_of(invocation) in self._live:
            self.counters.duplicates += 1  # it has ended, was forgotten, and leaves its instance
            return True
        if current is not None and current.invocation.attempt < invocation.attempt:
            self._stop(current, "superseded")
            return False
        ended = self._outcomes.find(invocation)
        latest = self._outcomes.latest_attempt((invocation.client, invocation.task))
        if current is None and ended is None and latest < invocation.attempt:
            return False
        self.counters.duplicates += 1
        if current is not None and current.invocation.attempt == invocation.attempt:
            self._reporter.admitted(invocation, wait_ms=0.0)
        elif ended is not None:
            self._reporter.repeat(invocation, ended)
        return True

    def _disowned_attempt(self, whose: tuple[str, str]) -> int:
        """Return up to which attempt a router was told that nothing is known here; 0: none."""
        return self._disowned.get(whose) or 0

    def _pass_over(self, invocation: Invocation) -> None:
        """Run nothing of an attempt that a router was told is unknown; say so, as of any other."""
        self.counters.dropped += 1
        outcome = Outcome(
            status="failed",
            code=ErrorCode.NODE_LOST.value,
            reason="a router was told before that it is not known here",
            seq=invocation.seq,
        )
        self._outcomes.record(invocation, outcome)
        self._reporter.ended(invocation, outcome)

    def _admit(self, invocation: Invocation, reply: str) -> None:
        """Queue an invocation, or end it at once when its input is wrong.

        Raises:
            FoamError: It is refused; another node may take it.
        """
        spec = self._admissible(invocation)
        runtime = self._runtimes[spec.runtime]
        value = effective_input(invocation.text, invocation.input, spec.input_schema)
        execution = Execution(
            invocation=invocation,
            spec=spec,
            value=value,
            node=self._settings.node,
            stream=self._stream(invocation, spec, reply),
            report_topic=self._reporter.topic(invocation),
            instances=self._pool,
            options=runtime.call_options(spec),
            signer=self._signer,
            clock=self._clock,
        )
        execution.ticket = self._admission.admit(
            execution.key,
            spec,
            work_of(execution.request),
            deadline=invocation.deadline,
            priority=invocation.priority,
            begin=lambda: self._begin(execution),
            drop=lambda error: self._end_waiting(execution, error),
        )
        self._live[execution.key] = execution
        self._current[invocation.client, invocation.task] = execution
        self._idle.clear()
        try:
            check_input(value, spec.input_schema)
        except FoamError as exc:
            self._end_waiting(execution, exc)
        else:
            self._dispatch()
        # Last, so that the instance gets its call before the session writes; whatever the
        # invocation says itself comes later still, for it runs in a task of its own.
        self._reporter.admitted(invocation, wait_ms=execution.ticket.wait_ms)

    def _admissible(self, invocation: Invocation) -> FunctionSpec:
        """Return the function an invocation is for.

        Raises:
            Overloaded: The node takes nothing new.
            NotFound: It has no such function, or another version of it.
        """
        node = self._settings.node
        if not self.accepting:
            raise Overloaded(f"node {node} is draining")
        spec = self._functions.get(invocation.function)
        if spec is None:
            raise NotFound(f"node {node} has no function {invocation.function}")
        if spec.version != invocation.version:
            raise NotFound(
                f"{spec.name} is at version {spec.version} on {node}, not {invocation.version}"
            )
        return spec

    def _stream(self, invocation: Invocation, spec: FunctionSpec, reply: str) -> ReplyStream:
        return ReplyStream(
            topic=reply,
            task=invocation.task,
            attempt=invocation.attempt,
            seq=invocation.seq,
            chunks=invocation.stream,
            held=invocation.hold
            or (invocation.cascade is not None and invocation.cascade.accept > 0),
            post=self._post,
            crowded=self._crowded,
            clock=self._clock,
            coalesce_s=self._settings.coalesce_s,
            working_s=self._settings.working_s,
            chunk_limit_bytes=self._settings.chunk_limit_bytes,
            output_limit_bytes=spec.limits.output_bytes,
            shown_bytes=size_of(invocation.continuation),
        )

    def _dispatch(self) -> None:
        """Start whatever has a free place."""
        self._admission.dispatch()
        self._on_change()

    def _begin(self, execution: Execution) -> None:
        self.spawn(self._run(execution), name=f"run.{next(self._numbers)}")

    async def _run(self, execution: Execution) -> None:
        invocation = execution.invocation
        CALLER.set(
            Caller(
                key=execution.key,
                deadline=invocation.deadline,
                priority=invocation.priority,
                session=invocation.session,
            )
        )
        try:
            outcome = await self._outcome(execution)
            try:
                await asyncio.sleep(0)  # the terminal event leaves before the books are kept
            finally:
                self._conclude(execution, outcome)
        finally:
            try:
                await execution.settle()
            finally:
                ran_out = execution.stopped_by is None
                if execution.ticket is not None:
                    run_ms = execution.run_ms if ran_out else None
                    self._admission.free(execution.ticket, run_ms=run_ms)
                self._forget(execution)
                self._dispatch()

    async def _outcome(self, execution: Execution) -> Outcome:
        """Run it; whatever goes wrong on the way ends this one task and nothing else."""
        try:
            return await execution.run()
        except FoamError as exc:
            error = exc
        except Exception as exc:  # noqa: BLE001  # supervision boundary: one task among many
            _log.error("invocation.crashed", task=execution.invocation.task, exc_info=exc)
            error = ExecutionFailed(f"its output cannot be sent: {exc}"[:500])
        return await execution.end_with(error)

    def _conclude(self, execution: Execution, outcome: Outcome) -> None:
        """Remember and report how an execution ended; it may still occupy its instance."""
        invocation = execution.invocation
        self._outcomes.record(invocation, outcome)
        if self._current.get((invocation.client, invocation.task)) is execution:
            del self._current[invocation.client, invocation.task]
        if outcome.status == "dropped":
            self.counters.dropped += 1
        elif outcome.status == "unsure":
            self.counters.unsure += 1
        elif outcome.status == "failed":
            self.counters.failed += 1
        elif outcome.status == "refused":
            self.counters.given_back += 1
        else:
            self.counters.finished += 1
        self._reporter.ended(invocation, outcome)
        if outcome.status == "dropped" and execution.asked_by is not None:
            # It may have been another router that superseded it: whoever relies on it has to know.
            whose = invocation.client, invocation.task
            self.account(whose, invocation.attempt, router=execution.asked_by)
        try:
            self._learn(execution, outcome)
        except Exception as exc:  # noqa: BLE001  # supervision boundary: figures of others' runtimes
            _log.error("invocation.unlearnt", function=execution.spec.name, exc_info=exc)
        _log.info(
            "invocation.ended",
            task=invocation.task,
            attempt=invocation.attempt,
            function=execution.spec.name,
            status=outcome.status,
            code=outcome.code,
        )

    def _learn(self, execution: Execution, outcome: Outcome) -> None:
        """Take in what a run has shown."""
        if execution.ticket is not None and outcome.answered:
            self._admission.ended(execution.ticket, execution.final, run_ms=execution.run_ms)
        elif execution.ticket is not None and execution.cut_ms is not None:
            self._admission.cut(execution.ticket, ran_ms=execution.cut_ms)
        self._on_ended(execution, outcome)

    def _forget(self, execution: Execution) -> None:
        self._live.pop(execution.key, None)
        if not self._live:
            self._idle.set()

    def _stop(self, execution: Execution, reason: str) -> None:
        waits = execution.ticket is not None and self._admission.withdraw(execution.ticket)
        execution.stop(reason)
        if waits:
            self._end_waiting(execution, execution.stop_error())

    def _end_waiting(self, execution: Execution, error: FoamError) -> None:
        """End an invocation that has not begun."""
        if execution.ticket is not None:
            self._admission.withdraw(execution.ticket)
        self.spawn(self._finish_waiting(execution, error), name=f"end.{next(self._numbers)}")

    async def _finish_waiting(self, execution: Execution, error: FoamError) -> None:
        try:
            self._conclude(execution, await execution.end_with(error))
        finally:
            self._forget(execution)
            self._on_change()
