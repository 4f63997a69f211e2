"""``foam up`` and its processes: ready, stopping, what is in the way, what dies."""

import json
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from conftest import require_broker
from support.foam_process import FOAM, FoamProcess, FoamUp, foam_environment, foam_up, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.timeout(180),  # meshes are started and stopped
]


def _all_end(family: list[psutil.Process], *, within_s: float = 15.0) -> list[str]:
    """Return the command lines of those that did not end."""
    alive = psutil.wait_procs(family, timeout=within_s)[1]
    return [" ".join(process.cmdline()) for process in alive]


@pytest.mark.encoder
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_says_ready_once_and_leaves_no_process_behind(
    tmp_path: Path, trial_node: Path, number: int
) -> None:
    with foam_up(tmp_path, "--broker", "embedded", "--node", str(trial_node)) as up:
        facts, family = up.facts, up.family()
        assert len(family) >= 6
        assert up.end(number) == 0
        assert _all_end(family) == []
    assert [line.partition(" {")[0] for line in up.out] == ["FOAM READY"]
    assert set(facts) >= {"broker", "site", "device", "admin", "data"}
    assert set(facts["device"]) == set(facts["admin"]) == {"id", "username", "password"}
    assert facts["broker"].startswith("mqtt://127.0.0.1:")
    assert facts["functions"] == ["broken", "count", "echo", "runs"]


@pytest.mark.encoder
@pytest.mark.parametrize("kind", ["embedded", "mosquitto", "nats"])
def test_killed_it_leaves_no_process_behind(tmp_path: Path, trial_node: Path, kind: str) -> None:
    if kind != "embedded":
        require_broker(kind)
    with foam_up(tmp_path, "--broker", kind, "--node", str(trial_node)) as up:
        assert up.ask("--function", "echo", "an instance runs now").returncode == 0
        family = up.family()
        up.process.kill()
        assert _all_end(family) == []


def test_secrets_are_for_the_owner_only(tmp_path: Path) -> None:
    data = tmp_path / "mesh"
    with foam_up(data, "--broker", "embedded", "--nodes", "none") as up:
        secret = up.facts["admin"]["password"]
        holders = [
            path
            for path in data.rglob("*")
            if path.is_file() and secret in path.read_text(errors="replace")
        ]
        logs = list((data / "logs").iterdir())
    assert {path.name for path in holders} == {"mesh.json", "admin-1.json"}
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    for path in [*holders, data / "credentials.json", *data.glob("identities/*")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert {path.name for path in logs} >= {"broker.log", "router.log", "registry.log", "up.log"}


def test_second_mesh_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with foam_up(tmp_path, "--broker", "embedded", "--nodes", "none"):
        second = run_foam("up", "--data", str(tmp_path), "--nodes", "none")
    assert second.returncode == 21
    assert b"already runs" in second.stderr


def test_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_foam(
            *("up", "--broker", "embedded", "--nodes", "none", "--port", port),
            *("--data", str(tmp_path)),
        )
    assert done.returncode == 20
    assert f"cannot listen on 127.0.0.1 port {port}".encode() in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--broker", "kafka"], "use embedded, mosquitto, nats or a URL"),
        (["--broker", "http://127.0.0.1:1"], "write mqtt://"),
        (["--nodes", "many"], "use demo or none"),
        (["--node", "no-such.toml"], "no-such.toml"),
    ],
)
def test_wrong_options_are_said_in_one_line(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = run_foam("up", "--port", "0", "--data", str(tmp_path), *arguments)
    assert done.returncode == 20
    assert says in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_a_declaration_that_does_not_work_ends_the_start(tmp_path: Path) -> None:
    declaration = tmp_path / "bad.toml"
    declaration.write_text('[[function]]\nname = "x"\ndescription = "y"\nruntime = "abacus"\n')
    done = run_foam(
        *("up", "--port", "0", "--broker", "embedded", "--node", str(declaration)),
        *("--data", str(tmp_path / "mesh")),
    )
    assert done.returncode == 20
    assert b"node-bad" in done.stderr
    assert b"abacus" in done.stderr


@pytest.mark.encoder
def test_runs_on_a_broker_that_is_not_ours(tmp_path: Path, trial_node: Path) -> None:
    """The credentials in its URL are used for everything."""
    require_broker("mosquitto")
    hosting, guest = tmp_path / "host", tmp_path / "guest"
    static = ("--broker", "mosquitto", "--access", "static")
    with foam_up(hosting, *static, "--nodes", "none") as host:
        port, folder = host.port, hosting / "broker"
        (folder / "mosquitto.acl").write_text("user admin-1\ntopic readwrite #\n")
        mosquitto = next(one for one in host.family() if one.name() == "mosquitto")
        mosquitto.send_signal(signal.SIGHUP)
        who = host.facts["admin"]
        url = f"mqtt://{who['username']}:{who['password']}@127.0.0.1:{port}"
        with foam_up(guest, "--broker", url, "--site", "guest", "--node", str(trial_node)) as up:
            assert up.facts["broker"] == f"mqtt://127.0.0.1:{port}"
            assert up.facts["device"] == up.facts["admin"] == who
            done = up.ask("say back what I said")
            assert (done.returncode, done.stdout) == (0, b"say back what I said\n")


@pytest.mark.encoder
def test_broker_absent_at_start_is_waited_for(tmp_path: Path, trial_node: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    data = ("--data", str(tmp_path))
    node = FoamProcess("node", str(trial_node), "--url", f"mqtt://127.0.0.1:{port}", *data)
    try:
        node.wait_line("does not answer; waiting for it", where="err")
        broker = FoamProcess("broker", "--engine", "embedded", "--port", port, *data)
        try:
            ready = broker.wait_line("FOAM BROKER READY ")
            assert json.loads(ready.partition("READY ")[2])["url"] == f"mqtt://127.0.0.1:{port}"
            node.wait_line('FOAM NODE READY {"id": "trial"')
            assert node.end() == 0
        finally:
            assert broker.end() == 0
    finally:
        node.end()


def test_each_process_alone_says_a_wrong_password(tmp_path: Path) -> None:
    with foam_up(tmp_path, "--broker", "embedded", "--nodes", "none") as up:
        url = ("--url", up.facts["broker"], "--username", "registry-1")
        done = run_foam("registry", *url, "--data", str(tmp_path / "other"), FOAM_PASSWORD="wrong")
    assert done.returncode == 13
    assert b"refuses the connection of registry-1" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.encoder
class TestWhatDies:
    """Any process may be killed; the mesh comes back, and a task has a clear end."""

    @pytest.fixture
    def up(self, any_mesh: FoamUp) -> FoamUp:
        return any_mesh

    def _asking(self, up: FoamUp, n: int) -> FoamProcess:
        asking = FoamProcess(
            *("ask", "--data", str(up.data), "--function", "count", "--json", "--timeout", "25"),
            *("--input", json.dumps({"n": n, "pause_s": 0.05})),
        )
        asking.wait_line('"chunk"')
        return asking

    def test_node_killed_in_the_middle_of_an_answer(self, up: FoamUp) -> None:
        asking = self._asking(up, 400)
        up.child("node").kill()
        code = asking.process.wait(20)
        asking.end()
        last = json.loads(asking.out[-1])
        assert (code, last["event"], last["code"]) == (17, "error", "node_lost")
        up.wait_line("node-trial ended (signal SIGKILL)", where="err")

    def test_router_killed_in_the_middle_of_an_answer(self, up: FoamUp) -> None:
        while up.ask("--function", "echo", "x").returncode != 0:
            up.wait_line("foam: ready", where="err")  # the node of the test before is not back yet
        asking = self._asking(up, 60)
        up.child("router").kill()
        code = asking.process.wait(25)
        asking.end()
        events = [json.loads(line) for line in asking.out]
        chunks = [event["data"] for event in events if event["event"] == "chunk"]
        assert (code, events[-1]["event"]) == (0, "result")
        assert "".join(chunks) == "".join(f"{number} " for number in range(60))

    def test_tasks_sent_while_the_router_is_down_are_answered(self, up: FoamUp) -> None:
        while up.ask("--function", "echo", "x").returncode != 0:
            up.wait_line("foam: ready", where="err")  # what the test before killed is not back yet
        up.child("router").kill()
        done = up.ask("--function", "echo", "kept for the router", "--timeout", "25")
        assert (done.returncode, done.stdout) == (0, b"kept for the router\n"), done.stderr


@pytest.mark.encoder
def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    starter = (
        "import subprocess, sys, time\n"
        "up = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "up.wait()\n"
    )
    command = [*FOAM, "up", "--supervised", "--port", "0", "--data", str(tmp_path)]
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
        assert _all_end(family) == []


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


def test_two_nodes_of_one_name_are_refused(tmp_path: Path, trial_node: Path) -> None:
    node = str(trial_node)
    done = run_foam("up", "--port", "0", "--data", str(tmp_path), "--node", node, "--node", node)
    assert done.returncode == 20
    assert b"two nodes are named trial" in done.stderr
