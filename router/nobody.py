"""Why nobody gets a task: of all reasons the one that the client can do most about. Pure.

In this order: nobody is meant; everybody who may and could is away, busy or too slow at the moment;
the policy forbids; nobody fits. Each names the nearest misses.
"""

from collections.abc import Sequence
from typing import Any, Final

from capability_schemas.errors import (
    DeadlineExceeded,
    FoamError,
    InvalidTask,
    NoCapableNode,
    Overloaded,
    PolicyDenied,
)
from router.candidates import Candidate, Request, short
from router.gates import FIT_GATES, PASSING_GATES, POLICY_GATES, may_be_meant
from router.waiting import Place

_INPUT_GATES: Final = frozenset({"schema", "size", "context"})
_RETURN_GATES: Final = frozenset({"asleep", "lost"})
_AWAY_GATES: Final = _RETURN_GATES | {"liveness", "open", "breaker"}
_BUSY_GATES: Final = frozenset({"capacity", "memory"})
_WAITABLE: Final = _BUSY_GATES | _RETURN_GATES
_MOST_PLACES: Final = 128
_LEAST_RETRY_MS: Final = 500
_MOST_RETRY_MS: Final = 60_000


def why_nobody(
    request: Request,
    judged: Sequence[Candidate],
    *,
    threshold: float,
    floor: float,
    nearest: int,
) -> FoamError:
    """Return the error for a task that nobody gets.

    Args:
        request: What was asked.
        judged: Everything that was found, judged, with verdicts; none of it passes.
        threshold: Lowest similarity that counts as an answer.
        floor: Similarity below which a candidate does not stand in for the best match.
        nearest: Near misses to name.
    """
    by_sim = sorted(judged, key=lambda one: -one.offer.sim)
    misses = _misses(by_sim, nearest)
    relevant = [one for one in by_sim if one.offer.sim >= threshold]
    if not relevant:
        near = f"; the nearest is {_name(by_sim[0])}" if by_sim else ""
        return NoCapableNode(
            f"nobody offers this: no similarity reaches {threshold:.3f}{near}", nearest=misses
        )
    meant = [one for one in relevant if one.offer.sim >= floor and may_be_meant(one)]
    able = [one for one in meant if not one.failed.keys() - set(PASSING_GATES)]
    if able:
        return _momentary(able, request.deadline, misses)
    barred = [one for one in meant if not one.failed.keys() & set(FIT_GATES)]
    allowed = [one for one in relevant if not one.failed.keys() & set(POLICY_GATES)]
    if barred or not allowed:
        return _denied(barred or relevant, misses)
    in_range = [one for one in allowed if not one.failed.keys() - _INPUT_GATES - set(PASSING_GATES)]
    if request.function is not None and in_range:
        return _refused_input(in_range[0], misses)
    return NoCapableNode(f"nobody fits: {allowed[0].verdict}", nearest=misses)


def waits_for(
    judged: Sequence[Candidate], *, threshold: float, floor: float, deadline: int
) -> tuple[frozenset[Place], int | None]:
    """Return who could do it but has no room, sleeps or was just lost, and how long it can wait.

    Args:
        judged: Everything that was found, judged.
        threshold: Lowest similarity that counts as an answer.
        floor: Similarity below which a candidate does not stand in for the best match.
        deadline: Of the task, UTC milliseconds.

    Returns:
        Places, the most promising of many, and when to look again at the latest, UTC milliseconds:
        when the last of them can no longer end in time, or is gone for good, where all were just
        lost. None without any.
    """
    least = max(threshold, floor)
    full = [
        one
        for one in judged
        if one.failed
        and one.failed.keys() <= _WAITABLE
        and one.offer.sim >= least
        and may_be_meant(one)
    ][:_MOST_PLACES]
    if not full:
        return frozenset(), None
    places = frozenset((one.offer.record.node, one.offer.record.function) for one in full)
    start_by = deadline - int(min(one.finish.least_run_ms for one in full)) + 1
    if all("lost" in one.failed for one in full):
        start_by = min(start_by, max(one.offer.node.back_by or 0 for one in full))
    return places, start_by


def _denied(relevant: Sequence[Candidate], misses: list[dict[str, Any]]) -> FoamError:
    only_rules = all(one.failed.keys() & set(POLICY_GATES) == {"rules"} for one in relevant)
    whose = "routing rules exclude" if only_rules else "policy of the task excludes"
    return PolicyDenied(f"the {whose} every node that could: {relevant[0].verdict}", nearest=misses)


def _momentary(able: Sequence[Candidate], deadline: int, misses: list[dict[str, Any]]) -> FoamError:
    """Everyone who could is away, busy or too slow at the moment."""
    there = [one for one in able if not one.failed.keys() & _AWAY_GATES]
    hopeless = all("deadline" in one.failed and not one.finish.wait_ms for one in there)
    returning = [
        one
        for one in able
        if one.failed.keys() & _RETURN_GATES and one.failed.keys() <= _WAITABLE | {"deadline"}
    ]
    if hopeless and returning:
        error = _returning(returning, deadline, misses)
        if error is not None:
            return error
    if not there:
        return NoCapableNode(
            f"every node that could is away: {able[0].verdict}", retryable=True, nearest=misses
        )
    busy = [
        one
        for one in there
        if one.failed.keys() & _BUSY_GATES or ("deadline" in one.failed and one.finish.wait_ms)
    ]
    if busy:
        soonest = min(one.finish.wait_ms for one in busy)
        return Overloaded(
            f"every node that could is busy: {busy[0].verdict}",
            retry_after_ms=int(min(_MOST_RETRY_MS, max(_LEAST_RETRY_MS, soonest))),
            nearest=misses,
        )
    quickest = min(there, key=lambda one: one.finish.least_ms)
    return DeadlineExceeded(f"nobody can do it in time: {quickest.verdict}", nearest=misses)


def _returning(
    away: Sequence[Candidate], deadline: int, misses: list[dict[str, Any]]
) -> FoamError | None:
    """Everyone who could do it in time sleeps or was just lost; the task may wait for the first.

    None: nobody sleeps, and too little time is left for whoever was lost.
    """
    expected = [(back_at, one) for one in away if (back_at := _back_at(one, deadline)) is not None]
    if expected:
        back_at, first = min(expected, key=lambda pair: pair[0])
        node, asleep = first.offer.record.node, first.failed.get("asleep")
        why = f"is {asleep}" if asleep else f"was lost {first.failed['lost']}"
        return NoCapableNode(
            f"{node} could, but {why}",
            retryable=True,
            node=node,
            wake_at=back_at,
            nearest=misses,
        )
    sleepers = [one for one in away if "asleep" in one.failed]
    if not sleepers:
        return None
    first = sleepers[0]
    node = first.offer.record.node
    if first.offer.node.wake_at is None:
        return NoCapableNode(
            f"{node} could, but is {first.failed['asleep']}", retryable=True, nearest=misses
        )
    return DeadlineExceeded(
        f"{node} could, but is {first.failed['asleep']}, too late for this task: give it "
        "more time (timeout_ms; foam ask --timeout)",
        node=node,
        wake_at=first.offer.node.wake_at,
        nearest=misses,
    )


def _back_at(one: Candidate, deadline: int) -> int | None:
    """Return when a node that is away will be back, if that is known and not too late."""
    node = one.offer.node
    if "lost" in one.failed:
        return None if "deadline" in one.failed else node.back_by
    wake_at = node.wake_at
    in_time = wake_at is not None and wake_at + one.finish.least_ms <= deadline
    return wake_at if in_time else None


def _refused_input(one: Candidate, misses: list[dict[str, Any]]) -> FoamError:
    record = one.offer.record
    gate = next(gate for gate in FIT_GATES if gate in one.failed)
    why = one.failed[gate]
    return InvalidTask(
        f"{record.function} {record.version} does not take this input: {why}",
        field=why.partition(":")[0] if gate == "schema" else "input",
        nearest=misses,
    )


def _misses(by_sim: Sequence[Candidate], nearest: int) -> list[dict[str, Any]]:
    """Name the nearest; many nodes that miss with one function for one reason are one miss."""
    misses: dict[tuple[str, str], dict[str, Any]] = {}
    for one in by_sim:
        if len(misses) >= nearest:
            break
        record = one.offer.record
        misses.setdefault(
            (record.function, one.verdict),
            {
                "function": record.function,
                "node": record.node,
                "score": short(one.offer.sim),
                "reason": one.verdict,
            },
        )
    return list(misses.values())


def _name(one: Candidate) -> str:
    return f"{one.offer.record.function} with {one.offer.sim:.3f}"
