"""What a member's process says while it waits for its broker."""

import asyncio
import io
from collections.abc import Mapping
from typing import Any

import pytest

from broker.lifecycle import Service
from capability_schemas.errors import BrokerUnavailable
from foam.process import Process
from foam.status import ProcessStatus
from foam.wiring.member import connect


class _SlowSession(Service):
    """A session whose broker comes up after some time; time passes at once.

    Args:
        after_s: When.
    """

    def __init__(self, after_s: float) -> None:
        super().__init__(service_id="slow")
        self._left_s = after_s

    async def wait_connected(self, timeout_s: float | None = None) -> None:
        assert timeout_s is not None
        self._left_s -= timeout_s
        if self._left_s > 0:
            raise BrokerUnavailable("not connected", reason="connection refused")


@pytest.mark.parametrize(
    ("supervised", "after_s", "said"),
    [
        (True, 8, 0),  # `foam up` has just started the broker too
        (True, 20, 1),
        (True, 60, 2),
        (False, 2, 0),
        (False, 8, 1),  # somebody sits in front of it
    ],
)
async def test_a_broker_that_starts_as_well_is_waited_for_in_silence(
    supervised: bool, after_s: float, said: int
) -> None:
    out, err = io.StringIO(), io.StringIO()
    done = asyncio.Event()

    async def assemble(process: Process) -> Mapping[str, Any]:
        session: Any = _SlowSession(after_s)
        await connect(process, session, "mqtt://there:1883")
        done.set()
        return {}

    status = ProcessStatus(title="router", supervised=supervised, out=out, err=err)
    async with Process(name="router", assemble=assemble, status=status):
        await asyncio.wait_for(done.wait(), 20)
    words = out.getvalue() + err.getvalue()
    assert words.count("mqtt://there:1883 does not answer; waiting for it") == said
    assert words.count("(the last try: connection refused)") == said
