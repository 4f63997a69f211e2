"""Reading heads of model files: the shipped one, damaged ones, hostile ones."""

import contextlib
import ctypes
import resource
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from node_agent.models.gguf import (
    _TENSOR_TYPES,
    BrokenModel,
    Items,
    memory_need_bytes,
    quantisation_name,
    read_gguf,
)

MODEL = Path(__file__).resolve().parents[4] / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
DATA = MODEL.read_bytes()
HEAD = 30_720  # its tensors begin here
NO_SHRINK = [HealthCheck.function_scoped_fixture]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def head(entries: list[bytes] = [], tensors: list[bytes] = [], **given: int) -> bytes:  # noqa: B006
    version = given.get("version", 3)
    counts = given.get("tensor_count", len(tensors)), given.get("entry_count", len(entries))
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries + tensors)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def reason(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(BrokenModel) as caught:
        read_gguf(path)
    return caught.value.reason


def test_the_shipped_model() -> None:
    info = read_gguf(MODEL)
    assert (info.architecture, info.name, info.tokenizer) == ("llama", "foam-tiny", "gpt2")
    assert (info.context_length, info.block_count, len(info.tensors)) == (512, 4, 38)
    assert info.parameters == 2_623_744
    assert info.quantisation == "q8_0"
    assert info.has_chat_template
    assert info.expected_bytes == info.size_bytes == len(DATA)
    assert info.metadata["tokenizer.ggml.tokens"] == Items("text", 1024)
    assert info.parts == 1


def test_memory_is_what_llama_cpp_takes_for_the_shipped_model() -> None:
    """Its log: 2.67 MiB of weights, 1.00 MiB of keys and values, 12.01 MiB of working buffer."""
    info = read_gguf(MODEL)
    assert memory_need_bytes(info, 512) == pytest.approx(15.68 * 2**20, rel=0.02)
    assert memory_need_bytes(info, 512) == memory_need_bytes(info)
    assert memory_need_bytes(info, 4096) > memory_need_bytes(info, 512)


@pytest.mark.llm
def test_tensor_types_are_those_of_ggml() -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="no engine on this machine")
    folder = Path(llama_cpp.__file__).parent / "lib"
    libraries = sorted(folder.glob("libggml-base*"))
    if not libraries:
        pytest.skip("the engine ships no separate ggml library")
    ggml = ctypes.CDLL(str(libraries[0]))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    for number, (name, block, size) in _TENSOR_TYPES.items():
        assert ggml.ggml_type_name(number).decode().lower() == name
        assert (ggml.ggml_blck_size(number), ggml.ggml_type_size(number)) == (block, size)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"<!doctype", "is no GGUF file: it begins with b'<!do'"),
        (b"GGUF", "ends within its head"),
        (head(version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (head(tensor_count=1 << 40), "claims 1099511627776 tensors"),
        (head(entry_count=1 << 63), "claims 9223372036854775808 metadata entries"),
        (head([entry("a", 8, struct.pack("<Q", 1 << 40))]), "claims 1099511627776 bytes for 'a'"),
        (head([entry("a", 9, struct.pack("<IQ", 8, 1 << 50))]), "claims 1125899906842624 texts"),
        (head([entry("a", 9, struct.pack("<IQ", 0, 1 << 62))]), "ends within its head"),
        (head([entry("a", 9, struct.pack("<IQ", 9, 1))]), "array of an unknown type, 9"),
        (head([entry("a", 99, b"")]), "of an unknown type, 99"),
        (head([entry("a", 0, b"\1")] * 2), "states 'a' twice"),
        (
            head([entry("general.alignment", 4, struct.pack("<I", 0))]),
            "impossible alignment, 0",
        ),
        (head(tensors=[tensor("t", (4,))] * 2), "names a tensor twice"),
        (head(tensors=[tensor("t", (1 << 40, 1 << 40))]), "impossible shape"),
        (head(tensors=[tensor("t", (33,), kind=8)]), "impossible shape"),
        (head(tensors=[tensor("t", (1, 1, 1, 1, 1))]), "has 5 dimensions"),
        (head(tensors=[tensor("t", (4,), offset=7)]), "crooked"),
        (head(tensors=[tensor("t", (1024,))]), "is cut short: it has 57 bytes"),
    ],
)
def test_broken_heads_are_told_apart(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in reason(tmp_path, data)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BrokenModel, match="No such file"):
        read_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(BrokenModel, match="directory"):
        read_gguf(tmp_path)


def test_a_type_from_the_future_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(head(tensors=[tensor("t", (4,), kind=77)]) + bytes(64))
    assert read_gguf(path).quantisation == "type-77"
    assert quantisation_name(15) == "q4_k_m"
    assert quantisation_name(1024 + 7) == "q8_0"
    assert quantisation_name(999) == "ftype-999"


def test_impossible_numbers_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    big = struct.pack("<Q", 1 << 60)
    names = ["block_count", "context_length", "embedding_length", "attention.head_count"]
    entries = [entry("general.architecture", 8, text("llama"))]
    path.write_bytes(head(entries + [entry(f"llama.{name}", 10, big) for name in names]))
    tracemalloc.start()
    assert memory_need_bytes(read_gguf(path)) > 1 << 100
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@settings(max_examples=60, deadline=None, suppress_health_check=NO_SHRINK)
@given(st.integers(0, len(DATA) - 1))
@example(HEAD)
@example(len(DATA) - 1)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, at: int) -> None:
    assert reason(tmp_path, DATA[:at])


@settings(max_examples=300, deadline=None, suppress_health_check=NO_SHRINK)
@given(
    st.lists(st.tuples(st.integers(0, HEAD), st.binary(min_size=1, max_size=9)), max_size=4),
    st.booleans(),
)
def test_damage_in_the_head_is_an_answer_or_the_modules_error(
    tmp_path: Path, changes: list[tuple[int, bytes]], early: bool
) -> None:
    data = bytearray(DATA[: HEAD + 4096])
    for at, new in changes:
        place = at % 2048 if early else at
        data[place : place + len(new)] = new
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(BrokenModel):
        info = read_gguf(path)
        assert memory_need_bytes(info) >= info.weight_bytes
        assert info.quantisation != ""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@settings(max_examples=300, deadline=None, suppress_health_check=NO_SHRINK)
@given(st.binary(max_size=400))
def test_noise_after_the_magic_is_an_answer_or_the_modules_error(
    tmp_path: Path, noise: bytes
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + noise)
    with contextlib.suppress(BrokenModel):
        info = read_gguf(path)
        assert info.expected_bytes <= info.size_bytes
