"""``foam up`` and its processes: ready, stopping, what is in the way."""

import json
import signal
import socket
import stat
import time
from pathlib import Path

import pytest

from conftest import require_broker
from foam.log_files import MOST_BYTES
from support.foam_process import FoamProcess, foam_up, left_running, run_foam
from support.ports import free_port

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.timeout(240),  # meshes are started and stopped
]


@pytest.mark.encoder
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_says_ready_once_and_leaves_no_process_behind(
    tmp_path: Path, trial_node: Path, number: int
) -> None:
    with foam_up(tmp_path, "--broker", "embedded", "--node", str(trial_node)) as up:
        facts, family = up.facts, up.family()
        assert len(family) >= 6
        assert up.end(number) == 0
        assert left_running(family) == []
    assert [line.partition(" {")[0] for line in up.out] == ["FOAM READY"]
    assert set(facts) >= {"broker", "site", "device", "admin", "data"}
    assert set(facts["device"]) == set(facts["admin"]) == {"id", "username", "password"}
    assert facts["broker"].startswith("mqtt://127.0.0.1:")
    assert facts["functions"] == ["broken", "count", "echo", "runs"]


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


def test_logs_that_grew_too_large_are_set_aside(tmp_path: Path) -> None:
    logs = [tmp_path / "logs" / "router.log", tmp_path / "broker" / "embedded.log"]
    for log in logs:
        log.parent.mkdir(mode=0o700)
        log.write_bytes(b"." * (MOST_BYTES + 1))
    with foam_up(tmp_path, "--broker", "embedded", "--nodes", "none"):
        until = time.monotonic() + 60
        while any(log.stat().st_size > MOST_BYTES for log in logs):
            assert time.monotonic() < until, "a log is still too large"
            time.sleep(0.05)
        assert all(log.with_name(f"{log.name}.1").stat().st_size > MOST_BYTES for log in logs)


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
    done = run_foam("up", "--port", str(free_port()), "--data", str(tmp_path), *arguments)
    assert done.returncode == 20
    assert says in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_a_declaration_that_does_not_work_ends_the_start(tmp_path: Path) -> None:
    declaration = tmp_path / "bad.toml"
    declaration.write_text('[[function]]\nname = "x"\ndescription = "y"\nruntime = "abacus"\n')
    done = run_foam(
        *("up", "--port", str(free_port()), "--broker", "embedded", "--node", str(declaration)),
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
    port = str(free_port())
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


def test_two_nodes_of_one_name_are_refused(tmp_path: Path, trial_node: Path) -> None:
    twice = ("--node", str(trial_node)) * 2
    done = run_foam("up", "--port", str(free_port()), "--data", str(tmp_path), *twice)
    assert done.returncode == 20
    assert b"two nodes are named trial" in done.stderr
