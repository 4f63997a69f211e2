"""Catalogue and history in one SQLite file (WAL), touched by one thread only.

WAL with ``synchronous=NORMAL`` keeps every committed change through a crash of the process; the
last ones may be lost with the power (SQLite documentation, "Write-Ahead Logging"). That is enough:
nodes repeat their claims on every connection.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeVar

from pydantic import ValidationError

from broker.lifecycle import Service
from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import ConfigurationError, Unavailable
from capability_schemas.wire import encode

_T = TypeVar("_T")

_MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE capability (
        node TEXT NOT NULL,
        function TEXT NOT NULL,
        epoch INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        digest TEXT NOT NULL,
        withdrawn INTEGER NOT NULL,
        record BLOB NOT NULL,
        changed_at INTEGER NOT NULL,
        PRIMARY KEY (node, function)
    ) WITHOUT ROWID;
    CREATE TABLE history (
        id INTEGER PRIMARY KEY,
        node TEXT NOT NULL,
        function TEXT NOT NULL,
        change TEXT NOT NULL,
        epoch INTEGER,
        revision INTEGER,
        version TEXT,
        digest TEXT,
        reason TEXT NOT NULL,
        at INTEGER NOT NULL
    );
    CREATE INDEX history_of ON history (node, function, id);
    """,
)
"""Scripts that lead from one ``user_version`` to the next; only ever appended to."""


class Change(StrEnum):
    """What happened to a capability."""

    ADMITTED = "admitted"
    WITHDRAWN = "withdrawn"
    EXPIRED = "expired"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class StoredCapability:
    """The newest that is known of one key.

    Attributes:
        record: the admitted record.
        withdrawn: whether it is no longer in the catalogue; its order still counts.
        changed_at: UTC milliseconds.
    """

    record: CatalogRecord
    withdrawn: bool
    changed_at: int


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One line of the history of a key.

    Attributes:
        node: the node.
        function: its function.
        change: what happened.
        epoch: of the claim; None when it could not be read.
        revision: of the claim.
        version: of the function.
        digest: of the claim.
        reason: why, in words.
        at: UTC milliseconds.
    """

    node: str
    function: str
    change: Change
    at: int
    reason: str = ""
    epoch: int | None = None
    revision: int | None = None
    version: str | None = None
    digest: str | None = None

    @classmethod
    def of(
        cls, record: CatalogRecord, change: Change, *, at: int, reason: str = ""
    ) -> "HistoryEntry":
        """Describe a change of an admitted record."""
        return cls(
            node=record.node,
            function=record.function,
            change=change,
            at=at,
            reason=reason,
            epoch=record.epoch,
            revision=record.revision,
            version=record.version,
            digest=record.claim_digest,
        )


class SqliteStore(Service):
    """Catalogue store; an ``async with``. One thread owns the only connection.

    A full disk and a file that somebody has locked raise ``Unavailable`` and leave the store
    usable: the same call may succeed later. Cancelling a call does not undo it.

    Args:
        path: the database file; made on first use, readable by its owner only.
        history_per_capability: entries kept for each key, oldest out first.
        busy_timeout_s: wait for a lock of another process, seconds.
        page_limit: largest size of the file in pages of 4 KiB; None: SQLite's own limit.
    """

    def __init__(
        self,
        *,
        path: Path,
        history_per_capability: int = 100,
        busy_timeout_s: float = 2.0,
        page_limit: int | None = None,
    ) -> None:
        super().__init__(service_id=path.name)
        self._path = path
        self._kept = history_per_capability
        self._busy_timeout_s = busy_timeout_s
        self._page_limit = page_limit
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="foam-registry-store")
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    async def load(self) -> list[StoredCapability]:
        """Everything known, withdrawn capabilities included.

        Rows that a newer version wrote and this one cannot read are left out, and stay in the file.

        Raises:
            Unavailable: the file cannot be read now.
        """
        return await self._run(_load)

    async def put(self, record: CatalogRecord, *, at: int, entry: HistoryEntry | None) -> None:
        """Make a record the current one of its key and note it in the history, both or neither.

        Args:
            record: the admitted record.
            at: UTC milliseconds.
            entry: line for the history; None for a mere renewal.

        Raises:
            Unavailable: disk full, file locked or failing.
        """

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO capability VALUES (?, ?, ?, ?, ?, 0, ?, ?)",
                (
                    record.node,
                    record.function,
                    record.epoch,
                    record.revision,
                    record.claim_digest,
                    encode(record),
                    at,
                ),
            )
            if entry is not None:
                _note(connection, entry, self._kept)

        await self._run(write)

    async def withdraw(self, entry: HistoryEntry) -> None:
        """Mark a key as no longer in the catalogue; its order is kept against old claims.

        Raises:
            Unavailable: as for ``put``.
        """

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE capability SET withdrawn = 1, changed_at = ?"
                " WHERE node = ? AND function = ?",
                (entry.at, entry.node, entry.function),
            )
            _note(connection, entry, self._kept)

        await self._run(write)

    async def forget(self, node: str, function: str) -> bool:
        """Drop a key with its order, so that any claim for it is new again; the history stays.

        Returns:
            Whether it was known.

        Raises:
            Unavailable: as for ``put``.
        """

        def write(connection: sqlite3.Connection) -> bool:
            cursor = connection.execute(
                "DELETE FROM capability WHERE node = ? AND function = ?", (node, function)
            )
            return cursor.rowcount > 0

        return await self._run(write)

    async def note(self, entry: HistoryEntry) -> None:
        """Add a line to the history.

        Raises:
            Unavailable: as for ``put``.
        """
        await self._run(lambda connection: _note(connection, entry, self._kept))

    async def history(
        self, node: str, function: str | None = None, *, limit: int = 100
    ) -> list[HistoryEntry]:
        """What happened to a node's capabilities, newest first.

        Args:
            node: the node.
            function: only this one of its functions.
            limit: at most so many entries.

        Raises:
            Unavailable: the file cannot be read now.
        """
        return await self._run(lambda connection: _history(connection, node, function, limit))

    async def _on_start(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, self._open)

    async def _on_stopped(self) -> None:
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._pool, self._close)
        self._pool.shutdown(wait=False)

    async def _run(self, act: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run one transaction on the store's thread."""
        if self._closed:
            raise Unavailable(f"the catalogue store {self._path} is closed", retryable=False)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._transact, act)

    def _transact(self, act: Callable[[sqlite3.Connection], _T]) -> _T:
        connection = self._connection
        if connection is None:
            raise Unavailable(f"the catalogue store {self._path} is closed", retryable=False)
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                return act(connection)
        except sqlite3.Error as exc:
            raise Unavailable(f"the catalogue store {self._path} failed: {exc}") from exc

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.touch(mode=0o600)
            self._path.chmod(0o600)
            connection = sqlite3.connect(
                self._path, timeout=self._busy_timeout_s, isolation_level=None
            )
        except (OSError, sqlite3.Error) as exc:
            raise ConfigurationError(
                f"the catalogue store {self._path} cannot be opened: {exc}"
            ) from exc
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if self._page_limit is not None:
                connection.execute(f"PRAGMA max_page_count = {self._page_limit:d}")
            self._migrate(connection)
        except sqlite3.Error as exc:
            connection.close()
            raise ConfigurationError(
                f"the catalogue store {self._path} cannot be used: {exc}"
            ) from exc
        except ConfigurationError:
            connection.close()
            raise
        self._connection = connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        found = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if found > len(_MIGRATIONS):
            raise ConfigurationError(
                f"the catalogue store {self._path} was written by a newer version (layout {found}, "
                f"known are {len(_MIGRATIONS)}): update this program or use another folder"
            )
        for number, script in enumerate(_MIGRATIONS[found:], start=found + 1):
            connection.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _load(connection: sqlite3.Connection) -> list[StoredCapability]:
    stored: list[StoredCapability] = []
    rows = connection.execute(
        "SELECT record, withdrawn, changed_at FROM capability ORDER BY node, function"
    )
    for record, withdrawn, changed_at in rows:
        try:
            known = CatalogRecord.model_validate_json(record)
        except ValidationError:
            continue
        stored.append(StoredCapability(known, bool(withdrawn), int(changed_at)))
    return stored


def _note(connection: sqlite3.Connection, entry: HistoryEntry, kept: int) -> None:
    connection.execute(
        "INSERT INTO history (node, function, change, epoch, revision, version, digest, reason, at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            entry.node,
            entry.function,
            entry.change.value,
            entry.epoch,
            entry.revision,
            entry.version,
            entry.digest,
            entry.reason,
            entry.at,
        ),
    )
    connection.execute(
        "DELETE FROM history WHERE node = ? AND function = ? AND id <= ("
        " SELECT id FROM history WHERE node = ? AND function = ?"
        " ORDER BY id DESC LIMIT 1 OFFSET ?)",
        (entry.node, entry.function, entry.node, entry.function, kept),
    )


def _history(
    connection: sqlite3.Connection, node: str, function: str | None, limit: int
) -> list[HistoryEntry]:
    rows: Sequence[tuple[str, str, str, int, str, int | None, int | None, str | None, str | None]]
    rows = connection.execute(
        "SELECT node, function, change, at, reason, epoch, revision, version, digest"
        " FROM history WHERE node = :node AND (:function IS NULL OR function = :function)"
        " ORDER BY id DESC LIMIT :limit",
        {"node": node, "function": function, "limit": limit},
    ).fetchall()
    return [
        HistoryEntry(row[0], row[1], Change(row[2]), row[3], row[4], row[5], row[6], row[7], row[8])
        for row in rows
    ]
