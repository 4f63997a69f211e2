"""How many connections there may be, and which one makes room when there are too many."""

from collections import Counter
from collections.abc import Callable

import structlog

from broker.embedded.line import neighbourhood

_log = structlog.get_logger(__name__)

_REPORT_PERIOD_S = 10.0


class Guest:
    """One connection, from its acceptance on.

    Args:
        address: Where it comes from.
        cut: Drops it at once.
    """

    __slots__ = ("address", "cut", "party")

    def __init__(self, address: str, cut: Callable[[], None]) -> None:
        self.address = address
        self.party = neighbourhood(address)
        self.cut = cut


class Crowd:
    """Counts connections, in all and by address; the broker's loop owns it.

    When it is full, the oldest connection that is not admitted yet makes room: of the same address,
    when that is what is full, else of the address that has the most of them. Somebody who opens
    connections and says nothing, or sends wrong passwords, therefore crowds out himself; a client
    of another address is not cut for him. Where everybody is admitted the newcomer is turned away.
    An IPv6 network of 64 bits counts as one address.

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
        self._strangers: dict[str, dict[Guest, None]] = {}  # the oldest first
        self._turned_away = 0
        self._reported_at = float("-inf")

    def __len__(self) -> int:
        """Return how many connections there are."""
        return self._total

    def enter(self, guest: Guest) -> bool:
        """Take a connection in, a stranger so far; false when it has to go."""
        if self._of_address[guest.party] >= self._address_limit:
            made_room = self._cut_stranger(guest.party)
        elif self._total >= self._limit:
            made_room = self._cut_stranger(self._most_strangers())
        else:
            made_room = True
        if not made_room:
            self._report(guest)
            return False
        self._of_address[guest.party] += 1
        self._total += 1
        self._strangers.setdefault(guest.party, {})[guest] = None
        return True

    def admitted(self, guest: Guest) -> None:
        """Note that the client of a connection was let in."""
        self._no_stranger(guest)

    def leave(self, guest: Guest) -> None:
        """Forget a connection that was taken in and has ended."""
        self._no_stranger(guest)
        self._total -= 1
        self._of_address[guest.party] -= 1
        if not self._of_address[guest.party]:
            del self._of_address[guest.party]

    def _no_stranger(self, guest: Guest) -> None:
        strangers = self._strangers.get(guest.party, {})
        strangers.pop(guest, None)
        if not strangers:
            self._strangers.pop(guest.party, None)

    def _most_strangers(self) -> str | None:
        return max(self._strangers, key=lambda party: len(self._strangers[party]), default=None)

    def _cut_stranger(self, party: str | None) -> bool:
        guest = next(iter(self._strangers.get(party or "", ())), None)
        if guest is None:
            return False
        self._no_stranger(guest)
        self._report(guest)
        guest.cut()
        return True

    def _report(self, guest: Guest) -> None:
        """Say that connections are cut or turned away, without a line for each."""
        self._turned_away += 1
        now = self._clock()
        if now - self._reported_at >= _REPORT_PERIOD_S:
            self._reported_at = now
            _log.warning(
                "connections.full",
                address=guest.address,
                of_address=self._of_address[guest.party],
                connections=self._total,
                limit=self._limit,
                address_limit=self._address_limit,
                turned_away=self._turned_away,
            )
