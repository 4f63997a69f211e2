"""A node follows the files of its declaration."""

import itertools
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from capability_schemas.errors import ConfigurationError
from capability_schemas.problem import Problem
from node_agent.declaration import watch as watch_module
from node_agent.declaration.reader import Declaration
from node_agent.declaration.sources import stamp_of
from node_agent.declaration.watch import SourceWatch

WRONG = Problem(file="node.toml", message="is not right")


class Source:
    """Reads whatever the test says, and remembers what was applied."""

    def __init__(self, path):
        self.path = path
        self.reads = 0
        self.applied = []
        self.told = []
        self.problems = ()
        self.refuses = False

    def read(self, introspector):
        self.reads += 1
        return Declaration(
            files={self.path: stamp_of(self.path)},
            problems=self.problems,
            node=f"v{self.reads}",
        )

    async def apply(self, declaration):
        if self.refuses:
            raise ConfigurationError("does not run here")
        self.applied.append(declaration.node)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "node.toml"
    path.write_text("")
    return Source(path)


@pytest.fixture
def make_watch(source):
    def make(**options):
        return SourceWatch(
            node="edge-1",
            files={source.path: stamp_of(source.path)},
            read=source.read,
            apply=source.apply,
            told=source.told.append,
            **({"poll_s": 0.01} | options),
        )

    return make


async def test_an_edit_is_taken_up_once(source, make_watch, eventually):
    async with make_watch():
        source.path.write_text("one")
        await eventually(lambda: source.applied == ["v1"])
        source.path.write_text("one and two")
        await eventually(lambda: source.applied == ["v1", "v2"])
    assert source.reads == 2


async def test_what_was_edited_before_the_watch_began_is_taken_up(source, make_watch, eventually):
    watch = make_watch()
    source.path.write_text("one")
    async with watch:
        await eventually(lambda: source.applied == ["v1"])


async def test_a_file_is_read_when_it_has_come_to_rest(source, make_watch, eventually, monkeypatch):
    stamps = itertools.chain([(1, 1), (1, 2), None, (1, 3), (1, 3)], itertools.repeat((1, 3)))
    looks = []

    def look(path: Path):
        looks.append(next(stamps))
        return looks[-1]

    monkeypatch.setattr(watch_module, "stamp_of", look)
    at_read = []
    read = source.read

    def counted(introspector):
        at_read.append(len(looks))
        declaration = read(introspector)
        return Declaration(files={source.path: (1, 3)}, node=declaration.node)

    source.read = counted
    async with make_watch():
        await eventually(lambda: len(looks) >= 8)
    assert at_read == [5]


async def test_a_mistake_is_logged_once_and_mended_by_the_next_edit(source, make_watch, eventually):
    with capture_logs() as logs:
        async with make_watch():
            source.problems = (WRONG,)
            source.path.write_text("wrong")
            await eventually(lambda: [line["event"] for line in logs] == ["node.edit_refused"])
            source.problems = ()
            source.path.write_text("right again")
            await eventually(lambda: source.applied == ["v2"])
    (line,) = [line for line in logs if line["event"] == "node.edit_refused"]
    assert (line["node"], line["error"]) == ("edge-1", "node.toml: is not right")
    assert source.told == ["edit refused: node.toml: is not right", ""]


async def test_what_cannot_be_put_into_force_is_logged_too(source, make_watch, eventually):
    source.refuses = True
    with capture_logs() as logs:
        async with make_watch():
            source.path.write_text("wrong")
            await eventually(lambda: logs)
            source.refuses = False
            source.path.unlink()
            await eventually(lambda: source.applied == ["v2"])
    assert logs[0]["error"] == "does not run here"


async def test_without_looking_only_the_order_counts(source, make_watch, eventually):
    async with make_watch(poll_s=None) as watch:
        watch.reload()
        await eventually(lambda: source.applied == ["v1"])
        source.path.write_text("edited")
        watch.reload()
        await eventually(lambda: source.applied == ["v1", "v2"])
