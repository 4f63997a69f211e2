"""What an instance may take and do: put on by its own process, before any foreign code runs.

Resource limits, the network filter and the umask are inherited by everything the instance starts.
"""

import errno
import math
import os
import resource
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final

from node_agent.worker import seccomp

MARK_RESOURCE: Final = 10
"""``RLIMIT_LOCKS``, which carries the mark of an instance (see `node_agent.isolation.strays`)."""

_UMASK: Final = 0o077
_LIMITS: Final = {
    "memory_bytes": "RLIMIT_AS",
    "open_files": "RLIMIT_NOFILE",
    "file_bytes": "RLIMIT_FSIZE",
}
_BY_ERRNO: Final = {
    errno.ENOMEM: "memory_bytes",
    errno.EMFILE: "open_files",
    errno.EFBIG: "file_bytes",
    errno.EAGAIN: "processes",
}
_CHAIN: Final = 10


class Confinement:
    """The limits of this process.

    Args:
        limits: As the ``load`` frame has them; a missing or null one is not set.
        cgroup: File that moves this process into its control group; None without one.
        mark: Number that marks this process and all it starts; None for none.
    """

    def __init__(
        self, limits: dict[str, Any], *, cgroup: str | None = None, mark: int | None = None
    ) -> None:
        self._limits = limits
        self._cgroup = cgroup
        self._mark = mark
        self._network = "granted" if limits.get("network") else "denied"

    def apply(self) -> str:
        """Put the limits on; once, on the main thread, before there are others.

        Returns:
            What it has of a network: ``granted``, ``denied`` or, where the system cannot deny it,
            ``open``.

        Raises:
            OSError: The system refuses a limit.
        """
        os.umask(_UMASK)
        if self._cgroup is not None:
            Path(self._cgroup).write_text("0")
        self._set_limits()
        if self._network == "denied":
            if seccomp.why_not():
                self._network = "open"
            else:
                seccomp.deny_network()
        return self._network

    def begin_call(self) -> None:
        """Give a call its processor time: the process gets SIGXCPU when it has used that up."""
        cpu_s = self._limits.get("cpu_s")
        if cpu_s is None:
            return
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        wanted = math.ceil(time.process_time()) + int(cpu_s)
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))

    def explain(self, error: BaseException | None) -> dict[str, str]:
        """Return which limit is behind an error, and what to say of it; empty when none is."""
        for _ in range(_CHAIN):  # libraries wrap what the system said
            if error is None:
                break
            if name := self._limit_behind(error):
                if name == "network":
                    return {"limit": name, "hint": "it has no network: limits.network is false"}
                return {"limit": name, "hint": f"limits.{name} is {self._limits[name]}"}
            error = error.__cause__ or error.__context__
        return {}

    def _limit_behind(self, error: BaseException) -> str:
        name = ""
        if isinstance(error, MemoryError):
            name = "memory_bytes"
        elif isinstance(error, OSError):
            unnamed_socket = isinstance(error, PermissionError) and error.filename is None
            if self._network == "denied" and (isinstance(error, socket.gaierror) or unnamed_socket):
                return "network"
            name = _BY_ERRNO.get(error.errno or 0, "")
        return name if self._limits.get(name) is not None else ""

    def _set_limits(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name, constant in _LIMITS.items():
            if self._limits.get(name) is not None:
                _lower(getattr(resource, constant), int(self._limits[name]))
        if self._mark is not None and sys.platform == "linux":
            _lower(MARK_RESOURCE, self._mark)


def _lower(kind: int, wanted: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (value, value))
