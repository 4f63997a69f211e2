"""Connections that mean no good are cut by a deadline and disturb nobody, over every transport."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from pydantic import SecretStr

from broker.access import AccessPolicy, CredentialStore, Role
from broker.audit import Tally
from broker.embedded import EmbeddedBroker
from broker.embedded.gate import Admission, Gate
from broker.embedded.hardened import HardenedBroker
from broker.embedded.refusals import Refusals
from broker.embedded.store import BrokerStore
from broker.engine import EngineSettings, WebSocketListener
from broker.session.base import Message
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from broker.tls import TlsSettings
from capability_schemas.topics import TopicKind, Topics
from mqtt_probe import connect_packet
from support.hostile import (
    ENDLESS_CONNECT,
    ENDLESS_FRAME,
    HELLO_START,
    TRANSPORTS,
    UPGRADE,
    Papers,
    Raw,
    connect,
)

pytestmark = pytest.mark.broker

TOPICS = Topics()
TASK = TOPICS.build(TopicKind.TASK, client="pump-1")
CONNECT_TIMEOUT_S = 2.0
CUT_S = 30.0
ROOM_BYTES = 96 * 1024 * 1024


@dataclass
class Target:
    """An embedded broker, reached over one transport."""

    engine: EmbeddedBroker
    transport: str
    passwords: dict[str, str]
    papers: Papers
    log: Path

    @property
    def port(self) -> int:
        return {
            "tcp": self.engine.port,
            "tls": self.engine.tls_port,
        }.get(self.transport, self.engine.websocket_port)

    @property
    def rss_bytes(self) -> int:
        pages = Path(f"/proc/{self.engine.pid}/statm").read_text().split()[1]
        return int(pages) * 4096

    def open(self, *, upgraded: bool = True) -> Any:
        return connect(self.port, self.transport, upgraded=upgraded)

    def session(self, identity: str, **changes: Any) -> MqttSession:
        scheme = {"tcp": "mqtt", "tls": "mqtts"}.get(self.transport, self.transport)
        fields: dict[str, Any] = {
            "urls": (f"{scheme}://127.0.0.1:{self.port}",),
            "client_id": identity,
            "username": identity,
            "password": SecretStr(self.passwords[identity]),
            "version": "3.1.1",
            "connect_timeout_s": CUT_S,
            "tls": TlsSettings(ca_file=self.papers.listener.ca_file),
        }
        return MqttSession(settings=SessionSettings(**fields | changes))

    def events(self, name: str) -> list[dict[str, Any]]:
        found = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return [event for event in found if event.get("event") == name]


@contextlib.asynccontextmanager
async def _target(folder: Path, transport: str, **limits: Any) -> AsyncIterator[Target]:
    store = CredentialStore(folder / "credentials.json")
    passwords = {
        name: store.add(name, role)
        for name, role in {"pump-1": Role.DEVICE, "router-1": Role.ROUTER}.items()
    }
    papers = Papers.make(folder)
    settings = EngineSettings(
        data_dir=folder / "broker",
        connect_timeout_s=CONNECT_TIMEOUT_S,
        tls=papers.listener,
        websocket=WebSocketListener(secure=transport == "wss"),
        **limits,
    )
    engine = EmbeddedBroker(settings=settings, credentials=store, topics=TOPICS)
    async with engine:
        log = folder / "broker" / "embedded.log"
        yield Target(engine, transport, passwords, papers, log)


@pytest.fixture(params=TRANSPORTS)
async def target(request, tmp_path):
    async with _target(tmp_path, request.param) as found:
        yield found


class Traffic:
    """A device and a router that talk to each other all the while."""

    def __init__(self, target: Target) -> None:
        self._device = target.session("pump-1")
        self._router = target.session("router-1")
        self._got: set[bytes] = set()
        self._count = 0

    async def __aenter__(self) -> Self:
        await self._router.__aenter__()
        await self._device.__aenter__()
        await self._router.subscribe(TOPICS.filter(TopicKind.TASK), self._take)
        await self._router.wait_connected(CUT_S)
        await self._device.wait_connected(CUT_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._device.stop()
        await self._router.stop()

    async def _take(self, message: Message) -> None:
        self._got.add(message.payload)

    async def flows(self, eventually: Callable[..., Awaitable[None]]) -> None:
        """Twenty messages arrive, on the connections made at the beginning."""
        wanted = {b"%d" % number for number in range(self._count, self._count + 20)}
        self._count += 20
        for payload in wanted:
            self._device.post(TASK, payload)
        await eventually(lambda: wanted <= self._got, timeout_s=CUT_S)
        assert (self._device.stats.connects, self._router.stats.connects) == (1, 1)


async def _drip(raw: Raw, data: bytes) -> None:
    """Send a byte each fifth of the deadline, without ever coming to an end."""
    for byte in data:
        raw.writer.write(bytes((byte,)))
        await asyncio.sleep(CONNECT_TIMEOUT_S / 5)


async def test_a_connect_that_never_ends_is_cut(target, eventually):
    """Nothing at all, half a CONNECT, and one that comes a byte at a time."""
    hello = connect_packet("pump-1", username="pump-1", password="x" * 50)
    async with Traffic(target) as traffic, target.open() as silent, target.open() as half:
        half.send(hello[:20])
        async with target.open(upgraded=target.transport == "tcp") as slow:
            drip = UPGRADE if target.transport in {"ws", "wss"} else hello
            async with asyncio.TaskGroup() as group:
                dripping = group.create_task(_drip(slow, drip))
                for raw in (silent, half, slow):
                    await raw.ended(CUT_S)
                dripping.cancel()
        await traffic.flows(eventually)


async def test_half_a_handshake_is_cut(target, eventually):
    starts = {
        "tcp": (HELLO_START, b"GET /mqtt HTTP/1.1\r\n"),
        "tls": (HELLO_START, b"", connect_packet("pump-1")),
        "ws": (
            b"GET /mqtt HTTP/1.1\r\nHost: x\r\nX: ",
            b"",
            HELLO_START,
            b"POST / HTTP/1.1\r\n\r\n",
        ),
        "wss": (HELLO_START, b"", UPGRADE),
    }
    async with Traffic(target) as traffic, contextlib.AsyncExitStack() as stack:
        for start in starts[target.transport]:
            raw = await stack.enter_async_context(connect(target.port))
            raw.writer.write(start)
            await raw.ended(CUT_S)
        await traffic.flows(eventually)


async def test_what_announces_256_mb_is_cut_before_it_comes(target, eventually):
    async with Traffic(target) as traffic:
        before = target.rss_bytes
        async with target.open() as greedy:
            greedy.send(ENDLESS_CONNECT + b"x" * 60)
            await greedy.ended(CUT_S)
        if target.transport in {"ws", "wss"}:
            async with target.open() as greedy:
                greedy.writer.write(ENDLESS_FRAME)
                assert (1009).to_bytes(2, "big") in await greedy.ended(CUT_S)
            async with target.open(upgraded=False) as greedy:
                greedy.writer.write(UPGRADE[:-2] + b"X: " + b"x" * 200_000)
                await greedy.ended(CUT_S)
        await traffic.flows(eventually)
        assert target.rss_bytes < before + ROOM_BYTES


async def test_500_silent_connections_at_once_leave_room_for_others(target, eventually):
    async with Traffic(target) as traffic, contextlib.AsyncExitStack() as stack:
        before = target.rss_bytes
        raws = [await stack.enter_async_context(connect(target.port)) for _ in range(500)]
        await traffic.flows(eventually)
        newcomer = target.session("pump-1", client_id="pump-1-late")
        async with newcomer:
            await newcomer.wait_connected(CUT_S)
        assert target.rss_bytes < before + ROOM_BYTES
        async with asyncio.TaskGroup() as group:
            for raw in raws:
                group.create_task(raw.ended(CUT_S))
        await traffic.flows(eventually)


async def test_a_full_broker_cuts_who_is_silent_and_lets_others_in(tmp_path, eventually):
    async with (
        _target(tmp_path, "tls", address_limit=40) as target,
        Traffic(target) as traffic,
        contextlib.AsyncExitStack() as stack,
    ):
        raws = [await stack.enter_async_context(connect(target.port)) for _ in range(200)]
        newcomer = target.session("pump-1", client_id="pump-1-late")
        async with newcomer:
            await newcomer.wait_connected(CUT_S)
            await traffic.flows(eventually)
        async with asyncio.TaskGroup() as group:
            for raw in raws:
                group.create_task(raw.ended(CUT_S))
        full = target.events("connections.full")
        assert 1 <= len(full) <= 5  # and not one for each
        assert full[0]["address"] == "127.0.0.1"
        assert max(event["of_address"] for event in full) <= 40


async def test_who_is_logged_on_is_never_cut_for_a_newcomer(tmp_path, eventually):
    async with _target(tmp_path, "ws", connection_limit=2) as target:
        async with Traffic(target) as traffic, connect(target.port) as turned_away:
            await turned_away.ended(CUT_S)
            await traffic.flows(eventually)
        assert target.events("connections.full")


async def test_somebody_who_guesses_passwords_is_alone_with_it(target, eventually):
    """A hundred wrong passwords: who comes from the same address is served meanwhile."""
    async with Traffic(target) as traffic:
        guess = connect_packet("g", username="router-1", password="wrong")

        async def guesses() -> None:
            for _ in range(20):
                async with target.open() as raw:
                    raw.send(guess)
                    assert b"\x20\x02\x00\x05" in await raw.ended(CUT_S)

        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(guesses())
            newcomer = target.session("pump-1", client_id="pump-1-late")
            async with newcomer:
                await newcomer.wait_connected(CUT_S)
        await traffic.flows(eventually)
    assert target.events("password.guessing")


async def test_wrong_passwords_do_not_fill_the_broker(tmp_path, monkeypatch, eventually):
    """Whose password was not found right yet makes room, like somebody who is silent."""
    store = CredentialStore(tmp_path / "credentials.json")
    password = store.add("pump-1", Role.DEVICE)
    gate = Gate(credentials=store, policy=AccessPolicy(TOPICS))
    assert await gate.admit("pump-1", password, "pump-1") is Admission.ACCEPTED
    checked = threading.Event()
    monkeypatch.setattr(store, "verify", lambda *_: checked.wait(CUT_S) and None)
    broker = HardenedBroker(
        settings=EngineSettings(data_dir=tmp_path, host="127.0.0.1", port=0, address_limit=10),
        gate=gate,
        refusals=Refusals(tally=Tally(lambda: 0), topics=TOPICS),
        store=BrokerStore(tmp_path / "store"),
    )
    await broker.start()
    try:
        async with contextlib.AsyncExitStack() as stack:
            for number in range(10):
                raw = await stack.enter_async_context(connect(broker.port))
                raw.send(connect_packet("g", username=f"guess-{number}", password="wrong"))
            await eventually(lambda: len(gate._line) == 8, timeout_s=CUT_S)  # two have their turn
            good = await stack.enter_async_context(connect(broker.port))
            good.send(connect_packet("pump-1", username="pump-1", password=password))
            async with asyncio.timeout(CUT_S):
                assert await good.reader.readexactly(4) == b"\x20\x02\x00\x00"
    finally:
        checked.set()
        await broker.shutdown()
        gate.close()


async def test_a_path_that_is_no_path_is_answered(tmp_path):
    async with _target(tmp_path, "ws") as target, target.open(upgraded=False) as raw:
        raw.send(UPGRADE.replace(b"/mqtt", b"//[x"))
        assert (await raw.ended(CUT_S)).startswith(b"HTTP/1.1 404 ")
        assert not target.events("client.failed")


async def test_pings_that_nobody_reads_are_not_hoarded(tmp_path, eventually):
    """A WebSocket client that asks without end and never reads the answers."""
    async with _target(tmp_path, "ws") as target, Traffic(target) as traffic:
        before = target.rss_bytes
        async with target.open() as raw:
            raw.send(connect_packet("p", username="pump-1", password=target.passwords["pump-1"]))
            ping = (b"\x89\xfd" + b"\0\0\0\0" + b"p" * 125) * 500
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(5):
                    for _ in range(2000):
                        raw.writer.write(ping)
                        await raw.writer.drain()
            assert target.rss_bytes < before + ROOM_BYTES
            await traffic.flows(eventually)
