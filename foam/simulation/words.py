"""An encoder that needs no model: near texts share words."""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np

from capability_schemas.capability import EncoderSpace
from registry.encoders.base import Vectors, unit

__all__ = ["WordEncoder"]

_DIMENSION: Final = 64


@lru_cache(maxsize=100_000)
def _direction(word: str) -> Vectors:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return unit(np.random.default_rng(seed).standard_normal(_DIMENSION))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower()) or ["-"]


class WordEncoder:
    """Sums one pseudo-random direction for each word; a `router.meaning.QueryEncoder`."""

    @property
    def space(self) -> EncoderSpace:
        """Space of the vectors."""
        return EncoderSpace(model="words", revision="1", dimension=_DIMENSION)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors, float32, shape ``(len(texts), 64)``."""
        rows = [unit(np.sum([_direction(word) for word in _words(text)], 0)) for text in texts]
        return np.array(rows, dtype=np.float32).reshape(len(texts), _DIMENSION)

    async def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors, as `embed`."""
        return self.embed(texts)

    async def encode_one(self, text: str) -> Vectors:
        """Return the unit vector of one text, float32, shape ``(64,)``."""
        row: Vectors = self.embed([text])[0]
        return row

    async def start(self) -> None:
        """Do nothing: there is no model to load."""

    async def stop(self) -> None:
        """Do nothing."""
