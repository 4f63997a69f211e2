"""How much memory there is: of the machine, of the control group around the agent, of a process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from capability_schemas.errors import ConfigurationError, Overloaded
from capability_schemas.functions import FunctionSpec

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUP: Final = Path("/proc/self/cgroup")
_RETRY_MS: Final = 2000
_USUAL_BYTES: Final = 32 * 1024 * 1024
"""Assumed of an instance of which nothing is known: an interpreter with little else."""


def available_memory_bytes(
    meminfo: Path = _MEMINFO, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP
) -> int | None:
    """Return the memory a new process may take, bytes; None where the system does not say.

    ``MemAvailable`` of proc(5), Linux 3.14 and later, or what is left of ``memory.max`` of the
    agent's control group (version 2; its page cache counts as free) when that is less.

    Args:
        meminfo: The file to read.
        cgroups: Where control groups are mounted.
        own: Names the agent's own.
    """
    found = _field(meminfo, "MemAvailable:")
    free = None if found is None else found * 1024
    group = _group(cgroups, own)
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is None or used is None:
        return free
    left = max(0, limit - used + (_field(group / "memory.stat", "inactive_file") or 0))
    return left if free is None else min(free, left)


def total_memory_bytes(
    meminfo: Path = _MEMINFO, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP
) -> int | None:
    """Return the memory there is in all, bytes; None where the system does not say.

    Args:
        meminfo: The file to read.
        cgroups: Where control groups are mounted.
        own: Names the agent's own.
    """
    found = _field(meminfo, "MemTotal:")
    limit = _number(_group(cgroups, own) / "memory.max")
    known = [one for one in (None if found is None else found * 1024, limit) if one is not None]
    return min(known, default=None)


def resident_bytes(pid: int) -> int | None:
    """Return the resident memory of a process, bytes (``statm`` of proc(5)); None when it has gone.

    Args:
        pid: The process; 0 stands for none.
    """
    if not pid:
        return None
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def first_need_bytes(spec: FunctionSpec, model_file: Callable[[FunctionSpec], Path | None]) -> int:
    """Return what an instance never measured before takes at least, as far as it is known; blocks.

    The size of its model, which it maps; without one, what a bare process takes. Its limit of
    memory says what it must never take, mostly far more than it does: the limit lowers the guess
    and never raises it, or else a small node would refuse what fits it well.

    Args:
        spec: The function.
        model_file: Returns the file of a function's model, None when there is none.

    Returns:
        Bytes; 0 where its model cannot be found, for the start itself says what is wrong with it.
    """
    try:
        path = model_file(spec)
        need = _USUAL_BYTES if path is None else path.stat().st_size
    except (OSError, ConfigurationError):
        return 0
    limit = spec.limits.memory_bytes
    return need if limit is None else min(need, limit)


def larger_than_memory(function: str, need: int, total: int) -> ConfigurationError:
    """Return the error for an instance that needs more than there is in all, bytes."""
    return ConfigurationError(
        f"{function} is larger than memory: it needs {_mb(need)}, this node has {_mb(total)};"
        " use a smaller model or a larger node",
        need_bytes=need,
        total_bytes=total,
    )


def no_room(function: str, need: int, free: int) -> Overloaded:
    """Return the error for an instance that needs more than there is now, bytes."""
    return Overloaded(
        f"not enough memory for {function}: it needs {_mb(need)}, {_mb(free)} are available",
        retry_after_ms=_RETRY_MS,
        need_bytes=need,
        available_bytes=free,
    )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"


def _group(cgroups: Path, own: Path) -> Path:
    """Return the folder of the agent's control group; the root where there is none (version 1)."""
    try:
        for line in own.read_text(encoding="utf-8").splitlines():
            if line.startswith("0::/"):
                return cgroups / line.removeprefix("0::/")
    except OSError:
        pass
    return cgroups


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # absent, or "max"
        return None


def _field(path: Path, name: str) -> int | None:
    try:
        with path.open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith(name):
                    return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return None
