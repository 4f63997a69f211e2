"""A session against brokers that die, connections that break and servers that misbehave."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from broker.session.base import Message
from broker.session.mqtt import MqttLink, MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    ConfigurationError,
    Overloaded,
)
from capability_schemas.topics import TopicKind, Topics
from support.broker_site import BrokerSite, is_available, make_site, run_again, run_site
from support.ports import free_port
from tcp_proxy import TcpProxy

pytestmark = pytest.mark.broker

CONNECT_S = 15.0
TASKS = Topics().filter(TopicKind.TASK)
TASK = Topics().build(TopicKind.TASK, client="pump-1")
STATE = Topics().build(TopicKind.ROUTER_STATE, router="router-1")
STATES = Topics().filter(TopicKind.ROUTER_STATE)


class Got(list[Message]):
    async def __call__(self, message: Message) -> None:
        self.append(message)

    def payloads(self) -> list[bytes]:
        return [message.payload for message in self]

    def numbers(self) -> list[int]:
        """First arrivals, in order."""
        return list(dict.fromkeys(int(message.payload[:8]) for message in self))


def numbered(number: int, size: int = 8) -> bytes:
    return b"%08d" % number + b"." * (size - 8)


@pytest.fixture(params=["embedded", pytest.param("mosquitto", marks=pytest.mark.external_broker)])
def kind(request) -> str:
    if not is_available(request.param):
        pytest.skip(f"there is no {request.param} binary on this machine")
    return str(request.param)


@pytest.fixture
async def site(kind, tmp_path) -> AsyncIterator[BrokerSite]:
    async with run_site(kind, tmp_path) as running:
        yield running


async def test_a_killed_broker_loses_no_posted_message(kind, tmp_path: Path, eventually):
    port = free_port()
    got, states = Got(), Got()
    async with contextlib.AsyncExitStack() as stack:
        site = await stack.enter_async_context(run_site(kind, tmp_path, port=port))
        proxy = await stack.enter_async_context(TcpProxy(host="127.0.0.1", port=port))
        router = MqttSession(settings=site.settings("router-1"))
        watcher = MqttSession(settings=site.settings("watcher-1"))
        device = MqttSession(settings=site.settings("pump-1", url=proxy.url, window=50))
        for session in (router, watcher, device):
            await stack.enter_async_context(session)
        await router.subscribe(TASKS, got)
        await watcher.subscribe(STATES, states)
        births = iter(range(100))
        router.announce(STATE, lambda: b"birth %d" % next(births))
        for session in (router, watcher, device):
            await session.wait_connected(CONNECT_S)
        await device.publish(TASK, numbered(0))
        await eventually(lambda: got.numbers() == [0] and states.payloads() == [b"birth 0"])

        proxy.stall()  # 50 under way, none confirmed
        for number in range(1, 101):
            device.post(TASK, numbered(number))
        await asyncio.sleep(0)
        os.kill(site.engine.pid, signal.SIGKILL)
        await site.engine.wait()
        proxy.refuse()  # the sender shall not be back before the receiver
        proxy.flow()
        await eventually(lambda: not any((router.connected, watcher.connected, device.connected)))
        for number in range(101, 201):
            device.post(TASK, numbered(number))
        assert device.outbox_size == 200

        await stack.enter_async_context(run_again(site, tmp_path, port=port))
        await router.wait_connected(CONNECT_S)
        await watcher.wait_connected(CONNECT_S)
        await eventually(lambda: b"birth 1" in states.payloads())
        proxy.accept()
        await eventually(lambda: device.outbox_size == 0)
        await eventually(lambda: len(got.numbers()) == 201)
        assert got.numbers() == list(range(201))


async def test_cuts_in_the_middle_of_publishing_lose_nothing(site, eventually):
    got = Got()
    async with contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(TcpProxy(host="127.0.0.1", port=site.port))
        router = await stack.enter_async_context(MqttSession(settings=site.settings("router-1")))
        await router.subscribe(TASKS, got)
        await router.wait_connected(CONNECT_S)
        settings = site.settings("pump-1", url=proxy.url, reconnect_floor_s=0.05)
        device = await stack.enter_async_context(MqttSession(settings=settings))
        await device.wait_connected(CONNECT_S)
        for cut in range(1, 4):
            connects = device.stats.connects
            proxy.cut_after(upstream_bytes=10_000)  # in the middle of a packet
            for number in range(400):
                device.post(TASK, numbered((cut - 1) * 400 + number, size=400))
            await eventually(lambda seen=connects: device.stats.connects > seen)
        await eventually(lambda: device.outbox_size == 0)
        await eventually(lambda: len(got.numbers()) == 1200)
        assert got.numbers() == list(range(1200))
        assert device.stats.resent > 0


async def test_a_connection_that_hangs_is_replaced(site, eventually):
    got = Got()
    async with contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(TcpProxy(host="127.0.0.1", port=site.port))
        router = await stack.enter_async_context(MqttSession(settings=site.settings("router-1")))
        await router.subscribe(TASKS, got)
        await router.wait_connected(CONNECT_S)
        settings = site.settings(
            "pump-1", url=proxy.url, ack_timeout_s=0.2, connect_timeout_s=1, reconnect_floor_s=0.05
        )
        device = await stack.enter_async_context(MqttSession(settings=settings))
        await device.wait_connected(CONNECT_S)
        proxy.stall()
        device.post(TASK, numbered(1))
        await eventually(lambda: not device.connected)
        proxy.flow()
        await eventually(lambda: got.numbers() == [1] and device.connected)
        assert device.stats.connects == 2


async def test_silence_is_noticed_by_keepalive(site, eventually):
    async with contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(TcpProxy(host="127.0.0.1", port=site.port))
        settings = site.settings("pump-1", url=proxy.url, keepalive_s=1)
        device = await stack.enter_async_context(MqttSession(settings=settings))
        await device.wait_connected(CONNECT_S)
        proxy.stall()
        await eventually(lambda: not device.connected)
        proxy.flow()
        await device.wait_connected(CONNECT_S)


async def test_a_slow_line_only_takes_time(site, eventually):
    got = Got()
    async with contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(TcpProxy(host="127.0.0.1", port=site.port))
        proxy.delay_s = 0.05
        router = MqttSession(settings=site.settings("router-1", url=proxy.url))
        await stack.enter_async_context(router)
        await router.subscribe(TASKS, got)
        device = MqttSession(settings=site.settings("pump-1", url=proxy.url))
        await stack.enter_async_context(device)
        await router.wait_connected(CONNECT_S)
        for number in range(100):
            device.post(TASK, numbered(number))
        await eventually(lambda: got.numbers() == list(range(100)))
        assert device.stats.resent == 0


async def test_the_outbox_fills_while_the_broker_is_dead(kind, tmp_path):
    async with run_site(kind, tmp_path) as site:
        settings = site.settings("pump-1", outbox_limit=5, flush_timeout_s=0.1)
        async with MqttSession(settings=settings) as device:
            await device.wait_connected(CONNECT_S)
            os.kill(site.engine.pid, signal.SIGKILL)
            await site.engine.wait()
            for _ in range(5):
                device.post(TASK, b"")
            with pytest.raises(Overloaded) as caught:
                device.post(TASK, b"")
            assert caught.value.retryable


async def test_a_session_waits_for_a_broker_that_is_not_there_yet(
    kind, tmp_path, eventually, caplog
):
    port = free_port()
    site = make_site(kind, tmp_path, port=port)
    settings = site.settings("pump-1", url=f"mqtt://127.0.0.1:{port}")
    async with MqttSession(settings=settings) as device:
        device.post(TASK, b"early")
        await eventually(lambda: "session.waiting" in caplog.text)
        with pytest.raises(BrokerUnavailable, match="is the broker running"):
            await device.wait_connected(0.01)
        async with site.engine:
            await device.wait_connected(CONNECT_S)
            await eventually(lambda: device.outbox_size == 0)


async def test_a_wrong_password_is_final_and_clear(site):
    settings = site.settings("pump-1").model_copy(update={"password": SecretStr("wrong")})
    async with MqttSession(settings=settings) as device:
        with pytest.raises(AccessDenied) as caught:
            await device.wait_connected(CONNECT_S)
        assert settings.client_id in caught.value.message
        assert "wrong" not in caught.value.message


async def test_urls_are_tried_in_turn_and_may_carry_the_identity(site):
    password = site.passwords["pump-1"]
    settings = SessionSettings(
        urls=(
            f"mqtt://127.0.0.1:{free_port()}",
            f"mqtt://pump-1:{password}@127.0.0.1:{site.port}",
        ),
        client_id="pump-1",
    )
    async with MqttSession(settings=settings) as device:
        await device.wait_connected(CONNECT_S)
        await device.publish(TASK, b"")


@pytest.mark.external_broker
async def test_mqtt5_tells_what_is_forbidden(mosquitto_site):
    async with MqttSession(settings=mosquitto_site.settings("pump-1", version="5")) as device:
        await device.wait_connected(CONNECT_S)
        with pytest.raises(AccessDenied, match="refuses a message"):
            await device.publish(STATE, b"")
        assert device.stats.denied == 1


async def test_small_packets_are_not_held_back(embedded_site):
    async with MqttSession(settings=embedded_site.settings("pump-1")) as device:
        await device.wait_connected(CONNECT_S)
        link = device._link
        assert isinstance(link, MqttLink)
        sock = link._paho.socket()
        assert isinstance(sock, socket.socket)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_version_the_broker_does_not_speak_is_a_configuration_error(embedded_site):
    settings = embedded_site.settings("pump-1", version="5")
    async with MqttSession(settings=settings) as device:
        with pytest.raises(ConfigurationError, match="does not speak MQTT 5"):
            await device.wait_connected(CONNECT_S)


class OddServer:
    """Answers CONNECT of MQTT 3.1.1, never one of MQTT 5; takes nothing else."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.open = 0
        self.answers = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            head = await reader.readexactly(9)
            self.versions.append(head[8])
            if head[8] == 4 and self.answers:
                writer.write(b"\x20\x02\x00\x00")
            while await reader.read(1000):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        async with server:
            yield f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_server_that_is_silent_to_mqtt5_gets_the_old_version_for_good(eventually):
    odd = OddServer()
    async with odd.run() as url:
        settings = SessionSettings(
            urls=(url,), client_id="a", probe_timeout_s=0.1, reconnect_floor_s=0.05
        )
        async with MqttSession(settings=settings) as session:
            await session.wait_connected(CONNECT_S)
            assert odd.versions == [5, 4]
            link = session._link
            assert link is not None
            link.abort()
            await eventually(lambda: session.stats.connects == 2)
            assert odd.versions == [5, 4, 4]
        await eventually(lambda: odd.open == 0)


async def test_stopping_while_connecting_leaves_no_connection(eventually):
    odd = OddServer()
    odd.answers = False
    async with odd.run() as url:
        settings = SessionSettings(urls=(url,), client_id="a", version="3.1.1")
        async with MqttSession(settings=settings):
            await eventually(lambda: odd.open == 1)
        await eventually(lambda: odd.open == 0)


class PushingServer:
    """Speaks MQTT 3.1.1: lets in, grants one subscription, pushes messages, keeps what comes."""

    def __init__(self, *, messages: int) -> None:
        self.messages = messages
        self.heard = bytearray()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            head = await reader.readexactly(2)
            await reader.readexactly(head[1])
            writer.write(b"\x20\x02\x00\x00")
            head = await reader.readexactly(2)
            asked = await reader.readexactly(head[1])
            writer.write(b"\x90\x03" + asked[:2] + b"\x01")
            for number in range(1, self.messages + 1):
                writer.write(b"\x32\x08\x00\x03a/b" + number.to_bytes(2, "big") + b"x")
            while data := await reader.read(1000):
                self.heard += data

    def acknowledged(self) -> list[int]:
        """Numbers of the PUBACKs heard, in order."""
        found, at = [], 0
        while at + 1 < len(self.heard):
            if self.heard[at] == 0x40:
                found.append(int.from_bytes(self.heard[at + 2 : at + 4], "big"))
            at += 2 + self.heard[at + 1]
        return found


@pytest.mark.parametrize("answering", [False, True])
async def test_every_message_is_acknowledged_once_whatever_is_sent(answering, eventually):
    pushing = PushingServer(messages=20)
    server = await asyncio.start_server(pushing.serve, "127.0.0.1", 0)
    url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    settings = SessionSettings(urls=(url,), client_id="a", version="3.1.1", flush_timeout_s=0.1)
    async with server, MqttSession(settings=settings) as session:

        async def answer(message: Message) -> None:
            if answering:
                session.post("c", message.payload, qos=0)

        await session.subscribe("a/b", answer)
        await eventually(lambda: len(pushing.acknowledged()) == 20)
        assert pushing.acknowledged() == list(range(1, 21))
        assert pushing.heard.count(b"\x30\x04\x00\x01cx") == (20 if answering else 0)


async def test_an_end_right_behind_the_acceptance_is_noticed(eventually):
    """As when another client takes the client id over at that very moment."""
    connections = 0

    async def accept_and_end(reader, writer):
        nonlocal connections
        connections += 1
        await reader.read(1024)
        # CONNACK and DISCONNECT "session taken over" (MQTT 5, sections 3.2 and 3.14) in one piece.
        writer.write(b"\x20\x03\x00\x00\x00" + b"\xe0\x02\x8e\x00")
        writer.close()

    async with await asyncio.start_server(accept_and_end, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        settings = SessionSettings(
            urls=(f"mqtt://127.0.0.1:{port}",),
            client_id="edge-1",
            version="5",
            reconnect_floor_s=0.05,
        )
        async with MqttSession(settings=settings):
            await eventually(lambda: connections >= 3)
