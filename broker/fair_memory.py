"""What is remembered of many clients for a while, so that none can make others be forgotten."""

from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["FairMemory"]

Key = tuple[str, str]
"""``(client, id)``."""

_V = TypeVar("_V")


class FairMemory(Generic[_V]):
    """The latest values by ``(client, id)``, in bounds; owned by one event loop.

    When there are too many, a client that has left more than the average loses its oldest one. A
    flood from one client thus costs nobody else anything, however long it lasts, and one client
    alone may use all the room.

    Args:
        limit: Most values, at least 1.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._clients: dict[str, dict[str, _V]] = {}

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: Key) -> bool:
        return key[1] in self._clients.get(key[0], ())

    def values(self) -> Iterator[_V]:
        """Return all values, those of each client together."""
        return (value for held in self._clients.values() for value in held.values())

    def get(self, key: Key) -> _V | None:
        """Return a value; None where there is none."""
        return self._clients.get(key[0], {}).get(key[1])

    def put(self, key: Key, value: _V) -> _V | None:
        """Remember a value, as its client's latest.

        Returns:
            The value of another key that had to give way; None when none had to.
        """
        self.pop(key)
        client, name = key
        held = self._clients.setdefault(client, {})
        held[name] = value
        self._count += 1
        if self._count <= self._limit:
            return None
        # Whoever is above the average pays without a search: a flood has to be cheap to bear.
        if len(held) * len(self._clients) <= self._count:
            client = max(self._clients, key=lambda one: len(self._clients[one]))
        return self.pop((client, next(iter(self._clients[client]))))

    def pop(self, key: Key) -> _V | None:
        """Forget a value and return it; None where there is none."""
        held = self._clients.get(key[0])
        if held is None or key[1] not in held:
            return None
        value = held.pop(key[1])
        self._count -= 1
        if not held:
            del self._clients[key[0]]
        return value
