"""Operators, quotas and the audit trail, as people use them; and where secrets never stand."""

import asyncio
import json
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mqtt_probe import Probe, Refused
from support.foam_process import FoamProcess, FoamUp, foam_up, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.encoder,
    pytest.mark.timeout(240),  # dozens of commands, each a process of its own
]


class Site:
    """A running mesh, and commands in the name of its people."""

    def __init__(self, up: FoamUp) -> None:
        self.up = up
        self.said: list[bytes] = []
        self.secrets: set[str] = set()

    def run(self, *arguments: str, by: str | None = None, stdin: bytes | None = None) -> Any:
        person = ["--identity", str(self.paper(by))] if by is not None else []
        done = run_foam(*arguments, "--data", str(self.up.data), *person, stdin=stdin)
        self.said += [done.stderr]
        return done

    def do(self, *arguments: str, by: str | None = None) -> str:
        done = self.run(*arguments, by=by)
        assert done.returncode == 0, (arguments, done.stderr)
        return str(done.stdout.decode())

    def paper(self, name: str) -> Path:
        return self.up.data / "identities" / f"{name}.json"

    def add(self, name: str, role: str) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(self.do("device", "add", name, "--role", role))
        self.secrets.add(made["password"])
        return made

    def trail(self, *asked: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = json.loads(
            self.do("audit", "show", "--json", "--limit", "200", *asked)
        )["entries"]
        return entries

    def wait_trail(self, *asked: str) -> list[dict[str, Any]]:
        until = time.monotonic() + 40
        while not (found := self.trail(*asked)):
            assert time.monotonic() < until, self.trail()
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data = tmp_path_factory.mktemp("people") / "data"
    with foam_up(data, "--broker", "embedded", "--nodes", "none", "--tls", "--tls-port", "0") as up:
        site = Site(up)
        site.secrets |= {up.facts[one]["password"] for one in ("admin", "device")}
        site.add("olga", "operator")
        site.add("pump-7", "device")
        yield site


def test_an_operator_runs_the_mesh_and_does_not_decide_what_it_is(site: Site) -> None:
    site.do("nodes", by="olga")
    site.do("quotas", by="olga")
    site.do("weights", by="olga")
    site.secrets.add(site.do("token", "create", "--role", "device", by="olga").strip())
    for order, needed in (
        (
            ("weights", "cost=0.2"),
            b"weights needs an administrator, olga is known here as operator",
        ),
        (("token", "create", "--role", "admin"), b"may not make a token for role admin"),
        (("token", "create", "--role", "operator"), b"may not make a token for role operator"),
        (("admin", "revoke", "admin-1"), b"may not throw out members of role admin"),
        (("admin", "revoke", "router-1"), b"may not throw out members of role router"),
    ):
        refused = site.run(*order, by="olga")
        assert refused.returncode != 0, order
        assert needed in refused.stderr, (order, refused.stderr)
    assert json.loads(site.do("weights", "--json"))["changed"] == []


def test_an_observer_orders_nothing(site: Site) -> None:
    site.add("otto", "observer")
    refused = site.run("nodes", by="otto")
    assert refused.returncode != 0


def test_who_tokens_make_operators_are_operators(site: Site, tmp_path: Path) -> None:
    token = site.do("token", "create", "--role", "operator").strip()
    site.secrets.add(token)
    joined = run_foam(
        *("enroll", "--broker", site.up.facts["public"][0], "--token", "-"),
        *("--data", str(tmp_path), "--id", "oskar", "--role", "operator"),
        stdin=token.encode(),
    )
    assert joined.returncode == 0, joined.stderr
    paper = joined.stdout.decode().strip()
    asked = ("--identity", paper, "--data", str(tmp_path))
    shown = run_foam("weights", *asked)
    assert shown.returncode == 0, shown.stderr
    refused = run_foam("weights", "cost=0.2", *asked)
    assert b"needs an administrator" in refused.stderr, refused.stderr


def test_orders_and_refusals_of_router_and_broker_stand_in_the_trail(site: Site) -> None:
    site.do("weights", "cost=0.05")
    site.do("weights", "--reset")
    orders = site.wait_trail("--action", "order", "--actor", "admin-1")
    assert any(one["subject"] == "weights" for one in orders)
    assert all(one["detail"]["told"]["by"] == "router-1" for one in orders)
    site.run("weights", "cost=0.2", by="olga")
    refused = site.wait_trail("--action", "order_ref*", "--actor", "olga")
    assert refused[0]["detail"]["count"] >= 1

    async def misbehave() -> None:
        password = json.loads(site.paper("pump-7").read_text())["password"]
        probe = await Probe.open(site.up.port, "p", username="pump-7", password=password)
        for _ in range(50):
            await probe.publish("foam/v1/local/task/pump-8", b"in another's name")
        await probe.subscribe("foam/v1/local/reply/#")
        await probe.ping()
        await probe.abort()
        with pytest.raises(Refused):
            await Probe.open(site.up.port, "p", username="pump-7", password="wrong")

    asyncio.run(misbehave())
    published = site.wait_trail("--action", "publish_refused")
    assert sum(one["detail"]["count"] for one in published) == 50
    assert (published[0]["actor"], published[0]["subject"]) == ("pump-7", "task")
    assert site.wait_trail("--action", "subscribe_refused")[0]["subject"] == "reply"
    assert site.wait_trail("--action", "connect_refused", "--actor", "pump-7")
    assert site.trail("--since", "1h")
    assert "whole" in site.do("audit", "verify")


def test_quotas_are_followed_and_shown(site: Site) -> None:
    (site.up.data / "quotas.toml").write_text("[client.pump-7]\ntasks_per_s = 3\n")
    site.wait_trail("--action", "quotas_changed")
    shown = json.loads(site.do("quotas", "pump-7", "--json", by="olga"))
    assert shown["clients"][0]["limits"]["tasks_per_s"] == 3
    assert "pump-7" in site.do("quotas", "pump-7")


class Watcher:
    """Reads the command lines of all processes, over and over."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            for process in psutil.process_iter():
                try:
                    self.seen.update(process.cmdline())
                    self.seen.update(process.environ().values() if _ours(process) else ())
                except psutil.Error:
                    continue

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)


def _ours(process: psutil.Process) -> bool:
    return any("foam" in part for part in process.cmdline()[:4])


def _keys(data: Path) -> set[str]:
    """Every secret that stands in a file of the mesh."""
    found = set()
    for path in (data / "identities").iterdir():
        if path.suffix == ".json":
            found.add(json.loads(path.read_text()).get("password") or "")
        elif path.suffix == ".key":
            found |= {line for line in path.read_text().split() if len(line) > 40}
    book = json.loads((data / "enrollment.json").read_text())
    found |= {token["proof_key"] for token in book["tokens"].values()}
    return found - {""}


def test_secrets_stand_nowhere_but_in_files_of_their_owner(site: Site) -> None:
    data = site.up.data
    watcher = Watcher()
    with watcher:
        site.add("pump-9", "device")
        token = site.do("token", "create", "--role", "node", "--name", "edge-3").strip()
        site.secrets.add(token)
        for order in (
            ("token", "list"),
            ("device", "list"),
            ("nodes",),
            ("functions",),
            ("admin", "stats"),
            ("admin", "enrollments"),
            ("audit", "show"),
            ("quotas",),
            ("rules", "show"),
            ("ask", "--function", "nothing", "at all", "--timeout", "2"),
            ("admin", "revoke", "pump-9"),
        ):
            site.run(*order)
    secrets = site.secrets | _keys(data)
    assert len(secrets) >= 8
    seen = "\n".join(watcher.seen)
    assert "token" in watcher.seen  # it has seen the commands
    said = b"\n".join(site.said).decode(errors="replace")
    trail = json.dumps(site.trail())
    for secret in secrets:
        assert secret not in seen
        assert secret not in said
        assert secret not in trail
    for path in data.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        content = path.read_bytes()
        held = [secret for secret in secrets if secret.encode() in content]
        if held:
            assert mode & 0o077 == 0, path
            assert path.suffix != ".log", path
            assert path.parent.name != "logs", path
    assert stat.S_IMODE(data.stat().st_mode) == 0o700


PLANT = '''
from foam import function

@function(examples=("how much water is in the tank?",))
def NAME(level_cm: float) -> dict[str, float]:
    """Compute how much water a tank holds from its level."""
    return {"litres": level_cm * 20}
'''


def test_two_tenants_do_not_meet(site: Site, tmp_path: Path) -> None:
    """Each with a node and a device of its own, joined by token; neither sees the other's."""
    running = []
    try:
        for tenant in ("acme", "bolt"):
            folder = tmp_path / tenant
            folder.mkdir()
            (folder / "plant.py").write_text(PLANT.replace("NAME", f"tank_{tenant}"))
            papers = {}
            for role, options in (("node", ()), ("device", ("--password",))):
                token = site.do("token", "create", "--role", role, "--tenant", tenant).strip()
                site.secrets.add(token)
                joined = run_foam(
                    *("enroll", "--broker", site.up.facts["public"][0], "--token", "-"),
                    *("--data", str(folder), "--id", f"{tenant}-{role}", "--role", role, *options),
                    stdin=token.encode(),
                )
                assert joined.returncode == 0, joined.stderr
                papers[role] = joined.stdout.decode().strip()
            node = FoamProcess(
                *("node", str(folder / "plant.py"), "--identity", papers["node"]),
                *("--url", site.up.facts["public"][0], "--data", str(folder)),
            )
            running.append(node)
            node.wait_line("FOAM NODE READY")
        until = time.monotonic() + 40
        while len(json.loads(site.do("functions", "--json"))["functions"]) < 2:
            assert time.monotonic() < until
        for tenant, other in (("acme", "bolt"), ("bolt", "acme")):
            who = ("--identity", str(tmp_path / tenant / "identities" / f"{tenant}-device.json"))
            level = ("--input", '{"level_cm": 2}', "--data", str(tmp_path / tenant))
            asked = run_foam("ask", "how much water is in the tank?", *level, *who, "--json")
            assert asked.returncode == 0, asked.stderr
            said = (asked.stdout + asked.stderr).decode()
            assert f"tank_{tenant}" in said
            assert other not in said
            refused = run_foam("ask", "--function", f"tank_{other}", *level, *who)
            assert refused.returncode != 0
            assert f"no node offers the function tank_{other}".encode() in refused.stderr
        stranger = site.run("ask", "how much water is in the tank?", "--input", '{"level_cm": 2}')
        assert stranger.returncode != 0
        assert b"tank_" not in stranger.stderr
        for role, tenant in (("admin", "acme"), ("operator", "acme"), ("device", "*")):
            done = site.run("token", "create", "--role", role, "--tenant", tenant)
            assert done.returncode != 0, role
    finally:
        for node in running:
            node.end()
