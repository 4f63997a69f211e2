"""What can happen to a task, and what its machine can want done: plain values."""

from dataclasses import dataclass, field
from typing import Literal

from capability_schemas.errors import FoamError
from capability_schemas.invocation import Cascade, Report
from capability_schemas.reply import CascadeStep, Usage
from capability_schemas.task import TaskPolicy

Verdict = Literal["good", "failed", "lost", "refused", "unsure"]
"""What an attempt says about its node."""


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
    """

    choices: tuple[Choice, ...]
    problem: FoamError | None = None
    min_confidence: float | None = None
    policy: TaskPolicy = field(default_factory=TaskPolicy)


@dataclass(frozen=True, slots=True)
class Uninvoked:
    """The invocation of the current attempt could not be sent."""

    error: FoamError


@dataclass(frozen=True, slots=True)
class Reported:
    """A node reported on an invocation."""

    report: Report


@dataclass(frozen=True, slots=True)
class Observed:
    """A node published on the reply topic.

    Attributes:
        source: Last level of the topic.
        event: ``working``, ``chunk``, ``result`` or ``error``.
        seq: Its number; None for ``working``.
        attempt: Its attempt; None for ``working``.
        payload: The bytes.
        code: Error code of an ``error``.
    """

    source: str
    event: Literal["working", "chunk", "result", "error"]
    seq: int | None
    attempt: int | None
    payload: bytes
    code: str | None = None


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
    | Uninvoked
    | Reported
    | Observed
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
class Invoke:
    """Invoke a node and tell the client (``routed``).

    Attributes:
        choice: The node, with the reason that the client is told.
        attempt: Number of the attempt.
        seq: First number the node gives to an event.
        cascade: Terms on which its answer counts; None: whatever comes is the answer.
    """

    choice: Choice
    attempt: int
    seq: int
    cascade: Cascade | None = None


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
    reason: Literal["client", "deadline", "superseded"]


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
        draft: The answer the router has to give the client. Of the three exactly one is there.
        steps: The steps of the cascade that the draft comes from.
        code: Error code, or None for a result.
        journaled: Whether the ledger knows the task.
    """

    seq: int
    attempt: int
    error: FoamError | None = None
    payload: bytes | None = None
    draft: Draft | None = None
    steps: tuple[CascadeStep, ...] = ()
    code: str | None = None
    journaled: bool = True


Action = SendAccepted | Choose | Invoke | Learn | CancelNode | MarkShown | End
