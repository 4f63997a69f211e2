"""Two registries as processes: one is killed, one stopped and woken, and the mesh goes on."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import require_broker
from support.foam_process import FoamUp, foam_up, run_foam

pytestmark = [pytest.mark.e2e, pytest.mark.broker, pytest.mark.encoder, pytest.mark.timeout(240)]

_PATIENCE_S = 60.0


def _until(check: Callable[[], Any]) -> Any:
    """Wait for something that processes do, and return it."""
    give_up_at = time.monotonic() + _PATIENCE_S
    while not (found := check()):
        assert time.monotonic() < give_up_at, check
    return found


def _registry(up: FoamUp, name: str) -> psutil.Process | None:
    for process in up.family():
        line = process.cmdline()
        if line[3:4] == ["registry"] and (name in line) == (name != "registry-1"):
            return process
    return None


def _leader(up: FoamUp) -> str | None:
    answer = run_foam("registries", "--json", "--data", str(up.data))
    assert answer.returncode == 0, answer.stderr
    leading = [row["registry"] for row in json.loads(answer.stdout)["registries"] if row["leads"]]
    assert len(leading) <= 1
    return leading[0] if leading else None


def _token(up: FoamUp) -> bytes:
    made = run_foam("token", "create", "--data", str(up.data))
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def _enroll(up: FoamUp, name: str, token: bytes, folder: Path) -> None:
    """Let a node in, whichever registry leads by then."""
    options = ("--id", name, "--broker", str(up.facts["broker"]), "--token", "-", "--password")
    joined = run_foam("enroll", *options, "--data", str(folder), stdin=token)
    assert joined.returncode == 0, joined.stderr


@contextmanager
def _stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@pytest.mark.parametrize("broker", ["embedded", "nats"])
def test_registries_take_over_from_each_other(
    tmp_path: Path, trial_node: Path, broker: str
) -> None:
    if broker != "embedded":
        require_broker(broker)
    options = ("--broker", broker, "--registries", "2", "--node", str(trial_node))
    with foam_up(tmp_path, *options) as up:
        assert up.facts["registries"] == ["registry-1", "registry-2"]
        _until(lambda: _leader(up) == "registry-1")
        first = _registry(up, "registry-1")
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        token = _token(up)  # of whoever leads by then
        leader = _until(lambda: _leader(up))
        other = {"registry-1": "registry-2", "registry-2": "registry-1"}[leader]
        process = _until(lambda: _registry(up, leader))
        _until(lambda: _registry(up, other))
        with _stopped(process):
            if broker == "embedded":  # NATS lets nobody in whose password it was not told
                # Nobody leads yet: the newcomer asks until somebody does.
                _enroll(up, "edge-new", token, tmp_path / "new")
            _until(lambda: _leader(up) == other)
            tokens = run_foam("token", "list", "--json", "--data", str(up.data))
            left = json.loads(tokens.stdout)["tokens"]
            assert len(left) == (0 if broker == "embedded" else 1)
        _until(lambda: f'"registry": "{leader}"' in _steps_down(up, leader))
        assert _leader(up) == other
        asked = up.ask("--function", "count", "--input", '{"n": 2}')
        assert asked.returncode == 0, asked.stderr
        whole = run_foam("audit", "verify", "--data", str(up.data))
        assert whole.returncode == 0, whole.stderr
        assert whole.stdout.count(b"whole") == 2


def _steps_down(up: FoamUp, registry: str) -> str:
    name = "registry" if registry == "registry-1" else registry
    lines = (up.data / "logs" / f"{name}.log").read_text().splitlines()
    return "\n".join(line for line in lines if "registry.steps_down" in line)
