"""The report of a chaos run says what was promised, what was kept, and how long things took."""

import json
from pathlib import Path

import pytest
import typer

from foam.chaos.hand import kinds_of
from foam.chaos.judge import Ask, Judge
from foam.chaos.mesh import MeshPlan
from foam.chaos.report import ChaosPlan, ChaosReport, describe
from foam.chaos.schedule import Fault, draw_faults
from foam.cli.chaos import _known

MESH = MeshPlan(
    data=Path("unused"), engine="nats", nodes=2, devices=1, routers=2, registries=2, brokers=3
)
PLAN = ChaosPlan(mesh=MESH, seed=7, seconds=60.0, tasks=2)


def report(*, lost: bool) -> ChaosReport:
    judge = Judge(grace_ms=10)
    for number, task in enumerate(("kept", "lost") if lost else ("kept",)):
        judge.submitted(Ask(client="c", task=task, function="f", timeout_ms=10), at=0)
        told = {"v": 1, "task": task, "at": 0}
        accepted = {**told, "event": "accepted", "router": "r", "deadline": 10}
        judge.heard("c", "r", json.dumps(accepted).encode(), at=7 + number)
    end = {"v": 1, "task": "kept", "at": 0, "event": "result", "seq": 0, "output": 1}
    judge.heard("c", "node", json.dumps(end).encode(), at=9)
    return ChaosReport(
        plan=PLAN,
        faults=(Fault(at_ms=1, kind="cut", target="chaos-1"),) * 2,
        verdict=judge.verdict(at=1_000),
        recovered_ms={"broker": [100, 300]},
    )


def test_a_run_that_kept_its_promises_says_so() -> None:
    said = describe(report(lost=False).summary())
    assert "seed 7 on nats: brokers 3, registries 2, routers 2, nodes 2, devices 1, 60 s" in said
    assert said.endswith("every promise kept\n")
    rows = {line[:14].strip(): line[14:].split() for line in said.splitlines()}
    assert rows["faults"] == ["cut", "2"]
    assert rows["accepted"] == ["1", "7", "7", "7"]
    assert rows["broker back"] == ["2", "100", "300", "300"]
    assert rows["fail-over"] == ["0", "-", "-", "-"]


def test_a_broken_promise_is_named_and_counted() -> None:
    found = report(lost=True)
    assert found.failed
    assert found.summary()["lost"] == 1
    said = describe(found.summary())
    assert "BROKEN: lost: c/lost: no end after 1000 ms" in said
    assert said.endswith("promises were broken\n")
    assert json.loads(json.dumps(found.summary())) == found.summary()


def test_everything_there_is_may_be_hurt() -> None:
    kinds = kinds_of(MESH)
    faults = draw_faults(kinds, seed="1", span_ms=1_000, count=2_000)
    assert {fault.kind for fault in faults} == set(kinds)
    hurt = {fault.target for fault in faults}
    assert {"broker", "broker-3", "registry-2", "router-2", "chaos-2", "device-1"} <= hurt


def test_only_what_is_named_happens() -> None:
    kinds = kinds_of(MESH)
    assert _known("kill_node, cut", kinds) == ("kill_node", "cut")
    assert _known("", kinds) == ()
    with pytest.raises(typer.BadParameter, match="no fault is called melt: there are kill_node"):
        _known("melt", kinds)
