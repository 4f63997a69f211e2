"""``python -m broker.embedded``: the broker as a child of ``EmbeddedBroker``.

Reads one line of JSON (``ServerOrder``) from standard input, answers with one line on standard
output, ``{"port": N, "tls_port": M}`` or ``{"error": "..."}``, and serves until SIGTERM, or until
standard input ends because the parent is gone. SIGHUP reads credentials and certificates again.
"""

import asyncio
import json
import logging
import sys
from typing import Any

import structlog

from broker.embedded.order import ServerOrder
from broker.embedded.server import EmbeddedServer
from broker.lifecycle import run_until_signal
from capability_schemas.errors import ConfigurationError


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
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )


def _answer(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


async def _serve(order: ServerOrder) -> None:
    async with EmbeddedServer(order=order) as server:
        _answer(port=server.port, tls_port=server.tls_port)
        await run_until_signal(server, parent_fd=sys.stdin.fileno())


def main() -> int:
    """Run the broker; returns the exit status, 78 (EX_CONFIG) for settings that cannot work."""
    _configure_logging()
    order = ServerOrder.model_validate_json(sys.stdin.buffer.readline())
    try:
        asyncio.run(_serve(order))
    except ConfigurationError as exc:
        _answer(error=exc.message)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
