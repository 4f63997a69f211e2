"""Runs programs: a process for every call, spoken to by its standard streams.

The programs stay in the process group of this worker, so that whatever ends the worker ends them
too, and under its limits. A call that is cancelled gets SIGTERM, and after a grace time SIGKILL
for the program and everything below it. What a program leaves behind (on Linux also what left
its group or session: the worker is a subreaper, ``prctl(2)``) is killed as soon as no call runs.

The worker gives up dying by signal with the agent: the kernel would spare its programs. It ends
itself and its group at the end of file on its socket, which its reader thread never misses, for
no native code holds the interpreter lock here.
"""

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from node_agent.worker.base import Emit, InvocationError, Request
from node_agent.worker.frames import to_json
from node_agent.worker.programs import ErrorLines, ProgramOutput, exit_error, input_document
from node_agent.worker.threaded import ThreadedHost

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_READ_BYTES: Final = 64 * 1024
_LOOK_S: Final = 0.1
"""How often a program is looked at whose pipes say nothing, seconds."""

_LINGER_S: Final = 0.5
"""How long pipes are read after the program's end, held open by what it started, seconds."""


class _Run:
    """One program under way, pumped by one thread; `stop` may come from another.

    Args:
        process: The program, its three streams piped.
        document: What it shall read.
        output: Takes its standard output.
    """

    def __init__(
        self, process: "subprocess.Popen[bytes]", document: bytes, output: ProgramOutput
    ) -> None:
        self.process = process
        self._stdin: Any = process.stdin
        self.errors = ErrorLines()
        self._left = memoryview(document)
        self._output = output
        self._killer: threading.Timer | None = None

    def pump(self) -> int:
        """Move bytes until the program has ended; returns its exit status.

        Raises:
            InvocationError: The output is too large, or not what it should be.
        """
        process = self.process
        streams: tuple[tuple[Any, int], ...] = (
            (process.stdin, selectors.EVENT_WRITE),
            (process.stdout, selectors.EVENT_READ),
            (process.stderr, selectors.EVENT_READ),
        )
        ended_at: float | None = None
        with selectors.DefaultSelector() as selector:
            for stream, event in streams:
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, event)
            while selector.get_map():
                for key, _ in selector.select(_LOOK_S):
                    if not self._move(key.fileobj):
                        selector.unregister(key.fileobj)
                        _close(key.fileobj)
                if process.poll() is not None:
                    now = time.monotonic()
                    ended_at = now if ended_at is None else ended_at
                    if now - ended_at > _LINGER_S or not _is_read(process):
                        break
        return process.wait()

    def _move(self, stream: Any) -> bool:
        """Read or write what is possible now; returns whether there is more to come."""
        if stream is self._stdin:
            with contextlib.suppress(BlockingIOError):
                try:
                    self._left = self._left[os.write(stream.fileno(), self._left) :]
                except BrokenPipeError:  # it does not want to know
                    self._left = self._left[:0]
            return bool(self._left)
        data = os.read(stream.fileno(), _READ_BYTES)
        if stream is self.process.stdout:
            self._output.feed(data)
        else:
            self.errors.feed(data)
        return bool(data)

    def stop(self, grace_s: float) -> None:
        """Ask the program to end, and see to it that it does; any thread."""
        self.process.send_signal(signal.SIGTERM)
        self._killer = threading.Timer(grace_s, self.kill)
        self._killer.daemon = True
        self._killer.start()

    def kill(self) -> None:
        """Kill the program and everything below it."""
        below = list(_below(self.process.pid)) if self.process.poll() is None else []
        self.process.kill()
        _kill(below)

    def close(self) -> None:
        """Release everything; the program has ended or is killed."""
        if self._killer is not None:
            self._killer.cancel()
        if self.process.poll() is None:
            self.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            _close(stream)


class CommandHost(ThreadedHost):
    """Host of one program.

    Args:
        options: ``command`` (list; the program as an absolute path), ``env``, ``folder``,
            ``output``, ``output_bytes``, ``grace_s``.
        concurrency: Calls at a time.
        emit: Sends a frame.
    """

    def __init__(self, *, options: dict[str, Any], concurrency: int, emit: Emit) -> None:
        super().__init__(slots=concurrency, emit=emit)
        self._options = options
        self._program, *self._arguments = options["command"]
        self._lock = threading.Lock()  # of the two below, and of every start
        self._runs: dict[str, _Run | None] = {}

    def load(self) -> dict[str, Any]:
        """Take over what programs leave behind; returns ``{"slots": calls at a time}``."""
        for name, value in self._options["env"].items():
            os.putenv(name, value)  # for programs, which inherit the environment of this process
        if sys.platform == "linux":
            prctl = ctypes.CDLL(None, use_errno=True).prctl
            prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
        return {"slots": self.slots, "program": self._program}

    def call(self, request: Request, slot: int) -> Any:
        """Run the program once; see `ThreadedHost.call`."""
        output = ProgramOutput(
            request_id=request.id,
            kind=self._options["output"],
            limit_bytes=self._options["output_bytes"],
            emit=self.emit,
        )
        arguments = [fill_argument(text, request) for text in self._arguments]
        with self._running(request, arguments, output) as run:
            status = run.pump()
            if status != 0:
                raise exit_error(Path(self._program).name, status, run.errors.last())
            return output.output()

    def interrupt(self, request: Request) -> None:
        """End the program of a call."""
        run = self._runs.get(request.id)
        if run is not None:
            run.stop(self._options["grace_s"])

    @contextlib.contextmanager
    def _running(
        self, request: Request, arguments: list[str], output: ProgramOutput
    ) -> Iterator[_Run]:
        run: _Run | None = None
        with self._lock:
            self._runs[request.id] = None  # keeps the sweep away from what is being started
        try:
            run = _Run(self._start(arguments), input_document(request), output)
            self._runs[request.id] = run
            if request.cancelled.is_set():  # before there was a run to interrupt
                run.stop(self._options["grace_s"])
            yield run
        finally:
            if run is not None:
                run.close()
            with self._lock:
                del self._runs[request.id]
                if not self._runs:
                    sweep()

    def _start(self, arguments: list[str]) -> "subprocess.Popen[bytes]":
        try:
            return subprocess.Popen(  # noqa: S603 - the operator's program, without a shell
                [self._program, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=self._options["folder"],
            )
        except FileNotFoundError as exc:
            raise InvocationError(
                "execution_failed",
                f"cannot run {self._program}: it, its folder or the interpreter in its first line"
                " does not exist",
            ) from exc
        except OSError as exc:
            raise InvocationError(
                "execution_failed", f"cannot run {self._program}: {exc.strerror}"
            ) from exc


def fill_argument(argument: str, request: Request) -> str:
    """Return an argument as the program gets it.

    An argument that is ``{name}`` as a whole becomes the input property of that name: text as it
    is, anything else as JSON. It stays one argument whatever is in it; no shell ever sees it.

    Raises:
        InvocationError: ``invalid_task``: the input has no such property, or its text holds NUL.
    """
    name = placeholder(argument)
    if name is None:
        return argument
    given = request.input if isinstance(request.input, dict) else {}
    if name not in given and not (name == "text" and request.text is not None):
        raise InvocationError("invalid_task", f"input.{name} is missing", field=f"input.{name}")
    value = given.get(name, request.text)
    text = value if isinstance(value, str) else to_json(value)
    if "\0" in text:
        raise InvocationError("invalid_task", f"input.{name} holds NUL", field=f"input.{name}")
    return text


def placeholder(argument: str) -> str | None:
    """Return the property that an argument stands for; None for one that is taken as it is."""
    inner = argument[1:-1]
    return inner if argument == f"{{{inner}}}" and inner.isidentifier() else None


def sweep() -> None:
    """Kill everything below this process, to the end of its chains; Linux only."""
    for _ in range(100):  # what is killed hands its children on to us
        found = list(_below(os.getpid()))
        if not found:
            return
        _kill(found)
        for pid in found:
            with contextlib.suppress(ChildProcessError):  # not ours, not yet
                os.waitpid(pid, 0)


def _below(pid: int) -> Iterator[int]:
    """Yield the processes below one, ``proc_pid_task_children(5)``."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            for child in map(int, path.read_text().split()):
                yield child
                yield from _below(child)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _is_read(process: "subprocess.Popen[bytes]") -> bool:
    return any(stream and not stream.closed for stream in (process.stdout, process.stderr))


def _close(stream: Any) -> None:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.close()
