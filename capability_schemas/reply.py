"""Reply events: everything a client reads about its task (PROTOCOL section 3).

``chunk``, ``result`` and ``error`` share one counter ``seq`` from 0 without gaps for the whole
task, attempts included. ``result`` or ``error`` is the last event, exactly once.
"""

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, TypeAdapter

from capability_schemas.errors import FoamError, error_from_wire
from capability_schemas.ids import Identifier
from capability_schemas.passport import Passport
from capability_schemas.wire import DEFAULT_LIMIT_BYTES, Attempt, WireModel, WirePart, decode

Milliseconds = Annotated[float, Field(ge=0)]

ENDS_HERE: Final = "it ends here"
"""Reason of an attempt that nobody gets: it is announced before an end of the router's own."""


class Usage(WirePart):
    """What a run consumed.

    Attributes:
        input_tokens: Tokens of the prompt; None for functions without tokens.
        output_tokens: Tokens generated.
        cpu_ms: Processor time of the instance.
        cost: Price of the call in the unit the site uses.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cpu_ms: Milliseconds | None = None
    cost: float | None = None


class Timing(WirePart):
    """Where the time went on the node, in milliseconds from the receipt of the invocation.

    Attributes:
        queue_ms: Until the run started.
        first_ms: Until the first output.
        total_ms: Until the last output.
    """

    queue_ms: Milliseconds = 0.0
    first_ms: Milliseconds | None = None
    total_ms: Milliseconds = 0.0


class CascadeStep(WirePart):
    """One answer of a cascade (small nodes first), kept or not.

    Attributes:
        node: Who answered.
        function: What answered.
        version: Version of the function.
        confidence: How sure the answer was, 0 to 1; None where it carries none.
        cost: Price of the call, in the unit the site uses.
        total_ms: How long it took on the node, milliseconds.
    """

    node: Identifier
    function: Identifier
    version: str
    confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    cost: Annotated[float, Field(ge=0)] = 0.0
    total_ms: Milliseconds | None = None


class _Event(WireModel):
    """Fields all reply events share.

    Attributes:
        task: The task.
        at: When it was sent, UTC milliseconds.
    """

    task: Identifier
    event: str
    at: int


class Accepted(_Event):
    """The router has journaled the task and will end it with a result or an error.

    Attributes:
        router: Who answers for the task.
        deadline: When it ends at the latest, UTC milliseconds.
        attempt: First attempt that this router makes, where it has taken the task over from
            another one; None: 1. Of two routers the one with the higher attempt has the task.
    """

    event: Literal["accepted"] = "accepted"
    router: Identifier
    deadline: int
    attempt: Attempt | None = None


class Routed(_Event):
    """A node was chosen.

    Attributes:
        node: The node.
        function: Its function.
        version: Version of the function.
        score: Rank value of the choice; 1 when the function was named.
        attempt: 1 for the first choice.
        reason: Why this node, in words.
        probability: Chance that this is the function meant, 0 to 1, as calibrated on this fleet;
            None when the function was named.
        margin: By how much its similarity exceeds that of the next other function.
        ambiguous: Whether that is so little that another function may well be meant.
    """

    event: Literal["routed"] = "routed"
    node: Identifier
    function: Identifier
    version: str
    score: float
    attempt: Attempt = 1
    reason: str = ""
    probability: Annotated[float, Field(ge=0, le=1)] | None = None
    margin: float | None = None
    ambiguous: bool = False

    @property
    def is_nobodys(self) -> bool:
        """Whether no node gets this attempt: the router announces its own end of the task so."""
        return self.reason == ENDS_HERE


class Plan(_Event):
    """The task was decomposed.

    Attributes:
        steps: The directed acyclic graph, each step with ``id``, ``text`` and ``after``.
    """

    event: Literal["plan"] = "plan"
    steps: tuple[dict[str, Any], ...]


class Step(_Event):
    """Progress of one step of a plan, or of a tool call of an agent; not numbered, not repeated.

    Attributes:
        step: Which step; unique within the task.
        state: ``running``, ``finished``, ``failed`` or ``refused``.
        node: Who runs it.
        detail: What is done: for a tool call ``tool``, ``arguments``, ``result`` or ``error``.
    """

    event: Literal["step"] = "step"
    step: str
    state: str
    node: Identifier | None = None
    detail: dict[str, Any] = Field(default_factory=dict)


class Working(_Event):
    """Keep-alive while nothing else is sent for long.

    Attributes:
        attempt: Which attempt works; 1 from a router, where the task waits for a node with room.
        reason: What is waited for, in words; None from a node that works.
    """

    event: Literal["working"] = "working"
    attempt: Attempt = 1
    reason: str | None = None


class Chunk(_Event):
    """A piece of the answer.

    Attributes:
        seq: Number of the event, from 0.
        attempt: Which attempt produced it, from 1; in a router's replay, the one that speaks now.
        data: Text, or any JSON.
    """

    null_fields: ClassVar[frozenset[str]] = frozenset({"data"})

    event: Literal["chunk"] = "chunk"
    seq: Annotated[int, Field(ge=0)]
    attempt: Attempt = 1
    data: Any


class Result(_Event):
    """The answer; the last event of a task that went well.

    Attributes:
        seq: Number of the event, one above the last chunk.
        attempt: Which attempt produced it.
        output: The whole answer: the joined text of the chunks, or JSON.
        node: Who answered; the router itself for administration.
        function: What answered.
        version: Version of the function.
        usage: What it consumed.
        timing: Where the time went.
        confidence: How sure the answer is, 0 to 1: of a language model the probability of its least
            certain token; None where the function does not tell.
        digest: ``sha256:`` and the hex digest of the canonical JSON (RFC 8785) of ``output``.
        signature: Of the node, Ed25519 over what ``provenance.result_claims`` says: client, task,
            node, function, version and digest. None where the node has no passport, and where the
            router answers.
        passport: The node's, when the task asked for ``proof``.
        cascade: Every step of a cascade in order, the one that gave this answer among them; None
            where one node was to answer.
    """

    null_fields: ClassVar[frozenset[str]] = frozenset({"output"})

    event: Literal["result"] = "result"
    seq: Annotated[int, Field(ge=0)]
    attempt: Attempt = 1
    output: Any = None
    node: Identifier | None = None
    function: Identifier | None = None
    version: str | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    digest: str | None = None
    signature: str | None = None
    passport: Passport | None = None
    cascade: tuple[CascadeStep, ...] | None = None


class ErrorEvent(_Event):
    """Why there is no answer; the last event of a task that went wrong.

    Attributes:
        seq: Number of the event, one above the last chunk.
        attempt: Which attempt failed; 1 when there was none.
        code: An ``ErrorCode``; kept a string, for a newer peer may know more of them.
        message: What was wrong, where, and what to do.
        retryable: Whether the same task may succeed later.
        detail: Fields for programs, ``retry_after_ms`` among them.
    """

    event: Literal["error"] = "error"
    seq: Annotated[int, Field(ge=0)] = 0
    attempt: Attempt = 1
    code: str
    message: str
    retryable: bool = False
    retry_after_ms: int | None = None
    detail: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_error(
        cls, error: FoamError, *, task: str, at: int, seq: int = 0, attempt: int = 1
    ) -> Self:
        """Describe an error on the wire.

        Args:
            error: What happened.
            task: The task it ends.
            at: UTC milliseconds.
            seq: Number of the event.
            attempt: Which attempt failed.
        """
        return cls(
            task=task,
            at=at,
            seq=seq,
            attempt=attempt,
            code=error.code.value,
            message=error.message,
            retryable=error.retryable,
            retry_after_ms=error.detail.get("retry_after_ms"),
            detail=error.detail,
        )

    def to_error(self) -> FoamError:
        """Return the event as an exception, marked remote."""
        detail = dict(self.detail)
        if self.retry_after_ms is not None:
            detail["retry_after_ms"] = self.retry_after_ms
        return error_from_wire(self.code, self.message, self.retryable, detail)


ReplyEvent = Annotated[
    Accepted | Routed | Plan | Step | Working | Chunk | Result | ErrorEvent,
    Field(discriminator="event"),
]
NumberedEvent = Chunk | Result | ErrorEvent
TerminalEvent = Result | ErrorEvent

_ADAPTER: TypeAdapter[Any] = TypeAdapter(ReplyEvent)


def decode_reply(payload: bytes, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> ReplyEvent:
    """Turn a payload of a reply topic into its event.

    Raises:
        TooLarge: Longer than ``limit_bytes``.
        MalformedPayload: No reply event; the message names the field.
    """
    event: ReplyEvent = decode(_ADAPTER, payload, limit_bytes=limit_bytes)
    return event
