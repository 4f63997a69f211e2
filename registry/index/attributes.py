"""Which stored rows meet a demand: distinct sets of attributes, numbered and judged once.

Fleets have far fewer distinct sets of attributes than capabilities. A row keeps the number of its
set; a demand is a table of truth values over these numbers, so that a mask over a hundred thousand
rows is one look-up per row in numpy, and how many rows pass is one sum over the numbers.
"""

from collections import OrderedDict
from typing import Final

import numpy as np

from registry.index.base import Demands, Mask

NOBODY: Final = 0
"""Number of a row that holds nothing; no demand admits it."""
_REMEMBERED: Final = 64
_FIRST_CAPACITY: Final = 64


class AttributeSets:
    """Numbered sets of attributes with a count of users; owned by one thread."""

    def __init__(self) -> None:
        self._sets: list[frozenset[str]] = [frozenset()]
        self._users: list[int] = [0]
        self._numbers: dict[frozenset[str], int] = {}
        self._unused: list[int] = []
        self._holders: dict[str, set[int]] = {}
        self._judged: OrderedDict[tuple[frozenset[str], ...], Mask] = OrderedDict()
        self._capacity = _FIRST_CAPACITY

    @property
    def capacity(self) -> int:
        """Length of the tables that ``admitted`` returns."""
        return self._capacity

    def take(self, attributes: frozenset[str]) -> int:
        """Return the number of a set, and count one user more."""
        number = self.number(attributes)
        self._users[number] += 1
        return number

    def number(self, attributes: frozenset[str]) -> int:
        """Return the number of a set without counting a user."""
        number = self._numbers.get(attributes)
        return self._new(attributes) if number is None else number

    def copy(self) -> list[frozenset[str]]:
        """Every set by its number."""
        return self._sets.copy()

    def drop(self, number: int) -> None:
        """Count one user less; a set without any is forgotten and its number used again."""
        self._users[number] -= 1
        if self._users[number]:
            return
        attributes = self._sets[number]
        del self._numbers[attributes]
        for attribute in attributes:
            holders = self._holders[attribute]
            holders.discard(number)
            if not holders:
                del self._holders[attribute]
        self._sets[number] = frozenset()
        self._unused.append(number)

    def admits(self, number: int, demands: Demands) -> bool:
        """Whether one set meets demands."""
        attributes = self._sets[number]
        return number != NOBODY and not any(each.isdisjoint(attributes) for each in demands)

    def admitted(self, demands: Demands) -> Mask:
        """Judge every set.

        Args:
            demands: what is asked for; none at all admits everybody.

        Returns:
            Truth by number, shape ``(capacity,)``; to be read only, and only until the next change.
        """
        asked = tuple(demands)
        table = self._judged.get(asked)
        if table is None:
            table = self._judged[asked] = self._judge(asked)
            if len(self._judged) > _REMEMBERED:
                self._judged.popitem(last=False)
        else:
            self._judged.move_to_end(asked)
        return table

    def _judge(self, demands: tuple[frozenset[str], ...]) -> Mask:
        table = np.ones(self._capacity, dtype=np.bool_)
        table[NOBODY] = False
        for alternatives in demands:
            meets = np.zeros(self._capacity, dtype=np.bool_)
            for attribute in alternatives:
                holders = self._holders.get(attribute, ())
                meets[np.fromiter(holders, dtype=np.intp, count=len(holders))] = True
            table &= meets
        return table

    def _new(self, attributes: frozenset[str]) -> int:
        if self._unused:
            number = self._unused.pop()
            self._sets[number] = attributes
        else:
            number = len(self._sets)
            self._sets.append(attributes)
            self._users.append(0)
            if number == self._capacity:
                self._capacity *= 2
                self._judged.clear()
        self._numbers[attributes] = number
        for attribute in attributes:
            self._holders.setdefault(attribute, set()).add(number)
        for demands, table in self._judged.items():
            table[number] = self.admits(number, demands)
        return number
