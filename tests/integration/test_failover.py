"""A router with nodes that are lost in mid-answer, or slow."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from capability_schemas.capability import CatalogRecord, ModelInfo
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Invocation
from capability_schemas.topics import TopicKind, Topics
from router.intake import Arrival, Intake
from support.capabilities import make_record
from support.scripted_mesh import QUICK, Mesh, ScriptedNode, admit, answer


@pytest.fixture
async def mesh(tmp_path: Path, topics: Topics) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack, tmp_path, topics)
        await mesh.start_client()
        await mesh.start_router()
        yield mesh
        await mesh.stop_router()


def record(mesh: Mesh, node: str, **more: Any) -> CatalogRecord:
    model = ModelInfo(name="m", digest="sha256:1")
    return make_record(mesh.words, node, continues="prefix", model=model, **more)


def begin(node: ScriptedNode, invocation: Invocation) -> None:
    node.report(invocation, "admitted")
    node.reply(invocation, event="chunk", seq=0, data="hel")
    node.reply(invocation, event="chunk", seq=1, data="lo ")


def go_on(node: ScriptedNode, invocation: Invocation) -> None:
    assert invocation.continuation is not None
    assert invocation.continuation.shown == ("hello ",)
    node.report(invocation, "admitted")
    node.reply(invocation, event="chunk", seq=invocation.seq, data="world")
    node.reply(invocation, event="result", seq=invocation.seq + 1, output="hello world")


def numbered(mesh: Mesh, task: str) -> list[tuple[str, int]]:
    kinds = {"chunk", "result", "error"}
    return [(event["event"], event["seq"]) for event in mesh.of(task) if event["event"] in kinds]


async def two_nodes(mesh: Mesh) -> list[ScriptedNode]:
    """Start two nodes of which whoever is asked first only begins."""

    def behave(node: ScriptedNode, invocation: Invocation) -> None:
        (begin if invocation.continuation is None else go_on)(node, invocation)

    names = ("edge-1", "edge-2")
    return [await mesh.node(name, behave, record(mesh, name)) for name in names]


def first_of(nodes: list[ScriptedNode]) -> ScriptedNode:
    return next(node for node in nodes if node.invocations)


async def test_another_node_goes_on_where_the_lost_one_was(mesh: Mesh, eventually: Any) -> None:
    nodes = await two_nodes(mesh)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.kinds("t").count("chunk") == 2)
    first_of(nodes).be("offline")
    await eventually(lambda: mesh.final("t"))
    assert numbered(mesh, "t") == [("chunk", 0), ("chunk", 1), ("chunk", 2), ("result", 3)]
    assert mesh.kinds("t").count("routed") == 2
    attempts = [event["attempt"] for event in mesh.of("t") if event["event"] == "routed"]
    assert attempts == [1, 2]
    assert mesh.router.stats.continued == 1


async def test_a_client_that_came_late_hears_all_of_an_answer_that_has_moved(
    mesh: Mesh, eventually: Any
) -> None:
    nodes = [await mesh.node(name, begin, record(mesh, name)) for name in ("edge-1", "edge-2")]
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.kinds("t").count("chunk") == 2)
    first = first_of(nodes)
    first.behaviour = admit
    (second,) = [node for node in nodes if node is not first]
    second.behaviour = admit
    first.be("offline")
    await eventually(lambda: second.invocations)
    second.reply(second.invocations[0], event="chunk", seq=2, data="world")
    await mesh.broker.settle()
    mesh.events.clear()  # it has missed who answers for the mesh, and what was shown before
    asked = json.dumps({"task": "t", "from_seq": 0}).encode()
    mesh.client.post(mesh.topics.build(TopicKind.RESUME, client="pump-7"), asked)
    await eventually(lambda: len(mesh.of("t")) == 3)
    told = [
        (event["event"], event["seq"], event["attempt"], event["data"]) for event in mesh.of("t")
    ]
    assert told == [("chunk", 0, 2, "hel"), ("chunk", 1, 2, "lo "), ("chunk", 2, 2, "world")]


async def test_a_session_moves_to_the_node_that_went_on(mesh: Mesh, eventually: Any) -> None:
    nodes = await two_nodes(mesh)
    mesh.submit(id="t", function="echo", session="s")
    await eventually(lambda: mesh.kinds("t").count("chunk") == 2)
    lost = first_of(nodes)
    lost.be("offline")
    await eventually(lambda: mesh.final("t"))
    (other,) = [node for node in nodes if node is not lost]
    lost.be("birth", epoch=11)
    for node in nodes:
        node.behaviour = answer
    await mesh.broker.settle()
    mesh.submit(id="next", function="echo", session="s")
    await eventually(lambda: mesh.final("next"))
    assert [one.task for one in other.invocations] == ["t", "next"]


async def test_a_router_that_was_restarted_knows_what_was_shown(
    mesh: Mesh, eventually: Any
) -> None:
    nodes = await two_nodes(mesh)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.kinds("t").count("chunk") == 2)
    await mesh.stop_router()
    first_of(nodes).be("offline")
    await mesh.start_router()
    await eventually(lambda: mesh.final("t"))
    said = dict.fromkeys(numbered(mesh, "t"))  # the router may repeat the very same end
    assert list(said) == [("chunk", 0), ("chunk", 1), ("chunk", 2), ("result", 3)]
    assert mesh.of("t")[-1]["output"] == "hello world"


async def test_a_node_that_comes_back_is_passed_over(mesh: Mesh, eventually: Any) -> None:
    nodes = await two_nodes(mesh)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.kinds("t").count("chunk") == 2)
    lost = first_of(nodes)
    lost.be("offline")
    await eventually(lambda: mesh.final("t"))
    lost.reply(lost.invocations[0], event="chunk", seq=2, data="twice")
    lost.reply(lost.invocations[0], event="result", seq=3, output="twice")
    await mesh.broker.settle()
    assert mesh.router.stats.ended == {"result": 1}
    assert ("cancel", "superseded") in [(one["verb"], one["reason"]) for one in lost.orders]


async def test_a_slow_node_is_overtaken_unless_its_signature_is_wanted(
    mesh: Mesh, eventually: Any
) -> None:
    await mesh.stop_router()
    settings = QUICK.model_copy(update={"hedge_share": 1.0, "hedge_samples": 5})
    router = await mesh.start_router(settings)
    nodes: list[ScriptedNode] = []
    slow = [False]

    def behave(node: ScriptedNode, invocation: Invocation) -> None:
        if invocation.hold:
            node.report(invocation, "admitted")
            node.report(invocation, "held", output="hello world")
            return
        (admit if slow[0] else answer)(node, invocation)

    for name in ("edge-1", "edge-2"):
        made = make_record(mesh.words, name, idempotent=True)
        nodes.append(await mesh.node(name, behave, made))
    for number in range(6):
        mesh.submit(id=f"quick-{number}", function="echo")
        await eventually(lambda number=number: mesh.final(f"quick-{number}"))
    slow[0] = True
    mesh.submit(id="signed", function="echo", proof=True)
    await eventually(lambda: "routed" in mesh.kinds("signed"))
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.final("t"))
    assert numbered(mesh, "t") == [("result", 0)]
    final = mesh.final("t")
    assert final is not None
    assert (final["output"], final["attempt"]) == ("hello world", 2)
    holder = next(node for node in nodes if ("t", 1) in asked(node))
    assert "overtaken" in [order["reason"] for order in holder.orders]
    assert sum(asked(node).count(("signed", 1)) for node in nodes) == 1
    assert not any(("signed", 2) in asked(node) for node in nodes)
    assert router.stats.hedged >= 1


def asked(node: ScriptedNode) -> list[tuple[str, int]]:
    """Return the tasks and attempts that a node was asked for."""
    return [(invocation.task, invocation.attempt) for invocation in node.invocations]


async def test_one_task_taken_twice_at_the_same_moment_runs_once(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1", answer)
    intake = Intake(topics=mesh.topics, limit_bytes=100_000)
    topic = mesh.topics.build(TopicKind.TASK, client="pump-7")
    read = intake.read(topic, b'{"id": "t", "function": "echo"}', now_ms())
    assert isinstance(read, Arrival)
    mesh.router.dispatcher.take(read)
    mesh.router.dispatcher.take(read)
    await eventually(lambda: mesh.final("t"))
    assert mesh.kinds("t").count("result") == 1
    assert len(node.invocations) == 1
    await eventually(lambda: len(mesh.router.dispatcher) == 0)
