"""Joining a running mesh with nothing but a token, by commands and by the script for fleets."""

import asyncio
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from capability_schemas.reply import Accepted
from foam.sdk import MeshClient
from support.foam_process import ROOT, FoamProcess, FoamUp, foam_environment, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.encoder,
    pytest.mark.timeout(180),  # many commands, each a process of its own; and the mesh of all
]

PLANT = '''
from foam import function

@function(examples=("how much water is in the tank?", "what does the tank hold?"))
def tank_volume(level_cm: float) -> dict[str, float]:
    """Compute how much water a tank holds from its level."""
    return {"litres": level_cm * 20}
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A mesh without nodes that listens with TLS."""
    folder = tmp_path_factory.mktemp("site")
    mesh = FoamUp(
        folder / "data",
        *("--nodes", "none", "--broker", "embedded", "--tls", "--tls-port", "0"),
        *("--tls-name", "broker.test", "--ws-port", "0"),
    )
    try:
        yield mesh.wait_ready()
    finally:
        mesh.end()


def foam(site, *arguments, **options):
    done = run_foam(*arguments, "--data", str(site.data), **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def make_token(site, *options):
    return foam(site, "token", "create", *options).strip()


def enroll(site, folder, token, *options):
    return run_foam(
        *("enroll", "--broker", site.facts["public"][0], "--token", "-", "--data", str(folder)),
        *options,
        stdin=token.encode(),
    )


def test_a_node_joins_serves_and_is_thrown_out(site, tmp_path):
    (tmp_path / "plant.py").write_text(PLANT)
    token = make_token(site, "--zone", "hall-3")
    joined = enroll(site, tmp_path / "new", token, "--id", "press-7")
    assert joined.returncode == 0, joined.stderr
    paper = Path(joined.stdout.decode().strip())
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in paper.parent.iterdir())
    again = enroll(site, tmp_path / "new", "not even looked at", "--id", "press-7")
    assert again.returncode == 0
    assert b"has joined already" in again.stderr
    assert Path(again.stdout.decode().strip()) == paper
    node = FoamProcess(
        *("node", str(tmp_path / "plant.py"), "--identity", str(paper)),
        *("--url", site.facts["public"][0], "--data", str(tmp_path / "new")),
    )
    try:
        node.wait_line("FOAM NODE READY")
        asked = foam(
            site,
            "ask",
            "how much water is in the tank?",
            "--input",
            '{"level_cm": 2}',
            timeout_s=60.0,
        )
        assert json.loads(asked) == {"litres": 40.0}
        foam(site, "admin", "revoke", "press-7")
        assert node.process.wait(20) != 0
        said = node.wait_line("foam node: ", where="err")  # by the registry's word or the broker's
        assert "press-7 was revoked" in said or "refuses the connection of press-7" in said
    finally:
        node.end()
    shown = json.loads(foam(site, "audit", "show", "--json"))["entries"]
    # What the broker refused a member that was thrown out stands there as well.
    actions = [entry["action"] for entry in reversed(shown) if "enrollment" in entry["action"]]
    assert actions[-3:] == [
        "enrollment_token_created",
        "enrollment_granted",
        "enrollment_revoked",
    ]
    assert "whole" in foam(site, "audit", "verify")


@pytest.mark.timeout(240)
def test_a_router_joins_and_nodes_obey_it(site, tmp_path):
    (tmp_path / "plant.py").write_text(PLANT)
    url, members = site.facts["public"][0], []
    router = ("--id", "router-7", "--role", "router")
    for token, options in (
        (make_token(site), ("--id", "press-4")),
        (make_token(site, "--role", "router"), router),
    ):
        joined = enroll(site, tmp_path / "new", token, *options)
        assert joined.returncode == 0, joined.stderr
        members.append(joined.stdout.decode().strip())
    shared = ("--url", url, "--data", str(tmp_path / "new"))
    node = FoamProcess("node", str(tmp_path / "plant.py"), "--identity", members[0], *shared)
    second = FoamProcess("router", "--identity", members[1], *shared)
    try:
        node.wait_line("FOAM NODE READY")
        second.wait_line("FOAM ROUTER READY")
        routers, results = asyncio.run(_ask_all(site, [f"job-{number}" for number in range(12)]))
    finally:
        second.end()
        node.end()
    assert results == [{"litres": 40.0}] * 12
    assert routers == {"router-1", "router-7"}
    foam(site, "admin", "revoke", "router-7")
    foam(site, "admin", "revoke", "press-4")


async def _ask_all(site, tasks):
    """Return which routers took the tasks, and what came of them."""
    person, routers, results = site.facts["device"], set(), []
    secret = {"username": person["username"], "password": person["password"]}
    async with MeshClient(site.facts["broker"], **secret) as mesh:
        for task in tasks:
            handle = await mesh.submit(
                function="tank_volume", input={"level_cm": 2}, task_id=task, timeout_s=60
            )
            async for event in handle:
                if isinstance(event, Accepted):
                    routers.add(event.router)
            results.append((await handle.result()).output)
    return routers, results


def test_plain_clients_are_told_whom_to_trust(site):
    trusted = Path(site.facts["ca"]).read_text()
    assert foam(site, "authority", "show", "--pem") == trusted
    context = ssl.create_default_context(cadata=trusted)
    address = urlsplit(site.facts["public"][0])
    with (
        socket.create_connection(("127.0.0.1", address.port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname=address.hostname) as secure,
    ):
        assert secure.version()


def test_papers_that_count_no_more_are_replaced_with_a_token(site, tmp_path):
    where = ("--broker", site.facts["public"][0], "--data", str(tmp_path / "new"))
    here = ("enroll", *where, "--id", "press-6")
    first = enroll(site, tmp_path / "new", make_token(site), "--id", "press-6")
    assert first.returncode == 0, first.stderr
    paper = Path(first.stdout.decode().strip())
    before = paper.read_text()
    assert run_foam(*here).stdout == first.stdout
    foam(site, "admin", "revoke", "press-6")
    refused = run_foam(*here)
    assert (refused.returncode, b"refuses the papers of press-6" in refused.stderr) == (13, True)
    assert paper.read_text() == before
    anew = enroll(site, tmp_path / "new", make_token(site), "--id", "press-6")
    assert anew.returncode == 0, anew.stderr
    assert paper.read_text() != before
    assert b"has joined already" in run_foam(*here).stderr


def test_what_runs_here_goes_by_force_and_comes_back(site):
    refused = run_foam("admin", "revoke", "router-1", "--data", str(site.data))
    assert (refused.returncode, b"--force" in refused.stderr) == (10, True)
    foam(site, "device", "add", "press-4", "--role", "node")
    foam(site, "admin", "revoke", "press-4", "--force")
    files = site.data / "identities"
    assert not list(files.glob("press-4*"))
    assert json.loads(foam(site, "device", "add", "press-4", "--role", "node"))["id"] == "press-4"


def test_a_node_joins_and_serves_over_websocket(site, tmp_path):
    (tmp_path / "plant.py").write_text(PLANT)
    url = site.facts["websocket"][0]
    assert url.startswith("wss://")
    joined = run_foam(
        *("enroll", "--broker", url, "--token", "-", "--data", str(tmp_path / "new")),
        *("--id", "press-5"),
        stdin=make_token(site).encode(),
    )
    assert joined.returncode == 0, joined.stderr
    paper = joined.stdout.decode().strip()
    node = FoamProcess(
        *("node", str(tmp_path / "plant.py"), "--identity", paper, "--url", url),
        *("--data", str(tmp_path / "new")),
    )
    try:
        node.wait_line("FOAM NODE READY")
        question = ("how much water is in the tank?", "--input", '{"level_cm": 3}')
        asked = foam(site, "ask", *question, "--url", url, timeout_s=60.0)
        assert json.loads(asked) == {"litres": 60.0}
    finally:
        node.end()


def test_what_is_wrong_with_a_token_is_said(site, tmp_path):
    token = make_token(site, "--role", "router")
    wrong_role = enroll(site, tmp_path / "a", token, "--id", "press-8")
    assert (wrong_role.returncode, b"for a router, not a node" in wrong_role.stderr) == (13, True)
    foam(site, "token", "revoke", token.split(".")[1])
    gone = enroll(site, tmp_path / "b", token, "--id", "press-8", "--timeout", "20")
    assert gone.returncode == 13
    assert b"ask for a new one" in gone.stderr
    cut = enroll(site, tmp_path / "c", token[:40], "--id", "press-8")
    assert cut.returncode == 20
    assert token[20:40].encode() not in cut.stderr
    assert "no join token" not in foam(site, "token", "list")


def test_the_script_for_fleets_may_run_twice(site, tmp_path):
    token = make_token(site)
    binary = tmp_path / "bin"
    binary.mkdir()
    (binary / "foam").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m foam "$@"\n')
    (binary / "foam").chmod(0o755)
    environment = foam_environment(
        FOAM_TOKEN=token, PATH=f"{binary}{os.pathsep}{os.environ['PATH']}"
    )
    command = [
        *("sh", str(ROOT / "deploy" / "enroll-node.sh"), "--no-service"),
        *("--broker", site.facts["public"][0], "--id", "press-9"),
        *("--data", str(tmp_path / "fleet")),
    ]
    for said in ("has joined mqtts://", "has joined already"):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
        environment.pop("FOAM_TOKEN", None)
    assert (tmp_path / "fleet" / "identities" / "press-9.json").exists()
    without = subprocess.run(
        [*command[:-1], str(tmp_path / "other")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert without.returncode == 1
    assert "no join token" in without.stderr


@pytest.mark.external_broker
@pytest.mark.parametrize("access", ["dynamic", "static"])
def test_on_mosquitto_a_member_comes_with_a_certificate(access, tmp_path):
    from conftest import require_broker  # noqa: PLC0415  # a helper beside the fixtures

    require_broker("mosquitto" if access == "dynamic" else "mosquitto_static")
    mesh = FoamUp(
        tmp_path / "data",
        *("--nodes", "none", "--broker", "mosquitto", "--access", access),
        *("--tls", "--tls-port", "0"),
    )
    (tmp_path / "plant.py").write_text(PLANT)
    try:
        site = mesh.wait_ready()
        assert site.facts["members"] != site.facts["public"]
        token = make_token(site)  # and at once, before the broker has heard of it:
        joined = enroll(site, tmp_path / "new", token, "--id", "press-7")
        assert joined.returncode == 0, joined.stderr
        paper = Path(joined.stdout.decode().strip())
        member = json.loads(paper.read_text())
        assert member["broker"] == site.facts["members"][0]
        assert "password" not in member
        node = FoamProcess(
            *("node", str(tmp_path / "plant.py"), "--identity", str(paper)),
            *("--data", str(tmp_path / "new")),
        )
        try:
            node.wait_line("FOAM NODE READY")
            foam(site, "admin", "revoke", "press-7")
            if access == "dynamic":  # else it stays, deaf and dumb, until it connects again
                # by its trust state or by the broker's word, whichever comes first
                node.wait_line("was revoked", where="err")
                assert node.process.wait(60) == 13
        finally:
            node.end()
        again = FoamProcess(
            *("node", str(tmp_path / "plant.py"), "--identity", str(paper)),
            *("--data", str(tmp_path / "new")),
        )
        try:
            again.wait_line("our certificate was revoked", where="err")
        finally:
            again.end()
    finally:
        mesh.end()
