"""Text encoders: the int8 ONNX model that serves, and the float32 reference it is made from.

``python -m registry.encoders.export`` writes the serving model once; ``load_encoder("onnx")`` then
needs no torch. Vectors of different ``space`` are never compared.
"""

from registry.encoders.backends import load_encoder
from registry.encoders.base import Encoder, Vectors, unit
from registry.encoders.manifest import default_folder, packaged_model_folder, read_manifest
from registry.encoders.onnx import OnnxEncoder
from registry.encoders.sentence_transformers import SentenceTransformerEncoder
from registry.encoders.thread import EncoderThread

__all__ = [
    "Encoder",
    "EncoderThread",
    "OnnxEncoder",
    "SentenceTransformerEncoder",
    "Vectors",
    "default_folder",
    "load_encoder",
    "packaged_model_folder",
    "read_manifest",
    "unit",
]
