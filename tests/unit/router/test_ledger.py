import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from capability_schemas.errors import ConfigurationError, Overloaded, Unavailable
from router.entry import Entry, pack_chunks, unpack_chunks
from router.ledger import Ledger
from router.shown import Origin


def entry(task_id: str = "t", client: str = "c", task: bytes = b"{}", at: int = 1) -> Entry:
    return Entry(
        client=client,
        task_id=task_id,
        task=task,
        reply="foam/v1/local/reply/c/t",
        accepted_at=at,
        deadline=100,
    )


async def conclude(ledger: Ledger, task_id: str = "t", **fields: Any) -> None:
    values: dict[str, Any] = {
        "terminal": b"done",
        "seq": 3,
        "chunks": None,
        "code": None,
        "ended_at": 50,
        "told": True,
    } | fields
    await ledger.conclude(("c", task_id), **values)


async def test_a_task_is_journaled_once_and_its_outcome_kept(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        assert await ledger.journal(entry()) is None
        known = await ledger.journal(entry(task=b"{other}"))
        assert known is not None
        assert (known.task, known.terminal) == (b"{}", None)
        assert await ledger.journal(entry(client="other")) is None
        await conclude(ledger, chunks=pack_chunks([(0, b"a")]))
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        found = await ledger.find("c", "t")
        assert found is not None
        assert (found.terminal, found.next_seq, found.ended_at) == (b"done", 3, 50)
        assert unpack_chunks(found.chunks or b"") == ((0, b"a"),)
        assert [left.client for left in await ledger.unfinished()] == ["other"]
        assert await ledger.find("c", "unknown") is None


async def test_only_the_owner_reads_what_people_asked(tmp_path: Path) -> None:
    (tmp_path / "old.sqlite").touch(mode=0o644)
    (tmp_path / "old.sqlite").chmod(0o644)
    for name in ("new.sqlite", "old.sqlite"):
        async with Ledger(path=tmp_path / name) as ledger:
            await ledger.journal(entry())
            modes = {path.stat().st_mode & 0o777 for path in tmp_path.glob(f"{name}*")}
            assert modes == {0o600}


async def test_the_first_outcome_stands(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        await ledger.journal(entry())
        await conclude(ledger)
        await conclude(ledger, terminal=b"other", code="internal")
        found = await ledger.find("c", "t")
        assert found is not None
        assert found.terminal == b"done"


async def test_notes_are_kept_in_order_without_waiting(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        await ledger.journal(entry())
        ledger.note_route(("c", "t"), node="a", function="f", version="1.0.0", attempt=1)
        ledger.note_route(("c", "t"), node="b", function="f", version="1.0.0", attempt=2)
        ledger.note_explanation(("c", "t"), {"chosen": ["b", "f"]})
        ledger.note_shown(("c", "t"), 7)
        (left,) = await ledger.unfinished()
        assert (left.node, left.attempt, left.next_seq) == ("b", 2, 7)
        assert await ledger.explanation("t") == (left, {"chosen": ["b", "f"]})
        assert await ledger.explanation("t", "stranger") is None


async def test_it_is_noted_which_router_has_a_task(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        await ledger.journal(entry())
        ledger.note_route(("c", "t"), node="a", function="f", version="1.0.0", attempt=3)
        ledger.note_shown(("c", "t"), 2, since=1, chunks=b"old")
        ledger.note_claim(("c", "t"), "router-2", 101)
        (left,) = await ledger.unfinished()
        assert (left.claimed_by, left.claimed_from, left.attempt) == ("router-2", 101, 3)
        assert (left.node, left.origin, left.chunks) == (None, None, b"old")
        ledger.note_claim(("c", "t"), None, 201)
        (left,) = await ledger.unfinished()
        assert (left.claimed_by, left.claimed_from, left.chunks) == (None, 201, None)


async def test_a_task_left_to_another_router_is_forgotten_but_not_its_outcome(
    tmp_path: Path,
) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        for task in ("t", "ended"):
            await ledger.journal(entry(task))
        await conclude(ledger, "ended")
        for task in ("t", "ended"):
            ledger.forget(("c", task))
        assert await ledger.find("c", "t") is None
        assert await ledger.find("c", "ended") is not None


async def test_outcomes_not_yet_told_are_found_again(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        await ledger.journal(entry())
        await conclude(ledger, told=False)
        assert [left.task_id for left in await ledger.untold()] == ["t"]
        ledger.note_told(("c", "t"))
        assert await ledger.untold() == []


async def test_outcomes_leave_by_age_and_number(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite", retained_tasks=2) as ledger:
        for number in range(5):
            await ledger.journal(entry(str(number)))
            await conclude(ledger, str(number), ended_at=number)
        await ledger.journal(entry("running"))
        assert await ledger.prune(before=1) == 3
        assert await ledger.find("c", "2") is None
        assert await ledger.find("c", "3") is not None
        assert len(await ledger.unfinished()) == 1


async def test_a_full_file_is_overloaded_and_makes_room(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite", limit_bytes=256 * 1024) as ledger:
        await ledger.journal(entry("old"))
        await conclude(ledger, "old", chunks=b"x" * 100_000)
        with pytest.raises(Overloaded) as caught:
            await ledger.journal(entry("new", task=b"x" * 150_000))
        assert caught.value.retry_after_ms > 0
        assert ledger.failing is True
        assert await ledger.find("c", "old") is None
        assert await ledger.journal(entry("new", task=b"x" * 150_000)) is None
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        assert (await ledger.unfinished())[0].task_id == "new"


async def test_a_locked_file_is_overloaded(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        other = sqlite3.connect(tmp_path / "l.sqlite", isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Overloaded, match="locked"):
                await ledger.journal(entry())
            other.execute("ROLLBACK")
        finally:
            other.close()
        assert await ledger.journal(entry()) is None


async def test_work_that_fails_otherwise_does_not_end_the_thread(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        await ledger.journal(entry())
        with pytest.raises(Overloaded):
            await conclude(ledger, code="\ud800")  # text that SQLite cannot hold
        await conclude(ledger)
        found = await ledger.find("c", "t")
        assert found is not None
        assert found.terminal == b"done"


async def test_of_one_commit_only_the_work_that_fails_fails(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        await ledger.journal(entry("first"))
        ended = await asyncio.gather(
            ledger.journal(entry("before")),
            conclude(ledger, "first", seq=2**70),  # more than the file has room for in a number
            ledger.journal(entry("after")),
            return_exceptions=True,
        )
        assert isinstance(ended[1], Overloaded)
        assert [ended[0], ended[2]] == [None, None]
        assert len(await ledger.unfinished()) == 3


async def test_a_burst_shares_commits(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        async with asyncio.TaskGroup() as group:
            for number in range(300):
                group.create_task(ledger.journal(entry(str(number))))
        assert len(await ledger.unfinished()) == 300
        assert ledger.pending == 0


async def test_cordons_are_kept(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        await ledger.set_cordon("b", closed=True)
        await ledger.set_cordon("a", closed=True)
        await ledger.set_cordon("a", closed=True)
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        assert await ledger.cordons() == ["a", "b"]
        await ledger.set_cordon("a", closed=False)
        assert await ledger.cordons() == ["b"]


async def test_a_place_where_no_ledger_can_be_is_said(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.mkdir()
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        async with Ledger(path=path):
            pass


async def test_a_newer_ledger_is_left_alone(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "l.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigurationError, match="version 99"):
        async with Ledger(path=tmp_path / "l.sqlite"):
            pass


async def test_what_waits_is_written_before_the_end(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        await ledger.journal(entry())
        for number in range(600):
            ledger.note_shown(("c", "t"), number)
    with pytest.raises(Unavailable):
        await ledger.find("c", "t")
    async with Ledger(path=tmp_path / "l.sqlite") as again:
        assert (await again.unfinished())[0].next_seq == 599


async def test_memos_outlive_the_ledger_until_they_are_forgotten(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        assert await ledger.memo("weights") is None
        await ledger.set_memo("weights", {"cost": 0.1})
        await ledger.set_memo("weights", {"cost": 0.2})
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        assert await ledger.memo("weights") == {"cost": 0.2}
        await ledger.set_memo("weights", None)
        assert await ledger.memo("weights") is None


async def test_what_was_shown_of_a_running_task_is_there_after_a_restart(tmp_path: Path) -> None:
    path, first, second = tmp_path / "l.sqlite", [(0, b"a"), (1, b"b")], [(2, b"c")]
    async with Ledger(path=path) as ledger:
        await ledger.journal(entry())
        ledger.note_route(
            entry().key,
            node="a",
            function="f",
            version="1.0.0",
            attempt=1,
            continues="prefix",
            model="sha256:1",
        )
        ledger.note_shown(entry().key, 2, since=0, chunks=pack_chunks(first))
        ledger.note_shown(entry().key, 3, since=2, chunks=pack_chunks(second))
        ledger.note_attempt(entry().key, 4)
    async with Ledger(path=path) as ledger:
        (found,) = await ledger.unfinished()
        assert unpack_chunks(found.chunks or b"") == (*first, *second)
        assert (found.next_seq, found.attempt, found.given) == (3, 1, 4)
        assert found.origin == Origin("f", "1.0.0", "prefix", "sha256:1")
        await ledger.conclude(
            found.key, terminal=b"x", seq=3, chunks=None, code=None, ended_at=9, told=True
        )
        ledger.note_shown(found.key, 4, since=3, chunks=b"late")
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM shown").fetchone() == (0,)
    db.close()


async def test_the_half_of_an_outcome_is_no_task(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    async with Ledger(path=path) as ledger:
        await ledger.journal(entry("other", task=b""))  # and killed before the outcome was written
        await ledger.journal(entry("own"))
    async with Ledger(path=path) as ledger:
        assert [found.task_id for found in await ledger.unfinished()] == ["own"]
        assert await ledger.find("c", "other") is None


async def test_a_file_of_the_first_version_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    async with Ledger(path=path) as ledger:
        await ledger.journal(entry())
    db = sqlite3.connect(path)
    db.execute("UPDATE tasks SET explanation = ?", ('{"chosen":["b","f"]}',))
    db.executescript(
        "DROP TABLE memos; DROP TABLE shown; ALTER TABLE tasks DROP COLUMN continues;"
        "ALTER TABLE tasks DROP COLUMN model; ALTER TABLE tasks DROP COLUMN given;"
        "ALTER TABLE tasks DROP COLUMN claimed_by; ALTER TABLE tasks DROP COLUMN claimed_from;"
        "PRAGMA user_version = 1;"
    )
    db.close()
    async with Ledger(path=path) as ledger:
        found = await ledger.explanation("t")
        assert found is not None
        assert found[1] == {"chosen": ["b", "f"]}
        await ledger.set_memo("weights", {})
        assert await ledger.memo("weights") == {}


async def test_an_explanation_takes_little_room(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    candidates = [
        {"node": f"edge-{n}", "gates": {"zones": "pass", "data": "pass"}} for n in range(50)
    ]
    async with Ledger(path=path) as ledger:
        await ledger.journal(entry())
        ledger.note_explanation(("c", "t"), {"candidates": candidates})
        found = await ledger.explanation("t")
    assert found is not None
    assert found[1] == {"candidates": candidates}
    db = sqlite3.connect(path)
    (size,) = db.execute("SELECT length(explanation) FROM tasks").fetchone()
    db.close()
    assert size < 600


async def test_an_explanation_without_end_is_cut_to_what_was_decided(tmp_path: Path) -> None:
    told = {"by": "meaning", "chosen": ["a", "f"], "problem": None, "rules": ["x" * 300_000]}
    async with Ledger(path=tmp_path / "l.sqlite") as ledger:
        await ledger.journal(entry())
        ledger.note_explanation(("c", "t"), told)
        found = await ledger.explanation("t")
    assert found is not None
    kept = found[1]
    assert kept is not None
    assert (kept["chosen"], kept["candidates"]) == (["a", "f"], [])
    assert kept["cut_from_chars"] > 300_000
