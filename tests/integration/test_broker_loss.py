"""Brokers that are killed, hang or lose their memory, and what the sessions make of it."""

import asyncio
import contextlib
import json
import os
import resource
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.session.base import Message, Will
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.errors import AccessDenied, BrokerUnavailable
from capability_schemas.topics import TopicKind, Topics
from conftest import require_broker
from support.broker_site import BrokerSite, run_again, run_site
from support.nats_site import NatsCluster, nats_cluster
from tcp_proxy import TcpProxy

pytestmark = [pytest.mark.broker, pytest.mark.timeout(180)]

PATIENCE_S = 50.0
TOPICS = Topics()
TASKS = TOPICS.filter(TopicKind.TASK)
TASK = TOPICS.build(TopicKind.TASK, client="pump-1")
STATES = TOPICS.filter(TopicKind.NODE_STATE)
STATE = TOPICS.build(TopicKind.NODE_STATE, node="edge-1")


class Got(list[Message]):
    """What a subscription has brought."""

    async def __call__(self, message: Message) -> None:
        self.append(message)

    @property
    def numbers(self) -> list[int]:
        """First arrivals, in order."""
        return list(dict.fromkeys(int(message.payload) for message in self))


class Sender:
    """Publishes numbers without a pause, a few under way at a time."""

    def __init__(self, session: MqttSession) -> None:
        self._session = session
        self._going = True
        self.sent = 0

    def pause(self) -> None:
        """Send nothing more."""
        self._going = False

    async def run(self) -> None:
        while True:
            if self._going and self._session.outbox_size < 50:
                self._session.post(TASK, str(self.sent).encode())
                self.sent += 1
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def sending(session: MqttSession) -> AsyncIterator[Sender]:
    """Send as long as the body runs."""
    sender = Sender(session)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(sender.run(), name="test.sender")
        yield sender
        task.cancel()


def used(session: MqttSession) -> str:
    """Return the broker that a session uses."""
    return next(one.url for one in session.brokers if one.state == "in use")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[NatsCluster]:
    require_broker("nats")
    async with nats_cluster(tmp_path) as found:
        yield found


@pytest.mark.external_broker
async def test_a_cluster_loses_a_server_under_load_and_nothing_else(cluster, eventually):
    got, states = Got(), Got()
    async with (
        MqttSession(settings=cluster.settings("router-1", first=0, clean=False)) as router,
        MqttSession(settings=cluster.settings("pump-1", first=1)) as pump,
        MqttSession(settings=cluster.settings("edge-1", first=2)) as node,
    ):
        await router.subscribe(TASKS, got)
        for session in (router, pump, node):
            await session.wait_connected(PATIENCE_S)
        await node.publish(STATE, b"1", retain=True, timeout_s=PATIENCE_S)
        assert [used(one) for one in (router, pump, node)] == list(cluster.urls)
        async with sending(pump) as sender:
            await eventually(lambda: len(got) > 20, timeout_s=PATIENCE_S)
            for number in (0, 1):  # who reads, then who writes; the first is back by then
                seen = len(got.numbers)
                await cluster.kill(number)
                more = seen + 50
                await eventually(lambda: len(got.numbers) > more, timeout_s=PATIENCE_S)  # noqa: B023
                assert cluster.urls[number] not in {used(router), used(pump)}
                await cluster.start(number)
        await eventually(lambda: not pump.outbox_size, timeout_s=PATIENCE_S)
        await eventually(lambda: len(got.numbers) == sender.sent, timeout_s=PATIENCE_S)
        assert sorted(got.numbers) == list(range(sender.sent))
        await cluster.kill(2)
        settings = cluster.settings("router-2", first=0)
        async with MqttSession(settings=settings) as late:
            await late.subscribe(STATES, states)
            await late.wait_connected(PATIENCE_S)
            assert cluster.number_of(used(late)) in {0, 1}  # both of them were killed once
            await eventually(lambda: states, timeout_s=PATIENCE_S)
        assert states[0].payload == b"1"


@pytest.mark.external_broker
async def test_without_a_majority_a_cluster_says_so_and_goes_on_when_it_is_back(
    cluster, eventually
):
    got = Got()
    patient = {"ack_timeout_s": 4.0, "connect_timeout_s": 3.0, "backoff_cap_s": 2.0}
    async with (
        MqttSession(settings=cluster.settings("router-1", clean=False, **patient)) as router,
        MqttSession(settings=cluster.settings("pump-1", **patient)) as pump,
    ):
        await router.subscribe(TASKS, got)
        for session in (router, pump):
            await session.wait_connected(PATIENCE_S)
        await pump.publish(TASK, b"0", timeout_s=PATIENCE_S)
        await cluster.kill(1, 2)
        with pytest.raises(BrokerUnavailable, match=r"no confirmation .* within 3 s"):
            await pump.publish(TASK, b"1", timeout_s=3)
        pump.post(TASK, b"2")  # waits in the outbox
        await eventually(lambda: not pump.connected, timeout_s=PATIENCE_S)
        with pytest.raises(BrokerUnavailable, match="is not connected to") as caught:
            await pump.wait_connected(2)
        assert cluster.urls[1] in caught.value.message
        await cluster.start(1, 2)
        await eventually(lambda: 2 in got.numbers, timeout_s=PATIENCE_S)
        await eventually(lambda: not pump.outbox_size, timeout_s=PATIENCE_S)


# ------------------------------------------------------------- one broker that is started again


KINDS = ["embedded", pytest.param("mosquitto", marks=pytest.mark.external_broker)]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    require_broker(request.param)
    return str(request.param)


async def kill(site: BrokerSite) -> None:
    """Kill a broker as ``kill -9`` does, and wait until it is gone."""
    os.kill(site.engine.pid, signal.SIGKILL)
    await site.engine.wait()


async def retained(site: BrokerSite, count: int) -> dict[str, bytes]:
    """Return what a newcomer is told at once; waits for a number of topics."""
    got = Got()
    async with MqttSession(settings=site.settings("admin-1", version="3.1.1")) as watcher:
        for what in ("catalog", "node", "router", "trust", "capability"):
            await watcher.subscribe(f"{TOPICS.root}/{what}/#", got)
        await watcher.wait_connected(PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            while len(got) < count:  # noqa: ASYNC110  # whatever comes, of whatever topics
                await asyncio.sleep(0.01)
    return {message.topic: message.payload for message in got if message.retain}


def retained_topics() -> dict[str, bytes]:
    """Make one retained message of every kind that the mesh has."""
    build = TOPICS.build
    return {
        build(TopicKind.NODE_STATE, node="edge-1"): b"state",
        build(TopicKind.CAPABILITY, node="edge-1", function="f"): b"claim",
        build(TopicKind.CATALOG, node="edge-1", function="f"): b"record",
        build(TopicKind.ROUTER_STATE, router="router-1"): b"router",
        build(TopicKind.TRUST, member="edge-1"): b"trust",
    }


PUBLISHERS = {"catalog": "registry-1", "trust": "registry-1", "router": "router-1"}


async def test_no_retained_message_is_missing_after_a_kill(kind, tmp_path):
    """Of none of its publishers: what is there afterwards, the broker itself has kept."""
    kept = retained_topics()
    async with run_site(kind, tmp_path) as site:
        for topic, payload in kept.items():
            name = PUBLISHERS.get(topic.split("/")[3], "edge-1")
            async with MqttSession(settings=site.settings(name, version="3.1.1")) as session:
                await session.wait_connected(PATIENCE_S)
                for one in (b"old", payload):
                    await session.publish(topic, one, retain=True, timeout_s=PATIENCE_S)
        assert await retained(site, len(kept)) == kept
        if kind == "mosquitto":
            await _saved(tmp_path / "broker" / "mosquitto.db", b"trust")
        await kill(site)
    async with run_again(site, tmp_path, port=0) as site:
        assert await retained(site, len(kept)) == kept


async def _saved(path: Path, text: bytes) -> None:
    """Wait until Mosquitto has saved something: it does so every two seconds."""
    async with asyncio.timeout(PATIENCE_S):
        while not (path.exists() and text in path.read_bytes()):  # noqa: ASYNC110  # a file
            await asyncio.sleep(0.05)


async def test_births_mend_what_a_broker_had_not_saved_when_it_was_killed(kind, tmp_path):
    """Mosquitto saves every two seconds; what is younger its publishers say again."""
    async with run_site(kind, tmp_path) as site:
        port = site.port
        settings = site.settings("edge-1", version="3.1.1", url=f"mqtt://127.0.0.1:{port}")
        async with MqttSession(settings=settings) as node:
            await node.wait_connected(PATIENCE_S)
            node.announce(STATE, lambda: b"born")
            await retained(site, 1)
            await kill(site)
            async with run_again(site, tmp_path, port=port) as again:
                await node.wait_connected(PATIENCE_S)
                assert await retained(again, 1) == {STATE: b"born"}


async def test_a_broker_killed_under_load_loses_at_most_what_it_had_not_passed_on(
    kind, tmp_path, eventually
):
    """What waits at the sender is sent again, in its order."""
    got = Got()
    async with run_site(kind, tmp_path) as site:
        url = f"mqtt://127.0.0.1:{site.port}"
        quick: dict[str, Any] = {
            "url": url,
            "version": "3.1.1",
            "backoff_cap_s": 1.0,
            "reconnect_floor_s": 0.2,
        }
        async with (
            MqttSession(settings=site.settings("router-1", clean=False, **quick)) as router,
            MqttSession(settings=site.settings("pump-1", **quick)) as pump,
        ):
            await router.subscribe(TASKS, got)
            await router.wait_connected(PATIENCE_S)
            await pump.wait_connected(PATIENCE_S)
            async with sending(pump) as sender:
                await eventually(lambda: len(got) > 200, timeout_s=PATIENCE_S)
                if kind == "mosquitto":
                    database = tmp_path / "broker" / "mosquitto.db"
                    await _saved(database, router.client_id.encode())
                killed_at = sender.sent
                await kill(site)
                seen = len(got.numbers)
                async with run_again(site, tmp_path, port=site.port):
                    await eventually(lambda: router.stats.connects == 2, timeout_s=PATIENCE_S)
                    back_at = sender.sent
                    await eventually(lambda: len(got.numbers) > seen + 200, timeout_s=PATIENCE_S)
                    sender.pause()
                    await eventually(lambda: not pump.outbox_size, timeout_s=PATIENCE_S)
                    await eventually(lambda: sender.sent - 1 in got.numbers, timeout_s=PATIENCE_S)
    missing = set(range(sender.sent)) - set(got.numbers)
    under_way = 64
    if kind == "mosquitto":  # it kept the reader's session
        assert len(missing) <= under_way
    # Else what was published before the reader was back went to nobody. Whoever needs more has an
    # answer from end to end: a task is said again until it is accepted.
    assert all(killed_at - under_way <= number < back_at for number in missing), missing


async def test_whoever_died_with_the_embedded_broker_is_said_to_be_gone(tmp_path, eventually):
    will = Will(topic=STATE, payload=b"offline", qos=1, retain=True)
    async with (
        run_site("embedded", tmp_path) as site,
        MqttSession(settings=site.settings("edge-1", version="3.1.1"), will=will) as node,
    ):
        await node.wait_connected(PATIENCE_S)
        await node.publish(STATE, b"online", retain=True, timeout_s=PATIENCE_S)
        await kill(site)
        await node.abort()
    async with run_again(site, tmp_path, port=0, return_s=8.0) as site:
        assert await retained(site, 1) == {STATE: b"online"}
        got = Got()
        async with MqttSession(settings=site.settings("watcher-1")) as watcher:
            await watcher.subscribe(STATES, got)
            await eventually(lambda: b"offline" in [m.payload for m in got], timeout_s=PATIENCE_S)


async def test_whoever_comes_back_to_the_embedded_broker_is_not(tmp_path, eventually):
    wills = {name: TOPICS.build(TopicKind.NODE_STATE, node=name) for name in ("edge-1", "edge-2")}
    async with contextlib.AsyncExitStack() as stack:
        site = await stack.enter_async_context(run_site("embedded", tmp_path))
        nodes = {}
        for name, topic in wills.items():
            will = Will(topic=topic, payload=b"offline", qos=1, retain=True)
            settings = site.settings(name, version="3.1.1", reconnect_floor_s=0.2)
            nodes[name] = await stack.enter_async_context(MqttSession(settings=settings, will=will))
            await nodes[name].wait_connected(PATIENCE_S)
            nodes[name].announce(topic, lambda: b"online")
        await retained(site, 2)
        await kill(site)
        await nodes["edge-2"].abort()
        got = Got()
        async with (
            run_again(site, tmp_path, port=site.port, return_s=10.0) as site,
            MqttSession(settings=site.settings("watcher-1")) as watcher,
        ):
            await watcher.subscribe(STATES, got)
            await eventually(
                lambda: (wills["edge-2"], b"offline") in [(m.topic, m.payload) for m in got],
                timeout_s=PATIENCE_S,
            )
            assert (wills["edge-1"], b"offline") not in [(m.topic, m.payload) for m in got]


async def test_a_damaged_store_is_set_aside_and_said_aloud(tmp_path, eventually):
    store = tmp_path / "broker" / "retained.store"
    async with run_site("embedded", tmp_path) as site:
        async with MqttSession(settings=site.settings("edge-1")) as node:
            await node.wait_connected(PATIENCE_S)
            await node.publish(STATE, b"online", retain=True)
        await kill(site)
    store.write_bytes(store.read_bytes()[:-3] + b"\0\0\0")
    events = Got()
    async with (
        run_again(site, tmp_path, port=0, return_s=3.0) as site,
        MqttSession(settings=site.settings("admin-1")) as admin,
    ):
        await admin.subscribe(f"{TOPICS.root}/event/broker/store_damaged", events)
        await admin.wait_connected(PATIENCE_S)
        assert len(list(store.parent.glob("retained.store.damaged-*"))) == 1
        async with MqttSession(settings=site.settings("edge-1")) as node:  # the mesh goes on
            await node.wait_connected(PATIENCE_S)
            await node.publish(STATE, b"again", retain=True)
        assert await retained(site, 1) == {STATE: b"again"}
        await eventually(lambda: events, timeout_s=PATIENCE_S)
    assert "damaged-" in json.loads(events[0].payload)["data"]["aside"]


async def test_a_full_disk_does_not_stop_the_embedded_broker(tmp_path, eventually):
    async with run_site("embedded", tmp_path) as site:
        async with MqttSession(settings=site.settings("edge-1")) as node:
            await node.wait_connected(PATIENCE_S)
            await node.publish(STATE, b"1", retain=True)
            _, most = resource.prlimit(site.engine.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(site.engine.pid, resource.RLIMIT_FSIZE, (10, most))
            await node.publish(STATE, b"2", retain=True)
            assert await retained(site, 1) == {STATE: b"2"}
            resource.prlimit(site.engine.pid, resource.RLIMIT_FSIZE, (most, most))
            store = tmp_path / "broker" / "retained.store"
            await eventually(lambda: store.read_bytes().endswith(b"2"), timeout_s=PATIENCE_S)
        await kill(site)
    async with run_again(site, tmp_path, port=0) as site:
        assert await retained(site, 1) == {STATE: b"2"}


# --------------------------------------------------------------- brokers that are there in part


@contextlib.asynccontextmanager
async def two_ways(embedded_site: BrokerSite) -> AsyncIterator[list[TcpProxy]]:
    """Two addresses of one broker, each of which can be broken."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(TcpProxy(host="127.0.0.1", port=embedded_site.port))
            for _ in range(2)
        ]


def over(site: BrokerSite, proxies: list[TcpProxy], who: str, **more: Any) -> SessionSettings:
    """Settings of a session that knows both addresses; it loses patience soon."""
    quick = {"keepalive_s": 2, "connect_timeout_s": 2.0, "reconnect_floor_s": 0.1}
    settings = site.settings(who, version="3.1.1", **(quick | more))
    return settings.model_copy(update={"urls": tuple(proxy.url for proxy in proxies)})


async def test_a_broker_that_accepts_and_never_answers_is_passed_over(embedded_site):
    async with two_ways(embedded_site) as ways:
        ways[0].stall()
        async with MqttSession(settings=over(embedded_site, ways, "pump-1")) as pump:
            await pump.wait_connected(PATIENCE_S)
            assert used(pump) == ways[1].url
            assert pump.brokers[0].state == "down"
            assert "closed" in pump.brokers[0].reason or "no answer" in pump.brokers[0].reason


@pytest.mark.parametrize(
    "patience", [{}, {"keepalive_s": 600, "ack_timeout_s": 2.0}], ids=["silent", "unconfirmed"]
)
async def test_a_broker_that_falls_silent_is_left(embedded_site, eventually, patience):
    got = Got()
    async with two_ways(embedded_site) as ways:
        reading = over(embedded_site, ways[1:], "router-1")
        writing = over(embedded_site, ways, "pump-1", **patience)
        async with MqttSession(settings=reading) as router, MqttSession(settings=writing) as pump:
            await router.subscribe(TASKS, got)
            await router.wait_connected(PATIENCE_S)
            await pump.wait_connected(PATIENCE_S)
            assert used(pump) == ways[0].url
            ways[0].stall()  # half open: the socket stays, nothing comes
            for number in range(3):
                pump.post(TASK, b"%d" % number)
            await eventually(lambda: got.numbers == [0, 1, 2], timeout_s=PATIENCE_S)
            assert used(pump) == ways[1].url


async def test_after_a_loss_the_next_one_is_used_and_nobody_goes_back(embedded_site, eventually):
    async with (
        two_ways(embedded_site) as ways,
        MqttSession(settings=over(embedded_site, ways, "edge-1")) as node,
    ):
        await node.wait_connected(PATIENCE_S)
        births: list[bytes] = []

        def birth() -> bytes:
            births.append(b"born")
            return births[-1]

        node.announce(STATE, birth)
        ways[0].refuse()
        await eventually(lambda: node.stats.connects == 2 and node.connected)
        assert used(node) == ways[1].url
        await eventually(lambda: len(births) == 2)  # said again at the next one
        ways[0].accept()
        ways[1].cut()
        await eventually(lambda: node.stats.connects == 3 and node.connected)
        assert used(node) == ways[0].url
        await node.publish(STATE, b"", retain=True)


async def test_one_broker_that_refuses_does_not_end_what_another_lets_in(embedded_site, eventually):
    async with two_ways(embedded_site) as ways:
        password = embedded_site.passwords["pump-1"]
        settings = SessionSettings(
            urls=(
                f"mqtt://pump-1:stale@127.0.0.1:{ways[0].port}",
                f"mqtt://pump-1:{password}@127.0.0.1:{ways[1].port}",
            ),
            client_id="pump-1-a",
            version="3.1.1",
        )
        async with MqttSession(settings=settings) as pump:
            await pump.wait_connected(PATIENCE_S)
            assert [one.state for one in pump.brokers] == ["refuses", "in use"]
            assert password not in repr(pump.brokers)
        wrong = settings.model_copy(
            update={"urls": tuple(f"mqtt://pump-1:no@127.0.0.1:{way.port}" for way in ways)}
        )
        async with MqttSession(settings=wrong) as pump:
            with pytest.raises(AccessDenied):
                await pump.wait_connected(PATIENCE_S)
