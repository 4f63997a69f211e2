"""What a component tells the audit trail: its grants and orders one by one, refusals counted.

Components tell on ``event/{source}/audit``; the registry keeps the trail. Every entry carries a
number, so that the trail shows where some are missing. Refusals can come by the thousand, at the
will of whoever is refused: they are counted, and told every few seconds.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

AUDIT_KIND: Final = "audit"
"""Last level of the topic of these events."""

BROKER_SOURCE: Final = "broker"
"""Source of the events of a broker of our own; no member may have this name."""

_TELL_S: Final = 5.0
_ENTRIES: Final = 256
_OTHERS: Final = "others"
_MESSAGE: Final = 500


@dataclass(slots=True)
class _Count:
    count: int
    first_at: int
    last_at: int
    message: str


class Tally:
    """How often each actor was refused what, since it was last told.

    Bounded: of more than 256 different things the further ones are counted together, by what was
    refused.

    Args:
        clock: UTC milliseconds.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._counts: OrderedDict[tuple[str, str, str], _Count] = OrderedDict()

    def note(self, action: str, *, actor: str, subject: str = "", message: str = "") -> None:
        """Count something.

        Args:
            action: What happened, in one word.
            actor: Who did it.
            subject: To what.
            message: Why, for people; that of the last time is told.
        """
        key = (action, actor, subject)
        if key not in self._counts and len(self._counts) >= _ENTRIES:
            key = (action, _OTHERS, "")
        now = self._clock()
        found = self._counts.get(key)
        if found is None:
            self._counts[key] = _Count(1, now, now, message[:_MESSAGE])
            return
        found.count += 1
        found.last_at = now
        found.message = message[:_MESSAGE]

    def drain(self) -> list[dict[str, Any]]:
        """Return what was counted, and start anew.

        Returns:
            Audit entries: ``action``, ``actor``, ``subject`` and ``detail`` with ``count``,
            ``first_at`` and ``last_at`` (UTC milliseconds) and ``message``.
        """
        counts, self._counts = self._counts, OrderedDict()
        return [
            {
                "action": action,
                "actor": actor,
                "subject": subject,
                "detail": {
                    "count": found.count,
                    "first_at": found.first_at,
                    "last_at": found.last_at,
                    **({"message": found.message} if found.message else {}),
                },
            }
            for (action, actor, subject), found in counts.items()
        ]


class AuditVoice:
    """Tells the audit trail what happened here. Owned by one loop; never blocks.

    What cannot be sent is missing in the trail, and its number shows it.

    Args:
        emit: Publishes an event: kind and JSON fields.
        epoch: Start of the component, UTC milliseconds: numbers count from it.
        clock: UTC milliseconds.
        tally: Where refusals are counted; one of its own when omitted.
        tell_s: Seconds between two tellings of what was counted.
    """

    def __init__(
        self,
        *,
        emit: Callable[[str, dict[str, Any]], None],
        epoch: int,
        clock: Callable[[], int],
        tally: Tally | None = None,
        tell_s: float = _TELL_S,
    ) -> None:
        self.tally = Tally(clock) if tally is None else tally
        self._emit = emit
        self._epoch = epoch
        self._tell_s = tell_s
        self._number = 0

    def write(
        self, action: str, *, actor: str, subject: str = "", detail: dict[str, Any] | None = None
    ) -> None:
        """Tell one thing now.

        Args:
            action: What happened, in one word.
            actor: Who did it.
            subject: To whom or what.
            detail: More of it, JSON; no secrets.
        """
        self._number += 1
        self._emit(
            AUDIT_KIND,
            {
                "action": action,
                "actor": actor,
                "subject": subject,
                "detail": detail or {},
                "epoch": self._epoch,
                "number": self._number,
            },
        )

    def tell(self) -> None:
        """Tell what was counted."""
        for entry in self.tally.drain():
            self.write(**entry)

    async def keep_telling(self) -> None:
        """Tell every few seconds what was counted; runs until cancelled."""
        while True:
            await asyncio.sleep(self._tell_s)
            self.tell()


class Budget:
    """What each of many may do: a token bucket each, the longest unheard of forgotten first.

    Args:
        clock: Monotonic seconds.
        burst: How much at once, after a rest.
        per_second: How much in the long run.
        remembered: How many are remembered.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        burst: float,
        per_second: float,
        remembered: int,
    ) -> None:
        self._clock = clock
        self._burst = burst
        self._per_second = per_second
        self._remembered = remembered
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, name: str) -> bool:
        """Take one; false when nothing is left."""
        now = self._clock()
        left, at = self._left.pop(name, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._per_second)
        self._left[name] = (left - 1.0 if left >= 1.0 else left, now)
        if len(self._left) > self._remembered:
            self._left.popitem(last=False)
        return left >= 1.0
