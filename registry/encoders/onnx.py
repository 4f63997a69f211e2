"""The serving encoder: onnxruntime and tokenizers, nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capability_schemas.capability import EncoderSpace
from capability_schemas.errors import ConfigurationError
from registry.encoders.base import Vectors
from registry.encoders.manifest import ONNX_NAME, TOKENIZER_NAME, read_manifest


class OnnxEncoder:
    """MiniLM as an int8 ONNX graph, one text at a time on one thread.

    One text at a time on purpose: dynamic int8 quantisation makes a vector depend on the other
    texts of its batch (cosine 0.99 on average, 0.95 at worst), and vectors that are signed and
    compared across machines must not. One thread, because a second one bought nothing and
    multiplied the tail latency on a busy machine.

    Args:
        folder: an exported folder with its manifest; file hashes are verified.

    Raises:
        ConfigurationError: the folder is missing or damaged, or onnxruntime or tokenizers is not
            installed.
    """

    def __init__(self, folder: Path) -> None:
        self._manifest = read_manifest(folder, verify=True)
        try:
            import onnxruntime  # noqa: PLC0415 - heavy, and optional on this machine
            import tokenizers  # noqa: PLC0415 - heavy, and optional on this machine
        except ImportError as exc:
            raise ConfigurationError(
                f"the onnx encoder needs {exc.name}: install foam-mesh[router]"
            ) from exc
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_NAME))
        self._tokenizer.enable_truncation(self._manifest.max_tokens)
        self._tokenizer.no_padding()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(folder / ONNX_NAME), options, providers=["CPUExecutionProvider"]
            )
        except (
            Exception
        ) as exc:  # the binding raises classes of its own that derive from Exception directly
            raise ConfigurationError(
                f"onnxruntime cannot load {folder / ONNX_NAME}: {exc}"
            ) from exc

    @property
    def space(self) -> EncoderSpace:
        """The space of the manifest; its revision holds the hash of the files."""
        return self._manifest.space

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Embed texts one by one; the same text gives the same vector in any company.

        Returns:
            float32, shape ``(len(texts), dimension)``, rows of length 1.
        """
        rows = np.empty((len(texts), self.space.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            tokens = self._tokenizer.encode(text)
            feed = {
                "input_ids": np.array([tokens.ids], dtype=np.int64),
                "attention_mask": np.array([tokens.attention_mask], dtype=np.int64),
            }
            rows[row] = self._session.run(None, feed)[0][0]
        return rows
