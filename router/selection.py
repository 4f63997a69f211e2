"""Which node gets a task, and why. Pure: nothing it is given changes.

::

    offers ─ gates ─ standing ─ window and terms ─ exploration ─▶ choices, or why there are none

``gates`` says who may, ``score`` how well each would do, ``ranking`` in which order they are tried,
``nobody`` why none is. The calibrated threshold holds for the similarity. A candidate that is only
busy, away or forbidden is not replaced by one that is much less similar: better a clear
``overloaded`` or ``policy_denied`` than an answer from the wrong function.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from capability_schemas.errors import FoamError
from registry.calibration import Calibration
from router.breaker import Breakers
from router.candidates import Candidate, Offer, Request, short
from router.events import Choice
from router.gates import GATES, PASSING_GATES, PLAIN_GATES, Gatekeeper, may_be_meant
from router.nobody import waits_for, why_nobody
from router.ranking import Ranking, explore, rank
from router.reputation import Reputation
from router.score import Scorer
from router.settings import Weights
from router.waiting import Place

ENOUGH: Final = 32
"""Nodes of one capability that pass and are weighed against each other. The best of two drawn at
random is nearly as good as the best of all (Mitzenmacher, IEEE TPDS 12(10), 2001); of 32 the more
so, and thousands cost no more than these."""

_SPARE: Final = 4
"""The same for a capability that can only stand in for a better one."""

_FOR_THE_MOMENT: Final = 512
"""Nodes of one capability found busy, too slow or left alone for the moment, after which the others
are not asked about: where one in a hundred is free, one is met among these but for six in a
thousand, and the client tries again."""

_PLAIN: Final = 64
"""Nodes of one capability that plainly fail and are looked at, to say why."""

_THOROUGH: Final = 64
"""Offers that are taken through every gate, so that the explanation is complete."""

_SHOWN: Final = 64
"""Candidates an explanation shows."""

_MOMENT: Final = frozenset(PASSING_GATES)


@dataclass(frozen=True, slots=True)
class Selection:
    """The outcome of one selection.

    Attributes:
        choices: Candidates, best first.
        problem: Why there are none.
        explain: Makes the explanation, which a task need not wait for.
        min_confidence: Least confidence of an answer, of the task or else of the rules.
        probability: Chance that the best choice is the function meant; None when it was named.
        margin: By how much its similarity exceeds that of the next other function.
        ambiguous: Whether that is so little that another function may well be meant.
        places: Who could do it but has no room at the moment.
        start_by: When the last of them can no longer end in time, UTC milliseconds.
    """

    choices: tuple[Choice, ...]
    problem: FoamError | None
    explain: Callable[[], dict[str, Any]]
    min_confidence: float | None = None
    probability: float | None = None
    margin: float | None = None
    ambiguous: bool = False
    places: frozenset[Place] = frozenset()
    start_by: int | None = None

    @property
    def explanation(self) -> dict[str, Any]:
        """Every candidate with every gate and term, as JSON."""
        return self.explain()


@dataclass(frozen=True, slots=True)
class Meant:
    """How sure it is that a function is the one meant."""

    probability: float | None = None
    margin: float | None = None
    ambiguous: bool = False


def select(
    request: Request,
    groups: Iterable[Iterable[Offer]],
    *,
    calibration: Calibration,
    weights: Weights,
    nearest: int,
    now: int,
    reputation: Reputation | None = None,
    breakers: Breakers | None = None,
    chance: Random | None = None,
) -> Selection:
    """Judge offers and rank those that pass.

    Args:
        request: What is asked.
        groups: What was found, by capability, the most similar first; within each those in front
            that are worth most, behind them what ``glance`` sorts out, in the order of ``Outlook``.
            A group is left when enough of it pass, or none does and the rest is no better.
        calibration: Threshold, window and probability of the search; not used for a named function.
        weights: Weights of the score, where the task brings none of its own.
        nearest: Near misses to name when nobody passes.
        now: UTC milliseconds.
        reputation: What nodes have done so far.
        breakers: Who is left alone for not answering.
        chance: What draws for exploration; without it nothing is explored.
    """
    weights = weights.for_task(request.task.weights)
    window = calibration.window if weights.window is None else weights.window
    threshold = 0.0 if request.function else calibration.threshold
    gatekeeper = Gatekeeper(request, now=now, breakers=breakers)
    scorer = Scorer(request, gatekeeper, weights=weights, now=now, reputation=reputation)
    judged, more = _judge(groups, gatekeeper, scorer, window=window, threshold=threshold)
    relevant = [one for one in judged if one.offer.sim >= threshold]
    ranking = rank(request, relevant, scorer, weights=weights, window=window, now=now)
    if reputation is not None and chance is not None and weights.exploration > 0:
        ranking = explore(
            ranking, request, reputation, share=weights.exploration, now=now, chance=chance
        )
    _say_verdicts(judged, threshold)
    problem = (
        None
        if ranking.ranked
        else why_nobody(request, judged, threshold=threshold, floor=ranking.floor, nearest=nearest)
    )
    places, start_by = waits_for(
        judged, threshold=threshold, floor=ranking.floor, deadline=request.deadline
    )
    meant = _meanings(request, ranking.ranked, judged, calibration)
    first = meant[0] if meant else Meant()
    min_confidence = request.task.min_confidence
    if min_confidence is None:
        min_confidence = request.effect.min_confidence

    def explain() -> dict[str, Any]:
        return {
            "by": "name" if request.function else "meaning",
            "threshold": short(threshold),
            "window": short(window),
            "prefer": request.task.prefer,
            "weights": weights.model_dump(),
            "rules": request.effect.describe(),
            "probability": short(first.probability),
            "margin": short(first.margin),
            "ambiguous": first.ambiguous,
            **_describe(ranking, problem),
            "candidates": [one.describe(GATES) for one in _in_order(ranking, judged)[:_SHOWN]],
            "looked_at": len(judged),
            "more": more,
        }

    return Selection(
        choices=tuple(
            _choice(one, place, ranking, sure)
            for place, (one, sure) in enumerate(zip(ranking.ranked, meant, strict=True))
        ),
        problem=problem,
        explain=explain,
        min_confidence=min_confidence,
        probability=first.probability,
        margin=first.margin,
        ambiguous=first.ambiguous,
        places=places,
        start_by=start_by,
    )


def _judge(
    groups: Iterable[Iterable[Offer]],
    gatekeeper: Gatekeeper,
    scorer: Scorer,
    *,
    window: float,
    threshold: float,
) -> tuple[list[Candidate], bool]:
    """Return the candidates looked at, and whether some were not."""
    judged: list[Candidate] = []
    kinds: Counter[frozenset[str]] = Counter()
    best, more = 0.0, False
    for group in groups:
        passed = plain = passing = 0
        for looked, offer in enumerate(group):
            relevant = offer.sim >= threshold
            # It stands at its similarity at the most.
            enough = ENOUGH if offer.sim >= best - window else _SPARE
            if (
                passed >= enough
                or plain >= _PLAIN
                or passing >= _FOR_THE_MOMENT
                or (not relevant and looked >= _SPARE)
            ):
                more = True
                break
            thorough = len(judged) < _THOROUGH
            one = gatekeeper.judge(offer, thorough=thorough)
            if one.failed:
                plain += not PLAIN_GATES.isdisjoint(one.failed)
                passing += _MOMENT.issuperset(one.failed)
                kind = frozenset(one.failed)
                kinds[kind] += 1
                if kinds[kind] > _SPARE and not thorough:  # there are enough like it to say why
                    more = True
                    continue
            scorer.stand(one)
            judged.append(one)
            if not one.failed:
                passed += 1
                best = max(best, one.standing)
    return judged, more


def _say_verdicts(judged: Sequence[Candidate], threshold: float) -> None:
    for one in judged:
        if one.offer.sim < threshold:
            one.verdict = (
                f"similarity {one.offer.sim:.3f} is {threshold - one.offer.sim:.3f} below the"
                f" threshold {threshold:.3f}"
            )
        elif one.failed:
            one.verdict = "; ".join(f"{gate}: {why}" for gate, why in one.failed.items())


def _meanings(
    request: Request,
    ranked: Sequence[Candidate],
    judged: Sequence[Candidate],
    calibration: Calibration,
) -> list[Meant]:
    """Tell for each of those ranked how sure it is that its function is meant.

    Every function of the kind that is asked for speaks against the others, be it busy, forbidden or
    below the threshold.
    """
    if request.function is not None or not ranked:
        return [Meant() for _ in ranked]
    rivals: dict[str, Offer] = {}
    for one in judged:
        if not may_be_meant(one):
            continue
        rival = rivals.setdefault(one.offer.record.function, one.offer)
        if one.offer.sim > rival.sim:
            rivals[one.offer.record.function] = one.offer

    def margin_of(offer: Offer) -> float:
        others = (rival.sim for rival in rivals.values() if not rival.is_same(offer))
        return offer.sim - max(others, default=0.0)

    first = max(rivals.values(), key=lambda rival: rival.sim)
    sure = calibration.probability(first.sim, margin_of(first))
    top = max(one.offer.sim for one in ranked)
    known: dict[tuple[str, str, float], Meant] = {}
    meanings: list[Meant] = []
    for one in ranked:
        offer = one.offer
        key = offer.record.function, offer.capability, offer.sim
        if key not in known:
            margin = margin_of(offer)
            probability = calibration.probability(offer.sim, max(0.0, margin))
            known[key] = Meant(
                # Of two functions no more than one is meant.
                probability=probability if margin >= 0 else min(probability, 1.0 - sure),
                margin=margin,
                ambiguous=offer.sim >= top - calibration.window and margin < calibration.window,
            )
        meanings.append(known[key])
    return meanings


def _choice(one: Candidate, place: int, ranking: Ranking, sure: Meant) -> Choice:
    record = one.offer.record
    return Choice(
        node=record.node,
        function=record.function,
        version=record.version,
        score=short(one.value) or 0.0,
        reason=_reason(one, place, ranking, sure),
        sim=one.offer.sim,
        cost=record.cost.money,
        finish_ms=one.finish.total_ms,
        external=record.policy.external,
        strength=float(record.resources.memory_bytes or 0),
        probability=sure.probability,
        margin=sure.margin,
        ambiguous=sure.ambiguous,
        continues=record.continues,
        model=record.model.digest if record.model is not None else None,
        idempotent=record.idempotent,
    )


def _reason(one: Candidate, place: int, ranking: Ranking, sure: Meant) -> str:
    """Return why it is chosen, in words."""
    named = one.offer.dense is None
    parts = ["named" if named else f"similarity {one.offer.sim:.2f}"]
    if sure.probability is not None:
        parts.append(f"probability {sure.probability:.2f}")
    if sure.ambiguous:
        parts.append(f"ambiguous by a margin of {sure.margin:.3f}")
    parts.append(f"load {one.terms['load']:.2f}")
    if one.terms["affinity"]:
        parts.append("served the session before")
    if one is ranking.explored:
        parts.append("explored")
    among = len(ranking.ranked)
    if among == 1:
        return ", ".join(parts)
    which = f"best of {among}" if place == 0 else f"number {place + 1} of {among}"
    return f"{', '.join(parts)}; {which}"


def _describe(ranking: Ranking, problem: FoamError | None) -> dict[str, Any]:
    best = ranking.ranked[0].offer.record if ranking.ranked else None
    tried = ranking.explored.offer.record if ranking.explored else None
    return {
        "chosen": [best.node, best.function] if best else None,
        "competing": ranking.competing,
        "explored": [tried.node, tried.function] if tried else None,
        "problem": _told(problem) if problem else None,
    }


def _told(problem: FoamError) -> dict[str, Any]:
    """Return why nobody was chosen; ``waits_for`` names a node that will be back in time."""
    told: dict[str, Any] = {"code": problem.code.value, "message": problem.message}
    if problem.retryable and "wake_at" in problem.detail:
        told["waits_for"] = problem.detail.get("node")
    return told


def _in_order(ranking: Ranking, judged: Sequence[Candidate]) -> list[Candidate]:
    """Return those that pass as they are tried, then the others by similarity."""
    passing = {id(one) for one in ranking.ranked}
    others = [one for one in judged if id(one) not in passing]
    others.sort(key=lambda one: (-one.offer.sim, -one.value, one.offer.record.key))
    return [*ranking.ranked, *others]
