"""The live figures of a node: how busy, how fast, how much memory is left."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from capability_schemas.functions import FunctionSpec
from capability_schemas.node import FunctionLoad, NodeLoad
from node_agent.pool import InstancePool
from node_agent.queue import AdmissionQueue

_SMOOTHING: Final = 0.2
"""Weight of the newest run in a smoothed time."""

_MEMINFO: Final = Path("/proc/meminfo")


def available_memory_bytes(meminfo: Path = _MEMINFO) -> int | None:
    """Return the memory a new process may take, bytes; None where the system does not say.

    ``MemAvailable`` of proc(5), Linux 3.14 and later.

    Args:
        meminfo: The file to read.
    """
    try:
        with meminfo.open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


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
        self._functions = functions
        self._queue = queue
        self._queue_limit = queue_limit
        self._pool = pool
        self._clock = clock
        self._first_ms: dict[str, float] = {}
        self._total_ms: dict[str, float] = {}
        self._saturation = 0

    def add_run(self, function: str, *, first_ms: float | None, total_ms: float) -> None:
        """Count a run that went well into the smoothed times.

        Args:
            function: The function.
            first_ms: Time to the first output, milliseconds.
            total_ms: Time of the whole run, milliseconds.
        """
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
            concurrency=spec.concurrency,
            first_ms=self._first_ms.get(name),
            total_ms=self._total_ms.get(name),
            degraded=self._pool.is_degraded(spec),
        )


def _smooth(old: float | None, new: float) -> float:
    return round(new if old is None else old + _SMOOTHING * (new - old), 3)
