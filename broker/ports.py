"""Which TCP port a server takes when any will do: one that it can come back to.

A port that the kernel chooses (``bind`` to 0) is one of those it lends to outgoing connections. As
soon as the server is down, be it for a second, somebody's connection may get it, and the server
cannot come back to where everybody looks for it. So ports are looked for below those.
"""

import random
import socket
from pathlib import Path
from typing import Final

__all__ = ["free_port", "lent_from"]

_LENT: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")  # ip(7); for IPv6 too
_LENT_BY_STANDARD: Final = 49_152  # RFC 6335 section 6, and what macOS and Windows do
_FIRST: Final = 20_000
_TRIES: Final = 50
_chance = random.SystemRandom()


def lent_from(path: Path = _LENT) -> int:
    """Return the lowest port that the kernel lends to outgoing connections.

    Args:
        path: Where Linux says so: two numbers, the lowest and the highest.
    """
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _LENT_BY_STANDARD


def free_port(host: str, *, below: int | None = None) -> int:
    """Find a port that is free now; somebody else may take it before we do.

    Args:
        host: The address that will be listened on.
        below: Look from 20,000 up to here; the lowest port that is lent to outgoing connections
            when None. If there is nothing below it, or all of 50 tries are taken, the kernel
            chooses.
    """
    end = lent_from() if below is None else below
    for _ in range(_TRIES if end > _FIRST else 0):
        port = _chance.randrange(_FIRST, end)
        if _is_free(host, port):
            return port
    return _bound(host, 0)


def _is_free(host: str, port: int) -> bool:
    try:
        return _bound(host, port) == port
    except OSError:
        return False


def _bound(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, port))
        return int(probe.getsockname()[1])
