"""The audit trail: nothing in it can be touched without showing."""

import sqlite3
import stat

import pytest

from capability_schemas.errors import ConfigurationError, Unavailable
from capability_schemas.signing import SigningKey
from registry.store.audit import AuditLog, verify_trail

KEY = SigningKey.generate()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.sqlite"


@pytest.fixture
def trail(path):
    """A trail of five entries."""
    with AuditLog(path, key=KEY, clock=lambda: 1_790_000_000_000) as log:
        for number in range(1, 6):
            log.write("granted", actor="admin-1", subject=f"edge-{number}", detail={"n": number})
    return path


def touch(path, statement):
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


def test_an_untouched_trail_is_whole(trail):
    found = verify_trail(trail, KEY.public)
    assert (found.entries, found.broken_at, found.problem) == (5, None, "")
    with AuditLog(trail, key=KEY) as log:
        assert log.latest(1)[0].hash == found.head


def test_it_goes_on_after_a_restart(trail):
    with AuditLog(trail, key=KEY) as log:
        assert log.write("revoked", actor="admin-1", subject="edge-1").number == 6
        newest, *older = log.latest(3)
        assert (newest.action, [entry.number for entry in older]) == ("revoked", [5, 4])
        assert [entry.number for entry in log.latest(2, before=3)] == [2, 1]
        assert newest.describe()["subject"] == "edge-1"
    assert verify_trail(trail, KEY.public).entries == 6


@pytest.mark.parametrize(
    ("statement", "broken_at"),
    [
        ("UPDATE entry SET subject = 'edge-9' WHERE number = 3", 3),
        ("UPDATE entry SET at = at + 1 WHERE number = 1", 1),
        ("UPDATE entry SET detail = '{}' WHERE number = 5", 5),
        ("UPDATE entry SET detail = 'no json' WHERE number = 2", 2),
        ("UPDATE entry SET hash = 'ab' WHERE number = 4", 4),
        ("DELETE FROM entry WHERE number = 2", 2),
        ("DELETE FROM entry WHERE number = 1", 1),
        ("UPDATE entry SET number = 9 WHERE number = 5", 5),
        ("INSERT INTO entry SELECT 6, at, actor, 'x', '', '{}', hash FROM entry LIMIT 1", 6),
    ],
)
def test_every_touch_shows_where(trail, statement, broken_at):
    touch(trail, statement)
    found = verify_trail(trail, KEY.public)
    assert found.broken_at == broken_at
    assert found.problem


@pytest.mark.parametrize(
    "statement", ["DELETE FROM entry WHERE number = 5", "DELETE FROM head", "DELETE FROM entry"]
)
def test_a_cut_tail_shows_by_the_signature(trail, statement):
    touch(trail, statement)
    assert "signature of the head" in verify_trail(trail, KEY.public).problem


def test_a_chain_made_anew_needs_the_key(tmp_path, trail):
    forged = tmp_path / "forged.sqlite"
    with AuditLog(forged, key=SigningKey.generate()) as log:
        log.write("granted", actor="admin-1", subject="mallory")
    assert "another registry" in verify_trail(forged, KEY.public).problem


def test_an_empty_trail_is_whole(path):
    with AuditLog(path, key=KEY):
        pass
    assert verify_trail(path, KEY.public).entries == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_no_trail_is_named(tmp_path, path):
    with pytest.raises(ConfigurationError, match="no audit trail"):
        verify_trail(path, KEY.public)
    path.write_text("hello, this is no database at all, not even a short one")
    with pytest.raises(ConfigurationError, match="cannot be"):
        verify_trail(path, KEY.public)
    other = tmp_path / "other.sqlite"
    touch(other, "PRAGMA user_version = 7")
    with pytest.raises(ConfigurationError, match="layout 7"), AuditLog(other, key=KEY):
        pass


def test_a_closed_trail_says_so(path):
    log = AuditLog(path, key=KEY)
    with pytest.raises(Unavailable, match="closed"):
        log.write("granted", actor="a")


def test_what_cannot_be_written_changes_nothing(trail, monkeypatch):
    monkeypatch.setattr("registry.store.audit._BUSY_S", 0.01)
    with AuditLog(trail, key=KEY) as log:
        blocker = sqlite3.connect(trail, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="cannot be written"):
            log.write("granted", actor="a")
        blocker.execute("ROLLBACK")
        blocker.close()
        assert log.write("granted", actor="a").number == 6
    assert verify_trail(trail, KEY.public).broken_at is None
