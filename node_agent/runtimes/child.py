"""An instance as a child process: start, frames, output to the log, and a sure end."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncGenerator
from typing import Any, Final

import structlog

from broker.lifecycle import Service
from capability_schemas.errors import ExecutionFailed, FoamError, error_from_wire
from node_agent.isolation.system import Isolation, system_isolation
from node_agent.runtimes import base
from node_agent.runtimes.plumbing import SURPLUS_LIMIT_CHARS, CallFrames, FrameProtocol
from node_agent.runtimes.process import WorkerProcess
from node_agent.worker.frames import Frame

_END_LIMIT_S: Final = 5.0
"""How long a killed process may take to vanish before it is given up on, seconds."""

_STOP_GRACE_S: Final = 1.0
"""Time an instance has to end by itself when it is stopped, seconds."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ChildInstance(Service):
    """One instance in a process of its own; state owned by the event loop it was started on.

    Args:
        name: For logs and task names.
        load: The ``load`` frame: what to run and under which limits.
        start_timeout_s: Longest start, seconds.
        cancel_grace_s: Time a cancelled call has before the process is killed, seconds.
        died: Called once after the end.
        isolation: What keeps it apart; what this machine offers when None.
    """

    def __init__(
        self,
        *,
        name: str,
        load: dict[str, Any],
        start_timeout_s: float,
        cancel_grace_s: float,
        died: base.Died,
        isolation: Isolation | None = None,
    ) -> None:
        super().__init__(service_id=name)
        self._name = name
        self._load = load
        self._start_timeout_s = start_timeout_s
        self._cancel_grace_s = cancel_grace_s
        self._died = died
        self._calls: dict[str, CallFrames] = {}
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._following: asyncio.Task[None] | None = None
        self._exited = asyncio.Event()
        self._closing = False
        self._killed = False
        self._info: dict[str, Any] = {}
        self._protocol: FrameProtocol | None = None
        self._paused = False
        self._log = _log.bind(instance=name)
        self._isolation = isolation or system_isolation()
        self._limits = load.get("limits") or {}
        self._process = WorkerProcess(
            name=name, limits=self._limits, isolation=self._isolation, log=self._log
        )

    @property
    def pid(self) -> int:
        """Process id, which is also its process group and session."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it is ready and can take calls."""
        return bool(self._info) and not self._closing and not self._exited.is_set()

    @property
    def killed(self) -> bool:
        """Whether the agent ended it."""
        return self._killed or self._closing

    @property
    def busy(self) -> int:
        """Calls that occupy it."""
        return len(self._calls)

    @property
    def slots(self) -> int:
        """Calls at a time."""
        return int(self._info.get("slots", 1))

    @property
    def info(self) -> dict[str, Any]:
        """The ``ready`` frame's facts, and ``isolation``.

        That is its ``network`` (``denied``, ``granted`` or ``open``), and ``missing``: the limits
        that cannot be held here, with the reason.
        """
        return self._info

    async def _on_start(self) -> None:
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        try:
            ours = await self._process.start()
        except OSError as exc:
            raise base.InstanceFailed(f"instance {self._name} cannot start: {exc}") from exc
        self._following = self.spawn(self._follow(), name="follow")
        try:
            await self._connect(ours)
            async with asyncio.timeout(self._start_timeout_s):
                self._info = await self._ready
        except TimeoutError:
            await self.close(0)
            raise base.InstanceFailed(
                f"instance {self._name} was not ready within {self._start_timeout_s:g} s"
            ) from None
        except BaseException:
            self._ready.cancel()  # nobody will hear what it has to say
            await self.close(0)
            raise
        missing = self._isolation.missing(self._limits)
        self._info["isolation"] = {"network": self._info.pop("network", "open"), "missing": missing}
        self._log.info("instance.ready", pid=self.pid, slots=self.slots)
        if missing:
            self._log.warning("instance.limits_missing", **missing)

    async def _connect(self, ours: socket.socket) -> None:
        ours.setblocking(False)
        with contextlib.ExitStack() as unused:
            unused.callback(ours.close)
            _, self._protocol = await asyncio.get_running_loop().create_unix_connection(
                lambda: FrameProtocol(self._on_frame, self._on_socket_end), sock=ours
            )
            unused.pop_all()  # the transport closes it from here on
        self._protocol.send({"t": "load", **self._load, "confinement": self._process.confinement})

    async def invoke(self, request: base.Request) -> AsyncGenerator[base.Answer, None]:
        """Run one call; see `base.Instance`. Cancellation is safe: it cancels the call."""
        if not self.alive or self._protocol is None:
            raise self._death(alone=False)
        call = self._calls[request.id] = CallFrames()
        self._protocol.send(
            {
                "t": "invoke",
                "id": request.id,
                "input": request.input,
                "text": request.text,
                "left_ms": request.left_ms,
                "options": request.options,
                "session": request.session,
                "shown": request.shown,
            }
        )
        try:
            while True:
                while call.frames:
                    frame = call.take()
                    if frame["t"] == "piece":
                        yield base.Piece(frame.get("d"))
                        continue
                    if frame["t"] == "progress":
                        yield _progress(frame)
                        continue
                    if frame["t"] == "died":
                        raise self._death(alone=frame["alone"])
                    yield _final(frame)
                    return
                call.waits = True
                self._resume()
                call.arrived.clear()
                await call.arrived.wait()
        finally:
            call.abandoned = True
            call.waits = False
            call.frames.clear()
            self._resume()
            if not call.ended.is_set():
                self.cancel(request.id)

    def cancel(self, request_id: str) -> None:
        """Ask a call to end; kill the process when it has not within the grace time."""
        call = self._calls.get(request_id)
        if call is None or call.ended.is_set() or call.kill_timer is not None:
            return
        if self._protocol is not None:
            self._protocol.send({"t": "cancel", "id": request_id})
        call.kill_timer = asyncio.get_running_loop().call_later(
            self._cancel_grace_s, self._kill, "a cancelled call did not end"
        )
        self._resume()  # its end stands behind whatever is unread

    async def settled(self, request_id: str) -> None:
        """Return when the call no longer occupies the instance."""
        call = self._calls.get(request_id)
        if call is not None:
            await call.ended.wait()

    async def close(self, grace_s: float) -> None:
        """End the process; see `base.Instance`."""
        if not self._closing:
            self._closing = True
            if self._protocol is not None and grace_s > 0 and not self._exited.is_set():
                self._protocol.send({"t": "close"})
                try:
                    async with asyncio.timeout(grace_s):
                        await self._exited.wait()
                except TimeoutError:
                    pass
                except asyncio.CancelledError:  # whoever closes it may run out of time
                    self._kill("it was closed")
                    raise
        if not self._exited.is_set():
            self._kill("it was closed")
        if self._following is not None:
            await asyncio.wait({self._following}, timeout=_END_LIMIT_S)

    async def _on_stop(self) -> None:
        await self.close(_STOP_GRACE_S)

    async def _follow(self) -> None:
        try:
            try:
                await self._process.wait()
            finally:
                self._exited.set()
                self._finish()
                if self._protocol is not None:
                    self._protocol.close()
            await asyncio.to_thread(self._process.clear)
        except asyncio.CancelledError:
            await self._process.abandon()
            raise

    def _finish(self) -> None:
        """Tell everybody who waits that the process has ended."""
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(base.InstanceFailed(self._epitaph("before it was ready")))
        alone = len(self._calls) == 1
        for request_id, call in list(self._calls.items()):
            call.put({"t": "died", "alone": alone})
            self._end_call(request_id, call)
        status = self._process.status
        if not self.killed:
            last = self._process.last_lines
            self._log.error("instance.died", status=status, cause=self._process.limit, last=last)
        else:
            self._log.info("instance.ended", status=status)
        self._died(self)

    def _on_frame(self, frame: Frame) -> None:
        kind = frame["t"]
        if kind in ("ready", "failed"):
            self._on_ready(frame)
            return
        request_id = str(frame.get("id"))
        call = self._calls.get(request_id)
        if call is None:
            return
        if kind not in ("piece", "progress"):
            self._end_call(request_id, call)
        if call.abandoned:
            return
        call.put(frame)
        if call.is_full:
            self._pause(request_id, call)

    def _on_ready(self, frame: Frame) -> None:
        if self._ready is None or self._ready.done():
            return
        if frame["t"] == "ready":
            self._ready.set_result(dict(frame.get("info") or {}))
        else:
            message = f"instance {self._name} did not start: {frame.get('message')}"
            self._ready.set_exception(base.InstanceFailed(message))

    def _on_socket_end(self, problem: str) -> None:
        """Without its socket a child is of no use: make sure that it ends."""
        if problem:
            self._log.error("instance.bad_frame", problem=problem)
        if not self._exited.is_set():
            if problem:
                self._kill(problem)
            else:
                self._process.kill()

    def _end_call(self, request_id: str, call: CallFrames) -> None:
        self._calls.pop(request_id, None)
        if call.kill_timer is not None:
            call.kill_timer.cancel()
        call.ended.set()

    def _pause(self, request_id: str, call: CallFrames) -> None:
        """Let the child wait for a slow reader, unless other calls would have to wait with it."""
        if not self._needed():
            if not self._paused and self._protocol is not None:
                self._paused = True
                self._protocol.pause(paused=True)
        elif call.surplus_chars > SURPLUS_LIMIT_CHARS:
            self._log.warning("instance.answer_unread", call=request_id)
            message = f"more than {SURPLUS_LIMIT_CHARS} characters of its answer were not read"
            call.abandoned = True
            call.frames.clear()
            call.put({"t": "error", "code": "overloaded", "message": message})
            self.cancel(request_id)

    def _resume(self) -> None:
        if self._paused and self._protocol is not None:
            calls = self._calls.values()
            if any(call.is_half_full for call in calls) and not self._needed():
                return
            self._paused = False
            self._protocol.pause(paused=False)

    def _needed(self) -> bool:
        return any(call.needs_frames for call in self._calls.values())

    def _kill(self, reason: str) -> None:
        if not self._killed:
            self._killed = True
            self._log.info("instance.killed", reason=reason)
            self._process.kill()

    def _death(self, *, alone: bool) -> FoamError:
        message = self._epitaph("in the middle of a call")
        if self._process.limit and alone:  # its own doing: it would end like that anywhere
            return ExecutionFailed(message, status=self._process.status)
        return base.InstanceDied(message, status=self._process.status)

    def _epitaph(self, when: str) -> str:
        status = self._process.status
        how = f"exit status {status}"
        if status is not None and status < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-status).name
        cause = self._process.limit
        return f"instance {self._name} ended {when}: {how}" + (f": it {cause}" if cause else "")


def _final(frame: Frame) -> base.Final:
    """Turn the last frame of a call into its final, or raise what it reports.

    Raises:
        FoamError: The call failed.
    """
    if frame["t"] == "final":
        return base.Final(
            output=frame.get("output"),
            usage=dict(frame.get("usage") or {}),
            finish=str(frame.get("finish") or ""),
            confidence=frame.get("confidence"),
            timing=dict(frame.get("timing") or {}),
        )
    raise failure(frame)


def _progress(frame: Frame) -> base.Progress:
    return base.Progress(
        step=str(frame.get("step")),
        state=str(frame.get("state")),
        detail=dict(frame.get("detail") or {}),
    )


def failure(frame: Frame) -> FoamError:
    """Return the exception that an ``error`` frame stands for."""
    error = error_from_wire(
        str(frame.get("code")),
        str(frame.get("message")),
        retryable=False,
        detail=dict(frame.get("detail") or {}),
    )
    error.remote = False
    return error
