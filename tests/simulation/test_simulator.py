"""Whole meshes under virtual time: they keep their word, and the simulator notices when not."""

import asyncio
import dataclasses
from contextlib import aclosing
from typing import Any

import pytest
import structlog

from capability_schemas.errors import ExecutionFailed
from foam.chaos.schedule import Fault
from foam.simulation import Scenario, run_seeds, simulate
from foam.simulation.network import Quality
from foam.simulation.shrink import shrink
from node_agent.executor import Executor
from router.entry import Entry
from router.ledger import Ledger

pytestmark = pytest.mark.timeout(120)

SMALL = Scenario(seed=1, nodes=3, devices=2, tasks=40, seconds=15, quality=Quality())
KILL = Fault(at_ms=4_000, kind="kill_router", target="router-1", lasts_ms=1_000)


@pytest.fixture(autouse=True)
def _silence() -> None:
    """A simulated mesh logs what a broken one would: thousands of lines."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))


def test_an_undisturbed_mesh_answers_everything() -> None:
    run = simulate(Scenario(seed=2, nodes=3, devices=2, tasks=60, seconds=20, fault_rate=0.0))
    assert not run.failed, run.summary()
    assert run.verdict.submitted == run.verdict.accepted == 60
    assert run.verdict.finished > 45
    assert run.verdict.moved == 0


@pytest.mark.parametrize("fault_rate", [0.0, 0.4])
def test_nodes_that_sleep_answer_when_they_wake(fault_rate: float) -> None:
    run = simulate(
        Scenario(
            seed=4, nodes=4, sleepers=4, devices=2, tasks=60, seconds=30, fault_rate=fault_rate
        )
    )
    assert not run.failed, run.summary()
    assert run.verdict.submitted == 60
    assert run.verdict.finished > 40


def test_the_same_seed_gives_the_same_run_to_the_last_message() -> None:
    first, second = simulate(SMALL), simulate(SMALL)
    other = simulate(dataclasses.replace(SMALL, seed=3))
    assert first.print_ == second.print_
    assert first.summary() == second.summary()
    assert first.print_ != other.print_


@pytest.mark.parametrize(
    "fault",
    [
        KILL,
        Fault(at_ms=4_000, kind="kill_node", target="node-1", lasts_ms=3_000),
        Fault(at_ms=4_000, kind="leave_node", target="node-1", lasts_ms=3_000),
        Fault(at_ms=4_000, kind="restart_broker", lasts_ms=2_000),
        Fault(at_ms=4_000, kind="fill_disk", target="router-1", lasts_ms=3_000),
        Fault(at_ms=4_000, kind="cut", target="router-1"),
        Fault(at_ms=4_000, kind="cut", target="device-1"),
        Fault(at_ms=4_000, kind="set_clock", target="router-1", lasts_ms=4_000, amount=3_600_000),
        Fault(at_ms=4_000, kind="set_clock", target="router-1", lasts_ms=4_000, amount=-3_600_000),
        Fault(at_ms=4_000, kind="set_clock", target="node-1", lasts_ms=4_000, amount=3_600_000),
        Fault(at_ms=4_000, kind="set_clock", target="node-1", lasts_ms=4_000, amount=-3_600_000),
    ],
    ids=str,
)
def test_one_fault_breaks_no_promise(fault: Fault) -> None:
    run = simulate(SMALL.with_faults([fault]))
    assert not run.failed, run.summary()
    assert run.verdict.submitted == 40


@pytest.mark.parametrize("seed", [1, 4, 5, 11, 18, 19, 26, 28, 31, 38, 41, 47, 58, 67, 143])
def test_seeds_that_once_failed(seed: int) -> None:
    run = simulate(Scenario(seed=seed))
    assert not run.failed, run.summary()
    assert run.verdict.accepted > 150


@pytest.mark.parametrize("seed", [1, 8, 11, 18, 27, 32, 41, 51, 71, 86, 103])
def test_seeds_with_two_routers_that_once_failed(seed: int) -> None:
    run = simulate(Scenario(seed=seed, routers=2))
    assert not run.failed, run.summary()
    assert run.verdict.accepted > 150


def test_without_an_account_of_the_nodes_a_task_has_two_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keep_silent(*_: object, **__: object) -> None:
        """Answer no router that asks."""

    monkeypatch.setattr(Executor, "account", keep_silent)
    run = simulate(Scenario(seed=28))
    assert run.verdict.broken["doubled"] > 0
    assert not run.excused  # no node was killed that knew it


@pytest.mark.slow
async def test_seeds_run_in_processes_of_their_own_and_keep_their_word() -> None:
    given = ("--nodes", "4", "--devices", "2", "--tasks", "60", "--seconds", "20")
    reports: dict[int, Any] = {}
    async with aclosing(run_seeds(range(11, 15), given, jobs=2)) as finished:
        async for report in finished:
            reports[report["seed"]] = report
    assert sorted(reports) == [11, 12, 13, 14]
    for report in reports.values():
        assert not report["failed"], {**report, "trace": None}
    again = [report async for report in run_seeds([12], given)]
    assert again == [reports[12]]


async def test_a_simulation_that_cannot_run_says_why() -> None:
    with pytest.raises(ExecutionFailed, match="invalid int value"):
        await anext(run_seeds([1], ["--nodes", "many"]))


def test_a_router_that_forgets_what_it_accepted_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def journal(self: Ledger, entry: Entry) -> Entry | None:
        await asyncio.sleep(0)
        return None

    monkeypatch.setattr(Ledger, "journal", journal)
    harmless = [
        Fault(at_ms=at_ms, kind="slow", target="device-1", lasts_ms=500, amount=2.0)
        for at_ms in (1_000, 2_000, 9_000)
    ]
    kills = [
        Fault(at_ms=4_000, kind="kill_node", target=name, lasts_ms=1_000)
        for name in SMALL.node_names
    ]
    kept = dataclasses.replace(SMALL, trace=10_000)
    run = simulate(kept.with_faults([*harmless[:2], KILL, *kills, harmless[2]]))
    assert run.verdict.broken["lost"] > 0
    assert any("FAULT 4000 ms: kill_router" in line for line in run.trace)
    smallest = shrink(run)
    left = smallest.run.scenario.faults or ()
    assert smallest.run.verdict.broken["lost"] > 0
    assert KILL in left
    assert not set(left) & set(harmless)
