"""Plain schemas are checked without the validator, to the same end."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from capability_schemas.errors import ConfigurationError, InvalidTask
from capability_schemas.functions import check_input, check_schema

NAMES = st.sampled_from(["text", "rpm", "x"])
TYPES = ["string", "integer", "number", "boolean", "array", "object", "null"]
PLAIN = st.fixed_dictionaries({"type": st.sampled_from(TYPES)}, optional={"title": st.just("t")})
CHECKED = st.sampled_from(
    [
        True,
        {},
        {"type": ["string", "null"]},
        {"type": "integer", "minimum": 3},
        {"type": "string", "enum": ["a"]},
        {"type": "array", "maxItems": 0},
        {"const": 1},
    ]
)
PLAIN_SCHEMAS = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.dictionaries(NAMES, PLAIN, max_size=3)},
    optional={
        "required": st.lists(NAMES, max_size=2, unique=True),
        "additionalProperties": st.booleans(),
        "description": st.just("d"),
    },
)
SCHEMAS = st.fixed_dictionaries(
    {"properties": st.dictionaries(NAMES, PLAIN | CHECKED, max_size=3)},
    optional={
        "type": st.sampled_from(["object", "object", "object", "string"]),
        "required": st.lists(NAMES, max_size=2, unique=True),
        "additionalProperties": st.just({"type": "string"}),
        "minProperties": st.just(2),
    },
)
LEAVES: Any = st.sampled_from([None, True, False, 0, 1, 1.0, 1.5, "a", "", [], {}, [1]])
VALUES = st.dictionaries(NAMES, LEAVES, max_size=2) | LEAVES


def of_text(**asks: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"text": asks}}


@example(schema=of_text(type="integer", minimum=3), value={"text": 1})
@example(schema=of_text(type="integer"), value={"text": 1.5})
@example(schema=of_text(type="integer"), value={"text": 1.0})
@example(schema=of_text(type="integer"), value={"text": True})
@example(schema=of_text(type="number"), value={"text": True})
@example(schema=of_text(type="number") | {"additionalProperties": False}, value={"x": 1})
@settings(max_examples=300, deadline=None)
@given(schema=PLAIN_SCHEMAS | SCHEMAS, value=VALUES)
def test_what_is_admitted_is_what_the_validator_admits(schema: dict[str, Any], value: Any) -> None:
    if Draft202012Validator(schema).is_valid(value):
        check_input(value, schema)
    else:
        with pytest.raises(InvalidTask, match="input"):
            check_input(value, schema)


def test_a_pattern_that_is_no_expression_is_refused_and_breaks_nothing() -> None:
    schema = {"properties": {"text": {"pattern": "("}}}
    with pytest.raises(ConfigurationError, match="pattern"):
        check_schema(schema)
    with pytest.raises(InvalidTask, match="broken pattern"):
        check_input({"text": "x"}, schema)
