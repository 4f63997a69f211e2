"""Encoder backends by name, as settings name them."""

from pathlib import Path

from capability_schemas.errors import ConfigurationError
from registry.encoders.base import Encoder
from registry.encoders.manifest import default_folder
from registry.encoders.onnx import OnnxEncoder
from registry.encoders.sentence_transformers import SentenceTransformerEncoder


def load_encoder(name: str = "onnx", folder: Path | None = None) -> Encoder:
    """Load an encoder by the name of its backend; takes 0.2 s (onnx) to 4 s, so not on a loop.

    Args:
        name: ``onnx`` or ``sentence_transformers``.
        folder: where the model lies; default the exported, or the packaged, MiniLM.

    Raises:
        ConfigurationError: unknown name, or the model or a library is missing.
    """
    if name == "onnx":
        return OnnxEncoder(folder or default_folder())
    if name == "sentence_transformers":
        return SentenceTransformerEncoder(folder)
    raise ConfigurationError(f"unknown encoder {name!r}: use onnx or sentence_transformers")
