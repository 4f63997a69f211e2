"""Quantities with units."""

import pytest

from node_agent.declaration.quantities import units_spelt_out

FIELDS = ("memory_bytes", "timeout_ms", "idle_s", "name")


@pytest.mark.parametrize(
    ("written", "field", "value"),
    [
        ({"memory": "512 MB"}, "memory_bytes", 512_000_000),
        ({"memory": "1.5GiB"}, "memory_bytes", 1_610_612_736),
        ({"memory": " 7 B "}, "memory_bytes", 7),
        ({"timeout": "30 s"}, "timeout_ms", 30_000),
        ({"timeout": "0.1 s"}, "timeout_ms", 100),
        ({"timeout": "0.5 ms"}, "timeout_ms", 0.5),
        ({"idle": "5 min"}, "idle_s", 300),
        ({"idle": "1 h"}, "idle_s", 3600),
        ({"idle_s": 3}, "idle_s", 3),
    ],
)
def test_text_with_a_unit_becomes_the_field(written, field, value):
    assert units_spelt_out(written, FIELDS) == ({field: value}, {})


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory": "512 M"},
        {"memory": "512"},
        {"memory": 512},
        {"memory": "5 s"},
        {"idle": "-1 s"},
        {"idle": "1 s", "idle_s": 1},
    ],
)
def test_what_is_no_quantity_is_named_as_it_was_written(wrong):
    _, problems = units_spelt_out(wrong, FIELDS)
    assert list(problems) == [next(iter(wrong))]


def test_the_rest_stays():
    assert units_spelt_out({"name": "5 s", "other": 1}, FIELDS) == ({"name": "5 s", "other": 1}, {})
