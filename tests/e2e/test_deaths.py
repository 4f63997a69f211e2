"""``foam up`` when something dies: its processes, its broker, itself, or whoever started it."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from conftest import require_broker
from support.foam_process import FOAM, FoamProcess, FoamUp, foam_environment, foam_up, left_running
from support.ports import free_port

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.timeout(240),  # meshes are started and stopped
]


@pytest.mark.encoder
@pytest.mark.parametrize("kind", ["embedded", "mosquitto", "nats"])
def test_killed_it_leaves_no_process_behind(tmp_path: Path, trial_node: Path, kind: str) -> None:
    if kind != "embedded":
        require_broker(kind)
    with foam_up(tmp_path, "--broker", kind, "--node", str(trial_node)) as up:
        assert up.ask("--function", "echo", "an instance runs now").returncode == 0
        family = up.family()
        up.process.kill()
        assert left_running(family) == []


@pytest.mark.encoder
class TestWhatDies:
    """Any process may be killed; the mesh comes back, and a task has a clear end."""

    @pytest.fixture
    def up(self, any_mesh: FoamUp) -> FoamUp:
        return any_mesh

    def _asking(self, up: FoamUp, n: int) -> FoamProcess:
        asking = FoamProcess(
            *("ask", "--data", str(up.data), "--function", "count", "--json", "--timeout", "60"),
            *("--input", json.dumps({"n": n, "pause_s": 0.05})),
        )
        asking.wait_line('"chunk"')
        return asking

    def test_node_killed_in_the_middle_of_an_answer(self, up: FoamUp) -> None:
        asking = self._asking(up, 400)
        up.child("node").kill()
        code = asking.process.wait(90)
        asking.end()
        last = json.loads(asking.out[-1])
        assert (code, last["event"], last["code"]) == (17, "error", "node_lost")
        up.wait_line("node-trial ended (signal SIGKILL)", where="err")

    def test_router_killed_in_the_middle_of_an_answer(self, up: FoamUp) -> None:
        while up.ask("--function", "echo", "x").returncode != 0:
            up.wait_line("foam: ready", where="err")  # the node of the test before is not back yet
        asking = self._asking(up, 60)
        up.child("router").kill()
        code = asking.process.wait(90)
        asking.end()
        events = [json.loads(line) for line in asking.out]
        chunks = [event["data"] for event in events if event["event"] == "chunk"]
        assert (code, events[-1]["event"]) == (0, "result")
        assert "".join(chunks) == "".join(f"{number} " for number in range(60))

    def test_tasks_sent_while_the_router_is_down_are_answered(self, up: FoamUp) -> None:
        while up.ask("--function", "echo", "x").returncode != 0:
            up.wait_line("foam: ready", where="err")  # what the test before killed is not back yet
        up.child("router").kill()
        done = up.ask("--function", "echo", "kept for the router", "--timeout", "60")
        assert (done.returncode, done.stdout) == (0, b"kept for the router\n"), done.stderr


@pytest.mark.encoder
def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    starter = (
        "import subprocess, sys, time\n"
        "up = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "up.wait()\n"
    )
    command = [*FOAM, "up", "--supervised", "--port", str(free_port()), "--data", str(tmp_path)]
    command += ["--broker", "embedded", "--nodes", "none"]
    with subprocess.Popen(
        [sys.executable, "-c", starter, *command],
        env=foam_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith(b"FOAM READY ")
        family = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
        assert len(family) >= 4
        assert left_running(family) == []


@pytest.mark.encoder
@pytest.mark.parametrize("kind", ["embedded", "mosquitto"])
def test_a_killed_broker_comes_back_and_the_mesh_answers(
    tmp_path: Path, trial_node: Path, kind: str
) -> None:
    if kind != "embedded":
        require_broker(kind)
    with foam_up(tmp_path, "--broker", kind, "--node", str(trial_node)) as up:
        assert up.ask("--function", "echo", "before").returncode == 0
        for process in up.family():
            if "broker" in process.cmdline()[1:4] or "mosquitto" in process.name():
                process.kill()
        up.wait_line("broker ended", where="err")
        assert up.wait_line("broker runs again", where="err")
        # The router may be back before the node, and asks it again.
        done = up.ask("--function", "echo", "after")
        assert done.returncode == 0, (done.stderr, up.err)
