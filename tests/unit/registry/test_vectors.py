import base64

import numpy as np
import pytest

from registry.vectors import (
    capability_texts,
    capability_vector,
    input_text,
    pack_parts,
    readable,
    unpack_parts,
)
from support.encoders import WordEncoder

ENCODER = WordEncoder()
SCHEMA = {
    "type": "object",
    "properties": {
        "pumpId": {"type": "string", "description": "which pump"},
        "limits": {"properties": {"max_bar": {"type": "number"}}},
        "samples": {"items": {"properties": {"at": {"description": "when"}}}},
        "odd": 7,
    },
}


def test_names_are_read_as_words() -> None:
    assert readable("getTank_level-now.v2") == "get Tank level now v2"


def test_parameters_are_told_to_any_depth() -> None:
    assert input_text(SCHEMA) == "pump Id: which pump; limits; max bar; samples; at: when; odd"


@pytest.mark.parametrize("schema", [None, {}, {"properties": 3}, {"properties": {}}, {"items": []}])
def test_a_schema_without_names_says_nothing(schema: dict[str, object] | None) -> None:
    assert input_text(schema) == ""
    assert capability_texts("a_b", "does it", ["go"], schema) == ["a b: does it", "go"]


def test_what_a_huge_or_endless_schema_says_is_bounded() -> None:
    endless: dict[str, object] = {}
    endless["properties"] = {f"deep{at}": endless for at in range(100)}
    assert len(input_text(endless)) <= 1_000


def test_parameters_count_half() -> None:
    texts = capability_texts("f", "checks pumps", ["is it leaking"], SCHEMA)
    assert len(texts) == 3
    rows = ENCODER.encode(texts)
    expected = rows[0] + rows[1] + 0.5 * rows[2]
    np.testing.assert_allclose(
        capability_vector(rows, 1), expected / np.linalg.norm(expected), atol=1e-6
    )


def test_packed_parts_come_back_nearly_the_same() -> None:
    rows = ENCODER.encode(["one pump", "two tanks", "three alerts"])
    back = unpack_parts(pack_parts(rows), 64)
    assert back.shape == rows.shape
    assert (np.einsum("ij,ij->i", rows, back) > 0.9999).all()
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("raw", [b"", b"\x01" * 63, b"\x01" * 64 + b"\x00" * 64])
def test_parts_that_are_no_rows_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"rows of 64 bytes|row of zeros"):
        unpack_parts(base64.b64encode(raw).decode(), 64)
