"""The contract between the agent and whatever runs functions."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import Unavailable
from capability_schemas.functions import FunctionSpec


class InstanceDied(Unavailable):
    """An instance ended on its own: a crash, a limit, a kill.

    Args:
        message: Which one, and how it ended.
        status: Exit status; negative for a signal (``-11``), None when unknown.
    """

    def __init__(self, message: str, *, status: int | None) -> None:
        super().__init__(message, status=status)
        self.status = status


class InstanceFailed(Unavailable):
    """An instance could not start: the code does not import, the model is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of a function.

    Attributes:
        id: Unique among the calls of the agent.
        input: Effective input, checked.
        text: Words of the task.
        left_ms: Time until the deadline, milliseconds.
        options: What the function asks of a model beyond the prompt.
    """

    id: str
    input: Any
    text: str | None
    left_ms: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer while it is made: text or any JSON."""

    data: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """The end of an answer.

    Attributes:
        output: The whole answer.
        usage: Counters: ``input_tokens``, ``output_tokens``.
        finish: Why a model stopped: ``stop`` or ``length``; empty for functions.
    """

    output: Any
    usage: dict[str, int] = field(default_factory=dict)
    finish: str = ""


class Instance(Protocol):
    """A running copy of a function or model."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can take calls."""
        ...

    @property
    def killed(self) -> bool:
        """Whether the agent ended it (a cancelled call that would not end); no crash then."""
        ...

    @property
    def busy(self) -> int:
        """Calls that occupy it, abandoned ones that have not ended yet included."""
        ...

    @property
    def slots(self) -> int:
        """Calls it can run at a time."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """What it said about itself when it started."""
        ...

    def invoke(self, request: Request) -> AsyncGenerator[Piece | Final, None]:
        """Run one call: pieces, then exactly one `Final`.

        Closing the iterator early (or cancelling whoever iterates) cancels the call; an instance
        that does not heed this within the grace time is killed.

        Raises:
            FoamError: The call failed: ``ExecutionFailed``, ``InvalidTask``, ``TaskCancelled``.
            InstanceDied: The instance ended in the middle of it.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Ask a call to end, and kill the instance when it does not within the grace time."""
        ...

    async def settled(self, request_id: str) -> None:
        """Return when the call no longer occupies the instance."""
        ...

    async def close(self, grace_s: float) -> None:
        """End it: ask, wait up to ``grace_s`` seconds, then kill; idempotent."""
        ...


Died = Callable[[Instance], None]
"""Called once when an instance has ended, whatever the reason."""


class Runtime(Protocol):
    """A way of running functions."""

    @property
    def name(self) -> str:
        """Name in function specifications."""
        ...

    def check(self, spec: FunctionSpec) -> None:
        """Check a specification before anything is started.

        Raises:
            ConfigurationError: It lacks something or names something unknown.
        """
        ...

    def group(self, spec: FunctionSpec) -> str:
        """Return the name of the instances that can serve a function; equal ones share them."""
        ...

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """Return the options that go with every call of a function."""
        ...

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """Describe the model behind a function, given what its instance said (or nothing yet)."""
        ...

    async def start(self, spec: FunctionSpec, *, died: Died) -> Instance:
        """Start an instance; returns when it is ready.

        Raises:
            InstanceFailed: It ended or refused before it was ready.
        """
        ...
