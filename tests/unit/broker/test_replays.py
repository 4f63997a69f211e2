"""Repetitions go out a little at a time."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from broker import replays
from broker.replays import Replays
from capability_schemas.errors import Overloaded


class Line:
    """A session of which only this is used; it never confirms anything by itself."""

    def __init__(self) -> None:
        self.outbox_size = 0
        self.posted: list[tuple[str, bytes]] = []
        self.full = False

    def post(self, topic: str, payload: bytes) -> None:
        if self.full:
            raise Overloaded("the outbox is full")
        self.outbox_size += 1
        self.posted.append((topic, payload))

    def of(self, topic: str) -> list[bytes]:
        return [payload for where, payload in self.posted if where == topic]


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
async def again(line: Any) -> AsyncIterator[Replays]:
    made = Replays(session=line)
    yield made
    made.stop()


def many(count: int) -> list[bytes]:
    return [str(number).encode() for number in range(count)]


async def test_a_long_one_waits_for_room_and_comes_whole(
    line: Line, again: Replays, eventually: Any
) -> None:
    assert again.begin(("a", "1"), "t", iter(many(1_000)))
    assert len(line.posted) == 64
    await eventually(lambda: line.outbox_size >= replays._CROWDED)
    assert len(line.posted) < replays._CROWDED + 64

    async def confirm() -> None:
        while len(line.posted) < 1_000:
            line.outbox_size = 0
            await asyncio.sleep(0)

    async with asyncio.timeout(30):
        await confirm()
    assert line.of("t") == many(1_000)


async def test_a_short_one_does_not_wait_for_a_long_one(
    line: Line, again: Replays, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    monkeypatch.setattr(replays, "_CROWDED", 1_000_000)
    again.begin(("a", "1"), "long", iter(many(6_400)))
    again.begin(("b", "1"), "short", iter(many(2)))
    await eventually(lambda: len(line.of("short")) == 2)
    assert len(line.of("long")) < 6_400


async def test_a_task_is_repeated_once_at_a_time(line: Line, again: Replays) -> None:
    assert again.begin(("a", "1"), "t", iter(many(200)))
    assert not again.begin(("a", "1"), "t", iter(many(200)))
    for number in range(2, 65):
        assert again.begin(("a", str(number)), "t", iter(many(1)))
    assert not again.begin(("a", "65"), "t", iter(many(1)))
    assert again.begin(("b", "1"), "t", iter(many(1)))


async def test_what_the_session_does_not_take_is_dropped(line: Line, again: Replays) -> None:
    line.full = True
    assert again.begin(("a", "1"), "t", iter(many(200)))
    line.full = False
    assert again.begin(("a", "1"), "t", iter(many(2)))
    assert line.of("t") == many(2)
