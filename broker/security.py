"""What receivers of signed messages do besides checking: say so, and hear of revocations."""

from collections import Counter, deque
from collections.abc import Callable
from typing import Final

import structlog

from broker.events import EventSource
from capability_schemas.errors import FoamError, MalformedPayload
from capability_schemas.node import RegistryState
from capability_schemas.passport import PassportBook
from capability_schemas.trust import read_trust
from capability_schemas.wire import decode

_TOLD_LIMIT: Final = 10
_PERIOD_MS: Final = 60_000
_STATE_LIMIT_BYTES: Final = 64 * 1024

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class SecurityAlarm:
    """Makes refused signatures audible: a log line, a counter, and an event ``audit``.

    At most ten are told a minute, so that whoever forges messages cannot fill the log as well; the
    next one that is told says how many were not. Owned by one loop.

    Args:
        events: Where events go.
        own: Who refuses.
        clock: UTC milliseconds.

    Attributes:
        refused: How many were refused, by what they were.
    """

    def __init__(self, *, events: EventSource, own: str, clock: Callable[[], int]) -> None:
        self.refused: Counter[str] = Counter()
        self._events = events
        self._own = own
        self._clock = clock
        self._told: deque[int] = deque(maxlen=_TOLD_LIMIT)
        self._untold = 0

    def tell(self, error: FoamError, *, sender: str | None, what: str) -> None:
        """Tell that something was refused.

        Args:
            error: Why.
            sender: Who says to have sent it, which need not be true.
            what: What it was: ``invocation``, ``control drain``, ``admin token_create``.
        """
        self.refused[what.partition(" ")[0]] += 1
        now = self._clock()
        if len(self._told) == _TOLD_LIMIT and 0 <= now - self._told[0] < _PERIOD_MS:
            self._untold += 1
            return
        self._told.append(now)
        untold, self._untold = self._untold, 0
        _log.warning(
            "security.refused",
            what=what,
            sender=sender,
            own=self._own,
            error=error.message,
            untold=untold,
        )
        self._events.emit(
            "audit",
            {
                "action": "signature_refused",
                "actor": sender,
                "subject": self._own,
                "outcome": "refused",
                "detail": {"what": what, "reason": error.message, "untold": untold},
            },
            subject=self._own,
        )


def hear_registry(payload: bytes, *, registry: str, book: PassportBook) -> RegistryState | None:
    """Take what a registry says of itself: its passport, where our papers do not name it.

    Args:
        payload: A message on ``registry/{registry}/state``.
        registry: The level of the topic.
        book: Where passports are known.

    Returns:
        The state; None where it is none, or its passport counts for nothing (logged).
    """
    if not payload:
        return None
    try:
        state: RegistryState = decode(RegistryState, payload, limit_bytes=_STATE_LIMIT_BYTES)
        if state.registry != registry:
            raise MalformedPayload(
                f"registry: the state is of {state.registry}, its topic of {registry}",
                field="registry",
            )
        if state.passport is not None:
            book.admit(state.passport)
    except FoamError as exc:
        _log.warning("registry.ignored", registry=registry, error=exc.message)
        return None
    return state


def hear_trust(payload: bytes, *, member: str, book: PassportBook) -> None:
    """Take what a registry says of a member: passports that it voided count for nothing any more.

    What is no trust state of a registry that is believed is logged and passed over.

    Args:
        payload: A message on ``trust/{member}``; an empty one says nothing.
        member: The level of the topic.
        book: Where passports are known.
    """
    if not payload:
        return
    try:
        state = read_trust(payload, member=member, registries=book.registries)
    except FoamError as exc:
        _log.warning("trust.ignored", member=member, error=exc.message)
        return
    if state.void_before is not None:
        book.revoke(member, before=state.void_before)
