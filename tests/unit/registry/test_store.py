import sqlite3
from pathlib import Path

import pytest

from capability_schemas.errors import ConfigurationError, Unavailable
from registry.store import Change, HistoryEntry, SqliteStore
from support.capabilities import make_record
from support.encoders import WordEncoder

ENCODER = WordEncoder()
RECORD = make_record(ENCODER)


def entry(change: Change = Change.ADMITTED, at: int = 1, reason: str = "") -> HistoryEntry:
    return HistoryEntry.of(RECORD, change, at=at, reason=reason)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "registry.sqlite"


async def test_what_is_put_is_there_after_a_restart(path: Path) -> None:
    async with SqliteStore(path=path) as store:
        await store.put(RECORD, at=5, entry=entry(at=5))
    assert path.stat().st_mode & 0o077 == 0
    async with SqliteStore(path=path) as store:
        (stored,) = await store.load()
        assert stored.record == RECORD
        assert not stored.withdrawn
        assert stored.changed_at == 5
        assert [line.change for line in await store.history("edge-1")] == [Change.ADMITTED]


async def test_a_withdrawal_keeps_the_order_and_forgetting_drops_it(path: Path) -> None:
    async with SqliteStore(path=path) as store:
        await store.put(RECORD, at=1, entry=entry())
        await store.withdraw(entry(Change.EXPIRED, at=9, reason="its lease ended"))
        (stored,) = await store.load()
        assert stored.withdrawn
        assert stored.record.order == RECORD.order
        assert await store.forget("edge-1", "echo")
        assert not await store.forget("edge-1", "echo")
        assert await store.load() == []
        newest, oldest = await store.history("edge-1", "echo")
        assert (newest.change, newest.reason, newest.at) == (Change.EXPIRED, "its lease ended", 9)
        assert oldest.change is Change.ADMITTED


async def test_history_is_bounded_for_each_key_and_newest_first(path: Path) -> None:
    async with SqliteStore(path=path, history_per_capability=3) as store:
        other = HistoryEntry("edge-1", "other", Change.REFUSED, 0, "first")
        await store.note(other)
        for at in range(1, 8):
            await store.note(entry(at=at))
        assert [line.at for line in await store.history("edge-1", "echo")] == [7, 6, 5]
        assert await store.history("edge-1", "other") == [other]
        assert len(await store.history("edge-1", limit=2)) == 2
        assert await store.history("nobody") == []


async def test_a_renewal_leaves_no_line(path: Path) -> None:
    async with SqliteStore(path=path) as store:
        await store.put(RECORD, at=1, entry=None)
        assert await store.history("edge-1") == []


async def test_a_full_disk_is_told_and_the_store_stays_usable(path: Path) -> None:
    big = RECORD.model_copy(update={"description": "x" * 2_000, "examples": ("y" * 2_000,) * 200})
    async with SqliteStore(path=path, page_limit=12) as store:
        with pytest.raises(Unavailable, match="full"):
            await store.put(big, at=1, entry=entry())
        assert await store.load() == []
        await store.put(RECORD, at=1, entry=entry())
        assert len(await store.load()) == 1


async def test_a_locked_file_is_told_and_the_store_stays_usable(path: Path) -> None:
    async with SqliteStore(path=path, busy_timeout_s=0.0) as store:
        other = sqlite3.connect(path, isolation_level=None)
        try:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(Unavailable, match="locked") as failure:
                await store.put(RECORD, at=1, entry=entry())
            assert failure.value.retryable
            other.execute("ROLLBACK")
        finally:
            other.close()
        await store.put(RECORD, at=1, entry=entry())


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_bytes(b"this is no database, and long enough to be noticed" * 10)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        async with SqliteStore(path=path):
            pass


async def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        async with SqliteStore(path=tmp_path / "file" / "registry.sqlite"):
            pass


async def test_a_file_of_a_newer_version_is_refused(path: Path) -> None:
    async with SqliteStore(path=path):
        pass
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigurationError, match="newer version"):
        async with SqliteStore(path=path):
            pass


async def test_a_row_that_cannot_be_read_does_not_hide_the_others(path: Path) -> None:
    async with SqliteStore(path=path) as store:
        await store.put(RECORD, at=1, entry=None)
        await store.put(make_record(ENCODER, function="other"), at=1, entry=None)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE capability SET record = '{}' WHERE function = 'other'")
    connection.close()
    async with SqliteStore(path=path) as store:
        assert [stored.record.function for stored in await store.load()] == ["echo"]


async def test_a_closed_store_says_so(path: Path) -> None:
    store = SqliteStore(path=path)
    with pytest.raises(Unavailable, match="closed"):
        await store.load()
    async with store:
        assert await store.load() == []
    with pytest.raises(Unavailable, match="closed"):
        await store.load()
