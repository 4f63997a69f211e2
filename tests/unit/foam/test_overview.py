"""What ``foam status`` makes of what it is told, and of what nobody tells."""

import asyncio
from typing import Any

import pytest

from capability_schemas.errors import AccessDenied, Unavailable
from capability_schemas.node import LOST, RegistryState, RouterState
from foam import overview
from foam.cli import status
from foam.overview import look_at, node_condition
from foam.sdk.address import MeshAddress
from foam.sdk.administration import Answers

URL = "mqtt://127.0.0.1:1883"


def node(name: str, **more: Any) -> dict[str, Any]:
    row = {"node": name, "state": "birth", "live": True, "reason": "", "degraded": []}
    return {**row, "load": {"running": 1, "queued": 0}, **more}


def router(name: str, *, live: bool = True, state: Any = "birth") -> tuple[RouterState, bool]:
    return RouterState(router=name, state=state, epoch=1, at=1), live


def registry(name: str, *, leads: bool = False, **more: Any) -> RegistryState:
    word: dict[str, Any] = {"state": "birth", "epoch": 1, "at": 1, **more}
    return RegistryState(registry=name, leads=leads, **word)


def counted(live: int, waiting: int, **more: Any) -> dict[str, Any]:
    return {"live": live, "waiting": waiting, "ledger": {"pending": 0, "failing": False}, **more}


class Mesh:
    """A mesh in which everybody answers, until a test says otherwise."""

    def __init__(self) -> None:
        self.address = MeshAddress(
            url=URL, site="plant", client="olga", username=None, password=None
        )
        self.broker = URL
        self.registries = self
        self.heard: Any = [router("router-1")]
        self.said: Any = [registry("registry-1", leads=True)]
        self.rows: Any = [node("edge-1")]
        self.counts: Any = Answers({"router-1": counted(3, 2)})

    async def routers(self) -> Any:
        return self._give(self.heard)

    async def states(self, *, wait_s: float) -> Any:
        assert wait_s > 0
        return self._give(self.said)

    async def admin_pages(self, verb: str, *, timeout_s: float) -> Any:
        assert (verb, timeout_s > 0) == ("nodes", True)
        if self.rows is None:
            await asyncio.Event().wait()
        return {"nodes": self._give(self.rows)}

    async def admin_all(self, verb: str, *, timeout_s: float) -> Any:
        assert (verb, timeout_s > 0) == ("stats", True)
        return self._give(self.counts)

    @staticmethod
    def _give(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value


@pytest.fixture
def mesh() -> Any:
    return Mesh()


async def test_a_mesh_in_which_all_is_well(mesh: Any) -> None:
    told = await look_at(mesh)
    assert told["site"] == "plant"
    assert told["brokers"] == [{"broker": URL, "state": "in use"}]
    assert told["routers"] == [
        {"router": "router-1", "state": "ready", "live": True, "tasks": 3, "waiting": 2}
    ]
    assert told["registries"] == [{"registry": "registry-1", "state": "leads", "leads": True}]
    assert [(one["node"], one["state"], one["running"]) for one in told["nodes"]] == [
        ("edge-1", "ready", 1)
    ]
    assert told["tasks"] == {"running": 1, "waiting": 2}
    assert (told["warnings"], told["unknown"]) == ([], [])


async def test_everything_that_is_wrong_is_said(mesh: Any) -> None:
    mesh.heard = [
        router("router-1"),
        router("router-2", live=False),
        router("router-3"),
        router("router-4", live=False, state="offline"),
    ]
    mesh.said = [
        registry("registry-1", reason="silent"),
        registry("registry-2"),
        registry("registry-3", state="offline", reason=LOST),
    ]
    lost = [node(f"n{i}", state="offline", live=False, reason=LOST) for i in range(7)]
    mesh.rows = [
        *lost,
        node("quiet", live=False),
        node("late", state="sleeping", live=False),
        node("dozy", state="sleeping", live=False, asleep=True, wake_at=5),
        node("gone", state="offline", live=False, reason="stopped"),
        node("ill", degraded=["rain"]),
    ]
    full = counted(1, 0, ledger={"pending": 0, "failing": True})
    mesh.counts = Answers({"router-1": full}, ("router-3",))
    told = await look_at(mesh)
    assert told["warnings"] == [
        "router-2 is silent",
        "router-3 does not answer",
        "router-4 is offline",
        "no registry leads: nobody can join, and new functions wait",
        "registry-1 is silent",
        "registry-3 is offline",
        "lost: n0, n1, n2, n3, n4 and 2 more",
        "silent: quiet",
        "overdue: should be awake: late",
        "crashes in a row: ill/rain",
        "router-1 cannot write its journal: is the disk full?",
    ]


async def test_brokers_of_a_cluster_are_tried(mesh: Any) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    there = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    mesh.address = MeshAddress(
        url=f"{URL},{there},mqtt://127.0.0.1:1",
        site="plant",
        client="olga",
        username=None,
        password=None,
    )
    async with server:
        told = await look_at(mesh)
    states = [one["state"] for one in told["brokers"]]
    assert states == ["in use", "answers", "does not answer"]
    assert told["warnings"] == ["the broker mqtt://127.0.0.1:1 does not answer"]


async def test_what_nobody_tells_is_said_and_keeps_nothing_else_back(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "_ANSWER_S", 0.05)
    monkeypatch.setattr(overview, "_SPARE_S", 0.05)
    mesh.rows = None  # no answer ever
    mesh.counts = Unavailable("no router answered stats", retryable=False)
    told = await asyncio.wait_for(look_at(mesh), 30)
    assert told["unknown"] == ["nodes: nobody answered in 0.1 s", "tasks: no router answered stats"]
    assert told["tasks"] is None
    assert told["warnings"] == ["router-1 does not answer"]
    assert told["registries"][0]["leads"]


async def test_what_may_not_be_asked_is_not_found_out(mesh: Any) -> None:
    mesh.said = AccessDenied("the broker refuses it")
    told = await look_at(mesh)
    assert told["unknown"] == ["registries: the broker refuses it"]


@pytest.mark.parametrize(
    ("row", "condition"),
    [
        ({}, "ready"),
        ({"cordoned": True}, "cordoned"),
        ({"state": "draining"}, "draining"),
        ({"revoked": True, "cordoned": True}, "revoked"),
        ({"state": "sleeping", "live": False, "asleep": True}, "asleep"),
        ({"state": "sleeping", "live": False}, "did not wake"),
        ({"live": False}, "silent"),
        ({"live": False, "state": "offline", "reason": LOST}, "lost"),
        ({"live": False, "state": "offline", "reason": "stopped"}, "offline"),
    ],
)
def test_how_a_node_is(row: dict[str, Any], condition: str) -> None:
    assert node_condition(node("n", **row)) == condition


async def test_a_person_is_shown_what_matters(
    mesh: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.rows = [node("a"), node("b"), node("c", state="offline", live=False, reason=LOST)]
    mesh.said = Unavailable("it is not known", retryable=False)
    status.draw(await look_at(mesh))
    shown = capsys.readouterr().out
    for line in ("2 ready, 1 lost", "1 running, 2 waiting", f"{URL} in use", "router-1 ready"):
        assert line in shown
    assert shown.splitlines()[-2:] == ["! lost: c", "? registries: it is not known"]
    mesh.rows, mesh.said = [], [registry("registry-1", leads=True)]
    status.draw(await look_at(mesh))
    assert capsys.readouterr().out.endswith("all is well\n")
