"""What every session promises, over every broker: ``broker.session.base.Session``.

Topics and identities are those of the mesh, for every broker here enforces the access table: a
device publishes tasks, a router reads them; a router announces itself, an observer reads that.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import pytest
from pydantic import SecretStr

from broker.session.base import Message, Session, Will
from broker.session.core import SessionCore
from broker.session.memory import MemoryBroker, MemorySession
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    InvalidTopic,
    Overloaded,
    TooLarge,
)
from capability_schemas.topics import TopicKind, Topics
from support.broker_site import BrokerSite
from tcp_proxy import TcpProxy

CONNECT_S = 15.0
TASKS = Topics().filter(TopicKind.TASK)
TASK = Topics().build(TopicKind.TASK, client="pump-1")
STATE = Topics().build(TopicKind.ROUTER_STATE, router="router-1")
STATES = Topics().filter(TopicKind.ROUTER_STATE)


class World(Protocol):
    """A broker with sessions whose connections can be broken from outside."""

    async def session(self, identity: str, **options: Any) -> SessionCore: ...

    def cut(self, session: Session) -> None: ...

    def isolate(self, session: Session) -> None: ...

    def rejoin(self, session: Session) -> None: ...


class MemoryWorld:
    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self._count = 0

    async def session(
        self,
        identity: str,
        *,
        will: Will | None = None,
        clean: bool = True,
        client_id: str | None = None,
        isolated: bool = False,
        wrong_password: bool = False,
        **settings: Any,
    ) -> SessionCore:
        self._count += 1
        made = MemorySession(
            broker=self.broker,
            client_id=client_id or f"{identity}-{self._count}",
            username=identity,
            will=will,
            clean=clean,
            settings=SessionSettings(urls=("mqtt://memory",), client_id="any", **settings),
        )
        if isolated:
            self.broker.hold(made.client_id)
        if wrong_password:
            self.broker.ban(made.client_id)
        return made

    def cut(self, session: Session) -> None:
        self.broker.drop(session.client_id)

    def isolate(self, session: Session) -> None:
        self.broker.hold(session.client_id)

    def rejoin(self, session: Session) -> None:
        self.broker.release(session.client_id)


class MqttWorld:
    def __init__(
        self, site: BrokerSite, version: str, scheme: str, stack: contextlib.AsyncExitStack
    ) -> None:
        self._site = site
        self._version = version
        self._scheme = scheme
        self._stack = stack
        self._proxies: dict[str, TcpProxy] = {}

    async def session(
        self,
        identity: str,
        *,
        will: Will | None = None,
        isolated: bool = False,
        wrong_password: bool = False,
        client_id: str | None = None,
        **settings: Any,
    ) -> SessionCore:
        port = self._site.engine.websocket_port if self._scheme == "ws" else self._site.port
        proxy = TcpProxy(host="127.0.0.1", port=port)
        await self._stack.enter_async_context(proxy)
        if isolated:
            proxy.refuse()
        url = f"{self._scheme}://127.0.0.1:{proxy.port}"
        made = self._site.settings(identity, url=url, version=self._version, **settings)
        if client_id is not None:
            made = made.model_copy(update={"client_id": client_id})
        if wrong_password:
            made = made.model_copy(update={"password": SecretStr("wrong")})
        self._proxies[made.client_id] = proxy
        return MqttSession(settings=made, will=will)

    def cut(self, session: Session) -> None:
        self._proxies[session.client_id].cut()

    def isolate(self, session: Session) -> None:
        self._proxies[session.client_id].refuse()

    def rejoin(self, session: Session) -> None:
        self._proxies[session.client_id].accept()


KINDS = {
    "memory": ("", "", "mqtt"),
    "embedded": ("embedded_site", "auto", "mqtt"),
    "embedded websocket": ("embedded_site", "auto", "ws"),
    "mosquitto 3.1.1": ("mosquitto_site", "3.1.1", "mqtt"),
    "mosquitto 5": ("mosquitto_site", "5", "mqtt"),
    "mosquitto websocket": ("mosquitto_site", "5", "ws"),
    "nats": ("nats_site", "auto", "mqtt"),
    "nats websocket": ("nats_site", "3.1.1", "ws"),
}


def _params() -> list[Any]:
    made = []
    for kind in KINDS:
        marks = [] if kind == "memory" else [pytest.mark.broker]
        if kind.startswith(("mosquitto", "nats")):
            marks.append(pytest.mark.external_broker)
        made.append(pytest.param(kind, id=kind.replace(" ", "-"), marks=marks))
    return made


@pytest.fixture(params=_params())
def kind(request) -> str:
    return str(request.param)


@pytest.fixture
def site(kind, request) -> BrokerSite | None:
    fixture, *_ = KINDS[kind]
    return request.getfixturevalue(fixture) if fixture else None


@pytest.fixture
async def world(kind, site) -> AsyncIterator[World]:
    if site is None:
        yield MemoryWorld()
        return
    async with contextlib.AsyncExitStack() as stack:
        yield MqttWorld(site, *KINDS[kind][1:], stack)


class Got(list[Message]):
    """A handler that remembers what it got."""

    async def __call__(self, message: Message) -> None:
        self.append(message)

    def payloads(self) -> list[bytes]:
        return [message.payload for message in self]

    def has(self, *payloads: bytes) -> Callable[[], bool]:
        return lambda: set(payloads) <= set(self.payloads())


@contextlib.asynccontextmanager
async def pair(world: World, **options: Any) -> AsyncIterator[tuple[SessionCore, Got, SessionCore]]:
    """A device that publishes, and what a router gets of its tasks."""
    device = await world.session("pump-1", **options)
    router = await world.session("router-1")
    got = Got()
    async with router:
        await router.subscribe(TASKS, got)
        await router.wait_connected(CONNECT_S)
        async with device:
            yield device, got, router


class TestSession:
    async def test_messages_arrive_complete_and_in_order(self, world, eventually):
        async with pair(world) as (device, got, _):
            payloads = [b"%d" % number for number in range(300)]
            for payload in payloads:
                device.post(TASK, payload)
            await eventually(lambda: len(got) == 300)
            assert got.payloads() == payloads
            assert got[0] == Message(TASK, b"0", 1, retain=False)
            await eventually(lambda: device.outbox_size == 0)  # confirmations are another way
            assert device.stats.acked == 300

    async def test_publish_returns_when_the_broker_has_it(self, world, eventually):
        async with pair(world) as (device, got, _):
            await device.publish(TASK, b"confirmed", timeout_s=CONNECT_S)
            assert device.outbox_size == 0
            await device.publish(TASK, b"q0", qos=0)
            await eventually(got.has(b"confirmed", b"q0"))
            assert [m.qos for m in got if m.payload == b"q0"] == [0]

    @pytest.mark.parametrize("size", [0, 1, 300_000, 3_000_000])
    async def test_any_payload_gets_through(self, kind, world, eventually, size):
        if kind == "mosquitto websocket" and size > 64 * 1024:
            pytest.skip("Mosquitto 2.0 keeps the end of a large packet until more comes over it")
        payload = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        async with pair(world) as (device, got, _):
            device.post(TASK, payload)
            await eventually(lambda: got)
            assert got.payloads() == [payload]
            assert type(got[0].payload) is bytes

    async def test_what_no_broker_takes_is_refused_at_once(self, world):
        device = await world.session("pump-1", max_payload_bytes=10)
        async with device:
            with pytest.raises(TooLarge):
                device.post(TASK, b"x" * 11)
            for topic in ("", "a/+", "a/#", "$SYS/x", "a\0b"):
                with pytest.raises(InvalidTopic):
                    device.post(topic, b"")
                with pytest.raises(InvalidTopic):
                    await device.publish(topic, b"")

    async def test_retained_messages_reach_late_subscribers_until_cleared(self, world, eventually):
        router = await world.session("router-1")
        early, late, after = Got(), Got(), Got()
        async with router:
            await router.wait_connected(CONNECT_S)
            await router.subscribe(STATES, early)
            await router.publish(STATE, b"kept", retain=True)
            await eventually(early.has(b"kept"))
            assert not [m for m in early if m.payload == b"kept" and m.retain]
            watcher = await world.session("watcher-1")
            async with watcher:
                await watcher.subscribe(STATES, late)
                await eventually(late.has(b"kept"))
                assert [m.retain for m in late if m.payload == b"kept"] == [True]
                await router.publish(STATE, b"", retain=True)
                await eventually(late.has(b""))
            second = await world.session("watcher-1")
            async with second:
                await second.subscribe(STATES, after)
                await second.wait_connected(CONNECT_S)
                await router.publish(STATE, b"live")
                await eventually(after.has(b"live"))
                assert b"kept" not in after.payloads()

    async def test_subscriptions_come_back_after_a_cut(self, world, eventually):
        async with pair(world) as (device, got, router):
            await device.publish(TASK, b"before", timeout_s=CONNECT_S)
            await eventually(got.has(b"before"))
            connects = router.stats.connects
            world.cut(router)
            await eventually(lambda: router.stats.connects > connects and router.connected)
            device.post(TASK, b"after")
            await eventually(got.has(b"after"))

    async def test_posts_survive_a_cut_in_order(self, world, eventually):
        async with pair(world) as (device, got, _):
            await device.wait_connected(CONNECT_S)
            for number in range(100):
                device.post(TASK, b"%d" % number)
            world.cut(device)
            for number in range(100, 200):
                device.post(TASK, b"%d" % number)
            await eventually(lambda: {int(p) for p in got.payloads()} == set(range(200)))
            await eventually(lambda: device.outbox_size == 0)
            first_seen = list(dict.fromkeys(int(payload) for payload in got.payloads()))
            assert first_seen == sorted(first_seen)

    async def test_posts_wait_for_a_broker_that_is_away(self, world, eventually):
        async with pair(world, isolated=True) as (device, got, _):
            device.post(TASK, b"1")
            device.post(TASK, b"lost", qos=0)
            device.post(TASK, b"2")
            with pytest.raises(BrokerUnavailable):
                await device.publish(TASK, b"lost", qos=0)
            with pytest.raises(BrokerUnavailable):
                await device.wait_connected(0.01)
            assert not device.connected
            assert device.outbox_size == 2
            assert device.stats.shed == 2
            world.rejoin(device)
            await eventually(lambda: len(got) == 2)
            assert got.payloads() == [b"1", b"2"]

    async def test_the_outbox_is_bounded(self, world, eventually):
        async with pair(world, isolated=True, outbox_limit=3) as (device, got, _):
            for number in range(3):
                device.post(TASK, b"%d" % number)
            with pytest.raises(Overloaded):
                device.post(TASK, b"3")
            with pytest.raises(Overloaded):
                await device.publish(TASK, b"3")
            assert device.stats.refused == 2
            world.rejoin(device)
            await eventually(lambda: len(got) == 3 and device.outbox_size == 0)
            device.post(TASK, b"4")
            await eventually(got.has(b"4"))

    async def test_publish_gives_up_in_time_and_takes_the_message_back(self, world, eventually):
        async with pair(world, isolated=True) as (device, got, _):
            with pytest.raises(BrokerUnavailable, match="was not sent"):
                await device.publish(TASK, b"late", timeout_s=0.01)
            assert device.outbox_size == 0
            device.post(TASK, b"kept")
            world.rejoin(device)
            await eventually(lambda: got)
            assert got.payloads() == [b"kept"]

    async def test_publish_waits_for_a_reconnection(self, world, eventually):
        async with pair(world, isolated=True) as (device, got, _):
            async with asyncio.TaskGroup() as group:
                group.create_task(device.publish(TASK, b"patient", timeout_s=CONNECT_S))
                await eventually(lambda: device.outbox_size == 1)
                world.rejoin(device)
            await eventually(got.has(b"patient"))

    async def test_births_follow_the_subscriptions_on_every_connection(self, world, eventually):
        got = Got()
        ups: list[bool] = []
        births = iter(range(100))
        router = await world.session("router-1")
        async with router:
            remove = router.on_connection(ups.append)
            router.announce(STATE, lambda: b"birth %d" % next(births))
            await router.subscribe(STATES, got)
            await eventually(got.has(b"birth 0"))
            world.cut(router)
            await eventually(got.has(b"birth 1"))
            assert ups == [True, False, True]
            remove()
            router.announce(STATE, lambda: b"changed")
            await eventually(got.has(b"changed"))
            router.retract(STATE)
            world.cut(router)
            await eventually(lambda: router.stats.connects == 3)
            await router.publish(STATE, b"", retain=True, timeout_s=CONNECT_S)
            await eventually(lambda: got and got[-1].payload == b"")
            assert got.payloads().count(b"changed") == 1 + sum(
                message.retain and message.payload == b"changed" for message in got
            )
            assert ups == [True, False, True]

    async def test_a_birth_supersedes_older_news_of_its_topic(self, world, eventually):
        got = Got()
        watcher = await world.session("watcher-1")
        router = await world.session("router-1", isolated=True)
        async with watcher, router:
            await watcher.subscribe(STATES, got)
            await watcher.wait_connected(CONNECT_S)
            router.announce(STATE, lambda: b"fresh")
            router.post(STATE, b"stale", retain=True)
            router.post(STATES.replace("+", "router-1"), b"not retained")
            world.rejoin(router)
            await eventually(got.has(b"fresh", b"not retained"))
            assert b"stale" not in got.payloads()
            await router.publish(STATE, b"", retain=True)

    async def test_the_will_speaks_for_a_session_that_vanishes(self, world, eventually):
        got = Got()
        watcher = await world.session("watcher-1")
        async with watcher:
            await watcher.subscribe(STATES, got)
            await watcher.wait_connected(CONNECT_S)
            will = Will(STATE, b"vanished", retain=False)
            router = await world.session("router-1", will=will)
            async with router:
                await router.wait_connected(CONNECT_S)
                await router.abort()
            await eventually(got.has(b"vanished"))

    async def test_a_session_at_rest_is_away_without_a_will_and_comes_back(self, world, eventually):
        births = iter(range(100))
        watcher = await world.session("watcher-1")
        got, tasks = Got(), Got()
        async with watcher:
            await watcher.subscribe(STATES, got)
            await watcher.wait_connected(CONNECT_S)
            router = await world.session("router-1", will=Will(STATE, b"vanished", retain=False))
            device = await world.session("pump-1")
            async with router, device:
                await router.subscribe(TASKS, tasks)
                await router.wait_connected(CONNECT_S)
                router.announce(STATE, lambda: b"birth %d" % next(births))
                router.post(STATE, b"last words")
                await router.rest()
                await eventually(got.has(b"birth 0", b"last words"))
                await eventually(lambda: not router.connected)
                router.post(STATE, b"waits")
                await device.publish(TASK, b"unheard", timeout_s=CONNECT_S)
                assert router.outbox_size == 1
                assert router.stats.connects == 1
                router.wake()
                await eventually(got.has(b"birth 1", b"waits"))
                await eventually(lambda: router.connected)
                await device.publish(TASK, b"heard", timeout_s=CONNECT_S)
                await eventually(tasks.has(b"heard"))
                assert b"unheard" not in tasks.payloads()
                await router.publish(STATE, b"", retain=True, timeout_s=CONNECT_S)
        assert b"vanished" not in got.payloads()

    async def test_the_will_is_silent_after_a_goodbye(self, world, eventually):
        got = Got()
        watcher = await world.session("watcher-1")
        async with watcher:
            await watcher.subscribe(STATES, got)
            await watcher.wait_connected(CONNECT_S)
            will = Will(STATE, b"vanished", retain=False)
            router = await world.session("router-1", will=will)
            async with router:
                await router.wait_connected(CONNECT_S)
                router.post(STATE, b"goodbye")
            other = await world.session("router-1")
            async with other:
                await other.publish(STATE, b"later", timeout_s=CONNECT_S)
            await eventually(got.has(b"goodbye", b"later"))
            assert b"vanished" not in got.payloads()

    async def test_stop_flushes_the_outbox(self, world, eventually):
        device = await world.session("pump-1")
        async with pair(world) as (_, got, _):
            async with device:
                await device.wait_connected(CONNECT_S)
                for number in range(200):
                    device.post(TASK, b"%d" % number)
            assert device.outbox_size == 0
            await eventually(lambda: len(got) == 200)

    async def test_a_session_may_be_left_at_once(self, world, eventually):
        async with pair(world) as (_, got, _):
            async with await world.session("pump-1", flush_timeout_s=CONNECT_S) as hasty:
                hasty.post(TASK, b"in and out")
            await eventually(got.has(b"in and out"))

    async def test_an_ended_session_says_so(self, world):
        device = await world.session("pump-1")
        async with device:
            pass
        assert not device.connected
        with pytest.raises(BrokerUnavailable):
            device.post(TASK, b"")
        with pytest.raises(BrokerUnavailable):
            await device.wait_connected(1)
        with pytest.raises(BrokerUnavailable):
            await device.subscribe(TASKS, Got())
        await device.wait()

    async def test_a_session_that_ends_fails_those_who_wait(self, world, eventually):
        device = await world.session("pump-1", isolated=True)
        async with device, asyncio.TaskGroup() as group:
            waiting = group.create_task(_expect_unavailable(device.publish(TASK, b"x")))
            connecting = group.create_task(_expect_unavailable(device.wait_connected()))
            await eventually(lambda: device.outbox_size == 1)
            await device.abort()
        assert waiting.done()
        assert connecting.done()

    async def test_unsubscribe_ends_the_messages(self, world, eventually):
        gone, got = Got(), Got()
        async with pair(world) as (device, all_tasks, router):
            held = await router.subscribe(STATES, gone)
            await router.unsubscribe(held)
            await router.unsubscribe(held)
            await router.publish(STATE, b"unheard")
            await router.subscribe(STATES, got)
            await router.publish(STATE, b"heard")
            await device.publish(TASK, b"task", timeout_s=CONNECT_S)
            await eventually(lambda: got.has(b"heard")() and all_tasks.has(b"task")())
            assert gone == []
            assert b"unheard" not in got.payloads()

    async def test_two_handlers_may_share_a_filter(self, world, eventually):
        async with pair(world) as (device, got, router):
            second = Got()
            held = await router.subscribe(TASKS, second)
            await device.publish(TASK, b"both", timeout_s=CONNECT_S)
            await eventually(lambda: got.has(b"both")() and second.has(b"both")())
            await router.unsubscribe(held)
            await device.publish(TASK, b"one", timeout_s=CONNECT_S)
            await eventually(got.has(b"one"))
            assert b"one" not in second.payloads()

    async def test_a_failing_handler_goes_on(self, world, eventually):
        seen: list[bytes] = []

        async def fail_once(message: Message) -> None:
            seen.append(message.payload)
            if message.payload == b"bad":
                raise ValueError("handler")

        async with pair(world) as (device, _, router):
            held = await router.subscribe(TASKS, fail_once)
            device.post(TASK, b"bad")
            device.post(TASK, b"good")
            await eventually(lambda: seen == [b"bad", b"good"])
            assert held.errors == router.stats.handler_errors == 1
            assert router.running

    async def test_a_full_queue_drops_the_newest_and_tells(self, world, eventually):
        gate, dropped, seen = asyncio.Event(), Got(), []

        async def wait(message: Message) -> None:
            await gate.wait()
            seen.append(message.payload)

        device = await world.session("pump-1")
        router = await world.session("router-1")
        async with device, router:
            held = await router.subscribe(TASKS, wait, queue_limit=2, on_overflow=dropped.append)
            await router.wait_connected(CONNECT_S)
            for number in range(6):
                device.post(TASK, b"%d" % number)
            await eventually(lambda: len(dropped) >= 3)
            gate.set()
            await eventually(lambda: len(seen) + len(dropped) == 6)
            assert seen == sorted(seen)
            assert held.dropped == router.stats.overflowed == len(dropped)

    async def test_a_large_arrival_over_the_limit_is_dropped(self, world, eventually):
        device = await world.session("pump-1")
        router = await world.session("router-1", max_payload_bytes=200_000)
        got = Got()
        async with device, router:
            await router.subscribe(TASKS, got)
            await router.wait_connected(CONNECT_S)
            device.post(TASK, b"x" * 200_001)
            device.post(TASK, b"small")
            await eventually(got.has(b"small"))
            assert len(got) == 1
            assert router.stats.oversized == 1
            assert router.connected

    async def test_a_lasting_session_gets_what_came_while_it_was_away(self, world, eventually):
        got = Got()
        async with await world.session("pump-1") as device:
            await device.wait_connected(CONNECT_S)
            router = await world.session("router-1", clean=False)
            async with router:
                await router.subscribe(TASKS, got)
                await router.wait_connected(CONNECT_S)
                world.isolate(router)
                await eventually(lambda: not router.connected)
                for number in range(20):
                    await device.publish(TASK, b"%d" % number, timeout_s=CONNECT_S)
                world.rejoin(router)
                await eventually(lambda: len(set(got.payloads())) == 20)
                first_seen = list(dict.fromkeys(got.payloads()))
                assert first_seen == [b"%d" % number for number in range(20)]

    async def test_a_refused_identity_is_told_why_and_not_retried(self, world):
        device = await world.session("pump-1", wrong_password=True)
        async with device:
            with pytest.raises(AccessDenied, match="refuses"):
                await device.wait_connected(CONNECT_S)
            with pytest.raises(AccessDenied):
                await device.wait()
            with pytest.raises(AccessDenied):
                device.post(TASK, b"")
            assert not device.running


async def _expect_unavailable(waiting: Any) -> None:
    with pytest.raises(BrokerUnavailable):
        await waiting
