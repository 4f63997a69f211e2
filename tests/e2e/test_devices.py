"""Devices that are no program of ours, and members that join a running mesh."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foam.sdk.blocking import BlockingMesh
from support.foam_process import FoamProcess, FoamUp, foam_environment, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.encoder,
    pytest.mark.timeout(180),  # the first test waits for the mesh of all
]


def _mosquitto(tool: str) -> str:
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"there is no {tool} on this machine")
    return found


def _login(mesh: FoamUp, who: dict[str, str]) -> list[str]:
    return ["-h", "127.0.0.1", "-p", str(mesh.port), "-u", who["username"], "-P", who["password"]]


def _converse(
    mesh: FoamUp, who: dict[str, str], payload: bytes
) -> list[tuple[str, dict[str, Any]]]:
    """Publish one task with mosquitto_pub, read its events to the last with mosquitto_sub."""
    root, login = f"foam/v1/{mesh.facts['site']}", _login(mesh, who)
    reading = subprocess.Popen(
        [
            *("stdbuf", "-oL"),  # into a pipe it would speak only when it ends
            *(_mosquitto("mosquitto_sub"), *login, "-t", f"{root}/reply/{who['id']}/#"),
            *("-q", "1", "-v", "-W", "20", "-d"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    events: list[tuple[str, dict[str, Any]]] = []
    with reading:
        assert reading.stdout is not None
        for line in reading.stdout:
            if "SUBACK" in line:
                break
        publish = [_mosquitto("mosquitto_pub"), *login, "-t", f"{root}/task/{who['id']}"]
        subprocess.run([*publish, "-q", "1", "-s"], input=payload, check=True, timeout=10)
        for line in reading.stdout:
            if line.startswith(root):
                topic, _, event = line.partition(" ")
                events.append((topic, json.loads(event)))
                if events[-1][1]["event"] in {"result", "error"}:
                    break
        reading.terminate()
    return events


def test_a_device_made_of_two_mosquitto_commands_gets_a_streamed_answer(any_mesh: FoamUp) -> None:
    device = any_mesh.facts["device"]
    task = {"function": "count", "input": {"n": 3, "pause_s": 0.2}, "id": "by-hand"}
    events = _converse(any_mesh, device, json.dumps(task).encode())
    assert [event["event"] for _, event in events] == [
        *("accepted", "routed", "chunk", "chunk", "chunk", "result")
    ]
    assert [topic.rpartition("/")[2] for topic, _ in events] == [*["router-1"] * 2, *["trial"] * 4]
    assert [event["seq"] for _, event in events[2:]] == [0, 1, 2, 3]
    assert events[-1][1]["output"] == "0 1 2 "
    assert {event["task"] for _, event in events} == {"by-hand"}


def test_plain_words_are_a_task(mesh: FoamUp) -> None:
    events = _converse(mesh, mesh.facts["device"], b"say back what I said")
    assert events[-1][1]["output"] == "say back what I said"


@pytest.mark.parametrize(
    ("payload", "code", "says"),
    [
        (b'{"text": "x"', "invalid_task", "JSON"),
        (b'{"text": "x", "colour": "red"}', "invalid_task", "colour"),
        (b'{"text": 5}', "invalid_task", "text"),
        (b"\xff\xfe\xfa", "invalid_task", "UTF-8"),
        (b" ", "invalid_task", "empty"),
        (b'{"function": "count", "input": {"n": "x"}}', "invalid_task", "input.n"),
        (b'{"function": "count@nine"}', "invalid_task", "version range"),
        (b'{"text": "x", "timeout_ms": 0}', "deadline_exceeded", ""),
        (b'{"text": "x", "reply_to": "foam/v1/local/reply/other/x"}', "invalid_task", "reply"),
        (b"recite the periodic table in finnish", "no_capable_node", "nearest"),
    ],
)
def test_bad_input_is_answered_on_the_reply_topic(
    mesh: FoamUp, payload: bytes, code: str, says: str
) -> None:
    kinds = [event for _, event in _converse(mesh, mesh.facts["device"], payload)]
    assert kinds[-1]["event"] == "error"
    assert kinds[-1]["code"] == code
    assert says in kinds[-1]["message"] + json.dumps(kinds[-1].get("detail", {}))


def test_ten_megabytes_are_refused_and_nothing_else_suffers(any_mesh: FoamUp) -> None:
    ((_, event),) = _converse(any_mesh, any_mesh.facts["device"], b"x" * 10_000_000)
    assert (event["event"], event["code"]) == ("error", "too_large")
    assert "1048576" in event["message"]
    assert any_mesh.ask("--function", "echo", "still here").returncode == 0


def test_a_device_added_while_the_mesh_runs(any_mesh: FoamUp) -> None:
    data = ("--data", str(any_mesh.data))
    done = run_foam("device", "add", "esp32-1", *data)
    assert done.returncode == 0, done.stderr
    assert b"may log on" in done.stderr
    who = json.loads(done.stdout)
    events = _converse(any_mesh, who, b"say back what I said")
    assert events[-1][1]["event"] == "result"
    assert run_foam("device", "add", "esp32-1", *data).returncode == 21
    assert "esp32-1\tdevice\tenabled" in run_foam("device", "list", *data).stdout.decode()
    assert run_foam("device", "remove", "esp32-1", *data).returncode == 0
    assert run_foam("device", "remove", "esp32-1", *data).returncode == 23
    assert "esp32-1" not in run_foam("device", "list", *data).stdout.decode()


def test_a_node_joins_with_an_identity_file_from_elsewhere(mesh: FoamUp, tmp_path: Path) -> None:
    made = run_foam(
        *("device", "add", "far-1", "--role", "node", "--out", str(tmp_path / "carried")),
        *("--data", str(mesh.data)),
    )
    assert made.returncode == 0, made.stderr
    code = tmp_path / "far.py"
    code.write_text(
        "from foam import function\n\n\n"
        '@function(examples=["double the number"])\n'
        "def double(number: float) -> float:\n"
        '    """Double a number."""\n'
        "    return number * 2\n"
    )
    node = FoamProcess(
        *("node", str(code), "--identity", str(tmp_path / "carried" / "far-1.json")),
        *("--data", str(tmp_path / "elsewhere")),
    )
    try:
        ready = node.wait_line("FOAM NODE READY ")
        assert json.loads(ready.partition("READY ")[2]) == {"id": "far-1", "functions": ["double"]}
        ask = ("--function", "double", "--input", '{"number": 21}', "-q")
        answers = [mesh.ask(*ask)]
        while answers[-1].returncode == 11 and len(answers) < 20:  # not admitted yet
            answers.append(mesh.ask(*ask))
        assert answers[-1].stdout == b"42\n"
    finally:
        assert node.end() == 0


def test_the_sdk_and_its_blocking_facade(mesh: FoamUp) -> None:
    who = mesh.facts["device"]
    code = f"""
from foam.sdk.blocking import BlockingMesh
login = {{"username": {who["username"]!r}, "password": {who["password"]!r}}}
with BlockingMesh({mesh.facts["broker"]!r}, **login) as mesh:
    print("|".join(mesh.stream(function="count", input={{"n": 3, "pause_s": 0.1}})))
    print(mesh.ask("say back what I said").output)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=foam_environment(),
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    assert done.stdout.splitlines() == ["0 |1 |2 ", "say back what I said"], done.stderr


def test_an_administrator_may_ask_the_registry_from_a_program(mesh: FoamUp) -> None:
    who = mesh.facts["admin"]
    with BlockingMesh(
        mesh.facts["broker"], username=who["username"], password=who["password"]
    ) as client:
        claims = client.admin("claims", target=mesh.facts["registry"])
    assert {claim["function"] for claim in claims} >= {"echo", "count"}


def test_a_new_node_joins_the_running_mesh_with_one_command(
    any_mesh: FoamUp, tmp_path: Path
) -> None:
    code = tmp_path / "distance.py"
    code.write_text(
        "from foam import function\n\n"
        '@function(examples=["how far apart are 3 and 10?"])\n'
        "def distance(a: float, b: float) -> float:\n"
        '    """Distance between two numbers."""\n'
        "    return abs(a - b)\n"
    )
    node = FoamProcess("node", str(code), "--data", str(any_mesh.data))
    try:
        node.wait_line("READY")
        done = any_mesh.ask("--function", "distance", "--input", '{"a": 3, "b": 10}')
        assert (done.returncode, done.stdout.strip()) == (0, b"7"), done.stderr
    finally:
        node.end()
    assert run_foam("device", "remove", "distance", "--data", str(any_mesh.data)).returncode == 0
