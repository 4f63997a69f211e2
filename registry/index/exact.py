"""Exact search: compare with everything. Best below about 10,000 vectors (0.6 ms there)."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from registry.encoders.base import checked
from registry.index.base import DEFAULT_DIMENSION, Neighbour, ranked

_FIRST_CAPACITY: Final = 64


class ExactIndex:
    """All vectors in one matrix; removing moves the last row into the gap.

    Args:
        dimension: length of every vector.
    """

    def __init__(self, *, dimension: int = DEFAULT_DIMENSION) -> None:
        self._dimension = dimension
        self._matrix = np.empty((_FIRST_CAPACITY, dimension), dtype=np.float32)
        self._keys: list[str] = []
        self._rows: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def upsert(self, key: str, vector: npt.NDArray[Any]) -> None:
        """Store a vector; see ``VectorIndex.upsert``."""
        row_vector = checked(vector, self._dimension)
        row = self._rows.get(key)
        if row is None:
            row = len(self._keys)
            if row == len(self._matrix):
                grown = np.empty((2 * row, self._dimension), dtype=np.float32)
                grown[:row] = self._matrix
                self._matrix = grown
            self._keys.append(key)
            self._rows[key] = row
        self._matrix[row] = row_vector

    def remove(self, key: str) -> bool:
        """Forget a key; see ``VectorIndex.remove``."""
        row = self._rows.pop(key, None)
        if row is None:
            return False
        last_key = self._keys.pop()
        if last_key != key:
            self._matrix[row] = self._matrix[len(self._keys)]
            self._keys[row] = last_key
            self._rows[last_key] = row
        return True

    def search(self, vector: npt.NDArray[Any], k: int) -> list[Neighbour]:
        """Find the nearest keys; see ``VectorIndex.search``. Always exact."""
        query = checked(vector, self._dimension)
        count = len(self._keys)
        k = min(k, count)
        if k < 1:
            return []
        # Not the BLAS product: its two threads took 20 ms for 10k rows on busy cores, this takes
        # 0.6 ms whatever else runs, and its sums do not depend on how many rows there are.
        similarities = np.einsum("ij,j->i", self._matrix[:count], query)
        # Everything as near as the k-th, so that ties are cut by key and not by row.
        edge = np.partition(similarities, count - k)[count - k]
        rows = np.flatnonzero(similarities >= edge)
        return ranked([Neighbour(self._keys[row], float(similarities[row])) for row in rows], k)
