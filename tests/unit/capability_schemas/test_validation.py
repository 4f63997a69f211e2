"""Schemas made to be slow, and inputs made for them."""

from typing import Any

import pytest

from capability_schemas.errors import ConfigurationError, InvalidTask
from capability_schemas.functions import check_input, check_schema
from capability_schemas.validation import Bounds
from router.rules.patterns import compile_expression

BOUNDS = Bounds(expression=compile_expression)
BACKTRACKING = "(a+)+$"


def of_text(**asks: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"text": asks}}


def doubling(levels: int, leaf: dict[str, Any], **each: Any) -> dict[str, Any]:
    """Return a schema whose branches are two to the power of ``levels``."""
    halves = {
        f"d{level}": {"anyOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2, **each}
        for level in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**halves, f"d{levels}": leaf}}


def test_a_pattern_that_backtracks_is_checked_in_one_pass() -> None:
    schema = of_text(pattern=BACKTRACKING)
    check_schema(schema)
    check_input({"text": "a" * 50}, schema, bounds=BOUNDS)
    with pytest.raises(InvalidTask, match="does not match"):
        check_input({"text": "a" * 50 + "b"}, schema, bounds=BOUNDS)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (of_text(pattern="(?=b)a"), "a"),  # look-around
        (doubling(40, {"type": "integer"}), "a"),
        (doubling(40, {"type": "integer"}, **{"$schema": "http://json-schema.org/schema#"}), "a"),
        (doubling(4, {"type": "integer"}), "a" * 2_000_000),  # every error repeats it
        ({"patternProperties": {BACKTRACKING: {}}}, "a"),
        ({"patternProperties": {BACKTRACKING: {}}, "additionalProperties": False}, "a"),
        ({"additionalProperties": False, "patternProperties": {BACKTRACKING: {}}}, "a"),
        ({"unevaluatedProperties": False}, "a"),
        (of_text(items={"type": "string"}), [1] * 50_000),
    ],
)
def test_what_takes_too_much_work_is_left_to_the_node(schema: dict[str, Any], value: Any) -> None:
    check_input({"text": value, "a" * 50 + "b": 1}, schema, bounds=BOUNDS)


@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_a_schema_that_refers_to_itself_is_an_input_that_does_not_fit(
    bounds: Bounds | None,
) -> None:
    with pytest.raises(InvalidTask, match="cannot be resolved"):
        check_input({"text": "a"}, {"$ref": "#"}, bounds=bounds)


@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_a_number_beyond_arithmetic_does_not_fit(bounds: Bounds | None) -> None:
    with pytest.raises(InvalidTask, match="too large"):
        check_input({"text": 10**400}, of_text(multipleOf=0.1), bounds=bounds)


@pytest.mark.parametrize(
    ("items", "unique"),
    [
        ([1, 2], True),
        ([1, 1.0], False),
        ([1, True], True),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1.0}], False),
        ([[1], ["1"]], True),
        ([{"a": number} for number in range(30_000)], True),
    ],
)
def test_unique_items_are_told_apart_in_one_pass(items: list[Any], unique: bool) -> None:
    schema = of_text(uniqueItems=True)
    if unique:
        check_input({"text": items}, schema)
    else:
        with pytest.raises(InvalidTask, match="non-unique"):
            check_input({"text": items}, schema)


def test_a_schema_of_a_schema_that_is_slow_to_check_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"at \$\.type"):
        check_schema({"type": [{"a": number} for number in range(30_000)]})
    deep: dict[str, Any] = {}
    for _ in range(120):
        deep = {"properties": {"a": deep}}
    with pytest.raises(ConfigurationError, match="nested too deeply"):
        check_schema(deep)
