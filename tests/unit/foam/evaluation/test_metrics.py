"""The figures, worked out by hand and against plain definitions."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam.evaluation.metrics import Route, area_under_roc, figures, ndcg


def route(ranked: str, *, score: float = 0.5, ms: float = 1.0, chosen: str | None = "a") -> Route:
    return Route(ranked=tuple(ranked), score=score, chosen=chosen, ms=ms)


def test_figures_of_four_tasks_as_worked_out_by_hand() -> None:
    inside = [
        (route("abc", score=0.9, ms=1.0), {"a"}),
        (route("abc", score=0.8, ms=2.0), {"c"}),
        (route("abcdef", score=0.3, ms=3.0, chosen=None), {"f", "b"}),
        (route("abc", score=0.6, ms=4.0), {"z"}),
    ]
    outside = [route("ab", score=0.3, chosen=None), route("ab", score=0.7)]
    found = figures(inside, outside)
    assert found.recall_at_1 == 1 / 4
    assert found.recall_at_5 == 3 / 4
    assert found.mrr == pytest.approx((1 + 1 / 3 + 1 / 2 + 0) / 4)
    two = (1 / math.log2(3) + 1 / math.log2(7)) / (1 + 1 / math.log2(3))
    assert found.ndcg_at_10 == pytest.approx((1 + 1 / 2 + two + 0) / 4)
    # 0.9 and 0.8 beat both, 0.6 beats one, 0.3 ties with one: 2 + 2 + 1 + 0.5 of 8
    assert found.auroc == pytest.approx(5.5 / 8)
    assert found.in_scope_kept == 3 / 4
    assert found.oos_rejected == 1 / 2
    assert found.p50_ms == 2.5
    assert found.p99_ms == pytest.approx(3.97)
    assert found.tasks == 4


def test_without_out_of_scope_texts_nothing_is_said_of_them() -> None:
    found = figures([(route("a"), {"a"})])
    assert (found.auroc, found.oos_rejected) == (None, None)
    assert (found.recall_at_1, found.in_scope_kept) == (1.0, 1.0)


def test_ndcg_counts_ten_places_and_no_more() -> None:
    ranked = [str(at) for at in range(12)]
    assert ndcg(ranked, {"9"}) == pytest.approx(1 / math.log2(11))
    assert ndcg(ranked, {"10"}) == 0.0
    assert ndcg(ranked, set(ranked)) == pytest.approx(1.0)


ids = st.sampled_from("abcdefgh")
rankings = st.lists(ids, unique=True).map("".join)
golds = st.sets(ids, min_size=1)
scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.5000001, 1.0]), min_size=1, max_size=20)


@given(st.lists(st.tuples(rankings, golds), min_size=1, max_size=10))
def test_figures_agree_with_their_definitions(cases: list[tuple[str, set[str]]]) -> None:
    found = figures([(route(ranked), gold) for ranked, gold in cases])

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    assert found.recall_at_1 == pytest.approx(mean([ranked[:1] in gold for ranked, gold in cases]))
    assert found.recall_at_5 == pytest.approx(
        mean([bool(gold & set(ranked[:5])) for ranked, gold in cases])
    )
    assert found.mrr == pytest.approx(
        mean(
            [
                max((1 / (ranked.index(g) + 1) for g in gold & set(ranked)), default=0.0)
                for ranked, gold in cases
            ]
        )
    )
    gains = []
    for ranked, gold in cases:
        gained = sum(1 / math.log2(ranked.index(g) + 2) for g in gold & set(ranked))
        gains.append(gained / sum(1 / math.log2(at + 2) for at in range(len(gold))))
    assert found.ndcg_at_10 == pytest.approx(mean(gains))
    assert found.recall_at_1 <= found.mrr <= max(found.recall_at_5, found.mrr)


@given(scores, scores)
def test_area_is_the_share_of_pairs_in_order(positive: list[float], negative: list[float]) -> None:
    pairs = [
        1.0 if one > other else 0.5 if one == other else 0.0
        for one, other in product(positive, negative)
    ]
    assert area_under_roc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))
    assert area_under_roc(negative, positive) == pytest.approx(1 - sum(pairs) / len(pairs))
