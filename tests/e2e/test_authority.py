"""The site's authority is rotated while a node serves tasks; evidence by commands."""

import json
import time
import tomllib
from pathlib import Path

import pytest

from conftest import require_broker
from support.foam_process import FoamProcess, FoamUp, run_foam

pytestmark = [pytest.mark.e2e, pytest.mark.broker, pytest.mark.encoder]

PLANT = '''
from foam import function

@function(examples=("how much water is in the tank?", "what does the tank hold?"))
def tank_volume(level_cm: float) -> dict[str, float]:
    """Compute how much water a tank holds from its level."""
    return {"litres": level_cm * 20}
'''


@pytest.fixture(scope="module", params=["embedded", "mosquitto"])
def site(request, tmp_path_factory):
    """A mesh without nodes that listens with TLS."""
    if request.param != "embedded":
        require_broker(request.param)
    folder = tmp_path_factory.mktemp("site")
    mesh = FoamUp(
        folder / "data",
        *("--nodes", "none", "--broker", request.param, "--tls", "--tls-port", "0"),
    )
    try:
        yield mesh.wait_ready()
    finally:
        mesh.end()


def foam(site, *arguments, code=0, **options):
    done = run_foam(*arguments, "--data", str(site.data), **options)
    assert done.returncode == code, done.stderr
    return (done.stdout if code == 0 else done.stderr).decode()


def facts(site):
    return json.loads(foam(site, "authority", "show", "--json"))


def make_token(site):
    return foam(site, "token", "create").strip()


def enroll(site, folder, name):
    return redeem(site, folder, name, make_token(site))


def redeem(site, folder, name, token):
    done = run_foam(
        *("enroll", "--broker", site.facts["public"][0], "--token", "-", "--data", str(folder)),
        *("--id", name, "--timeout", "40"),
        stdin=token.encode(),
        timeout_s=60.0,
    )
    return done, Path(done.stdout.decode().strip())


def ask(site):
    asked = foam(
        *(site, "ask", "how much water is in the tank?", "--input", '{"level_cm": 2}'),
        timeout_s=60.0,
    )
    return json.loads(asked)


def wait_for(look, wanted, timeout_s=90.0):
    """Look again until it is as wanted; each look is a command, and takes a second by itself."""
    until = time.monotonic() + timeout_s
    seen = look()
    while not (wanted(seen) if callable(wanted) else seen == wanted):
        assert time.monotonic() < until, f"after {timeout_s} s it is {seen}"
        seen = look()


def node_at(folder, paper, plant):
    return FoamProcess(
        *("node", str(plant), "--identity", str(paper), "--data", str(folder)),
    )


@pytest.mark.timeout(300)
def test_a_rotation_without_a_gap(site, tmp_path):
    plant = tmp_path / "plant.py"
    plant.write_text(PLANT)
    (joined, paper), (asleep, sleeper) = (
        enroll(site, tmp_path / name, name) for name in ("press-7", "press-8")
    )
    assert (joined.returncode, asleep.returncode) == (0, 0), joined.stderr + asleep.stderr
    old_token = foam(site, "token", "create", "--uses", "9").strip()
    node = node_at(tmp_path / "press-7", paper, plant)
    try:
        node.wait_line("FOAM NODE READY")
        before = paper.with_suffix(".tls.pem").read_text()
        foam(site, "authority", "rotate")
        assert foam(site, "authority", "show", "--pem").count("BEGIN CERTIFICATE") == 2
        assert "under way" in foam(site, "authority", "rotate", code=10)
        assert ask(site) == {"litres": 40.0}
        # The node hears that there is a new root, and renews over the session it has.
        wait_for(lambda: facts(site)["not_renewed"], ["press-8"])
        wait_for(paper.with_suffix(".tls.pem").read_text, lambda now: now != before)
        assert paper.with_suffix(".tls.ca").read_text().count("BEGIN CERTIFICATE") == 2
        assert ask(site) == {"litres": 40.0}
        # Newcomers come with the old root's token and with the new one's.
        for name, token in (("press-9", old_token), ("press-10", make_token(site))):
            done, _ = redeem(site, tmp_path / name, name, token)
            assert done.returncode == 0, done.stderr
        assert facts(site)["old_tokens"] == [old_token.split(".")[1]]
        assert "press-8" in foam(site, "authority", "retire", code=10)
        retired = foam(site, "authority", "retire", "--force")
        assert "locked out, they have to enroll again: press-8" in retired
        assert ask(site) == {"litres": 40.0}
        # The node comes back with its new papers.
        assert node.end() == 0
        node = node_at(tmp_path / "press-7", paper, plant)
        node.wait_line("FOAM NODE READY")
        assert ask(site) == {"litres": 40.0}
    finally:
        node.end()
    assert [root["number"] for root in facts(site)["roots"]] == [2]
    fresh, _ = enroll(site, tmp_path / "press-11", "press-11")
    assert fresh.returncode == 0, fresh.stderr
    who_comes_too_late(tmp_path, sleeper, paper, plant)
    worthless, _ = redeem(site, tmp_path / "press-12", "press-12", old_token)
    assert (worthless.returncode != 0, b"authority" in worthless.stderr) == (True, True)
    shown = json.loads(foam(site, "audit", "show", "--json"))["entries"]
    actions = {entry["action"] for entry in shown}
    assert {"enrollment_authority_rotated", "enrollment_authority_retired"} <= actions


def who_comes_too_late(tmp_path, sleeper, paper, plant):
    """Start a node that was away; then again, when it trusts the new root with its old papers."""
    for words in ("signed by nobody we trust", "does not answer; waiting for it"):
        late = node_at(tmp_path / "press-8", sleeper, plant)
        try:
            late.wait_line(words, where="err")
            assert not late.out
        finally:
            late.end()
        sleeper.with_suffix(".tls.ca").write_text(paper.with_suffix(".tls.ca").read_text())


@pytest.mark.timeout(180)
def test_rights_that_need_evidence_by_commands(site, tmp_path):
    plant = tmp_path / "plant.py"
    plant.write_text(PLANT)
    joined, paper = enroll(site, tmp_path / "a", "pump-1")
    assert joined.returncode == 0, joined.stderr

    def row():
        shown = json.loads(foam(site, "attest", "show", "pump-1", "--json"))
        return shown["nodes"][0]

    node = node_at(tmp_path / "a", paper, plant)
    try:
        node.wait_line("FOAM NODE READY")
        wait_for(row, lambda shown: "evidence" in shown)
        assert row()["state"] == "not asked"
        made = foam(site, "attest", "reference", "pump-1")
        assert set(tomllib.loads(made)["references"]["pump-1"]) == {
            "code/broker",
            "code/capability_schemas",
            "code/foam",
            "code/node_agent",
            "function/tank_volume",
        }
        foam(site, "attest", "reference", "pump-1", "--add")
        assert "already" in foam(site, "attest", "reference", "pump-1", "--add", code=21)
        file = site.data / "attestation.toml"
        rule = '[[rules]]\nnodes = ["pump-*"]\nreferences = ["pump-1"]\n'
        # The agent's own code may be edited while this runs from a checkout.
        kept = [line for line in file.read_text().splitlines() if not line.startswith('"code/')]
        lines = [*kept, '"code/*" = "any"', rule, 'gates = {data = ["private"]}', ""]
        file.write_text("\n".join(lines))
        said = foam(site, "attest", "check")
        assert said == "rule 1: pump-* needs pump-1 for data private\n"
        wait_for(row, lambda shown: shown["state"] == "trusted")
        plant.write_text(PLANT.replace("* 20", "* 21"))
        wait_for(row, lambda shown: shown["state"] == "lapsed")
        assert row()["withheld"] == "data private"
        task = ("ask", "how much water is in the tank?", "--input", '{"level_cm": 2}')
        private = ("--policy", '{"data": "private"}')
        wait_for(lambda: ask(site), {"litres": 42.0})
        foam(site, *task, *private, code=12, timeout_s=60.0)
        plant.write_text(PLANT)
        wait_for(row, lambda shown: shown["state"] == "trusted")
        assert json.loads(foam(site, *task, *private, timeout_s=60.0)) == {"litres": 40.0}
        assert "trusted" in foam(site, "attest", "show")
    finally:
        node.end()
        (site.data / "attestation.toml").unlink(missing_ok=True)
