"""What the router writes about a task: to the node it asks and to the client. Pure."""

import json

from capability_schemas.errors import FoamError
from capability_schemas.invocation import Invocation
from capability_schemas.reply import ErrorEvent, Result, Routed, Timing
from capability_schemas.task import TaskPolicy
from capability_schemas.wire import encode
from router.events import Announce, Draft, End, Invoke
from router.intake import Arrival


def make_invocation(
    arrival: Arrival,
    action: Invoke,
    *,
    policy: TaskPolicy,
    router: str,
    now: int,
    priority: int | None = None,
) -> Invocation:
    """Return the order to a node to run a task.

    Args:
        arrival: The task.
        action: Who is asked, and on what terms.
        policy: What is demanded of whomever the function asks itself.
        router: Who hears the report.
        now: UTC milliseconds.
        priority: To what its priority has risen while it waited; None: it has not.
    """
    task = arrival.task
    return Invocation(
        task=arrival.task_id,
        client=arrival.client,
        router=router,
        attempt=action.attempt,
        function=action.choice.function,
        version=action.choice.version,
        text=task.text,
        input=task.input,
        deadline=arrival.deadline,
        reply=arrival.reply,
        seq=action.seq,
        stream=task.stream,
        priority=task.priority if priority is None else priority,
        session=task.session,
        policy=None if policy == TaskPolicy() else policy,
        cascade=action.cascade,
        continuation=action.continuation,
        hold=action.hold,
        proof=task.proof,
        trace=task.trace,
        sent_at=now,
    )


def make_routed(arrival: Arrival, action: Invoke | Announce, now: int) -> Routed:
    """Return the event that tells the client who is asked, and why."""
    choice = action.choice
    return Routed(
        task=arrival.task_id,
        at=now,
        node=choice.node,
        function=choice.function,
        version=choice.version,
        score=choice.score,
        attempt=action.attempt,
        reason=choice.reason,
        probability=choice.probability,
        margin=choice.margin,
        ambiguous=choice.ambiguous,
    )


def make_final(arrival: Arrival, end: End, now: int) -> bytes:
    """Return the final event of a task that no node has told the end of: a draft or an error."""
    if end.draft is not None:
        return encode(_answer(arrival, end, end.draft, now))
    error = end.error or FoamError("the task ended without a word")
    return encode(
        ErrorEvent.from_error(error, task=arrival.task_id, at=now, seq=end.seq, attempt=end.attempt)
    )


def _answer(arrival: Arrival, end: End, draft: Draft, now: int) -> Result:
    step = draft.step
    return Result(
        task=arrival.task_id,
        at=now,
        seq=end.seq,
        # The last attempt, not that of the draft: readers pass over one below what they have seen.
        attempt=end.attempt,
        output=json.loads(draft.output),
        node=step.node,
        function=step.function,
        version=step.version,
        usage=draft.usage,
        timing=None if step.total_ms is None else Timing(total_ms=step.total_ms),
        confidence=step.confidence,
        digest=draft.digest,
        cascade=end.steps or None,
    )
