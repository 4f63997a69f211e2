"""What a router does between tasks."""

from types import SimpleNamespace
from typing import Any

from capability_schemas.node import NodeState
from router.catalogue import Fleet
from router.upkeep import Upkeep


def upkeep_of(**parts: Any) -> Upkeep:
    """An upkeep of which only some parts are there."""
    needed = ("session", "fleet", "meaning", "steering", "dispatcher", "reception", "replies")
    peers = SimpleNamespace(wake_all=lambda _: None, look_for_silent=lambda _: None)
    others = {"peers": peers, **dict.fromkeys((*needed, "ledger", "events", "settings", "clock"))}
    return Upkeep(**others | parts)  # type: ignore[arg-type]  # parts that are not used


def test_a_clock_that_is_set_makes_no_node_silent() -> None:
    fleet, gone = Fleet(), []
    fleet.hear_state(NodeState(node="a", state="birth", epoch=1, at=1, load_interval_s=1), 10_000)
    upkeep = upkeep_of(
        session=SimpleNamespace(connected=True),
        fleet=fleet,
        dispatcher=SimpleNamespace(node_gone=lambda node, _: gone.append(node)),
    )
    upkeep.look_for_silent(10_000, 10.0)
    upkeep.look_for_silent(3_610_500, 10.5)  # an hour forward
    assert gone == []
    upkeep.look_for_silent(11_000, 11.0)  # and back
    upkeep.look_for_silent(13_000, 13.0)
    assert gone == []
    upkeep.look_for_silent(15_000, 15.0)
    assert gone == ["a"]
