"""Talks to one MCP server for the agent: lists its tools, calls them.

The server, when it is a program, is a child of this process and in its process group: it ends with
the instance, whoever kills that. A server that is lost is connected again for the next call. When
that fails, or it is lost again and again before any tool has answered, the process ends: a crash,
which the pool of instances knows how to treat.
"""

import asyncio
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from node_agent.worker.base import Emit, InvocationError, Request
from node_agent.worker.frames import FrameError, NotJsonError

if TYPE_CHECKING:
    from node_agent.worker.mcp_session import McpSession

_FRUITLESS_LIMIT: Final = 2
"""Connections in a row that were lost before any tool had answered, after which it is given up."""

_LAST_WORDS_S: Final = 1.0
_LEAVE_S: Final = 5.0
"""How long leaving a lost connection may take, seconds: its server ends meanwhile."""


class McpHost:
    """Host of one MCP server.

    Calls are by options: ``{"list": true}`` returns the tools, ``{"tool": name}`` calls one with
    the input as its arguments.

    Args:
        server: The ``server`` of the ``load`` frame, see `node_agent.agents.servers`.
        concurrency: Calls at a time.
        emit: Sends a frame.
    """

    def __init__(self, *, server: dict[str, Any], concurrency: int, emit: Emit) -> None:
        self._server = server
        self._slots = concurrency
        self._emit = emit
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._closing = asyncio.Event()
        self._ending = asyncio.Event()
        self._connecting = asyncio.Lock()  # of the three below
        self._session: McpSession | None = None
        self._holding: asyncio.Task[None] | None = None
        self._fruitless = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def load(self) -> dict[str, Any]:
        """Connect; returns what the server says about itself."""
        return {"slots": self._slots, **self._runner.run(self._connected()).info}

    def submit(self, request: Request) -> None:
        """Take a call; runs on the loop of ``serve``."""
        self._loop.call_soon_threadsafe(self._begin, request)

    def cancel(self, request_id: str) -> None:
        """End a call."""
        self._loop.call_soon_threadsafe(self._cancel, request_id)

    def close(self) -> None:
        """End ``serve``."""
        self._loop.call_soon_threadsafe(self._ending.set)

    def serve(self) -> None:
        """Run calls until ``close``, or until the server is given up."""
        self._runner.run(self._serve())

    async def _connected(self) -> "McpSession":
        """Return a session that is of use, a new one if need be.

        Raises:
            InvocationError: The server is given up; the process ends.
        """
        async with self._connecting:
            if self._session is not None and not self._session.lost.is_set():
                return self._session
            if self._session is not None and self._holding is not None:
                _, late = await asyncio.wait({self._holding}, timeout=_LEAVE_S)
                for holding in late:
                    holding.cancel()
                self._fruitless = 0 if self._session.served else self._fruitless + 1
                if self._fruitless >= _FRUITLESS_LIMIT:
                    self._ending.set()
                    name = self._server["name"]
                    message = f"MCP server {name} was lost {self._fruitless} times in a row"
                    raise InvocationError("execution_failed", message)
            try:
                self._session = await self._connect()
            except InvocationError:
                self._ending.set()
                raise
            return self._session

    async def _connect(self) -> "McpSession":
        # Imported here: the package behind it is optional, and its absence an error of the start.
        from node_agent.worker.mcp_session import McpSession  # noqa: PLC0415

        session = McpSession(self._server)
        # A task of its own: the connection must be left by the task that entered it.
        self._holding = self._loop.create_task(
            session.run(self._closing), name="node_agent.McpHost.hold"
        )
        ready = self._loop.create_task(session.ready.wait(), name="node_agent.McpHost.ready")
        await asyncio.wait({self._holding, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._holding.done():
            await self._holding  # raises why
        return session

    async def _serve(self) -> None:
        await self._ending.wait()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=_LAST_WORDS_S)
        self._closing.set()
        if self._holding is not None:
            await asyncio.wait({self._holding}, timeout=_LAST_WORDS_S)

    def _begin(self, request: Request) -> None:
        self._tasks[request.id] = self._loop.create_task(
            self._answer(request), name=f"node_agent.McpHost[{request.id}].call"
        )

    def _cancel(self, request_id: str) -> None:
        if request_id in self._tasks:
            self._tasks[request_id].cancel()

    async def _answer(self, request: Request) -> None:
        frame: dict[str, Any]
        try:
            frame = {"t": "final", "id": request.id, "output": await self._output(request)}
            self._emit(frame)
        except InvocationError as exc:
            self._fail(request, exc)
        except asyncio.CancelledError:
            # The end of this task by the agent's cancel frame, not of the loop: it is the outcome.
            self._fail(request, InvocationError("cancelled", "cancelled while it ran"))
        except (NotJsonError, FrameError) as exc:
            self._fail(request, InvocationError("execution_failed", f"not JSON: {exc}"))
        except Exception as exc:  # noqa: BLE001 - supervision boundary: one call, not the instance
            traceback.print_exception(exc)
            message = f"{type(exc).__name__}: {exc}"
            self._fail(request, InvocationError("execution_failed", message))
        finally:
            self._tasks.pop(request.id, None)

    async def _output(self, request: Request) -> Any:
        session = await self._connected()
        if request.options.get("list"):
            return await session.tools()
        left_s = None if request.deadline is None else request.deadline - time.monotonic()
        return await session.call(str(request.options["tool"]), request.input, left_s)

    def _fail(self, request: Request, error: InvocationError) -> None:
        self._emit(error.frame(request))
