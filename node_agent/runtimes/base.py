"""The contract between the agent and whatever runs functions."""

import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import ConfigurationError, Unavailable
from capability_schemas.functions import FunctionSpec
from capability_schemas.task import TaskPolicy
from capability_schemas.wire import problems

_Options = TypeVar("_Options", bound=BaseModel)


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
        options: What the function asks of a model beyond the prompt. Runtimes that chat also take
            ``messages`` (a whole conversation, in the message format of the OpenAI chat API, in
            place of the prompt template) and ``tools`` (likewise); with ``tools`` the output is
            ``{"content": text or None, "tool_calls": [{"id", "name", "arguments"}]}``.
        session: Affinity key: calls of one session share a prompt prefix.
        policy: Demands of the task; they hold for the functions that this one asks, too.
        shown: The beginning of the answer, which another node has given: go on behind it, and end
            with the whole. Only for functions that continue from a prefix.
    """

    id: str
    input: Any
    text: str | None
    left_ms: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    session: str | None = None
    policy: TaskPolicy | None = None
    shown: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer while it is made: text or any JSON."""

    data: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A step on the way to an answer: a tool call of an agent. Shown, but no part of the answer.

    Attributes:
        step: Which step, unique within the call.
        state: ``running``, ``finished``, ``failed`` or ``refused``.
        detail: What is being done: tool, arguments, result or error; JSON values.
    """

    step: str
    state: str
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """The end of an answer.

    Attributes:
        output: The whole answer.
        usage: Counters: ``input_tokens``, ``output_tokens``, ``cached_tokens`` (of the input, not
            decoded again; stays in the node, for it would tell what others have asked).
        finish: Why a model stopped: ``stop``, ``length`` or ``tool_calls``; empty for functions.
        confidence: How sure it is, 0 to 1: of a model the probability of the least certain token;
            None where it is not told.
        timing: Where the engine spent its time, milliseconds: ``prefill_ms``, ``decode_ms``.
    """

    output: Any
    usage: dict[str, int] = field(default_factory=dict)
    finish: str = ""
    confidence: float | None = None
    timing: dict[str, float] = field(default_factory=dict)


Answer = Piece | Progress | Final
"""What a call yields: pieces and progress, then exactly one final."""


class Instance(Protocol):
    """A running copy of a function or model."""

    @property
    def pid(self) -> int:
        """Process id; 0 for an instance without a process of its own."""
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

    def invoke(self, request: Request) -> AsyncGenerator[Answer, None]:
        """Run one call: pieces and progress, then exactly one `Final`.

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

    @property
    def chats(self) -> bool:
        """Whether its functions take ``messages`` and ``tools``: an agent can think with them."""
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
        """Describe the model behind a function, given what its instance said (or nothing yet).

        An engine named while nothing runs yet means that the model is no file of this node.
        """
        ...

    async def start(self, spec: FunctionSpec, *, died: Died) -> Instance:
        """Start an instance; returns when it is ready.

        Raises:
            InstanceFailed: It ended or refused before it was ready.
        """
        ...


def read_options(kind: type[_Options], spec: FunctionSpec) -> _Options:
    """Read the options of a function.

    Args:
        kind: What its runtime takes.
        spec: The function.

    Raises:
        ConfigurationError: They do not fit; it says everything that is wrong with them.
    """
    try:
        return kind.model_validate(spec.options)
    except ValidationError as exc:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in ('options', *path))}: {problem}"
            for path, problem in problems(exc)
        )
        raise ConfigurationError(f"function {spec.name}: {wrong}") from exc


def own_group(spec: FunctionSpec) -> str:
    """Return the group of a function that shares instances with no other.

    An edit of its code, or of what its process is started with, makes another group: old instances
    finish what they have and take nothing new.
    """
    concerns = spec.model_dump_json(
        include={"entry", "code", "model", "options", "concurrency", "limits"}
    )
    digest = hashlib.sha256(concerns.encode()).hexdigest()[:12]
    return f"{spec.runtime}:{spec.name}:{digest}"


class LocalFunctions(Protocol):
    """The functions of the own node, as one of its runtimes may call them (an agent's tools)."""

    def specs(self) -> Mapping[str, FunctionSpec]:
        """Return what the node offers now, by name."""
        ...

    def runtime(self, name: str) -> Runtime:
        """Return the runtime behind a function.

        Raises:
            NotFound: The node has no such function.
        """
        ...

    def invoke(self, name: str, request: Request) -> AsyncGenerator[Answer, None]:
        """Run a function of the node, queued and limited like an invocation from outside.

        Raises:
            NotFound: The node has no such function.
            FoamError: It was refused, or failed.
        """
        ...


class MeshFunctions(Protocol):
    """The functions of the whole mesh, by way of its routers."""

    def ask(self, task: Mapping[str, Any], *, timeout_s: float) -> AsyncGenerator[Answer, None]:
        """Send a task (fields of PROTOCOL section 2, no id) and yield its answer.

        Raises:
            FoamError: It ended in an error, or in none within ``timeout_s`` seconds.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeContext:
    """What the node gives its runtimes.

    Attributes:
        node: The node's id.
        start_timeout_s: Longest start of an instance, seconds.
        cancel_grace_s: Time a cancelled call has before its process is killed, seconds.
        model_path: Turns the model of a specification (a path, or a name in the model store) into
            a file; raises ``ConfigurationError`` when there is none, saying how to get it.
        local: The node's own functions; None where there is no node around (tests, checks).
        mesh: The mesh's functions; None likewise.
        mcp_servers: Servers of tools by name, as the declaration names them (``[[mcp]]``, paths
            absolute); always those of the declaration in force, so look when an instance starts.
    """

    node: str = "local"
    start_timeout_s: float = 120.0
    cancel_grace_s: float = 2.0
    model_path: Callable[[str], Path] = Path
    local: LocalFunctions | None = None
    mesh: MeshFunctions | None = None
    mcp_servers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


RuntimeFactory = Callable[[RuntimeContext], Runtime]
"""Makes a runtime: what an entry point of the group ``foam.runtimes`` names."""
