"""Settings of a node agent."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from capability_schemas.ids import Identifier


class Sleep(BaseModel):
    """When a node that saves energy is there, and when it is not.

    Attributes:
        awake_s: How long it stays when nothing is asked of it, seconds; every task starts that
            anew.
        asleep_s: How long it is away then, seconds.
        awake_limit_s: After so long it goes to sleep though it has work: that ends or goes to
            others, as when a node is stopped. None: work keeps it awake.
        linger_s: How long it stays connected after it has said that it goes, to turn away what was
            on its way, seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    awake_s: Annotated[float, Field(gt=0, le=86_400)]
    asleep_s: Annotated[float, Field(ge=1, le=7 * 86_400)]
    awake_limit_s: Annotated[float, Field(gt=0, le=7 * 86_400)] | None = None
    linger_s: Annotated[float, Field(ge=0, le=10)] = 0.5


class NodeSettings(BaseModel):
    """How a node behaves.

    Attributes:
        node: The node's identity at the broker.
        queue_limit: Invocations that may wait, all functions together; beyond it they are refused.
        load_interval_s: Time between two load messages, seconds.
        load_gap_s: Least time between two load messages that a change calls for, seconds.
        claim_lease_s: How long a claim holds unless it is renewed, seconds.
        coalesce_s: Text that arrives within this time shares a chunk, seconds; the first never
            waits.
        working_s: Silence after which a ``working`` event is sent, seconds.
        unconfirmed_limit: Messages that the broker has not taken yet, beyond which streams pause
            and their functions with them.
        chunk_limit_bytes: Largest text of one chunk; longer text is split.
        invocation_limit_bytes: Largest invocation that is looked at.
        cut_off_s: How long the node may be without a broker before it drops what it runs, seconds:
            before the router, who waits for three loads, gives the work to another node.
        drain_timeout_s: Longest wait for running invocations when the node leaves, seconds.
        cancel_grace_s: Time a cancelled call has before its process is killed, seconds.
        start_timeout_s: Longest start of an instance, seconds.
        outcome_limit: Ended invocations remembered to recognise duplicates.
        peers: Neighbour nodes; one of them is named to a router that is turned away.
        keep_warm_worth: Idle seconds that one second of starting an instance is worth: an idle
            instance stays for its start time so many times over, where use does not show better.
        keep_warm_least_s: Shortest stay of an idle instance, seconds.
        keep_warm_costly_s: Shortest stay of one whose start takes half a second or more, seconds.
        keep_warm_most_s: Longest stay, seconds.
        memory_reserve_bytes: Available memory below which idle instances are evicted; a twentieth
            of all memory when None.
        direct: Whether clients may ask the node itself: ``when_alone``, while no router lives, or
            ``never`` (ADR 37).
        direct_limit: Such tasks that may run and wait at a time.
        direct_per_client: Likewise, of one client.
        backoff_s: First pause after repeated crashes of a function's instances, seconds; doubles.
        backoff_limit_s: Longest such pause, seconds.
        sleep: Its duty cycle; None: it is always there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: Identifier
    queue_limit: Annotated[int, Field(ge=0, le=100_000)] = 256
    load_interval_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    load_gap_s: Annotated[float, Field(ge=0)] = 0.25
    claim_lease_s: Annotated[float, Field(ge=1)] = 120.0
    coalesce_s: Annotated[float, Field(ge=0, le=1)] = 0.02
    working_s: Annotated[float, Field(gt=0)] = 15.0
    unconfirmed_limit: Annotated[int, Field(ge=1)] = 256
    chunk_limit_bytes: Annotated[int, Field(ge=256)] = 64 * 1024
    invocation_limit_bytes: Annotated[int, Field(ge=1024)] = 8 * 1024 * 1024
    cut_off_s: Annotated[float, Field(gt=0)] = 10.0
    drain_timeout_s: Annotated[float, Field(ge=0)] = 10.0
    cancel_grace_s: Annotated[float, Field(ge=0)] = 2.0
    start_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    outcome_limit: Annotated[int, Field(ge=1)] = 1024
    peers: tuple[Identifier, ...] = ()
    keep_warm_worth: Annotated[float, Field(ge=0)] = 120.0
    keep_warm_least_s: Annotated[float, Field(ge=0)] = 5.0
    keep_warm_costly_s: Annotated[float, Field(ge=0)] = 30.0
    keep_warm_most_s: Annotated[float, Field(ge=0)] = 1800.0
    memory_reserve_bytes: Annotated[int, Field(ge=0)] | None = None
    direct: Literal["when_alone", "never"] = "when_alone"
    direct_limit: Annotated[int, Field(ge=1, le=100_000)] = 32
    direct_per_client: Annotated[int, Field(ge=1, le=100_000)] = 4
    backoff_s: Annotated[float, Field(gt=0)] = 0.5
    backoff_limit_s: Annotated[float, Field(gt=0)] = 30.0
    sleep: Sleep | None = None
