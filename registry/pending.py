"""Claims and withdrawals on their way into the catalogue; the newest word about a key counts."""

import asyncio
from collections import deque
from typing import Final, NamedTuple

from registry.admission import Admitted, Key, Standing
from registry.store import HistoryEntry

_NOTES_KEPT: Final = 1_000


class Withdrawal(NamedTuple):
    """A key that shall leave the store; it has left the catalogue already.

    Attributes:
        entry: the line for the history.
    """

    entry: HistoryEntry


class PendingWork:
    """What the registry's worker has still to do. Owned by one event loop.

    Withdrawals come first, for embedding a claim takes long. Bounded: there is one place for each
    key, ``limit`` claims at most, and notes beyond 1,000 push out the oldest.

    Args:
        limit: claims that may wait.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._claims: dict[Key, Admitted] = {}
        self._withdrawals: dict[Key, Withdrawal] = {}
        self._notes: deque[HistoryEntry] = deque(maxlen=_NOTES_KEPT)
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._claims) + len(self._withdrawals) + len(self._notes)

    def __contains__(self, key: object) -> bool:
        return key in self._claims

    def standing(self, key: Key) -> Standing | None:
        """Order of the claim that waits under a key."""
        waiting = self._claims.get(key)
        return None if waiting is None else Standing(waiting.claim.order, waiting.digest)

    def offer(self, key: Key, admitted: Admitted) -> bool:
        """Add a claim in place of what waits under its key.

        Returns:
            False when ``limit`` others wait already.
        """
        if key not in self._claims and len(self._claims) >= self._limit:
            return False
        self._claims[key] = admitted
        self._wake.set()
        return True

    def withdraw(self, key: Key, entry: HistoryEntry | None) -> None:
        """Drop the claim that waits under a key, and have the store told if there is an entry."""
        self._claims.pop(key, None)
        if entry is not None:
            self._withdrawals[key] = Withdrawal(entry)
            self._wake.set()

    def drop_until(self, key: Key, order: tuple[int, int]) -> None:
        """Drop the claim that waits under a key, if it is none after this order."""
        waiting = self._claims.get(key)
        if waiting is not None and waiting.claim.order <= order:
            del self._claims[key]

    def note(self, entry: HistoryEntry) -> None:
        """Have a line added to the history."""
        self._notes.append(entry)
        self._wake.set()

    async def next(self) -> tuple[Key, Admitted | Withdrawal | HistoryEntry]:
        """Wait for work and show it; it stays until ``done``. Cancellation is safe."""
        while True:
            if self._withdrawals:
                return next(iter(self._withdrawals.items()))
            if self._notes:
                entry = self._notes[0]
                return (entry.node, entry.function), entry
            if self._claims:
                return next(iter(self._claims.items()))
            self._wake.clear()
            await self._wake.wait()

    def done(self, key: Key, work: Admitted | Withdrawal | HistoryEntry) -> None:
        """Take finished work out, unless newer word about its key has come meanwhile."""
        if isinstance(work, HistoryEntry):
            if self._notes and self._notes[0] is work:
                self._notes.popleft()
        elif isinstance(work, Withdrawal):
            if self._withdrawals.get(key) is work:
                del self._withdrawals[key]
        elif self._claims.get(key) is work:
            del self._claims[key]
