"""Which node gets a task: gates, score, and the reasons for both. Pure.

Score (PROTOCOL section 4, after Federation of Agents, arXiv 2509.20175, equation 2)::

    alpha = gates · max(0, sim) · exp(-Σ w·shortfall) · (1 + cos(spec)) / 2
    value = alpha - λ_cost·cost - λ_load·load + λ_affinity·affinity

``sim`` is the mixed similarity of the search (1 when the function is named), ``cos(spec)`` is 1
as long as tasks carry no specification vector. The calibrated threshold holds for ``sim``. Gates
are never waived. A candidate that is only busy or away is not replaced by one that is much less
similar: better a clear ``overloaded`` than an answer from the wrong function.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import (
    DeadlineExceeded,
    FoamError,
    InvalidTask,
    NoCapableNode,
    Overloaded,
    PolicyDenied,
)
from capability_schemas.functions import check_input, effective_input
from capability_schemas.task import FunctionRef, Task, TaskPolicy
from router.catalogue import NodeView
from router.events import Choice
from router.settings import Weights

POLICY_GATES = ("zones", "data", "grants", "local", "cost")
PASSING_GATES = ("memory", "liveness", "open", "capacity", "deadline")
"""Gates that a node fails for the moment only."""

_BUSY_GATES = frozenset({"capacity", "memory"})


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the selection.

    Attributes:
        task: The task.
        function: Function addressed by name, if any.
        deadline: UTC milliseconds.
        prefer: Node that served the session last, if any.
    """

    task: Task
    function: FunctionRef | None
    deadline: int
    prefer: str | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """One capability on one node, as found.

    Attributes:
        record: The admitted record.
        node: The node as it stands.
        sim: Mixed similarity, 0 to 1; 1 when addressed by name.
        dense: Cosine part of it, if searched.
        lexical: Word part of it, if searched.
    """

    record: CatalogRecord
    node: NodeView
    sim: float = 1.0
    dense: float | None = None
    lexical: float | None = None


@dataclass(slots=True)
class Candidate:
    """One offer judged.

    Attributes:
        offer: What was judged.
        failed: Gates it failed, with the reason each.
        terms: Terms of the score.
        value: Rank value.
        verdict: ``candidate``, or why it is none.
    """

    offer: Offer
    failed: dict[str, str]
    terms: dict[str, float] = field(default_factory=dict)
    value: float = 0.0
    verdict: str = "candidate"

    def describe(self) -> dict[str, Any]:
        """Return it as JSON: every gate and every term."""
        record = self.offer.record
        gates = (*POLICY_GATES, "version", "skills", "schema", "size", *PASSING_GATES)
        return {
            "node": record.node,
            "function": record.function,
            "version": record.version,
            "similarity": {
                "score": _short(self.offer.sim),
                "dense": _short(self.offer.dense),
                "lexical": _short(self.offer.lexical),
            },
            "gates": {gate: self.failed.get(gate, "pass") for gate in gates},
            "terms": {name: _short(value) for name, value in self.terms.items()},
            "value": _short(self.value),
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True)
class Selection:
    """The outcome of one selection.

    Attributes:
        choices: Candidates, best first.
        problem: Why there are none.
        explain: Makes the explanation, which a task need not wait for.
    """

    choices: tuple[Choice, ...]
    problem: FoamError | None
    explain: Callable[[], dict[str, Any]]

    @property
    def explanation(self) -> dict[str, Any]:
        """Every candidate with every gate and term, as JSON."""
        return self.explain()


def select(
    request: Request,
    offers: Sequence[Offer],
    *,
    threshold: float,
    weights: Weights,
    nearest: int,
    now: int,
) -> Selection:
    """Judge offers and rank those that pass.

    Args:
        request: What is asked.
        offers: What was found; any order.
        threshold: Lowest similarity that counts as an answer.
        weights: Weights of the score.
        nearest: Near misses to name when nobody passes.
        now: UTC milliseconds.
    """
    judged = [Candidate(offer, failed_gates(request, offer, now)) for offer in offers]
    dearest = max((offer.record.cost.money for offer in offers), default=0.0)
    for one in judged:
        _score(one, request, dearest, weights)
    relevant = [one for one in judged if one.offer.sim >= threshold]
    for one in judged:
        if one.offer.sim < threshold:
            one.verdict = f"similarity {one.offer.sim:.3f} is below the threshold {threshold:.3f}"
        elif one.failed:
            one.verdict = "; ".join(f"{gate}: {why}" for gate, why in one.failed.items())
    ranked = _rank(relevant, weights)
    problem = None if ranked else _problem(request, judged, relevant, threshold, nearest)
    judged.sort(key=lambda one: (one.verdict != "candidate", -one.offer.sim, -one.value))

    def explain() -> dict[str, Any]:
        best = ranked[0].offer.record if ranked else None
        return {
            "by": "name" if request.function else "meaning",
            "threshold": _short(threshold),
            "weights": weights.model_dump(),
            "chosen": [best.node, best.function] if best else None,
            "problem": {"code": problem.code.value, "message": problem.message}
            if problem
            else None,
            "candidates": [one.describe() for one in judged],
        }

    return Selection(
        choices=tuple(_choice(one, len(ranked)) for one in ranked),
        problem=problem,
        explain=explain,
    )


# ---- gates


def failed_gates(request: Request, offer: Offer, now: int) -> dict[str, str]:
    """Return the gates an offer fails, each with the reason; empty when it may run the task.

    Args:
        request: What is asked.
        offer: What is judged.
        now: UTC milliseconds.
    """
    failed = _failed_policy(request.task.policy, offer.record)
    failed |= _failed_fit(request, offer.record)
    return failed | _failed_moment(request, offer, now)


def _failed_policy(policy: TaskPolicy, record: CatalogRecord) -> dict[str, str]:
    failed: dict[str, str] = {}
    attested = record.policy
    if policy.zones is not None and not set(policy.zones) & set(attested.zones):
        failed["zones"] = f"stands in {_words(attested.zones)}, not in {_words(policy.zones)}"
    if policy.data is not None and policy.data not in attested.data:
        failed["data"] = f"not cleared for {policy.data} data"
    missing = set(policy.grants) - set(attested.grants)
    if missing:
        failed["grants"] = f"lacks {_words(sorted(missing))}"
    if policy.local_only and attested.external:
        failed["local"] = "hands the task to a service outside the site"
    if policy.max_cost is not None and record.cost.money > policy.max_cost:
        failed["cost"] = f"costs {record.cost.money:g}, at most {policy.max_cost:g} allowed"
    return failed


def _failed_fit(request: Request, record: CatalogRecord) -> dict[str, str]:
    failed: dict[str, str] = {}
    task = request.task
    if request.function is not None and not request.function.admits(record.version):
        failed["version"] = f"{record.version} is not in {request.function.range}"
    missing = set(task.skills) - set(record.skills)
    if missing:
        failed["skills"] = f"lacks {_words(sorted(missing))}"
    try:
        check_input(
            effective_input(task.text, task.input, record.input_schema), record.input_schema
        )
    except InvalidTask as error:
        failed["schema"] = error.message
    limit = record.resources.max_input_bytes
    if limit is not None:
        size = len(task.model_dump_json(include={"text", "input"}).encode())
        if size > limit:
            failed["size"] = f"input of {size} bytes, takes {limit}"
    return failed


def _failed_moment(request: Request, offer: Offer, now: int) -> dict[str, str]:
    failed: dict[str, str] = {}
    record, node = offer.record, offer.node
    if not node.live:
        failed["liveness"] = "silent" if node.silent else (node.presence or "never heard of")
    elif record.expires_at is not None and record.expires_at <= now:
        failed["liveness"] = "the lease of the capability has run out"
    if node.presence == "draining":
        failed["open"] = "draining"
    elif node.cordoned:
        failed["open"] = "cordoned"
    if node.full:
        failed["capacity"] = "all places and the queue are taken"
    free = node.load.memory_free_bytes if node.load else None
    need = record.resources.memory_bytes
    cold = node.load is not None and not node.function(record.function).instances
    if cold and free is not None and need is not None and need > free:
        failed["memory"] = f"needs {need} bytes, {free} are free"
    wait_ms, first_ms = _expected_ms(offer)
    if now + wait_ms + first_ms > request.deadline:
        left = max(0, request.deadline - now)
        failed["deadline"] = f"first output in {wait_ms + first_ms:.0f} ms, {left} ms are left"
    return failed


def _expected_ms(offer: Offer) -> tuple[float, float]:
    """Return the wait for a place and the time to the first output, from measured figures.

    Admission by prediction, as deadline-aware edge schedulers do it; an unknown counts as zero,
    for the node looks again.
    """
    load = offer.node.function(offer.record.function)
    first_ms = load.first_ms if load.first_ms is not None else offer.record.resources.first_ms
    wait_ms = (load.total_ms or 0.0) * load.queued / load.concurrency
    return wait_ms, first_ms or 0.0


# ---- score


def _score(one: Candidate, request: Request, dearest: float, weights: Weights) -> None:
    offer = one.offer
    load = offer.node.function(offer.record.function)
    cold = float(offer.node.load is not None and load.instances == 0)
    shortfall = weights.cold * cold + weights.degraded * float(load.degraded)
    fit, spec = math.exp(-shortfall), 1.0
    gates = 0.0 if one.failed else 1.0
    alpha = gates * max(0.0, offer.sim) * fit * (1.0 + spec) / 2.0
    cost = offer.record.cost.money / dearest if dearest > 0 else 0.0
    affinity = float(request.prefer == offer.record.node)
    one.terms = {
        "gates": gates,
        "sim": max(0.0, offer.sim),
        "fit": fit,
        "spec": spec,
        "alpha": alpha,
        "cost": cost,
        "load": offer.node.busy,
        "affinity": affinity,
    }
    one.value = (
        alpha - weights.cost * cost - weights.load * offer.node.busy + weights.affinity * affinity
    )


def _rank(relevant: list[Candidate], weights: Weights) -> list[Candidate]:
    """Return those that pass, best first, without poor substitutes for busy nodes."""
    able = [one for one in relevant if not set(one.failed) - set(PASSING_GATES)]
    floor = max((one.offer.sim for one in able), default=0.0) - weights.substitute
    ranked = []
    for one in able:
        if one.failed:
            continue
        if one.offer.sim < floor:
            one.verdict = "no substitute: much less similar than the best match"
            continue
        ranked.append(one)
    ranked.sort(key=lambda one: (-one.value, one.offer.node.busy, one.offer.record.key))
    return ranked


def _choice(one: Candidate, among: int) -> Choice:
    record, terms = one.offer.record, one.terms
    how = "named" if one.offer.dense is None else f"similarity {terms['sim']:.2f}"
    extra = ", served the session before" if terms["affinity"] else ""
    return Choice(
        node=record.node,
        function=record.function,
        version=record.version,
        score=round(one.value, 4),
        reason=f"{how}, load {terms['load']:.2f}{extra}; best of {among}"
        if among > 1
        else f"{how}, load {terms['load']:.2f}{extra}",
    )


# ---- why nobody


def _problem(
    request: Request,
    judged: list[Candidate],
    relevant: list[Candidate],
    threshold: float,
    nearest: int,
) -> FoamError:
    """Name the one reason that the client can do most about."""
    near = sorted(judged, key=lambda one: -one.offer.sim)[:nearest]
    misses = [_miss(one) for one in near]
    if not relevant:
        best = f"; the nearest scores {near[0].offer.sim:.3f}" if near else ""
        return NoCapableNode(
            f"nobody offers this: no similarity reaches {threshold:.3f}{best}", nearest=misses
        )
    allowed = [one for one in relevant if not set(one.failed) & set(POLICY_GATES)]
    if not allowed:
        return PolicyDenied(
            f"the policy of the task excludes every node that could: {relevant[0].verdict}",
            nearest=misses,
        )
    able = [one for one in allowed if not set(one.failed) - set(PASSING_GATES)]
    if able:
        return _momentary(able, misses)
    in_range = [one for one in allowed if not set(one.failed) & {"version", "skills"}]
    if request.function is not None and in_range:
        return _refused_input(in_range[0], misses)
    return NoCapableNode(f"nobody fits: {allowed[0].verdict}", nearest=misses)


def _momentary(able: list[Candidate], misses: list[dict[str, Any]]) -> FoamError:
    """Everyone who could is busy, away or too slow at the moment."""
    there = [one for one in able if not set(one.failed) & {"liveness", "open"}]
    if not there:
        return NoCapableNode(
            f"every node that could is away: {able[0].verdict}", retryable=True, nearest=misses
        )
    busy = [
        one
        for one in there
        if set(one.failed) & _BUSY_GATES
        or ("deadline" in one.failed and _expected_ms(one.offer)[0])
    ]
    if busy:
        waits = [_expected_ms(one.offer)[0] for one in busy]
        return Overloaded(
            f"every node that could is busy: {busy[0].verdict}",
            retry_after_ms=int(min(60_000, max(500, min(waits)))),
            nearest=misses,
        )
    return DeadlineExceeded(f"nobody can do it in time: {there[0].verdict}", nearest=misses)


def _refused_input(one: Candidate, misses: list[dict[str, Any]]) -> FoamError:
    record = one.offer.record
    why = one.failed.get("schema") or one.failed.get("size") or one.verdict
    return InvalidTask(
        f"{record.function} {record.version} does not take this input: {why}",
        field=why.partition(":")[0] if "schema" in one.failed else "input",
        nearest=misses,
    )


def _miss(one: Candidate) -> dict[str, Any]:
    record = one.offer.record
    return {
        "function": record.function,
        "node": record.node,
        "score": _short(one.offer.sim),
        "reason": one.verdict,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _words(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
