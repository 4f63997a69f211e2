"""What the handle of a task does while nobody answers."""

from broker.rpc import TaskStream
from capability_schemas.errors import BrokerUnavailable
from capability_schemas.ids import now_ms
from capability_schemas.reply import Result
from foam.sdk import handle as handles
from foam.sdk.client import MeshClient, TaskHandle


def _stream() -> TaskStream:
    return TaskStream(
        task="t-1",
        deadline=now_ms() + 20_000,
        grace_ms=0,
        resume=lambda _: None,
        closed=lambda: None,
        clock=now_ms,
    )


def _handle(stream: TaskStream, publish) -> TaskHandle:
    return TaskHandle(stream=stream, client=MeshClient("mqtt://127.0.0.1:1"), publish=publish)


async def test_a_task_that_nobody_heard_is_published_again(monkeypatch) -> None:
    monkeypatch.setattr(handles, "_SILENCE_S", 0.01)
    stream, published = _stream(), 0

    async def publish() -> None:
        nonlocal published
        published += 1
        if published == 1:
            raise BrokerUnavailable("not yet")
        stream.offer(Result(task="t-1", at=now_ms(), seq=0, output="done"), "n-1")

    handle = _handle(stream, publish)
    assert (await handle.result()).output == "done"
    assert published == 2


async def test_a_task_that_was_heard_is_published_once() -> None:
    stream, published = _stream(), 0

    async def publish() -> None:
        nonlocal published
        published += 1

    stream.offer(Result(task="t-1", at=now_ms(), seq=0, output="done"), "n-1")
    assert [event.event async for event in _handle(stream, publish)] == ["result"]
    assert published == 0
