"""Life cycle of everything that runs in the background.

A ``Service`` owns its tasks: they start with it, end with it, and the first one that crashes is
what ``wait()`` raises. ``ProcessEnd`` and ``run_until_signal`` join services to the life of a
process: its signals, and the death of the parent that started it.

::

    class Ticker(Service):
        async def _on_start(self) -> None:
            self.spawn(self._tick(), name="tick")


    async with Ticker() as ticker:
        await run_until_signal(ticker)
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import structlog

from capability_schemas.errors import Unavailable

_CANCEL_LIMIT_S: Final = 5.0
_SAME_WISH_S: Final = 0.3
_R = TypeVar("_R")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Service:
    """Something with a lifetime: an async context manager that owns background tasks.

    Subclasses override ``_on_start``, ``_on_stop`` (tasks still run) and ``_on_stopped`` (tasks
    are gone). A service runs once: it is not re-entrant and says so by raising. Its state is
    owned by the event loop it was started on; nothing but ``__init__`` may be called elsewhere.

    Args:
        service_id: Which one it is among its kind ("edge-1"); part of task names and log lines.
    """

    stop_timeout_s: float = 10.0
    """Time limit of ``_on_stop``, seconds. Tasks are cancelled when it has passed."""

    def __init__(self, *, service_id: str = "") -> None:
        package = type(self).__module__.partition(".")[0]
        self._service_name = f"{package}.{type(self).__name__}[{service_id}]"
        self._tasks: dict[asyncio.Task[Any], None] = {}  # a set that keeps its order
        self._state = "new"
        self._crash: BaseException | None = None
        self._crash_seen = False  # somebody has been told: stop() need not repeat it
        self._ended = asyncio.Event()

    @property
    def running(self) -> bool:
        """Whether it was started, has not crashed and was not asked to stop."""
        return self._state == "running" and self._crash is None

    @property
    def crash(self) -> BaseException | None:
        """What the first task that failed raised, if any did."""
        return self._crash

    def spawn(self, coro: Coroutine[Any, Any, _R], *, name: str) -> asyncio.Task[_R]:
        """Run ``coro`` in the background until it returns or the service stops.

        Args:
            coro: What to run. An exception out of it is the crash of this service.
            name: Its role ("receive"); the task is named ``package.Class[id].role``.

        Returns:
            The task, for a caller that wants its result or has to cancel it earlier.

        Raises:
            RuntimeError: The service is not running; ``coro`` is closed unrun.
        """
        if self._state not in {"starting", "running", "stopping"}:
            coro.close()
            raise RuntimeError(f"{self._service_name} is {self._state} and runs no {name}")
        task = asyncio.get_running_loop().create_task(coro, name=f"{self._service_name}.{name}")
        self._tasks[task] = None
        task.add_done_callback(self._reap)
        return task

    async def start(self) -> None:
        """Start; returns when ``_on_start`` has returned.

        Cancellation and errors stop what had been started before they are passed on.

        Raises:
            RuntimeError: It was started before.
        """
        if self._state != "new":
            raise RuntimeError(f"{self._service_name} is {self._state}: a service starts once")
        self._state = "starting"
        try:
            await self._on_start()
        except BaseException:
            with contextlib.suppress(Exception):  # supervision boundary: the first error counts
                await self._wind_down()
            raise
        self._state = "running"

    async def stop(self) -> None:
        """Stop: ``_on_stop`` under its time limit, cancel the tasks, then ``_on_stopped``.

        Idempotent. A cancelled ``stop`` still cancels the tasks before it passes on the
        cancellation.

        Raises:
            BaseException: The crash of a task, cancellation excepted, unless ``wait`` has
                raised it already; or what a stop hook raised.
        """
        if self._state in {"new", "stopped", "stopping"}:
            self._state = "stopped" if self._state == "new" else self._state
            self._ended.set()
            return
        await self._wind_down()
        if self._crash is not None and not self._crash_seen:
            self._crash_seen = True
            raise self._crash

    async def wait(self) -> None:
        """Return when the service has been stopped; raise when one of its tasks crashed.

        Cancellation is safe and leaves the service running.

        Raises:
            BaseException: The crash.
        """
        await self._ended.wait()
        if self._crash is not None:
            self._crash_seen = True
            raise self._crash

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            await self.stop()
            return
        try:
            await self.stop()
        except Exception as late:  # noqa: BLE001  # supervision boundary: the body's error is first
            if late is not error:
                _log.warning("service.stop_failed", service=self._service_name, exc_info=late)

    async def _on_start(self) -> None:
        """Open resources and spawn tasks; override."""

    async def _on_stop(self) -> None:
        """Say goodbye while the tasks still run; override. Limited by ``stop_timeout_s``."""

    async def _on_stopped(self) -> None:
        """Release resources after the last task has ended; override."""

    async def _wind_down(self) -> None:
        self._state = "stopping"
        try:
            try:
                async with asyncio.timeout(self.stop_timeout_s):
                    await self._on_stop()
            except TimeoutError:
                _log.warning(
                    "service.stop_timeout", service=self._service_name, limit_s=self.stop_timeout_s
                )
        finally:
            try:
                await self._cancel_tasks()
                await self._on_stopped()
            finally:
                self._state = "stopped"
                self._ended.set()

    async def _cancel_tasks(self) -> None:
        current = asyncio.current_task()
        tasks = [task for task in reversed(self._tasks) if task is not current]
        for task in tasks:
            task.cancel()
        if not tasks:
            return
        _, alive = await asyncio.wait(tasks, timeout=_CANCEL_LIMIT_S)
        for task in alive:
            _log.error("service.task_stuck", task=task.get_name(), limit_s=_CANCEL_LIMIT_S)

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        _log.error("service.task_crashed", task=task.get_name(), exc_info=error)
        if self._crash is None:
            self._crash = error
            self._ended.set()


class ProcessEnd:
    """The reasons for which a process ends, as one thing to wait for.

    An async context manager: from entering on, SIGTERM and SIGINT no longer kill the process but
    are remembered, so that start-up can be wound down too. Main thread only.

    Args:
        parent_fd: Read end of a pipe whose write end the parent holds. When the parent dies,
            however it dies, the pipe closes and the process ends too. Nothing is read from it
            but its end.
    """

    def __init__(self, *, parent_fd: int | None = None) -> None:
        self._parent_fd = parent_fd
        self._reason: str | None = None
        self._asked = asyncio.Event()
        self._asked_at = 0.0
        self._insisted = asyncio.Event()
        self._signals = (signal.SIGTERM, signal.SIGINT)

    @property
    def reason(self) -> str | None:
        """Why the process shall end ("SIGTERM", "SIGINT", "parent gone"); ``None`` so far."""
        return self._reason

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.add_signal_handler(number, self._ask, number.name)
        if self._parent_fd is not None:
            os.set_blocking(self._parent_fd, False)
            loop.add_reader(self._parent_fd, self._read_parent)
        return self

    async def __aexit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.remove_signal_handler(number)
        if self._parent_fd is not None:
            loop.remove_reader(self._parent_fd)

    async def wait(self, *services: Service) -> str:
        """Wait until the process shall end.

        Args:
            *services: Running services; the crash of any of them ends the wait too.

        Returns:
            The reason; "stopped" when one of ``services`` was stopped by somebody else.

        Raises:
            BaseException: The crash of a service.
        """
        asked = asyncio.get_running_loop().create_task(self._asked.wait(), name="broker.end.asked")
        ends = [
            asyncio.get_running_loop().create_task(service.wait(), name="broker.end.service")
            for service in services
        ]
        try:
            done, _ = await asyncio.wait([asked, *ends], return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                if end in done:
                    end.result()
        finally:
            for task in (asked, *ends):
                task.cancel()
        return self._reason or "stopped"

    async def wait_insisted(self) -> None:
        """Wait until a signal comes once more, though the process ends already.

        What comes right behind the first is the same wish: a terminal sends its signal to a whole
        group of processes, of which one may pass it on.
        """
        await self._insisted.wait()

    def _ask(self, reason: str) -> None:
        now = asyncio.get_running_loop().time()
        if self._reason is None:
            self._reason = reason
            self._asked_at = now
            _log.info("process.end", reason=reason)
        elif now - self._asked_at > _SAME_WISH_S:
            self._insisted.set()
        self._asked.set()

    def _read_parent(self) -> None:
        fd = self._parent_fd
        if fd is None:
            return
        try:
            if os.read(fd, 4096):
                return
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("process.parent_pipe", error=str(error))
        asyncio.get_running_loop().remove_reader(fd)
        if self._reason is None:
            self._ask("parent gone")


async def run_until_signal(*services: Service, parent_fd: int | None = None) -> str:
    """Keep running services alive until SIGTERM, SIGINT, a crash or the death of the parent.

    The caller has entered the services and leaves them afterwards.

    Args:
        *services: Running services to watch.
        parent_fd: As for ``ProcessEnd``.

    Returns:
        Why it ended.

    Raises:
        BaseException: The crash of a service.
    """
    async with ProcessEnd(parent_fd=parent_fd) as end:
        return await end.wait(*services)


async def parent_watch(fd: int) -> None:
    """Wait until the parent's end of a pipe closes, then raise.

    For ``Service.spawn``: the service crashes, and with it the process that waits on it.

    Args:
        fd: Read end of the pipe.

    Raises:
        Unavailable: The parent is gone.
    """
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()

    def on_readable() -> None:
        try:
            if not os.read(fd, 4096):
                gone.set()
        except BlockingIOError:
            return
        except OSError:
            gone.set()

    os.set_blocking(fd, False)
    loop.add_reader(fd, on_readable)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(fd)
    raise Unavailable("the process that started this one is gone", retryable=False)
