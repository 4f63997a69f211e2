"""What routers and nodes say to each other about one run of a function."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from capability_schemas.ids import Identifier
from capability_schemas.reply import CascadeStep, Usage
from capability_schemas.task import Share, TaskPolicy
from capability_schemas.wire import Attempt, Count, Instant, WireModel, WirePart

UNSURE_LIMIT_BYTES: Final = 256 * 1024
"""Largest answer that a node hands back as unsure or held. A larger unsure one goes to the client
as it is, a larger held one is given up."""

ACCOUNTS_AT_ONCE: Final = 256
"""Most tasks that one order asks an account of."""

_MAX_COUNT: Final = 2**53


class Cascade(WirePart):
    """Terms on which an answer of one step of a cascade counts.

    Attributes:
        accept: Least confidence, 0 to 1. An answer below it goes to the router in a report
            ``unsure`` and nothing to the client; one that carries no confidence counts as sure,
            and so does one of more than ``UNSURE_LIMIT_BYTES``.
        steps: Earlier steps, to be repeated on the result.
    """

    accept: Share
    steps: tuple[CascadeStep, ...] = ()


class Continuation(WirePart):
    """What a client has been shown of an answer that another node shall go on with.

    Attributes:
        shown: The data of the chunks in order, neighbouring texts joined into one.
        chunks: How many chunks that were.
    """

    shown: Annotated[tuple[Any, ...], Field(min_length=1)]
    chunks: Annotated[int, Field(ge=1, le=_MAX_COUNT)]


class Invocation(WireModel):
    """A router asks one node to run one function: a lease on the task until ``deadline``.

    Attributes:
        task: The task.
        client: Whose task it is.
        router: Who invokes, and hears the report.
        node: Who shall run it; always named by a router that signs.
        epoch: Which start of the node is meant (``NodeState.epoch``): another one has forgotten
            what it ran, and refuses a signed invocation for an earlier one or for none.
        attempt: From 1; a higher one supersedes every lower one.
        function: Function name on the node.
        version: Version the router chose.
        text: Words of the task.
        input: JSON of the task, as given.
        deadline: Absolute, UTC milliseconds.
        reply: Reply topic without its last level; the node appends its own id.
        seq: First number the node gives to a chunk, result or error.
        stream: Whether chunks are wanted.
        priority: 0 to 9.
        session: Affinity key.
        policy: Demands of the task, when it has any: they hold for whatever the function asks of
            others too.
        cascade: Set when the answer may turn out not to be good enough; the node then shows
            nothing before it knows. With ``accept`` 0 every answer is good enough.
        continuation: Set when another node has shown a part of the answer; ``seq`` is the number
            after it. Nothing of it may be shown again.
        hold: Whether the client is shown nothing: the answer goes to the router, in a report
            ``held``, because another node may answer first.
        proof: Whether the result shall carry the node's passport.
        trace: W3C ``traceparent``.
        sent_at: When the router sent it, UTC milliseconds.
        signature: Of the router, Ed25519 over the canonical bytes.
    """

    task: Identifier
    client: Identifier
    router: Identifier
    node: Identifier | None = None
    epoch: Count | None = None
    attempt: Attempt = 1
    function: Identifier
    version: str
    text: str | None = None
    input: Any = None
    deadline: Instant
    reply: str
    seq: Annotated[int, Field(ge=0, le=_MAX_COUNT)] = 0
    stream: bool = True
    priority: Annotated[int, Field(ge=0, le=9)] = 5
    session: str | None = None
    policy: TaskPolicy | None = None
    cascade: Cascade | None = None
    continuation: Continuation | None = None
    hold: bool = False
    proof: bool = False
    trace: str | None = None
    sent_at: Instant
    signature: str | None = None


class Control(WireModel):
    """An order to a node.

    Attributes:
        verb: ``cancel`` one task, ``account`` for one attempt (say once more how it stands),
            ``return`` one that has not begun (then the node says ``refused``, else ``admitted``
            once more), ``drain`` (finish, take nothing new) or ``undrain`` the node.
        task: The task to cancel, to account for or to return.
        tasks: Clients and tasks to account for, many at a time, the latest attempt of each.
        attempt: Cancel this attempt and lower ones, return this one, every attempt when None;
            the one to account for, when None the latest of the task, and who has none does not
            answer.
        reason: Why: ``client``, ``deadline``, ``superseded``, ``overtaken`` (only if the client
            has been shown nothing: then the node gives it back by a report ``failed``), or
            words.
        sender: Who orders: a router or a registry.
        node: Who shall obey; always named by a sender that signs.
        epoch: Which start of the node is meant, as in an ``Invocation``; any when None,
            which a node that checks signatures obeys for ``cancel`` only.
        sent_at: When it was sent, UTC milliseconds.
        nonce: Different in every order of a sender, so that none is obeyed twice.
        signature: Of the sender, Ed25519 over the canonical bytes.
    """

    verb: Literal["cancel", "account", "return", "drain", "undrain"]
    task: Identifier | None = None
    client: Identifier | None = None
    tasks: Annotated[
        tuple[tuple[Identifier, Identifier], ...] | None, Field(max_length=ACCOUNTS_AT_ONCE)
    ] = None
    attempt: Attempt | None = None
    reason: str = ""
    sender: Identifier | None = None
    node: Identifier | None = None
    epoch: Count | None = None
    sent_at: Count | None = None
    nonce: Identifier | None = None
    signature: str | None = None


class Report(WireModel):
    """What a node says to the router about an invocation.

    Attributes:
        task: The task.
        client: Whose task it is; task ids are scoped to the client.
        attempt: Which attempt.
        node: Who reports.
        status: ``admitted`` it will run; ``refused`` it will not, another node may; ``failed`` it
            began but another node may do better; ``unsure`` it has an answer, here in ``output``,
            that is less sure than the invocation demands; ``held`` likewise one that is to be held
            back; ``finished`` a terminal event was sent. To ``account`` the last report is the
            answer, the terminal event is sent again before it; or ``running``, or ``unknown``:
            nothing is known here of that attempt.
        code: Error code of a refusal, failure or finish; None when it went well.
        reason: Why, in words.
        retry_after_ms: When the node may have room again.
        peer: A node that may take it instead.
        seq: Next free number of the task, after what was sent.
        queue_ms: Predicted wait before the run starts.
        output: The unsure or held answer; an absent one is null.
        confidence: Its confidence, 0 to 1.
        usage: What it consumed.
        total_ms: How long it took, from the receipt of the invocation, milliseconds.
    """

    task: Identifier
    client: Identifier
    attempt: Attempt
    node: Identifier
    status: Literal[
        "admitted", "refused", "failed", "unsure", "held", "finished", "running", "unknown"
    ]
    code: str | None = None
    reason: str = ""
    retry_after_ms: Annotated[int, Field(ge=0, le=_MAX_COUNT)] | None = None
    peer: Identifier | None = None
    seq: Annotated[int, Field(ge=0, le=_MAX_COUNT)] | None = None
    queue_ms: float | None = None
    output: Any = None
    confidence: Share | None = None
    usage: Usage | None = None
    total_ms: Annotated[float, Field(ge=0)] | None = None
