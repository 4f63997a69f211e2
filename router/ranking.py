"""In which order candidates are tried: the window, the preference, a little exploration. Pure.

Whoever is as similar as the best but for less than the window competes by the terms; the others
stay behind, by similarity, whatever they cost. The window is the margin below which similarity does
not tell functions apart anyway, so that price, time and load can cost a right choice only where
that was a guess.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from capability_schemas.task import Preference
from router.candidates import Candidate, Request
from router.gates import PASSING_GATES
from router.reputation import Reputation
from router.score import Scales, Scorer, tasks_of
from router.settings import Weights

_EQUAL: Final = 1e-6
"""Similarities closer than this are of the same text."""

_ORDINARY: Final = 5
"""Priority of a task that names none; a higher one is in earnest."""

_LEISURE_MS: Final = 5_000
"""Time left, besides twice the predicted finish, in which a poor trial can be made good."""

Rank = tuple[float | bool | tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Those that pass, in the order in which they are tried.

    Attributes:
        ranked: Best first.
        competing: How many of them are within the window.
        explored: Whose turn exploration made it, if it did.
    """

    ranked: list[Candidate]
    competing: int = 0
    explored: Candidate | None = None


def rank(
    request: Request,
    relevant: Sequence[Candidate],
    scorer: Scorer,
    *,
    weights: Weights,
    window: float,
    now: int,
) -> Ranking:
    """Put those that pass in order, without poor substitutes for busy nodes.

    Args:
        request: What is asked.
        relevant: Candidates at or above the threshold, with their standing.
        scorer: Weighs them.
        weights: Weights of the score.
        window: Similarity below the best within which terms decide.
        now: UTC milliseconds.
    """
    able = [one for one in relevant if not one.failed.keys() - set(PASSING_GATES)]
    floor = max((one.offer.sim for one in able), default=0.0) - weights.substitute
    passing = []
    for one in able:
        if one.failed:
            continue
        if one.offer.sim < floor:
            one.verdict = (
                f"no substitute: {floor + weights.substitute - one.offer.sim:.3f} less similar than"
                f" the best match, {weights.substitute:.3f} is the most"
            )
            continue
        passing.append(one)
    scales = Scales(passing or relevant)
    for one in relevant:
        scorer.weigh(one, scales)
    if not passing:
        return Ranking([])
    edge = max(one.standing for one in passing) - window
    order = _order(request.task.prefer, scales, request.deadline - now)
    near = sorted((one for one in passing if one.standing >= edge), key=order)
    far = sorted(
        (one for one in passing if one.standing < edge),
        key=lambda one: (-one.standing, *order(one)),
    )
    return Ranking([*near, *far], competing=len(near))


def _order(prefer: Preference, scales: Scales, left_ms: float) -> Callable[[Candidate], Rank]:
    """Return what candidates within the window are sorted by.

    Whoever is expected to be late comes after whoever is not: the gate refuses only what is late
    for certain.
    """

    def order(one: Candidate) -> Rank:
        finish_ms, cost = scales.finish_ms(one), one.offer.record.cost
        late = finish_ms > left_ms
        last = (-one.value, one.offer.node.busy, tasks_of(one.offer.node), one.offer.record.key)
        match prefer:
            case "best":
                return (-one.standing, late, *last)
            case "cheapest":
                return (late, cost.money, cost.energy_j, *last)
            case "fastest":
                return (finish_ms, *last)
            case "balanced":
                return (late, *last)

    return order


def explore(
    ranking: Ranking,
    request: Request,
    reputation: Reputation,
    *,
    share: float,
    now: int,
    chance: Random,
) -> Ranking:
    """Now and then let a node try that is as similar as the best, drawn by how good it may be.

    Never against a wish (a preference, a session, haste, a high priority), a gate or the meaning.

    Args:
        ranking: What it would be otherwise.
        request: What is asked.
        reputation: What nodes have done so far.
        share: Share of such tasks, 0 to 1.
        now: UTC milliseconds.
        chance: What draws.
    """
    task, left_ms = request.task, request.deadline - now
    wishes = (
        task.prefer != "balanced"
        or task.priority > _ORDINARY
        or request.prefer is not None
        or task.min_confidence is not None
    )
    if wishes or left_ms < _LEISURE_MS or chance.random() >= share:
        return ranking
    competing = ranking.ranked[: ranking.competing]
    equals = [
        one
        for one in competing
        if abs(one.offer.sim - competing[0].offer.sim) <= _EQUAL
        and 2 * (one.finish.total_ms or 0.0) + _LEISURE_MS <= left_ms
    ]
    if len(equals) < 2:  # noqa: PLR2004  # nobody to choose between
        return ranking
    drawn = max(
        equals,
        key=lambda one: reputation.draw(
            one.offer.record.node,
            one.offer.record.function,
            now,
            chance,
            skills=one.offer.record.skills,
        ),
    )
    if drawn is ranking.ranked[0]:
        return ranking
    others = [one for one in ranking.ranked if one is not drawn]
    return Ranking([drawn, *others], ranking.competing, explored=drawn)
