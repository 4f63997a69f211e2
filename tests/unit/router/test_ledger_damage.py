"""A journal that cannot be read any more is set aside, and the router goes on."""

import sqlite3
from functools import partial
from pathlib import Path

import pytest

from capability_schemas.errors import Overloaded
from router.entry import Entry
from router.ledger import Ledger
from router.ledger_file import set_aside

PAGE_BYTES = 4096


def entry(number: int, *, size_bytes: int = 16) -> Entry:
    return Entry(
        client="c",
        task_id=f"t-{number}",
        task=b"x" * size_bytes,
        reply="foam/v1/local/reply/c/t",
        accepted_at=number,
        deadline=100,
    )


def scratch(path: Path) -> bytes:
    """Overwrite every page but the first; return what stands there then."""
    content = path.read_bytes()
    assert len(content) > 2 * PAGE_BYTES
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(b"\xa5" * (len(content) - PAGE_BYTES))
    return path.read_bytes()


def set_aside_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.glob("l.sqlite.damaged-*")
        if not path.name.endswith(("-wal", "-shm"))
    )


async def works(ledger: Ledger) -> bool:
    return await ledger.journal(entry(9_999)) is None


async def test_a_file_that_is_no_database_is_set_aside_whole(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_text("not a database, but long enough to be looked at" * 99)
    content = path.read_bytes()
    async with Ledger(path=path) as ledger:
        assert await works(ledger)
        (aside,) = set_aside_in(tmp_path)
        assert aside.read_bytes() == content
        assert ledger.take_damage() == aside
        assert ledger.take_damage() is None


async def test_damaged_pages_are_found_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    async with Ledger(path=path) as ledger:
        for number in range(50):
            await ledger.journal(entry(number, size_bytes=PAGE_BYTES))
    scratched = scratch(path)
    async with Ledger(path=path) as ledger:
        assert await ledger.unfinished() == []
        assert await works(ledger)
    (aside,) = set_aside_in(tmp_path)
    assert aside.read_bytes() == scratched
    async with Ledger(path=path) as ledger:
        assert [left.task_id for left in await ledger.unfinished()] == ["t-9999"]
        assert ledger.take_damage() is None


async def test_pages_damaged_at_work_cost_one_request_and_no_router(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    async with Ledger(path=path) as ledger:  # more than SQLite keeps in memory
        for number in range(3_000):
            ledger._note(partial(_insert, number=number))  # in few transactions
        assert len(await ledger.unfinished()) == 3_000
        db = sqlite3.connect(path)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
        scratch(path)
        with pytest.raises(Overloaded):
            await ledger.unfinished()
        assert await works(ledger)
        assert ledger.take_damage() in set_aside_in(tmp_path)


def _insert(db: sqlite3.Connection, *, number: int) -> None:
    one = entry(number, size_bytes=PAGE_BYTES)
    db.execute(
        "INSERT INTO tasks (client, id, reply, accepted_at, deadline) VALUES (?, ?, ?, ?, ?)",
        (*one.key, one.reply, one.accepted_at, one.deadline),
    )
    db.execute("INSERT INTO requests VALUES (?, ?, ?)", (*one.key, one.task))


def test_only_the_latest_damaged_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    for moment in range(5):
        path.write_text(f"damaged {moment}")
        path.with_name("l.sqlite-wal").write_text("and its log")
        set_aside(path, 1_700_000_000_000 + moment)
    kept = set_aside_in(tmp_path)
    assert [one.read_text() for one in kept] == ["damaged 3", "damaged 4"]
    assert len(list(tmp_path.iterdir())) == 4
