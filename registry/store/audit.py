"""The audit trail: every grant, refusal and order, in a chain that shows when it was touched.

Each entry holds the hash of the one before (the linked timestamps of Haber and Stornetta, 1991):
whoever changes, inserts or removes one has to make every later one anew. The head of the chain is
signed with the registry's key after each entry, so that making them anew takes that key, and every
entry goes out as an event with its hash, so that an observer who keeps the last one notices even
that. What the chain cannot show: entries that were never written.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final, Self

from capability_schemas.errors import (
    BadSignature,
    ConfigurationError,
    MalformedPayload,
    Unavailable,
)
from capability_schemas.ids import now_ms
from capability_schemas.signing import SigningKey, canonical_bytes, verify_bytes

_FIRST: Final = "0" * 64
_BUSY_S: Final = 2.0
_LAYOUT: Final = 1
_SCHEMA: Final = """
    CREATE TABLE entry (
        number INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,
        actor TEXT NOT NULL,
        action TEXT NOT NULL,
        subject TEXT NOT NULL,
        detail TEXT NOT NULL,
        hash TEXT NOT NULL
    );
    CREATE TABLE head (one INTEGER PRIMARY KEY CHECK (one = 1), signature TEXT NOT NULL);
"""

_LATEST: Final = """
    SELECT * FROM entry
    WHERE (:before IS NULL OR number < :before)
      AND (:action IS NULL OR action = :action)
      AND (:begins IS NULL OR substr(action, 1, length(:begins)) = :begins)
      AND (:actor IS NULL OR actor = :actor)
      AND (:since IS NULL OR at >= :since)
    ORDER BY number DESC LIMIT :limit
"""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing that happened.

    Attributes:
        number: From 1, without gaps.
        at: UTC milliseconds.
        actor: Who did it.
        action: What, in one word: ``granted``, ``refused``, ``revoked``, ``weights``, …
        subject: To whom or what.
        detail: More of it, JSON.
        hash: SHA-256 over the entry and the hash of the one before, hexadecimal.
    """

    number: int
    at: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    hash: str

    def describe(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "number": self.number,
            "at": self.at,
            "actor": self.actor,
            "action": self.action,
            "subject": self.subject,
            "detail": self.detail,
            "hash": self.hash,
        }


@dataclass(frozen=True, slots=True)
class AuditNote:
    """What is to be written down.

    Attributes:
        action: What happened, in one word.
        actor: Who did it.
        subject: To whom or what.
        detail: More of it, JSON; no secrets.
    """

    action: str
    actor: str
    subject: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verification:
    """What a look at the whole chain found.

    Attributes:
        entries: How many entries there are.
        head: Hash of the last one; compare it with what an observer has kept.
        broken_at: Number of the first entry that does not fit; None when all do.
        problem: What is wrong, in words; empty when nothing is.
    """

    entries: int
    head: str
    broken_at: int | None = None
    problem: str = ""


class AuditLog:
    """The trail of one registry, in SQLite; a context manager. Any thread may use it.

    Every entry is on disk when ``write`` returns (``synchronous=FULL``).

    Args:
        path: The file; made on first use, readable by its owner only.
        key: Signs the head of the chain.
        clock: UTC milliseconds.
    """

    def __init__(self, path: Path, *, key: SigningKey, clock: Callable[[], int] = now_ms) -> None:
        self._path = path
        self._key = key
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._lock = Lock()

    def __enter__(self) -> Self:
        """Open the file.

        Raises:
            ConfigurationError: It cannot be opened, or is of another layout.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.touch(mode=0o600)
            self._connection = _open(self._path)
        except (OSError, sqlite3.Error) as exc:
            raise ConfigurationError(f"audit trail {self._path} cannot be opened: {exc}") from exc
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def write(
        self, action: str, *, actor: str, subject: str = "", detail: dict[str, Any] | None = None
    ) -> AuditEntry:
        """Add an entry.

        Args:
            action: What happened, in one word.
            actor: Who did it.
            subject: To whom or what.
            detail: More of it, JSON; no secrets.

        Raises:
            Unavailable: It cannot be written (disk full, file locked); nothing was.
        """
        return self.write_all([AuditNote(action, actor, subject, detail or {})])[0]

    def write_all(self, notes: Sequence[AuditNote]) -> list[AuditEntry]:
        """Add entries, all of them or none: one turn of the disk for many.

        A note that has no canonical JSON (half a surrogate pair, a number beyond all bounds) would
        stop every one behind it: it is written without its detail.

        Args:
            notes: What happened, in order.

        Raises:
            Unavailable: They cannot be written (disk full, file locked); nothing was.
        """
        entries: list[AuditEntry] = []
        with self._lock:
            connection = self._opened()
            try:
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    number, before = _head(connection)
                    for note in map(_writable, notes):
                        number += 1
                        made = _entry(
                            number,
                            self._clock(),
                            note.actor,
                            note.action,
                            note.subject,
                            note.detail,
                            before,
                        )
                        _insert(connection, made)
                        entries.append(made)
                        before = made.hash
                    connection.execute(
                        "INSERT OR REPLACE INTO head VALUES (1, ?)",
                        (self._key.sign_bytes(_signed(number, before)),),
                    )
            except sqlite3.Error as exc:
                raise Unavailable(f"audit trail {self._path} cannot be written: {exc}") from exc
        return entries

    def latest(
        self,
        limit: int = 100,
        *,
        before: int | None = None,
        action: str | None = None,
        actor: str | None = None,
        since: int | None = None,
    ) -> list[AuditEntry]:
        """Return entries, newest first.

        Args:
            limit: At most so many.
            before: Only entries with a lower number.
            action: Only this action, or all that begin with it where it ends in ``*``.
            actor: Only this actor.
            since: Only entries of this time or later, UTC milliseconds.

        Raises:
            Unavailable: It cannot be read now.
        """
        prefix = action is not None and action.endswith("*")
        asked = {
            "before": before,
            "action": None if prefix else action,
            "begins": action[:-1] if action is not None and prefix else None,
            "actor": actor,
            "since": since,
            "limit": limit,
        }
        with self._lock:
            connection = self._opened()
            try:
                rows = connection.execute(_LATEST, asked).fetchall()
            except sqlite3.Error as exc:
                raise Unavailable(f"audit trail {self._path} cannot be read: {exc}") from exc
        return [_read(row) for row in rows]

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise Unavailable(f"audit trail {self._path} is closed", retryable=False)
        return self._connection


def verify_trail(path: Path, public: str) -> Verification:
    """Check every entry, link and the signature of the head of a trail.

    Args:
        path: The file; it may be in use.
        public: Public key of the registry, base64.

    Raises:
        ConfigurationError: The file is missing or is no audit trail.
    """
    if not path.exists():
        raise ConfigurationError(f"there is no audit trail {path}")
    try:
        connection = _open(path)
        try:
            connection.execute("BEGIN")  # one state of the file for everything below
            return _verify(connection, public)
        finally:
            connection.close()
    except sqlite3.Error as exc:
        raise ConfigurationError(f"audit trail {path} cannot be read: {exc}") from exc


def _verify(connection: sqlite3.Connection, public: str) -> Verification:
    before, number = _FIRST, 0
    for row in _rows(connection):
        found = _fitting(row, number + 1, before)
        if found is None:
            return Verification(
                number, before, number + 1, f"entry {number + 1} was changed, or one is missing"
            )
        before, number = found.hash, found.number
    row = connection.execute("SELECT signature FROM head").fetchone()
    if row is None and number == 0:
        return Verification(0, before)
    try:
        verify_bytes(_signed(number, before), str(row and row[0]), public)
    except BadSignature:
        return Verification(
            number,
            before,
            number,
            "the signature of the head does not fit: entries were cut off "
            "or made anew, or another registry wrote them",
        )
    return Verification(number, before)


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        layout = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if layout == 0:
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_LAYOUT}; COMMIT;")
    except BaseException:
        connection.close()
        raise
    if layout not in {0, _LAYOUT}:
        connection.close()
        raise ConfigurationError(
            f"audit trail {path} has layout {layout}, known is {_LAYOUT}: update this program"
        )
    return connection


def _writable(note: AuditNote) -> AuditNote:
    """Return a note as the chain can hold it."""
    try:
        canonical_bytes(
            {
                "actor": note.actor,
                "action": note.action,
                "subject": note.subject,
                "detail": note.detail,
            }
        )
        json.dumps(note.detail)
    except (MalformedPayload, ValueError, TypeError, ArithmeticError, RecursionError):
        action, actor, subject = (
            text.encode("utf-8", "replace").decode()
            for text in (note.action, note.actor, note.subject)
        )
        return AuditNote(action, actor, subject, {"unwritable": "its detail has no canonical JSON"})
    return note


def _insert(connection: sqlite3.Connection, entry: AuditEntry) -> None:
    connection.execute(
        "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            entry.number,
            entry.at,
            entry.actor,
            entry.action,
            entry.subject,
            json.dumps(entry.detail, ensure_ascii=False),
            entry.hash,
        ),
    )


def _rows(connection: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    yield from connection.execute("SELECT * FROM entry ORDER BY number")


def _read(row: tuple[Any, ...]) -> AuditEntry:
    number, at, actor, action, subject, detail, digest = row
    return AuditEntry(number, at, actor, action, subject, json.loads(detail), digest)


def _fitting(row: tuple[Any, ...], number: int, before: str) -> AuditEntry | None:
    """Read an entry; None when it is not the one that follows."""
    try:
        found = _read(row)
        made = _entry(
            number, found.at, found.actor, found.action, found.subject, found.detail, before
        )
    except (ValueError, TypeError):
        return None
    return found if found == made else None


def _head(connection: sqlite3.Connection) -> tuple[int, str]:
    row = connection.execute(
        "SELECT number, hash FROM entry ORDER BY number DESC LIMIT 1"
    ).fetchone()
    return (0, _FIRST) if row is None else (int(row[0]), str(row[1]))


def _entry(
    number: int,
    at: int,
    actor: str,
    action: str,
    subject: str,
    detail: dict[str, Any],
    before: str,
) -> AuditEntry:
    covered = canonical_bytes(
        {
            "number": number,
            "at": at,
            "actor": actor,
            "action": action,
            "subject": subject,
            "detail": detail,
            "before": before,
        }
    )
    digest = hashlib.sha256(covered).hexdigest()
    return AuditEntry(number, at, actor, action, subject, detail, digest)


def _signed(number: int, last: str) -> bytes:
    return canonical_bytes({"entries": number, "last": last})
