"""The reply stream: numbers, coalescing, room, limits."""

import asyncio
import json

import pytest

from capability_schemas.errors import Overloaded, TooLarge
from capability_schemas.reply import Result
from node_agent.stream import ReplyStream


class Outbox:
    """Takes events while it has room."""

    def __init__(self):
        self.events = []
        self.room = 1000

    def post(self, topic, payload):
        if self.room == 0:
            raise Overloaded("full")
        self.room -= 1
        self.events.append(json.loads(payload))

    @property
    def shown(self):
        return [(event["seq"], event["data"]) for event in self.events if event["event"] == "chunk"]


@pytest.fixture
def outbox():
    return Outbox()


@pytest.fixture
def make(outbox):
    made = []

    def make(**given):
        options = {"seq": 0, "chunks": True, "coalesce_s": 3600.0, "working_s": 3600.0, **given}
        stream = ReplyStream(
            topic="t", task="task", attempt=2, post=outbox.post, clock=lambda: 42, **options
        )
        made.append(stream)
        return stream

    yield make
    for stream in made:
        stream.drop()


def result(seq, at):
    return Result(task="task", at=at, seq=seq, output="all")


async def test_the_first_piece_goes_at_once_and_later_ones_are_gathered(make, outbox):
    stream = make(seq=4)
    for piece in ("one ", "two ", "three"):
        stream.add(piece)
    assert outbox.shown == [(4, "one ")]
    await stream.end(result, limit_s=1)
    assert outbox.shown == [(4, "one "), (5, "two three")]
    assert outbox.events[-1]["seq"] == 6
    assert {event.get("attempt") for event in outbox.events[:-1]} == {2}


async def test_gathered_text_goes_out_when_its_time_has_come(make, outbox, eventually):
    stream = make(coalesce_s=0.001)
    stream.add("a")
    stream.add("b")
    await eventually(lambda: outbox.shown == [(0, "a"), (1, "b")])


async def test_json_pieces_are_chunks_of_their_own_in_order(make, outbox):
    stream = make()
    stream.add({"n": 1})
    stream.add("text")
    stream.add(None)
    assert outbox.shown == [(0, {"n": 1}), (1, "text"), (2, None)]


async def test_without_chunks_there_is_only_the_terminal_event(make, outbox):
    stream = make(chunks=False, seq=3)
    stream.add("a")
    payload = await stream.end(result, limit_s=1)
    assert [(event["event"], event["seq"]) for event in outbox.events] == [("result", 3)]
    assert json.loads(payload)["output"] == "all"
    assert stream.seq == 4


async def test_a_full_outbox_delays_without_a_gap_or_a_loss(make, outbox, eventually):
    stream = make(coalesce_s=0.001)
    stream.add("a")
    outbox.room = 0
    stream.add("b")
    stream.add("c")
    assert not stream.flush()
    outbox.room = 10
    await eventually(lambda: outbox.shown == [(0, "a"), (1, "bc")])


async def test_the_terminal_event_waits_for_room_and_gives_up_in_the_end(make, outbox):
    stream = make()
    outbox.room = 0
    assert await stream.end(result, limit_s=0.01) is None
    assert outbox.events == []


async def test_long_text_is_split_and_stays_whole(make, outbox):
    stream = make(chunk_limit_bytes=256)
    text = "ä€😀x" * 200
    stream.add(text)
    assert "".join(data for _, data in outbox.shown) == text
    assert all(len(data.encode()) <= 256 for _, data in outbox.shown)
    assert [seq for seq, _ in outbox.shown] == list(range(len(outbox.shown)))


async def test_more_output_than_allowed_is_an_error(make, outbox):
    stream = make(output_limit_bytes=10)
    stream.add("12345")
    with pytest.raises(TooLarge) as raised:
        stream.add("678901")
    assert raised.value.detail == {"size_bytes": 11, "limit_bytes": 10}


async def test_nothing_is_said_after_a_drop(make, outbox):
    stream = make(coalesce_s=0.0)
    stream.add("a")
    stream.add("b")
    stream.drop()
    await asyncio.sleep(0)
    stream.flush()
    assert outbox.shown == [(0, "a")]


async def test_silence_is_broken_by_working_events(make, outbox, eventually):
    stream = make(working_s=0.001)
    stream.open()
    await eventually(lambda: sum(event["event"] == "working" for event in outbox.events) >= 2)
    assert "seq" not in outbox.events[0]


async def test_a_silenced_stream_keeps_its_end_to_itself(make, outbox, eventually):
    stream = make()
    outbox.room = 0
    async with asyncio.TaskGroup() as tasks:
        end = tasks.create_task(stream.end(result, limit_s=30.0))
        await asyncio.sleep(0)
        stream.silence()
        outbox.room = 10
    assert end.result() is None
    assert outbox.events == []


async def test_a_crowded_session_makes_the_function_wait_and_nothing_is_lost(
    make, outbox, eventually
):
    crowded = True
    stream = make(crowded=lambda: crowded)
    stream.add("first")
    waits = asyncio.ensure_future(stream.room())
    await asyncio.sleep(0)
    assert not waits.done()
    assert outbox.events == []
    crowded = False
    await eventually(waits.done)
    stream.add("second")
    await stream.end(result, limit_s=30.0)
    assert outbox.shown == [(0, "first"), (1, "second")]
    assert outbox.events[-1]["seq"] == 2


async def test_the_end_of_a_stream_needs_no_credit(make, outbox):
    stream = make(crowded=lambda: True)
    stream.add("all of it")
    await stream.end(result, limit_s=30.0)
    assert [event["event"] for event in outbox.events] == ["chunk", "result"]


async def test_whoever_waits_for_credit_goes_on_when_the_stream_is_dropped(make):
    stream = make(crowded=lambda: True)
    stream.add("text")
    waits = asyncio.ensure_future(stream.room())
    await asyncio.sleep(0)
    stream.silence()
    await waits


async def test_a_stream_that_keeps_up_never_waits(make):
    stream = make()
    for _ in range(100):
        stream.add("x")
        await asyncio.wait_for(stream.room(), 10)
