"""Figures that nodes tell stay within what arithmetic can hold: one of them decides for nobody."""

import json
from typing import Any

import pytest

from capability_schemas.capability import Cost, Resources
from capability_schemas.errors import MalformedPayload
from capability_schemas.node import NodeLoad
from capability_schemas.wire import decode

HUGE = 10**400


@pytest.mark.parametrize(
    "told",
    [
        {"queued": HUGE},
        {"running": HUGE},
        {"capacity": HUGE},
        {"queue_limit": HUGE},
        {"memory_free_bytes": -HUGE},
        {"epoch": HUGE},
        {"functions": {"echo": {"queued": HUGE}}},
        {"functions": {"echo": {"concurrency": HUGE}}},
    ],
)
def test_a_load_that_overflows_is_no_load(told: dict[str, Any]) -> None:
    payload = json.dumps({"v": 1, "node": "a", "epoch": 1, "at": 0, **told}).encode()
    with pytest.raises(MalformedPayload):
        decode(NodeLoad, payload)


@pytest.mark.parametrize("name", ["memory_bytes", "context_tokens", "concurrency"])
def test_a_need_that_overflows_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Resources.model_validate({name: HUGE})


def test_a_price_that_overflows_when_added_is_refused() -> None:
    with pytest.raises(ValueError, match="money"):
        Cost(money=1e308)
