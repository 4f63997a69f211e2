"""A mesh with more to do than it can at a time, as its users and its operator see it."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from foam.sdk.client import MeshClient, TaskHandle
from support.foam_process import FoamUp, foam_up, run_foam

pytestmark = [pytest.mark.e2e, pytest.mark.broker, pytest.mark.timeout(240)]

SOURCE = """
import pathlib, time

from node_agent.functions import function

@function(examples=["hold until the gate is open"])
def hold(path: str) -> str:
    "Wait for a gate."
    while not pathlib.Path(path).exists():
        time.sleep(0.05)
    return path
"""
TASKS = 6


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FoamUp]:
    """Run a mesh with one node that does one thing at a time."""
    folder: Path = tmp_path_factory.mktemp("busy")
    (folder / "hold.py").write_text(SOURCE)
    (folder / "node.toml").write_text('[node]\nid = "one"\n\n[[function]]\nsource = "hold.py"\n')
    with foam_up(
        folder / "data", "--broker", "embedded", "--node", str(folder / "node.toml")
    ) as up:
        yield up


async def test_what_finds_no_room_waits_is_shown_and_is_done_in_the_end(
    busy: FoamUp, tmp_path: Path
) -> None:
    gate, device = tmp_path / "gate", busy.facts["device"]
    async with MeshClient(
        busy.facts["broker"],
        client=device["id"],
        username=device["username"],
        password=device["password"],
        site=busy.facts["site"],
    ) as mesh:
        handles: list[TaskHandle] = [
            await mesh.submit(function="hold", input={"path": str(gate)}, timeout_s=200.0)
            for _ in range(TASKS)
        ]
        said = set()
        async with asyncio.timeout(60):
            async for event in handles[-1]:
                said.add(event.event)
                if event.event == "working":
                    break
        assert "accepted" in said
        assert not said & {"routed", "error"}
        shown = await asyncio.to_thread(run_foam, "waiting", "--json", "--data", str(busy.data))
        told = json.loads(shown.stdout)
        (row,) = told["functions"]
        assert (row["function"], row["waiting"]) == ("hold", told["waiting"])
        assert TASKS - 2 <= told["waiting"] < TASKS, "one runs, one may be next in line there"
        assert row["clients"] == {device["id"]: told["waiting"]}
        table = await asyncio.to_thread(run_foam, "waiting", "--data", str(busy.data))
        assert b"hold" in table.stdout
        gate.touch()
        results = [await handle.result() for handle in handles]
        assert [result.output for result in results] == [str(gate)] * TASKS
