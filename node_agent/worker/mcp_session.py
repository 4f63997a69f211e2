"""The one door to the ``mcp`` package: a connection to an MCP server, and its tools as plain JSON.

Source: Model Context Protocol, revisions 2024-11-05 to 2026-07-28 (transports, tools).
"""

import asyncio
import contextlib
import fnmatch
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import httpx2
import mcp_types
from mcp.client.client import Client
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from node_agent.worker.base import InvocationError

TOOL_LIMIT: Final = 512
"""Most tools taken from one server."""

_PAGE_LIMIT: Final = 50
_LINE_LIMIT_BYTES: Final = 8 * 1024 * 1024
_GARBAGE_LIMIT: Final = 100
"""Lines that are no message (a log on the wrong stream) after which a server is given up."""

_END_S: Final = 0.5
_DESCRIPTION_CHARS: Final = 2000
_SCHEMA_CHARS: Final = 32 * 1024
_ERROR_CHARS: Final = 2000
_SECRET_CHARS: Final = 8
"""Shortest word of headers and addresses that is taken for a key."""

_SILENT_LIMIT: Final = 3
"""Calls in a row without an answer after which a server counts as lost."""

_LOST_CODES: Final = frozenset({mcp_types.CONNECTION_CLOSED})
_Messages = anyio.streams.memory.MemoryObjectSendStream[SessionMessage | Exception]
_Streams = tuple[Any, Any]


class McpSession:
    """A connection to one server, held open by `run`; used by one event loop.

    Args:
        server: The ``server`` of the ``load`` frame, see `node_agent.agents.servers`.
    """

    def __init__(self, server: Mapping[str, Any]) -> None:
        self._server = server
        self._name = str(server["name"])
        self._timeout_s = float(server["timeout_s"])
        self._start_s = float(server["start_s"])
        self._client: Client | None = None
        self._names: frozenset[str] = frozenset()
        self._silent = 0
        self._why = ""
        self.served = False
        """Whether a tool has answered."""
        self.ready = asyncio.Event()
        self.lost = asyncio.Event()
        """Set when the connection is of no more use."""

    @property
    def info(self) -> dict[str, Any]:
        """What the server says about itself."""
        client = self._connected()
        about = client.server_info
        return {
            "engine": "mcp",
            "server": self._name,
            "title": None if about is None else f"{about.name} {about.version}",
            "protocol": client.protocol_version,
        }

    async def run(self, until: asyncio.Event) -> None:
        """Connect, and hold the connection until ``until`` is set or it is lost.

        Raises:
            InvocationError: The server cannot be started, reached or understood.
        """
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self._start_s):
                    self._client = await stack.enter_async_context(
                        Client(self._transport(), cache=None)
                    )
                    await self._list()
                self.ready.set()
                await _first(until, self.lost)
                self.lost.set()
        except InvocationError:
            raise
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) or (self.ready.is_set() and until.is_set()):
                raise
            raise self._failure("cannot be used", _root(exc), self._start_s) from exc
        finally:
            self.lost.set()

    async def tools(self) -> list[dict[str, Any]]:
        """Return the tools that may be used: ``name``, ``description`` and ``parameters``.

        Raises:
            InvocationError: The server does not say.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._list()
        except (MCPError, ValidationError, TimeoutError) as exc:
            raise self._failure("does not list its tools", exc, self._timeout_s) from exc

    async def _list(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        for _ in range(_PAGE_LIMIT):
            page = await self._connected().list_tools(cursor=cursor)
            found += [_plain_tool(tool) for tool in page.tools if self._allows(tool.name)]
            cursor = page.next_cursor
            if cursor is None or len(found) >= TOOL_LIMIT:
                break
        self._names = frozenset(tool["name"] for tool in found[:TOOL_LIMIT])
        return found[:TOOL_LIMIT]

    async def call(self, tool: str, arguments: Any, left_s: float | None) -> Any:
        """Call a tool and return its result: structured where it is, else text.

        Args:
            tool: Name of the tool.
            arguments: An object.
            left_s: Time left, seconds; the server's own limit holds besides.

        Raises:
            InvocationError: There is no such tool, it may not be used, or it failed.
        """
        if not isinstance(arguments, dict):
            raise InvocationError("invalid_task", f"{tool} takes an object", field="input")
        if tool not in self._names and tool not in {one["name"] for one in await self.tools()}:
            known = ", ".join(sorted(self._names)[:20]) or "none"
            raise InvocationError(
                "execution_failed",
                f"MCP server {self._name} has no tool {tool!r} that may be used; it has: {known}",
            )
        own = left_s is None or self._timeout_s <= left_s
        limit_s = self._timeout_s if own else max(0.0, left_s or 0.0)
        try:
            async with asyncio.timeout(limit_s):
                result = await self._connected().call_tool(
                    tool, arguments, read_timeout_seconds=limit_s + 1
                )
        except TimeoutError:
            raise self._silence(tool, limit_s, own=own) from None
        except (MCPError, ValidationError, RuntimeError, OSError, httpx2.HTTPError) as exc:
            raise self._failure(f"failed {tool}", exc, limit_s) from exc
        self._silent = 0
        self.served = True
        if result.is_error:
            said = _text(result.content)[:_ERROR_CHARS] or "no reason given"
            raise InvocationError("execution_failed", f"{tool}: {said}", tool=tool)
        if result.structured_content is not None:
            return result.structured_content
        return _text(result.content)

    def _connected(self) -> Client:
        if self._client is None or (self.lost.is_set() and self.ready.is_set()):
            raise InvocationError(
                "execution_failed",
                f"MCP server {self._name} is gone{self._why and ': '}{self._why}",
            )
        return self._client

    def _allows(self, tool: str) -> bool:
        return any(fnmatch.fnmatchcase(tool, pattern) for pattern in self._server["allow"])

    def _silence(self, tool: str, limit_s: float, *, own: bool) -> InvocationError:
        if not own:
            return InvocationError("deadline_exceeded", f"the deadline passed while {tool} ran")
        self._silent += 1
        if self._silent >= _SILENT_LIMIT:
            self._lose(f"it left {self._silent} calls in a row unanswered")
        return InvocationError(
            "execution_failed",
            f"MCP server {self._name} did not answer {tool} within {limit_s:g} s",
            tool=tool,
        )

    def _failure(self, what: str, exc: BaseException, limit_s: float) -> InvocationError:
        """Return the error for what the connection raised, and see whether it is lost."""
        if self._why:
            why = self._why
        elif isinstance(exc, MCPError):
            why = exc.message
        elif isinstance(exc, ValidationError):
            why = f"its answer is not of the protocol: {exc.errors()[0]['msg']}"
        elif isinstance(exc, TimeoutError):
            why = f"no answer within {limit_s:g} s"
        else:
            why = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        why = self._private(why)
        if not isinstance(exc, MCPError | ValidationError) or (
            isinstance(exc, MCPError) and exc.code in _LOST_CODES
        ):
            self._lose(why)
        message = f"MCP server {self._name} {what}: {why}"
        return InvocationError("execution_failed", message[:_ERROR_CHARS])

    def _private(self, text: str) -> str:
        """Return text without what only this machine may know: keys in the address and headers."""
        query = urlsplit(self._server["url"] or "").query
        words = [word for value in self._server["headers"].values() for word in value.split()]
        for secret in (query, *words):
            if len(secret) >= _SECRET_CHARS:
                text = text.replace(secret, "[private]")
        return text

    def _lose(self, why: str) -> None:
        self._why = self._why or why
        self.lost.set()

    @contextlib.asynccontextmanager
    async def _transport(self) -> AsyncGenerator[_Streams, None]:
        if self._server["url"] is None:
            async with self._stdio() as streams:
                yield streams
            return
        timeout = httpx2.Timeout(self._timeout_s, read=None)  # silence is watched here
        async with (
            httpx2.AsyncClient(
                headers=self._server["headers"], timeout=timeout, trust_env=False
            ) as http,
            streamable_http_client(
                self._server["url"], http_client=http, max_sse_event_size=_LINE_LIMIT_BYTES
            ) as streams,
        ):
            yield streams

    @contextlib.asynccontextmanager
    async def _stdio(self) -> AsyncGenerator[_Streams, None]:
        """Start the server in this process's own group, and speak lines with it.

        The package's own transport puts it into a session of its own, where it would outlive a
        kill of this process, and reads lines of any length.
        """
        command = str(self._server["command"])
        try:
            process = await asyncio.create_subprocess_exec(
                command,
                *self._server["args"],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=sys.stderr.fileno(),
                env={**get_default_environment(), **self._server["env"]},
                cwd=self._server["folder"],
                limit=_LINE_LIMIT_BYTES,
            )
        except OSError as exc:
            raise InvocationError(
                "execution_failed",
                f"MCP server {self._name}: cannot run {command}: {exc.strerror or exc}",
            ) from exc
        incoming, read = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        write, outgoing = anyio.create_memory_object_stream[SessionMessage](0)
        try:
            async with incoming, read, write, outgoing, asyncio.TaskGroup() as group:
                pumps = [
                    group.create_task(self._read(process, incoming), name="McpSession.read"),
                    group.create_task(_write(process, outgoing), name="McpSession.write"),
                ]
                try:
                    yield read, write
                finally:
                    for pump in pumps:
                        pump.cancel()
        finally:
            await _end(process)

    async def _read(self, process: asyncio.subprocess.Process, incoming: _Messages) -> None:
        garbage = 0
        assert process.stdout is not None  # noqa: S101 - it was started with a pipe
        try:
            while garbage < _GARBAGE_LIMIT and (line := await process.stdout.readline()):
                try:
                    message = mcp_types.jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    garbage += 1
                    sys.stderr.write(f"no message: {line[:200]!r}\n")
                    continue
                await incoming.send(SessionMessage(message))
            if garbage:
                self._lose(f"{garbage} lines of its output are no messages")
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_END_S):
                        await process.wait()
                self._lose(
                    f"it ended with status {process.returncode}; the log of the node has its words"
                )
        except ValueError:  # StreamReader.readline
            self._lose(f"it sent a line of more than {_LINE_LIMIT_BYTES} bytes")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # the session has ended
        await incoming.aclose()


async def _write(process: asyncio.subprocess.Process, outgoing: Any) -> None:
    assert process.stdin is not None  # noqa: S101 - it was started with a pipe
    with contextlib.suppress(OSError):  # the reader sees the end too, and says so
        async for message in outgoing:
            text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
            process.stdin.write(text.encode() + b"\n")
            await process.stdin.drain()


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a server: close its input, wait a little, kill."""
    if process.stdin is not None:
        process.stdin.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_S):
            await process.wait()
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def _first(*events: asyncio.Event) -> None:
    """Wait for the first of several events."""
    async with asyncio.TaskGroup() as group:
        waits = [
            group.create_task(event.wait(), name=f"McpSession.wait-{number}")
            for number, event in enumerate(events)
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


def _root(exc: BaseException) -> BaseException:
    """Return what is inside groups of exceptions."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def _plain_tool(tool: mcp_types.Tool) -> dict[str, Any]:
    schema = tool.input_schema
    if len(str(schema)) > _SCHEMA_CHARS:  # a model cannot read that
        schema = {"type": "object"}
    return {
        "name": tool.name,
        "description": (tool.description or tool.title or "")[:_DESCRIPTION_CHARS],
        "parameters": schema,
    }


def _text(content: Sequence[Any]) -> str:
    """Return contents as text; what is none is named."""
    parts = []
    for block in content:
        if isinstance(block, mcp_types.TextContent):
            parts.append(block.text)
        elif isinstance(block, mcp_types.EmbeddedResource) and isinstance(
            block.resource, mcp_types.TextResourceContents
        ):
            parts.append(block.resource.text)
        else:
            parts.append(f"[{block.type}]")
    return "\n".join(parts)
