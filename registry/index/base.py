"""What the parts of the index share: neighbours, demands, and the order of results."""

import heapq
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

DEFAULT_DIMENSION: Final = 384
NO_DEMANDS: Final[tuple[frozenset[str], ...]] = ()

ROOM: Final = 4
"""A graph is made with room for so many times its vectors; memory is taken as they come."""

Demands = Sequence[frozenset[str]]
"""A conjunction of alternatives: of every set at least one member must be among the attributes."""

Rows = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]
Similarities = npt.NDArray[np.float32]


class Neighbour(NamedTuple):
    """A stored key and its closeness to the query.

    Attributes:
        key: as given to ``upsert``.
        similarity: cosine, -1 to 1.
    """

    key: str
    similarity: float


Found = tuple[Rows, Similarities]
NOTHING: Final[Found] = (np.empty(0, dtype=np.intp), np.empty(0, dtype=np.float32))


def nearest(rows: Rows | None, similarities: Similarities, k: int) -> Found:
    """The k nearest of some rows, and those as near as the last of them, in no order.

    Args:
        rows: shape ``(n,)``; None for the first n.
        similarities: shape ``(n,)``.
        k: how many, at least 1.
    """
    count = len(similarities)
    if k >= count:
        return (np.arange(count) if rows is None else rows), similarities
    edge = np.partition(similarities, count - k)[count - k]
    at = np.flatnonzero(similarities >= edge)
    return (at if rows is None else rows[at]), similarities[at]


def ranked(keys: Sequence[str], similarities: Similarities, k: int) -> list[Neighbour]:
    """The k nearest of some keys, nearest first, ties in the order of keys."""
    pairs = list(zip((-similarities).tolist(), keys, strict=True))
    best = sorted(pairs) if len(pairs) <= 4 * k else heapq.nsmallest(k, pairs)
    return [Neighbour(key, -farness) for farness, key in best[:k]]
