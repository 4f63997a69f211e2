"""``foam ask`` while every router hangs, and after."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from support.foam_process import FoamUp, foam_up

pytestmark = [pytest.mark.e2e, pytest.mark.broker, pytest.mark.encoder, pytest.mark.timeout(180)]

COUNT = ("--function", "count", "--input", '{"n": 12}')
TEXT = "".join(f"{number} " for number in range(12))


def _routers(up: FoamUp) -> list[psutil.Process]:
    return [process for process in up.family() if "router" in process.cmdline()[3:4]]


def test_a_node_is_asked_itself_while_every_router_hangs(tmp_path: Path, trial_node: Path) -> None:
    options = ("--broker", "embedded", "--routers", "2", "--node", str(trial_node))
    with foam_up(tmp_path, *options) as up:
        routers = _routers(up)
        assert len(routers) == 2
        try:
            for router in routers:
                router.send_signal(signal.SIGSTOP)
            done = up.ask(*COUNT, "--json", "--verify")
            assert done.returncode == 0, done.stderr
            events = [json.loads(line) for line in done.stdout.splitlines()]
            assert events[-1]["event"] == "result"
            assert events[-1]["output"] == TEXT
            assert {"accepted", "routed"}.isdisjoint(event["event"] for event in events)
            assert b"no router lives: trial is asked itself for count 1.3.0" in done.stderr
            assert b"without fail-over" in done.stderr

            left = up.ask(*COUNT, "--no-direct", "--timeout", "3")
            assert left.returncode == 16, left.stderr
        finally:
            for router in routers:
                router.send_signal(signal.SIGCONT)
        done = up.ask(*COUNT, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[0])["event"] == "accepted"
        assert b"asked itself" not in done.stderr
