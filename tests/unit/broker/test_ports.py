"""Which port a server takes when any will do."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from broker.embedded.crowd import Crowd
from broker.embedded.listener import Listener
from broker.ports import free_port, lent_from
from support.ports import free_port as port_of_tests


def test_it_lies_below_what_the_kernel_lends() -> None:
    assert all(20_000 <= free_port("127.0.0.1", below=21_000) < 21_000 for _ in range(20))


@pytest.mark.parametrize(
    ("said", "lowest"),
    [("32768\t60999\n", 32768), ("1024 65535", 1024), ("", 49152), ("many", 49152), (None, 49152)],
)
def test_what_is_lent_says_the_kernel_or_else_the_standard(tmp_path, said, lowest) -> None:
    path = tmp_path / "range"
    if said is not None:
        path.write_text(said)
    assert lent_from(path) == lowest


def test_one_that_somebody_listens_on_is_passed_over() -> None:
    with contextlib.ExitStack() as stack:
        for port in range(20_000, 20_004):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        free = [free_port("127.0.0.1", below=20_005) for _ in range(5)]
    assert not {20_000, 20_001, 20_002, 20_003} & set(free)


def test_where_all_are_lent_the_kernel_chooses() -> None:
    assert free_port("127.0.0.1", below=1024) > 0


async def test_the_embedded_broker_takes_such_a_port_and_tries_another_one_when_it_has_gone(
    monkeypatch,
) -> None:
    async def serve(*_: object) -> None:
        await asyncio.sleep(0)

    with socket.create_server(("127.0.0.1", 0)) as other:
        taken, free = other.getsockname()[1], free_port("127.0.0.1")
        asked = iter((taken, free))
        monkeypatch.setattr("broker.embedded.listener.free_port", lambda _: next(asked))
        async with listener(0, serve) as listening:
            assert listening.port == free
        with pytest.raises(OSError, match="in use"):  # one that was asked for is that or none
            async with listener(taken, serve):
                pass


def test_no_two_processes_of_tests_have_the_same_ports() -> None:
    ours = {port_of_tests(row=3) for _ in range(30)}
    tests = Path(__file__).resolve().parents[2]
    program = "from support.ports import free_port; print(*(free_port(row=3) for _ in range(30)))"
    other = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        check=True,
        timeout=60,
    )
    theirs = {int(word) for word in other.stdout.split()}
    assert len(theirs) == len(ours) == 30
    assert not theirs & {port + more for port in ours for more in (-2, -1, 0, 1, 2)}
    assert max(theirs | ours) < 20_000


def listener(port, serve) -> Listener:
    """Make a listener of plain text."""
    return Listener(
        name="test",
        host="127.0.0.1",
        port=port,
        serve=serve,
        crowd=Crowd(limit=5, address_limit=5, clock=time.monotonic),
        context=None,
        handshake_timeout_s=1.0,
    )
