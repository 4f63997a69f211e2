"""Weights, contexts and batches of llama.cpp, in Python's terms."""

import ctypes
import itertools
import re
import sys
from collections import deque
from pathlib import Path
from typing import Any, Final

import llama_cpp
from llama_cpp import llama_cpp as native

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.memory import check_fits

__all__ = ["Batch", "NativeModel", "context_parameters", "forget", "native", "numpy", "why"]

VERSION: Final[str] = llama_cpp.__version__

numpy: Any = sys.modules["numpy"]
"""The array library that llama-cpp-python brings along; a node installs none of its own."""

_ERROR_LEVEL: Final = 4
"""``GGML_LOG_LEVEL_ERROR`` of ggml.h."""

_PIECE_BYTES: Final = 1024
"""Room for the text of one token, bytes; vocabularies stay below 256."""

_LONG_RUN: Final = re.compile(r"\S{4096}|\s{4096}")
"""Of so many characters without a border; the regular expressions with which llama.cpp cuts texts
for some vocabularies recurse over each, and overflow its stack at some 30 000."""

_UNSPELT: Final[int] = native.LLAMA_TOKEN_ATTR_UNKNOWN | native.LLAMA_TOKEN_ATTR_CONTROL
"""Attributes of what is a token only where special ones count."""

_complaints: deque[str] = deque(maxlen=4)


@native.llama_log_callback  # type: ignore[untyped-decorator]
def _note(level: int, text: bytes, _data: Any) -> None:
    if level == _ERROR_LEVEL:
        line = text.decode("utf-8", "replace").strip()
        _complaints.append(line)
        print(line, file=sys.stderr)  # noqa: T201 - the agent logs what an instance prints


def forget() -> None:
    """Forget what llama.cpp complained about so far."""
    _complaints.clear()


def why() -> str:
    """Return what llama.cpp complained about since then."""
    return "; ".join(_complaints) or "llama.cpp does not say why"


class NativeModel:
    """The weights and vocabulary of one GGUF file.

    Args:
        path: The file.

    Raises:
        InvocationError: It is missing, or is not a model.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).is_file():
            raise InvocationError("internal", f"model {path}: no such file")
        self._size_bytes = Path(path).stat().st_size
        check_fits(path, weights_bytes=self._size_bytes)
        native.llama_log_set(_note, None)
        native.llama_backend_init()
        parameters = native.llama_model_default_params()
        # AMX and repacked weights: GCC 12 drops the tile configuration of ggml's AMX kernels, which
        # then fault; and repacked copies could not be shared between processes.
        parameters.use_extra_bufts = False
        forget()
        self.path = path
        self.handle = native.llama_model_load_from_file(path.encode(), parameters)
        if not self.handle:
            raise InvocationError(
                "internal", f"model {path} cannot be loaded, is it a whole GGUF file? {why()}"
            )
        self.vocabulary = native.llama_model_get_vocab(self.handle)
        self.n_vocab = native.llama_vocab_n_tokens(self.vocabulary)
        self.bos = native.llama_vocab_bos(self.vocabulary)
        self._cuts_texts = native.llama_vocab_type(self.vocabulary) == native.LLAMA_VOCAB_TYPE_BPE
        self._buffer = ctypes.create_string_buffer(_PIECE_BYTES)

    def metadata(self, key: str) -> str | None:
        """Return a value of the file's header as text; None where there is none."""
        buffer = ctypes.create_string_buffer(256)
        length = native.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        if length >= len(buffer):
            buffer = ctypes.create_string_buffer(length + 1)
            native.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length >= 0 else None

    def cache_bytes(self, tokens: int) -> int:
        """Return the size of keys and values of a context, two bytes each."""
        heads = max(1, native.llama_model_n_head(self.handle))
        kind = self.metadata("general.architecture") or ""
        width = native.llama_model_n_embd(self.handle) // heads
        key = int(self.metadata(f"{kind}.attention.key_length") or width)
        value = int(self.metadata(f"{kind}.attention.value_length") or width)
        layers = native.llama_model_n_layer(self.handle)
        return int(tokens * layers * native.llama_model_n_head_kv(self.handle) * (key + value) * 2)

    def tokenize(self, text: str, special: bool, *, marks: bool = False) -> list[int]:
        """Turn text into token ids.

        Args:
            text: The text.
            special: Whether spelled-out special tokens count as such.
            marks: Put the tokens around it that the model wants at the ends of a text.
        """
        ends = [found.end() for found in _LONG_RUN.finditer(text)] if self._cuts_texts else []
        if not ends:
            return self._tokenize(text, special, marks=marks)
        parts = [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]
        ids = [token for part in parts for token in self._tokenize(part, special, marks=False)]
        if marks and native.llama_vocab_get_add_bos(self.vocabulary):
            ids.insert(0, self.bos)
        if marks and native.llama_vocab_get_add_eos(self.vocabulary):
            ids.append(native.llama_vocab_eos(self.vocabulary))
        return ids

    def _tokenize(self, text: str, special: bool, *, marks: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        while True:  # again with the size it asks for, where a vocabulary lengthens texts
            found = (native.llama_token * size)()
            count = native.llama_tokenize(
                self.vocabulary, data, len(data), found, size, marks, special
            )
            if count >= 0:
                return list(found[:count])
            size = -count

    def specials(self, text: str) -> set[str]:
        """Return the special tokens that are spelled out in a text."""
        attributes = native.llama_vocab_get_attr
        return {
            self.text_of(token)
            for token in set(self.tokenize(text, True))
            if attributes(self.vocabulary, token) & _UNSPELT
        }

    def piece(self, token: int) -> bytes | None:
        """Return the bytes of a token; None for one that ends an answer."""
        if native.llama_vocab_is_eog(self.vocabulary, token):
            return None
        size = native.llama_token_to_piece(
            self.vocabulary, token, self._buffer, _PIECE_BYTES, 0, False
        )
        return self._buffer.raw[: max(size, 0)]

    def text_of(self, token: int) -> str:
        """Return how a special token is spelled, or nothing."""
        text: bytes = b"" if token < 0 else native.llama_vocab_get_text(self.vocabulary, token)
        return text.decode("utf-8", "replace")

    def context(self, parameters: Any) -> Any:
        """Make a context.

        Raises:
            InvocationError: It does not fit into memory.
        """
        check_fits(
            self.path,
            weights_bytes=self._size_bytes,
            cache_bytes=self.cache_bytes(parameters.n_ctx),
            tokens=parameters.n_ctx,
            mapped=True,
        )
        forget()
        made = native.llama_init_from_model(self.handle, parameters)
        if not made:
            raise InvocationError(
                "internal",
                f"model {self.path}: no context of {parameters.n_ctx} tokens: {why()}",
            )
        return made

    def close(self) -> None:
        """Free the weights; contexts must be freed before."""
        native.llama_model_free(self.handle)


def context_parameters(*, n_ctx: int, n_batch: int, n_threads: int, sequences: int) -> Any:
    """Return parameters of a context whose sequences have an equal part of ``n_ctx`` tokens each.

    Not one cache for all (``kv_unified``): there every token passes over the others' cells, which
    cost 8 streams of 300 tokens 31 % of their speed with the shipped model.
    """
    parameters = native.llama_context_default_params()
    parameters.n_ctx = n_ctx
    parameters.n_batch = parameters.n_ubatch = n_batch
    parameters.n_seq_max = sequences
    parameters.n_threads = parameters.n_threads_batch = n_threads
    parameters.kv_unified = False
    parameters.no_perf = True
    return parameters


class Batch:
    """A ``llama_batch`` whose arrays are filled by slices.

    Args:
        size: Most tokens.
        sequences: Ids of sequences go from 0 to this, exclusive.
    """

    def __init__(self, size: int, sequences: int) -> None:
        self.tokens: Any = (native.llama_token * size)()
        self.positions: Any = (native.llama_pos * size)()
        self.outputs = (ctypes.c_int8 * size)()
        self._ids = (native.llama_seq_id * sequences)(*range(sequences))
        step = ctypes.sizeof(native.llama_seq_id)
        pointer = ctypes.POINTER(native.llama_seq_id)
        start = ctypes.addressof(self._ids)
        self.pointers = [ctypes.cast(start + number * step, pointer) for number in range(sequences)]
        self.sequences = (pointer * size)()
        self._counts = (ctypes.c_int32 * size)(*([1] * size))
        self.raw = native.llama_batch(
            0, self.tokens, None, self.positions, self._counts, self.sequences, self.outputs
        )

    def fill(
        self, tokens: list[int], positions: list[int], sequences: list[int], outputs: list[int]
    ) -> Any:
        """Set the contents; returns the native structure."""
        count = len(tokens)
        self.tokens[:count] = tokens
        self.positions[:count] = positions
        pointers, places = self.pointers, self.sequences
        for at, number in enumerate(sequences):
            places[at] = pointers[number]
        ctypes.memset(self.outputs, 0, count)
        for at in outputs:
            self.outputs[at] = 1
        self.raw.n_tokens = count
        return self.raw
