"""What rankings and refusals amount to."""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Route:
    """What a router made of one request.

    Attributes:
        ranked: Ids of capabilities in the router's order: first those it would try, then the others
            by similarity, whether or not they reach the threshold.
        score: Similarity of the most similar, 0 to 1; 0 where there is none.
        chosen: Id of the capability it would ask first; None when it refuses the request.
        ms: Time it took, milliseconds: embedding and decision.
    """

    ranked: tuple[str, ...]
    score: float
    chosen: str | None
    ms: float

    def rank(self, gold: AbstractSet[str]) -> int | None:
        """Place of the first right one, from 1; None where none is ranked."""
        return next((at for at, one in enumerate(self.ranked, start=1) if one in gold), None)


@dataclass(frozen=True, slots=True)
class Figures:
    """The outcome.

    Attributes:
        recall_at_1: Share of the tasks with a right capability in the first place.
        recall_at_5: Share of the tasks with a right one among the first five.
        ndcg_at_10: Mean normalised discounted cumulative gain of the first ten; see ``ndcg``.
        mrr: Mean of 1 / place of the first right one; 0 for a task where none is ranked.
        auroc: How well the best similarity tells tasks from out-of-scope texts; see
            ``area_under_roc``. None without out-of-scope texts.
        in_scope_kept: Share of the tasks that the router gives to somebody, right or wrong.
        oos_rejected: Share of the out-of-scope texts that it refuses; None without any.
        p50_ms: Median time of embedding and decision over the tasks, milliseconds.
        p99_ms: The time that 99 of 100 tasks do not exceed.
        tasks: Tasks in scope.
    """

    recall_at_1: float
    recall_at_5: float
    ndcg_at_10: float
    mrr: float
    auroc: float | None
    in_scope_kept: float
    oos_rejected: float | None
    p50_ms: float
    p99_ms: float
    tasks: int

    def as_json(self) -> dict[str, Any]:
        """Return it with four decimals."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def figures(
    inside: Sequence[tuple[Route, AbstractSet[str]]], outside: Sequence[Route] = ()
) -> Figures:
    """Count.

    Args:
        inside: Routes of tasks in scope, each with the ids of the capabilities that serve it; at
            least one.
        outside: Routes of requests that nobody serves.
    """
    ranks = [route.rank(gold) for route, gold in inside]

    def within(places: int) -> float:
        return _share(rank is not None and rank <= places for rank in ranks)

    times = [route.ms for route, _ in inside]
    return Figures(
        recall_at_1=within(1),
        recall_at_5=within(5),
        ndcg_at_10=float(np.mean([ndcg(route.ranked, gold) for route, gold in inside])),
        mrr=float(np.mean([0.0 if rank is None else 1 / rank for rank in ranks])),
        auroc=area_under_roc([r.score for r, _ in inside], [r.score for r in outside])
        if outside
        else None,
        in_scope_kept=_share(route.chosen is not None for route, _ in inside),
        oos_rejected=_share(route.chosen is None for route in outside) if outside else None,
        p50_ms=float(np.quantile(times, 0.5)),
        p99_ms=float(np.quantile(times, 0.99)),
        tasks=len(inside),
    )


def ndcg(ranked: Sequence[str], gold: AbstractSet[str], *, depth: int = _SHOWN) -> float:
    """Normalised discounted cumulative gain with gains of 0 and 1.

    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques" (2002), with the
    discount ``log2(place + 1)``: the sum over the right ones among the first ``depth``, divided by
    what it would be with all right ones in front.

    Args:
        ranked: Best first.
        gold: The right ones, at least one.
        depth: Places that count.

    Returns:
        From 0 to 1.
    """
    discounts = 1 / np.log2(np.arange(2, depth + 2))
    gained = sum(discounts[at] for at, one in enumerate(ranked[:depth]) if one in gold)
    return float(gained / discounts[: len(gold)].sum())


def area_under_roc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Chance that a positive scores above a negative, ties counting half (Mann and Whitney, 1947).

    Args:
        positive: Scores, at least one.
        negative: Scores, at least one.

    Returns:
        From 0 to 1; 0.5 says nothing.
    """
    ordered = np.sort(np.asarray(negative))
    below = np.searchsorted(ordered, positive, side="left")
    ties = np.searchsorted(ordered, positive, side="right") - below
    return float(np.mean(below + 0.5 * ties) / len(ordered))


def _share(found: Iterable[bool]) -> float:
    return float(np.mean(list(found)))
