"""Asks a child process what a module declares: importing user code runs it, so never here."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from capability_schemas.errors import ConfigurationError
from node_agent.isolation.environment import child_environment
from node_agent.worker.frames import Frame, FrameError, FrameSocket

_PACKAGE_ROOT: Final = Path(__file__).resolve().parents[2]
_LIMIT_S: Final = 60.0
_END_S: Final = 5.0
_STDERR_TAIL: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """What a child found in a module.

    Attributes:
        functions: Fields of a specification by attribute of the module, in order.
        problems: What is wrong by attribute, for those that cannot be described.
    """

    functions: dict[str, dict[str, Any]]
    problems: dict[str, str]


class Introspector:
    """Has modules imported, one child at a time; for one thread, but ``close`` is for any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def close(self) -> None:
        """End the child at work, if any, and start no other; whoever waits for it gets an error."""
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.kill()

    def describe(
        self, where: str, names: Sequence[str] = (), *, everything: bool = False
    ) -> ModuleReport:
        """Have a child import a module and describe functions of it; blocks.

        Args:
            where: ``module`` or ``file.py``.
            names: Functions to describe, decorated or not.
            everything: Also describe every decorated function.

        Raises:
            ConfigurationError: It does not import, or declares nothing; the message says why.
        """
        ours, theirs = socket.socketpair()
        ours.settimeout(_LIMIT_S)
        request = {
            "t": "describe",
            "where": where,
            "names": list(names),
            "everything": everything,
            "folder": str(Path.cwd()),
        }
        with ours, theirs, tempfile.TemporaryFile() as errors:
            child = self._start(theirs.fileno(), errors.fileno())
            theirs.close()
            try:
                channel = FrameSocket(ours)
                channel.send(request)
                answer = channel.receive()
            except (FrameError, OSError) as exc:
                child.kill()
                raise ConfigurationError(f"{where} could not be described: {exc}") from exc
            finally:
                self._end(child)
            if answer is not None and answer["t"] == "described":
                return ModuleReport(functions=answer["functions"], problems=answer["problems"])
            errors.seek(0)
            tail = errors.read().decode(errors="replace")[-_STDERR_TAIL:].strip()
        raise ConfigurationError(f"{where}: {_reason(answer, tail)}", log=tail)

    def _start(self, descriptor: int, errors: int) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "node_agent.worker"),
            *(str(descriptor), str(os.getpid())),
        ]
        with self._lock:
            if self._closed:
                raise ConfigurationError("the node is stopping")
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                command,
                cwd=_PACKAGE_ROOT,
                env=child_environment(folder=tempfile.gettempdir(), limits={}),
                pass_fds=(descriptor,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            return self._child

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        try:
            child.wait(_END_S)  # it has answered and goes by itself
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        with self._lock:
            self._child = None


def _reason(answer: Frame | None, tail: str) -> str:
    if answer is not None:
        return str(answer["message"])
    return f"its process ended: {tail or 'silently'}"
