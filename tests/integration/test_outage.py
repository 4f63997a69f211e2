"""What a client is told while its broker, or every router, is gone; and what its error names."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from pydantic import SecretStr

from broker.session.base import Message
from broker.session.mqtt import MqttSession
from capability_schemas.errors import DeadlineExceeded
from capability_schemas.ids import now_ms
from capability_schemas.node import RouterState
from capability_schemas.reply import Accepted
from capability_schemas.task import Task
from capability_schemas.topics import TopicKind
from capability_schemas.wire import decode, encode
from foam.sdk.address import MeshAddress
from foam.sdk.client import MeshClient, TaskHandle
from support.broker_site import BrokerSite
from tcp_proxy import TcpProxy

pytestmark = pytest.mark.broker

LONG_S = 3600.0


class Router:
    """Accepts every task and does nothing about it."""

    def __init__(self, site: BrokerSite) -> None:
        self._topics = site.topics
        self._said = 0
        self.session = MqttSession(settings=site.settings("router-1"))

    async def begin(self) -> None:
        await self.session.subscribe(self._topics.filter(TopicKind.TASK), self._accept)
        await self.session.wait_connected(20)
        await self.say("birth")

    async def say(self, state: str | None) -> None:
        self._said += 1
        topic = self._topics.build(TopicKind.ROUTER_STATE, router="router-1")
        said = state and encode(
            RouterState.model_validate(
                {"router": "router-1", "state": state, "epoch": 1, "at": now_ms() + self._said}
            )
        )
        await self.session.publish(topic, said or b"", retain=True)

    async def _accept(self, message: Message) -> None:
        client = self._topics.parse(message.topic).levels["client"]
        asked = str(decode(Task, message.payload).id)
        topic = self._topics.build(TopicKind.REPLY, client=client, task=asked, source="router-1")
        word = Accepted(task=asked, at=now_ms(), router="router-1", deadline=now_ms() + 3_600_000)
        self.session.post(topic, encode(word))


@contextlib.asynccontextmanager
async def asking(
    site: BrokerSite, timeout_s: float
) -> AsyncIterator[tuple[TaskHandle, TcpProxy, Router, list[str]]]:
    """Ask for something that takes long; the client goes over a proxy."""
    told: list[str] = []
    router = Router(site)
    async with TcpProxy(host="127.0.0.1", port=site.port) as way, router.session:
        await router.begin()
        address = MeshAddress(
            url=f"mqtt://127.0.0.1:{way.port}",
            site=site.topics.site,
            client="pump-1",
            username="pump-1",
            password=SecretStr(site.passwords["pump-1"]),
        )
        async with MeshClient.at(address, on_wait=told.append) as mesh:
            handle = await mesh.submit(function="long", timeout_s=timeout_s)
            assert (await anext(handle)).event == "accepted"
            yield handle, way, router, told
        await router.say(None)


async def test_a_broker_that_is_gone_and_back_is_said(embedded_site, eventually) -> None:
    async with asking(embedded_site, LONG_S) as (handle, way, _, told):
        reading = asyncio.create_task(handle.result())
        way.refuse()
        await eventually(lambda: len(told) == 1, timeout_s=30)
        assert told == [f"the broker {way.url} is gone; trying again"]
        way.accept()
        await eventually(lambda: len(told) == 2, timeout_s=30)
        assert told[1] == f"connected to {way.url} again"
        reading.cancel()


async def test_the_end_names_a_broker_that_is_gone(embedded_site) -> None:
    async with asking(embedded_site, 4.0) as (handle, way, _, _):
        way.refuse()
        with pytest.raises(
            DeadlineExceeded, match=r"^the broker mqtt://.* is gone, for .* s now"
        ) as end:
            await handle.result()
        assert "is gone" in end.value.detail["gone"]  # what tells it from a task nobody knows


async def test_routers_that_are_gone_are_said_when_an_answer_waits_for_them(
    embedded_site, eventually
) -> None:
    async with asking(embedded_site, LONG_S) as (handle, _, router, told):
        reading = asyncio.create_task(handle.result())
        await router.say("offline")
        await eventually(lambda: len(told) == 1, timeout_s=30)
        assert told == ["no router lives: router-1 is offline; trying again"]
        await router.say("birth")
        await eventually(lambda: len(told) == 2, timeout_s=30)
        assert told[1] == "router-1 lives again"
        reading.cancel()


async def test_the_end_names_routers_that_are_gone(embedded_site) -> None:
    async with asking(embedded_site, 5.0) as (handle, _, router, _):
        await router.say("offline")
        with pytest.raises(DeadlineExceeded, match=r"^no router lives: router-1 is offline"):
            await handle.result()
