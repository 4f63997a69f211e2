"""Reading the head of a GGUF file: what a model is, and whether the file is whole.

Written from the format's specification (``docs/gguf.md`` of the ggml project), without numpy and
without the file's tensors: the head of a 40 GB model is a few megabytes. Every count and length in
it is checked against the bytes that are there before anything is read, so a hostile head costs
neither memory nor time.
"""

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

from capability_schemas.errors import ConfigurationError

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_HEAD_LIMIT_BYTES: Final = 256 << 20
"""Longest head that is read: the largest vocabularies in use need some 20 MB."""
_TEXT_LIMIT_BYTES: Final = 1 << 20
"""Longest single text that is kept: chat templates reach some 20 kB."""
_ENTRY_LIMIT: Final = 1 << 16
"""Most metadata entries, and most tensors; the largest models in use have a few thousand."""
_ITEM_LIMIT: Final = 1 << 22
"""Most texts in the arrays of one file: vocabularies and merges reach 600 000."""
_KEPT_ITEMS: Final = 1024
"""Longest array of numbers that is kept; it holds a value per layer."""

_SCALARS: Final[dict[int, struct.Struct]] = {
    number: struct.Struct("<" + code)
    for number, code in enumerate(["B", "b", "H", "h", "I", "i", "f", "?"])
} | {10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d")}
_TEXT: Final = 8
_ARRAY: Final = 9
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")

# name, values in a block, bytes of a block (``type_traits`` in ggml.c)
_TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 9: ("q8_1", 32, 36),
    10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210), 15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136), 24: ("i8", 1, 1), 25: ("i16", 1, 2),
    26: ("i32", 1, 4), 27: ("i64", 1, 8), 28: ("f64", 1, 8), 29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18),
}  # fmt: skip

# Values of the key ``general.file_type`` (``llama_ftype`` in llama.h).
_FILE_TYPES: Final[dict[int, str]] = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1", 10: "q2_k",
    11: "q3_k_s", 12: "q3_k_m", 13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s",
    17: "q5_k_m", 18: "q6_k", 19: "iq2_xxs", 20: "iq2_xs", 21: "q2_k_s", 22: "iq3_xs",
    23: "iq3_xxs", 24: "iq1_s", 25: "iq4_nl", 26: "iq3_s", 27: "iq3_m", 28: "iq2_s", 29: "iq2_m",
    30: "iq4_xs", 31: "iq1_m", 32: "bf16", 36: "tq1_0", 37: "tq2_0", 38: "mxfp4_moe",
    39: "nvfp4", 40: "q1_0", 41: "q2_0",
}  # fmt: skip
_GUESSED: Final = 1024
"""``LLAMA_FTYPE_GUESSED``: the writer did not know, and says what it thinks."""


class BrokenModel(ConfigurationError):  # noqa: N818  # named by what to mend
    """A file is no whole GGUF model; the message says why.

    Args:
        path: The file, or where it comes from.
        reason: What is wrong with it.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}", path=str(path), reason=reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Items:
    """An array of the metadata that is counted, not kept.

    Attributes:
        kind: ``text`` or ``number``.
        count: How many there are.
    """

    kind: str
    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        name: Its name.
        kind: Its type, such as ``q4_k``; ``type-N`` for one that this reader does not know.
        shape: Values per dimension, the fastest first.
        offset: First byte, from the start of the tensors.
        size_bytes: Its bytes; 0 for an unknown type.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def values(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufInfo:
    """What the head of a GGUF file says.

    Attributes:
        version: Format version, 2 or 3.
        metadata: Keys and values; long arrays as `Items`.
        tensors: Every tensor, in the order of the file.
        size_bytes: Size of the file.
        expected_bytes: Size that the file must have at least to hold its tensors.
    """

    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    size_bytes: int
    expected_bytes: int

    @property
    def architecture(self) -> str | None:
        """Which network: ``llama``, ``qwen2``, ``bert``."""
        return self._text("general.architecture")

    @property
    def name(self) -> str | None:
        """What its makers call it."""
        return self._text("general.name")

    @property
    def context_length(self) -> int | None:
        """Tokens it was trained to see."""
        return self.number("context_length")

    @property
    def block_count(self) -> int | None:
        """Its layers."""
        return self.number("block_count")

    @property
    def tokenizer(self) -> str | None:
        """Kind of its tokenizer: ``gpt2``, ``llama``, ``bert``."""
        return self._text("tokenizer.ggml.model")

    @property
    def has_chat_template(self) -> bool:
        """Whether it says how a conversation is written down."""
        return bool(self._text("tokenizer.chat_template"))

    @property
    def parts(self) -> int:
        """Files that the model is split into; 1 for a whole one."""
        count = self.metadata.get("split.count", 1)
        return max(1, count) if isinstance(count, int) else 1

    @cached_property
    def parameters(self) -> int:
        """Values in all tensors together."""
        return sum(tensor.values for tensor in self.tensors)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @cached_property
    def quantisation(self) -> str | None:
        """Weight format: what the file says, else the type that holds most values."""
        stated = self.metadata.get("general.file_type")
        if isinstance(stated, int) and (stated & ~_GUESSED) in _FILE_TYPES:
            return quantisation_name(stated)
        values: Counter[str] = Counter()
        for tensor in self.tensors:
            values[tensor.kind] += tensor.values
        return values.most_common(1)[0][0] if values else None

    def number(self, key: str) -> int | None:
        """Return a whole number that the architecture states: ``number("head_count")``.

        A value per layer gives the largest.
        """
        values = self._numbers(key)
        return max(values) if values else None

    def total(self, key: str) -> int | None:
        """Return the sum of such a number over all layers."""
        values = self._numbers(key)
        if len(values) == 1:
            return values[0] * (self.block_count or 0)
        return sum(values) if values else None

    def _numbers(self, key: str) -> tuple[int, ...]:
        value = self.metadata.get(f"{self.architecture}.{key}")
        values = value if isinstance(value, tuple) else (value,)
        return tuple(one for one in values if type(one) is int and one >= 0)

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


def quantisation_name(file_type: int) -> str:
    """Name a value of ``general.file_type``: 15 is ``q4_k_m``; ``ftype-N`` when it is unknown."""
    return _FILE_TYPES.get(file_type & ~_GUESSED, f"ftype-{file_type}")


def read_gguf(path: Path) -> GgufInfo:
    """Read the head of a GGUF file and check that the file holds all of its tensors.

    Blocks: 0.1 to 0.3 seconds for a vocabulary of 150 000.

    Raises:
        BrokenModel: It cannot be read, is no GGUF, is damaged, or is shorter than its tensors.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file).read()
    except OSError as exc:
        raise BrokenModel(path, f"cannot be read: {exc.strerror or exc}") from exc


def memory_need_bytes(info: GgufInfo, n_ctx: int = 0, *, n_batch: int = 512) -> int:
    """Estimate the memory that llama.cpp takes for a model on a CPU.

    Weights, plus keys and values in f16 (``layers * n_ctx * kv_heads * (key + value length) * 2``,
    ``llama_kv_cache`` in llama.cpp), plus the working buffer of one batch, whose largest parts are
    the scores (``heads * n_batch * n_ctx`` floats) and the logits (``n_batch * n_vocab`` floats).
    The process itself (some 60 MB) comes on top. Models with sliding windows or recurrent layers
    need less.

    Args:
        info: The head of its file.
        n_ctx: Context length, tokens; 0: as it was trained.
        n_batch: Prompt tokens decoded at a time.
    """
    tokens = n_ctx or info.context_length or 0
    heads = info.number("attention.head_count") or 0
    width = info.number("embedding_length") or 0
    head_length = width // heads if heads else 0
    key = info.number("attention.key_length") or head_length
    value = info.number("attention.value_length") or head_length
    kv_heads = info.total("attention.head_count_kv")
    if kv_heads is None:
        kv_heads = heads * (info.block_count or 0)
    cache = tokens * kv_heads * (key + value) * 2
    batch = min(n_batch, tokens) if tokens else n_batch
    vocabulary = info.metadata.get("tokenizer.ggml.tokens")
    words = vocabulary.count if isinstance(vocabulary, Items) else 0
    working = 4 * batch * (heads * tokens + words + 4 * width)
    return info.weight_bytes + cache + working


class _Reader:
    """Reads one head, and never past it or past the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = file.seek(0, 2)
        file.seek(0)
        self._left = min(self._size, _HEAD_LIMIT_BYTES)
        self._items_left = _ITEM_LIMIT

    def read(self) -> GgufInfo:
        """Read and check everything."""
        version, tensor_count, entry_count = self._preamble()
        metadata = self._metadata(entry_count)
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise self._broken("names a tensor twice")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment % 8:
            raise self._broken(f"states an impossible alignment, {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        end = start if tensors else self._file.tell()
        for tensor in tensors:
            if tensor.offset % alignment:
                raise self._broken(f"tensor {tensor.name[:80]!r} lies at a crooked place")
            end = max(end, start + tensor.offset + tensor.size_bytes)
        if end > self._size:
            raise BrokenModel(
                self._path,
                f"is cut short: it has {self._size} bytes, its tensors need {end}",
            )
        return GgufInfo(version, metadata, tensors, self._size, end)

    def _preamble(self) -> tuple[int, int, int]:
        magic = self._file.read(len(_MAGIC))
        self._left -= len(magic)
        if magic != _MAGIC:
            begins = f"it begins with {magic!r}" if magic else "it is empty"
            raise BrokenModel(self._path, f"is no GGUF file: {begins}")
        version = self._u32()
        if version not in _VERSIONS:
            what = "big-endian" if version and not version & 0xFFFF else f"version {version}"
            raise BrokenModel(
                self._path, f"is a GGUF file of a kind that is not read here ({what}): use 2 or 3"
            )
        # The least a tensor takes is 24 bytes, the least an entry takes 13.
        return version, self._count("tensors", 24), self._count("metadata entries", 13)

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._text(of="a metadata key", strict=True)
            if key in metadata:
                raise self._broken(f"states {key[:80]!r} twice")
            metadata[key] = self._value(self._u32(), key)
        return metadata

    def _value(self, kind: int, key: str) -> Any:
        if kind == _TEXT:
            return self._text(of=key)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._broken(f"{key[:80]!r} is of an unknown type, {kind}")
        inner, count = self._u32(), self._scalar(_U64)
        if inner == _TEXT:
            return self._skip_texts(count, key)
        if inner not in _SCALARS:
            raise self._broken(f"{key[:80]!r} is an array of an unknown type, {inner}")
        packed = _SCALARS[inner]
        self._claim(count * packed.size, key)
        if count > _KEPT_ITEMS:
            self._file.seek(count * packed.size, 1)
            return Items("number", count)
        return tuple(one for (one,) in packed.iter_unpack(self._exactly(count * packed.size)))

    def _skip_texts(self, count: int, key: str) -> Items:
        if count > self._items_left or count * _U64.size > self._left:
            raise self._broken(f"{key[:80]!r} claims {count} texts")
        self._items_left -= count
        for _ in range(count):
            length = self._scalar(_U64)
            self._claim(length, key)
            self._file.seek(length, 1)
        return Items("text", count)

    def _tensor(self) -> Tensor:
        name = self._text(of="a tensor name", strict=True)
        dimensions = self._u32()
        if not 1 <= dimensions <= 4:  # noqa: PLR2004  # GGML_MAX_DIMS
            raise self._broken(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(self._scalar(_U64) for _ in range(dimensions))
        number, offset = self._u32(), self._scalar(_U64)
        kind, block, block_bytes = _TENSOR_TYPES.get(number, (f"type-{number}", 1, 0))
        tensor = Tensor(name, kind, shape, offset, 0)
        if tensor.values >= 1 << 62 or shape[0] % block:
            raise self._broken(f"tensor {name[:80]!r} has an impossible shape, {shape}")
        return Tensor(name, kind, shape, offset, tensor.values // block * block_bytes)

    def _count(self, what: str, least_bytes: int) -> int:
        count: int = self._scalar(_U64)
        if count > _ENTRY_LIMIT or count * least_bytes > self._left:
            raise self._broken(f"claims {count} {what}")
        return count

    def _text(self, *, of: str, strict: bool = False) -> str:
        length = self._scalar(_U64)
        if length > _TEXT_LIMIT_BYTES:
            raise self._broken(f"claims {length} bytes for {of[:80]!r}")
        self._claim(length, of)
        try:
            return self._exactly(length).decode("utf-8", "strict" if strict else "replace")
        except UnicodeDecodeError as exc:
            raise self._broken(f"{of} is no text") from exc

    def _u32(self) -> int:
        value: int = self._scalar(_U32)
        return value

    def _scalar(self, packed: struct.Struct) -> Any:
        self._claim(packed.size, "its head")
        (value,) = packed.unpack(self._exactly(packed.size))
        return value

    def _claim(self, size: int, what: str) -> None:
        """Take bytes off what is left, before they are read."""
        if size > self._left:
            if self._size > _HEAD_LIMIT_BYTES:
                raise self._broken(f"claims {size} bytes for {what[:80]!r}")
            raise BrokenModel(self._path, "is cut short, or damaged: it ends within its head")
        self._left -= size

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:  # somebody shortens it while it is read
            raise BrokenModel(self._path, "is cut short: it ends within its head")
        return data

    def _broken(self, reason: str) -> BrokenModel:
        return BrokenModel(self._path, f"is a damaged GGUF file: its head {reason}")
