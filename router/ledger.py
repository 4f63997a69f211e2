"""The router's memory that survives it: accepted tasks and their outcomes, in SQLite.

One thread owns the connection. What is asked of it while it works is gathered into one
transaction, so that a burst of tasks costs a few commits. WAL with ``synchronous=NORMAL``: a
killed process loses nothing that was committed; a power cut may lose the last moments, after
which a client that repeats its task (same id) is served again.

The file is bounded: outcomes leave it by age and number, and it never grows past a size. A full or
locked disk becomes ``Overloaded``, which the client of the task is told. A damaged file is set
aside, aloud, and a new one begun: what stood in the old one is lost, the router is not.
"""

import asyncio
import contextlib
import json
import queue
import sqlite3
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import structlog

from capability_schemas.errors import ConfigurationError, Overloaded, Unavailable
from capability_schemas.ids import now_ms
from router.entry import Entry
from router.ledger_file import code_of, connect, is_damage, set_aside

_T = TypeVar("_T")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_BATCH: Final = 256
_PENDING_LIMIT: Final = 50_000
_RETRY_AFTER_MS: Final = 5_000
_EVICT: Final = 500
_REMEMBERED_MS: Final = 60_000
"""Outcomes younger than this are not given up for room: a client may be repeating the id. It is the
time of a task that names none."""

_CLOSE_S: Final = 5.0
_EVER: Final = 2**62
_EXPLANATION_CHARS: Final = 256 * 1024
"""Longest explanation kept in full; only names without end, in rules and gates, exceed it."""

# A request is up to a megabyte and lies apart, so that notes about its task do not rewrite it; it
# goes when the task has ended.
_COLUMNS: Final = (
    "client, id, ifnull(task, x''), reply, accepted_at, deadline, node, function, version,"
    " attempt, next_seq, ended_at, code, terminal, chunks, continues, model, given, claimed_by,"
    " claimed_from"
)

_Work = Callable[[sqlite3.Connection], Any]


@dataclass(slots=True)
class _Job:
    work: _Work
    future: asyncio.Future[Any]


class Ledger:
    """Journal of the router, an ``async with``.

    The connection belongs to the ledger's thread; everything else to the event loop.

    Args:
        path: The SQLite file; its folder exists.
        limit_bytes: Largest size of the file.
        retained_tasks: Most outcomes kept.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        path: Path,
        limit_bytes: int = 1024**3,
        retained_tasks: int = 100_000,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self._clock = clock
        self._path = path
        self._limit_bytes = limit_bytes
        self._retained_tasks = retained_tasks
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pending = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failing = False
        self._damage: sqlite3.Error | None = None
        self._aside: Path | None = None
        self._closed = asyncio.Event()

    @property
    def pending(self) -> int:
        """Writes and reads that wait for the thread."""
        return self._pending

    @property
    def failing(self) -> bool:
        """Whether the last transaction could not be written."""
        return self._failing

    def take_damage(self) -> Path | None:
        """Return where a damaged file was moved to since this was asked last; None: nowhere."""
        aside, self._aside = self._aside, None
        return aside

    async def __aenter__(self) -> Self:
        """Open the file, creating it if need be, and in place of one that is damaged.

        Raises:
            ConfigurationError: It cannot be opened, or is of a newer version.
            RuntimeError: It was entered before.
        """
        if self._thread is not None:
            raise RuntimeError("a ledger opens once")
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(opened,), name="foam-ledger", daemon=True
        )
        self._thread.start()
        try:
            await opened
        except (sqlite3.Error, OSError) as exc:
            raise ConfigurationError(f"ledger {self._path} cannot be opened: {exc}") from exc
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Write what waits and close the file, within five seconds."""
        self._jobs.put(None)
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._closed.wait()
        except TimeoutError:
            _log.error("ledger.stuck", path=str(self._path), limit_s=_CLOSE_S)

    # ---- tasks

    async def journal(self, entry: Entry) -> Entry | None:
        """Write a new task.

        Returns:
            None when it is new and now on disk; else what is known of the same client and id.

        Raises:
            Overloaded: The disk is full, the file locked, or too much waits.
        """

        def work(db: sqlite3.Connection) -> Entry | None:
            done = db.execute(
                "INSERT INTO tasks (client, id, reply, accepted_at, deadline, claimed_from)"
                " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    *entry.key,
                    entry.reply,
                    entry.accepted_at,
                    entry.deadline,
                    entry.claimed_from,
                ),
            )
            if not done.rowcount:
                return _find(db, *entry.key)
            db.execute("INSERT OR REPLACE INTO requests VALUES (?, ?, ?)", (*entry.key, entry.task))
            return None

        return await self._ask(work)

    async def find(self, client: str, task_id: str) -> Entry | None:
        """Return what is known of a task."""
        return await self._ask(lambda db: _find(db, client, task_id))

    async def unfinished(self) -> list[Entry]:
        """Return the tasks that have no outcome yet, oldest first, with what was shown of them.

        An entry without its task is the half of another router's outcome, of which a killed process
        did not write the rest: it is dropped.
        """

        def work(db: sqlite3.Connection) -> list[Entry]:
            db.execute(
                "DELETE FROM tasks WHERE ended_at IS NULL AND NOT EXISTS (SELECT 1 FROM requests r"
                " WHERE r.client = tasks.client AND r.id = tasks.id AND length(r.task) > 0)"
            )
            found = _entries(db, "ended_at IS NULL ORDER BY accepted_at")
            return [replace(entry, chunks=_shown(db, entry.key)) for entry in found]

        return await self._ask(work)

    async def untold(self) -> list[Entry]:
        """Return the outcomes that may never have reached the client."""
        return await self._ask(
            lambda db: _entries(db, "ended_at IS NOT NULL AND told = 0 ORDER BY ended_at")
        )

    def note_route(
        self,
        key: tuple[str, str],
        *,
        node: str,
        function: str,
        version: str,
        attempt: int,
        continues: str = "restart",
        model: str | None = None,
    ) -> None:
        """Write who holds a task; does not wait, keeps its order with all other writes."""
        self._tell(
            "UPDATE tasks SET node = ?, function = ?, version = ?, attempt = ?, continues = ?,"
            " model = ? WHERE client = ? AND id = ?",
            (node, function, version, attempt, continues, model, *key),
        )

    def note_attempt(self, key: tuple[str, str], attempt: int) -> None:
        """Write that there is an attempt beside the one that has the task; does not wait."""
        self._tell(
            "UPDATE tasks SET given = max(given, ?) WHERE client = ? AND id = ?", (attempt, *key)
        )

    def note_claim(self, key: tuple[str, str], router: str | None, attempt: int) -> None:
        """Write which router has a task, and who holds it there is not known; does not wait.

        Args:
            key: ``(client, task id)``.
            router: Which; None: this one.
            attempt: First attempt that it makes itself.
        """

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE tasks SET claimed_by = ?, claimed_from = ?, node = NULL, function = NULL,"
                " version = NULL WHERE client = ? AND id = ? AND ended_at IS NULL",
                (router, attempt, *key),
            )
            if router is None:  # what was shown meanwhile is noted anew, from the beginning
                db.execute("DELETE FROM shown WHERE client = ? AND id = ?", key)

        self._note(work)

    def forget(self, key: tuple[str, str]) -> None:
        """Drop a task that another router was left, unless its outcome is known; does not wait."""

        def work(db: sqlite3.Connection) -> None:
            done = db.execute(
                "DELETE FROM tasks WHERE client = ? AND id = ? AND ended_at IS NULL", key
            )
            if done.rowcount:
                db.execute("DELETE FROM requests WHERE client = ? AND id = ?", key)
                db.execute("DELETE FROM shown WHERE client = ? AND id = ?", key)

        self._note(work)

    def note_explanation(self, key: tuple[str, str], explanation: dict[str, Any]) -> None:
        """Write why it went where it went; does not wait."""

        def work(db: sqlite3.Connection) -> None:
            text = json.dumps(explanation, separators=(",", ":"))
            if len(text) > _EXPLANATION_CHARS:
                kept = {name: explanation.get(name) for name in ("by", "chosen", "problem")}
                text = json.dumps({**kept, "candidates": [], "cut_from_chars": len(text)})
            packed = zlib.compress(text.encode(), 1)  # a tenth: the same names again and again
            db.execute(
                "UPDATE tasks SET explanation = ? WHERE client = ? AND id = ?", (packed, *key)
            )

        self._note(work)

    def note_shown(
        self, key: tuple[str, str], next_seq: int, *, since: int = 0, chunks: bytes = b""
    ) -> None:
        """Write how much the client has been shown; does not wait.

        Args:
            key: ``(client, task id)``.
            next_seq: First number it may not have seen.
            since: What it had seen when this was written last.
            chunks: What was shown from there on, packed; empty where nobody could go on with it.
        """

        def work(db: sqlite3.Connection) -> None:
            done = db.execute(
                "UPDATE tasks SET next_seq = ? WHERE client = ? AND id = ? AND ended_at IS NULL",
                (next_seq, *key),
            )
            if chunks and done.rowcount:
                db.execute(
                    "INSERT OR REPLACE INTO shown VALUES (?, ?, ?, ?)", (*key, since, chunks)
                )

        self._note(work)

    def note_told(self, key: tuple[str, str]) -> None:
        """Write that the client's broker has the final event; does not wait."""
        self._tell("UPDATE tasks SET told = 1 WHERE client = ? AND id = ?", key)

    async def conclude(
        self,
        key: tuple[str, str],
        *,
        terminal: bytes,
        seq: int,
        chunks: bytes | None,
        code: str | None,
        ended_at: int,
        told: bool,
    ) -> None:
        """Write the outcome of a task.

        Args:
            key: ``(client, task id)``.
            terminal: The final event.
            seq: Its number.
            chunks: What was shown before it, packed; None when nothing or too much.
            code: Error code; None for a result.
            ended_at: UTC milliseconds.
            told: Whether the client has it already, from the node.

        Raises:
            Overloaded: As for ``journal``.
        """

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE tasks SET terminal = ?, next_seq = ?, chunks = ?, code = ?,"
                " ended_at = ?, told = ? WHERE client = ? AND id = ? AND ended_at IS NULL",
                (terminal, seq, chunks, code, ended_at, told, *key),
            )
            db.execute("DELETE FROM requests WHERE client = ? AND id = ?", key)
            db.execute("DELETE FROM shown WHERE client = ? AND id = ?", key)

        await self._ask(work)

    async def explanation(
        self, task_id: str, client: str | None = None
    ) -> tuple[Entry, dict[str, Any] | None] | None:
        """Return a task and the stored decision about it.

        Args:
            task_id: Its id.
            client: Whose; the newest of that id when None.
        """

        def work(db: sqlite3.Connection) -> tuple[Entry, dict[str, Any] | None] | None:
            rows = _entries(
                db,
                "id = ? AND (?2 IS NULL OR client = ?2) ORDER BY accepted_at DESC LIMIT 1",
                (task_id, client),
            )
            if not rows:
                return None
            (packed,) = db.execute(
                "SELECT explanation FROM tasks WHERE client = ? AND id = ?", rows[0].key
            ).fetchone()
            return rows[0], _unpacked(packed)

        return await self._ask(work)

    async def prune(self, before: int) -> int:
        """Forget outcomes older than a time, and the oldest beyond the number kept.

        Args:
            before: UTC milliseconds.

        Returns:
            How many were forgotten.
        """

        def work(db: sqlite3.Connection) -> int:
            old = db.execute("DELETE FROM tasks WHERE ended_at < ?", (before,)).rowcount
            (kept,) = db.execute("SELECT count(*) FROM tasks WHERE ended_at IS NOT NULL").fetchone()
            return int(old) + _evict(db, max(0, kept - self._retained_tasks))

        return await self._ask(work)

    # ---- cordons

    async def cordons(self) -> list[str]:
        """Return the nodes kept from new tasks."""
        return await self._ask(
            lambda db: [row[0] for row in db.execute("SELECT node FROM cordons ORDER BY node")]
        )

    async def set_cordon(self, node: str, *, closed: bool) -> None:
        """Keep a node from new tasks across restarts, or let it in again."""
        sql = (
            "INSERT INTO cordons VALUES (?) ON CONFLICT DO NOTHING"
            if closed
            else "DELETE FROM cordons WHERE node = ?"
        )
        await self._ask(lambda db: db.execute(sql, (node,)).rowcount)

    # ---- memos

    async def memo(self, name: str) -> Any:
        """Return what was noted under a name; None when nothing was."""

        def work(db: sqlite3.Connection) -> Any:
            row = db.execute("SELECT value FROM memos WHERE name = ?", (name,)).fetchone()
            return json.loads(row[0]) if row else None

        return await self._ask(work)

    async def set_memo(self, name: str, value: Any) -> None:
        """Note something across restarts.

        Args:
            name: What it is.
            value: Any JSON; None forgets it.
        """

        def work(db: sqlite3.Connection) -> None:
            if value is None:
                db.execute("DELETE FROM memos WHERE name = ?", (name,))
            else:
                # In pieces: json.dumps would keep the event loop waiting until all is written.
                text = "".join(json.JSONEncoder().iterencode(value))
                db.execute("INSERT OR REPLACE INTO memos VALUES (?, ?)", (name, text))

        await self._ask(work)

    # ---- the thread

    def _submit(self, work: _Work) -> asyncio.Future[Any]:
        if self._loop is None or self._closed.is_set():
            raise Unavailable("the ledger is not open", retryable=False)
        if self._pending >= _PENDING_LIMIT:
            raise Overloaded(
                f"the ledger has {self._pending} writes waiting", retry_after_ms=_RETRY_AFTER_MS
            )
        future: asyncio.Future[Any] = self._loop.create_future()
        self._pending += 1
        self._jobs.put(_Job(work, future))
        return future

    async def _ask(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        answer: _T = await self._submit(work)
        return answer

    def _tell(self, sql: str, values: tuple[Any, ...]) -> None:
        self._note(lambda db: db.execute(sql, values).rowcount)

    def _note(self, work: _Work) -> None:
        try:
            future = self._submit(work)
        except (Overloaded, Unavailable) as error:
            _log.warning("ledger.note_lost", error=error.message)
            return
        future.add_done_callback(_ignore)

    def _run(self, opened: asyncio.Future[None]) -> None:
        """Own the connection until told to close. Runs on the ledger's thread."""
        try:
            db = self._open()
        except (sqlite3.Error, OSError, ConfigurationError) as exc:
            self._answer(partial(_fail, opened, exc))
            self._answer(self._closed.set)
            return
        self._answer(partial(_succeed, opened, None))
        try:
            while (jobs := self._take()) is not None:
                if jobs:
                    self._transact(db, jobs)
                if self._damage is not None:
                    db = self._replace(db, self._damage)
        finally:
            with contextlib.suppress(sqlite3.Error):
                db.close()
            self._answer(self._closed.set)

    def _take(self) -> list[_Job] | None:
        """Wait for work and gather what else is there; None at the end."""
        first = self._jobs.get()
        if first is None:
            return None
        jobs = [first]
        while len(jobs) < _BATCH:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)  # after this batch
                break
            jobs.append(job)
        return jobs

    def _transact(self, db: sqlite3.Connection, jobs: list[_Job]) -> None:
        try:
            db.execute("BEGIN IMMEDIATE")
            results = [job.work(db) for job in jobs]
            db.execute("COMMIT")
        except Exception as exc:  # noqa: BLE001  # supervision boundary: the thread must go on
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            if isinstance(exc, sqlite3.Error):
                self._make_room(db, exc)
            elif len(jobs) > 1:  # the fault of one of them, which the others shall not bear
                for job in jobs:
                    self._transact(db, [job])
                return
            self._answer(partial(self._refuse, jobs, exc))
            return
        self._answer(partial(self._deliver, jobs, results))

    def _make_room(self, db: sqlite3.Connection, error: sqlite3.Error) -> None:
        """A full file gives up its oldest outcomes, so that later tasks find room."""
        if is_damage(error):
            self._damage = error
        if code_of(error) != sqlite3.SQLITE_FULL:
            return
        try:
            db.execute("BEGIN IMMEDIATE")
            _evict(db, _EVICT, before=self._clock() - _REMEMBERED_MS)
            db.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")

    def _deliver(self, jobs: list[_Job], results: list[Any]) -> None:
        self._pending -= len(jobs)
        if self._failing:
            self._failing = False
            _log.info("ledger.recovered", path=str(self._path))
        for job, result in zip(jobs, results, strict=True):
            _succeed(job.future, result)

    def _refuse(self, jobs: list[_Job], error: Exception) -> None:
        self._pending -= len(jobs)
        if not self._failing:
            self._failing = True
            _log.error("ledger.failing", path=str(self._path), error=str(error), lost=len(jobs))
        for job in jobs:
            refusal = Overloaded(
                f"the router's ledger cannot be written ({error}): free disk space or wait",
                retry_after_ms=_RETRY_AFTER_MS,
            )
            refusal.__cause__ = error
            _fail(job.future, refusal)

    def _answer(self, call: Callable[[], None]) -> None:
        """Run something on the event loop; nobody waits any more when that is closed."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(call)

    def _open(self) -> sqlite3.Connection:
        try:
            return connect(self._path, limit_bytes=self._limit_bytes)
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            self._set_aside(error)
            return connect(self._path, limit_bytes=self._limit_bytes)

    def _replace(self, db: sqlite3.Connection, damage: sqlite3.Error) -> sqlite3.Connection:
        """Go on with a new file; with the old one, until the next try, where that fails."""
        with contextlib.suppress(sqlite3.Error):
            db.close()
        try:
            self._set_aside(damage)
            fresh = connect(self._path, limit_bytes=self._limit_bytes)
        except (sqlite3.Error, OSError, ConfigurationError) as error:
            _log.error("ledger.not_replaced", path=str(self._path), error=str(error))
            return db
        self._damage = None
        return fresh

    def _set_aside(self, damage: sqlite3.Error) -> None:
        self._aside = set_aside(self._path, now_ms())
        _log.error(
            "ledger.damaged", path=str(self._path), error=str(damage), aside=str(self._aside)
        )


def _unpacked(stored: bytes | str | None) -> dict[str, Any] | None:
    """Read an explanation; files of version 1 hold it as plain text."""
    if not stored:
        return None
    found: dict[str, Any] = json.loads(
        stored if isinstance(stored, str) else zlib.decompress(stored)
    )
    return found


def _find(db: sqlite3.Connection, client: str, task_id: str) -> Entry | None:
    found = _entries(db, "client = ? AND id = ?", (client, task_id))
    return found[0] if found else None


def _entries(db: sqlite3.Connection, where: str, values: tuple[Any, ...] = ()) -> list[Entry]:
    # ``where`` is always a literal of this module; values are bound.
    source = "tasks LEFT JOIN requests USING (client, id)"
    rows = db.execute(f"SELECT {_COLUMNS} FROM {source} WHERE {where}", values)  # noqa: S608
    return [Entry(*row) for row in rows]


def _shown(db: sqlite3.Connection, key: tuple[str, str]) -> bytes | None:
    """Return what was shown of a running task, packed; None when nothing was noted."""
    rows = db.execute("SELECT chunks FROM shown WHERE client = ? AND id = ? ORDER BY since", key)
    return b"".join(row[0] for row in rows) or None


def _evict(db: sqlite3.Connection, count: int, *, before: int | None = None) -> int:
    """Forget the oldest outcomes, those the client may not have yet excepted.

    Args:
        db: The ledger.
        count: Most of them.
        before: Only those that ended before, UTC milliseconds.
    """
    if count < 1:
        return 0
    return db.execute(
        "DELETE FROM tasks WHERE rowid IN (SELECT rowid FROM tasks"
        " WHERE ended_at IS NOT NULL AND told = 1 AND ended_at < ? ORDER BY ended_at LIMIT ?)",
        (_EVER if before is None else before, count),
    ).rowcount


def _succeed(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _ignore(future: asyncio.Future[Any]) -> None:
    """Take note of a lost write: ``_refuse`` has said it aloud."""
    if not future.cancelled():
        future.exception()
