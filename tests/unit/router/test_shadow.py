"""Tasks of other routers, as far as they can be seen."""

from typing import Any

import pytest

from capability_schemas.topics import Topics
from capability_schemas.wire import encode
from router.entry import unpack_chunks
from router.events import Observed
from router.intake import Arrival, Intake, Refusal
from router.ownership import Claim, made_id
from router.shadow import Route, Shadow, ShadowTable

TOPIC = "foam/v1/local/task/pump-7"


def arrived(payload: bytes, now: int = 1_000) -> Arrival | Refusal:
    return Intake(topics=Topics(), limit_bytes=4096).read(TOPIC, payload, now)


def chunk(seq: int, attempt: int = 1, payload: bytes = b"x") -> Observed:
    return Observed("edge-1", "chunk", seq, attempt, payload)


@pytest.fixture
def evicted() -> list[Shadow]:
    return []


@pytest.fixture
def table(evicted: list[Shadow]) -> ShadowTable:
    return ShadowTable(limit=3, limit_bytes=10_000, evicted=evicted.append)


def see(shadow: Shadow, event: Observed, **bounds: Any) -> None:
    shadow.see(event, **({"most_events": 100, "most_bytes": 1_000} | bounds))


def test_a_task_without_an_id_is_found_by_the_id_another_router_made(table: ShadowTable) -> None:
    read = arrived(b"what now?")
    table.enter(Shadow(read.key, read=read))
    theirs = made_id(read.mark, 5_000)
    assert theirs != read.task_id
    found = table.find(("pump-7", theirs))
    assert found is not None
    assert found.key == read.key
    assert table.find(("pump-8", theirs)) is None
    assert table.find(("pump-7", made_id("other", 5_000))) is None


def test_the_word_of_a_router_may_come_before_the_task(table: ShadowTable) -> None:
    read = arrived(b"what now?")
    theirs = made_id(read.mark, 5_000)
    table.enter(Shadow(("pump-7", theirs), claim=Claim("router-2")))
    assert table.awaited(read) == theirs
    assert table.awaited(arrived(b"something else")) is None


@pytest.mark.parametrize("payload", [b"what now?", b'{"id": "a", "text": "x"}'])
def test_an_end_before_its_task_counts_once_and_not_for_ever(
    table: ShadowTable, payload: bytes
) -> None:
    read = arrived(payload)
    ended = made_id(read.mark, 5_000) if read.mark else read.task_id
    table.orphan(("pump-7", ended), 1_000)
    assert table.has_ended(read, 1_100)
    assert not table.has_ended(read, 1_100)
    table.orphan(("pump-7", ended), 1_000)
    assert not table.has_ended(read, 60_000)


def test_cancellations_of_one_client_cost_nobody_else_theirs(table: ShadowTable) -> None:
    table.retract(("pump-7", "t"), 1_000)
    for number in range(20_000):
        table.retract(("pump-8", f"t{number}"), 1_000)
    assert table.was_retracted(("pump-7", "t"), 1_100)
    assert not table.was_retracted(("pump-7", "t"), 1_100)
    assert not table.was_retracted(("pump-8", "t0"), 1_100)
    assert table.was_retracted(("pump-8", "t9999"), 1_100)


def test_the_oldest_give_way(table: ShadowTable, evicted: list[Shadow]) -> None:
    for number in range(4):
        table.enter(Shadow(("pump-7", f"t{number}")))
    assert [shadow.key[1] for shadow in evicted] == ["t0"]
    heavy = table.get(("pump-7", "t3"))
    assert heavy is not None
    see(heavy, chunk(0, payload=b"x" * 9_000), most_bytes=10_000)
    table.weigh(heavy)
    assert [shadow.key[1] for shadow in evicted] == ["t0", "t1", "t2"]
    assert len(table) == 1
    assert table.drop(("pump-7", "t3")) is heavy
    assert table.drop(("pump-7", "t3")) is None


def test_what_was_shown_is_kept_in_order_within_bounds() -> None:
    shadow = Shadow(("pump-7", "a"), route=Route("edge-1", "echo", "1.0.0", 2))
    for event in (chunk(0, 2), chunk(0, 2), chunk(1, 1), chunk(1, 2), chunk(2, 2)):
        see(shadow, event, most_events=2)
    assert shadow.next_seq == 3
    assert [seq for seq, _ in shadow.shown] == [1, 2]
    assert shadow.shown_bytes == 2


def test_a_successor_starts_a_generation_above_all_that_was_seen() -> None:
    shadow = Shadow(("pump-7", "a"))
    assert shadow.next_generation == 1
    shadow.claim = Claim("router-2", 101)
    assert shadow.next_generation == 2
    shadow.route = Route("edge-1", "echo", "1.0.0", 240)
    assert shadow.next_generation == 3


def test_a_cancellation_waits_for_its_task_while_much_is_read_after_an_outage(
    table: ShadowTable,
) -> None:
    for number in range(10_000):
        table.retract(("pump-7", f"t{number}"), 1_000)
    assert table.was_retracted(("pump-7", "t0"), 60_000)
    assert not table.was_retracted(("pump-7", "t0"), 60_000)  # once for each
    assert not table.was_retracted(("pump-7", "t1"), 70_000)
    table.caught_up_at = 20_000
    assert table.was_retracted(("pump-7", "t2"), 70_000)


def test_it_becomes_a_journal_entry() -> None:
    read = arrived(b'{"id": "a", "text": "x", "timeout_ms": 500}')
    assert isinstance(read, Arrival)
    shadow = Shadow(read.key, read=read, route=Route("edge-1", "echo", "1.0.0", 2))
    see(shadow, chunk(0, 2, b"hello"))
    entry = shadow.entry(read, b"{}", None)
    assert (entry.node, entry.attempt, entry.next_seq) == ("edge-1", 2, 1)
    assert (entry.accepted_at, entry.deadline) == (1_000, 1_500)
    assert unpack_chunks(entry.chunks or b"") == ((0, b"hello"),)


def test_a_task_left_to_another_router_is_watched_again_after_a_restart() -> None:
    read = arrived(b'{"id": "a", "text": "x", "timeout_ms": 500}')
    assert isinstance(read, Arrival)
    before = Shadow(read.key, read=read, reply=read.reply, deadline=read.deadline)
    see(before, chunk(0, 2, b"hello"))
    claim = Claim("router-2", 101)
    shadow = Shadow.of(before.entry(read, encode(read.task), None), claim)
    assert isinstance(shadow.read, Arrival)
    assert (shadow.read.key, shadow.read.task) == (read.key, read.task)
    assert (shadow.claim, shadow.deadline, shadow.next_seq) == (claim, read.deadline, 1)
    assert list(shadow.shown) == [(0, b"hello")]
    assert shadow.shown_bytes == 5
    assert shadow.journaled
    assert shadow.doubtful
