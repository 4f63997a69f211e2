"""The seam of nearest-neighbour search over unit vectors."""

from typing import Any, Final, NamedTuple, Protocol

import numpy.typing as npt

DEFAULT_DIMENSION: Final = 384


class Neighbour(NamedTuple):
    """A stored key and its closeness to the query.

    Attributes:
        key: as given to ``upsert``.
        similarity: cosine, -1 to 1.
    """

    key: str
    similarity: float


class VectorIndex(Protocol):
    """Keyed unit vectors with nearest-neighbour search; owned by one thread.

    An index has no persistence: it holds nothing that the retained catalogue cannot rebuild.
    """

    def upsert(self, key: str, vector: npt.NDArray[Any]) -> None:
        """Store a vector under a key, in place of an earlier one.

        Args:
            key: any string.
            vector: shape ``(dimension,)``, length 1.

        Raises:
            ValueError: another shape, not finite, or not of length 1.
        """
        ...

    def remove(self, key: str) -> bool:
        """Forget a key.

        Returns:
            Whether it was there.
        """
        ...

    def search(self, vector: npt.NDArray[Any], k: int) -> list[Neighbour]:
        """Find the keys nearest to a vector.

        Args:
            vector: shape ``(dimension,)``, length 1.
            k: how many; fewer come back when fewer are stored, none when ``k < 1``.

        Returns:
            By falling similarity; equal similarities in the order of their keys.

        Raises:
            ValueError: as for ``upsert``.
        """
        ...

    def __len__(self) -> int:
        """How many keys are stored."""
        ...

    def __contains__(self, key: object) -> bool:
        """Whether a key is stored."""
        ...


def ranked(pairs: list[Neighbour], k: int) -> list[Neighbour]:
    """The k nearest of some neighbours, ties in the order of their keys."""
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.key))[:k]
