"""The process of an instance leaves nothing behind, however its life ends."""

import asyncio
import errno
import gc
import os
import tempfile
from pathlib import Path

import pytest

from node_agent.isolation import strays
from node_agent.runtimes import process
from node_agent.runtimes.base import InstanceDied, InstanceFailed, Request
from node_agent.runtimes.child import ChildInstance

WORKSHOP = Path(__file__).parents[3] / "data" / "functions" / "workshop.py"
SLOW = "import time\ntime.sleep(60)\ndef slow():\n    pass\n"
DEAF = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def deaf(marker):
    pathlib.Path(marker).touch()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


def make(entry=f"{WORKSHOP}:add", *, start_timeout_s=20.0, deaths=None):
    return ChildInstance(
        name="one",
        load={"runtime": "python", "entry": entry, "limits": {}},
        start_timeout_s=start_timeout_s,
        cancel_grace_s=1.0,
        died=(deaths if deaths is not None else []).append,
    )


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path, monkeypatch):
    marks = []

    def new_mark():
        marks.append(strays.new_mark())
        return marks[-1]

    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(process, "new_mark", new_mark)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    gc.collect()
    assert [pid for mark in marks for pid in strays._marked(mark)] == []
    assert list(folder.iterdir()) == []


@pytest.fixture
async def _no_descriptor_is_left():
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    yield
    await asyncio.sleep(0)  # transports close their sockets in the next round of the loop
    assert {path.name for path in Path("/proc/self/fd").iterdir()} == before


pytestmark = pytest.mark.usefixtures("_no_descriptor_is_left")


async def test_a_closed_instance():
    deaths: list[ChildInstance] = []
    instance = make(deaths=deaths)
    await instance.start()
    await instance.close(1.0)
    assert deaths == [instance]


async def test_an_instance_that_dies_and_is_never_closed(eventually):
    deaths: list[ChildInstance] = []
    instance = make(deaths=deaths)
    await instance.start()
    os.kill(instance.pid, 9)
    await eventually(lambda: deaths == [instance])
    await asyncio.wait({instance._following})


async def test_a_spawn_that_fails(monkeypatch):
    async def fails(*_, **__):
        raise OSError(errno.EAGAIN, "no process to be had")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fails)
    with pytest.raises(InstanceFailed, match="no process to be had"):
        await make().start()


async def test_no_descriptors_left_for_a_pipe(monkeypatch):
    def fails():
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(os, "pipe", fails)
    with pytest.raises(InstanceFailed, match="too many"):
        await make().start()


async def test_a_start_that_takes_too_long(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    instance = make(f"{tmp_path}/slow.py:slow", start_timeout_s=0.3)
    with pytest.raises(InstanceFailed, match=r"not ready within 0\.3 s"):
        await instance.start()


async def test_code_that_does_not_import(tmp_path):
    (tmp_path / "broken.py").write_text("raise ValueError('no')")
    with pytest.raises(InstanceFailed, match="ValueError: no"):
        await make(f"{tmp_path}/broken.py:f").start()


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 6, 8, 12])
async def test_a_start_cancelled_at_any_moment(tmp_path, rounds):
    (tmp_path / "slow.py").write_text(SLOW)
    instance = make(f"{tmp_path}/slow.py:slow")
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        starting = group.create_task(instance.start())
        for _ in range(rounds):
            await asyncio.sleep(0)
        starting.cancel()
    assert not instance.alive


async def test_a_stop_while_it_starts(tmp_path, eventually):
    (tmp_path / "slow.py").write_text(SLOW)
    instance = make(f"{tmp_path}/slow.py:slow")

    async def start():
        with pytest.raises(InstanceFailed, match="before it was ready"):
            await instance.start()

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(start())
        await eventually(lambda: instance.pid)
        await instance.close(0)


async def test_a_close_that_is_cut_short_kills(tmp_path, eventually):
    (tmp_path / "deaf.py").write_text(DEAF)
    instance = make(f"{tmp_path}/deaf.py:deaf")
    await instance.start()
    request = Request(id="1", input={"marker": str(tmp_path / "runs")}, text=None)

    async def call():
        with pytest.raises(InstanceDied):
            await anext(instance.invoke(request))

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(call())
        await eventually((tmp_path / "runs").exists)
        closing = group.create_task(instance.close(3600.0))
        await asyncio.sleep(0)
        closing.cancel()
    await instance.close(0)  # returns when it is gone


@pytest.mark.parametrize("live", [True, False])
async def test_a_loop_that_ends_with_the_instance(live):
    async def main():
        died = asyncio.Event()
        instance = ChildInstance(
            name="one",
            load={"runtime": "python", "entry": f"{WORKSHOP}:add", "limits": {}},
            start_timeout_s=20,
            cancel_grace_s=1,
            died=lambda _: died.set(),
        )
        await instance.start()
        if not live:
            os.kill(instance.pid, 9)
            await died.wait()  # and the loop ends before anything else is done

    for _ in range(3):
        await asyncio.to_thread(asyncio.run, main())
