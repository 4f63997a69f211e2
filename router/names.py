"""Function names as people mistype them: which known names sound like a given one. Pure."""

import difflib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from heapq import nlargest
from typing import Final

_PART: Final = 3
_COMMON: Final = 2_000
_COMPARED: Final = 48
_ENOUGH: Final = 48


class NameIndex:
    """Names by their parts of three letters, so that a hundred thousand need not be compared.

    Comparing one name with another (``difflib``) takes some 30 microseconds: three seconds for a
    large catalogue. Only the names that share most parts with the one asked for are compared.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._holders: defaultdict[str, set[str]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        """Take a name in; one that is known stays."""
        if name in self._names:
            return
        self._names[name] = None
        for part in _parts(name):
            self._holders[part].add(name)

    def discard(self, name: str) -> None:
        """Forget a name; unknown ones are ignored."""
        if name not in self._names:
            return
        del self._names[name]
        for part in _parts(name):
            holders = self._holders[part]
            holders.discard(name)
            if not holders:
                del self._holders[part]

    def nearest(self, name: str, count: int) -> list[tuple[str, float]]:
        """Return the names most like one, best first.

        Args:
            name: What was asked for.
            count: How many at most.

        Returns:
            Names and their likeness, 0 to 1 (``difflib`` ratio).
        """
        scored = [(other, _likeness(name, other)) for other in self._worth_comparing(name)]
        scored.sort(key=lambda entry: (-entry[1], entry[0]))
        return scored[: max(0, count)]

    def _worth_comparing(self, name: str) -> Collection[str]:
        if len(self._names) <= _ENOUGH:
            return self._names
        shared: Counter[str] = Counter()
        for part in _parts(name):
            holders = self._holders.get(part, set())
            if len(holders) <= _COMMON:
                shared.update(holders)
        return nlargest(_COMPARED, shared, key=lambda other: (shared[other], other))


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _parts(name: str) -> Iterator[str]:
    """Yield each distinct part of a name, its beginning and end marked."""
    marked = f"^{name.lower()}$"
    yield from {marked[at : at + _PART] for at in range(max(1, len(marked) - _PART + 1))}
