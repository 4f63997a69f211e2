"""Weights: bounded, changed by name, overridden by a task."""

from typing import Any

import pytest
from pydantic import ValidationError

from capability_schemas.errors import ConfigurationError
from capability_schemas.task import RouteWeights
from router.settings import RouterSettings, Weights


def test_some_are_changed_and_the_others_stay() -> None:
    weights = Weights(load=0.2).changed({"cost": 0.5, "window": 0.02})
    assert (weights.cost, weights.window, weights.load) == (0.5, 0.02, 0.2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cost": 3}, "weight cost is 3: a number from 0 to 1 is allowed"),
        ({"cost": -0.1}, "weight cost is -0.1: a number from 0 to 1"),
        ({"load": float("nan")}, "weight load is nan: a number from 0 to 1"),
        ({"time": "fast"}, "weight time is fast: a number from 0 to 1"),
        ({"cold": 11}, "weight cold is 11: a number from 0 to 10"),
        ({"window": 0.5}, "weight window is 0.5: a number from 0 to 0.2"),
        ({"exploration": 1}, "weight exploration is 1: a number from 0 to 0.5"),
        ({"price": 0.1}, "no weight 'price': use one of cost, energy, time"),
    ],
)
def test_out_of_range_is_refused_by_name_with_the_range(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError) as no:
        Weights().changed(changes)
    assert says in no.value.message
    assert no.value.detail["weight"] == next(iter(changes))


def test_settings_refuse_them_too() -> None:
    with pytest.raises(ValidationError, match=r"weights\.energy"):
        RouterSettings.model_validate({"weights": {"energy": 2}})


def test_a_task_overrides_single_weights() -> None:
    weights = Weights(cost=0.2, time=0.3)
    assert weights.for_task(RouteWeights(cost=0.0)) == Weights(cost=0.0, time=0.3)
    assert weights.for_task(RouteWeights()) is weights


def test_together_the_defaults_weigh_as_one_small_term() -> None:
    weights = Weights()
    squares = sum(one**2 for one in (weights.cost, weights.energy, weights.time, weights.load))
    assert squares**0.5 < 0.06
