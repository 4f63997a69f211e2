"""What instances and model files show of the functions of a node, for its claims."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from capability_schemas.capability import ModelInfo, Resources
from capability_schemas.functions import FunctionSpec
from node_agent.admission.queue import AdmissionQueue
from node_agent.announcer import Announcer
from node_agent.gauge import LoadGauge
from node_agent.models.gguf import BrokenModel, read_gguf
from node_agent.pool.pool import InstancePool
from node_agent.runtimes.base import Runtime


class Spawn(Protocol):
    """Runs background work in the agent's life cycle."""

    def __call__(self, coro: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Start it."""
        ...


class ModelFiles:
    """The files behind the models of functions.

    Args:
        runtimes: Runtime by name; may change.
        path: Returns the file of a model; blocks; raises ``ConfigurationError`` where there is
            none.
    """

    def __init__(self, *, runtimes: Mapping[str, Runtime], path: Callable[[str], Path]) -> None:
        self._runtimes = runtimes
        self._path = path

    def file(self, spec: FunctionSpec) -> Path | None:
        """Return the file behind the model of a function; blocks.

        Raises:
            ConfigurationError: There is no such model.
        """
        about = self._runtimes[spec.runtime].model(spec, {})
        if spec.model is None or about is None or about.engine is not None:
            return None
        return self._path(spec.model)

    def describe(self, spec: FunctionSpec) -> tuple[ModelInfo, Path] | None:
        """Describe the model of a function by the head of its file; blocks.

        Raises:
            ConfigurationError: There is no such model.
        """
        path = self.file(spec)
        about = self._runtimes[spec.runtime].model(spec, {})
        if path is None or about is None:
            return None
        try:
            head = read_gguf(path)
        except BrokenModel:  # of another format, whose runtime took it
            return about, path
        update = {"name": head.name or about.name, "quantisation": head.quantisation}
        return about.model_copy(update=update), path


class Showcase:
    """Starts instances that shall be warm, and says what instances have shown. Of the event loop.

    Args:
        runtimes: Runtime by name; may change.
        functions: Returns what the node offers, by name.
        pool: The instances.
        queue: Knows how many run at a time.
        gauge: Knows how long they take.
        announcer: Makes the claims.
        spawn: Runs background work.
    """

    def __init__(
        self,
        *,
        runtimes: Mapping[str, Runtime],
        functions: Callable[[], Mapping[str, FunctionSpec]],
        pool: InstancePool,
        queue: AdmissionQueue,
        gauge: LoadGauge,
        announcer: Announcer,
        spawn: Spawn,
    ) -> None:
        self._runtimes = runtimes
        self._functions = functions
        self._pool = pool
        self._queue = queue
        self._gauge = gauge
        self._announcer = announcer
        self._spawn = spawn
        self._warming: list[asyncio.Task[None]] = []

    def warm(self, functions: Iterable[FunctionSpec]) -> None:
        """Start the first instances of those that are to be ``warm``."""
        self._warming = [task for task in self._warming if not task.done()] + [
            self._spawn(self._warm(spec), name=f"warm.{spec.name}")
            for spec in functions
            if spec.warm
        ]

    async def wait(self, timeout_s: float) -> bool:
        """Wait until the first instances have started, or failed to; cancellation is safe.

        Args:
            timeout_s: Longest wait, seconds.

        Returns:
            Whether nothing was left to wait for.
        """
        if not self._warming:
            return True
        _, pending = await asyncio.wait(self._warming, timeout=timeout_s)
        return not pending

    def advertise(self, spec: FunctionSpec) -> None:
        """Tell what the instances of a function have shown about it."""
        info = self._pool.info(spec)
        self._announcer.measured(
            spec.name,
            self._runtimes[spec.runtime].model(spec, info) if info else None,
            Resources(
                memory_bytes=info.get("memory_bytes") or spec.limits.memory_bytes,
                context_tokens=info.get("context_tokens"),
                concurrency=self._queue.concurrency_of(spec.name) or spec.concurrency,
                first_ms=self._gauge.first_ms(spec.name),
                token_ms=info.get("token_ms"),
            ),
        )

    async def _warm(self, spec: FunctionSpec) -> None:
        await self._pool.warm(spec)
        if self._functions().get(spec.name) == spec:
            self.advertise(spec)
            self._announcer.hurry()
