"""The ``mcp`` runtime: a tool of an MCP server as a function of the node."""

import hashlib
import itertools
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import Identifier
from node_agent.agents.servers import McpServer, load_frame, mcp_server
from node_agent.runtimes import base
from node_agent.runtimes.child import ChildInstance


class McpOptions(BaseModel):
    """Options of an ``mcp`` function.

    Attributes:
        server: Name of an ``[[mcp]]`` table of the node file.
        tool: The tool, as the server calls it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    server: Identifier
    tool: Annotated[str, Field(min_length=1, max_length=128)]


class McpRuntime:
    """Calls tools of MCP servers; functions of one server with equal limits share its processes.

    Args:
        context: What it may use of the node.
    """

    name = "mcp"
    chats = False

    def __init__(self, context: base.RuntimeContext) -> None:
        self._context = context
        self._numbers = itertools.count(1)

    def check(self, spec: FunctionSpec) -> None:
        """Check the options, that the server is declared and that the function may reach it."""
        self._server(spec).check_access(spec)

    def group(self, spec: FunctionSpec) -> str:
        """Functions of one server with equal limits share instances; an edit makes new ones."""
        options = _options(spec)
        table = dict(self._context.mcp_servers.get(options.server, {}))
        concerns = json.dumps([table, spec.limits.model_dump()], sort_keys=True, default=str)
        digest = hashlib.sha256(f"{concerns}{spec.concurrency}".encode()).hexdigest()[:12]
        return f"mcp:{options.server}:{digest}"

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """Return which tool it is."""
        return {"tool": _options(spec).tool}

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """There is no model behind it."""
        return None

    async def start(self, spec: FunctionSpec, *, died: base.Died) -> ChildInstance:
        """Start a process that starts or reaches the server."""
        try:
            server = self._server(spec)
            load = load_frame(
                server,
                limits=spec.limits,
                slots=spec.concurrency,
                start_timeout_s=self._context.start_timeout_s,
            )
        except ConfigurationError as exc:
            raise base.InstanceFailed(exc.message) from exc
        instance = ChildInstance(
            name=f"mcp-{server.name}-{next(self._numbers)}",
            load=load,
            start_timeout_s=self._context.start_timeout_s,
            cancel_grace_s=self._context.cancel_grace_s,
            died=died,
        )
        await instance.start()
        return instance

    def _server(self, spec: FunctionSpec) -> McpServer:
        where = f"function {spec.name}"
        return mcp_server(self._context.mcp_servers, _options(spec).server, where)


def _options(spec: FunctionSpec) -> McpOptions:
    return base.read_options(McpOptions, spec)
