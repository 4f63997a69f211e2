"""``foam chaos`` as a user runs it: a real mesh is broken, its clients lose nothing."""

import json
from pathlib import Path

import pytest

from support.foam_process import run_foam

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_short_run_on_real_processes_keeps_every_promise(tmp_path: Path) -> None:
    done = run_foam(
        *("chaos", "--minutes", "0.25", "--seed", "2", "--nodes", "2", "--devices", "2"),
        *("--broker", "embedded", "--no-model", "--rate", "2", "--faults", "0.2"),
        *("--only", "kill_node,pause_node,cut,kill_router,twist"),
        *("--data", str(tmp_path / "mesh"), "--json"),
        timeout_s=200,
    )
    assert done.stdout, done.stderr.decode()[-2_000:]
    report = json.loads(done.stdout)
    assert done.returncode == 0, (report, done.stderr.decode()[-2_000:])
    assert report["submitted"] == 30
    assert report["finished"] > 10
    assert sum(report["faults"].values()) == 3
    assert not report["failed"]
    assert (tmp_path / "mesh" / "logs" / "router-1.log").exists()


def test_simulated_meshes_are_judged_from_the_command_line() -> None:
    done = run_foam(
        *("chaos", "--simulated", "--seeds", "1", "--seed", "2", "--nodes", "3"),
        *("--tasks", "20", "--minutes", "0.2", "--faults", "0"),
        timeout_s=100,
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert b"20 tasks" in done.stdout
    assert b"every promise kept" in done.stdout


def test_simulated_nodes_sleep_when_they_are_told_to() -> None:
    done = run_foam(
        *("chaos", "--simulated", "--json", "--seeds", "1", "--seed", "2", "--nodes", "2"),
        *("--sleepers", "2", "--tasks", "10", "--minutes", "0.2", "--faults", "0"),
        timeout_s=100,
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert json.loads(done.stdout)["sleepers"] == 2


def test_nodes_sleep_in_simulations_only() -> None:
    done = run_foam("chaos", "--sleepers", "2", timeout_s=60)
    assert done.returncode == 2
    assert b"add --simulated" in done.stderr
