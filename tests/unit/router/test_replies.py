import json
from pathlib import Path
from typing import Any

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.errors import AccessDenied
from capability_schemas.reply import Chunk
from capability_schemas.wire import encode
from router.entry import Entry, pack_chunks, unpack_chunks
from router.ledger import Ledger
from router.replies import Outcome, ReplyDesk, as_of


def outcome(shown: tuple[tuple[int, bytes], ...], seq: int = 3) -> Outcome:
    return Outcome(
        key=("c", "t"),
        reply="r",
        seq=seq,
        attempt=2,
        terminal=b"final",
        code=None,
        ended_at=9,
        told=True,
        shown=shown,
    )


def chunk(seq: int, attempt: int = 2) -> bytes:
    return encode(Chunk(task="t", at=1, seq=seq, attempt=attempt, data=f"é{seq}"))


def test_chunks_survive_packing() -> None:
    shown = ((0, b""), (1, b"one\n"), (7, b"x" * 70_000))
    assert unpack_chunks(pack_chunks(shown)) == shown
    assert unpack_chunks(b"") == ()


def test_a_replay_starts_where_it_is_wanted() -> None:
    kept = outcome(((0, chunk(0)), (1, chunk(1)), (2, chunk(2))))
    assert list(kept.replay(0)) == [chunk(0), chunk(1), chunk(2), b"final"]
    assert list(kept.replay(2)) == [chunk(2), b"final"]
    assert list(kept.replay(3)) == list(kept.replay(99)) == [b"final"]


def test_a_replay_is_as_of_the_last_attempt_for_readers_pass_over_lower_ones() -> None:
    kept = outcome(((0, chunk(0, 1)), (1, chunk(1, 1)), (2, chunk(2, 2))))
    told = [json.loads(event) for event in list(kept.replay(0))[:-1]]
    first = json.loads(chunk(0, 1))
    assert told[0] == {**first, "attempt": 2}
    assert [(one["seq"], one["attempt"], one["data"]) for one in told] == [
        (0, 2, "é0"),
        (1, 2, "é1"),
        (2, 2, "é2"),
    ]
    assert as_of(1, chunk(0, 1)) == chunk(0, 1)


def test_chunks_no_longer_kept_leave_no_gap() -> None:
    events = list(outcome(((2, chunk(2)),)).replay(0))
    assert [json.loads(event)["seq"] for event in events[:2]] == [0, 1]
    assert all(json.loads(event)["data"] == "" for event in events[:2])
    assert events[2:] == [chunk(2), b"final"]


def test_an_entry_that_has_not_ended_has_no_outcome() -> None:
    running = Entry("c", "t", b"{}", "r", 1, 2)
    assert Outcome.of(running) is None
    terminal = b'{"event":"error","seq":1,"attempt":5}'  # the fourth was announced, and lost too
    shown = pack_chunks(((0, chunk(0, 2)),))
    ended = Entry(
        "c",
        "t",
        b"{}",
        "r",
        1,
        2,
        attempt=2,
        next_seq=1,
        ended_at=3,
        terminal=terminal,
        chunks=shown,
    )
    read = Outcome.of(ended)
    assert read is not None
    assert (read.seq, read.attempt, read.told) == (1, 5, True)
    assert [json.loads(event)["attempt"] for event in read.replay(0)] == [5, 5]


class RefusedSession(MemorySession):
    """A session whose broker says no to every message, as MQTT 5 can."""

    async def publish(self, topic: str, payload: bytes, **_: Any) -> None:
        raise AccessDenied(f"the broker refuses a message on {topic}", bytes=len(payload))


async def test_a_refused_final_event_is_not_tried_for_ever(tmp_path: Path) -> None:
    session = RefusedSession(broker=MemoryBroker(), client_id="router-1")
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        desk = ReplyDesk(
            session=session,
            ledger=ledger,
            router_id="router-1",
            recent_bytes=1_000,
            clock=lambda: 1,
        )
        task = Entry(client="c", task_id="t", task=b"{}", reply="r", accepted_at=1, deadline=100)
        await ledger.journal(task)
        await ledger.conclude(
            ("c", "t"), terminal=b"x", seq=0, chunks=None, code=None, ended_at=2, told=False
        )
        await desk.tell(("c", "t"), "r", b"x")
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        assert await ledger.untold() == []
