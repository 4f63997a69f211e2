"""Suppositions: what is seen of a record and its node, and that nothing real changes."""

from typing import Any

import pytest
from pydantic import ValidationError

from capability_schemas.capability import CatalogRecord, Cost
from capability_schemas.errors import NotFound
from capability_schemas.node import FunctionLoad, NodeLoad, NodeState
from router.catalogue import Fleet
from router.whatif import Supposition
from support.capabilities import bare_record


def record(node: str = "n1", function: str = "echo") -> CatalogRecord:
    return bare_record(node, function, cost=Cost(money=2.0, energy_j=5.0))


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    for node in ("n1", "n2"):
        fleet.hear_state(NodeState(node=node, state="birth", epoch=10, at=0), 0)
        fleet.admit(record(node))
    figures = {"echo": FunctionLoad(instances=2, total_ms=80.0)}
    fleet.hear_load(
        NodeLoad(node="n1", epoch=10, at=0, capacity=4, queue_limit=8, functions=figures), 0
    )
    return fleet


def test_a_node_that_is_gone_is_not_live_and_the_real_one_is(fleet: Fleet) -> None:
    supposed = Supposition(gone=("n1",)).check(fleet)
    _, view = supposed.see(record("n1"), fleet.node("n1"))
    assert (view.live, view.presence) == (False, "offline")
    assert fleet.node("n1").live
    assert supposed.see(record("n2"), fleet.node("n2"))[1] is fleet.node("n2")


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_a_loaded_node_is_as_busy_as_supposed_and_keeps_its_figures(
    fleet: Fleet, share: float
) -> None:
    fleet.node("n1").assigned = 3
    _, view = Supposition(load={"n1": share}).check(fleet).see(record("n1"), fleet.node("n1"))
    assert view.busy == pytest.approx(share)
    assert not view.full
    assert view.function("echo").total_ms == 80.0
    assert fleet.node("n1").busy == pytest.approx(0.75)


def test_a_node_that_told_nothing_can_be_loaded_too(fleet: Fleet) -> None:
    _, view = Supposition(load={"n2": 0.5}).check(fleet).see(record("n2"), fleet.node("n2"))
    assert view.busy == pytest.approx(0.5)
    assert fleet.node("n2").load is None


def test_a_price_holds_for_a_node_and_one_of_its_functions_before_it(fleet: Fleet) -> None:
    fleet.admit(record("n1", "weld"))
    supposed = Supposition(cost={"n1": 9.0, "n1/weld": 0.5}).check(fleet)
    assert supposed.see(record("n1"), fleet.node("n1"))[0].cost == Cost(money=9.0, energy_j=5.0)
    assert supposed.see(record("n1", "weld"), fleet.node("n1"))[0].cost.money == 0.5
    assert fleet.records["n1", "echo"].cost.money == 2.0


@pytest.mark.parametrize(
    "fields",
    [
        {"gone": ["n9"]},
        {"load": {"n9": 0.5}},
        {"cost": {"n9": 1}},
        {"cost": {"n1/weld": 1}},
    ],
)
def test_what_is_not_known_is_named(fleet: Fleet, fields: dict[str, Any]) -> None:
    with pytest.raises(NotFound, match="is not known here"):
        Supposition.model_validate(fields).check(fleet)


@pytest.mark.parametrize(
    "fields",
    [
        {"load": {"n1": 1.5}},
        {"load": {"n1": -0.1}},
        {"cost": {"n1": -1}},
        {"cost": {"n1": float("inf")}},
        {"gone": "n1"},
        {"gone": ["not an id"]},
        {"away": ["n1"]},
    ],
)
def test_what_cannot_be_supposed_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Supposition.model_validate(fields)
