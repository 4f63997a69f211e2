"""Where the tools of an agent come from, and how they are called."""

import contextlib
import fnmatch
import itertools
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog

from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import check_schema
from capability_schemas.task import TaskPolicy
from node_agent.agents.loop import Tool, tool_name
from node_agent.agents.options import AgentOptions, ToolOptions
from node_agent.agents.servers import ServerProcesses
from node_agent.runtimes import base

_TEXT_ONLY: Mapping[str, Any] = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
}
_ANYTHING: Mapping[str, Any] = {"type": "object", "properties": {"text": {"type": "string"}}}
"""For a function that says nothing of its input: most take words."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Run = Callable[[base.Request], AsyncGenerator[base.Answer, None]]
"""Runs a tool: the input of the request is its arguments."""


@dataclass(frozen=True, slots=True)
class BoundTool:
    """A tool, and what it does.

    Attributes:
        tool: What the model sees.
        source: Where it comes from, as the declaration says.
        run: Calls it.
    """

    tool: Tool
    source: str
    run: Run


class Toolbox:
    """Finds the tools of an agent anew for every run: functions and servers change.

    Args:
        agent: The agent, for messages.
        context: What the node gives.
        servers: The processes for its MCP servers.
    """

    def __init__(
        self, *, agent: str, context: base.RuntimeContext, servers: ServerProcesses
    ) -> None:
        self._agent = agent
        self._context = context
        self._servers = servers
        self._numbers = itertools.count(1)

    async def tools(self, options: AgentOptions) -> dict[str, BoundTool]:
        """Return the tools of an agent by name.

        Raises:
            ConfigurationError: One is not there, or cannot be one.
            FoamError: An MCP server cannot be started or does not answer.
        """
        found: dict[str, BoundTool] = {}
        for wanted in options.tools:
            for bound in await self._find(wanted, options):
                name = bound.tool.name
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.deny):
                    continue
                if name in found:
                    raise ConfigurationError(
                        f"function {self._agent}: {found[name].source} and {bound.source} are both "
                        f"called {name}: give one a name, or deny it"
                    )
                found[name] = bound
        if len(found) > options.max_tools:
            _log.warning(
                "agent.too_many_tools", agent=self._agent, found=len(found), kept=options.max_tools
            )
        return dict(itertools.islice(found.items(), options.max_tools))

    async def _find(self, wanted: ToolOptions, options: AgentOptions) -> list[BoundTool]:
        kind, server, what = wanted.target
        if kind == "local":
            return [self._local(wanted, options, what)]
        if kind == "mesh":
            return [self._mesh(wanted, options, what)]
        return await self._mcp(wanted, options, server, what)

    def _local(self, wanted: ToolOptions, options: AgentOptions, name: str) -> BoundTool:
        local = self._context.local
        spec = None if local is None else local.specs().get(name)
        if local is None or spec is None:
            raise ConfigurationError(f"function {self._agent}: the node has no function {name}")
        schema = wanted.parameters or spec.input_schema or _ANYTHING
        if schema.get("type", "object") != "object":
            raise ConfigurationError(
                f"function {self._agent}: {name} takes no object as input: it cannot be a tool"
            )

        def run(request: base.Request) -> AsyncGenerator[base.Answer, None]:
            return local.invoke(name, replace(request, input=_unapproved(request.input)))

        return self._bound(wanted, options, spec.description, schema, run)

    def _mesh(self, wanted: ToolOptions, options: AgentOptions, what: str) -> BoundTool:
        mesh = self._context.mesh
        if mesh is None:
            raise ConfigurationError(
                f"function {self._agent}: {wanted.use}: this node is not connected to a mesh"
            )
        if what == "*":
            description = "Ask the mesh: it finds whoever can do what the text says."
            schema: Mapping[str, Any] = _TEXT_ONLY
        else:
            description = f"The function {what} of the mesh."
            schema = wanted.parameters or {"type": "object"}

        def run(request: base.Request) -> AsyncGenerator[base.Answer, None]:
            policy = (request.policy or TaskPolicy()).narrowed(wanted.policy or TaskPolicy())
            task: dict[str, Any] = {
                "session": request.session,
                "stream": False,
                "policy": policy.model_dump(),
            }
            if what == "*":
                task |= {"text": request.input["text"]}
            else:
                task |= {"function": what, "input": _unapproved(request.input)}
            return mesh.ask(task, timeout_s=(request.left_ms or 0.0) / 1000)

        return self._bound(wanted, options, description, schema, run)

    async def _mcp(
        self, wanted: ToolOptions, options: AgentOptions, server: str, what: str
    ) -> list[BoundTool]:
        offered = await self._listed(server)
        if what != "*":
            names = ", ".join(tool["name"] for tool in offered[:20]) or "none"
            offered = [tool for tool in offered if tool["name"] == what]
            if not offered:
                raise ConfigurationError(
                    f"function {self._agent}: MCP server {server} has no tool {what} that may be "
                    f"used; it has: {names}"
                )
        return [self._mcp_tool(wanted, options, server, tool) for tool in offered]

    def _mcp_tool(
        self, wanted: ToolOptions, options: AgentOptions, server: str, tool: Mapping[str, Any]
    ) -> BoundTool:
        name = str(tool["name"])

        async def run(request: base.Request) -> AsyncGenerator[base.Answer, None]:
            instance = await self._servers.instance(server)
            call = base.Request(
                id=request.id,
                input=request.input,
                text=None,
                left_ms=request.left_ms,
                options={"tool": name},
            )
            async with contextlib.aclosing(instance.invoke(call)) as answers:
                async for answer in answers:
                    yield answer

        described = wanted.model_copy(update={"use": f"mcp:{server}/{name}"})
        schema = wanted.parameters or _usable(tool["parameters"])
        return self._bound(described, options, tool["description"] or name, schema, run)

    async def _listed(self, server: str) -> list[dict[str, Any]]:
        """Ask a server for its tools."""
        instance = await self._servers.instance(server)
        request = base.Request(
            id=f"list-{next(self._numbers)}", input=None, text=None, options={"list": True}
        )
        listed: list[dict[str, Any]] = []
        async with contextlib.aclosing(instance.invoke(request)) as answers:
            async for answer in answers:
                if isinstance(answer, base.Final):
                    listed = answer.output
        return listed

    def _bound(
        self,
        wanted: ToolOptions,
        options: AgentOptions,
        description: str,
        schema: Mapping[str, Any],
        run: Run,
    ) -> BoundTool:
        tool = Tool(
            name=wanted.model_name or tool_name(wanted.use),
            description=wanted.description or description,
            parameters={"type": "object", **schema},
            approval=wanted.approve or options.approve,
            calls=wanted.max_calls,
        )
        return BoundTool(tool, wanted.use, run)


def _unapproved(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without ``approved_tools``: people approve tools of an agent, no model."""
    return {name: value for name, value in arguments.items() if name != "approved_tools"}


def _usable(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a server's schema where it is one of an object; anything goes where it is not."""
    try:
        check_schema(schema)
    except ConfigurationError:
        return {"type": "object"}
    return schema if schema.get("type", "object") == "object" else {"type": "object"}
