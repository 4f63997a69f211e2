"""Predicted finish: from what nodes tell, whatever they tell."""

from typing import Any

import pytest

from capability_schemas.node import FunctionLoad
from router.finish import predict_finish
from support.offers import load, offer


def predicted(
    *, resources: dict[str, Any] | None = None, node: dict[str, Any] | None = None, **figures: Any
) -> Any:
    view = load({"echo": FunctionLoad(**figures)}, **(node or {}))
    one = offer(view=view, resources=resources or {})
    return predict_finish(one.record, one.node)


def test_it_is_wait_and_run() -> None:
    finish = predicted(wait_ms=30, total_ms=100, least_ms=40)
    assert (finish.wait_ms, finish.total_ms, finish.least_ms) == (30, 130, 70)


def test_without_a_told_wait_the_queue_tells() -> None:
    finish = predicted(queued=6, concurrency=2, total_ms=100)
    assert (finish.wait_ms, finish.total_ms) == (300, 400)


def test_what_waits_is_no_part_of_the_least() -> None:
    assert predicted(wait_ms=350, queued=3, total_ms=100).least_wait_ms == 50


def test_the_first_output_stands_in_for_an_unknown_run() -> None:
    finish = predicted(first_ms=80)
    assert (finish.total_ms, finish.least_ms) == (80, 40)
    finish = predicted(resources={"first_ms": 60})
    assert (finish.total_ms, finish.least_ms) == (60, 30)


def test_the_unknown_is_unknown() -> None:
    finish = predicted()
    assert (finish.total_ms, finish.least_ms) == (None, 0)


@pytest.mark.parametrize("nonsense", [-1e9, 1e308, -0.0])
def test_nonsense_is_brought_into_range(nonsense: float) -> None:
    finish = predicted(
        wait_ms=nonsense, total_ms=nonsense, least_ms=nonsense, first_ms=nonsense, queued=3
    )
    assert 0 <= finish.least_ms <= 1e13
    assert finish.total_ms is not None
    assert 0 <= finish.total_ms <= 1e13
