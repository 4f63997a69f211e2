"""Capability vectors: which texts they stand for, and their form on the wire."""

import base64
import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from registry.encoders.base import Vectors, checked, unit

_READABLE: Final = re.compile(r"[_-]+|(?<=[a-z0-9])(?=[A-Z])")


def centroid(rows: Vectors) -> Vectors:
    """Mean direction of some unit vectors.

    Args:
        rows: shape ``(n, dimension)``, n at least 1.

    Returns:
        float32, shape ``(dimension,)``, length 1; the first row when the rows cancel out.
    """
    try:
        return unit(rows.mean(axis=0))
    except ValueError:
        first: Vectors = rows[0]
        return first


def capability_texts(function: str, description: str, examples: Sequence[str]) -> list[str]:
    """The texts whose mean vector stands for a capability, the same for registry and benchmark.

    Args:
        function: its name; underscores, hyphens and camel case are read as several words.
        description: what it does.
        examples: utterances that it should be chosen for.

    Returns:
        ``name: description`` and the examples.
    """
    return [f"{_READABLE.sub(' ', function)}: {description}", *examples]


def pack_vector(vector: Vectors) -> str:
    """Base64 of the little-endian float32 components (PROTOCOL section 4)."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def unpack_vector(packed: str, dimension: int) -> Vectors:
    """Read a packed vector.

    Args:
        packed: as ``pack_vector`` makes it.
        dimension: components expected.

    Returns:
        float32, shape ``(dimension,)``, length 1.

    Raises:
        ValueError: not base64, another number of components, not finite, or not of length 1.
    """
    try:
        raw = base64.b64decode(packed, validate=True)
    except ValueError as exc:  # binascii.Error among them
        raise ValueError(f"an embedding is base64: {exc}") from exc
    if len(raw) != 4 * dimension:
        raise ValueError(
            f"an embedding of {dimension} float32 has {4 * dimension} bytes, not {len(raw)}"
        )
    return checked(np.frombuffer(raw, dtype="<f4"), dimension)
