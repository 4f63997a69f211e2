"""The life of one process: its parts entered in order, watched, and left in reverse."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

import structlog

from broker.lifecycle import ProcessEnd, Service
from foam.status import ProcessStatus

__all__ = ["STDIN", "Lasting", "Process", "run_process"]

STDIN: Final = 0
"""Descriptor that a supervised process watches for the end of its parent."""
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Lasting(Protocol):
    """Something entered that can end by itself."""

    async def wait(self) -> Any:
        """Return when it was stopped; raise when it cannot go on."""
        ...

    async def __aenter__(self) -> Self:
        """Start it."""
        ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """Stop it."""
        ...


_L = TypeVar("_L", bound=Lasting)
_H = TypeVar("_H")


class Process(Service):
    """What one process runs, entered in order and left in reverse; the crash of one part ends it.

    Args:
        name: Which process it is.
        assemble: Enters the parts and returns the facts to report as ready.
        status: Where readiness is reported.
        stop_s: Time limit of leaving all parts, seconds.
    """

    def __init__(
        self,
        *,
        name: str,
        assemble: Callable[["Process"], Awaitable[Mapping[str, Any]]],
        status: ProcessStatus,
        stop_s: float = 15.0,
    ) -> None:
        super().__init__(service_id=name)
        self.stop_timeout_s = stop_s
        self.status = status
        self._name = name
        self._assemble = assemble
        self._stack = AsyncExitStack()
        self._opening: asyncio.Task[None] | None = None

    async def enter(self, part: _L) -> _L:
        """Enter a part and watch it; it is left when the process stops."""
        await self._stack.enter_async_context(part)
        self.spawn(self._watch(part), name=f"watch.{type(part).__name__}")
        return part

    async def hold(self, part: AbstractAsyncContextManager[_H]) -> _H:
        """Enter a part that does not end by itself; its errors reach whoever uses it."""
        return await self._stack.enter_async_context(part)

    async def _on_start(self) -> None:
        self._opening = self.spawn(self._open(), name="open")

    async def _on_stop(self) -> None:
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait({self._opening})
        await self._stack.aclose()

    async def _open(self) -> None:
        facts = await self._assemble(self)
        _log.info("process.ready", name=self._name)
        self.status.ready(**facts)

    async def _watch(self, part: Lasting) -> None:
        await part.wait()


async def run_process(process: Process) -> int:
    """Run a process until SIGTERM, SIGINT, the crash of a part, or the death of its supervisor.

    Args:
        process: What runs; not started yet.

    Returns:
        Exit code 0.

    Raises:
        FoamError: Why it cannot go on.
    """
    async with ProcessEnd(parent_fd=STDIN if process.status.supervised else None) as end, process:
        reason = await end.wait(process)
        _log.info("process.stopping", reason=reason)
    return 0
