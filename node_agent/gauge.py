"""The live figures of a node: how busy, how fast, how much memory is left."""

from collections.abc import Callable, Mapping
from typing import Final

from capability_schemas.functions import FunctionSpec
from capability_schemas.node import FunctionLoad, NodeLoad
from node_agent.admission.queue import AdmissionQueue
from node_agent.pool.memory import available_memory_bytes
from node_agent.pool.pool import InstancePool

_SMOOTHING: Final = 0.2
"""Weight of the newest run in a smoothed time."""


class LoadGauge:
    """Measures a node; owned by the agent's event loop.

    Args:
        node: The node.
        epoch: Start of the agent, UTC milliseconds.
        functions: What it offers.
        queue: Its admission queue.
        queue_limit: Most entries that may wait.
        pool: Its instances.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        node: str,
        epoch: int,
        functions: Mapping[str, FunctionSpec],
        queue: AdmissionQueue,
        queue_limit: int,
        pool: InstancePool,
        clock: Callable[[], int],
    ) -> None:
        self._node = node
        self._epoch = epoch
        self._functions = dict(functions)
        self._queue = queue
        self._queue_limit = queue_limit
        self._pool = pool
        self._clock = clock
        self._first_ms: dict[str, float] = {}
        self._total_ms: dict[str, float] = {}
        self._saturation = 0

    def replace(self, functions: Mapping[str, FunctionSpec]) -> None:
        """Measure other functions from now on; what was edited is measured anew.

        Args:
            functions: All that the node offers now, by name.
        """
        for name, spec in self._functions.items():
            if functions.get(name) != spec:
                self._first_ms.pop(name, None)
                self._total_ms.pop(name, None)
        self._functions = dict(functions)

    def first_ms(self, function: str) -> float | None:
        """Return the smoothed time to the first output of a warm run, milliseconds."""
        return self._first_ms.get(function)

    def add_run(self, function: str, *, first_ms: float | None, total_ms: float) -> None:
        """Count a run that went well into the smoothed times; one of a withdrawn function does not.

        Args:
            function: The function.
            first_ms: Time to the first output, milliseconds.
            total_ms: Time of the whole run, milliseconds.
        """
        if function not in self._functions:
            return
        if first_ms is not None:
            self._first_ms[function] = _smooth(self._first_ms.get(function), first_ms)
        self._total_ms[function] = _smooth(self._total_ms.get(function), total_ms)

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
            memory_free_bytes=available_memory_bytes(),
            functions={name: self._function_load(name) for name in self._functions},
        )

    def _function_load(self, name: str) -> FunctionLoad:
        spec = self._functions[name]
        running, queued = self._queue.counts(name)
        return FunctionLoad(
            running=running,
            queued=queued,
            instances=len(self._pool.instances(spec)),
            concurrency=self._queue.concurrency_of(name) or spec.concurrency,
            first_ms=self._first_ms.get(name),
            total_ms=self._total_ms.get(name),
            degraded=self._pool.is_degraded(spec),
        )


def _smooth(old: float | None, new: float) -> float:
    return round(new if old is None else old + _SMOOTHING * (new - old), 3)
