"""Finds and ends what an instance started, whatever that did to get away.

A program may leave the process group, the session, its parent and its environment; it keeps its
resource limits, which are inherited by ``fork`` and ``execve`` and never rise again
(``getrlimit(2)``). So every instance has a hard limit of its own, a random number, on a resource
that Linux counts no longer: ``RLIMIT_LOCKS`` (2.4.0 to 2.4.24). ``/proc/PID/limits`` shows it.
"""

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_LINE: Final = b"\nMax file locks "
_PASS_S: Final = 0.002
_LIMIT_S: Final = 3.0


def new_mark() -> int:
    """Return a mark for an instance: a limit nobody else has."""
    return (1 << 61) + secrets.randbits(60)


def end_strays(mark: int) -> int:
    """Kill every process that bears a mark, again and again, until there is none; blocks.

    What forks while it is looked for is found in the next pass.

    Returns:
        How many still live when the time, 3 seconds, is up: 0 but for a process stuck in the
        kernel, or one that forks faster than we look.
    """
    until = time.monotonic() + _LIMIT_S
    while True:
        left = list(_marked(mark))
        for pid in left:  # found a moment ago: long before the kernel gives its number out again
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not left or time.monotonic() > until:
            return len(left)
        time.sleep(_PASS_S)


def _marked(mark: int) -> Iterator[int]:
    for name in os.listdir(_PROC):  # noqa: PTH208 - a thousand entries: three times as fast
        if name.isdigit() and _mark_of(int(name)) == mark and not _is_dead(int(name)):
            yield int(name)


def _mark_of(pid: int) -> int | None:
    try:
        limits = (_PROC / str(pid) / "limits").read_bytes()
        return int(limits.partition(_LINE)[2].split(maxsplit=2)[1])
    except (OSError, ValueError, IndexError):
        return None  # it has gone, is not ours to look at, or has no limit


def _is_dead(pid: int) -> bool:
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return True
    return stat.rpartition(b")")[2].split()[0] in (b"Z", b"X")
