"""Reputation: what outcomes say about a node, and how that fades."""

import json
from random import Random
from typing import Any

import pytest

from capability_schemas.errors import ConfigurationError
from router.reputation import Reputation
from router.settings import ReputationSettings

HOUR_MS = 3_600_000
SETTINGS = ReputationSettings(half_life_s=3_600)


def learnt(good: int = 0, bad: int = 0, now: int = 0, **more: Any) -> Reputation:
    reputation = Reputation(SETTINGS)
    for outcome in [True] * good + [False] * bad:
        reputation.learn("a", "echo", outcome, now, **more)
    return reputation


def test_a_new_node_has_the_mean_of_the_prior() -> None:
    reputation = Reputation(SETTINGS)
    assert reputation.score("a", "echo", 0) == reputation.prior == pytest.approx(0.8)


def test_it_is_the_mean_of_the_posterior() -> None:
    assert learnt(good=3, bad=2).score("a", "echo", 0) == pytest.approx((4 + 3) / (5 + 5))


def test_another_function_and_another_node_are_not_judged_by_it() -> None:
    reputation = learnt(bad=5)
    assert reputation.score("a", "other", 0) == reputation.prior
    assert reputation.score("b", "echo", 0) == reputation.prior


def test_outcomes_count_half_after_the_half_life_and_are_forgotten_in_the_end() -> None:
    reputation = learnt(bad=4)
    assert reputation.score("a", "echo", HOUR_MS) == pytest.approx(4 / (5 + 2))
    assert reputation.score("a", "echo", 60 * HOUR_MS) == pytest.approx(0.8)


def test_old_outcomes_have_faded_when_new_ones_come() -> None:
    reputation = learnt(bad=4)
    reputation.learn("a", "echo", True, HOUR_MS)
    assert reputation.score("a", "echo", HOUR_MS) == pytest.approx((4 + 1) / (5 + 3))


def test_a_clock_set_back_does_not_revive_the_past() -> None:
    reputation = learnt(bad=4, now=HOUR_MS)
    reputation.learn("a", "echo", True, 0)
    assert reputation.score("a", "echo", 2 * HOUR_MS) == pytest.approx((4 + 0.5) / (5 + 2.5))


def test_what_a_node_has_done_with_a_skill_speaks_for_its_new_function() -> None:
    failing, proven = learnt(bad=20, skills=["ocr"]), learnt(good=20, skills=["ocr"])
    assert failing.score("a", "new", 0, skills=["ocr"]) == pytest.approx(4 / 25)
    assert proven.score("a", "new", 0, skills=["ocr"]) == pytest.approx(24 / 25)
    assert proven.score("a", "new", 0, skills=["german"]) == proven.prior


def test_a_skill_sets_the_mean_of_the_prior_and_not_its_weight() -> None:
    reputation = learnt(good=1_000, skills=["ocr"])
    for _ in range(20):
        reputation.learn("a", "new", False, 0)
    assert reputation.score("a", "new", 0, skills=["ocr"]) < 0.25


def test_draws_are_wide_where_little_is_known() -> None:
    reputation, chance = learnt(good=400), Random(1)

    def spread(function: str) -> float:
        draws = [reputation.draw("a", function, 0, chance) for _ in range(200)]
        assert all(0 <= draw <= 1 for draw in draws)
        return max(draws) - min(draws)

    assert spread("unknown") > 5 * spread("echo")


def test_it_outlives_the_router() -> None:
    reputation = learnt(good=3, bad=1, skills=["ocr"])
    again = Reputation(SETTINGS)
    again.restore(json.loads(json.dumps(reputation.snapshot())))
    for function, skills in (("echo", []), ("new", ["ocr"])):
        told = again.score("a", function, HOUR_MS, skills=skills)
        assert told == pytest.approx(reputation.score("a", function, HOUR_MS, skills=skills))


def test_what_is_forgotten_is_not_written_down() -> None:
    reputation = learnt(bad=1)
    reputation.learn("b", "echo", True, 100 * HOUR_MS)
    rows = reputation.snapshot(100 * HOUR_MS)["functions"]
    assert [row[0] for row in rows] == ["b"]


@pytest.mark.parametrize(
    "snapshot",
    [
        {},
        {"version": 2, "functions": [], "skills": []},
        {"version": 1, "functions": None, "skills": []},
        {"version": 1, "functions": [["a", "echo", 1, 1]], "skills": []},
        {"version": 1, "functions": [["a", "echo", -1, 1, 0]], "skills": []},
        {"version": 1, "functions": [["a", "echo", float("nan"), 1, 0]], "skills": []},
        {"version": 1, "functions": [["a", "echo", 10**400, 1, 0]], "skills": []},
        {"version": 1, "functions": [], "skills": [["a", 3, 1, 1, 0]]},
        {"version": 1, "functions": [], "skills": [["a", "echo", "1", 1, 0]]},
    ],
)
def test_a_bad_snapshot_is_refused_and_changes_nothing(snapshot: dict[str, Any]) -> None:
    reputation = learnt(bad=4)
    with pytest.raises(ConfigurationError, match="reputation snapshot"):
        reputation.restore(snapshot)
    assert reputation.score("a", "echo", 0) == pytest.approx(4 / 9)


def test_it_is_bounded_and_the_longest_unheard_of_go_first() -> None:
    reputation = Reputation(ReputationSettings(limit=3))
    for node in ("a", "b", "c"):
        reputation.learn(node, "echo", False, 0)
    reputation.learn("a", "echo", False, 1)
    reputation.learn("d", "echo", False, 1)
    known = [node for node in "abcd" if reputation.score(node, "echo", 1) < reputation.prior]
    assert known == ["a", "c", "d"]
    smaller = Reputation(ReputationSettings(limit=1))
    smaller.restore(reputation.snapshot(1))
    assert len(smaller) == 1
    assert smaller.score("d", "echo", 1) < smaller.prior


def test_a_snapshot_is_of_its_moment_whenever_it_is_made() -> None:
    reputation = Reputation()
    reputation.learn("a", "echo", True, 0, skills=["ocr"])
    before, make = reputation.snapshot(0), reputation.snapshotting(0)
    reputation.learn("a", "echo", False, 0, skills=["ocr"])
    reputation.learn("b", "echo", False, 0)
    assert make() == before != reputation.snapshot(0)
