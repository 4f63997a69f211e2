"""Tasks wait in the router while nodes are full: a real router, scripted nodes and real ones."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from broker.session.memory import MemorySession
from capability_schemas.capability import Resources
from capability_schemas.functions import FunctionSpec
from capability_schemas.invocation import Invocation
from capability_schemas.node import FunctionLoad, NodeLoad, NodeState
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings
from router import usher
from router import waiting as room_module
from router.choosing import Chooser
from router.events import Chosen
from support.capabilities import make_record
from support.scripted_mesh import QUICK, Mesh, ScriptedNode, admit

ROOMY = QUICK.model_copy(update={"report_timeout_ms": 5_000})
ONE_PLACE = {"echo": {"concurrency": 1, "total_ms": 1_000}}

SOURCE = """
import asyncio, os

async def echo(path: str) -> str:
    while not os.path.exists(path):
        await asyncio.sleep(0.01)
    return path
"""


@pytest.fixture
async def mesh(tmp_path: Path, topics: Topics) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack, tmp_path, topics)
        await mesh.start_client()
        await mesh.start_router(ROOMY)
        yield mesh
        await mesh.stop_router()


async def full_node(mesh: Mesh, name: str = "edge-1") -> ScriptedNode:
    """Return a node that runs one echo at a time, for a second each."""
    node = await mesh.node(name, admit)
    node.load(capacity=1, functions=ONE_PLACE)
    await mesh.broker.settle()
    return node


def finish(node: ScriptedNode, invocation: Invocation) -> None:
    node.reply(invocation, event="result", seq=0, output="done", node=node.node)
    node.report(invocation, "finished", seq=1)


def admit_and_finish(node: ScriptedNode, invocation: Invocation) -> None:
    admit(node, invocation)
    finish(node, invocation)


def submit_as(mesh: Mesh, session: MemorySession, **fields: Any) -> None:
    topic = mesh.topics.build(TopicKind.TASK, client=session.client_id)
    session.post(topic, json.dumps({"function": "echo", **fields}).encode())


def waiting(mesh: Mesh) -> int:
    return len(mesh.router.dispatcher.usher.room)


def ends(mesh: Mesh, task: str) -> list[str]:
    """Return the kinds of the ends of a task; one that is told again is one end."""
    told = {json.dumps(event, sort_keys=True): event["event"] for event in mesh.of(task)}
    return [kind for kind in told.values() if kind in {"result", "error"}]


async def test_the_long_queue_stands_in_the_router_and_all_are_done(
    mesh: Mesh, eventually: Any
) -> None:
    node = await full_node(mesh)
    for number in range(12):
        mesh.submit(id=f"t{number}", function="echo")
    await eventually(lambda: waiting(mesh) == 11 and node.invocations)
    assert len(node.invocations) == 1, "late binding"
    for number in range(12):
        await eventually(lambda number=number: len(node.invocations) == number + 1)
        finish(node, node.invocations[number])
    await eventually(lambda: all(ends(mesh, f"t{number}") for number in range(12)))
    assert all(ends(mesh, f"t{number}") == ["result"] for number in range(12))
    assert waiting(mesh) == 0
    assert mesh.router.stats.waited == 11
    assert mesh.router.fleet.node("edge-1").given == {}


async def test_a_noisy_client_does_not_hold_up_a_quiet_one(mesh: Mesh, eventually: Any) -> None:
    node = await full_node(mesh)
    for number in range(200):
        mesh.submit(id=f"n{number}", function="echo")
    await eventually(lambda: waiting(mesh) == 199 and node.invocations)
    quiet = await mesh.session("quiet")
    submit_as(mesh, quiet, id="q")
    await eventually(lambda: waiting(mesh) == 200)
    for number in range(2):
        finish(node, node.invocations[number])
        await eventually(lambda number=number: len(node.invocations) == number + 2)
    assert "quiet" in {invocation.client for invocation in node.invocations}


async def test_the_client_hears_that_its_task_waits(mesh: Mesh, eventually: Any) -> None:
    await full_node(mesh)
    mesh.submit(id="runs", function="echo")
    mesh.submit(id="waits", function="echo")
    await eventually(lambda: "working" in mesh.kinds("waits"))
    said = next(event for event in mesh.of("waits") if event["event"] == "working")
    assert "echo" in said["reason"]
    topic = next(topic for topic, event in mesh.events if event == said)
    assert topic.endswith("/router-1")


def reasons(mesh: Mesh, task: str) -> list[str]:
    return [event["reason"] for event in mesh.of(task) if event["event"] == "working"]


async def test_the_client_hears_until_when_the_node_sleeps(mesh: Mesh, eventually: Any) -> None:
    node = await full_node(mesh)
    asleep = NodeState(node="edge-1", state="sleeping", epoch=10, at=1, wake_at=60_001)
    topic = mesh.topics.build(TopicKind.NODE_STATE, node="edge-1")
    node.session.post(topic, encode(asleep), retain=True)
    await mesh.broker.settle()
    mesh.submit(id="waits", function="echo", timeout_ms=120_000)
    await eventually(lambda: reasons(mesh, "waits"))
    assert reasons(mesh, "waits")[0].startswith("waits for edge-1, asleep until ")


@pytest.mark.parametrize("seems_free", [False, True])
async def test_a_task_that_waits_for_memory_is_not_chosen_for_again_and_again(
    mesh: Mesh, eventually: Any, monkeypatch: pytest.MonkeyPatch, *, seems_free: bool
) -> None:
    chosen = 0
    choose = Chooser.choose

    def count(*args: Any, **options: Any) -> Chosen:
        nonlocal chosen
        chosen += 1
        return choose(*args, **options)

    monkeypatch.setattr(Chooser, "choose", count)
    if seems_free:  # whatever the reason: a place that nobody can use is left alone
        monkeypatch.setattr(usher, "memory_lacking", lambda _record, _node: None)
    record = make_record(mesh.words, "edge-1", resources=Resources(memory_bytes=10**9))
    node = await mesh.node("edge-1", admit, record)
    node.load(capacity=4, memory_free_bytes=1_000, functions=ONE_PLACE)
    await mesh.broker.settle()
    mesh.submit(id="waits", function="echo", timeout_ms=120_000)
    await eventually(lambda: len(reasons(mesh, "waits")) == 2)  # two seconds
    assert chosen <= (8 if seems_free else 1)
    if not seems_free:
        assert "too little memory" in reasons(mesh, "waits")[0]
    node.load(capacity=4, memory_free_bytes=10**10, functions=ONE_PLACE)
    await eventually(lambda: node.invocations)


async def test_nobody_else_can_have_a_place_left_alone(mesh: Mesh, eventually: Any) -> None:
    node = await full_node(mesh)
    other = await mesh.node("edge-2", admit, make_record(mesh.words, "edge-2", "other"))
    mesh.submit(id="runs", function="echo")
    mesh.submit(id="waits", function="echo")
    await eventually(lambda: node.invocations and waiting(mesh) == 1)
    refusal = {"code": "overloaded", "retry_after_ms": 10**6}
    other.report(node.invocations[0], "refused", **refusal)
    late = node.invocations[0].model_copy(update={"attempt": 9})
    node.report(late, "refused", **refusal)
    await mesh.broker.settle()
    finish(node, node.invocations[0])
    await eventually(lambda: mesh.final("runs"))
    assert mesh.router.dispatcher.usher.is_free(("edge-1", "echo")) or len(node.invocations) == 2
    await eventually(lambda: len(node.invocations) == 2)


async def test_on_a_large_site_a_task_waits_for_all_nodes_of_its_function(
    mesh: Mesh, eventually: Any
) -> None:
    crowd, nodes = await mesh.session("crowd"), [f"n{number:03}" for number in range(700)]

    def load(node: str, running: int) -> None:
        message = NodeLoad(
            node=node,
            epoch=10,
            at=1,
            capacity=1,
            queue_limit=1,
            queued=running,
            running=running,
            functions={"echo": FunctionLoad(concurrency=1, total_ms=1_000)},
        )
        crowd.post(mesh.topics.build(TopicKind.NODE_LOAD, node=node), encode(message))

    for number, node in enumerate(nodes):
        topic = mesh.topics.build(TopicKind.CATALOG, node=node, function="echo")
        mesh.client.post(topic, encode(make_record(mesh.words, node)), retain=True)
        state = NodeState(node=node, state="birth", epoch=10, at=1, load_interval_s=600)
        crowd.post(mesh.topics.build(TopicKind.NODE_STATE, node=node), encode(state), retain=True)
        load(node, 1)
        if number % 50 == 49:
            await mesh.broker.settle()
    await mesh.broker.settle()
    mesh.submit(id="waits", function="echo", timeout_ms=120_000)
    await eventually(lambda: waiting(mesh) == 1, timeout_s=60)
    assert len(mesh.router.dispatcher.usher.room.places) == len(nodes)
    (accepted,) = [event for event in mesh.of("waits") if event["event"] == "accepted"]
    load(nodes[accepted["deadline"] % len(nodes) - 1], 0)  # which is looked at last
    await eventually(lambda: waiting(mesh) == 0, timeout_s=60)


async def test_a_task_that_waits_keeps_no_candidates(mesh: Mesh, eventually: Any) -> None:
    await full_node(mesh)
    mesh.submit(id="runs", function="echo")
    mesh.submit(id="waits", function="echo")
    await eventually(lambda: waiting(mesh) == 1)
    live = mesh.router.dispatcher.live((mesh.client.client_id, "waits"))
    assert live is not None
    assert live.explanation is not None
    told = live.explanation()
    assert (told["by"], told["problem"]["code"], told["candidates"]) == ("name", "overloaded", [])


async def test_what_waits_can_be_cancelled(mesh: Mesh, eventually: Any) -> None:
    node = await full_node(mesh)
    mesh.submit(id="runs", function="echo")
    mesh.submit(id="waits", function="echo")
    await eventually(lambda: waiting(mesh) == 1)
    mesh.tell(TopicKind.CANCEL, task="waits")
    await eventually(lambda: mesh.final("waits"))
    assert mesh.final("waits")["code"] == "cancelled"  # type: ignore[index]
    assert waiting(mesh) == 0
    assert len(node.invocations) == 1


async def test_a_full_room_sheds_the_lowest_priority_first(mesh: Mesh, eventually: Any) -> None:
    await mesh.stop_router()
    await mesh.start_router(ROOMY.model_copy(update={"waiting_limit": 2}))
    node = await full_node(mesh)
    mesh.submit(id="runs", function="echo", priority=0)
    await eventually(lambda: node.invocations)
    for task in ("low", "later"):
        mesh.submit(id=task, function="echo", priority=1)
    await eventually(lambda: waiting(mesh) == 2)
    mesh.submit(id="high", function="echo", priority=9)
    await eventually(lambda: mesh.final("later"))
    mesh.submit(id="lowest", function="echo", priority=0)
    await eventually(lambda: mesh.final("lowest"))
    for task in ("later", "lowest"):
        final = mesh.final(task)
        assert final is not None
        assert final["code"] == "overloaded"
        assert final["retry_after_ms"] > 0
    finish(node, node.invocations[0])
    await eventually(lambda: len(node.invocations) == 2)
    assert node.invocations[1].task == "high"
    assert mesh.router.stats.shed == {1: 1, 0: 1}
    assert (ends(mesh, "later"), ends(mesh, "runs")) == (["error"], ["result"])


async def test_a_newcomer_of_higher_priority_finds_room_in_a_full_router(
    mesh: Mesh, eventually: Any
) -> None:
    await mesh.stop_router()
    await mesh.start_router(ROOMY.model_copy(update={"live_limit": 2}))
    await full_node(mesh)
    mesh.submit(id="runs", function="echo", priority=1)
    await eventually(lambda: mesh.kinds("runs") == ["accepted", "routed"])
    mesh.submit(id="waits", function="echo", priority=1)
    await eventually(lambda: waiting(mesh) == 1)
    mesh.submit(id="also-low", function="echo", priority=1)
    await eventually(lambda: mesh.final("also-low"))
    assert "accepted" not in mesh.kinds("also-low")
    mesh.submit(id="high", function="echo", priority=2)
    await eventually(lambda: mesh.final("waits"))
    await eventually(lambda: "accepted" in mesh.kinds("high"))
    assert mesh.final("waits")["retry_after_ms"] > 0  # type: ignore[index]
    assert mesh.final("runs") is None, "what runs is never shed"


async def test_a_node_that_refuses_is_asked_again_later(mesh: Mesh, eventually: Any) -> None:
    node = await full_node(mesh)

    def refuse_once(node: ScriptedNode, invocation: Invocation) -> None:
        if len(node.invocations) == 1:
            node.report(invocation, "refused", code="overloaded", retry_after_ms=100)
        else:
            admit_and_finish(node, invocation)

    node.behaviour = refuse_once
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.final("t"))
    assert mesh.kinds("t") == ["accepted", "routed", "routed", "result"]


async def test_what_waits_goes_on_after_a_restart_of_the_router(
    mesh: Mesh, eventually: Any
) -> None:
    node = await full_node(mesh)
    for number in range(4):
        mesh.submit(id=f"t{number}", function="echo")
    await eventually(lambda: waiting(mesh) == 3)
    await mesh.kill_router("router-1")
    node.behaviour = admit_and_finish
    await mesh.start_router(ROOMY, epoch=2)
    node.load(capacity=1, functions=ONE_PLACE)
    await eventually(lambda: waiting(mesh) == 3 or mesh.final("t3"))
    finish(node, node.invocations[0])
    for number in range(4):
        await eventually(lambda number=number: mesh.final(f"t{number}"))
        assert ends(mesh, f"t{number}") == ["result"]


async def test_a_task_goes_to_whichever_node_comes_first(mesh: Mesh, eventually: Any) -> None:
    first = await full_node(mesh, "edge-1")
    mesh.submit(id="runs", function="echo")
    mesh.submit(id="waits", function="echo")
    await eventually(lambda: waiting(mesh) == 1)
    second = await full_node(mesh, "edge-2")
    third = await full_node(mesh, "edge-3")
    await eventually(lambda: first.invocations)
    finish(first, first.invocations[0])
    await eventually(
        lambda: len([*first.invocations, *second.invocations, *third.invocations]) == 2
    )


async def test_a_queue_behind_a_long_run_is_moved_to_an_idle_node(
    mesh: Mesh, eventually: Any
) -> None:
    long = await mesh.node("edge-1", admit)
    long.load(capacity=1, functions={"echo": {"concurrency": 1}})  # how long it takes is not known
    await mesh.broker.settle()
    mesh.submit(id="long", function="echo")
    mesh.submit(id="stuck", function="echo")
    await eventually(lambda: len(long.invocations) == 2)
    assert [one.task for one in long.invocations] == ["long", "stuck"]
    idle = await full_node(mesh, "edge-2")
    await eventually(lambda: any(order["verb"] == "return" for order in long.orders))
    (order,) = [order for order in long.orders if order["verb"] == "return"]
    assert order["task"] == "stuck"
    assert not idle.invocations, "until the node has given it back it is the node's"
    long.report(long.invocations[1], "refused", code="overloaded", seq=0)
    await eventually(lambda: idle.invocations)
    finish(idle, idle.invocations[0])
    await eventually(lambda: mesh.final("stuck"))
    assert (idle.invocations[0].task, idle.invocations[0].attempt) == ("stuck", 2)
    assert mesh.router.stats.moved == 1
    finish(long, long.invocations[0])
    await eventually(lambda: mesh.final("long"))


async def test_what_waits_for_nodes_that_are_gone_is_told_so(
    mesh: Mesh, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usher, "_ABSENCE_MS", 100)
    node = await full_node(mesh)
    mesh.submit(id="runs", function="echo")
    mesh.submit(id="waits", function="echo")
    await eventually(lambda: waiting(mesh) == 1)
    node.be("offline")
    await eventually(lambda: mesh.final("waits"))
    assert mesh.final("waits")["code"] == "no_capable_node"  # type: ignore[index]
    assert waiting(mesh) == 0


async def test_what_has_risen_while_it_waited_is_not_passed_at_the_node(
    mesh: Mesh, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "AGING_MS", 50)
    node = await full_node(mesh)
    mesh.submit(id="runs", function="echo", priority=1)
    mesh.submit(id="waits", function="echo", priority=1)
    await eventually(lambda: waiting(mesh) == 1)
    await eventually(lambda: "working" in mesh.kinds("waits"))  # a second has passed
    finish(node, node.invocations[0])
    await eventually(lambda: len(node.invocations) == 2)
    assert node.invocations[1].priority == 9


async def test_the_room_can_be_looked_at(mesh: Mesh, eventually: Any) -> None:
    await full_node(mesh)
    for number in range(3):
        mesh.submit(id=f"t{number}", function="echo")
    await eventually(lambda: waiting(mesh) == 2)
    told = (await mesh.admin(eventually, "waiting"))["output"]
    (row,) = told["functions"]
    assert (told["waiting"], row["function"], row["clients"]) == (2, "echo", {"pump-7": 2})
    stats = (await mesh.admin(eventually, "stats"))["output"]
    assert (stats["waiting"], stats["waited"], stats["shed"]) == (2, 2, {})


# ---- with real nodes


async def test_real_nodes_give_back_what_they_have_not_begun(
    mesh: Mesh, tmp_path: Path, topics: Topics, eventually: Any
) -> None:
    source = tmp_path / "functions.py"
    source.write_text(SOURCE)

    async def start(name: str) -> NodeAgent:
        agent = NodeAgent(
            session=await mesh.session(name),
            topics=topics,
            settings=NodeSettings(node=name, load_interval_s=0.1, cancel_grace_s=0.2),
            functions=[FunctionSpec(description="d", entry=f"{source}:echo", name="echo")],
        )
        await mesh.stack.enter_async_context(agent)
        record = make_record(mesh.words, name)
        topic = topics.build(TopicKind.CATALOG, node=name, function="echo")
        mesh.client.post(topic, record.model_dump_json(exclude_none=True).encode(), retain=True)
        await eventually(lambda: (name, "echo") in mesh.router.fleet.records)
        await eventually(lambda: mesh.router.fleet.node(name).load is not None)
        return agent

    first = await start("edge-1")
    gates = [tmp_path / name for name in ("never", "soon", "third")]
    for number, gate in enumerate(gates[:2]):
        mesh.submit(id=f"t{number}", function="echo", input=str(gate), timeout_ms=120_000)
        await eventually(lambda number=number: "routed" in mesh.kinds(f"t{number}"))
    second = await start("edge-2")
    gates[1].touch()
    await eventually(lambda: mesh.final("t1"), timeout_s=60)
    final = mesh.final("t1")
    assert final is not None
    assert (final["event"], final["node"]) == ("result", "edge-2")
    assert first.counters.given_back == 1
    assert second.counters.finished == 1
    assert mesh.final("t0") is None
    gates[0].touch()
    await eventually(lambda: mesh.final("t0"), timeout_s=60)
    assert ends(mesh, "t0") == ["result"]
