"""Ports that are ours alone: none that the kernel lends, none that another worker may take.

A test that ends its broker and starts it again needs the port to be free meanwhile. Each process
that runs tests, also of another run on this machine, takes a block of ports, and keeps it by a lock
on a file for as long as it lives. The blocks lie below what the product chooses from
(``broker.ports``), and that below what the kernel lends to outgoing connections.
"""

import fcntl
import functools
import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_FIRST = 10_500
_BLOCKS = 60
_PORTS = 150

_held: list[IO[str]] = []


def free_port(*, row: int = 1) -> int:
    """Return a port that nobody listens on and no other test process will; each in its turn.

    Args:
        row: So many in a row are free: three servers that are one broker are neighbours.
    """
    free = 0
    for port in itertools.islice(_turns(), 2 * _PORTS):
        if port % _PORTS == 0:  # the first of the block comes behind the last
            free = 0
        free = free + 1 if _is_free(port) else 0
        if free == row:
            return port - row + 1
    raise AssertionError(f"all of {_PORTS} ports are in use: does a test leave brokers behind?")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:  # a broker of ours, or its last connections
            return False
    return True


@functools.cache
def _turns() -> Iterator[int]:
    first = _FIRST + _PORTS * _take_block()
    return itertools.cycle(range(first, first + _PORTS))


def _take_block() -> int:
    folder = Path(tempfile.gettempdir()) / f"foam-test-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for block in range(_BLOCKS):
        held = (folder / str(block)).open("a")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held.close()
        else:
            _held.append(held)
            return block
    raise AssertionError(f"{_BLOCKS} processes run tests on this machine already")
