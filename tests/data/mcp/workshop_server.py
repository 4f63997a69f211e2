"""An MCP server for tests: good tools, and bad manners on request.

Run with ``stdio``, or ``http FD`` to serve streamable HTTP on a listening socket.
"""

import asyncio
import os
import signal
import sys

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("workshop", version="1.2.0")


@server.tool()
def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


@server.tool()
def manual(topic: str) -> str:
    """Look a topic up in the manual."""
    return f"About {topic}: tighten the bolts to 12 Nm."


@server.tool()
def pid() -> str:
    """Tell the process id."""
    return str(os.getpid())


@server.tool()
def variable(name: str) -> str:
    """Tell an environment variable."""
    return os.environ.get(name, "unset")


@server.tool()
def broken() -> str:
    """Fail."""
    raise ToolError("the drill is jammed")


@server.tool()
async def wait() -> str:
    """Say nothing for an hour."""
    await asyncio.sleep(3600)
    return "done"


@server.tool()
def vanish() -> str:
    """End the process."""
    os.kill(os.getpid(), signal.SIGKILL)
    return "never said"


@server.tool()
def grow() -> str:
    """Offer one more tool from now on."""

    def extra() -> str:
        """Be new."""
        return "new"

    server.add_tool(extra)
    return "grown"


def main() -> None:
    if sys.argv[1] == "http":
        import socket  # noqa: PLC0415 - only this one needs them

        import uvicorn  # noqa: PLC0415

        listening = socket.socket(fileno=int(sys.argv[2]))
        config = uvicorn.Config(server.streamable_http_app(), log_level="warning")
        asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))
    else:
        server.run("stdio")


if __name__ == "__main__":
    main()
