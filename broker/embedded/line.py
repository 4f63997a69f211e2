"""The line in front of the password check: bounded, and nobody fills it for others."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Final

from capability_schemas.errors import Overloaded

_HOME_BITS: Final = 64


def neighbourhood(address: str) -> str:
    """Return what of an address tells one party from another.

    A whole IPv6 network of 64 bits belongs to one (RFC 4291 section 2.5.4), who may use another
    address of it for each connection; an IPv4 address that came as IPv6 stays what it is.

    Args:
        address: As the socket tells it; whatever is no address is returned as it is.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Network((int(parsed), _HOME_BITS), strict=False))


class Line:
    """Lets a few at a time have their turn, the parties that wait one after the other.

    However many a party sends, another one waits for about one turn of each party and place. When
    the line is full, whoever came last of the party with the most in it has to leave. The broker's
    loop owns it.

    Args:
        places: How many have their turn at once.
        limit: Most that wait, in all.
        party_limit: Most that wait, of one party.
    """

    def __init__(self, *, places: int, limit: int, party_limit: int) -> None:
        self._free = places
        self._limit = limit
        self._party_limit = party_limit
        self._waiting = 0
        # In the order of their turns; none is empty, and there are none while a place is free.
        self._parties: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many wait."""
        return self._waiting

    @asynccontextmanager
    async def turn(self, party: str) -> AsyncIterator[None]:
        """Wait for a turn, which lasts as long as the context; cancellation is safe.

        Raises:
            Overloaded: The line is full, or became so.
        """
        if self._free:
            self._free -= 1
        else:
            await self._wait(party)
        try:
            yield
        finally:
            self._next()

    async def _wait(self, party: str) -> None:
        line = self._parties.get(party, ())
        full = len(line) >= self._party_limit
        if full or (self._waiting >= self._limit and not self._make_room(len(line))):
            raise Overloaded(f"{len(line)} of {party} wait for the password check already")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parties.setdefault(party, deque()).append(turn)
        self._waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._drop(party, turn)
            elif turn.exception() is None:
                self._next()  # it was ours already
            raise

    def _make_room(self, own: int) -> bool:
        """Send the last one of the largest party away, unless the newcomer's would be as large."""
        largest = max(self._parties, key=lambda party: len(self._parties[party]))
        if len(self._parties[largest]) <= own + 1:
            return False
        last = self._parties[largest][-1]
        self._drop(largest, last)
        if not last.done():
            last.set_exception(Overloaded("the line for the password check is full"))
        return True

    def _drop(self, party: str, turn: asyncio.Future[None]) -> None:
        line = self._parties.get(party)
        if line is None or turn not in line:
            return
        line.remove(turn)
        self._waiting -= 1
        if not line:
            del self._parties[party]

    def _next(self) -> None:
        """Give a place that was left to the first one of the party whose turn it is."""
        while self._parties:
            party, line = next(iter(self._parties.items()))
            turn = line.popleft()
            self._waiting -= 1
            if line:
                self._parties.move_to_end(party)
            else:
                del self._parties[party]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
