"""Function names as people mistype them: which known names sound like a given one. Pure."""

import difflib
from array import array
from collections import defaultdict
from collections.abc import Collection
from typing import Final

import numpy as np

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
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._unused: list[int] = []
        self._holders: defaultdict[str, array[int]] = defaultdict(lambda: array("I"))

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def add(self, name: str) -> None:
        """Take a name in; one that is known stays."""
        if name in self._numbers:
            return
        if self._unused:
            number = self._unused.pop()
            self._names[number] = name
        else:
            number = len(self._names)
            self._names.append(name)
        self._numbers[name] = number
        for part in _parts(name):
            self._holders[part].append(number)

    def discard(self, name: str) -> None:
        """Forget a name; unknown ones are ignored."""
        number = self._numbers.pop(name, None)
        if number is None:
            return
        self._unused.append(number)
        for part in _parts(name):
            holders = self._holders[part]
            last = holders.pop()
            if last != number:
                # The view must be gone before the list is changed in length again.
                holders[int((np.frombuffer(holders, dtype=np.uint32) == number).argmax())] = last
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
        if len(self._numbers) <= _ENOUGH:
            return self._numbers.keys()
        some = [self._holders[part] for part in _parts(name) if part in self._holders]
        rare = [np.frombuffer(one, dtype=np.uint32) for one in some if len(one) <= _COMMON]
        if not rare:
            return []
        numbers, shared = np.unique(np.concatenate(rare), return_counts=True)
        found = [
            (times, self._names[number])
            for number, times in zip(numbers.tolist(), shared.tolist(), strict=True)
        ]
        found.sort(reverse=True)
        return [other for _, other in found[:_COMPARED]]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _parts(name: str) -> set[str]:
    """Return each distinct part of a name, its beginning and end marked."""
    marked = f"^{name.lower()}$"
    return {marked[at : at + _PART] for at in range(max(1, len(marked) - _PART + 1))}
