"""Settings of a router: weights, limits and time limits, with the reasons for their defaults."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from capability_schemas.task import TASK_LIMIT_BYTES

_MIB: Final = 1024 * 1024

Milliseconds = Annotated[int, Field(ge=0, le=86_400_000)]
Weight = Annotated[float, Field(ge=0, le=10)]


class Weights(BaseModel):
    """Weights of the score (PROTOCOL section 4).

    The bias for cost and load is small on purpose: with random costs an additive weight of 0.05
    lost 0.2 points of R@1 on labelled requests, 0.2 lost 6. It decides between nodes that offer
    the same, not between meanings.

    Attributes:
        cost: Of the price, relative to the dearest candidate.
        load: Of the share of the node's places that are taken.
        affinity: Bonus of the node that served the session last.
        cold: Shortfall weight of a function without a live instance.
        degraded: Shortfall weight of a function whose instances keep crashing.
        substitute: How much less similar than the best match a substitute for it may be. A node
            that is merely busy is not replaced by one that does something else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cost: Weight = 0.05
    load: Weight = 0.05
    affinity: Weight = 0.05
    cold: Weight = 0.02
    degraded: Weight = 1.0
    substitute: Weight = 0.15


class RouterSettings(BaseModel):
    """What a router may take, keep and wait for.

    Attributes:
        task_limit_bytes: Largest task.
        live_limit: Tasks accepted and not yet ended; further ones get ``overloaded``.
        queue_limit: Messages waiting in one subscription.
        candidates: Distinct capabilities taken from the search for one task.
        nearest: Near misses named in ``no_capable_node``.
        attempts: Most nodes tried for one task.
        report_timeout_ms: How long a node may leave an invocation unanswered, on top of the
            measured round trip.
        cancel_grace_ms: How long a node has to end a cancelled task itself.
        deadline_grace_ms: How long it has to say that the deadline has passed.
        finish_grace_ms: How long a final event may lag behind the report of it.
        settle_ms: How long a restarted router listens before it takes up unfinished tasks, and at
            most before it chooses a node for the first time.
        quiet_ms: Catalogue and presence count as complete when nothing has come for so long.
        heartbeat_s: Interval of a node's load where its birth names none.
        missed_heartbeats: So many missed in a row mean that the node is gone.
        sweep_s: Interval of liveness checks and housekeeping.
        shown_events: Chunks kept per live task for ``resume``; the oldest go first.
        shown_bytes: Bytes of chunks kept per live task.
        recent_bytes: Bytes of chunks kept for tasks that have ended.
        retention_s: How long an outcome is kept for the same id again.
        retained_tasks: Most outcomes kept; the oldest go first.
        ledger_bytes: Largest ledger file.
        calibration_delay_s: Quiet time after a change of the catalogue before the threshold is
            fitted anew.
        weights: Weights of the score.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task_limit_bytes: Annotated[int, Field(ge=1024, le=64 * _MIB)] = TASK_LIMIT_BYTES
    live_limit: Annotated[int, Field(ge=1)] = 10_000
    queue_limit: Annotated[int, Field(ge=1)] = 10_000
    candidates: Annotated[int, Field(ge=1, le=64)] = 8
    nearest: Annotated[int, Field(ge=0, le=16)] = 3
    attempts: Annotated[int, Field(ge=1, le=16)] = 5
    report_timeout_ms: Milliseconds = 1_000
    cancel_grace_ms: Milliseconds = 1_000
    deadline_grace_ms: Milliseconds = 300
    finish_grace_ms: Milliseconds = 1_000
    settle_ms: Milliseconds = 1_500
    quiet_ms: Milliseconds = 250
    heartbeat_s: Annotated[float, Field(gt=0)] = 5.0
    missed_heartbeats: Annotated[int, Field(ge=1)] = 3
    sweep_s: Annotated[float, Field(gt=0)] = 0.5
    shown_events: Annotated[int, Field(ge=1)] = 4_096
    shown_bytes: Annotated[int, Field(ge=1024)] = 2 * _MIB
    recent_bytes: Annotated[int, Field(ge=0)] = 16 * _MIB
    retention_s: Annotated[float, Field(gt=0)] = 3_600.0
    retained_tasks: Annotated[int, Field(ge=1)] = 100_000
    ledger_bytes: Annotated[int, Field(ge=_MIB // 8)] = 1024 * _MIB
    calibration_delay_s: Annotated[float, Field(ge=0)] = 1.0
    weights: Weights = Weights()
