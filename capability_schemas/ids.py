"""Identifiers and the wire clock.

Every identifier that appears in a topic is one path level that all brokers carry, those that
map topics to dotted subjects included, hence the narrow alphabet (PROTOCOL, preamble).
"""

import re
import secrets
import time
import uuid
from typing import Annotated, Final

from pydantic import StringConstraints

from capability_schemas.clock import SteadyClock
from capability_schemas.errors import ProtocolError

IDENTIFIER_PATTERN: Final = r"^[A-Za-z0-9_-]{1,64}$"
_IDENTIFIER: Final = re.compile(IDENTIFIER_PATTERN.removesuffix("$") + r"\Z")

Identifier = Annotated[str, StringConstraints(pattern=IDENTIFIER_PATTERN)]
"""A name that may stand as one topic level: 1 to 64 of ``A-Z a-z 0-9 _ -``."""


def is_identifier(value: object) -> bool:
    """Tell whether ``value`` is a string that may stand as one topic level."""
    return isinstance(value, str) and _IDENTIFIER.match(value) is not None


def check_identifier(value: str, what: str) -> str:
    """Return ``value`` unchanged when it is an identifier.

    Args:
        value: The candidate.
        what: What it names, for the error message ("node", "client id").

    Raises:
        ProtocolError: It is empty, longer than 64 characters or holds another character.
    """
    if not is_identifier(value):
        raise ProtocolError(
            f"{what} {value!r} is not an identifier: use 1 to 64 of A-Z a-z 0-9 _ -",
            field=what,
        )
    return value


def wall_ms() -> int:
    """Return the wall clock of this machine as UTC milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


_CLOCK: Final = SteadyClock(wall=wall_ms)


def now_ms() -> int:
    """Return the time as UTC milliseconds since the Unix epoch.

    The one default clock of the mesh: the wall clock without its steps
    (`capability_schemas.clock`). State machines take a clock as an argument instead.
    """
    return _CLOCK()


def new_uuid7(at_ms: int | None = None) -> str:
    """Make a time-ordered unique identifier: UUID version 7, RFC 9562 section 5.7.

    Args:
        at_ms: Timestamp to embed, UTC milliseconds; the current time when omitted.

    Returns:
        The 36-character text form, which is an identifier.
    """
    timestamp = (now_ms() if at_ms is None else at_ms) & (1 << 48) - 1
    value = timestamp << 80 | 0x7 << 76 | secrets.randbits(12) << 64
    value |= 0b10 << 62 | secrets.randbits(62)
    return str(uuid.UUID(int=value))
