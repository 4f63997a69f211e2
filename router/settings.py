"""Settings of a router: weights, limits and time limits, with the reasons for their defaults."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from capability_schemas.errors import ConfigurationError
from capability_schemas.task import TASK_LIMIT_BYTES, RouteWeights
from capability_schemas.wire import first_problem

_MIB: Final = 1024 * 1024

Milliseconds = Annotated[int, Field(ge=0, le=86_400_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Shortfall = Annotated[float, Field(ge=0, le=10)]


class Weights(BaseModel):
    """Weights of the score (PROTOCOL section 4); each refused outside of its range.

    The terms decide between nodes that offer the same, and between meanings that lie within the
    window, never between clear meanings. Even there they are small on purpose. Measured on 3,172
    labelled requests with a random price, energy, run time and load for each of 199 functions: by
    the meaning alone 73.6 % went to the right one first, with these defaults 73.4 %, with the four
    weights at their limit 72.2 %, and 62.6 % with a window of 0.2 besides; the cheapest within 0.02
    73.4 %, within 0.05 71.9 %. Independent terms add up by their squares: the four defaults
    together weigh as much as one of 0.053.

    Attributes:
        cost: Of the price of a call, relative to the dearest candidate.
        energy: Of its energy, relative to the hungriest candidate.
        time: Of the predicted finish, relative to the slowest candidate.
        load: Of the share of the node's places that are taken.
        affinity: Bonus of the node that served the session last.
        reputation: Of what the node has done with the function so far, above or below what a new
            node is trusted with.
        cold: Shortfall weight of a function without a live instance.
        degraded: Shortfall weight of a function whose instances keep crashing.
        context: Shortfall weight of a context that the request may exceed, for the share missing.
        substitute: How much less similar than the best match a substitute for it may be. A node
            that is merely busy is not replaced by one that does something else.
        window: Similarity below the best within which candidates compete by the other terms; None
            for the margin below which the calibration calls a choice ambiguous.
        exploration: Share of the tasks without haste that go to a node with as much to offer as
            the best one, drawn by how good it may be, so that new nodes get their chance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cost: Share = 0.03
    energy: Share = 0.01
    time: Share = 0.03
    load: Share = 0.03
    affinity: Share = 0.05
    reputation: Share = 0.15
    cold: Shortfall = 0.02
    degraded: Shortfall = 1.0
    context: Shortfall = 0.5
    substitute: Share = 0.15
    window: Annotated[float | None, Field(ge=0, le=0.2)] = None
    exploration: Annotated[float, Field(ge=0, le=0.5)] = 0.05

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return these weights with some of them replaced.

        Args:
            changes: New values by name.

        Raises:
            ConfigurationError: An unknown name, or a value outside of its range.
        """
        try:
            return self.model_validate({**self.model_dump(), **changes})
        except ValidationError as exc:
            name = first_problem(exc)[0]
            fields = type(self).model_fields
            if name not in fields:
                raise ConfigurationError(
                    f"no weight {name[:64]!r}: use one of {', '.join(fields)}", weight=name[:64]
                ) from exc
            shape = self.model_json_schema()["properties"][name]
            shape = shape.get("anyOf", [shape])[0]  # of a number or null, the number
            raise ConfigurationError(
                f"weight {name} is {str(changes[name])[:64]}: a number from {shape['minimum']:g} to"
                f" {shape['maximum']:g} is allowed",
                weight=name,
            ) from exc

    def for_task(self, own: RouteWeights) -> Self:
        """Return what holds for a task that brings single weights of its own.

        Args:
            own: Its weights; None leaves the router's.
        """
        set_ = own.model_dump(exclude_none=True)
        return self.model_copy(update=set_) if set_ else self


class ReputationSettings(BaseModel):
    """What outcomes say about nodes.

    Attributes:
        half_life_s: Age at which an outcome counts half.
        prior_good: Good outcomes a new node is taken to have had; with ``prior_bad`` they say how
            far a new node is trusted (4 and 1: 80 %), and how fast that changes.
        prior_bad: Bad ones.
        limit: Most nodes and functions, and nodes and skills, remembered; the longest unheard of
            go first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    half_life_s: Annotated[float, Field(ge=60, le=366 * 86_400)] = 7 * 86_400.0
    prior_good: Annotated[float, Field(ge=0.1, le=1_000)] = 4.0
    prior_bad: Annotated[float, Field(ge=0.1, le=1_000)] = 1.0
    limit: Annotated[int, Field(ge=1)] = 20_000


class BreakerSettings(BaseModel):
    """When a function on a node that does not answer is left alone.

    Attributes:
        losses: Invocations lost in a row that open the breaker.
        pause_ms: How long it stays open at first; doubled by every probe that is lost too.
        longest_pause_ms: Most it grows to.
        probe_ms: How long a probe may stay without an answer before another one is let through.
        limit: Most breakers remembered; the longest unheard of go first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: Annotated[int, Field(ge=1, le=100)] = 3
    pause_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 1_000
    longest_pause_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 60_000
    probe_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 10_000
    limit: Annotated[int, Field(ge=1)] = 10_000


class RouterSettings(BaseModel):
    """What a router may take, keep and wait for.

    Attributes:
        task_limit_bytes: Largest task.
        live_limit: Tasks accepted and not yet ended; further ones get ``overloaded``.
        queue_limit: Messages waiting in one subscription.
        waiting_limit: Accepted tasks that may wait for a node with room; of more, those of the
            lowest priority get ``overloaded``.
        waiting_bytes: Bytes of such tasks.
        moves_per_s: How often a task that has not begun may be taken from a node with a queue for
            the sake of an idle one, a second; 0: never.
        candidates: Distinct capabilities taken from the search for one task.
        nearest: Near misses named in ``no_capable_node``.
        attempts: Most nodes tried for one task.
        retry_share: How often a task may be given to another node after one that had begun with
            it, as a share of all tasks: in an outage not everything is done twice.
        retries_per_s: The same that may be done in any case, a second.
        hedge_share: How often a second node may be asked beside one that takes long (functions that
            are declared idempotent), as a share of all tasks; 0: never.
        hedge_samples: Runs of a function that must have been seen before it is known what takes
            long: longer than 95 of 100 runs.
        report_timeout_ms: How long a node may leave an invocation unanswered, on top of the
            measured round trip.
        cancel_grace_ms: How long a node has to end a cancelled task itself.
        deadline_grace_ms: How long it has to say that the deadline has passed.
        finish_grace_ms: How long a final event may lag behind the report of it.
        settle_ms: How long a restarted router listens before it takes up unfinished tasks, and at
            most before it chooses a node for the first time.
        doubt_ms: How long a node that is gone may take to come back, when it may have said
            something that was not heard here (`router.doubt`), before its tasks go on without it:
            as long as a session pauses at most between two tries to connect. Twice that for a node
            that passes for alive and does not answer.
        quiet_ms: Catalogue and presence count as complete when nothing has come for so long.
        heartbeat_s: Interval of a node's load where its birth names none.
        missed_heartbeats: So many missed in a row mean that the node (or router) is gone; on a line
            where they are often late, up to four times as many.
        router_heartbeat_s: Interval at which a router repeats its state for other routers.
        takeover_ms: How long the router that a task belongs to may leave it without a word before
            the next one takes it; the one after that waits twice as long, and so on.
        shadow_bytes: Bytes kept of the tasks of other routers.
        grace_ms: How long a task waits for a node that was lost a moment ago, where nobody else can
            do it: a supervisor starts a crashed one anew within 1 to 3 s, on a machine with much
            else to do within 6 s; one that its broker cut comes back as soon. 0: not at all.
        sweep_s: Interval of liveness checks and housekeeping.
        shown_events: Chunks kept per live task for ``resume``; the oldest go first.
        shown_bytes: Bytes of chunks kept per live task. An answer of which the beginning is no
            longer kept cannot be gone on with on another node.
        all_shown_bytes: Bytes of chunks kept for all live tasks together.
        hang_ms: How long a node that has begun may say nothing, not even ``working``, before it
            counts as lost: three times what nodes are silent for at the most.
        successor_ms: How long somebody is looked for who can go on with an answer whose node was
            lost: that node itself may be back by then.
        successor_pause_ms: Time between two such looks.
        draft_bytes: Bytes of unsure answers kept for all cascades together. One that finds no room
            ends its task: the surest answer so far is the result.
        recent_bytes: Bytes of chunks kept for tasks that have ended.
        retention_s: How long an outcome is kept for the same id again.
        retained_tasks: Most outcomes kept; the oldest go first.
        ledger_bytes: Largest ledger file.
        calibration_delay_s: Quiet time after a change of the catalogue before the threshold is
            fitted anew.
        weights: Weights of the score.
        reputation: What outcomes say about nodes.
        breaker: When a function that does not answer is left alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task_limit_bytes: Annotated[int, Field(ge=1024, le=64 * _MIB)] = TASK_LIMIT_BYTES
    live_limit: Annotated[int, Field(ge=1)] = 10_000
    queue_limit: Annotated[int, Field(ge=1)] = 10_000
    waiting_limit: Annotated[int, Field(ge=0)] = 8_000
    waiting_bytes: Annotated[int, Field(ge=0)] = 64 * _MIB
    moves_per_s: Annotated[float, Field(ge=0, le=1_000)] = 10.0
    candidates: Annotated[int, Field(ge=1, le=64)] = 8
    nearest: Annotated[int, Field(ge=0, le=16)] = 3
    attempts: Annotated[int, Field(ge=1, le=16)] = 5
    retry_share: Share = 0.2
    retries_per_s: Annotated[float, Field(ge=0)] = 10.0
    hedge_share: Share = 0.05
    hedge_samples: Annotated[int, Field(ge=5, le=1_000)] = 20
    report_timeout_ms: Milliseconds = 1_000
    cancel_grace_ms: Milliseconds = 1_000
    deadline_grace_ms: Milliseconds = 300
    finish_grace_ms: Milliseconds = 1_000
    settle_ms: Milliseconds = 1_500
    doubt_ms: Milliseconds = 30_000
    quiet_ms: Milliseconds = 250
    heartbeat_s: Annotated[float, Field(gt=0)] = 5.0
    missed_heartbeats: Annotated[int, Field(ge=1)] = 3
    grace_ms: Milliseconds = 10_000
    router_heartbeat_s: Annotated[float, Field(gt=0)] = 2.0
    takeover_ms: Milliseconds = 2_000
    shadow_bytes: Annotated[int, Field(ge=0)] = 64 * _MIB
    sweep_s: Annotated[float, Field(gt=0)] = 0.5
    shown_events: Annotated[int, Field(ge=1)] = 4_096
    shown_bytes: Annotated[int, Field(ge=1024)] = 2 * _MIB
    all_shown_bytes: Annotated[int, Field(ge=0)] = 128 * _MIB
    hang_ms: Annotated[int, Field(ge=100, le=3_600_000)] = 45_000
    successor_ms: Milliseconds = 10_000
    successor_pause_ms: Annotated[int, Field(ge=10, le=60_000)] = 250
    draft_bytes: Annotated[int, Field(ge=0)] = 64 * _MIB
    recent_bytes: Annotated[int, Field(ge=0)] = 16 * _MIB
    retention_s: Annotated[float, Field(gt=0)] = 3_600.0
    retained_tasks: Annotated[int, Field(ge=1)] = 100_000
    ledger_bytes: Annotated[int, Field(ge=_MIB // 8)] = 1024 * _MIB
    calibration_delay_s: Annotated[float, Field(ge=0)] = 1.0
    weights: Weights = Weights()
    reputation: ReputationSettings = ReputationSettings()
    breaker: BreakerSettings = BreakerSettings()
