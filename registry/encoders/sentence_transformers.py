"""The reference encoder: float32 as its authors run it, and the way to other sentence models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capability_schemas.capability import EncoderSpace
from capability_schemas.errors import ConfigurationError
from registry.encoders.base import Vectors
from registry.encoders.manifest import MODEL_NAME, file_sha256, packaged_model_folder


class SentenceTransformerEncoder:
    """A sentence-transformers folder on the CPU: 4 s to import and 490 MB, but exact.

    Args:
        folder: a local model folder; default the packaged MiniLM. Nothing is downloaded.
        model: name of the space when the folder is another model's.

    Raises:
        ConfigurationError: the library is not installed, or the folder is no sentence-transformers
            model.
    """

    def __init__(self, folder: Path | None = None, *, model: str | None = None) -> None:
        source = folder or packaged_model_folder()
        try:
            from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - heavy, and optional on this machine
        except ImportError as exc:
            raise ConfigurationError(
                f"the sentence_transformers encoder needs {exc.name}: install foam-mesh[encoder]"
            ) from exc
        try:
            self._model: Any = SentenceTransformer(str(source), device="cpu", local_files_only=True)
            weights = file_sha256(source / "model.safetensors")
        except (OSError, ValueError) as exc:
            raise ConfigurationError(
                f"{source} is no usable sentence-transformers model: {exc}"
            ) from exc
        name = model or (MODEL_NAME if folder is None else source.name)
        dimension = int(self._model.get_embedding_dimension())
        self._space = EncoderSpace(model=name, revision=f"fp32-{weights[:12]}", dimension=dimension)

    @property
    def space(self) -> EncoderSpace:
        """Model name, ``fp32-`` with the hash of the weights, dimension."""
        return self._space

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Embed texts; float32 vectors do not depend on their batch.

        Returns:
            float32, shape ``(len(texts), dimension)``, rows of length 1.
        """
        if not texts:
            return np.empty((0, self._space.dimension), dtype=np.float32)
        rows = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(rows, dtype=np.float32)
