"""A node that sleeps, and a second process with the id of a node, with real processes."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import require_broker
from support.foam_process import FoamUp, foam_up, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.encoder,
    pytest.mark.timeout(240),
]

_TRIAL = Path(__file__).resolve().parents[1] / "data" / "functions" / "trial.py"
_SLEEPER = f"""
[node]
id = "dozy"
settings = {{ sleep = {{ awake_s = 1.0, asleep_s = 12.0 }} }}

[[function]]
entry = "{_TRIAL}:echo"
"""
_CONFLICT = 21


def _wait(check: Callable[[], object], within_s: float = 90.0) -> None:
    until = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.2)


def _node(mesh: FoamUp, node: str) -> dict[str, Any]:
    done = run_foam("nodes", "--json", "--data", str(mesh.data))
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["nodes"]
    return next(row for row in rows if row["node"] == node)


@pytest.fixture
def sleepy(tmp_path: Path) -> Iterator[FoamUp]:
    path = tmp_path / "dozy.toml"
    path.write_text(_SLEEPER)
    with foam_up(tmp_path / "mesh", "--broker", "embedded", "--node", str(path)) as up:
        yield up


def test_a_task_for_a_sleeper_waits_until_it_wakes(sleepy: FoamUp) -> None:
    _wait(lambda: _node(sleepy, "dozy")["asleep"])
    shown = run_foam("nodes", "--data", str(sleepy.data)).stdout.decode()
    asleep = _node(sleepy, "dozy")
    if asleep["asleep"]:  # it may have woken meanwhile
        assert asleep["wake_at"] is not None
        assert asleep["state"] == "sleeping"
        assert "asleep until" in shown
    late = sleepy.ask("--function", "echo", "--timeout", "1", "hello there")
    assert late.returncode in {0, 11, 16}, late.stderr  # 0: it was just awake
    if late.returncode == 16:
        assert b"dozy could, but is asleep until" in late.stderr
    _wait(lambda: _node(sleepy, "dozy")["asleep"])
    done = sleepy.ask("--function", "echo", "--timeout", "60", "hello there")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == "hello there"


@pytest.fixture(params=["embedded", "mosquitto", "nats"])
def mesh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FoamUp]:
    if request.param != "embedded":
        require_broker(request.param)
    with foam_up(tmp_path / "mesh", "--broker", request.param, "--node", str(_TRIAL)) as up:
        yield up


def test_a_second_process_of_a_node_is_refused_and_the_first_goes_on(
    mesh: FoamUp, tmp_path: Path
) -> None:
    first = mesh.child("node").pid
    here = run_foam("node", str(_TRIAL), "--data", str(mesh.data))
    assert here.returncode == _CONFLICT, here.stderr
    assert f"trial runs on this machine already (process {first}" in here.stderr.decode()

    shutil.copytree(mesh.data / "identities", tmp_path / "stolen")  # as on another machine
    copy = str(tmp_path / "stolen" / "trial.json")
    broker = str(mesh.facts["broker"])
    there = run_foam("node", str(_TRIAL), "--identity", copy, "--url", broker)
    assert there.returncode == _CONFLICT, there.stderr
    assert "trial is running elsewhere already" in there.stderr.decode()
    assert f"process {first}" in there.stderr.decode()

    def told() -> bool:
        done = run_foam("audit", "show", "--json", "--data", str(mesh.data))
        return b"identity_refused" in done.stdout

    _wait(told)
    assert psutil.pid_exists(first)
    _wait(lambda: _node(mesh, "trial")["live"])
    done = mesh.ask("--function", "echo", "still here")
    assert done.stdout.decode().strip() == "still here", done.stderr


def test_a_node_that_was_killed_is_back_at_once_in_spite_of_its_last_word(mesh: FoamUp) -> None:
    before = mesh.child("node")
    before.kill()
    before.wait(30)
    _wait(lambda: _node(mesh, "trial")["live"])
    done = mesh.ask("--function", "echo", "back again")
    assert done.stdout.decode().strip() == "back again", done.stderr
    log = (mesh.data / "logs" / "node-trial.log").read_text()
    assert "identity.in_doubt" not in log  # the lock says that the one before is gone
