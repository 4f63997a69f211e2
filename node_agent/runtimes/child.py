"""An instance as a child process: start, frames, output to the log, and a sure end."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import structlog

from broker.lifecycle import Service
from capability_schemas.errors import FoamError, error_from_wire
from node_agent.runtimes import base
from node_agent.runtimes.plumbing import FrameProtocol, LogTap
from node_agent.worker.frames import Frame

_PACKAGE_ROOT: Final = Path(__file__).resolve().parents[2]
_PAUSE_FRAMES: Final = 256
"""Unread frames of one call at which the child's socket is left alone (its writes then wait)."""

_END_LIMIT_S: Final = 5.0
"""How long a killed process may take to vanish before it is given up on, seconds."""

_LAST_LINES_S: Final = 1.0
_EXIT_POLL_S: Final = 0.5
_STOP_GRACE_S: Final = 1.0
"""Time an instance has to end by itself when it is stopped, seconds."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class _Call:
    """Frames of one call on their way to whoever iterates it."""

    def __init__(self) -> None:
        self.frames: deque[Frame] = deque()
        self.arrived = asyncio.Event()
        self.ended = asyncio.Event()
        self.abandoned = False
        self.kill_timer: asyncio.TimerHandle | None = None

    def put(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.arrived.set()


class ChildInstance(Service):
    """One instance in a process of its own; state owned by the event loop it was started on.

    Args:
        name: For logs and task names.
        load: The ``load`` frame: what to run and under which limits.
        slots: Calls at a time, until the child says otherwise.
        start_timeout_s: Longest start, seconds.
        cancel_grace_s: Time a cancelled call has before the process is killed, seconds.
        died: Called once after the end.
    """

    def __init__(
        self,
        *,
        name: str,
        load: dict[str, Any],
        start_timeout_s: float,
        cancel_grace_s: float,
        died: base.Died,
    ) -> None:
        super().__init__(service_id=name)
        self._name = name
        self._load = load
        self._start_timeout_s = start_timeout_s
        self._cancel_grace_s = cancel_grace_s
        self._died = died
        self._calls: dict[str, _Call] = {}
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._exited = asyncio.Event()
        self._closing = False
        self._killed = False
        self._status: int | None = None
        self._info: dict[str, Any] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._protocol: FrameProtocol | None = None
        self._paused = False
        self._log = _log.bind(instance=name)
        self._taps = [LogTap(self._log, stream="stdout"), LogTap(self._log, stream="stderr")]

    @property
    def pid(self) -> int:
        """Process id, which is also its process group and session."""
        return 0 if self._process is None else self._process.pid

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
        """The ``ready`` frame's facts."""
        return self._info

    async def _on_start(self) -> None:
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as unused:
            unused.callback(ours.close)
            try:
                self._process = await self._spawn_process(theirs.fileno())
            except OSError as exc:
                raise base.InstanceFailed(f"instance {self._name} cannot start: {exc}") from exc
            finally:
                theirs.close()
            self.spawn(self._reap_process(self._process), name="reap")
            ours.setblocking(False)
            _, self._protocol = await loop.create_unix_connection(
                lambda: FrameProtocol(self._on_frame, self._on_socket_end), sock=ours
            )
            unused.pop_all()  # the transport closes it from here on
        self._protocol.send({"t": "load", **self._load})
        try:
            async with asyncio.timeout(self._start_timeout_s):
                self._info = await self._ready
        except TimeoutError:
            await self.close(0)
            raise base.InstanceFailed(
                f"instance {self._name} was not ready within {self._start_timeout_s:g} s"
            ) from None
        except BaseException:
            await self.close(0)
            raise
        self._log.info("instance.ready", pid=self.pid, slots=self.slots)

    async def _spawn_process(self, descriptor: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-u",
            "-m",
            "node_agent.worker",
            str(descriptor),
            str(os.getpid()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=_PACKAGE_ROOT,  # puts node_agent onto the child's import path
            pass_fds=(descriptor,),
            start_new_session=True,
        )

    async def invoke(self, request: base.Request) -> AsyncGenerator[base.Answer, None]:
        """Run one call; see `base.Instance`. Cancellation is safe: it cancels the call."""
        if not self.alive or self._protocol is None:
            raise self._death()
        call = self._calls[request.id] = _Call()
        self._protocol.send(
            {
                "t": "invoke",
                "id": request.id,
                "input": request.input,
                "text": request.text,
                "left_ms": request.left_ms,
                "options": request.options,
                "session": request.session,
            }
        )
        try:
            while True:
                while call.frames:
                    frame = call.frames.popleft()
                    if frame["t"] == "piece":
                        yield base.Piece(frame.get("d"))
                        continue
                    if frame["t"] == "progress":
                        yield _progress(frame)
                        continue
                    if frame["t"] == "died":
                        raise self._death()
                    yield _final(frame)
                    return
                self._resume()
                call.arrived.clear()
                await call.arrived.wait()
        finally:
            call.abandoned = True
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
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await self._exited.wait()
        if not self._exited.is_set():
            self._kill("it was closed")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_LIMIT_S):
                await self._exited.wait()
                if self._protocol is not None:
                    self._protocol.close()
                    await self._protocol.closed.wait()

    async def _on_stop(self) -> None:
        await self.close(_STOP_GRACE_S)

    async def _on_stopped(self) -> None:
        if self._protocol is not None:
            self._protocol.close()

    async def _reap_process(self, process: asyncio.subprocess.Process) -> None:
        streams = (process.stdout, process.stderr)
        async with asyncio.TaskGroup() as group:
            taps = [
                group.create_task(tap.follow(stream), name=f"node_agent.LogTap[{self._name}]")
                for tap, stream in zip(self._taps, streams, strict=True)
                if stream is not None
            ]
            self._status = await _exit_status(process)
            # What the function itself started must not outlive it, and it holds our pipes open;
            # what has left the process group keeps them open for as long as it likes.
            self._signal_group()
            if taps:
                await asyncio.wait(taps, timeout=_LAST_LINES_S)
            for tap_task in taps:
                tap_task.cancel()
        self._exited.set()
        self._finish()

    def _finish(self) -> None:
        """Tell everybody who waits that the process has ended."""
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(base.InstanceFailed(self._epitaph("before it was ready")))
        for request_id, call in list(self._calls.items()):
            call.put({"t": "died"})
            self._end_call(request_id, call)
        if not self.killed:
            self._log.error("instance.died", status=self._status, last=list(self._taps[1].tail))
        else:
            self._log.info("instance.ended", status=self._status)
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
        if len(call.frames) >= _PAUSE_FRAMES and not self._paused and self._protocol is not None:
            self._paused = True
            self._protocol.pause(paused=True)

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
                self._signal_group()

    def _end_call(self, request_id: str, call: _Call) -> None:
        self._calls.pop(request_id, None)
        if call.kill_timer is not None:
            call.kill_timer.cancel()
        call.ended.set()

    def _resume(self) -> None:
        if self._paused and self._protocol is not None:
            if any(len(call.frames) >= _PAUSE_FRAMES // 2 for call in self._calls.values()):
                return
            self._paused = False
            self._protocol.pause(paused=False)

    def _kill(self, reason: str) -> None:
        if self._process is not None and not self._killed:
            self._killed = True
            self._log.info("instance.killed", reason=reason)
            self._signal_group()

    def _signal_group(self) -> None:
        # The group's id is the pid of its leader; while a member lives the kernel reuses neither.
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _death(self) -> base.InstanceDied:
        return base.InstanceDied(self._epitaph("in the middle of a call"), status=self._status)

    def _epitaph(self, when: str) -> str:
        status = self._status
        if status is not None and status < 0:
            with contextlib.suppress(ValueError):
                return f"instance {self._name} ended {when}: {signal.Signals(-status).name}"
        return f"instance {self._name} ended {when}: exit status {status}"


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


async def _exit_status(process: asyncio.subprocess.Process) -> int:
    """Wait until a process has ended, whoever still holds its output open.

    ``Process.wait`` alone waits for the pipes too (cpython issue 119710), and a program that the
    process started in a session of its own may keep them for as long as it likes.
    """
    while process.returncode is None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_POLL_S):
                await process.wait()
    return process.returncode
