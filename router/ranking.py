"""In which order candidates are tried: the window, the preference, a little exploration. Pure.

Whoever is as similar as the best but for less than the window competes by the terms; the others
stay behind, by similarity, whatever they cost. The window is the margin below which similarity does
not tell functions apart anyway, so that price, time and load can cost a right choice only where
that was a guess.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from capability_schemas.task import Preference
from router.candidates import Candidate, Request
from router.gates import may_be_meant
from router.reputation import Reputation
from router.score import Scales, Scorer, tasks_of
from router.settings import Weights

_EQUAL: Final = 1e-6
"""Similarities closer than this are of the same text."""

_ORDINARY: Final = 5
"""Priority of a task that names none; a higher one is in earnest."""

_LEISURE_MS: Final = 5_000
"""Time left, besides twice the predicted finish, in which a poor trial can be made good."""

_KNOWN: Final = 25.0
"""Outcomes, the prior's among them, after which a node is known: trials of a poor one end there."""

Rank = tuple[float | bool | tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Those that pass, in the order in which they are tried.

    Attributes:
        ranked: Best first.
        competing: How many of them are within the window.
        explored: Whose turn exploration made it, if it did.
        floor: Similarity below which a candidate is too poor a substitute for the best match.
    """

    ranked: list[Candidate]
    floor: float
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
    """Put those that pass in order, without poor substitutes for what is busy or forbidden.

    Args:
        request: What is asked.
        relevant: Candidates at or above the threshold, with their standing.
        scorer: Weighs them.
        weights: Weights of the score.
        window: Similarity below the best within which terms decide.
        now: UTC milliseconds.
    """
    best = max((one.offer.sim for one in relevant if may_be_meant(one)), default=0.0)
    floor = best - weights.substitute
    passing = []
    for one in relevant:
        if one.failed:
            continue
        if one.offer.sim < floor:
            one.verdict = (
                f"no substitute: {best - one.offer.sim:.3f} less similar than"
                f" the best match, {weights.substitute:.3f} is the most"
            )
            continue
        passing.append(one)
    scales = Scales(passing or relevant)
    for one in relevant:
        scorer.weigh(one, scales)
    if not passing:
        return Ranking([], floor)
    edge = max(one.standing for one in passing) - window
    order = _order(request.task.prefer, scales, request.deadline - now)
    near = sorted((one for one in passing if one.standing >= edge), key=order)
    far = sorted(
        (one for one in passing if one.standing < edge),
        key=lambda one: (-one.standing, *order(one)),
    )
    return Ranking([*near, *far], floor, competing=len(near))


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
    """Now and then let a node try that is as similar as the best and has had little to do.

    Of several it is drawn by how good each may be. The best does not take part: one that has done
    well many times would win every draw against one that nothing is known of. Never against a wish
    (a preference, a session, haste, a high priority), a gate or the meaning.

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
    if wishes or left_ms < _LEISURE_MS or chance.random() >= share or not ranking.ranked:
        return ranking
    best, *others = ranking.ranked[: ranking.competing]
    drawn, hope = best, -1.0
    for one in others:
        record = one.offer.record
        who = record.node, record.function, now
        if (
            abs(one.offer.sim - best.offer.sim) > _EQUAL
            or 2 * (one.finish.total_ms or 0.0) + _LEISURE_MS > left_ms
            or sum(reputation.belief(*who, skills=record.skills)) >= _KNOWN
        ):
            continue
        draw = reputation.draw(*who, chance, skills=record.skills)
        if draw > hope:
            drawn, hope = one, draw
    if drawn is best:
        return ranking
    rest = [one for one in ranking.ranked if one is not drawn]
    return replace(ranking, ranked=[drawn, *rest], explored=drawn)
