"""The few things the store asks of a file system: locks that die with their holder, whole files."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from capability_schemas.errors import Unavailable

_FICLONE: Final = 0x40049409
"""``ioctl`` number of Linux that lets two files share their blocks (btrfs, XFS)."""
_PAUSE_S: Final = 0.02


def lock(path: Path, *, shared: bool = False, create: bool = False) -> int | None:
    """Lock a file without waiting, by ``flock``: the lock ends with the process, however it ends.

    Args:
        path: The file.
        shared: Whether others may hold a shared lock too.
        create: Make the file when it is missing.

    Returns:
        Its descriptor, to be closed by the caller; None when another holds it, or when it was
        removed or replaced in the meantime.

    Raises:
        OSError: It is missing, or not to be opened.
    """
    flags = (os.O_RDWR | os.O_CREAT) if create else os.O_RDONLY
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def is_held(path: Path) -> bool:
    """Tell whether a process holds a file: nobody else could lock it alone."""
    try:
        descriptor = lock(path)
    except OSError:
        return False
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


@contextlib.contextmanager
def locked(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Hold a lock on a file while the block runs.

    Args:
        path: The file; made when it is missing.
        timeout_s: Longest wait, seconds.

    Raises:
        Unavailable: Another process holds it all that time.
    """
    end = time.monotonic() + timeout_s
    descriptor = lock(path, create=True)
    while descriptor is None:
        if time.monotonic() >= end:
            raise Unavailable(f"{path} is held by another process: try again when it has ended")
        time.sleep(_PAUSE_S)
        descriptor = lock(path, create=True)
    try:
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file so that readers see the old one or the new one, also after a power cut."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read such a file; None when it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, so that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clone(source: int, target: int) -> bool:
    """Let a new file share the blocks of another one; False where the file system cannot."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return True
    return False


def wait_while(busy: Callable[[], bool], size: Callable[[], int], *, patience_s: float) -> bool:
    """Wait for another process as long as its file grows.

    Args:
        busy: Whether it still works.
        size: Bytes it has.
        patience_s: Longest time without growth, seconds.

    Returns:
        Whether it ended; False when it made no progress all that time.
    """
    seen, since = size(), time.monotonic()
    while busy():
        time.sleep(_PAUSE_S * 5)
        if (now := size()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > patience_s:
            return False
    return True
