"""When a capability ends unless it is renewed. Pure: instants go in, keys come out."""

import heapq
from typing import Generic, TypeVar

Held = TypeVar("Held")


class LeaseTable(Generic[Held]):
    """Ends of leases by key; the newest word about a key counts."""

    def __init__(self) -> None:
        self._ends: dict[Held, int] = {}
        self._heap: list[tuple[int, int, Held]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, key: object) -> bool:
        return key in self._ends

    def grant(self, key: Held, expires_at: int | None) -> None:
        """Start, renew or shorten a lease.

        Args:
            key: what is leased.
            expires_at: its end, UTC milliseconds; None: it does not end by itself.
        """
        if expires_at is None:
            self._ends.pop(key, None)
            return
        self._ends[key] = expires_at
        self._count += 1  # keys need not be comparable
        heapq.heappush(self._heap, (expires_at, self._count, key))
        if len(self._heap) > 4 * len(self._ends) + 64:
            self._compact()

    def release(self, key: Held) -> None:
        """End a lease without a word; unknown keys are ignored."""
        self._ends.pop(key, None)

    def expires_at(self, key: Held) -> int | None:
        """End of a lease, UTC milliseconds; None: there is none."""
        return self._ends.get(key)

    def expire(self, now: int) -> list[Held]:
        """Take out what has ended.

        Args:
            now: UTC milliseconds.

        Returns:
            Keys whose lease ended at or before ``now``, in the order of their ends.
        """
        ended: list[Held] = []
        while self._heap and self._heap[0][0] <= now:
            end, _, key = heapq.heappop(self._heap)
            if self._ends.get(key) == end:
                del self._ends[key]
                ended.append(key)
        return ended

    def _compact(self) -> None:
        self._heap = [entry for entry in self._heap if self._ends.get(entry[2]) == entry[0]]
        heapq.heapify(self._heap)
