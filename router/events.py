"""What can happen to a task, and what its machine can want done: plain values."""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal

from capability_schemas.capability import Continues
from capability_schemas.errors import FoamError, MalformedPayload
from capability_schemas.invocation import Cascade, Continuation, Report
from capability_schemas.reply import CascadeStep, Usage
from capability_schemas.signing import digest
from capability_schemas.task import TaskPolicy

if TYPE_CHECKING:
    from router.shown import Origin

Verdict = Literal["good", "failed", "lost", "refused", "unsure"]
"""What an attempt says about its node."""


class Phase(StrEnum):
    """Where a task stands."""

    RECEIVED = "received"
    ACCEPTED = "accepted"
    INVOKED = "invoked"
    ADMITTED = "admitted"
    STREAMING = "streaming"
    HANDING = "handing over"
    ENDED = "ended"


WITH_NODE: Final = frozenset({Phase.INVOKED, Phase.ADMITTED, Phase.STREAMING})
"""Phases in which a node has the task."""

UNASKED: Final = frozenset({Phase.ACCEPTED, Phase.HANDING})
"""Phases in which nobody has it, or somebody is about to get it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A node that may run the task.

    Attributes:
        node: The node.
        function: Its function.
        version: Version of the function.
        score: Rank value.
        reason: Why, in words.
        sim: Similarity to the request, 0 to 1.
        cost: Price of the call, in the unit the site uses.
        finish_ms: Predicted time until it is done, wait included; None where nothing is known.
        external: Whether it hands the task to a service outside the site.
        strength: How much it takes to run it (bytes of memory); stands for how able it is.
        probability: Chance that this function is the one meant, 0 to 1; None when it was named.
        margin: By how much its similarity exceeds that of the next other function.
        ambiguous: Whether that is so little that another function may well be meant.
        continues: What becomes of an answer of it when its node is lost.
        model: Digest of the model file behind it; None where there is none, or it is not known.
        idempotent: Whether another node may be asked for the same at the same time.
    """

    node: str
    function: str
    version: str
    score: float
    reason: str = ""
    sim: float = 1.0
    cost: float = 0.0
    finish_ms: float | None = None
    external: bool = False
    strength: float = 0.0
    probability: float | None = None
    margin: float | None = None
    ambiguous: bool = False
    continues: Continues = "restart"
    model: str | None = None
    idempotent: bool = False


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer that was not sure enough, kept in case no better one comes.

    Attributes:
        step: Whose it is, and how sure.
        output: The answer as JSON.
        usage: What it consumed.
        digest: Digest of ``output``, as a result carries it.
    """

    step: CascadeStep
    output: bytes
    usage: Usage | None
    digest: str

    @classmethod
    def of(cls, choice: Choice, report: Report) -> "Draft | None":
        """Return the answer in a report; None when it is nothing that JSON has words for.

        Args:
            choice: Whose it is.
            report: A report with an output.
        """
        try:
            output_digest = digest(report.output)
            output = json.dumps(report.output, separators=(",", ":"), ensure_ascii=False).encode()
        except (MalformedPayload, ValueError, RecursionError):
            return None
        step = CascadeStep(
            node=choice.node,
            function=choice.function,
            version=choice.version,
            confidence=report.confidence,
            cost=choice.cost,
            total_ms=report.total_ms,
        )
        return cls(step, output, report.usage, output_digest)


# ---- events


@dataclass(frozen=True, slots=True)
class Journaled:
    """The task is in the ledger."""


@dataclass(frozen=True, slots=True)
class Unjournaled:
    """The ledger cannot take the task."""

    error: FoamError


@dataclass(frozen=True, slots=True)
class Chosen:
    """The selection is made: candidates in order, or why there are none.

    Attributes:
        choices: Best first.
        problem: Why there are none.
        min_confidence: Least confidence of an answer, 0 to 1; None: whatever comes is the answer.
        policy: What the task demands of nodes, by itself and by the router's rules.
        hedge_after_ms: After what time the best candidate takes long; None where that is not known.
        places: ``(node, function)`` of those who could do it and are full; with a problem.
        start_by: When the last of them can no longer end in time, UTC milliseconds.
    """

    choices: tuple[Choice, ...]
    problem: FoamError | None = None
    min_confidence: float | None = None
    policy: TaskPolicy = field(default_factory=TaskPolicy)
    hedge_after_ms: int | None = None
    places: frozenset[tuple[str, str]] = frozenset()
    start_by: int | None = None


@dataclass(frozen=True, slots=True)
class Shed:
    """The task may not wait any longer: there is no room for it.

    Attributes:
        error: Why, and when another try is sensible.
    """

    error: FoamError


@dataclass(frozen=True, slots=True)
class MoveAsked:
    """Another node would be done with the task sooner, if it has not begun."""


@dataclass(frozen=True, slots=True)
class Uninvoked:
    """An invocation could not be sent.

    Attributes:
        error: Why.
        attempt: Which; None: the current one.
    """

    error: FoamError
    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class Reported:
    """A node reported on an invocation."""

    report: Report


@dataclass(frozen=True, slots=True)
class Observed:
    """A node published on the reply topic.

    Attributes:
        source: Last level of the topic.
        event: ``working``, ``chunk``, ``result`` or ``error``; of the router itself ``routed``.
        seq: Its number; None for ``working`` and ``routed``.
        attempt: Its attempt; None for ``working``.
        payload: The bytes.
        code: Error code of an ``error``.
    """

    source: str
    event: Literal["working", "chunk", "result", "error", "routed"]
    seq: int | None
    attempt: int | None
    payload: bytes
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Fenced:
    """The router's own ``routed`` has come back to it: what was said before it has all been heard.

    Attributes:
        attempt: The attempt it announced.
        node: Who was asked; empty where that does not matter.
        origin: What with, as far as it is known.
    """

    attempt: int
    node: str = ""
    origin: "Origin | None" = None


@dataclass(frozen=True, slots=True)
class Missed:
    """Something that the node said may not have been heard here.

    Attributes:
        wait_ms: How long to wait before the node is asked, so that not all are asked at once.
    """

    wait_ms: int = 0


@dataclass(frozen=True, slots=True)
class NodeGone:
    """A node is lost, with everything it was doing."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """The client no longer wants an answer."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The time given as ``now`` has come."""


Event = (
    Journaled
    | Unjournaled
    | Chosen
    | Shed
    | MoveAsked
    | Uninvoked
    | Reported
    | Observed
    | Fenced
    | Missed
    | NodeGone
    | CancelAsked
    | Tick
)

# ---- actions


@dataclass(frozen=True, slots=True)
class SendAccepted:
    """Tell the client that the task is accepted."""


@dataclass(frozen=True, slots=True)
class Choose:
    """Select candidates (anew) and feed ``Chosen``."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Have the task wait until one of these has room; then feed ``Chosen``.

    Attributes:
        places: ``(node, function)`` of those who could do it; none where it waits by its own clock.
    """

    places: frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Ask a node to give the task back if it has not begun.

    Attributes:
        node: The node.
        attempt: Its attempt.
    """

    node: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the client who will go on with the answer (``routed``), and listen for that very event.

    The broker hands it to the client and back to the router after everything that the node before
    has said by then, and readers ignore that node from there on: a fence between the two.

    Attributes:
        choice: Who will; before an end of the router's own making, who may be speaking yet.
        attempt: Number of its attempt.
        last: Whether it is for such an end: then nobody is asked any more.
    """

    choice: Choice
    attempt: int
    last: bool = False


@dataclass(frozen=True, slots=True)
class Invoke:
    """Invoke a node and tell the client (``routed``), unless that was announced.

    Attributes:
        choice: The node, with the reason that the client is told.
        attempt: Number of the attempt.
        seq: First number the node gives to an event.
        cascade: Terms on which its answer counts; None: whatever comes is the answer.
        continuation: What was shown of the answer by others.
        hold: Whether it shall hand its answer to the router, for another node may be first.
        announced: Whether the client has been told already, or shall not be.
    """

    choice: Choice
    attempt: int
    seq: int
    cascade: Cascade | None = None
    continuation: Continuation | None = None
    hold: bool = False
    announced: bool = False


@dataclass(frozen=True, slots=True)
class Learn:
    """An attempt has ended in a way that says something about its node.

    Attributes:
        choice: Who was asked.
        verdict: How it went.
        took_ms: Time from the invocation to the end, milliseconds.
    """

    choice: Choice
    verdict: Verdict
    took_ms: int


@dataclass(frozen=True, slots=True)
class CancelNode:
    """Tell a node to drop the task up to an attempt."""

    node: str
    attempt: int
    reason: Literal["client", "deadline", "superseded", "overtaken"]


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a node how an attempt stands; feed ``NodeGone`` when it is not there.

    Attributes:
        node: The node; None: all that may have the task are asked whether they do.
        attempt: The attempt; None with the node.
    """

    node: str | None = None
    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class MarkShown:
    """Journal that the client has been shown something."""


@dataclass(frozen=True, slots=True)
class End:
    """The task is over.

    Attributes:
        seq: Number of the final event.
        attempt: Last attempt, at least 1.
        error: What the router has to tell the client.
        payload: The node's final event, which the client has.
        retell: Whether it may have passed that event over: then the router repeats it.
        draft: The answer the router has to give the client. Of the three exactly one is there.
        steps: The steps of the cascade that the draft comes from.
        code: Error code, or None for a result.
        journaled: Whether the ledger knows the task.
    """

    seq: int
    attempt: int
    error: FoamError | None = None
    payload: bytes | None = None
    retell: bool = False
    draft: Draft | None = None
    steps: tuple[CascadeStep, ...] = ()
    code: str | None = None
    journaled: bool = True


Action = (
    SendAccepted
    | Choose
    | Wait
    | TakeBack
    | Announce
    | Invoke
    | Learn
    | CancelNode
    | Ask
    | MarkShown
    | End
)
