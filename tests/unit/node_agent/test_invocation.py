"""One invocation, and the memory of outcomes."""

import asyncio
import json

import pytest

from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Invocation
from node_agent.invocation import Execution, Outcome, OutcomeMemory
from node_agent.runtimes.base import Final
from node_agent.stream import ReplyStream


def invocation(task, attempt=1, client="c"):
    return Invocation(
        task=task,
        client=client,
        router="r",
        attempt=attempt,
        function="f",
        version="1.0.0",
        deadline=1,
        reply="x",
        sent_at=0,
    )


def test_an_outcome_is_found_by_client_task_and_attempt():
    memory = OutcomeMemory(limit=10)
    ended = Outcome(status="finished", seq=3)
    memory.record(invocation("t", 2), ended)
    assert memory.find(invocation("t", 2)) is ended
    assert memory.find(invocation("t", 1)) is None
    assert memory.find(invocation("t", 2, client="other")) is None
    assert memory.latest_attempt(("c", "t")) == 2


def test_the_oldest_outcome_is_forgotten_first():
    memory = OutcomeMemory(limit=2)
    for task in ("a", "b", "c"):
        memory.record(invocation(task), Outcome(status="finished"))
    assert len(memory) == 2
    assert memory.find(invocation("a")) is None
    assert memory.latest_attempt(("c", "a")) == 0
    assert memory.find(invocation("c")) is not None


def test_terminal_events_are_bounded_in_bytes():
    memory = OutcomeMemory(limit=100, payload_limit_bytes=25)
    for task in ("a", "b", "c"):
        memory.record(invocation(task), Outcome(status="finished", payload=b"x" * 10))
    kept = memory.find(invocation("b"))
    assert kept is not None
    assert kept.payload is not None
    # What ended without its event is still known to have ended: it must not run again.
    assert memory.find(invocation("a")) == Outcome(status="finished")
    memory.record(invocation("huge"), Outcome(status="finished", payload=b"x" * 30))
    assert memory.find(invocation("huge")) == Outcome(status="finished")


def test_recording_an_attempt_twice_counts_it_once():
    memory = OutcomeMemory(limit=100, payload_limit_bytes=25)
    for _ in range(5):
        memory.record(invocation("a"), Outcome(status="finished", payload=b"x" * 10))
    assert memory.find(invocation("a")) is not None
    assert len(memory) == 1


class SlowToLeave:
    """An instance whose calls take a while to be cancelled; also the pool it comes from."""

    alive = True

    def __init__(self):
        self.leaving = asyncio.Event()
        self.left = asyncio.Event()
        self.released = []

    async def acquire(self, spec, *, session=None):
        return self

    def release(self, instance, *, served):
        self.released.append((instance, served))

    async def invoke(self, request):
        try:
            await asyncio.Event().wait()
            yield Final(output=None)
        finally:
            self.leaving.set()
            await self.left.wait()

    async def settled(self, request_id):
        pass


@pytest.mark.parametrize("reason", ["deadline", "client", "cut off"])
async def test_an_order_to_stop_may_come_while_the_deadline_stops_it_already(reason):
    instance, events = SlowToLeave(), []
    asked = invocation("t").model_copy(update={"deadline": now_ms() + 50})
    execution = Execution(
        invocation=asked,
        spec=FunctionSpec(name="f", description="d", entry="x.py:f"),
        value=None,
        node="n",
        stream=ReplyStream(
            topic="reply/n",
            task="t",
            attempt=1,
            seq=0,
            chunks=True,
            post=lambda _topic, payload: events.append(json.loads(payload)),
            clock=now_ms,
        ),
        report_topic="report/r/n",
        instances=instance,
        options={},
        clock=now_ms,
    )
    async with asyncio.TaskGroup() as tasks:
        run = tasks.create_task(execution.run())
        await instance.leaving.wait()
        execution.stop(reason)
        instance.left.set()
    await execution.settle()
    silent = reason == "cut off"
    assert run.result().status == ("dropped" if silent else "finished")
    assert len(events) == (0 if silent else 1)
    assert instance.released == [(instance, True)]
