"""The seam between the mesh and whatever turns text into vectors."""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from capability_schemas.capability import EncoderSpace

Vectors = npt.NDArray[np.float32]

_SHORTEST: Final = 1e-12

UNIT_TOLERANCE: Final = 1e-2
"""Largest accepted deviation of a vector's length from 1 (a float16 copy of a unit vector of 384
numbers stays below it)."""


class Encoder(Protocol):
    """Turns texts into unit vectors of one space; blocking, used from one thread at a time."""

    @property
    def space(self) -> EncoderSpace:
        """Model, revision and dimension; vectors of different spaces are never compared."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Embed texts.

        Args:
            texts: any number of texts; over-long ones are truncated by the model.

        Returns:
            float32, shape ``(len(texts), space.dimension)``, every row of length 1.
        """
        ...


def unit(vector: npt.NDArray[Any]) -> Vectors:
    """Scale a vector to length 1.

    Args:
        vector: shape ``(d,)``, any float type.

    Returns:
        float32, shape ``(d,)``.

    Raises:
        ValueError: the vector is zero or not finite, so that it has no direction.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length < _SHORTEST:
        raise ValueError("a vector without a direction cannot be scaled to length 1")
    return (vector / length).astype(np.float32)


def checked(vector: npt.NDArray[Any], dimension: int) -> Vectors:
    """Return a vector as contiguous float32 after checking what everything relies on.

    Raises:
        ValueError: wrong shape, not finite, or not of length 1.
    """
    array = np.ascontiguousarray(vector, dtype=np.float32)
    if array.shape != (dimension,):
        raise ValueError(f"a vector of shape ({dimension},) is needed, not {array.shape}")
    with np.errstate(over="ignore", invalid="ignore"):  # what others send may be anything
        length = float(np.linalg.norm(array))
    if not abs(length - 1.0) <= UNIT_TOLERANCE:  # also false for NaN
        raise ValueError(f"a vector of length 1 is needed, not {length:.4g}")
    return array
