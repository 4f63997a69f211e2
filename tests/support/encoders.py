"""Encoders for tests: the exported one, and a quick stand-in of the same contract."""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from capability_schemas.capability import EncoderSpace
from capability_schemas.errors import ConfigurationError
from registry.encoders import Vectors, default_folder, read_manifest, unit
from registry.encoders.export import export


@lru_cache(maxsize=1)
def exported_folder() -> Path:
    """The encoder that set-up exported; exported into a temporary folder where there is none."""
    folder = default_folder()
    try:
        read_manifest(folder, verify=True)
    except ConfigurationError:
        folder = Path(mkdtemp(prefix="foam-encoder-")) / "encoder"
        export(folder)
    return folder


class WordEncoder:
    """Sums one pseudo-random direction per word: deterministic, quick, near texts share words."""

    def __init__(self, *, revision: str = "1", dimension: int = 64) -> None:
        self._space = EncoderSpace(model="words", revision=revision, dimension=dimension)
        self.encoded: list[str] = []

    @property
    def space(self) -> EncoderSpace:
        return self._space

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.encoded.extend(texts)
        rows = np.empty((len(texts), self._space.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower()) or ["nothing"]
            rows[row] = unit(np.sum([self._direction(word) for word in words], axis=0))
        return rows

    def _direction(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        return np.random.default_rng(seed).standard_normal(self._space.dimension)
