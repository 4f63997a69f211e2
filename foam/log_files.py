"""Log files that stay small, whoever writes them.

The files of a mesh are written by its processes through descriptors that they inherited, some of
them programs of others (Mosquitto, nats-server). So a file that grew too large is not renamed, for
its writer would go on writing to it under the new name: what it holds is copied to ``NAME.log.1``
(in the place of what was there), and it is made empty. That needs writers that append
(``O_APPEND``); all of ours do. A line that is written just between the two steps is lost.
"""

import asyncio
import shutil
from pathlib import Path
from typing import Final

import structlog

__all__ = ["MOST_BYTES", "keep_small", "set_aside"]

MOST_BYTES: Final = 8 * 1024 * 1024
"""Size beyond which a file is set aside: a process has up to twice that on disk."""

_LOOK_S: Final = 10.0
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def set_aside(path: Path, *, most_bytes: int = MOST_BYTES) -> bool:
    """Empty a log file that is too large, and keep what it held as ``NAME.log.1``; blocks.

    Where that cannot be kept (the disk is full) it is dropped: a mesh needs the room for tasks.

    Args:
        path: A file whose writers append; one that is not there is small enough.
        most_bytes: Size up to which it is left alone.

    Returns:
        Whether it was emptied.

    Raises:
        OSError: It can neither be read nor emptied.
    """
    try:
        if path.stat().st_size <= most_bytes:
            return False
    except FileNotFoundError:
        return False
    kept = path.with_name(path.name + ".1")
    kept.unlink(missing_ok=True)  # before the copy: it may be the room that the copy needs
    with path.open("rb+") as log:
        try:
            with kept.open("wb") as copy:
                shutil.copyfileobj(log, copy)
        except OSError as error:
            kept.unlink(missing_ok=True)
            _log.warning("logs.dropped", file=str(path), error=str(error))
        log.truncate(0)
    return True


async def keep_small(
    folder: Path, *, most_bytes: int = MOST_BYTES, every_s: float = _LOOK_S
) -> None:
    """Look after the log files of a folder until cancelled, which is safe at any point.

    Args:
        folder: Its files ``*.log`` are looked after, also those that appear later.
        most_bytes: Size beyond which one is set aside.
        every_s: Seconds between two looks.
    """
    while True:
        try:
            await asyncio.to_thread(_look, folder, most_bytes)
        except OSError as error:
            _log.warning("logs.not_kept_small", folder=str(folder), error=str(error))
        await asyncio.sleep(every_s)


def _look(folder: Path, most_bytes: int) -> None:
    for path in sorted(folder.glob("*.log")):
        if set_aside(path, most_bytes=most_bytes):
            _log.info("logs.set_aside", file=str(path))
