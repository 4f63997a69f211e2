"""Ordered reply streams over a session."""

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from broker.rpc import ReplyInbox, TaskStream, call_admin
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.admin import AdminRequest
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    Conflict,
    DeadlineExceeded,
    NoCapableNode,
)
from capability_schemas.reply import Accepted, Chunk, ErrorEvent, Result
from capability_schemas.task import ResumeRequest
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode

TASK = "job-1"
CLIENT = "pump-7"
NOW = 1_000_000


def chunk(seq: int, attempt: int = 1, data: object = None) -> Chunk:
    return Chunk(task=TASK, at=NOW, seq=seq, attempt=attempt, data=data or f"c{seq}")


def result(seq: int, attempt: int = 1) -> Result:
    return Result(task=TASK, at=NOW, seq=seq, attempt=attempt, output="done", node="edge-1")


def accepted() -> Accepted:
    return Accepted(task=TASK, at=NOW, router="router-1", deadline=NOW + 1000)


@pytest.fixture
def broker():
    return MemoryBroker()


@pytest.fixture
async def client(broker):
    async with MemorySession(broker=broker, client_id=CLIENT) as session:
        yield session


@pytest.fixture
async def far(broker):
    async with MemorySession(broker=broker, client_id="router-1") as session:
        await session.wait_connected()
        yield session


class ManualClock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
async def inbox(client, topics, clock):
    async with ReplyInbox(session=client, topics=topics, client=CLIENT, clock=clock) as made:
        await client.wait_connected()
        yield made


def reply_topic(topics: Topics, source: str = "edge-1", task: str = TASK) -> str:
    return topics.build(TopicKind.REPLY, client=CLIENT, task=task, source=source)


@contextlib.contextmanager
def listening(inbox: ReplyInbox) -> Iterator[TaskStream]:
    stream = inbox.open(TASK, deadline=NOW + 60_000)
    try:
        yield stream
    finally:
        stream.close()


def resumes(broker: MemoryBroker, topics: Topics) -> list[int]:
    asked = broker.published(topics.build(TopicKind.RESUME, client=CLIENT))
    return [decode(ResumeRequest, message.payload).from_seq for message in asked]


async def test_a_stream_ends_after_the_terminal_event(inbox, far, topics):
    async with inbox.open(TASK, deadline=NOW + 60_000) as stream:
        far.post(reply_topic(topics, "router-1"), encode(accepted()))
        for event in (chunk(0), chunk(1), result(2)):
            far.post(reply_topic(topics), encode(event))
        got = [event async for event in stream]
    assert got == [accepted(), chunk(0), chunk(1), result(2)]
    assert [event async for event in stream] == []


async def test_streams_do_not_mix_and_strays_are_counted(inbox, far, topics):
    stranger = result(0).model_copy(update={"task": "else"})
    with listening(inbox) as stream:
        far.post(reply_topic(topics, task="else"), encode(stranger))
        far.post(reply_topic(topics), b"{not json")
        far.post(reply_topic(topics), encode(result(0)))
        assert [event async for event in stream] == [result(0)]
    assert inbox.stray == 1


async def test_one_stream_for_a_task(inbox):
    with listening(inbox), pytest.raises(Conflict):
        inbox.open(TASK, deadline=NOW)
    inbox.open(TASK, deadline=NOW).close()


async def test_the_deadline_ends_the_wait(inbox, clock):
    stream = inbox.open(TASK, deadline=NOW + 10, grace_ms=0)
    clock.now += 10
    with pytest.raises(DeadlineExceeded) as caught:
        await anext(stream)
    assert caught.value.detail == {"task": TASK, "next_seq": 0}


async def test_what_arrived_is_read_even_after_the_deadline(inbox, far, topics, clock, broker):
    with listening(inbox) as stream:
        far.post(reply_topic(topics), encode(result(0)))
        await broker.settle()
        clock.now += 100_000
        assert await anext(stream) == result(0)


async def test_a_gap_is_asked_for_again(inbox, far, topics, broker, eventually):
    with listening(inbox) as stream:
        far.post(reply_topic(topics), encode(chunk(0)))
        far.post(reply_topic(topics), encode(result(2)))
        assert await anext(stream) == chunk(0)
        async with asyncio.TaskGroup() as group:
            rest = group.create_task(_read(stream))
            await eventually(lambda: 1 in resumes(broker, topics))
            far.post(reply_topic(topics, "router-1"), encode(chunk(1)))
        assert rest.result() == [chunk(1), result(2)]


async def _read(stream) -> list[object]:
    return [event async for event in stream]


async def test_a_reconnection_asks_for_what_was_missed(inbox, broker, far, topics, eventually):
    with listening(inbox) as stream:
        far.post(reply_topic(topics), encode(chunk(0)))
        assert await anext(stream) == chunk(0)
        broker.drop(CLIENT)
        far.post(reply_topic(topics), encode(result(1)))  # nobody is there
        await eventually(lambda: resumes(broker, topics) == [1])
        far.post(reply_topic(topics, "router-1"), encode(result(1)))
        assert await anext(stream) == result(1)


async def test_a_slow_reader_loses_nothing(client, far, topics, broker, clock):
    async with ReplyInbox(session=client, topics=topics, client=CLIENT, clock=clock) as inbox:
        await client.wait_connected()
        stream = inbox.open(TASK, deadline=NOW + 60_000)
        stream._limit = 3
        for seq in range(5):
            far.post(reply_topic(topics), encode(chunk(seq)))
        await broker.settle()
        assert [await anext(stream) for _ in range(3)] == [chunk(0), chunk(1), chunk(2)]
        async with asyncio.TaskGroup() as group:
            following = group.create_task(anext(stream))
            await asyncio.sleep(0)
            await broker.settle()
            assert resumes(broker, topics) == [3]
            far.post(reply_topic(topics, "router-1"), encode(chunk(3)))
        assert following.result() == chunk(3)
        stream.close()


async def test_a_slow_reader_of_large_events_keeps_few_of_them(
    client, far, topics, broker, clock, eventually
):
    """Unread bytes are bounded, and what is missed comes again, also around a gap."""
    async with ReplyInbox(session=client, topics=topics, client=CLIENT, clock=clock) as inbox:
        await client.wait_connected()
        stream = inbox.open(TASK, deadline=NOW + 60_000)
        stream._limit_bytes = 3_000
        large = [chunk(seq, data=str(seq) * 1_000) for seq in range(6)]
        for event in (large[0], *large[2:]):
            far.post(reply_topic(topics), encode(event))
        await broker.settle()
        assert await anext(stream) == large[0]
        seen = []
        async with asyncio.TaskGroup() as group:
            following = group.create_task(anext(stream))
            for round_ in range(1, 6):
                await eventually(
                    lambda to=round_, read=following: (
                        read.done() or len(resumes(broker, topics)) >= to
                    )
                )
                for event in large[stream.next_seq :]:
                    far.post(reply_topic(topics, "router-1"), encode(event))
                await broker.settle()
                seen.append(await following)
                held = [event for event, _ in stream._order._held.values()]
                assert sum(len(encode(event)) for event in (*stream._unread, *held)) <= 3_000
                following = group.create_task(anext(stream))
            far.post(reply_topic(topics), encode(result(6)))
            assert await following == result(6)
        assert seen == large[1:]


async def test_only_the_node_that_was_asked_is_heard_and_asked_again(
    client, far, topics, broker, clock, eventually
):
    async with ReplyInbox(session=client, topics=topics, client=CLIENT, clock=clock) as inbox:
        await client.wait_connected()
        with contextlib.closing(inbox.open(TASK, deadline=NOW + 60_000, node="edge-1")) as stream:
            far.post(reply_topic(topics, "edge-2"), encode(result(0)))
            far.post(reply_topic(topics, "edge-1"), encode(chunk(1)))
            await broker.settle()
            reading = asyncio.ensure_future(anext(stream))
            asked = topics.build(TopicKind.DIRECT_RESUME, node="edge-1", client=CLIENT)
            await eventually(lambda: broker.published(asked))
            assert resumes(broker, topics) == []
            far.post(reply_topic(topics, "edge-1"), encode(chunk(0)))
            assert await reading == chunk(0)


async def test_a_refused_session_ends_its_streams(inbox, broker):
    with listening(inbox) as stream:
        broker.ban(CLIENT)
        with pytest.raises(AccessDenied):
            await anext(stream)


async def test_closing_the_inbox_ends_its_streams(client, topics, clock):
    async with ReplyInbox(session=client, topics=topics, client=CLIENT, clock=clock) as inbox:
        stream = inbox.open(TASK, deadline=NOW + 60_000)
    with pytest.raises(BrokerUnavailable):
        await anext(stream)


class TestAdmin:
    @pytest.fixture
    async def target(self, far, topics):
        """A router that answers ``ok`` and refuses everything else."""

        async def answer(message):
            request = decode(AdminRequest, message.payload)
            topic = reply_topic(topics, "router-1", request.id)
            event: Result | ErrorEvent
            if request.verb == "ok":
                event = Result(task=request.id, at=NOW, seq=0, output=request.args)
            elif request.verb == "silent":
                return
            else:
                event = ErrorEvent.from_error(
                    NoCapableNode("nobody", nearest=["f"]), task=request.id, at=NOW
                )
            far.post(topic, encode(event))

        await far.subscribe(topics.filter(TopicKind.ADMIN, target="router-1"), answer)

    @pytest.mark.usefixtures("target")
    async def test_answers_and_refusals_come_back(self, inbox):
        assert await call_admin(inbox, target="router-1", verb="ok", args={"a": 1}) == {"a": 1}
        with pytest.raises(NoCapableNode) as caught:
            await call_admin(inbox, target="router-1", verb="bad")
        assert caught.value.remote
        assert caught.value.detail["nearest"] == ["f"]

    @pytest.mark.usefixtures("target")
    async def test_silence_is_a_deadline(self, client, topics):
        async with ReplyInbox(session=client, topics=topics, client=CLIENT) as inbox:
            with pytest.raises(DeadlineExceeded, match="router-1 did not answer silent"):
                await call_admin(inbox, target="router-1", verb="silent", timeout_s=0.02)
