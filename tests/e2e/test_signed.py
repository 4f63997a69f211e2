"""A mesh that takes signed orders only, and what becomes of those that are not."""

import json
from pathlib import Path

import pytest

from broker.rpc import ReplyInbox, call_admin
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.errors import AccessDenied
from capability_schemas.topics import Topics
from support.foam_process import FoamUp, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.encoder,
    pytest.mark.timeout(180),
]

PLANT = '''
from foam import function

@function(examples=("how much water is in the tank?", "what does the tank hold?"))
def tank_volume(level_cm: float) -> dict[str, float]:
    """Compute how much water a tank holds from its level."""
    return {"litres": level_cm * 20}
'''
ASKED = ("ask", "--function", "tank_volume", "--input", '{"level_cm": 2}')


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strict")
    (folder / "plant.py").write_text(PLANT)
    mesh = FoamUp(
        folder / "data",
        *("--node", str(folder / "plant.py"), "--broker", "embedded"),
        *("--tls", "--tls-port", "0", "--tls-name", "broker.test"),
        *("--unsigned-admin", "refuse"),
    )
    try:
        yield mesh.wait_ready(60.0)
    finally:
        mesh.end()


def foam(site, *arguments, **options):
    done = run_foam(*arguments, "--data", str(site.data), timeout_s=60.0, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_results_are_checked_by_whoever_asks(strict):
    events = [json.loads(line) for line in foam(strict, *ASKED, "--verify", "--json").splitlines()]
    result = events[-1]
    assert result["output"] == {"litres": 40}
    assert result["passport"]["identity"] == result["node"]
    plain = json.loads(foam(strict, *ASKED, "--json").splitlines()[-1])
    assert plain["signature"]
    assert "passport" not in plain


def test_the_commands_sign_what_they_ask(strict):
    assert "plant" in foam(strict, "nodes")
    foam(strict, "token", "list")


async def test_an_unsigned_order_is_refused_in_words(strict):
    admin = strict.facts["admin"]
    settings = SessionSettings(
        urls=(strict.facts["broker"],),
        client_id="by-hand",
        username=admin["username"],
        password=admin["password"],
    )
    async with MqttSession(settings=settings) as session:
        await session.wait_connected(20)
        async with ReplyInbox(session=session, topics=Topics(), client=admin["id"]) as inbox:
            for target in ("router-1", "registry-1"):
                with pytest.raises(AccessDenied, match="takes signed requests only"):
                    await call_admin(inbox, target=target, verb="stats", timeout_s=30)


def test_an_administrator_who_enrolled_elsewhere(strict, tmp_path):
    token = foam(strict, "token", "create", "--role", "admin").strip()
    public = strict.facts["public"][0]
    joined = run_foam(
        *("enroll", "--broker", public, "--token", "-", "--role", "admin", "--id", "ann"),
        *("--data", str(tmp_path)),
        stdin=token.encode(),
        timeout_s=60.0,
    )
    assert joined.returncode == 0, joined.stderr
    paper = Path(joined.stdout.decode().strip())
    reach = ("--identity", str(paper), "--url", public, "--data", str(tmp_path))
    done = run_foam("nodes", *reach, timeout_s=60.0)
    assert done.returncode == 0, done.stderr
    assert "plant" in done.stdout.decode()
    asked = run_foam(*ASKED, "--verify", *reach, timeout_s=60.0)
    assert asked.returncode == 0, asked.stderr
    foam(strict, "admin", "revoke", "ann")
    refused = run_foam("nodes", *reach, timeout_s=60.0)
    assert refused.returncode != 0
