"""Cascades with nodes that lie and routers that restart, over a broker in memory."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from capability_schemas.capability import Resources
from capability_schemas.invocation import Invocation
from capability_schemas.topics import Topics
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


def hesitate(node: ScriptedNode, invocation: Invocation) -> None:
    """Hand back an answer, twice."""
    for _ in range(2):
        node.report(invocation, "unsure", output="perhaps", confidence=0.3, seq=invocation.seq)


def never_end(node: ScriptedNode, invocation: Invocation) -> None:
    """Report an end that never came, by a number that no file has room for, then a real end."""
    topic = f"foam/v1/local/report/{invocation.router}/{node.node}"
    report = (
        f'{{"v":1,"task":"{invocation.task}","client":"{invocation.client}","attempt":'
        f'{invocation.attempt},"node":"{node.node}","status":"finished","seq":{2**70}}}'
    )
    node.session.post(topic, report.encode())
    node.report(invocation, "failed", code="internal")


async def nodes(mesh: Mesh, small: Any, large: Any) -> tuple[ScriptedNode, ScriptedNode]:
    made = []
    for name, behaviour, size in (("small", small, 10**6), ("large", large, 10**9)):
        record = make_record(mesh.words, name, resources=Resources(memory_bytes=size))
        made.append(await mesh.node(name, behaviour, record))
    return made[0], made[1]


def submit(mesh: Mesh, task: str = "t", **fields: Any) -> None:
    mesh.submit(id=task, function="echo", min_confidence=0.6, **fields)


def finals(mesh: Mesh, task: str = "t") -> list[str]:
    return [kind for kind in mesh.kinds(task) if kind in {"result", "error"}]


async def test_without_room_for_drafts_the_first_answer_counts(mesh: Mesh, eventually: Any) -> None:
    await mesh.stop_router()
    await mesh.start_router(QUICK.model_copy(update={"draft_bytes": 0}))
    _, large = await nodes(mesh, hesitate, answer)
    submit(mesh)
    await eventually(lambda: mesh.final("t"))
    result = mesh.final("t")
    assert result is not None
    assert (result["output"], result["node"], result["seq"]) == ("perhaps", "small", 0)
    assert large.invocations == []


async def test_an_answer_handed_back_twice_is_one_step(mesh: Mesh, eventually: Any) -> None:
    small, large = await nodes(mesh, hesitate, answer)
    submit(mesh)
    await eventually(lambda: mesh.final("t"))
    await eventually(lambda: len(mesh.router.dispatcher) == 0)
    await mesh.broker.settle()
    assert mesh.kinds("t") == ["accepted", "routed", "routed", "chunk", "chunk", "result"]
    assert (len(small.invocations), len(large.invocations)) == (1, 1)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_number_beyond_all_bounds_harms_nobody(
    mesh: Mesh, eventually: Any, stream: bool
) -> None:
    await nodes(mesh, hesitate, never_end)
    submit(mesh, stream=stream)
    await eventually(lambda: mesh.final("t"))
    result = mesh.final("t")
    assert result is not None
    assert (result["output"], result["seq"], result["attempt"]) == ("perhaps", 0, 2)
    assert mesh.router.stats.dropped["decode"] == 1
    assert finals(mesh) == ["result"]


async def test_nobody_hands_back_what_another_holds(mesh: Mesh, eventually: Any) -> None:
    small, large = await nodes(mesh, admit, admit)
    submit(mesh)
    await eventually(lambda: small.invocations)
    (invocation,) = small.invocations
    large.report(invocation, "unsure", output="mine", confidence=0.9)
    large.report(invocation.model_copy(update={"client": "pump-8"}), "unsure", output="mine")
    small.report(invocation.model_copy(update={"attempt": 2}), "unsure", output="early")
    await mesh.broker.settle()
    assert mesh.kinds("t") == ["accepted", "routed"]
    answer(small, invocation)
    await eventually(lambda: mesh.final("t"))
    assert finals(mesh) == ["result"]


async def restarted(
    mesh: Mesh, eventually: Any, *, forgotten: bool = False
) -> tuple[ScriptedNode, ScriptedNode]:
    """Restart the router while the second step runs; forgotten: its node knows nothing of it."""
    small, large = await nodes(mesh, hesitate, admit)
    submit(mesh)
    await eventually(lambda: large.invocations)
    await mesh.stop_router()
    if forgotten:
        large.behaviour = answer
        large.forget()
    await mesh.start_router()
    if not forgotten:
        await eventually(lambda: len(mesh.router.dispatcher) == 1)
    return small, large


async def test_after_a_restart_the_step_that_still_runs_may_end_the_cascade(
    mesh: Mesh, eventually: Any
) -> None:
    small, large = await restarted(mesh, eventually)
    large.reply(large.invocations[0], event="result", seq=0, output="hello", node="edge-2")
    await eventually(lambda: len(mesh.router.dispatcher) == 0)
    await mesh.broker.settle()
    assert set(finals(mesh)) == {"result"}
    assert [one.attempt for one in small.invocations] == [1]
    assert [one.attempt for one in large.invocations] == [2]


async def test_a_step_that_is_unsure_after_a_restart_begins_the_cascade_again(
    mesh: Mesh, eventually: Any
) -> None:
    small, large = await restarted(mesh, eventually)
    large.behaviour = answer
    hesitate(large, large.invocations[0])
    await eventually(lambda: mesh.final("t"))
    await eventually(lambda: len(mesh.router.dispatcher) == 0)
    await mesh.broker.settle()
    assert set(finals(mesh)) == {"result"}  # perhaps repeated by the router
    assert len(small.invocations) == len(large.invocations) == 2


async def test_a_restart_begins_the_cascade_again_and_ends_it_once(
    mesh: Mesh, eventually: Any
) -> None:
    small, large = await restarted(mesh, eventually, forgotten=True)
    await eventually(lambda: mesh.final("t"))
    await eventually(lambda: len(mesh.router.dispatcher) == 0)
    await mesh.broker.settle()
    assert set(finals(mesh)) == {"result"}  # perhaps repeated by the router
    first, again = (one.attempt for one in small.invocations)
    second, last = (one.attempt for one in large.invocations)
    assert (first, second) == (1, 2)
    assert second < again < last
    result = mesh.final("t")
    assert result is not None
    assert (result["output"], result["seq"]) == ("hello world", 2)
