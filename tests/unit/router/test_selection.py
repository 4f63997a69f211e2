import math
from typing import Any

import pytest

from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import (
    DeadlineExceeded,
    FoamError,
    InvalidTask,
    NoCapableNode,
    Overloaded,
    PolicyDenied,
)
from capability_schemas.node import FunctionLoad, NodeLoad
from capability_schemas.task import FunctionRef, Task
from router.catalogue import NodeView
from router.selection import Offer, Request, Selection, select
from router.settings import Weights


def offer(
    node: str = "a", sim: float = 0.8, view: dict[str, Any] | None = None, **fields: Any
) -> Offer:
    values: dict[str, Any] = {
        "node": node,
        "function": "echo",
        "version": "1.2.0",
        "epoch": 1,
        "revision": 1,
        "description": "Repeat the text.",
        "registry": "registry-1",
        "admitted_at": 0,
        "claim_digest": "sha256:0",
    }
    state: dict[str, Any] = {"presence": "birth", "epoch": 1} | (view or {})
    return Offer(CatalogRecord(**(values | fields)), NodeView(node=node, **state), sim, sim, 0.0)


def load(functions: dict[str, FunctionLoad] | None = None, **fields: Any) -> dict[str, Any]:
    told = NodeLoad(node="a", epoch=1, at=0, functions=functions or {}, **fields)
    return {"load": told}


def chosen(*offers: Offer, **options: Any) -> Selection:
    task = {"text": "say it"} | options.pop("task", {})
    function = FunctionRef.parse(options["function"]) if "function" in options else None
    return select(
        Request(
            Task(**task),
            function,
            deadline=options.get("deadline", 60_000),
            prefer=options.get("prefer"),
        ),
        offers,
        threshold=0.0 if function else 0.5,
        weights=options.get("weights", Weights()),
        nearest=3,
        now=0,
    )


def problem(*offers: Offer, **options: Any) -> FoamError:
    selection = chosen(*offers, **options)
    assert selection.choices == ()
    assert selection.problem is not None
    return selection.problem


def nodes(selection: Selection) -> list[str]:
    return [choice.node for choice in selection.choices]


def test_the_most_similar_comes_first() -> None:
    assert nodes(chosen(offer("a", 0.7), offer("b", 0.8))) == ["b", "a"]


def test_the_value_follows_the_formula() -> None:
    weights = Weights(cold=0.3, cost=0.1, load=0.2)
    view = load({"echo": FunctionLoad(instances=0)}, running=1, capacity=2, queue_limit=1)
    one = offer("a", 0.8, view, cost={"money": 2.0})
    selection = chosen(one, offer("b", 0.6, cost={"money": 4.0}), weights=weights)
    terms = selection.explanation["candidates"][0]["terms"]
    assert terms["alpha"] == round(0.8 * math.exp(-0.3), 4)
    assert selection.choices[0].score == pytest.approx(
        0.8 * math.exp(-0.3) - 0.1 * 0.5 - 0.2 * 0.5, abs=1e-4
    )


def test_load_and_price_decide_between_equals_but_not_between_meanings() -> None:
    busy = {"assigned": 1}
    assert nodes(chosen(offer("a", 0.8, busy), offer("b", 0.8))) == ["b", "a"]
    assert nodes(chosen(offer("a", 0.8, cost={"money": 1.0}), offer("b", 0.8))) == ["b", "a"]
    assert nodes(chosen(offer("a", 0.9, busy), offer("b", 0.8)))[0] == "a"


def test_a_session_stays_with_its_node() -> None:
    assert nodes(chosen(offer("a"), offer("b"), prefer="b")) == ["b", "a"]


def test_below_the_threshold_the_nearest_are_named() -> None:
    error = problem(offer("a", 0.4), offer("b", 0.3))
    assert isinstance(error, NoCapableNode)
    assert [miss["node"] for miss in error.detail["nearest"]] == ["a", "b"]
    assert "threshold" in error.detail["nearest"][0]["reason"]


def test_an_empty_mesh_has_nobody() -> None:
    error = problem()
    assert isinstance(error, NoCapableNode)
    assert error.detail["nearest"] == []


@pytest.mark.parametrize(
    ("policy", "attested", "gate"),
    [
        ({"zones": ["hall-3"]}, {"zones": ["hall-4"]}, "zones"),
        ({"zones": ["hall-3"]}, {}, "zones"),
        ({"data": "private"}, {"data": ["public"]}, "data"),
        ({"grants": ["pii"]}, {"grants": []}, "grants"),
        ({"local_only": True}, {"external": True}, "local"),
    ],
)
def test_policy_gates_are_never_waived(
    policy: dict[str, Any], attested: dict[str, Any], gate: str
) -> None:
    denied = offer("a", 0.9, policy=attested)
    assert isinstance(problem(denied, task={"policy": policy}), PolicyDenied)
    explained = chosen(denied, task={"policy": policy}).explanation["candidates"][0]
    assert explained["gates"][gate] != "pass"
    assert explained["terms"]["alpha"] == 0


def test_a_price_above_the_limit_is_a_policy_matter() -> None:
    dear = offer("a", cost={"money": 3.0})
    assert isinstance(problem(dear, task={"policy": {"max_cost": 1}}), PolicyDenied)
    cheap = offer("b", 0.7, cost={"money": 0.5})
    assert nodes(chosen(dear, cheap, task={"policy": {"max_cost": 1}})) == ["b"]


def test_all_skills_are_needed() -> None:
    able, other = offer("a", skills=["ocr", "german"]), offer("b", 0.9, skills=["ocr"])
    assert nodes(chosen(able, other, task={"skills": ["ocr", "german"]})) == ["a"]
    assert isinstance(problem(other, task={"skills": ["german"]}), NoCapableNode)


def test_a_version_range_is_a_gate() -> None:
    assert nodes(chosen(offer("a"), offer("b", version="2.0.0"), function="echo@>=2")) == ["b"]
    assert isinstance(problem(offer("a"), function="echo@>=3"), NoCapableNode)


SCHEMA = {"type": "object", "properties": {"rpm": {"type": "number"}}, "required": ["rpm"]}


def test_a_named_function_says_what_is_wrong_with_the_input() -> None:
    error = problem(offer(input_schema=SCHEMA), function="echo", task={"input": {"rpm": "fast"}})
    assert isinstance(error, InvalidTask)
    assert error.detail["field"] == "input.rpm"


def test_by_meaning_a_schema_that_does_not_fit_passes_the_task_on() -> None:
    assert nodes(chosen(offer("a", 0.9, input_schema=SCHEMA), offer("b", 0.7))) == ["b"]


def test_input_too_long_for_the_function() -> None:
    small = offer(resources={"max_input_bytes": 10})
    assert isinstance(problem(small, function="echo", task={"text": "x" * 99}), InvalidTask)


@pytest.mark.parametrize(
    "view",
    [
        {"presence": "offline"},
        {"presence": None},
        {"silent": True},
        {"presence": "draining"},
        {"presence": "sleeping"},
        {"cordoned": True},
    ],
)
def test_a_node_that_is_away_or_closed_gets_nothing(view: dict[str, Any]) -> None:
    error = problem(offer("a", 0.9, view))
    assert isinstance(error, NoCapableNode)
    assert error.retryable


def test_an_expired_lease_is_no_offer() -> None:
    assert isinstance(problem(offer(expires_at=0)), NoCapableNode)


def test_full_nodes_are_overloaded_with_a_time() -> None:
    slow = FunctionLoad(queued=2, concurrency=1, total_ms=800, instances=1)
    view = load({"echo": slow}, running=1, capacity=1, queued=2, queue_limit=2)
    error = problem(offer("a", 0.9, view))
    assert isinstance(error, Overloaded)
    assert error.retry_after_ms == 1600


def test_a_poor_substitute_does_not_stand_in_for_a_busy_node() -> None:
    full = load(running=1, capacity=1)
    other = offer("b", 0.6)
    assert isinstance(problem(offer("a", 0.9, full), other), Overloaded)
    assert nodes(chosen(offer("a", 0.7, full), other)) == ["b"]


def test_memory_counts_for_a_function_that_is_not_running() -> None:
    need = {"resources": {"memory_bytes": 100}}
    cold, warm = FunctionLoad(instances=0), FunctionLoad(instances=1)
    tight = {"memory_free_bytes": 50}
    assert isinstance(problem(offer("a", 0.9, load({"echo": cold}, **tight), **need)), Overloaded)
    assert nodes(chosen(offer("a", 0.9, load({"echo": warm}, **tight), **need))) == ["a"]


def test_what_cannot_be_in_time_is_not_begun() -> None:
    slow = offer("a", 0.9, resources={"first_ms": 500})
    assert isinstance(problem(slow, deadline=400), DeadlineExceeded)
    queue = FunctionLoad(queued=3, total_ms=200, instances=1)
    assert isinstance(problem(offer("a", 0.9, load({"echo": queue})), deadline=400), Overloaded)


def test_crashing_functions_rank_last() -> None:
    crashing = load({"echo": FunctionLoad(instances=1, degraded=True)})
    assert nodes(chosen(offer("a", 0.9, crashing), offer("b", 0.8))) == ["b", "a"]


def test_every_candidate_is_explained_with_every_gate_and_term() -> None:
    explanation = chosen(offer("a", 0.9), offer("b", 0.1)).explanation
    assert explanation["chosen"] == ["a", "echo"]
    assert explanation["threshold"] == 0.5
    for candidate in explanation["candidates"]:
        assert len(candidate["gates"]) == 14
        assert {"gates", "sim", "fit", "spec", "alpha", "cost", "load"} <= candidate["terms"].keys()
    assert explanation["candidates"][0]["verdict"] == "candidate"
