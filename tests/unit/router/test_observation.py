import json
from typing import Any

import pytest

from router.observation import Observation, ReplyReader

ROOT = "foam/v1/local"


@pytest.fixture
def reader() -> ReplyReader:
    return ReplyReader(root=ROOT, router_id="router-1", limit_bytes=1_000)


def topic(source: str = "edge-1", level: str = "t") -> str:
    return f"{ROOT}/reply/pump-7/{level}/{source}"


def payload(**fields: Any) -> bytes:
    return json.dumps({"v": 1, "task": "t", "at": 1, "event": "chunk", "seq": 0} | fields).encode()


def test_a_chunk_is_read(reader: ReplyReader) -> None:
    data = payload(seq=3, attempt=2, data="x")
    read = reader.read(topic(), data)
    assert isinstance(read, Observation)
    assert (read.client, read.task_id) == ("pump-7", "t")
    event = read.event
    assert (event.source, event.event, event.seq, event.attempt) == ("edge-1", "chunk", 3, 2)
    assert event.payload == data


def test_the_task_is_the_payloads_for_reply_to_names_another_level(reader: ReplyReader) -> None:
    read = reader.read(topic(level="inbox"), payload())
    assert isinstance(read, Observation)
    assert read.task_id == "t"


def test_an_error_carries_its_code_and_working_no_number(reader: ReplyReader) -> None:
    read = reader.read(topic(), payload(event="error", code="internal"))
    assert isinstance(read, Observation)
    assert read.event.code == "internal"
    read = reader.read(topic(), payload(event="working"))
    assert isinstance(read, Observation)
    assert read.event.seq is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
        b"[" * 2_000,
        payload(v=2),
        payload(event="accepted"),
        payload(event=["chunk"]),
        payload(task=7),
        payload(seq=-1),
        payload(seq=True),
        payload(seq="0"),
        payload(seq=2**70),
        payload(attempt=0),
        payload(event="error"),
        payload(data="x" * 1_000),
    ],
)
def test_what_is_no_event_is_passed_over(reader: ReplyReader, data: bytes) -> None:
    assert reader.read(topic(), data) is None


def test_its_own_events_are_not_read(reader: ReplyReader) -> None:
    assert reader.read(topic("router-1"), payload()) is None
    assert reader.read(topic("other-router-1"), payload()) is not None
