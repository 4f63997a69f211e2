"""Servers of the Model Context Protocol: their tables in a node file, and the processes for them.

::

    [[mcp]]
    name = "files"
    command = "mcp-server-filesystem"
    args = ["/srv/manuals"]
    allow = ["read_*"]

Each server is talked to by a child process (`node_agent.worker.mcp_host`), never by the agent.
"""

import asyncio
import importlib.util
import itertools
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from capability_schemas.errors import ConfigurationError, FoamError, Overloaded
from capability_schemas.functions import FunctionLimits, FunctionSpec
from capability_schemas.ids import Identifier
from capability_schemas.wire import first_problem
from node_agent.isolation.limits import limits_frame
from node_agent.runtimes import base
from node_agent.runtimes.child import ChildInstance
from node_agent.runtimes.openai import is_inside

_BACKOFF_S = 0.5
_BACKOFF_LIMIT_S = 30.0
_HEADERS_LIMIT_BYTES = 64 * 1024


class McpServer(BaseModel):
    """A server of tools, one ``[[mcp]]`` table.

    Attributes:
        name: What functions and agents call it.
        command: Program that speaks MCP on its standard input and output; looked for on the PATH.
        args: Its arguments.
        env: Environment variables it gets beside the usual ones.
        folder: Where it runs; where the node runs when None.
        url: Address of a server that is there already (streamable HTTP), in place of ``command``.
        headers_file: File of mode 0600 with request headers, ``Name: value`` a line.
        allow: Tools that may be used, ``*`` and ``?`` match.
        timeout_ms: Longest wait for one answer; its start has the time that any instance has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Identifier
    command: Annotated[str, Field(min_length=1)] | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    folder: Path | None = None
    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+[^\s#@]*$")] | None = None
    headers_file: Path | None = None
    allow: tuple[str, ...] = ("*",)
    timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 30_000

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if (self.command is None) == (self.url is None):
            raise ValueError("write either command or url")
        if self.url is not None and (self.args or self.env or self.folder):
            raise ValueError("args, env and folder are for a command, not for a url")
        if self.url is None and self.headers_file is not None:
            raise ValueError("headers_file is for a url, not for a command")
        return self

    def check_access(self, spec: FunctionSpec) -> None:
        """Check that a function may reach the server and that its headers are private.

        Raises:
            ConfigurationError: It may not, they are not, or the ``mcp`` package is missing.
        """
        where = f"function {spec.name}: MCP server {self.name}"
        if importlib.util.find_spec("mcp") is None:
            raise ConfigurationError(f"{where}: mcp is missing: pip install 'foam-mesh[agent]'")
        if self.url is not None and not spec.limits.network:
            raise ConfigurationError(f"{where} is at {self.url}: set limits.network = true")
        host = urlsplit(self.url or "").hostname or ""
        if not is_inside(host) and not spec.policy.external:
            raise ConfigurationError(
                f"{where}: {host} is outside of this site: say policy.external = true, so that "
                "tasks which must stay here do not go there"
            )
        self.headers()

    def headers(self) -> dict[str, str]:
        """Return the request headers of its file.

        Raises:
            ConfigurationError: The file is missing, readable by others, or not of that form.
        """
        path = self.headers_file
        if path is None:
            return {}
        where = f"MCP server {self.name}: headers_file {path}"
        try:
            mode = path.stat().st_mode
            text = path.read_text(encoding="utf-8")[:_HEADERS_LIMIT_BYTES]
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigurationError(f"{where}: cannot be read: {exc}") from exc
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigurationError(f"{where}: others may read it: chmod 600 {path}")
        found = {}
        for number, line in enumerate(text.splitlines(), 1):
            name, colon, value = line.partition(":")
            if line.strip() and not (colon and name.strip().isascii()):
                raise ConfigurationError(f"{where}, line {number}: write Name: value")
            if line.strip():
                found[name.strip()] = value.strip()
        return found


def mcp_server(servers: Mapping[str, Mapping[str, Any]], name: str, where: str) -> McpServer:
    """Return the server of a name.

    Args:
        servers: The ``[[mcp]]`` tables by name, as the node file has them.
        name: The server.
        where: Who asks, for messages.

    Raises:
        ConfigurationError: There is none, or its table is wrong.
    """
    table = servers.get(name)
    if table is None:
        known = ", ".join(sorted(servers)) or "none"
        raise ConfigurationError(
            f"{where}: there is no [[mcp]] server {name!r}; the node file has: {known}"
        )
    try:
        return McpServer.model_validate({**table, "name": name})
    except ValidationError as exc:
        field, problem = first_problem(exc)
        place = f"mcp.{name}.{field}" if field else f"mcp.{name}"
        raise ConfigurationError(f"{place}: {problem}") from exc


def check_servers(servers: Mapping[str, Mapping[str, Any]]) -> None:
    """Check all ``[[mcp]]`` tables of a node file.

    Raises:
        ConfigurationError: One is wrong; the message says where.
    """
    for name in servers:
        mcp_server(servers, name, "mcp").headers()


def load_frame(
    server: McpServer, *, limits: FunctionLimits, slots: int, start_timeout_s: float
) -> dict[str, Any]:
    """Return the ``load`` frame of the process that talks to a server.

    Args:
        server: The server.
        limits: What the process, a server that it starts included, may take.
        slots: Calls at a time.
        start_timeout_s: When the process is given up, seconds; it says what it waits for before.
    """
    return {
        "runtime": "mcp",
        "concurrency": slots,
        "server": {
            "name": server.name,
            "command": server.command,
            "args": list(server.args),
            "env": dict(server.env),
            "folder": None if server.folder is None else str(server.folder),
            "url": server.url,
            "headers": server.headers(),
            "allow": list(server.allow),
            "timeout_s": server.timeout_ms / 1000,
            "start_s": start_timeout_s / 2,  # the other half is for the process itself
        },
        "limits": limits_frame(limits),
    }


class ServerProcesses:
    """The processes behind the MCP servers of one agent: started when needed, again when dead.

    Owned by the agent's event loop. After a failed start there is a pause that doubles up to a cap.

    Args:
        agent: The agent; its limits are those of each process.
        context: Where the tables are, and how long a start may take.
        slots: Calls of one server at a time.
    """

    def __init__(self, *, agent: FunctionSpec, context: base.RuntimeContext, slots: int) -> None:
        self._agent = agent
        self._context = context
        self._slots = slots
        self._numbers = itertools.count(1)
        self._instances: list[tuple[McpServer, ChildInstance]] = []
        self._locks: dict[str, asyncio.Lock] = {}  # one start of a server at a time
        self._failures: dict[str, int] = {}
        self._pause_until: dict[str, float] = {}

    def server(self, name: str) -> McpServer:
        """Return a server as the node file has it now; see `mcp_server`."""
        where = f"function {self._agent.name}"
        server = mcp_server(self._context.mcp_servers, name, where)
        server.check_access(self._agent)
        return server

    async def instance(self, name: str) -> ChildInstance:
        """Return the process for a server, started if need be.

        Cancellation is safe: a start under way is given up.

        Raises:
            ConfigurationError: There is no such server, or it may not be used.
            InstanceFailed: It could not be started.
            Overloaded: It could not be started lately.
        """
        async with self._locks.setdefault(name, asyncio.Lock()):
            server = self.server(name)
            await self._sweep(server)
            for known, instance in self._instances:
                if known == server:
                    return instance
            self._check_pause(name)
            try:
                instance = self._make(server)
                await instance.start()
            except FoamError:
                self._count_failure(name)
                raise
            self._failures.pop(name, None)
            self._instances.append((server, instance))
            return instance

    async def close(self, grace_s: float) -> None:
        """End all processes."""
        async with asyncio.TaskGroup() as group:
            for server, instance in self._instances:
                group.create_task(
                    _end(instance, grace_s), name=f"node_agent.ServerProcesses[{server.name}]"
                )

    async def _sweep(self, server: McpServer) -> None:
        """End what is dead, and what was started for an earlier table and serves nobody."""
        for known, instance in list(self._instances):
            outdated = known.name == server.name and known != server
            if not instance.alive or (outdated and not instance.busy):
                self._instances.remove((known, instance))
                await _end(instance, 0)

    def _make(self, server: McpServer) -> ChildInstance:
        return ChildInstance(
            name=f"{self._agent.name}-mcp-{server.name}-{next(self._numbers)}",
            load=load_frame(
                server,
                limits=self._agent.limits,
                slots=self._slots,
                start_timeout_s=self._context.start_timeout_s,
            ),
            start_timeout_s=self._context.start_timeout_s,
            cancel_grace_s=self._context.cancel_grace_s,
            died=lambda _: None,
        )

    def _check_pause(self, name: str) -> None:
        left_s = self._pause_until.get(name, 0.0) - asyncio.get_running_loop().time()
        if left_s > 0:
            raise Overloaded(
                f"MCP server {name} failed to start {self._failures[name]} times in a row",
                retry_after_ms=round(left_s * 1000) + 1,
            )

    def _count_failure(self, name: str) -> None:
        count = self._failures[name] = self._failures.get(name, 0) + 1
        pause_s = min(_BACKOFF_LIMIT_S, _BACKOFF_S * 2 ** min(count - 1, 16))
        self._pause_until[name] = asyncio.get_running_loop().time() + pause_s


async def _end(instance: ChildInstance, grace_s: float) -> None:
    await instance.close(grace_s)
    await instance.stop()
