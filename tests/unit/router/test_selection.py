"""Whom a task goes to: meaning first, then the bounded terms, and every step explained."""

import json
import math
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from capability_schemas.errors import DeadlineExceeded, NoCapableNode, Overloaded, PolicyDenied
from capability_schemas.node import FunctionLoad
from capability_schemas.task import FunctionRef, Task
from registry.calibration import Calibration
from router.candidates import Offer, Request
from router.gates import GATES
from router.reputation import Reputation
from router.rules import NO_RULES
from router.selection import ENOUGH, select
from router.settings import Weights
from support.offers import (
    CALIBRATION,
    FixedEffect,
    busy,
    chosen,
    load,
    nodes,
    offer,
    problem,
)


def other(node: str, sim: float, **fields: Any) -> Offer:
    return offer(node, sim, function="repeat", **fields)


def test_the_most_similar_comes_first() -> None:
    assert nodes(chosen(offer("a", 0.7), offer("b", 0.8))) == ["b", "a"]


def test_the_value_follows_the_formula() -> None:
    weights = Weights(
        cold=0.3, cost=0.1, energy=0.2, time=0.3, load=0.2, affinity=0.4, reputation=0.5
    )
    reputation = Reputation()
    reputation.learn("a", "echo", True, 0)
    figures = FunctionLoad(instances=0, total_ms=100, wait_ms=50)
    view = load({"echo": figures}, running=1, capacity=2, queue_limit=1)
    slow = busy(total_ms=300)
    one = offer("a", 0.8, view, cost={"money": 2.0, "energy_j": 1.0})
    two = offer("b", 0.79, slow, cost={"money": 4.0, "energy_j": 4.0})
    effect = FixedEffect(bonuses={"a": 0.06})
    selection = chosen(one, two, weights=weights, reputation=reputation, prefer="a", effect=effect)
    told = {row["node"]: row for row in selection.explanation["candidates"]}["a"]
    alpha = 0.8 * math.exp(-0.3)
    assert told["terms"] == {
        "gates": 1.0,
        "sim": 0.8,
        "fit": round(math.exp(-0.3), 4),
        "spec": 1.0,
        "alpha": round(alpha, 4),
        "bonus": 0.06,
        "cost": 0.5,
        "energy": 0.25,
        "time": 0.5,
        "load": 0.5,
        "affinity": 1.0,
        "reputation": round(5 / 6, 4),
    }
    expected = alpha + 0.06 - 0.1 * 0.5 - 0.2 * 0.25 - 0.3 * 0.5 - 0.2 * 0.5 + 0.4
    expected += 0.5 * (5 / 6 - 0.8)
    assert told["value"] == pytest.approx(expected, abs=1e-4)
    assert told["value"] == pytest.approx(sum(told["weighted"].values()), abs=1e-3)


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"view": {"assigned": 1}}, {}),
        ({"cost": {"money": 1.0}}, {}),
        ({"cost": {"energy_j": 5.0}}, {}),
        ({"view": busy(total_ms=500)}, {"view": busy(total_ms=50)}),
        ({"view": busy(total_ms=50, wait_ms=400)}, {"view": busy(total_ms=50)}),
        ({"view": busy(degraded=True)}, {}),
        ({"view": load()}, {"view": busy()}),
    ],
)
def test_between_equals_each_term_decides(worse: dict[str, Any], better: dict[str, Any]) -> None:
    assert nodes(chosen(offer("a", **worse), offer("b", **better))) == ["b", "a"]


def test_no_price_load_or_time_beats_a_clear_meaning() -> None:
    hard = {"assigned": 1, **busy(total_ms=9_000, wait_ms=9_000)}
    right = offer("a", 0.8, hard, cost={"money": 100.0, "energy_j": 100.0})
    cheap = other("b", 0.74, view=busy(total_ms=1))
    heavy = {"cost": 1.0, "energy": 1.0, "time": 1.0, "load": 1.0}
    for prefer in ("balanced", "best", "cheapest", "fastest"):
        task = {"prefer": prefer, "weights": heavy}
        assert nodes(chosen(right, cheap, task=task)) == ["a", "b"]


def test_within_the_window_terms_decide_between_functions() -> None:
    right, cheap = offer("a", 0.80, cost={"money": 1.0}), other("b", 0.79)
    assert nodes(chosen(right, cheap)) == ["b", "a"]
    assert nodes(chosen(right, cheap, weights=Weights(window=0.0))) == ["a", "b"]
    assert nodes(chosen(right, cheap, weights=Weights(cost=0.0))) == ["a", "b"]


def test_behind_the_window_it_goes_by_similarity_alone() -> None:
    best, dear = offer("a", 0.80), other("b", 0.72, cost={"money": 9.0}, view={"assigned": 1})
    cheap = offer("c", 0.71, function="say")
    assert nodes(chosen(best, cheap, dear)) == ["a", "b", "c"]
    assert nodes(chosen(best, cheap, dear, task={"prefer": "cheapest"})) == ["a", "b", "c"]


def test_a_task_has_the_last_word_on_weights() -> None:
    dear, slow = (
        offer("a", view=busy(total_ms=10), cost={"money": 1.0}),
        offer("b", view=busy(total_ms=900)),
    )
    assert nodes(chosen(dear, slow, task={"weights": {"cost": 0.0}}))[0] == "a"
    assert nodes(chosen(dear, slow, task={"weights": {"time": 0.0}}))[0] == "b"


def test_what_a_task_prefers_decides_within_the_window_only() -> None:
    best = offer("best", 0.80, busy(total_ms=900), cost={"money": 3.0})
    cheap = offer("cheap", 0.78, busy(total_ms=500), cost={"money": 1.0})
    fast = offer("fast", 0.77, busy(total_ms=100), cost={"money": 2.0})
    outside = offer("outside", 0.70, busy(total_ms=1))
    fleet = best, cheap, fast, outside

    def first(prefer: str) -> list[str]:
        return nodes(chosen(*fleet, task={"prefer": prefer}))

    assert first("best") == ["best", "cheap", "fast", "outside"]
    assert first("cheapest")[0] == "cheap"
    assert first("fastest")[:3] == ["fast", "cheap", "best"]
    assert {first(prefer)[-1] for prefer in ("best", "cheapest", "fastest", "balanced")} == {
        "outside"
    }


def test_cheapest_asks_for_the_energy_next() -> None:
    hungry = offer("a", 0.80, cost={"money": 1.0, "energy_j": 9.0})
    frugal = offer("b", 0.79, cost={"money": 1.0, "energy_j": 1.0})
    assert nodes(chosen(hungry, frugal, task={"prefer": "cheapest"})) == ["b", "a"]


def test_who_is_expected_late_comes_after_who_is_not() -> None:
    late = offer("a", 0.80, busy(total_ms=900), cost={"money": 0.0})
    timely = offer("b", 0.80, busy(total_ms=300), cost={"money": 5.0})
    assert nodes(chosen(late, timely, task={"prefer": "cheapest"}, deadline=500)) == ["b", "a"]
    assert nodes(chosen(late, timely, task={"prefer": "cheapest"}, deadline=5_000)) == ["a", "b"]


def test_of_an_unknown_run_time_the_usual_one_is_taken() -> None:
    fleet = (
        offer("slow", view=busy(total_ms=900)),
        offer("new"),
        offer("quick", view=busy(total_ms=10)),
    )
    assert nodes(chosen(*fleet, task={"prefer": "fastest"})) == ["quick", "new", "slow"]


def test_the_queues_of_others_are_not_those_of_a_new_node() -> None:
    figures = {"echo": FunctionLoad(instances=1, total_ms=100, wait_ms=1_200)}
    queued = offer("queued", view=load(figures, capacity=1, queue_limit=20))
    empty = {"echo": FunctionLoad(instances=1)}
    new = offer("new", view=load(empty, capacity=1, queue_limit=20))
    assert nodes(chosen(queued, new, task={"prefer": "fastest"})) == ["new", "queued"]
    given = load(empty, capacity=1, queue_limit=20) | {"assigned": 30}
    later = offer("new", view=given)
    assert nodes(chosen(queued, later, task={"prefer": "fastest"})) == ["queued", "new"]


def test_what_was_given_since_a_node_last_spoke_counts() -> None:
    figures = {"echo": FunctionLoad(instances=1, total_ms=100)}
    told_idle = load(figures, capacity=1, queue_limit=9) | {"assigned": 4}
    idle = load(figures, capacity=1, queue_limit=9)
    selection = chosen(offer("a", view=told_idle), offer("b", view=idle))
    assert [choice.finish_ms for choice in selection.choices] == [100, 400]


def test_a_session_stays_with_its_node_unless_that_is_far_busier() -> None:
    assert nodes(chosen(offer("a"), offer("b"), prefer="b")) == ["b", "a"]
    roomy = load({"echo": FunctionLoad(instances=1)}, capacity=100, queue_limit=9)
    ahead = {"assigned": 8}
    assert (
        nodes(chosen(offer("a", view=roomy), offer("b", view=roomy | ahead), prefer="b"))[0] == "b"
    )
    ahead = {"assigned": 9}
    assert (
        nodes(chosen(offer("a", view=roomy), offer("b", view=roomy | ahead), prefer="b"))[0] == "a"
    )


def test_below_the_threshold_the_nearest_are_named_once_each() -> None:
    far = [offer(f"n{place}", 0.4) for place in range(5)]
    error = problem(*far, other("b", 0.3))
    assert isinstance(error, NoCapableNode)
    named = [(miss["function"], miss["score"]) for miss in error.detail["nearest"]]
    assert named == [("echo", 0.4), ("repeat", 0.3)]
    assert "0.100 below the threshold" in error.detail["nearest"][0]["reason"]
    assert "the nearest is echo with 0.400" in error.message


def test_an_empty_mesh_has_nobody() -> None:
    error = problem()
    assert isinstance(error, NoCapableNode)
    assert error.detail["nearest"] == []


def test_a_poor_substitute_does_not_stand_in_for_a_busy_node() -> None:
    full = load(running=1, capacity=1)
    replacement = other("b", 0.6)
    assert isinstance(problem(offer("a", 0.9, full), replacement), Overloaded)
    assert nodes(chosen(offer("a", 0.7, full), replacement)) == ["b"]


@pytest.mark.parametrize(
    ("forbidden", "task", "effect"),
    [
        ({"policy": {"external": True}}, {"policy": {"local_only": True}}, NO_RULES),
        ({"cost": {"money": 9.0}}, {"policy": {"max_cost": 1.0}}, NO_RULES),
        ({"policy": {"zones": ["hall-1"]}}, {}, FixedEffect(refusals={"a": "rule no-echo"})),
    ],
)
def test_a_poor_substitute_does_not_stand_in_for_what_is_forbidden(
    forbidden: dict[str, Any], task: dict[str, Any], effect: FixedEffect
) -> None:
    options: dict[str, Any] = {"task": task, "effect": effect}
    error = problem(offer("a", 0.9, **forbidden), other("b", 0.6), **options)
    assert isinstance(error, PolicyDenied)
    assert [miss["node"] for miss in error.detail["nearest"]] == ["a", "b"]
    assert "no substitute" in error.detail["nearest"][1]["reason"]
    selection = chosen(offer("a", 0.7, **forbidden), other("b", 0.69), **options)
    assert nodes(selection) == ["b"]
    assert selection.ambiguous  # what is forbidden may well be what was meant


def test_what_does_not_fit_needs_no_substitute() -> None:
    skilled = other("b", 0.6, skills=["ocr"])
    assert nodes(chosen(offer("a", 0.9), skilled, task={"skills": ["ocr"]})) == ["b"]


def test_a_wrong_input_is_not_sent_to_another_function() -> None:
    schema = {"type": "object", "properties": {"cm": {"type": "number"}}, "required": ["cm"]}
    error = problem(offer("a", 0.9, input_schema=schema), other("b", 0.6))
    assert isinstance(error, NoCapableNode)
    assert "cm" in error.message


def test_why_nobody_is_told_of_what_was_meant() -> None:
    away, full = {"presence": "offline"}, load(running=1, capacity=1)
    idle, taken = other("b", 0.6), other("b", 0.6, view=full)
    for substitute in (idle, taken):
        error = problem(offer("a", 0.9, away), substitute)
        assert isinstance(error, NoCapableNode)
        assert error.retryable
        assert "is away" in error.message


def test_crashing_functions_rank_last() -> None:
    assert nodes(chosen(offer("a", 0.9, busy(degraded=True)), offer("b", 0.8))) == ["b", "a"]


def test_bad_outcomes_weigh_more_than_load_and_price() -> None:
    reputation = Reputation()
    for _ in range(10):
        reputation.learn("a", "echo", False, 0)
    careful = offer("b", view={"assigned": 1}, cost={"money": 1.0})
    assert nodes(chosen(offer("a"), careful, reputation=reputation)) == ["b", "a"]
    assert nodes(chosen(offer("a", 0.9), other("b", 0.8), reputation=reputation)) == ["a", "b"]


# How sure it is.


def test_the_margin_is_to_the_next_other_function() -> None:
    fleet = offer("a", 0.80), offer("b", 0.80), other("c", 0.70)
    selection = chosen(*fleet)
    assert selection.margin == pytest.approx(0.1)
    assert selection.margin is not None
    assert selection.probability == CALIBRATION.probability(0.8, selection.margin)
    assert not selection.ambiguous
    assert [choice.margin for choice in selection.choices] == pytest.approx([0.1, 0.1, -0.1])
    assert not any(choice.ambiguous for choice in selection.choices)


def test_of_two_functions_no_more_than_one_is_meant() -> None:
    for sim in (0.9, 0.8, 0.79):
        choices = chosen(offer("a", 0.9), other("b", sim), weights=Weights(window=0)).choices
        probabilities = [choice.probability or 0.0 for choice in choices]
        assert len(probabilities) == 2
        assert probabilities[0] >= probabilities[1] > 0
        assert sum(probabilities) <= (1.0 if sim < 0.9 else 2.0)


def test_two_names_for_the_very_same_text_do_not_make_it_ambiguous() -> None:
    fleet = offer("a", 0.8, capability="t1"), other("b", 0.8, capability="t1")
    assert not chosen(*fleet).ambiguous
    fleet = offer("a", 0.8, capability="t1"), other("b", 0.8, capability="t2")
    assert chosen(*fleet).ambiguous


def test_a_small_margin_is_ambiguous_and_said_so() -> None:
    fleet = offer("a", 0.80), offer("b", 0.80), other("c", 0.78), offer("d", 0.66, function="x")
    selection = chosen(*fleet, weights=Weights(load=0))
    assert selection.ambiguous
    assert [choice.ambiguous for choice in selection.choices] == [True, True, True, False]
    assert "ambiguous by a margin of 0.020" in selection.choices[0].reason
    assert selection.explanation["ambiguous"] is True


def test_a_function_that_is_busy_may_be_the_one_meant() -> None:
    full = load(running=1, capacity=1)
    assert chosen(offer("a", 0.8), other("b", 0.79, view=full)).ambiguous


def test_one_that_does_not_fit_cannot_be_meant() -> None:
    skilled = offer("a", 0.8, skills=["ocr"])
    assert not chosen(skilled, other("b", 0.79), task={"skills": ["ocr"]}).ambiguous


def test_a_named_function_is_not_guessed() -> None:
    selection = chosen(
        offer("a"), offer("b"), function="echo", calibration=Calibration(threshold=0.99)
    )
    assert (selection.margin, selection.probability, selection.ambiguous) == (None, None, False)
    assert selection.choices[0].probability is None


# Exploration.


class Eager(Random):
    """Explores every time: its first number is the least there is."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.asked = False

    def random(self) -> float:
        asked, self.asked = self.asked, True
        return super().random() if asked else 0.0


def known(node: str, times: int = 20) -> Reputation:
    reputation = Reputation()
    for _ in range(times):
        reputation.learn(node, "echo", True, 0)
    return reputation


def explored(*offers: Offer, seed: int, share: float = 0.5, **options: Any) -> Any:
    return chosen(
        *offers,
        weights=Weights(exploration=share),
        reputation=known("a"),
        chance=Eager(seed),
        **options,
    )


def test_a_node_nothing_is_known_of_gets_its_turn_and_that_is_said() -> None:
    tried = explored(offer("a"), offer("b"), seed=1)
    assert nodes(tried) == ["b", "a"]
    assert tried.explanation["explored"] == ["b", "echo"]
    assert "explored" in tried.choices[0].reason


def test_of_several_the_one_is_tried_that_may_be_better() -> None:
    reputation = known("a")
    for _ in range(5):
        reputation.learn("bad", "echo", False, 0)
    fleet = offer("a"), offer("bad"), offer("new")
    seconds = [
        nodes(
            chosen(
                *fleet,
                weights=Weights(exploration=0.5),
                reputation=reputation,
                chance=Eager(seed),
            )
        )[0]
        for seed in range(40)
    ]
    assert "a" not in seconds
    assert seconds.count("new") > seconds.count("bad")


def test_trials_end_when_a_node_is_known() -> None:
    for good in (True, False):
        reputation = known("a", 40)
        for _ in range(21):
            reputation.learn("b", "echo", good, 0)
        selection = chosen(
            offer("a"),
            offer("b"),
            weights=Weights(exploration=0.5),
            reputation=reputation,
            chance=Eager(1),
        )
        assert selection.explanation["explored"] is None


@pytest.mark.parametrize(
    "options",
    [
        {"share": 0.0},
        {"task": {"prefer": "best"}},
        {"task": {"priority": 6}},
        {"task": {"min_confidence": 0.5}},
        {"deadline": 4_000},
        {"prefer": "a"},
    ],
)
def test_nothing_is_tried_with_tasks_that_wish_for_something(options: dict[str, Any]) -> None:
    for seed in range(40):
        selection = explored(offer("a"), offer("b"), seed=seed, **options)
        assert nodes(selection)[0] == "a"
        assert selection.explanation["explored"] is None


def test_exploration_never_trades_the_meaning_or_a_gate() -> None:
    away, near = offer("b", view={"silent": True}), other("c", 0.79)
    for seed in range(40):
        assert nodes(explored(offer("a"), away, near, seed=seed))[0] == "a"


def test_only_the_share_is_explored() -> None:
    chance = Random(1)
    tries = [
        chosen(
            offer("a"),
            offer("b"),
            weights=Weights(exploration=0.05),
            reputation=known("a", 1_000),
            chance=chance,
        ).explanation["explored"]
        for _ in range(1_000)
    ]
    assert 35 <= sum(one is not None for one in tries) <= 65


# Large fleets.


class Pulled:
    """Offers that count how many of them were asked for."""

    def __init__(self, offers: list[Offer]) -> None:
        self.offers = offers
        self.pulled = 0

    def __iter__(self) -> Iterator[Offer]:
        for one in self.offers:
            self.pulled += 1
            yield one


def select_lazily(*groups: Pulled) -> Any:
    return select(
        Request(Task(text="say it"), None, deadline=60_000),
        groups,
        calibration=CALIBRATION,
        weights=Weights(),
        nearest=3,
        now=0,
    )


def test_a_function_on_many_nodes_is_not_looked_at_to_the_last() -> None:
    many = Pulled([offer(f"n{place}", 0.8) for place in range(500)])
    rest = Pulled([other(f"m{place}", 0.7) for place in range(500)])
    selection = select_lazily(many, rest)
    assert many.pulled == ENOUGH + 1
    assert rest.pulled < 10
    assert selection.margin == pytest.approx(0.1)
    assert selection.explanation["more"] is True
    assert len(selection.explanation["candidates"]) == selection.explanation["looked_at"]


def test_of_many_that_plainly_fail_a_few_tell_why() -> None:
    nobody = Pulled([offer(f"n{place}", 0.8, {"silent": True}) for place in range(500)])
    selection = select_lazily(nobody)
    assert isinstance(selection.problem, NoCapableNode)
    assert nobody.pulled < 100
    assert selection.explanation["more"] is True


def test_of_thousands_that_are_too_slow_for_the_moment_some_hundreds_are_asked_about() -> None:
    slow = busy(total_ms=90_000, least_ms=90_000)
    nobody = Pulled([offer(f"n{place}", 0.8, slow) for place in range(2_000)])
    selection = select_lazily(nobody)
    assert isinstance(selection.problem, DeadlineExceeded)
    assert 500 < nobody.pulled < 600
    assert selection.explanation["more"] is True


def test_what_takes_more_than_a_glance_is_looked_at_to_the_last() -> None:
    small = [offer(f"n{place}", 0.8, resources={"max_input_bytes": 1}) for place in range(2_000)]
    assert nodes(select_lazily(Pulled([*small, offer("last", 0.8)]))) == ["last"]


FULL = load(running=1, capacity=1)


@pytest.mark.parametrize(
    "many",
    [
        {"cost": {"money": 9.0}},
        {"policy": {}},
        {"policy": {"zones": ["hall"]}},
        {"policy": {"grants": ["pii"]}},
        {"skills": []},
        {"view": FULL},
        {"view": FULL | {"silent": True}},
        {"view": {"silent": True}},
        {"view": {"cordoned": True}},
    ],
)
def test_the_last_of_many_is_heard_too(many: dict[str, Any]) -> None:
    fine: dict[str, Any] = {
        "skills": ["ocr"],
        "policy": {"zones": ["hall"], "grants": ["pii"]},
    }
    task = {
        "skills": ["ocr"],
        "policy": {"zones": ["hall"], "grants": ["pii"], "max_cost": 1.0},
    }
    others = [offer(f"n{place}", 0.8, **(fine | many)) for place in range(200)]
    last = offer("last", 0.8, **fine)
    assert nodes(chosen(*others, last, task=task)) == ["last"]
    busy_one = offer("last", 0.8, FULL, **fine)
    error = problem(*others, busy_one, task=task)
    assert isinstance(error, Overloaded), error
    explanation = chosen(*others, task=task).explanation
    assert explanation["looked_at"] < 100
    assert explanation["problem"]


# The explanation.


def test_every_candidate_is_explained_with_every_gate_and_term() -> None:
    selection = chosen(offer("a", 0.9), offer("b", 0.1))
    explanation = selection.explanation
    assert explanation["chosen"] == ["a", "echo"]
    assert explanation["threshold"] == 0.5
    assert explanation["window"] == 0.05
    assert explanation["problem"] is None
    assert [row["node"] for row in explanation["candidates"]] == ["a", "b"]
    for candidate in explanation["candidates"]:
        assert tuple(candidate["gates"]) == GATES
        assert {"gates", "sim", "fit", "spec", "alpha"} <= candidate["terms"].keys()
    assert explanation["candidates"][0]["verdict"] == "candidate"
    assert json.loads(json.dumps(explanation)) == explanation


def test_a_choice_carries_what_a_cascade_goes_by() -> None:
    one = offer(
        "a",
        0.8,
        busy(total_ms=100, wait_ms=20),
        cost={"money": 2.0},
        resources={"memory_bytes": 7},
        policy={"external": True},
    )
    selection = chosen(one, task={"min_confidence": 0.7}, effect=FixedEffect(min_confidence=0.2))
    choice = selection.choices[0]
    assert (choice.sim, choice.cost, choice.finish_ms) == (0.8, 2.0, 120.0)
    assert (choice.external, choice.strength) == (True, 7.0)
    assert selection.min_confidence == 0.7
    assert chosen(one, effect=FixedEffect(min_confidence=0.2)).min_confidence == 0.2
    assert chosen(one).min_confidence is None


def test_the_same_is_chosen_again() -> None:
    function = FunctionRef.parse("echo")
    fleet = [offer(f"n{place}", 1.0) for place in range(10)]
    request = Request(Task(text="x"), function, deadline=60_000)
    runs = [
        select(
            request,
            [fleet],
            calibration=CALIBRATION,
            weights=Weights(),
            nearest=3,
            now=0,
            reputation=Reputation(),
        ).choices
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
