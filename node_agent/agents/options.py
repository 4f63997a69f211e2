"""What the declaration of an agent says, and whether what it names is there."""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from capability_schemas.errors import ConfigurationError, InvalidTask
from capability_schemas.functions import FunctionSpec, JsonSchema
from capability_schemas.ids import Identifier
from capability_schemas.task import FunctionRef, TaskPolicy
from node_agent.agents.loop import Approval, LoopLimits, tool_name
from node_agent.runtimes.base import read_options

_MCP = re.compile(r"mcp:(?P<server>[A-Za-z0-9_-]{1,64})/(?P<tool>\S{1,128})")


class ToolOptions(BaseModel):
    """A tool of an agent; a plain string in the list of tools stands for ``use``.

    Attributes:
        use: ``name``: a function of this node; ``mesh:name`` or ``mesh:name@>=1.2``: a function of
            any node; ``mesh:*``: whatever the mesh finds for a task in words; ``mcp:server/tool``
            or ``mcp:server/*``: tools of a server that ``[[mcp]]`` names.
        name: What the model calls it; made from ``use`` when None. Not for ``mcp:server/*``.
        description: What it does, in words; the function's or server's own when None.
        parameters: JSON Schema of the arguments; the function's or server's own when None. The
            node knows none of functions elsewhere: state it for them.
        approve: Whether it may run; as the agent says when None.
        max_calls: Most calls of it in one run.
        policy: Further demands on the node that runs it (PROTOCOL section 2), for ``mesh:``; those
            of the agent's own task hold anyway.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    use: Annotated[str, Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: Annotated[str, Field(min_length=1, max_length=2000)] | None = None
    parameters: JsonSchema | None = None
    approve: Approval | None = None
    max_calls: Annotated[int, Field(ge=1)] | None = None
    policy: TaskPolicy | None = None

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        kind, where, what = self.target
        if kind in ("local", "mesh") and what != "*":
            try:
                FunctionRef.parse(what)
            except InvalidTask as exc:
                raise ValueError(exc.message) from exc
            if kind == "local" and "@" in what:
                raise ValueError(f"{self.use}: this node has one version; a range is for mesh:")
        elif kind == "mcp" and not where:
            raise ValueError(f"{self.use}: write mcp:server/tool or mcp:server/*")
        if self.policy is not None and kind != "mesh":
            raise ValueError(f"{self.use}: a policy is for mesh: only")
        if what == "*" and kind == "mcp" and (self.name or self.description or self.parameters):
            raise ValueError(f"{self.use}: many tools share no name, description or parameters")
        return self

    @property
    def target(self) -> tuple[Literal["local", "mesh", "mcp"], str, str]:
        """Kind, server (for MCP), and function or tool."""
        if self.use.startswith("mesh:"):
            return "mesh", "", self.use.removeprefix("mesh:")
        if self.use.startswith("mcp:"):
            found = _MCP.fullmatch(self.use)
            return ("mcp", found["server"], found["tool"]) if found else ("mcp", "", "")
        return "local", "", self.use

    @property
    def model_name(self) -> str:
        """What the model calls it; that of ``mcp:server/*`` is without use."""
        kind, server, what = self.target
        if kind == "mesh":
            what = "ask_mesh" if what == "*" else what.partition("@")[0]
        return self.name or tool_name(f"{server}_{what}" if server else what)


class AgentOptions(BaseModel):
    """Options of an ``agent`` function.

    Attributes:
        model: Function of this node to think with; its runtime chats.
        system: System message; ``{text}`` and names of input properties are filled in.
        template: Message of the user, likewise. Without words for it, the input's ``messages``
            (a conversation that came before, roles ``user`` and ``assistant``) must end in one.
        tools: What the model may call: the only tools there are for it.
        deny: Names of tools (as the model calls them) left out after all; ``*`` and ``?`` match.
        approve: Whether tools may run that do not say so themselves. ``ask``: those that the input
            of the task names in ``approved_tools``.
        max_turns: Most times that the model is asked, the last one without tools.
        max_calls: Most tool calls that run.
        max_same: Most times that a tool runs with the same arguments.
        max_tools: Most tools offered to the model.
        parallel: Tools that run at a time.
        tool_timeout_ms: Longest run of one tool.
        result_chars: Longest result that the model is told.
        stream: ``answer`` shows the words of a turn when it has ended without tool calls (at once
            in the last turn). ``words`` shows them as they are written; what the model says before
            it calls a tool is then part of the answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Identifier
    system: str | None = None
    template: str = "{text}"
    tools: Annotated[tuple[ToolOptions, ...], Field(max_length=64)] = ()
    deny: tuple[str, ...] = ()
    approve: Approval = "auto"
    max_turns: Annotated[int, Field(ge=1, le=100)] = 8
    max_calls: Annotated[int, Field(ge=0, le=1000)] = 16
    max_same: Annotated[int, Field(ge=1)] = 2
    max_tools: Annotated[int, Field(ge=1, le=512)] = 64
    parallel: Annotated[int, Field(ge=1, le=32)] = 4
    tool_timeout_ms: Annotated[int, Field(ge=1)] = 30_000
    result_chars: Annotated[int, Field(ge=1, le=1_000_000)] = 8000
    stream: Literal["answer", "words"] = "answer"

    @field_validator("tools", mode="before")
    @classmethod
    def _as_tables(cls, tools: Any) -> Any:
        if not isinstance(tools, list | tuple):
            return tools
        return [{"use": tool} if isinstance(tool, str) else tool for tool in tools]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        seen: dict[str, str] = {}
        for tool in self.tools:
            if tool.target[2] == "*" and tool.target[0] == "mcp":
                continue
            other = seen.setdefault(tool.model_name, tool.use)
            if other != tool.use or sum(one.use == tool.use for one in self.tools) > 1:
                raise ValueError(
                    f"{other} and {tool.use} are both called {tool.model_name}: give one a name"
                )
        return self

    @property
    def limits(self) -> LoopLimits:
        """The limits of a run."""
        return LoopLimits(
            turns=self.max_turns,
            calls=self.max_calls,
            same=self.max_same,
            result_chars=self.result_chars,
        )


def agent_options(spec: FunctionSpec) -> AgentOptions:
    """Return the options of an agent.

    Raises:
        ConfigurationError: They are wrong; the message says where, for all that is.
    """
    options = read_options(AgentOptions, spec)
    wrong = []
    if options.model == spec.name:
        wrong.append("options.model: an agent is no model")
    for number, tool in enumerate(options.tools):
        kind, _, what = tool.target
        if kind != "mcp" and what.partition("@")[0] == spec.name:
            wrong.append(f"options.tools.{number}: an agent is no tool of its own")
    if wrong:
        raise ConfigurationError(f"function {spec.name}: {'; '.join(wrong)}")
    return options


def check_agent(
    spec: FunctionSpec, functions: Mapping[str, FunctionSpec], chats: Callable[[str], bool]
) -> None:
    """Check that what an agent names is there on its node, and that it never comes back to itself.

    Args:
        spec: The agent.
        functions: All functions of the node, by name.
        chats: Tells whether the runtime of a function chats.

    Raises:
        ConfigurationError: It is not so; the message says what, and says all of it.
    """
    options, wrong = agent_options(spec), []
    if options.model not in functions:
        known = ", ".join(name for name in functions if chats(name)) or "none"
        wrong.append(
            f"options.model: this node has no function {options.model}; those that chat: {known}"
        )
    elif not chats(options.model):
        wrong.append(
            f"options.model: {options.model} runs on {functions[options.model].runtime}, "
            "which takes no conversation: name a function of a language model"
        )
    for number, tool in enumerate(options.tools):
        kind, _, name = tool.target
        if kind == "local" and name not in functions:
            wrong.append(
                f"options.tools.{number}: this node has no function {name}; for one of another "
                f"node write mesh:{name}"
            )
    circle = _circle(spec, functions)
    if circle:
        wrong.append(f"options.tools: agents call each other: {' -> '.join(circle)}")
    if wrong:
        raise ConfigurationError(f"function {spec.name}: {'; '.join(wrong)}")


def _local_tools(spec: FunctionSpec) -> list[str]:
    return [tool.target[2] for tool in agent_options(spec).tools if tool.target[0] == "local"]


def _circle(spec: FunctionSpec, functions: Mapping[str, FunctionSpec]) -> list[str]:
    """Return a way from an agent back to itself through agents of the node; empty if none is."""
    ways = [[spec.name]]
    seen = {spec.name}
    while ways:
        way = ways.pop()
        for name in _local_tools(functions.get(way[-1], spec)):
            if name == spec.name:
                return [*way, name]
            if name not in seen and name in functions and functions[name].runtime == spec.runtime:
                seen.add(name)
                ways.append([*way, name])
    return []
