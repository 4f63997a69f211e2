"""An instance without a process: its calls are tasks in the agent's own loop.

For work that waits on something else (a server, other functions) and needs neither a processor
nor protection. A runtime overrides `answer`::

    class EchoInstance(InLoopInstance):
        async def answer(self, request: Request, put: Put) -> None:
            await put(Piece(request.text))
            await put(Final(output=request.text))
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final

import structlog

from broker.lifecycle import Service
from capability_schemas.errors import ExecutionFailed, FoamError, TaskCancelled
from node_agent.runtimes import base

Put = Callable[[base.Answer], Awaitable[None]]
"""Hands an answer on; waits while whoever iterates is slow."""

_AHEAD: Final = 64
"""Unread answers of one call at which its task waits."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class _Call:
    """One call: its answers on the way from its task to whoever iterates."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[base.Answer | FoamError] = asyncio.Queue(_AHEAD)
        self.ended = asyncio.Event()

    def fail(self, error: FoamError) -> None:
        """End it at once, in place of what has not been read yet."""
        while not self.answers.empty():
            self.answers.get_nowait()
        self.answers.put_nowait(error)


class InLoopInstance(Service):
    """An instance in the agent's loop, which owns its state; see `base.Instance`.

    Subclasses override `answer`, and ``_on_start`` and ``_on_stopped`` of the service where they
    hold something open.

    Args:
        name: For logs and task names.
        slots: Calls at a time.
        died: Called once after the end.
        info: What it says about itself, but for the slots.
    """

    def __init__(
        self, *, name: str, slots: int, died: base.Died, info: dict[str, Any] | None = None
    ) -> None:
        super().__init__(service_id=name)
        self._name = name
        self._slots = slots
        self._died: base.Died | None = died
        self._info = {"slots": slots, **(info or {})}
        self._calls: dict[str, tuple[_Call, asyncio.Task[None]]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    @property
    def pid(self) -> int:
        """0: it has no process."""
        return 0

    @property
    def alive(self) -> bool:
        """Whether it can take calls."""
        return self.running and self._died is not None and not self._closing

    @property
    def killed(self) -> bool:
        """Whether the agent ended it."""
        return self._closing

    @property
    def busy(self) -> int:
        """Calls under way."""
        return len(self._calls)

    @property
    def slots(self) -> int:
        """Calls at a time."""
        return self._slots

    @property
    def info(self) -> dict[str, Any]:
        """What it said about itself."""
        return self._info

    async def answer(self, request: base.Request, put: Put) -> None:
        """Run one call: put pieces and progress, then one final; override.

        Raises:
            FoamError: It failed. Anything else that is raised becomes ``ExecutionFailed``.
        """
        raise ExecutionFailed(f"{type(self).__name__} answers nothing")

    def lost(self, why: str) -> base.InstanceDied:
        """Take no more calls, tell that it has ended, and return the error that says why.

        Calls under way go on; what the service holds is released after the last one.
        """
        _log.error("instance.lost", instance=self._name, problem=why)
        self._tell()
        return self._death(why)

    async def invoke(self, request: base.Request) -> AsyncGenerator[base.Answer, None]:
        """Run one call; see `base.Instance`. Cancellation is safe: it cancels the call."""
        if not self.alive:
            raise self._death("it has ended")
        call = _Call()
        task = self.spawn(self._run(request, call), name=f"call.{request.id}")
        self._calls[request.id] = (call, task)
        self._idle.clear()
        task.add_done_callback(lambda task: self._call_ended(request.id, call, task))
        try:
            while True:
                answer = await call.answers.get()
                if isinstance(answer, base.Piece | base.Progress):
                    yield answer
                    continue
                await call.ended.wait()  # whoever has the final finds the slot free
                if isinstance(answer, FoamError):
                    raise answer
                yield answer
                return
        finally:
            task.cancel()

    def cancel(self, request_id: str) -> None:
        """End a call."""
        if request_id in self._calls:
            self._calls[request_id][1].cancel()

    async def settled(self, request_id: str) -> None:
        """Return when the call no longer occupies the instance."""
        if request_id in self._calls:
            await self._calls[request_id][0].ended.wait()

    async def close(self, grace_s: float) -> None:
        """Let calls end for so long, then cut them off; see `base.Instance`."""
        if not self._closing:
            self._closing = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._idle.wait()
        await self.stop()
        self._tell()

    async def _run(self, request: base.Request, call: _Call) -> None:
        try:
            await self.answer(request, call.answers.put)
        except FoamError as error:
            await call.answers.put(error)
        except Exception as exc:  # noqa: BLE001 - supervision boundary: one call, not the instance
            _log.error("instance.call_failed", instance=self._name, exc_info=exc)
            await call.answers.put(ExecutionFailed(f"{type(exc).__name__}: {exc}"))

    def _call_ended(self, request_id: str, call: _Call, task: asyncio.Task[None]) -> None:
        self._calls.pop(request_id, None)
        if task.cancelled():
            closing = self._closing
            call.fail(self._death("it was closed") if closing else TaskCancelled("cancelled"))
        call.ended.set()
        if not self._calls:
            self._idle.set()
            if self._died is None and self.running:  # nobody closes what has died
                self.spawn(self._on_stopped(), name="release")

    def _tell(self) -> None:
        died, self._died = self._died, None
        if died is not None:
            died(self)

    def _death(self, why: str) -> base.InstanceDied:
        return base.InstanceDied(f"instance {self._name}: {why}", status=None)
