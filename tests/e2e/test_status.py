"""``foam status`` as an operator uses it."""

import json

import psutil
import pytest

from support.foam_process import FoamUp, foam_up, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.encoder,
    pytest.mark.timeout(240),
]


def child(up: FoamUp, *words: str) -> psutil.Process:
    """Return the process of the mesh whose command line holds these words in a row."""
    for process in up.family():
        command = process.cmdline()
        starts = range(len(command) - len(words) + 1)
        if any(tuple(command[at : at + len(words)]) == words for at in starts):
            return process
    raise AssertionError(f"no process of the mesh runs {words}")


def test_the_mesh_at_one_glance(tmp_path, trial_node) -> None:
    options = ("--broker", "embedded", "--routers", "2", "--node", str(trial_node))
    with foam_up(tmp_path, *options) as up:
        shown = run_foam("status", "--data", str(up.data))
        assert shown.returncode == 0, (shown.stdout, shown.stderr)
        for words in (b"router-1 ready, router-2 ready", b"registry-1 leads", b"1 ready"):
            assert words in shown.stdout
        assert shown.stdout.endswith(b"all is well\n")

        hung = child(up, "router", "--id", "router-2")
        hung.suspend()
        try:
            done = run_foam("status", "--json", "--data", str(up.data))
        finally:
            hung.resume()
        assert done.returncode == 1, (done.stdout, done.stderr)
        told = json.loads(done.stdout)
        states = {one["router"]: one["state"] for one in told["routers"]}
        assert states["router-1"] == "ready"
        assert states["router-2"] in {"does not answer", "silent"}
        assert any(warning.startswith("router-2 ") for warning in told["warnings"])
        assert told["tasks"] == {"running": 0, "waiting": 0}
    gone = run_foam("status", "--data", str(up.data))
    assert gone.returncode in {22, 23}


def test_it_is_for_administrators_and_operators(mesh: FoamUp) -> None:
    device = mesh.data / "identities" / f"{mesh.facts['device']['id']}.json"
    url = str(mesh.facts["broker"])
    refused = run_foam("status", "--url", url, "--identity", str(device))
    assert refused.returncode == 13, refused.stderr
    assert b"administrator" in refused.stderr
