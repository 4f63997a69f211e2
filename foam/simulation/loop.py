"""An event loop whose time is virtual, and processes inside it that can be killed and stopped.

Nothing waits: when nothing is ready, the clock jumps to the next timer. What happens, and in which
order, depends on nothing but the program, so the same seed gives the same run. Work handed to
threads (``asyncio.to_thread``) is done in the loop.

A `Process` is a context: every task, timer and callback that is made in it belongs to it, and so
does what these make. The loop runs nothing of a process that is dead, and keeps what a stopped one
would do until it goes on, as ``SIGKILL``, ``SIGSTOP`` and ``SIGCONT`` do.
"""

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

__all__ = ["Process", "VirtualLoop", "run_virtual"]

_UNWIND_ROUNDS: Final = 50

_process: contextvars.ContextVar["Process | None"] = contextvars.ContextVar(
    "foam_simulated_process", default=None
)
_Ts = TypeVarTuple("_Ts")
_T = TypeVar("_T")
_Entry = tuple[asyncio.Handle, "Process | None"]


class Process:
    """One simulated operating system process; see the module.

    Args:
        name: For the trace.

    Attributes:
        alive: Whether it has not been killed.
        stopped: Whether it stands still.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.stopped = False
        self._held: list[_Entry] = []
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def context(self) -> contextvars.Context:
        """Return a context that belongs to the process, for what begins its life."""
        context = contextvars.Context()
        context.run(_process.set, self)
        return context

    def stop(self) -> None:
        """Stand still (SIGSTOP)."""
        self.stopped = True

    def go_on(self, loop: "VirtualLoop") -> None:
        """Go on (SIGCONT): what became due meanwhile happens now, in its old order."""
        self.stopped = False
        held, self._held = self._held, []
        loop.put_back(held)

    async def kill(self) -> None:
        """Die (SIGKILL): nothing of it runs any more. No time passes.

        Cut it off from the world before. Its coroutines are unwound here, or the garbage collection
        would do so at a time of its own choosing; what does not end at once stays where it is.
        """
        self.stopped = False
        self._held.clear()
        for _ in range(_UNWIND_ROUNDS):
            if not self._tasks:
                break
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.sleep(0)
        self.alive = False

    def hold(self, entry: _Entry) -> None:
        """Keep what is due until it goes on."""
        self._held.append(entry)

    def own(self, task: "asyncio.Task[Any]") -> None:
        """Count a task among its own."""
        self._tasks[task] = None
        task.add_done_callback(self._disown, context=contextvars.Context())

    def _disown(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.pop(task, None)


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop; see the module. It does no input and no output, and starts no thread.

    Attributes:
        mishaps: What went wrong in callbacks, or was never awaited, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mishaps: list[str] = []
        self._now_s = 0.0
        self._next: deque[_Entry] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle, Process | None]] = []
        self._numbers = itertools.count()

    # ---- time and callbacks

    def time(self) -> float:
        """Return virtual seconds since the start."""
        return self._now_s

    def call_soon(
        self,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Run a callback in the next round, in its context's process."""
        where = contextvars.copy_context() if context is None else context
        handle = asyncio.Handle(callback, args, self, where)
        self._next.append((handle, where.get(_process)))
        return handle

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Run a callback in the next round: there are no threads."""
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run a callback at a time; those of one time run in the order in which they were set."""
        where = contextvars.copy_context() if context is None else context
        handle = asyncio.TimerHandle(when, callback, args, self, where)
        entry = (when, next(self._numbers), handle, where.get(_process))
        heapq.heappush(self._timers, entry)
        return handle

    def put_back(self, entries: list[_Entry]) -> None:
        """Let entries that a stopped process held run in the next round."""
        self._next.extend(entries)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Be told of a cancelled timer: it is passed over when its time comes."""

    def _run_once(self) -> None:
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not self._next:
            if not timers:
                raise RuntimeError("the simulation has come to a stop: nothing is left to happen")
            self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            _, _, timer, owner = heapq.heappop(timers)
            self._next.append((timer, owner))
        for _ in range(len(self._next)):
            handle, process = self._next.popleft()
            if handle.cancelled() or (process is not None and not process.alive):
                continue
            if process is not None and process.stopped:
                process.hold((handle, process))
                continue
            handle._run()  # noqa: SLF001  # what an event loop does with its handles

    # ---- tasks and futures

    def create_task(
        self,
        coro: Any,
        *,
        name: object = None,
        context: contextvars.Context | None = None,
        **_: Any,
    ) -> "asyncio.Task[Any]":
        """Make a task; it belongs to the process of its context."""
        where = contextvars.copy_context() if context is None else context
        task: asyncio.Task[Any] = asyncio.Task(
            coro, loop=self, name=None if name is None else str(name), context=where
        )
        process = where.get(_process)
        if process is not None:
            process.own(task)
        return task

    def run_in_executor(
        self, executor: Any, func: Callable[[Unpack[_Ts]], _T], *args: *_Ts
    ) -> "asyncio.Future[_T]":
        """Do the work of a thread here, in the next round."""
        future: asyncio.Future[_T] = self.create_future()

        def work() -> None:
            if future.done():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:  # noqa: BLE001  # it belongs to whoever awaits it
                future.set_exception(error)

        self.call_soon(work)
        return future

    # ---- life

    def close(self) -> None:
        """Forget everything."""
        self._next.clear()
        self._timers.clear()
        super().close()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Note what went wrong outside of any task."""
        error = context.get("exception")
        self.mishaps.append(f"{context.get('message')}: {error!r}")


def run_virtual(main: Callable[[VirtualLoop], Coroutine[Any, Any, Any]]) -> Any:
    """Run a simulation to its end and return its result.

    Args:
        main: Makes the coroutine, given the loop.
    """
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.close()
