"""Streams that go on by themselves, whatever is cut, killed or started again in their middle."""

import contextlib
import os
import signal

import pytest

from conftest import require_broker
from support.broker_site import run_again, run_site
from support.ports import free_port
from support.small_plant import CLIENT, CONNECT_S, Plant, recited
from tcp_proxy import TcpProxy

pytestmark = [pytest.mark.broker, pytest.mark.timeout(120)]

LINES = 80
TASK = {"function": "recite", "input": {"lines": LINES, "pause_s": 0.03}, "timeout_s": 90.0}


@pytest.fixture(params=["embedded", pytest.param("mosquitto", marks=pytest.mark.external_broker)])
async def plant(request, tmp_path):
    if request.param != "embedded":
        require_broker(request.param)
    async with contextlib.AsyncExitStack() as stack:
        site = await stack.enter_async_context(run_site(request.param, tmp_path, port=free_port()))
        yield Plant(site, stack, tmp_path)


class Reader:
    """Reads an answer through a link that can be cut."""

    def __init__(self, plant, stack):
        self.plant = plant
        self.stack = stack

    async def open(self):
        port = self.plant.site.port
        self.proxy = await self.stack.enter_async_context(TcpProxy(host="127.0.0.1", port=port))
        self.mesh = await self.plant.client(url=self.proxy.url)
        self.handle = await self.mesh.submit(**TASK)
        self.pieces = self.handle.text()
        self.text = await anext(self.pieces)
        return self

    def cut(self):
        self.proxy.refuse()
        self.proxy.cut()

    async def rest(self):
        self.proxy.accept()
        async for piece in self.pieces:
            self.text += piece
        return self.text


async def test_a_client_that_was_away_for_the_rest_of_it(plant, eventually):
    await plant.start_node()
    async with contextlib.AsyncExitStack() as stack:
        router, _ = await plant.start_router(stack)
        reader = await Reader(plant, stack).open()
        reader.cut()
        await eventually(
            lambda: router.dispatcher.live((CLIENT, reader.handle.id)) is None, timeout_s=60
        )
        assert await reader.rest() == recited(LINES)


async def test_a_client_that_was_away_while_the_router_was_killed(plant):
    await plant.start_node()
    async with contextlib.AsyncExitStack() as stack:
        async with contextlib.AsyncExitStack() as first:
            _, session = await plant.start_router(first)
            reader = await Reader(plant, stack).open()
            reader.cut()
            await session.abort()
        await plant.start_router(stack)
        assert await reader.rest() == recited(LINES)


async def test_a_client_that_was_away_while_its_node_was_lost(plant):
    async with contextlib.AsyncExitStack() as stack:
        links = {}
        for name in ("edge-1", "edge-2"):
            link = TcpProxy(host="127.0.0.1", port=plant.site.port)
            links[name] = await plant.stack.enter_async_context(link)
            await plant.start_node(name, url=link.url, load_interval_s=0.3)
        await plant.start_router(stack)
        reader = await Reader(plant, stack).open()
        reader.cut()
        routed = reader.handle.routed
        assert routed is not None
        links[routed.node].refuse()
        links[routed.node].cut()
        assert await reader.rest() == recited(LINES)
        assert reader.handle.outcome.node != routed.node
        links[routed.node].accept()


async def test_a_broker_that_was_killed_in_the_middle(plant):
    _, node = await plant.start_node()
    async with contextlib.AsyncExitStack() as stack:
        _, router = await plant.start_router(stack)
        reader = await Reader(plant, stack).open()
        os.kill(plant.site.engine.pid, signal.SIGKILL)
        await plant.site.engine.wait()
        reader.cut()
        port = plant.site.port
        plant.moved(
            await plant.stack.enter_async_context(run_again(plant.site, plant.folder, port=port))
        )
        for session in (node, router):
            await session.wait_connected(CONNECT_S)
        assert await reader.rest() == recited(LINES)


async def test_the_same_id_again_reads_it_from_the_beginning(plant):
    agent, _ = await plant.start_node()
    async with contextlib.AsyncExitStack() as stack:
        await plant.start_router(stack)
        first = await plant.client()
        handle = await first.submit(**TASK, task_id="job-1")
        async for _ in handle.text():
            break
        handle.close()
        for mesh in (await plant.client(), first):  # while it runs, and when it has ended
            again = await mesh.submit(**TASK, task_id="job-1")
            text = "".join([piece async for piece in again.text()])
            assert text == recited(LINES)
        assert agent.counters.finished == 1
