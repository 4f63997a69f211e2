"""``python -m broker.embedded``: the broker as a child of ``EmbeddedBroker``.

Reads one line of JSON (``ServerOrder``) from standard input, answers with one line on standard
output, ``{"port": N, "tls_port": M, "websocket_port": W}`` or ``{"error": "..."}``, and serves
until SIGTERM, or until standard input ends because the parent is gone. SIGHUP reads credentials and
certificates again.
"""

import asyncio
import contextlib
import io
import json
import logging
import resource
import sys
from asyncio import sslproto
from typing import Any, Final

import structlog

from broker.embedded.order import ServerOrder
from broker.embedded.server import EmbeddedServer
from broker.lifecycle import run_until_signal
from capability_schemas.errors import ConfigurationError

_FILES_BESIDE: Final = 64
_TLS_BUFFER_BYTES: Final = 32 * 1024


class _LogFile(io.StringIO):
    """Standard error, which takes what it can: a full disk ends no client's connection."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def _configure_logging() -> None:
    """Log to standard error, which is the log file of the engine."""
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)  # the libraries
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(file=_LogFile()),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )


def _answer(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _shrink_tls_buffers() -> None:
    """Give a TLS connection 32 KiB to read into, not the 256 of asyncio: a record holds 16.

    asyncio takes them when the handshake begins, so 500 silent connections would cost 150 MB.
    """
    sslproto.SSLProtocol.max_size = _TLS_BUFFER_BYTES


def _open_files_for(connections: int) -> None:
    """Ask the system for as many descriptors as the limit of connections needs, if it has them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _FILES_BESIDE
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(order: ServerOrder) -> None:
    async with EmbeddedServer(order=order) as server:
        _answer(port=server.port, tls_port=server.tls_port, websocket_port=server.websocket_port)
        await run_until_signal(server, parent_fd=sys.stdin.fileno())


def main() -> int:
    """Run the broker; returns the exit status, 78 (EX_CONFIG) for settings that cannot work."""
    _configure_logging()
    order = ServerOrder.model_validate_json(sys.stdin.buffer.readline())
    _open_files_for(order.settings.connection_limit)
    _shrink_tls_buffers()
    try:
        asyncio.run(_serve(order))
    except ConfigurationError as exc:
        _answer(error=exc.message)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
