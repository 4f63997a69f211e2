"""FOAM as its users run it: subprocesses, standard streams, signals."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil

from support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
FOAM = (sys.executable, "-m", "foam")
READY = "FOAM READY "
_START_S = 120.0  # several meshes start at once where several workers run
_STOP_S = 60.0


def foam_environment(**extra: str) -> dict[str, str]:
    """Return this environment without anything that would lead to another mesh."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"FOAM_URL", "FOAM_USERNAME", "FOAM_PASSWORD", "FOAM_DATA", "FOAM_SITE"}
    }
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path} | extra


def run_foam(
    *arguments: str, timeout_s: float = 120.0, stdin: bytes | None = None, **extra: str
) -> subprocess.CompletedProcess[bytes]:
    """Run one command to its end."""
    return subprocess.run(
        [*FOAM, *arguments],
        env=foam_environment(**extra),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )


class FoamProcess:
    """A running command whose lines can be waited for.

    Args:
        arguments: Command line after ``foam``.
        extra: Environment variables to set.
    """

    _stdin = subprocess.DEVNULL

    def __init__(self, *arguments: str, **extra: str) -> None:
        self.process = subprocess.Popen(
            [*FOAM, *arguments],
            env=foam_environment(**extra),
            stdin=self._stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._news: queue.Queue[None] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))
            self._news.put(None)
        self._news.put(None)

    def wait_line(self, start: str, *, where: str = "out", timeout_s: float = _START_S) -> str:
        """Wait for a line of stdout or stderr that holds some text."""
        until = time.monotonic() + timeout_s
        while True:
            for line in tuple(self.out if where == "out" else self.err):
                if start in line:
                    return line
            if self.process.poll() is not None and not any(r.is_alive() for r in self._readers):
                raise AssertionError(f"ended with {self.process.returncode}: {self.out} {self.err}")
            left = until - time.monotonic()
            if left <= 0:
                raise AssertionError(f"no line {start!r} in time: {self.out} {self.err}")
            try:
                self._news.get(timeout=min(left, 0.5))
            except queue.Empty:
                continue

    def end(self, number: int = signal.SIGTERM, *, timeout_s: float = _STOP_S) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(5)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code


class FoamUp(FoamProcess):
    """A mesh started by ``foam up``; it ends with the process of the tests, however that ends.

    Args:
        data: Its data folder.
        arguments: Further options.
    """

    _stdin = subprocess.PIPE

    def __init__(self, data: Path, *arguments: str, **extra: str) -> None:
        options = ("--supervised", "--port", str(free_port(row=3)), "--data", str(data))
        super().__init__("up", *options, *arguments, **extra)
        self.data = data
        self.facts: dict[str, Any] = {}

    def wait_ready(self, timeout_s: float = _START_S) -> Self:
        """Wait for the READY line and read it."""
        self.facts = json.loads(self.wait_line(READY, timeout_s=timeout_s).removeprefix(READY))
        return self

    @property
    def port(self) -> int:
        """Port of its broker."""
        return int(str(self.facts["broker"]).rpartition(":")[2])

    def family(self) -> list[psutil.Process]:
        """Return the process and everything below it."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def child(self, role: str) -> psutil.Process:
        """Return the process that runs ``foam ROLE``."""
        for process in psutil.Process(self.process.pid).children():
            line = process.cmdline()
            if "foam" in line and line[line.index("foam") + 1] == role:
                return process
        raise AssertionError(f"no {role} process below {self.process.pid}")

    def ask(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Run ``foam ask`` against it."""
        return run_foam("ask", "--data", str(self.data), *arguments, **options)


def left_running(family: list[psutil.Process], *, within_s: float = 60.0) -> list[str]:
    """Return the command lines of those that do not end in time."""
    alive = psutil.wait_procs(family, timeout=within_s)[1]
    return [" ".join(process.cmdline()) for process in alive]


@contextmanager
def foam_up(data: Path, *arguments: str, **extra: str) -> Iterator[FoamUp]:
    """Run a mesh for the body of a ``with``; kills what a failed test leaves behind."""
    up = FoamUp(data, *arguments, **extra)
    family: list[psutil.Process] = []
    try:
        up.wait_ready()
        family = up.family()
        yield up
    finally:
        up.end()
        for process in psutil.wait_procs(family, timeout=5)[1]:
            process.kill()
