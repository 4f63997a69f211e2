"""How many connections there may be, and which one makes room when there are too many."""

from collections import Counter, OrderedDict
from collections.abc import Callable

import structlog

_log = structlog.get_logger(__name__)

_REPORT_PERIOD_S = 10.0


class Guest:
    """One connection, from its acceptance on.

    Args:
        address: Where it comes from.
        cut: Drops it at once.
    """

    __slots__ = ("address", "cut")

    def __init__(self, address: str, cut: Callable[[], None]) -> None:
        self.address = address
        self.cut = cut


class Crowd:
    """Counts connections, in all and by address; the broker's loop owns it.

    When it is full, the connection that has been silent for longest (of the same address, when that
    is what is full) makes room: one that has not sent a whole CONNECT yet. Somebody who opens
    connections and says nothing therefore crowds out himself; a client that speaks is not silent
    for longer than a blink. Where nobody is silent the newcomer is turned away.

    Args:
        limit: Most connections in all.
        address_limit: Most connections of one address.
        clock: Seconds, rising.
    """

    def __init__(self, *, limit: int, address_limit: int, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._address_limit = address_limit
        self._clock = clock
        self._of_address: Counter[str] = Counter()
        self._total = 0
        self._silent: OrderedDict[Guest, None] = OrderedDict()
        self._turned_away = 0
        self._reported_at = float("-inf")

    def __len__(self) -> int:
        """Return how many connections there are."""
        return self._total

    def enter(self, guest: Guest) -> bool:
        """Take a connection in, silent so far; false when it has to go."""
        if self._of_address[guest.address] >= self._address_limit:
            made_room = self._cut_silent(guest.address)
        elif self._total >= self._limit:
            made_room = self._cut_silent(None)
        else:
            made_room = True
        if not made_room:
            self._report(guest.address)
            return False
        self._of_address[guest.address] += 1
        self._total += 1
        self._silent[guest] = None
        return True

    def spoke(self, guest: Guest) -> None:
        """Note that a connection has sent its CONNECT."""
        self._silent.pop(guest, None)

    def leave(self, guest: Guest) -> None:
        """Forget a connection that was taken in and has ended."""
        self._silent.pop(guest, None)
        self._total -= 1
        self._of_address[guest.address] -= 1
        if not self._of_address[guest.address]:
            del self._of_address[guest.address]

    def _cut_silent(self, address: str | None) -> bool:
        for guest in self._silent:
            if address is None or guest.address == address:
                del self._silent[guest]
                self._report(guest.address)
                guest.cut()
                return True
        return False

    def _report(self, address: str) -> None:
        """Say that connections are cut or turned away, without a line for each."""
        self._turned_away += 1
        now = self._clock()
        if now - self._reported_at >= _REPORT_PERIOD_S:
            self._reported_at = now
            _log.warning(
                "connections.full",
                address=address,
                of_address=self._of_address[address],
                connections=self._total,
                limit=self._limit,
                address_limit=self._address_limit,
                turned_away=self._turned_away,
            )
