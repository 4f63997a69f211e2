"""One process for each identity on a machine: a lock beside the identity file.

What two machines with copies of one identity do, `broker.tenure` settles over the mesh.
"""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import structlog

from broker.tenure import Tenant
from capability_schemas.errors import Conflict
from capability_schemas.ids import now_ms

__all__ = ["IdentityLock"]

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_LIMIT_BYTES: Final = 4096

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class IdentityLock:
    """Holds an identity on this machine; a context manager, which blocks for a moment only.

    The lock goes with the process, however that ends. Its file also remembers the latest epoch, so
    that the next process has a later one though the clock was set back: to the mesh an earlier
    epoch is that of a process that is gone.

    Args:
        folder: Folder of the identity file.
        identity: Whose.
        clock: UTC milliseconds.
    """

    def __init__(self, folder: Path, identity: str, *, clock: Callable[[], int] = now_ms) -> None:
        self._path = folder / f"{identity}.lock"
        self._identity = identity
        self._clock = clock
        self._file: IO[str] | None = None
        self.tenant = Tenant(identity=identity, epoch=clock(), place=_place())

    def __enter__(self) -> Self:
        return self.take()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self) -> Self:
        """Take the identity; nothing where it is taken by this very lock.

        Raises:
            Conflict: Another process of this machine has it.
        """
        if self._file is not None:
            return self
        try:
            self._path.touch(mode=0o600)
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:  # carried on something that cannot be written
            _log.warning("identity.unlocked", path=str(self._path), error=str(error))
            return self
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                raise self._conflict(_read(file)) from error
        except OSError as error:  # a file system without locks
            _log.warning("identity.unlocked", path=str(self._path), error=str(error))
            file.close()
            return self
        self._file = file
        before = _read(file).get("epoch")
        now = self._clock()
        epoch = max(now, before + 1) if isinstance(before, int) else now
        mark = _mark(os.fstat(file.fileno()))
        self.tenant = Tenant(
            identity=self._identity,
            epoch=epoch,
            place=f"{mark}{_place()}" if mark else _place(),
            alone_at=mark,
        )
        _write(file, {"pid": os.getpid(), "since": now, "epoch": epoch})
        return self

    def _conflict(self, holder: dict[str, Any]) -> Conflict:
        pid, since = holder.get("pid"), holder.get("since")
        who = f"process {pid}" if pid is not None else "another process"
        if isinstance(since, int):
            who += f", since {datetime.fromtimestamp(since / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
        return Conflict(
            f"{self._identity} runs on this machine already ({who}; {self._path}): end that "
            "process, or give this one an --id of its own",
            identity=self._identity,
            pid=pid,
            since=since,
        )


def _place() -> str:
    return f"{socket.gethostname()[:64]}, process {os.getpid()}"


def _mark(stat: os.stat_result) -> str | None:
    """Return what the words of those begin with who share this lock: this boot, and this file."""
    try:
        boot = _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return None
    known = f"{boot}/{stat.st_dev}/{stat.st_ino}".encode()
    return f"[{hashlib.blake2b(known, digest_size=4).hexdigest()}] "


def _read(file: IO[str]) -> dict[str, Any]:
    """Return what the holder wrote; nothing where that is damaged."""
    with suppress(OSError, ValueError):
        file.seek(0)
        found = json.loads(file.read(_LIMIT_BYTES))
        if isinstance(found, dict):
            return found
    return {}


def _write(file: IO[str], holder: dict[str, Any]) -> None:
    """Write down who holds the lock; a full disk costs the words, not the lock."""
    try:
        file.seek(0)
        file.truncate()
        file.write(json.dumps(holder) + "\n")
        file.flush()
    except OSError as error:
        _log.warning("identity.lock_unwritten", error=str(error))
