"""The ``@function`` decorator: a Python function becomes an advertised capability.

Light on purpose: this module is what user code imports, in a child that must start fast. The
schemas are derived from the signature only when somebody asks for them, in
`node_agent.worker.describe`.

Example::

    from node_agent.functions import function

    @function(version="1.2.0", examples=["how far apart are 3 and 10?"])
    def distance(a: float, b: float) -> float:
        '''Distance between two numbers.'''
        return abs(a - b)
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, TypeVar, get_args, overload

__all__ = [
    "DECLARATION_ATTRIBUTE",
    "Answer",
    "FunctionDeclaration",
    "InvocationContext",
    "function",
]

DECLARATION_ATTRIBUTE: Final = "__foam_function__"
"""Where the decorator leaves the declaration on the function it returns unchanged."""

Continues = Literal["none", "restart", "skip"]
"""What a Python function may say of an answer whose node is lost. Language models can say more
(`capability_schemas.capability.Continues`, which this module does not import: it is light)."""

Function = TypeVar("Function", bound=Callable[..., Any])
Output = TypeVar("Output")


@dataclass(frozen=True, slots=True)
class Answer(Generic[Output]):
    """An output with a word on how sure the function is of it.

    A function returns it in place of the bare output; a generator may also yield it, last. A task
    with ``min_confidence`` goes on to a stronger node when the confidence is below that; a bare
    output counts as sure. Example::

        @function
        def severity(text: str) -> Answer[str]:
            known = [word for word in ("trip", "leak", "fire") if word in text]
            return Answer("critical" if known else "ok", confidence=0.9 if known else 0.3)

    Attributes:
        output: The output, any JSON; None for a generator whose output is what it has yielded.
        confidence: 0 (a guess) to 1 (certain).

    Raises:
        ValueError: ``confidence`` is no number from 0 to 1.
    """

    output: Output
    confidence: float

    def __post_init__(self) -> None:
        """Refuse what is no confidence."""
        if not 0 <= self.confidence <= 1:  # NaN neither
            raise ValueError(f"confidence is {self.confidence}: use 0 to 1")


@dataclass(frozen=True, slots=True)
class InvocationContext:
    """What a function may know about its invocation; it gets one by a ``context`` parameter.

    Attributes:
        deadline: ``time.monotonic()`` seconds after which nobody waits for the answer, or None.
        cancelled: Set when the answer is no longer wanted. A function that runs for long looks at
            it now and then; one that does not is killed with its process after a grace time.
    """

    deadline: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def remaining_s(self) -> float | None:
        """Seconds left before the deadline, at least 0; None without a deadline."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionDeclaration:
    """What the decorator was told; None means "derive it" (`node_agent.worker.describe`).

    Attributes:
        name: Function name in topics, 1 to 64 of ``A-Z a-z 0-9 _ -``.
        version: Semantic version of the function; None where the author does not say.
        description: What it does, in words that a task would use.
        examples: Utterances that should reach it.
        skills: Skill names it offers.
        input_schema: JSON Schema of the input, or the path of a file with it.
        output_schema: JSON Schema of the output, or the path of a file with it.
        concurrency: Invocations at a time on one node, at least 1; None likewise.
        timeout_s: Longest run of one invocation, seconds; only the deadline counts when None.
        continues: What becomes of an answer whose node is lost; None likewise.
        idempotent: Whether running it twice does no more than once; None likewise.
        extra: Further fields of the function's specification (``policy``, ``cost``, ``limits``).
    """

    name: str
    version: str | None
    description: str
    examples: tuple[str, ...]
    skills: tuple[str, ...]
    input_schema: Mapping[str, Any] | str | None
    output_schema: Mapping[str, Any] | str | None
    concurrency: int | None
    timeout_s: float | None
    continues: str | None
    idempotent: bool | None
    extra: Mapping[str, Any]


@overload
def function(target: Function, /) -> Function: ...


@overload
def function(
    *,
    name: str | None = None,
    version: str | None = None,
    description: str | None = None,
    examples: Sequence[str] = (),
    skills: Sequence[str] = (),
    input_schema: Mapping[str, Any] | str | None = None,
    output_schema: Mapping[str, Any] | str | None = None,
    concurrency: int | None = None,
    timeout_s: float | None = None,
    continues: Continues | None = None,
    idempotent: bool | None = None,
    **extra: Any,
) -> Callable[[Function], Function]: ...


def function(
    target: Function | None = None,
    /,
    *,
    name: str | None = None,
    version: str | None = None,
    description: str | None = None,
    examples: Sequence[str] = (),
    skills: Sequence[str] = (),
    input_schema: Mapping[str, Any] | str | None = None,
    output_schema: Mapping[str, Any] | str | None = None,
    concurrency: int | None = None,
    timeout_s: float | None = None,
    continues: Continues | None = None,
    idempotent: bool | None = None,
    **extra: Any,
) -> Function | Callable[[Function], Function]:
    """Declare a function (plain, async, generator or async generator) as a capability.

    The function itself is returned unchanged and stays callable and testable as it is. It is called
    with keyword arguments taken from the task's input; a parameter ``text`` gets the task's words,
    a parameter ``context`` an `InvocationContext`. What a generator yields is streamed. An `Answer`
    tells how sure the output is.

    Args:
        target: The function, when the decorator is used without parentheses.
        name: Name in topics; the function's own name when omitted.
        version: Semantic version; ``1.0.0`` when nobody says.
        description: What it does; the docstring when omitted.
        examples: Utterances that should reach it; a handful makes matching much better.
        skills: Skill names.
        input_schema: JSON Schema of the input, or the path of a file with it, from this file's
            folder; derived from the signature when omitted.
        output_schema: Likewise of the output; derived from the return annotation when omitted.
        concurrency: Invocations at a time, at least 1 (the default). An async function runs them in
            one process, any other in as many processes.
        timeout_s: Longest run of one invocation, seconds.
        continues: What becomes of an answer whose node is lost. ``restart`` (when nobody says): it
            is run again as long as nothing was shown. ``skip``: it says the very same again for the
            same input, so another node runs it and passes over what was shown. ``none``: it must
            never be run twice.
        idempotent: Whether running it twice does no more than running it once (it reads, computes,
            or sets): then a slow node may be overtaken by a second one.
        **extra: Further fields of the specification (``policy``, ``cost``, ``limits``, ``idle``),
            checked when the node loads it. A node file that names the function has the last word.

    Raises:
        ValueError: ``concurrency`` or ``timeout_s`` is out of range, or ``continues`` is none of
            these.
    """
    if concurrency is not None and concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}: use at least 1")
    if timeout_s is not None and timeout_s <= 0:
        raise ValueError(f"timeout_s is {timeout_s}: use more than 0")
    if continues is not None and continues not in get_args(Continues):
        known = ", ".join(get_args(Continues))
        raise ValueError(f"continues is {continues!r}: use one of {known}")

    def declare(declared: Function) -> Function:
        declaration = FunctionDeclaration(
            name=name or declared.__name__,
            version=version,
            description=description or " ".join((declared.__doc__ or "").split()),
            examples=tuple(examples),
            skills=tuple(skills),
            input_schema=input_schema,
            output_schema=output_schema,
            concurrency=concurrency,
            timeout_s=timeout_s,
            continues=continues,
            idempotent=idempotent,
            extra=extra,
        )
        setattr(declared, DECLARATION_ATTRIBUTE, declaration)
        return declared

    return declare if target is None else declare(target)
