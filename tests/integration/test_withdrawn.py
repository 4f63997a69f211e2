"""Tasks that are taken back before, or as, a router hears of them."""

from contextlib import AsyncExitStack

import pytest

from capability_schemas.topics import TopicKind
from support.scripted_mesh import Mesh


@pytest.fixture
async def mesh(tmp_path, topics):
    async with AsyncExitStack() as stack:
        made = Mesh(stack, tmp_path, topics)
        await made.start_client()
        await made.start_router()
        yield made
        await made.stop_router()


async def test_a_cancellation_that_overtakes_its_task_ends_it_unrun(mesh, eventually):
    node = await mesh.node("edge-1")
    mesh.tell(TopicKind.CANCEL, task="t1")
    await mesh.broker.settle()
    mesh.submit(id="t1", text="say it again")
    await eventually(lambda: mesh.final("t1"))
    assert mesh.final("t1")["code"] == "cancelled"
    assert not node.invocations
    mesh.submit(id="t1", text="say it again")  # the same id, the same outcome
    mesh.submit(id="t2", text="say it again")
    await eventually(lambda: mesh.final("t2"))
    assert mesh.final("t2")["output"] == "hello world"
    assert {event["code"] for event in mesh.of("t1") if event["event"] == "error"} == {"cancelled"}


@pytest.mark.parametrize("first", [TopicKind.TASK, TopicKind.CANCEL], ids=["task", "cancel"])
async def test_a_router_that_comes_back_runs_nothing_that_was_taken_back(mesh, eventually, first):
    node = await mesh.node("edge-1")
    await mesh.kill_router("router-1")
    if first is TopicKind.CANCEL:
        mesh.tell(TopicKind.CANCEL, task="t1")
    mesh.submit(id="t1", text="say it again")
    if first is TopicKind.TASK:
        mesh.tell(TopicKind.CANCEL, task="t1")
    await mesh.broker.settle()
    await mesh.start_router(epoch=2)
    await eventually(lambda: mesh.final("t1"), timeout_s=30)
    assert mesh.final("t1")["code"] == "cancelled"
    assert not node.invocations
