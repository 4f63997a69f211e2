"""Gates: who may run a task at all, and why the others may not."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import (
    DeadlineExceeded,
    InvalidTask,
    NoCapableNode,
    Overloaded,
    PolicyDenied,
)
from capability_schemas.functions import check_input
from capability_schemas.node import FunctionLoad
from capability_schemas.task import Task, TaskPolicy
from router import gates
from router.breaker import Breakers
from router.candidates import Request
from router.gates import MOST_TOKEN_BYTES, Gatekeeper
from router.pulse import Pulse
from support.offers import FixedEffect, busy, chosen, load, nodes, offer, problem


def gate(selection: Any, name: str) -> str:
    told: str = selection.explanation["candidates"][0]["gates"][name]
    return told


@pytest.mark.parametrize(
    ("policy", "attested", "name", "says"),
    [
        ({"zones": ["hall-3"]}, {"zones": ["hall-4"]}, "zones", "in hall-4, not in hall-3"),
        ({"zones": ["hall-3"]}, {}, "zones", "in none, not in hall-3"),
        ({"zones": []}, {"zones": ["hall-3"]}, "zones", "not in none"),
        ({"data": "private"}, {"data": ["public"]}, "data", "for private data, only for public"),
        ({"grants": ["pii", "x"]}, {"grants": ["x"]}, "grants", "lacks pii"),
        ({"local_only": True}, {"external": True}, "local", "outside the site"),
    ],
)
def test_policy_is_judged_by_what_is_attested_and_never_waived(
    policy: dict[str, Any], attested: dict[str, Any], name: str, says: str
) -> None:
    denied = offer("a", 0.9, policy=attested)
    assert isinstance(problem(denied, task={"policy": policy}), PolicyDenied)
    selection = chosen(denied, task={"policy": policy})
    assert says in gate(selection, name)
    assert selection.explanation["candidates"][0]["terms"]["alpha"] == 0
    assert isinstance(problem(denied, task={"policy": policy}, function="echo"), PolicyDenied)


def test_a_price_above_the_limit_is_a_policy_matter() -> None:
    dear = offer("a", cost={"money": 3.0})
    error = problem(dear, task={"policy": {"max_cost": 1}})
    assert isinstance(error, PolicyDenied)
    assert "costs 3, at most 1 allowed: 2 too dear" in error.message
    cheap = offer("b", 0.7, cost={"money": 0.5})
    assert nodes(chosen(dear, cheap, task={"policy": {"max_cost": 1}})) == ["b"]


def test_rules_exclude_in_their_own_words() -> None:
    effect = FixedEffect(refusals={"a": "rule night-shift forbids it"})
    assert nodes(chosen(offer("a", 0.9), offer("b"), effect=effect)) == ["b"]
    error = problem(offer("a", 0.9), effect=effect)
    assert isinstance(error, PolicyDenied)
    assert "routing rules exclude" in error.message
    assert "rule night-shift forbids it" in error.message


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
    assert nodes(chosen(offer("a", 0.9, input_schema=SCHEMA), offer("b", 0.8))) == ["b"]


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"properties": {"text": {"pattern": "(a+)+$"}}}])
def test_a_schema_made_to_be_slow_harms_its_own_offer_only(schema: dict[str, Any]) -> None:
    task = {"text": "a" * 50 + "b"}
    assert nodes(chosen(offer("a", 0.9, input_schema=schema), offer("b", 0.8), task=task)) == ["b"]


def test_equal_schemas_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def counting(value: Any, schema: Any, **bounds: Any) -> None:
        checked.append(schema)
        check_input(value, schema, **bounds)

    monkeypatch.setattr(gates, "check_input", counting)
    fleet = [offer(f"n{place}", input_schema=dict(SCHEMA)) for place in range(20)]
    assert len(chosen(*fleet, task={"input": {"rpm": 1}}).choices) == 20
    assert len(checked) == 1


def test_schemas_that_python_calls_equal_are_told_apart() -> None:
    number, truth = {"properties": {"x": {"const": 1}}}, {"properties": {"x": {"const": True}}}
    assert number == truth
    fleet = offer("a", input_schema=number), offer("b", input_schema=truth)
    assert nodes(chosen(*fleet, task={"input": {"x": True}})) == ["b"]


def test_input_too_long_for_the_function() -> None:
    small = offer(resources={"max_input_bytes": 10})
    error = problem(small, function="echo", task={"text": "x" * 99})
    assert isinstance(error, InvalidTask)
    assert "too many" in error.message


def test_only_what_is_too_long_for_certain_fails_for_its_context() -> None:
    narrow = offer("a", resources={"context_tokens": 1000})
    wide = offer("b", resources={"context_tokens": 100_000})
    certain = {"text": "x" * math.ceil(1000 * MOST_TOKEN_BYTES + 1)}
    assert nodes(chosen(narrow, wide, task=certain)) == ["b"]
    error = problem(narrow, task=certain, function="echo")
    assert isinstance(error, InvalidTask)
    assert "the context holds 1000" in error.message
    doubtful = {"text": "x" * 4500}
    assert nodes(chosen(narrow, task=doubtful)) == ["a"]
    assert nodes(chosen(narrow, wide, task=doubtful))[0] == "b"
    fitting = chosen(narrow, task={"text": "x" * 2500}).explanation["candidates"][0]
    assert fitting["terms"]["fit"] == 1


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


def sleeper(wake_at: int | None, seen_at: int = 0) -> dict[str, Any]:
    left = None if wake_at is None else wake_at - seen_at
    return {"presence": "sleeping", "sleep_ms": left, "pulse": Pulse(seen_at=seen_at)}


def test_a_sleeper_gets_nothing_while_somebody_is_awake() -> None:
    selection = chosen(offer("a", 0.9, sleeper(10_000)), offer("b", 0.9))
    assert nodes(selection) == ["b"]


def test_what_only_a_sleeper_can_do_may_wait_for_it() -> None:
    late, soon = offer("a", 0.9, sleeper(20_000)), offer("b", 0.9, sleeper(10_000))
    error = problem(late, soon, offer("c", 0.9, {"presence": "offline"}))
    assert isinstance(error, NoCapableNode)
    assert error.retryable
    assert error.message == "b could, but is asleep until 00:00:10 UTC, 10 s from now"
    assert (error.detail["node"], error.detail["wake_at"]) == ("b", 10_000)
    assert chosen(late, soon).explain()["problem"]["waits_for"] == "b"


def test_a_sleeper_that_wakes_too_late_is_named() -> None:
    error = problem(offer("a", 0.9, sleeper(3_600_000)))
    assert isinstance(error, DeadlineExceeded)
    assert "a could, but is asleep until 01:00:00 UTC" in error.message
    assert error.detail["wake_at"] == 3_600_000


def test_nobody_waits_for_a_sleeper_that_does_not_say_when_it_wakes() -> None:
    error = problem(offer("a", 0.9, sleeper(None)))
    assert isinstance(error, NoCapableNode)
    assert "does not say until when" in error.message
    assert "wake_at" not in error.detail


def lost(**fields: Any) -> dict[str, Any]:
    """A view of a node that was lost 1 s ago; now is 2,000."""
    return {"presence": "offline", "lost_at": 1_000, "grace_ms": 5_000} | fields


def test_a_node_that_was_just_lost_is_waited_for_while_nobody_else_can() -> None:
    alone = chosen(offer("a", 0.9, lost()), now=2_000)
    error = alone.problem
    assert isinstance(error, NoCapableNode)
    assert error.message == "a could, but was lost 1.0 s ago, and may be back within 4.0 s"
    assert (error.detail["node"], error.detail["wake_at"]) == ("a", 6_000)
    assert (alone.places, alone.start_by) == (frozenset({("a", "echo")}), 6_000)
    assert nodes(chosen(offer("a", 0.9, lost()), offer("b", 0.9), now=2_000)) == ["b"]


@pytest.mark.parametrize(
    "fields",
    [
        {"view": lost(cordoned=True)},
        {"view": lost(revoked=True)},
        {"view": lost(lost_at=None)},
        {"view": lost(grace_ms=1_000)},
        {"view": lost(), "expires_at": 1_999},
    ],
    ids=["cordoned", "revoked", "said that it goes", "too long ago", "lease over"],
)
def test_nobody_waits_for_a_lost_node_that_could_not_have_the_task(fields: dict[str, Any]) -> None:
    selection = chosen(offer("a", 0.9, **fields), now=2_000)
    assert isinstance(selection.problem, NoCapableNode)
    assert selection.problem.retryable
    assert "wake_at" not in selection.problem.detail
    assert not selection.places


def test_nobody_waits_for_a_lost_node_without_time_for_the_task() -> None:
    slow = lost(**busy(least_ms=3_000))
    error = problem(offer("a", 0.9, slow), now=2_000, deadline=4_000)
    assert isinstance(error, NoCapableNode)
    assert "wake_at" not in error.detail
    selection = chosen(offer("a", 0.9, slow), now=2_000, deadline=6_000)
    assert selection.start_by == 3_001, "later it could not be done in time"


def test_what_a_lost_node_had_is_no_reason_not_to_wait_for_it() -> None:
    breakers = Breakers()
    for _ in range(3):
        breakers.learn("a", "echo", False, 1_000)
    for view in (lost(), lost(presence="birth")):  # gone, and just back
        selection = chosen(offer("a", 0.9, view), now=1_500, breakers=breakers)
        assert selection.problem is not None
        assert selection.problem.detail["wake_at"] == 6_000
        assert selection.places
    later = problem(offer("a", 0.9, {"presence": "birth"}), now=1_500, breakers=breakers)
    assert "wake_at" not in later.detail


def test_whoever_is_back_first_is_waited_for_a_sleeper_or_a_lost_one() -> None:
    selection = chosen(offer("a", 0.9, lost()), offer("b", 0.9, sleeper(4_000)), now=2_000)
    assert selection.problem is not None
    assert selection.problem.detail["node"] == "b"
    assert selection.start_by is not None
    assert selection.start_by > 6_000, "the sleeper may be there when the lost one is given up"


def test_an_expired_lease_is_no_offer() -> None:
    assert isinstance(problem(offer(expires_at=0)), NoCapableNode)


def test_full_nodes_are_overloaded_with_a_time() -> None:
    slow = FunctionLoad(queued=2, concurrency=1, total_ms=800, instances=1)
    view = load({"echo": slow}, running=1, capacity=1, queued=2, queue_limit=2)
    error = problem(offer("a", 0.9, view))
    assert isinstance(error, Overloaded)
    assert error.retry_after_ms == 1600


def test_memory_counts_for_a_function_that_is_not_running() -> None:
    need: dict[str, Any] = {"resources": {"memory_bytes": 100}}
    cold, warm = FunctionLoad(instances=0), FunctionLoad(instances=1)
    tight = {"memory_free_bytes": 50}
    error = problem(offer("a", 0.9, load({"echo": cold}, **tight), **need))
    assert isinstance(error, Overloaded)
    assert "needs 100 bytes, 50 are free: 50 too few" in error.message
    assert nodes(chosen(offer("a", 0.9, load({"echo": warm}, **tight), **need))) == ["a"]


def test_who_does_not_answer_is_left_alone() -> None:
    breakers = Breakers()
    for _ in range(3):
        breakers.learn("a", "echo", False, 0)
    assert nodes(chosen(offer("a", 0.9), offer("b"), breakers=breakers)) == ["b"]
    error = problem(offer("a", 0.9), breakers=breakers)
    assert isinstance(error, NoCapableNode)
    assert error.retryable
    assert "3 invocations in a row were lost" in error.message
    assert nodes(chosen(offer("a", 0.9), breakers=breakers, now=1_000)) == ["a"]


def test_what_cannot_be_done_in_time_is_not_begun() -> None:
    long = offer("a", 0.9, busy(total_ms=900, least_ms=500))
    error = problem(long, deadline=400)
    assert isinstance(error, DeadlineExceeded)
    assert "500 ms at the soonest (wait 0, run 500), 400 ms are left" in error.message
    assert nodes(chosen(long, deadline=600)) == ["a"]


def test_a_wait_that_nothing_shortens_is_an_overload() -> None:
    held = offer("a", 0.9, busy(wait_ms=700, total_ms=900))
    error = problem(held, deadline=400)
    assert isinstance(error, Overloaded)
    assert error.retry_after_ms == 700


def test_who_waits_at_the_node_is_overtaken_by_what_is_more_urgent() -> None:
    """Nodes serve the nearest deadline first: the queue alone refuses nothing here."""
    queue = offer("a", 0.9, busy(queued=3, total_ms=200))
    idle = offer("b", 0.9, busy(total_ms=200))
    assert nodes(chosen(queue, deadline=400)) == ["a"]
    assert nodes(chosen(queue, idle, deadline=400)) == ["b", "a"]


def test_of_a_time_to_the_first_output_half_is_sure() -> None:
    slow = offer("a", 0.9, resources={"first_ms": 500})
    assert isinstance(problem(slow, deadline=200), DeadlineExceeded)
    assert nodes(chosen(slow, deadline=300)) == ["a"]


def test_nothing_known_refuses_nothing() -> None:
    assert nodes(chosen(offer("a"), deadline=1)) == ["a"]


def test_a_gate_that_was_not_reached_is_not_called_passed() -> None:
    request = Request(Task(text="x", policy=TaskPolicy(zones=("y",))), None, deadline=10)
    one = Gatekeeper(request, now=0).judge(offer(), thorough=False)
    assert set(one.failed) == {"zones"}
    told = one.describe(gates.GATES)["gates"]
    assert told["deadline"] == "not looked at"
    assert told["data"] == "pass"


def test_reasons_stay_short_however_long_the_demands_are() -> None:
    many = [f"{number:0200}" for number in range(3_000)]
    task = {"policy": {"zones": many, "grants": many}, "skills": many}
    error = problem(offer("a"), offer("b"), task=task)
    assert "and 2992 more" in error.message
    assert len(json.dumps(error.detail)) < 20_000


@dataclass(frozen=True, slots=True)
class BrokenEffect(FixedEffect):
    """A rule that stumbles over what one node says of itself."""

    def refusal(self, record: CatalogRecord) -> str | None:
        if record.node == "b":
            raise OverflowError("year is out of range")
        return None


def test_who_cannot_be_judged_hurts_nobody_else() -> None:
    selection = chosen(offer("a", 0.7), offer("b", 0.9), effect=BrokenEffect())
    assert nodes(selection) == ["a"]
    told = {row["node"]: row for row in selection.explanation["candidates"]}["b"]
    assert "cannot be judged (OverflowError)" in told["gates"]["sound"]
    assert told["gates"]["zones"] == "not looked at"
    error = problem(offer("b", 0.9), effect=BrokenEffect())
    assert isinstance(error, NoCapableNode)
    assert "what node b says of itself cannot be judged" in error.message
