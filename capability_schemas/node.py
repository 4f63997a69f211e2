"""State and load of nodes and routers."""

from typing import Annotated, Final, Literal

from pydantic import Field

from capability_schemas.ids import Identifier
from capability_schemas.passport import Passport
from capability_schemas.wire import MAX_COUNT, Count, Instant, WireModel, WirePart

LOST: Final = "connection lost"
"""Reason of a last will: nobody said goodbye."""

Presence = Literal["birth", "draining", "sleeping", "offline"]


class NodeState(WireModel):
    """Whether a node takes part; retained, and with ``offline`` its last will.

    A last will with an older epoch than the node's last birth says nothing about the node
    (PROTOCOL section 5).

    Attributes:
        node: The node.
        state: ``birth`` takes work, ``draining`` finishes what it has, ``sleeping`` comes back by
            itself, ``offline`` is gone.
        epoch: Start of the process, UTC milliseconds.
        at: When this was said, UTC milliseconds; a last will carries the time of its connection.
        reason: Why, in words.
        since: When this process made itself known first, UTC milliseconds; None in the last will
            of one that had not yet when it connected: that counts only where its birth was heard.
        place: Where the process runs, in words, for whoever has to find it.
        agent: Version of the node agent.
        load_interval_s: How often load is sent; three missed mean the node is gone.
        wake_at: When a sleeping node returns, UTC milliseconds.
        passport: Whose key signs its claims and results; shown with every birth, by those who have
            one.
    """

    node: Identifier
    state: Presence
    epoch: Count
    at: Instant
    reason: str = ""
    since: Instant | None = None
    place: Annotated[str, Field(max_length=200)] | None = None
    agent: str | None = None
    load_interval_s: Annotated[float, Field(gt=0)] | None = None
    wake_at: Instant | None = None
    passport: Passport | None = None


class RouterState(WireModel):
    """Whether a router takes part; retained, and repeated unretained as a heartbeat.

    Attributes:
        router: The router.
        state: As in ``NodeState``.
        epoch: As in ``NodeState``.
        at: As in ``NodeState``.
        reason: As in ``NodeState``.
        heartbeat_s: How often it repeats its state; other routers take over when it stops.
        direct: Whether clients may ask nodes themselves once no router lives; not where rules or
            quotas hold that routers alone see to.
        since: As in ``NodeState``.
        place: As in ``NodeState``.
        passport: How nodes learn whose key signs their invocations.
    """

    router: Identifier
    state: Presence
    epoch: Count
    at: Instant
    reason: str = ""
    heartbeat_s: Annotated[float, Field(gt=0)] | None = None
    direct: Annotated[bool, Field(strict=True)] = True
    since: Instant | None = None
    place: Annotated[str, Field(max_length=200)] | None = None
    passport: Passport | None = None

    @property
    def unborn(self) -> bool:
        """Whether it is the last will of a process that never made itself known."""
        return self.state == "offline" and self.reason == LOST and self.since is None


class RegistryState(WireModel):
    """Whether a registry takes part, and whether it leads; retained, and repeated unretained.

    Attributes:
        registry: The registry.
        state: As in ``NodeState``.
        epoch: As in ``NodeState``.
        at: As in ``NodeState``.
        reason: As in ``NodeState``.
        leads: Whether it leads, or claims to.
        term: Of its leading; of a follower, the highest that it has heard of.
        beat: Counts what it says, from 1; None in a last will, which says nothing of a lease.
        lease_ms: How long it may go without being heard before another one leads.
        enrolls: Whether it can let members in, when it leads.
        since: As in ``NodeState``.
        place: As in ``NodeState``.
        passport: How others know its signatures, where their papers do not name it.
    """

    registry: Identifier
    state: Presence
    epoch: Count
    at: Instant
    reason: str = ""
    leads: bool = False
    term: Count = 0
    beat: Count | None = None
    lease_ms: Annotated[int, Field(gt=0, le=MAX_COUNT)] | None = None
    enrolls: bool = True
    since: Instant | None = None
    place: Annotated[str, Field(max_length=200)] | None = None
    passport: Passport | None = None

    @property
    def unborn(self) -> bool:
        """As of ``RouterState``."""
        return self.state == "offline" and self.reason == LOST and self.since is None


class FunctionLoad(WirePart):
    """Live figures of one function.

    Attributes:
        running: Tasks being run.
        queued: Tasks waiting.
        instances: Live instances.
        concurrency: Tasks it can run at a time.
        first_ms: Smoothed time to the first output.
        total_ms: Smoothed time of a whole run.
        least_ms: Time of the quickest of the latest runs; None where too few or none are recent.
        wait_ms: Predicted wait of a call that came now, queue and start of an instance included.
        degraded: Whether its instances keep crashing.
    """

    running: Count = 0
    queued: Count = 0
    instances: Count = 0
    concurrency: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    first_ms: float | None = None
    total_ms: float | None = None
    least_ms: float | None = None
    wait_ms: float | None = None
    degraded: bool = False


class NodeLoad(WireModel):
    """Heartbeat and live figures of a node, sent every few seconds at QoS 0.

    Attributes:
        node: The node.
        epoch: Start of the process, UTC milliseconds.
        at: When measured, UTC milliseconds.
        queued: Tasks waiting in the admission queue.
        running: Tasks being run.
        queue_limit: Most tasks that may wait.
        capacity: Most tasks that may run at a time.
        memory_free_bytes: Memory the node may still take.
        functions: Figures by function name.
    """

    node: Identifier
    epoch: Count
    at: Instant
    queued: Count = 0
    running: Count = 0
    queue_limit: Count = 0
    capacity: Count = 0
    memory_free_bytes: Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)] | None = None
    functions: dict[Identifier, FunctionLoad] = Field(default_factory=dict)
