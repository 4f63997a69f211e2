"""``foam nodes``, ``functions``, ``explain``, ``admin``, ``doctor``."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.foam_process import FOAM, FoamUp, foam_environment, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.encoder,
    pytest.mark.timeout(180),  # the first test waits for the mesh of all
]


def _json(mesh: FoamUp, *arguments: str) -> dict[str, Any]:
    done = run_foam(*arguments, "--data", str(mesh.data))
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_nodes_and_functions_are_listed(mesh: FoamUp) -> None:
    (node,) = _json(mesh, "nodes", "--json")["nodes"]
    assert (node["node"], node["state"], node["live"]) == ("trial", "birth", True)
    functions = _json(mesh, "functions", "--json")["functions"]
    assert {row["function"] for row in functions} == {"broken", "count", "echo", "runs"}
    table = run_foam("functions", "--data", str(mesh.data)).stdout.decode()
    assert "Repeat the words of the task" in table


def test_explain_shows_candidates_gates_and_choice(mesh: FoamUp) -> None:
    told = _json(mesh, "explain", "count slowly to ten, please", "--json")
    assert told["chosen"] == ["trial", "count"]
    assert {row["function"] for row in told["candidates"]} >= {"count", "echo"}
    shown = run_foam("explain", "count slowly to ten, please", "--data", str(mesh.data))
    assert b"chosen: trial/count" in shown.stdout


def test_a_past_task_is_explained(mesh: FoamUp) -> None:
    done = mesh.ask("say back what I said", "--json")
    task = json.loads(done.stdout.splitlines()[0])["task"]
    told = _json(mesh, "explain", "--task", task, "--json")
    assert (told["outcome"], told["explanation"]["chosen"]) == ("result", ["trial", "echo"])
    shown = run_foam("explain", "--task", task, "--data", str(mesh.data))
    assert f"task {task} of device-1: result by trial/echo".encode() in shown.stdout


def test_whatif_and_weights(mesh: FoamUp) -> None:
    told = _json(mesh, "whatif", "count slowly to ten", "--gone", "trial", "--json")
    assert (told["now"]["chosen"], told["then"]["chosen"]) == (["trial", "count"], None)
    shown = run_foam(
        "whatif", "count slowly to ten", "--cost", "trial/count=3", "--data", str(mesh.data)
    )
    assert b"then: trial/count (the same)" in shown.stdout
    assert _json(mesh, "weights", "cost=0.2", "--json")["changed"] == ["cost"]
    assert _json(mesh, "weights", "--reset", "--json")["changed"] == []
    refused = run_foam("weights", "cost=7", "--data", str(mesh.data))
    assert refused.returncode == 10
    assert b"weight cost is 7.0: a number from 0 to 1 is allowed" in refused.stderr


def test_rules_are_taken_up_and_calibration_is_shown(mesh: FoamUp) -> None:
    rules = mesh.data / "rules.toml"
    rules.write_text('[[rule]]\nname = "closed"\nforbid = { function = "echo" }\n')
    run_foam("rules", "reload", "--data", str(mesh.data))
    (rule,) = _json(mesh, "rules", "show", "--json")["rules"]
    assert rule["name"] == "closed"
    refused = mesh.ask("--function", "echo", "hello")
    assert refused.returncode == 12
    rules.write_text("[[rule]\n")
    bad = run_foam("rules", "reload", "--data", str(mesh.data))
    assert bad.returncode == 20
    assert b"not followed as it is now" in bad.stderr
    rules.unlink()
    assert _json(mesh, "rules", "reload", "--json")["count"] == 0
    assert 0 < _json(mesh, "calibrate", "--json")["threshold"] < 1


def test_cordon_and_uncordon(mesh: FoamUp) -> None:
    assert _json(mesh, "admin", "cordon", "trial") == {"node": "trial", "cordoned": True}
    refused = mesh.ask("say back what I said")
    _json(mesh, "admin", "uncordon", "trial")
    assert refused.returncode == 11
    assert b"cordon" in refused.stderr
    assert mesh.ask("say back what I said").returncode == 0


def test_unknown_node_and_task(mesh: FoamUp) -> None:
    for arguments in (["admin", "drain", "nobody"], ["admin", "task", "nothing"]):
        done = run_foam(*arguments, "--data", str(mesh.data))
        assert done.returncode == 23
        assert b"is not known" in done.stderr


def test_stats(mesh: FoamUp) -> None:
    assert _json(mesh, "admin", "stats")["nodes"] == 1


def test_doctor_finds_everything_a_running_mesh_needs(mesh: FoamUp) -> None:
    done = run_foam("doctor", "--json", "--data", str(mesh.data))
    checks = {check["what"]: check for check in json.loads(done.stdout)}
    assert checks["mesh"]["verdict"] == "ok"
    assert checks["encoder"]["verdict"] == "ok"


def test_doctor_says_what_to_do(tmp_path) -> None:
    done = run_foam(
        "doctor", "--data", str(tmp_path), FOAM_MODEL=str(tmp_path / "no.gguf"), FOAM_ENCODER="/no"
    )
    assert done.returncode == 1
    assert b"MISSING model" in done.stdout
    assert b"do: set FOAM_MODEL" in done.stdout
    assert b"MISSING encoder" in done.stdout


@pytest.mark.parametrize("columns", [80, 100])
def test_tables_fit_the_terminal(mesh: FoamUp, columns: int) -> None:
    for words in (("nodes",), ("functions",), ("explain", "count to three")):
        done = run_foam(*words, "--data", str(mesh.data), COLUMNS=str(columns))
        lines = done.stdout.decode().splitlines()
        assert max(map(len, lines)) <= columns, done.stdout.decode()
        if words[0] == "explain":
            assert any("node" in line and "verdict" in line for line in lines)


@pytest.mark.parametrize("words", [("nodes",), ("ask", "--function", "echo", "hello")])
def test_output_that_cannot_be_written_is_one_line(mesh: FoamUp, words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*FOAM, *words, "--data", str(mesh.data)],
            env=foam_environment(),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=25,
            check=False,
        )
    said = [line for line in done.stderr.decode().splitlines() if line.startswith("foam: ")]
    assert done.returncode in {20, 130}
    assert len(said) == 1
    assert "cannot be written: No space left" in said[0]
    assert b"Traceback" not in done.stderr
