"""Journals that earlier releases wrote: taken up with all that stands in them.

``tests/data/ledgers/version-N.sql`` is what the release of that version left behind: a result, an
error, a task that nobody had yet, and one of which ``hel`` had been shown by a node that is gone.
"""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import ConfigurationError
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Invocation
from capability_schemas.topics import Topics
from router.ledger import Ledger
from support.capabilities import make_record
from support.scripted_mesh import Mesh, ScriptedNode, answer

LEDGERS = Path(__file__).parents[1] / "data" / "ledgers"
VERSIONS = sorted(int(path.stem.removeprefix("version-")) for path in LEDGERS.glob("*.sql"))
WITH_WHAT_WAS_SHOWN = 3
"""The first version that keeps what was shown of a task that runs."""


def restore(version: int, path: Path) -> None:
    """Make the file again; its outcomes are of this minute, or they would be too old to keep."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript((LEDGERS / f"version-{version}.sql").read_text())
        db.execute("UPDATE tasks SET ended_at = ? WHERE ended_at IS NOT NULL", (now_ms(),))
        db.commit()


def behave(node: ScriptedNode, invocation: Invocation) -> None:
    if invocation.continuation is None:
        answer(node, invocation)
        return
    assert invocation.continuation.shown == ("hel",)
    node.report(invocation, "admitted")
    node.reply(invocation, event="result", seq=invocation.seq, output="hello", node=node.node)
    node.report(invocation, "finished", seq=invocation.seq + 1)


@pytest.fixture(params=VERSIONS, ids=str)
async def version(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture
async def mesh(version: int, tmp_path: Path, topics: Topics) -> AsyncIterator[Mesh]:
    restore(version, tmp_path / "router-1.sqlite")
    async with AsyncExitStack() as stack:
        made = Mesh(stack, tmp_path, topics)
        await made.start_client()
        model = ModelInfo(name="m", digest="sha256:1")
        record = make_record(made.words, "edge-2", continues="prefix", model=model)
        await made.node("edge-2", behave, record)
        await made.start_router()
        yield made
        await made.stop_router()


async def test_every_version_before_this_one_has_left_a_file(tmp_path: Path) -> None:
    async with Ledger(path=tmp_path / "new.sqlite"):
        pass
    with closing(sqlite3.connect(tmp_path / "new.sqlite")) as db:
        (present,) = db.execute("PRAGMA user_version").fetchone()
    assert list(range(1, present)) == VERSIONS


async def test_outcomes_are_told_again_and_nothing_runs_twice(mesh: Mesh, eventually: Any) -> None:
    for task in ("ended", "failed"):
        mesh.submit(id=task, function="echo")
        await eventually(lambda task=task: mesh.final(task), timeout_s=60)
    ended, failed = mesh.final("ended"), mesh.final("failed")
    assert ended is not None
    assert failed is not None
    assert (ended["output"], ended["attempt"]) == ("hello", 1)
    assert failed["code"] == "execution_failed"


async def test_what_was_open_is_answered(mesh: Mesh, version: int, eventually: Any) -> None:
    for task in ("open", "begun"):
        await eventually(lambda task=task: mesh.final(task), timeout_s=60)
    opened, begun = mesh.final("open"), mesh.final("begun")
    assert opened is not None
    assert begun is not None
    assert opened["output"] == "hello world"
    if version >= WITH_WHAT_WAS_SHOWN:
        assert (begun["event"], begun["output"], begun["seq"]) == ("result", "hello", 1)
    else:
        assert (begun["event"], begun["code"], begun["seq"]) == ("error", "node_lost", 1)
    await eventually(lambda: len(mesh.router.dispatcher) == 0, timeout_s=60)


async def test_what_administrators_had_ordered_holds(version: int, tmp_path: Path) -> None:
    restore(version, tmp_path / "old.sqlite")
    async with Ledger(path=tmp_path / "old.sqlite") as ledger:
        assert await ledger.cordons() == ["edge-9"]
        assert await ledger.memo("weights") == ({"cost": 0.5} if version > 1 else None)
        found = await ledger.explanation("ended")
        assert found is not None
        assert found[1] == {"chosen": ["edge-1", "echo"]}
    async with Ledger(path=tmp_path / "old.sqlite") as again:  # it is of the present version now
        assert await again.cordons() == ["edge-9"]


async def test_a_half_made_step_to_the_next_version_is_not_taken_for_made(tmp_path: Path) -> None:
    """A release that died while it brought the file forward left it as it was."""
    path = tmp_path / "old.sqlite"
    restore(1, path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("BEGIN")
        db.execute("CREATE TABLE memos (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
    async with Ledger(path=path) as ledger:
        await ledger.set_memo("weights", {})
        assert await ledger.memo("weights") == {}


async def test_a_version_of_nobody_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    restore(1, path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigurationError, match=r"old\.sqlite is of version 99.*update it"):
        async with Ledger(path=path):
            pass
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM tasks").fetchone() == (4,)
