"""Clients that ask nodes themselves, on real brokers, with a real node: no router lives."""

import asyncio
import contextlib

import pytest

from capability_schemas.errors import DeadlineExceeded, InvalidTask, TaskCancelled
from capability_schemas.reply import Chunk, Result
from conftest import require_broker
from support.broker_site import run_site
from support.small_plant import Plant, recited
from tcp_proxy import TcpProxy

pytestmark = [pytest.mark.broker, pytest.mark.timeout(120)]


@pytest.fixture(
    params=[
        "embedded",
        pytest.param("mosquitto", marks=pytest.mark.external_broker),
        pytest.param("nats", marks=pytest.mark.external_broker),
    ]
)
async def plant(request, tmp_path, monkeypatch):
    if request.param != "embedded":
        require_broker(request.param)
    monkeypatch.setattr("foam.sdk.client.PATIENCE_S", 0.2)
    monkeypatch.setattr("broker.presence._SETTLING_S", 0.0)
    async with contextlib.AsyncExitStack() as stack:
        site = await stack.enter_async_context(run_site(request.param, tmp_path))
        yield Plant(site, stack, tmp_path)


@pytest.fixture
async def embedded(tmp_path, monkeypatch):
    monkeypatch.setattr("foam.sdk.client.PATIENCE_S", 0.2)
    monkeypatch.setattr("broker.presence._SETTLING_S", 0.0)
    async with contextlib.AsyncExitStack() as stack:
        site = await stack.enter_async_context(run_site("embedded", tmp_path))
        yield Plant(site, stack, tmp_path)


async def test_a_node_answers_streams_cancels_and_refuses_without_a_router(plant):
    agent, _ = await plant.start_node()
    await plant.router_was_here()
    mesh = await plant.client()
    handle = await mesh.submit(function="recite", input={"lines": 30, "pause_s": 0.01})
    text = "".join([piece async for piece in handle.text()])
    assert text == recited(30)
    assert handle.direct is not None
    assert (handle.direct.node, handle.direct.function) == ("edge-1", "recite")
    assert isinstance(handle.outcome, Result)
    assert (await mesh.ask("say the words of this text one by one")).function == "words"

    handle = await mesh.submit(function="recite", input={"lines": 2_000, "pause_s": 0.05})
    async for event in handle:
        if isinstance(event, Chunk):
            await handle.cancel()
            break
    with pytest.raises(TaskCancelled):
        await handle.result()

    with pytest.raises(InvalidTask):
        await mesh.ask(function="add", input={"b": 1})
    assert (await mesh.ask(function="add", input={"a": 1}, task_id="sum")).output == 3.0
    ran = agent.counters.finished
    assert (await mesh.ask(function="add", input={"a": 1}, task_id="sum")).output == 3.0
    assert agent.counters.finished == ran


async def test_a_router_that_returns_leaves_what_runs_and_gets_what_comes(embedded):
    plant = embedded
    await plant.start_node()
    await plant.router_was_here()
    mesh = await plant.client()
    handle = await mesh.submit(function="recite", input={"lines": 60, "pause_s": 0.05})
    events = [await anext(handle)]
    async with contextlib.AsyncExitStack() as stack:
        router, _ = await plant.start_router(stack)
        events += [event async for event in handle]
        assert isinstance(events[-1], Result)
        numbered = [event.seq for event in events if isinstance(event, Chunk | Result)]
        assert numbered == list(range(len(numbered)))
        assert handle.direct is not None
        through = await mesh.submit(function="add", input={"a": 5})
        assert (await through.result()).output == 7.0
        assert through.direct is None
        assert router.dispatcher.live((mesh.client, handle.id)) is None


async def test_what_was_given_to_a_router_that_died_is_taken_back_and_runs_once(embedded):
    plant = embedded
    agent, _ = await plant.start_node()
    async with contextlib.AsyncExitStack() as stack:
        _, session = await plant.start_router(stack)
        await session.abort()  # without a last will: it passes for alive until it is missed
    mesh = await plant.client()
    handle = await mesh.submit(function="add", input={"a": 1})
    given = handle.id
    assert not handle.direct
    assert (await handle.result()).output == 3.0
    assert handle.direct is not None
    assert handle.id != given
    ran = agent.counters.finished
    watched = mesh._inbox.open(given, deadline=2**52)
    async with contextlib.AsyncExitStack() as stack:
        await plant.start_router(stack)  # its session was kept, and brings task and cancellation
        async with asyncio.timeout(60):
            events = [event async for event in watched]
    assert [event.event for event in events if event.event in {"result", "error"}] == ["error"]
    assert events[-1].code == "cancelled"
    assert agent.counters.finished == ran


async def test_what_a_node_has_done_for_a_router_answers_the_same_id_without_it(embedded):
    plant = embedded
    agent, _ = await plant.start_node(direct_per_client=1)
    mesh = await plant.client()
    async with contextlib.AsyncExitStack() as stack:
        await plant.start_router(stack)
        first = await mesh.ask(function="add", input={"a": 1}, task_id="sum")
        ran = agent.counters.finished
    for _ in range(2):  # and none of them takes a place
        handle = await mesh.submit(function="add", input={"a": 1}, task_id="sum")
        again = await handle.result()
        assert handle.direct is not None
        assert (again.output, again.attempt) == (first.output, first.attempt)
    assert agent.counters.finished == ran
    assert (await mesh.ask(function="add", input={"a": 2})).output == 4.0


async def test_a_client_that_goes_while_a_routers_attempt_runs_hears_its_end(embedded):
    plant = embedded
    agent, _ = await plant.start_node(direct_per_client=1)
    mesh = await plant.client()
    recite = {"function": "recite", "input": {"lines": 60, "pause_s": 0.05}, "task_id": "long"}
    async with contextlib.AsyncExitStack() as stack:
        await plant.start_router(stack)
        handle = await mesh.submit(**recite)
        async for event in handle:
            if isinstance(event, Chunk):
                break
        handle.close()
    handle = await mesh.submit(**recite)
    assert "".join([piece async for piece in handle.text()]) == recited(60)
    assert handle.direct is not None
    assert agent.counters.finished == 1
    assert (await mesh.ask(function="add", input={"a": 2})).output == 4.0


async def test_a_link_that_is_cut_costs_no_word(embedded):
    plant = embedded
    await plant.start_node()
    await plant.router_was_here()
    async with TcpProxy(host="127.0.0.1", port=plant.site.port) as proxy:
        mesh = await plant.client(url=proxy.url)
        handle = await mesh.submit(function="recite", input={"lines": 60, "pause_s": 0.05})
        pieces = []
        async for piece in handle.text():
            pieces.append(piece)
            if len(pieces) == 3:
                proxy.cut()
        assert "".join(pieces) == recited(60)


async def test_a_client_that_shall_not_waits_for_a_router(embedded):
    plant = embedded
    agent, _ = await plant.start_node()
    await plant.router_was_here()
    mesh = await plant.client(direct=False)
    handle = await mesh.submit(function="add", input={"a": 1})
    reading = asyncio.ensure_future(handle.result())
    async with contextlib.AsyncExitStack() as stack:
        await plant.start_router(stack)
        assert (await reading).output == 3.0
        assert not handle.direct
    assert agent.counters.finished == 1


async def test_a_node_that_is_closed_or_a_function_that_is_not_there_is_said(embedded, eventually):
    plant = embedded
    await plant.start_node(direct="never")
    await plant.router_was_here()
    told: list[str] = []
    mesh = await plant.client(on_wait=told.append)
    handle = await mesh.submit(function="sing", timeout_s=2.0)
    assert mesh.bereft
    assert "one is waited for" in told[0]
    assert "nobody offers" in told[1]
    with pytest.raises(DeadlineExceeded, match=r"no router lives, and nobody took .*nobody offers"):
        await handle.result()
    handle = await mesh.submit(function="add", input={"a": 1})
    waits = asyncio.ensure_future(handle.result())
    await eventually(lambda: "edge-1 obeys routers only" in told[-1], timeout_s=30)
    async with contextlib.AsyncExitStack() as stack:
        await plant.start_router(stack)
        assert (await waits).output == 3.0
        assert handle.direct is None
