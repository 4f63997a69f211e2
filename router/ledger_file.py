"""The file of the ledger: its schema, how it is opened, and where a damaged one goes."""

import contextlib
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from capability_schemas.errors import ConfigurationError

_VERSION: Final = 5
_BUSY_TIMEOUT_S: Final = 0.5
_KEPT: Final = 2
"""Damaged ledgers kept, each up to the largest size of a ledger; the oldest go first."""
_PARTS: Final = ("", "-wal", "-shm")
"""A SQLite file and what belongs to it (sqlite.org/tempfiles.html)."""

_SCHEMA: Final = """
CREATE TABLE tasks (
    client TEXT NOT NULL, id TEXT NOT NULL, reply TEXT NOT NULL,
    accepted_at INTEGER NOT NULL, deadline INTEGER NOT NULL,
    node TEXT, function TEXT, version TEXT, attempt INTEGER NOT NULL DEFAULT 0,
    next_seq INTEGER NOT NULL DEFAULT 0, explanation TEXT,
    ended_at INTEGER, code TEXT, terminal BLOB, chunks BLOB, told INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (client, id)
);
CREATE TABLE requests (
    client TEXT NOT NULL, id TEXT NOT NULL, task BLOB NOT NULL, PRIMARY KEY (client, id)
);
CREATE INDEX tasks_ended ON tasks (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX tasks_open ON tasks (accepted_at) WHERE ended_at IS NULL;
CREATE INDEX tasks_untold ON tasks (ended_at) WHERE ended_at IS NOT NULL AND told = 0;
CREATE INDEX tasks_by_id ON tasks (id);
CREATE TABLE cordons (node TEXT PRIMARY KEY);
"""
_MEMOS: Final = """
CREATE TABLE memos (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_SHOWN: Final = """
ALTER TABLE tasks ADD COLUMN continues TEXT NOT NULL DEFAULT 'restart';
ALTER TABLE tasks ADD COLUMN model TEXT;
CREATE TABLE shown (
    client TEXT NOT NULL, id TEXT NOT NULL, since INTEGER NOT NULL, chunks BLOB NOT NULL,
    PRIMARY KEY (client, id, since)
);
"""
_GIVEN: Final = """
ALTER TABLE tasks ADD COLUMN given INTEGER NOT NULL DEFAULT 0;
"""
_CLAIMED: Final = """
ALTER TABLE tasks ADD COLUMN claimed_by TEXT;
ALTER TABLE tasks ADD COLUMN claimed_from INTEGER NOT NULL DEFAULT 1;
"""
_STEPS: Final = (_SCHEMA, _MEMOS, _SHOWN, _GIVEN, _CLAIMED)
"""What makes each version of the file out of the one before it."""


def connect(path: Path, *, limit_bytes: int) -> sqlite3.Connection:
    """Open a ledger, creating it or bringing it to the present version if need be.

    Args:
        path: The SQLite file; its folder exists.
        limit_bytes: Largest size of the file.

    Raises:
        sqlite3.Error: It cannot be opened, or is damaged (`is_damage`).
        ConfigurationError: It is of a newer version.
    """
    with contextlib.suppress(OSError):  # what is wrong with the path, SQLite tells
        path.touch(mode=0o600)
        path.chmod(0o600)  # made by an older release; its -wal and -shm go by it
    db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    try:
        _check_pages(db)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        (page_bytes,) = db.execute("PRAGMA page_size").fetchone()
        db.execute(f"PRAGMA max_page_count = {max(1, limit_bytes // page_bytes)}")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        _check_version(path, version)
        if version < _VERSION:
            steps = "".join(_STEPS[version:])
            db.executescript(f"BEGIN;{steps}PRAGMA user_version = {_VERSION};COMMIT;")
    except BaseException:
        db.close()
        raise
    return db


def code_of(error: sqlite3.Error) -> int | None:
    """Return the primary result code; None for errors of the module's own making."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def is_damage(error: sqlite3.Error) -> bool:
    """Tell whether an error means that the file itself is damaged, or no database."""
    return code_of(error) in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def set_aside(path: Path, at_ms: int) -> Path:
    """Move a ledger out of the way.

    Args:
        path: The ledger.
        at_ms: Now, UTC milliseconds; part of the new name.

    Returns:
        Where it is now.

    Raises:
        OSError: It cannot be moved.
    """
    moment = datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y%m%dT%H%M%S%fZ")
    aside = path.with_name(f"{path.name}.damaged-{moment}")
    for part in _PARTS:
        source = path.with_name(path.name + part)
        if source.exists():
            source.replace(aside.with_name(aside.name + part))
    kept = sorted(
        found
        for found in path.parent.glob(f"{path.name}.damaged-*")
        if not found.name.endswith(_PARTS[1:])
    )
    for old in kept[:-_KEPT]:
        for part in _PARTS:
            old.with_name(old.name + part).unlink(missing_ok=True)
    return aside


class _Damaged(sqlite3.DatabaseError):
    """A check of the file has found it damaged."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def _check_pages(db: sqlite3.Connection) -> None:
    (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise _Damaged(verdict)


def _check_version(path: Path, version: int) -> None:
    if version > _VERSION:
        raise ConfigurationError(
            f"ledger {path} is of version {version}, this router knows {_VERSION}: update it"
        )
