"""What memory a model may take, and what it takes."""

import os
import resource
from pathlib import Path
from typing import Final

from node_agent.worker.base import InvocationError

_MEMINFO: Final = Path("/proc/meminfo")
_STATM: Final = Path("/proc/self/statm")


def free_bytes() -> int | None:
    """Return the memory that is free, bytes; None where the system does not say.

    ``MemAvailable`` of proc(5), which counts the page cache, and so the weights, as free.
    """
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def free_addresses() -> int | None:
    """Return the room under this process's limit of its address space, bytes; None without one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        return None if limit == resource.RLIM_INFINITY else limit - _pages(0)
    except (OSError, ValueError, IndexError):
        return None


def resident_bytes() -> int | None:
    """Return the resident set of this process, shared pages of a mapped model included, bytes."""
    try:
        return _pages(1)
    except (OSError, ValueError, IndexError):
        return None


def check_fits(
    model: str, *, weights_bytes: int, cache_bytes: int = 0, tokens: int = 0, mapped: bool = False
) -> None:
    """Refuse a model that cannot fit into memory.

    Args:
        model: For the message.
        weights_bytes: Size of the weights.
        cache_bytes: Size of keys and values of the whole context.
        tokens: Length of the whole context.
        mapped: Whether the weights have their addresses already.

    Raises:
        InvocationError: It needs more than there is; the message has the figures.
    """
    needed = weights_bytes + cache_bytes
    for free, wanted in (
        (free_bytes(), needed),
        (free_addresses(), cache_bytes if mapped else needed),
    ):
        if free is not None and wanted > free:
            raise InvocationError(
                "internal",
                f"model {model} needs {weights_bytes / 1e6:.0f} MB for its weights and"
                f" {cache_bytes / 1e6:.0f} MB for a context of {tokens} tokens, and"
                f" {max(free, 0) / 1e6:.0f} MB of memory are free for it: lower n_ctx or parallel,"
                " raise its memory limit, or take a smaller model",
                needed_bytes=wanted,
                free_bytes=free,
            )


def _pages(column: int) -> int:
    return int(_STATM.read_text(encoding="ascii").split()[column]) * os.sysconf("SC_PAGE_SIZE")
