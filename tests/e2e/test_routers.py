"""Two routers as processes, one of them killed while tasks are under way."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from capability_schemas.reply import Chunk, Result
from foam.sdk import MeshClient
from support.foam_process import FoamUp, foam_up, run_foam

pytestmark = [pytest.mark.e2e, pytest.mark.broker, pytest.mark.encoder, pytest.mark.timeout(120)]

_TASKS = 6


def _routers(up: FoamUp) -> list[psutil.Process]:
    return [process for process in up.family() if "router" in process.cmdline()[3:4]]


async def _stream(mesh: MeshClient, task_id: str, started: asyncio.Event) -> list[int]:
    """Count to eight and return the numbers of the events."""
    numbers = []
    handle = await mesh.submit(
        function="count", input={"n": 8, "pause_s": 0.1}, task_id=task_id, timeout_s=60
    )
    async for event in handle:
        if isinstance(event, Chunk):
            started.set()
            numbers.append(event.seq)
        elif isinstance(event, Result):
            numbers.append(event.seq)
    assert isinstance(handle.outcome, Result), handle.outcome
    return numbers


async def _ask_and_kill(up: FoamUp) -> None:
    person = up.facts["device"]
    started = [asyncio.Event() for _ in range(_TASKS)]
    async with (
        MeshClient(
            up.facts["broker"], username=person["username"], password=person["password"]
        ) as mesh,
        asyncio.timeout(90),
        asyncio.TaskGroup() as group,
    ):
        streams = [
            group.create_task(_stream(mesh, f"job-{number}", started[number]))
            for number in range(_TASKS)
        ]
        await started[0].wait()
        os.kill(_routers(up)[0].pid, signal.SIGKILL)
    for stream in streams:
        numbers = stream.result()
        assert numbers == list(range(len(numbers)))


async def _echo(up: FoamUp, *ids: str) -> None:
    person = up.facts["device"]
    async with MeshClient(
        up.facts["broker"], username=person["username"], password=person["password"]
    ) as mesh:
        for task_id in ids:
            await mesh.ask("hello", function="echo", task_id=task_id)


def _foam(up: FoamUp, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run an administrator's command that answers with JSON."""
    done = run_foam(*arguments, "--data", str(up.data))
    return done.returncode, json.loads(done.stdout or b"{}"), done.stderr.decode()


def test_an_administrator_gets_answers_while_routers_hang(tmp_path: Path, trial_node: Path) -> None:
    options = ("--broker", "embedded", "--routers", "2", "--node", str(trial_node))
    with foam_up(tmp_path, *options) as up:
        routers = {
            "router-2" if "router-2" in process.cmdline() else "router-1": process
            for process in _routers(up)
        }
        asyncio.run(_echo(up, "t-0", "t-1", "t-2"))
        stats = _foam(up, "admin", "stats")[1]
        assert set(stats["routers"]) == {"router-1", "router-2"}
        assert stats["ended"]["result"] == 3
        for number in range(3):  # each is told by the router that had it
            told = _foam(up, "admin", "task", f"t-{number}")[1]
            assert (told["outcome"], told["function"]) == ("result", "echo")
            assert told["explanation"]

        routers["router-1"].suspend()
        code, answer, said = _foam(up, "functions", "--json")
        assert code == 0, said
        assert answer["functions"]
        code, answer, said = _foam(up, "waiting", "--json")
        assert code == 0, said
        assert answer["waiting"] == 0

        routers["router-2"].suspend()
        code, _, said = _foam(up, "nodes", "--json")
        assert code == 22, said
        code, answer, said = _foam(up, "routers", "--json")
        assert code == 0, said
        assert {row["router"] for row in answer["routers"]} == set(routers)
        for process in routers.values():
            process.resume()


def test_a_killed_router_costs_no_task(tmp_path: Path, trial_node: Path) -> None:
    options = ("--broker", "embedded", "--routers", "2", "--node", str(trial_node))
    with foam_up(tmp_path, *options) as up:
        assert up.facts["routers"] == ["router-1", "router-2"]
        assert len(_routers(up)) == 2
        asyncio.run(_ask_and_kill(up))
        listed = json.loads(run_foam("routers", "--json", "--data", str(up.data)).stdout)
        assert {row["router"] for row in listed["routers"]} == {"router-1", "router-2"}
