"""Logs of the ``foam`` processes: structlog, one event per line, on stderr.

A process that a person started writes for people when stderr is a terminal; every other one writes
JSON, one object per line (``event``, ``level``, ``timestamp`` and the event's fields). ``foam up``
directs the stderr of its children to ``logs/<process>.log`` in the data folder. Fields whose name
says that they are secret are masked, so that a careless ``log.info("…", password=…)`` somewhere
does not end up in a file.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final, TextIO

import structlog

from capability_schemas.errors import FoamError

__all__ = ["configure_library_logging", "configure_logging"]

_SECRET_WORDS: Final = ("password", "secret", "token_value", "private_key", "authorization")
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


def _mask(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in event:
        if any(word in name.lower() for word in _SECRET_WORDS):
            event[name] = "***"
    return event


def _plain_expected(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Errors raised on purpose explain themselves: their message instead of a traceback."""
    error = event.get("exc_info")
    if isinstance(error, FoamError):
        if event.get("event") == "service.task_crashed":
            raise structlog.DropEvent  # the process says it when it ends (`foam.cli.processes`)
        del event["exc_info"]
        event["error"] = error.message
        event["kind"] = type(error).__name__
    return event


def configure_library_logging() -> None:
    """Keep a program's output clean: warnings on stderr, nothing else, nothing on stdout.

    For programs that use the client and have not configured structlog, whose own default writes
    everything to stdout. The standard library's logging is theirs and stays as it is.
    """
    if not structlog.is_configured():
        _configure_structlog(logging.WARNING, sys.stderr)


def configure_logging(
    level: str = "info", *, process: str | None = None, stream: TextIO | None = None
) -> None:
    """Set up logging for this process; the last call wins.

    Args:
        level: Least severe level written: debug, info, warning, error or critical.
        process: Name bound to every event, for example ``router-1``.
        stream: Where to; None means stderr.
    """
    target = sys.stderr if stream is None else stream
    threshold = _LEVELS[level]
    _configure_structlog(threshold, target)
    # Libraries that log with the standard library share the stream; their chatter below a warning
    # is not ours.
    logging.basicConfig(
        level=max(threshold, logging.WARNING),
        stream=target,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        force=True,
    )
    structlog.contextvars.clear_contextvars()
    if process is not None:
        structlog.contextvars.bind_contextvars(process=process)


def _configure_structlog(threshold: int, target: TextIO) -> None:
    renderer: Any = structlog.processors.JSONRenderer()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _mask,
        _plain_expected,
    ]
    if target.isatty():
        # The default one shows locals, which takes a second a time, and may hold secrets.
        plain = structlog.dev.plain_traceback
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=plain)
    else:
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(file=target),
        cache_logger_on_first_use=False,
    )
