"""A node that was lost a moment ago is waited for: a real router, scripted nodes and a real one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from capability_schemas.node import NodeState
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from conftest import require_broker
from router.settings import BreakerSettings, RouterSettings
from support.broker_site import run_site
from support.scripted_mesh import QUICK, Mesh, ScriptedNode, admit, answer, say_nothing
from support.small_plant import Plant
from tcp_proxy import TcpProxy

PATIENT = QUICK.model_copy(update={"grace_ms": 60_000, "report_timeout_ms": 30_000})
WAIT_S = 40.0


@pytest.fixture
async def mesh(tmp_path: Path, topics: Topics) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack, tmp_path, topics)
        await mesh.start_client()
        yield mesh
        await mesh.stop_router()


async def start(mesh: Mesh, settings: RouterSettings = PATIENT) -> None:
    await mesh.start_router(settings)


def waiting(mesh: Mesh) -> int:
    return len(mesh.router.dispatcher.usher.room)


async def lose(mesh: Mesh, node: ScriptedNode) -> None:
    node.be("offline")
    await mesh.broker.settle()
    assert not mesh.router.fleet.node(node.node).live


def start_anew(node: ScriptedNode) -> None:
    node.forget()
    node.behaviour = answer
    node.be("birth", epoch=11)


async def test_a_task_that_comes_while_its_only_node_is_started_anew_is_done(
    mesh: Mesh, eventually: Any
) -> None:
    await start(mesh)
    node = await mesh.node("edge-1")
    await lose(mesh, node)
    mesh.submit(id="named", function="echo")
    mesh.submit(id="meant", text="say it again")
    await eventually(lambda: waiting(mesh) == 2)
    start_anew(node)
    for task in ("named", "meant"):
        await eventually(lambda task=task: mesh.final(task), timeout_s=WAIT_S)
        assert mesh.kinds(task)[-1] == "result"
    assert len(node.invocations) == 2


async def test_tasks_whose_only_node_is_killed_with_them_wait_for_it(
    mesh: Mesh, eventually: Any
) -> None:
    await start(mesh)
    node = await mesh.node("edge-1", admit)
    tasks = [f"t{number}" for number in range(5)]  # more than it takes to open a breaker
    for task in tasks:
        mesh.submit(id=task, function="echo")
    await eventually(lambda: len(node.invocations) + waiting(mesh) == len(tasks))
    assert len(node.invocations) > 1
    await lose(mesh, node)
    await eventually(lambda: waiting(mesh) == len(tasks))
    start_anew(node)
    await eventually(lambda: all(map(mesh.final, tasks)), timeout_s=WAIT_S)
    assert {mesh.kinds(task)[-1] for task in tasks} == {"result"}


async def test_a_node_that_answers_nothing_is_waited_for_before_its_loss_is_known(
    mesh: Mesh, eventually: Any
) -> None:
    quick = BreakerSettings(losses=1, pause_ms=200)
    await start(mesh, PATIENT.model_copy(update={"report_timeout_ms": 200, "breaker": quick}))
    node = await mesh.node("edge-1", say_nothing)  # its will is still to come
    tasks = [f"t{number}" for number in range(3)]
    for task in tasks:
        mesh.submit(id=task, function="echo")
    await eventually(lambda: waiting(mesh) > 0)
    node.behaviour = answer
    await eventually(lambda: all(map(mesh.final, tasks)), timeout_s=WAIT_S)
    assert {mesh.kinds(task)[-1] for task in tasks} == {"result"}


async def test_when_it_does_not_come_back_the_client_is_told(mesh: Mesh, eventually: Any) -> None:
    await start(mesh, PATIENT.model_copy(update={"grace_ms": 300}))
    node = await mesh.node("edge-1", admit)
    mesh.submit(id="had", function="echo")
    await eventually(lambda: node.invocations)
    await lose(mesh, node)
    mesh.submit(id="came", function="echo")
    ends: dict[str, dict[str, Any]] = {}
    for task in ("had", "came"):
        await eventually(lambda task=task: mesh.final(task), timeout_s=WAIT_S)
        ends[task] = mesh.final(task) or {}
    assert ends["had"]["code"] == "node_lost"
    assert (ends["came"]["code"], ends["came"]["retryable"]) == ("no_capable_node", True)
    assert waiting(mesh) == 0


async def test_nobody_waits_for_a_node_that_said_goodbye(mesh: Mesh, eventually: Any) -> None:
    await start(mesh)
    node = await mesh.node("edge-1")
    goodbye = NodeState(node="edge-1", state="offline", epoch=10, at=2, reason="stopped")
    topic = mesh.topics.build(TopicKind.NODE_STATE, node="edge-1")
    node.session.post(topic, encode(goodbye), retain=True)
    await mesh.broker.settle()
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.final("t"))
    assert mesh.final("t")["code"] == "no_capable_node"  # type: ignore[index]


async def test_while_it_waits_for_a_breaker_it_is_chosen_for_now_and_then_only(
    mesh: Mesh, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaker = BreakerSettings(losses=1, pause_ms=60_000)
    await start(mesh, PATIENT.model_copy(update={"breaker": breaker}))
    node = await mesh.node("edge-1", say_nothing)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: node.invocations)
    await lose(mesh, node)
    node.be("birth", epoch=11)
    await eventually(lambda: mesh.router.fleet.node("edge-1").live and waiting(mesh) == 1)
    looks: list[Any] = []
    select = mesh.router.routing.select

    def counting(*args: Any, **more: Any) -> Any:
        looks.append(args)
        return select(*args, **more)

    monkeypatch.setattr(mesh.router.routing, "select", counting)
    mesh.router.dispatcher.usher.tend()
    await eventually(lambda: looks)
    looks.clear()
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(looks) <= 2  # the sweep may come in between


@pytest.mark.broker
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "kind",
    [
        "embedded",
        *(pytest.param(k, marks=pytest.mark.external_broker) for k in ("mosquitto", "nats")),
    ],
)
async def test_a_task_waits_for_the_only_node_while_that_is_cut_from_its_broker(
    kind: str, tmp_path: Path, eventually: Any
) -> None:
    if kind != "embedded":
        require_broker(kind)
    async with AsyncExitStack() as stack:
        plant = Plant(await stack.enter_async_context(run_site(kind, tmp_path)), stack, tmp_path)
        link = TcpProxy(host="127.0.0.1", port=plant.site.port)
        await stack.enter_async_context(link)
        await plant.start_node(url=link.url)
        router, _ = await plant.start_router(stack, grace_ms=60_000)
        mesh = await plant.client()
        assert (await mesh.ask(function="add", input={"a": 1, "b": 1})).output == 2
        link.refuse()
        link.cut()
        await eventually(lambda: not router.fleet.node("edge-1").live, timeout_s=WAIT_S)
        handle = await mesh.submit(function="add", input={"a": 1, "b": 2}, timeout_s=90.0)
        await eventually(lambda: len(router.dispatcher.usher.room) == 1, timeout_s=WAIT_S)
        link.accept()
        assert (await handle.result()).output == 3
