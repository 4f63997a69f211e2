"""The live figures of a node: how busy, how fast, how much memory is left."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from capability_schemas.functions import FunctionSpec
from capability_schemas.node import FunctionLoad, NodeLoad
from node_agent.admission.control import Admission
from node_agent.admission.forecast import LEAST_RUNS, STALE_MS
from node_agent.admission.queue import AdmissionQueue
from node_agent.pool.memory import available_memory_bytes
from node_agent.pool.pool import InstancePool

_SMOOTHING: Final = 0.2
"""Weight of the newest run in a smoothed time."""

_REMEMBERED: Final = 32
"""Runs the quickest is taken from."""


@dataclass(slots=True)
class _Times:
    """Times of the runs of a function that went well, milliseconds."""

    first_ms: float | None = None
    total_ms: float | None = None
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    ended_at: int = 0


class LoadGauge:
    """Measures a node; owned by the agent's event loop.

    Args:
        node: The node.
        epoch: Start of the agent, UTC milliseconds.
        functions: What it offers.
        queue: Its admission queue.
        queue_limit: Most entries that may wait.
        admission: Predicts waits.
        pool: Its instances.
        clock: UTC milliseconds.
        available: Returns the memory there is for more, bytes.
    """

    def __init__(
        self,
        *,
        node: str,
        epoch: int,
        functions: Mapping[str, FunctionSpec],
        queue: AdmissionQueue,
        queue_limit: int,
        admission: Admission,
        pool: InstancePool,
        clock: Callable[[], int],
        available: Callable[[], int | None] = available_memory_bytes,
    ) -> None:
        self._node = node
        self._epoch = epoch
        self._functions = dict(functions)
        self._queue = queue
        self._queue_limit = queue_limit
        self._admission = admission
        self._pool = pool
        self._clock = clock
        self._available = available
        self._times: dict[str, _Times] = {}
        self._saturation = 0

    def replace(self, functions: Mapping[str, FunctionSpec]) -> None:
        """Measure other functions from now on; what was edited is measured anew.

        Args:
            functions: All that the node offers now, by name.
        """
        for name, spec in self._functions.items():
            if functions.get(name) != spec:
                self._times.pop(name, None)
        self._functions = dict(functions)

    def first_ms(self, function: str) -> float | None:
        """Return the smoothed time to the first output of a warm run, milliseconds."""
        times = self._times.get(function)
        return None if times is None else times.first_ms

    def add_run(self, function: str, *, first_ms: float | None, total_ms: float) -> None:
        """Count a run that went well into the smoothed times; one of a withdrawn function does not.

        Args:
            function: The function.
            first_ms: Time to the first output, milliseconds.
            total_ms: Time of the whole run, milliseconds.
        """
        if function not in self._functions:
            return
        times = self._times.setdefault(function, _Times())
        if first_ms is not None:
            times.first_ms = _smooth(times.first_ms, first_ms)
        times.total_ms = _smooth(times.total_ms, total_ms)
        times.latest.append(round(total_ms, 3))
        times.ended_at = self._clock()

    def saturation_changed(self) -> bool:
        """Tell whether the node has become idle, busy, saturated or full since the last call."""
        running, waiting = self._queue.running, self._queue.waiting
        level = (
            (running > 0)
            + (running >= self._queue.capacity)
            + (waiting > 0)
            + (waiting >= self._queue_limit)
        )
        changed = level != self._saturation
        self._saturation = level
        return changed

    def load(self) -> NodeLoad:
        """Return the load message."""
        return NodeLoad(
            node=self._node,
            epoch=self._epoch,
            at=self._clock(),
            queued=self._queue.waiting,
            running=self._queue.running,
            queue_limit=self._queue_limit,
            capacity=self._queue.capacity,
            memory_free_bytes=self._available(),
            functions={name: self._function_load(name) for name in self._functions},
        )

    def _function_load(self, name: str) -> FunctionLoad:
        spec = self._functions[name]
        running, queued = self._queue.counts(name)
        times = self._times.get(name) or _Times()
        wait_ms = self._admission.wait_ms(spec)
        return FunctionLoad(
            running=running,
            queued=queued,
            instances=len(self._pool.instances(spec)),
            concurrency=self._queue.concurrency_of(name) or spec.concurrency,
            first_ms=times.first_ms,
            total_ms=times.total_ms,
            least_ms=self._least_ms(times),
            wait_ms=None if wait_ms is None else round(wait_ms, 3),
            degraded=self._pool.is_degraded(spec),
        )

    def _least_ms(self, times: _Times) -> float | None:
        """Return the quickest of the late runs, once they tell what a run takes at the least.

        As in the forecast, old runs and the very first refuse nothing.
        """
        if len(times.latest) < LEAST_RUNS or self._clock() - times.ended_at > STALE_MS:
            return None
        return min(times.latest)


def _smooth(old: float | None, new: float) -> float:
    return round(new if old is None else old + _SMOOTHING * (new - old), 3)
