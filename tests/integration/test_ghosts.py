"""Nodes that come and go two hundred times, and everything that should be left afterwards, counted.

Broker process, registry, router and nodes are real; the nodes live in this process, so that their
tasks and descriptors can be counted too. Each node is killed, leaves, or loses its link, in an
order of its own drawn from a seed.
"""

import asyncio
import gc
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from pydantic import SecretStr

from broker.access.credentials import CredentialStore
from broker.access.policy import Role
from broker.session.base import Message
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.ids import now_ms
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind, Topics
from conftest import require_broker
from foam.simulation.runtime import FUNCTIONS, RUNTIME, SimulatedRuntime
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings
from registry.admission import Identity
from registry.encoders import EncoderThread
from registry.search import CapabilitySearch
from registry.service import RegistryService
from registry.settings import RegistrySettings
from registry.store import SqliteStore
from router import Ledger, RouterService, RouterSettings, router_will
from support.broker_site import BrokerSite, make_engine
from support.encoders import WordEncoder
from tcp_proxy import TcpProxy

RESTARTS: Final = 200
NODES: Final = tuple(f"node-{number}" for number in range(8))
STAY, LEAVE, DIE = NODES[:4], NODES[4:6], NODES[6:]
"""What becomes of the nodes in the end."""

LEASE_S: Final = 6.0
CONNECT_S: Final = 30.0
WAIT_S: Final = 60.0
ROLES: Final = {
    **dict.fromkeys(NODES, Role.NODE),
    "router-1": Role.ROUTER,
    "registry-1": Role.REGISTRY,
    "admin-1": Role.ADMIN,
    "pump-1": Role.DEVICE,
}
WORDS: Final = WordEncoder()

pytestmark = [pytest.mark.broker, pytest.mark.timeout(400)]


class Node:
    """A node through its lives.

    Attributes:
        epochs: Starts of its processes.
        restarts: How often it came (back), by what it had ended with.
    """

    def __init__(self, mesh: "Mesh", name: str, proxy: TcpProxy) -> None:
        self.mesh = mesh
        self.name = name
        self.proxy = proxy
        self.key = SigningKey.generate()
        self.epoch = 0
        self.restarts: Counter[str] = Counter()
        self.chance = random.Random(f"ghosts/{name}")
        self.session: MqttSession
        self.agent: NodeAgent
        self._life = AsyncExitStack()

    async def start(self) -> None:
        self.epoch = max(now_ms(), self.epoch + 1)
        self.session = MqttSession(
            settings=self.mesh.settings(self.name, port=self.proxy.port),
            will=lambda: self.agent.last_will(),  # noqa: PLW0108  # it is made below
        )
        self.agent = NodeAgent(
            session=self.session,
            topics=self.mesh.topics,
            settings=NodeSettings(
                node=self.name, claim_lease_s=LEASE_S, load_interval_s=0.5, drain_timeout_s=0.2
            ),
            functions=FUNCTIONS,
            key=self.key,
            runtimes={RUNTIME: SimulatedRuntime()},
            epoch=self.epoch,
        )
        self._life = AsyncExitStack()
        await self._life.enter_async_context(self.session)
        await self.session.wait_connected(CONNECT_S)
        await self._life.enter_async_context(self.agent)

    async def leave(self) -> None:
        await self._life.aclose()

    async def die(self) -> None:
        """End as a killed process does: the connection breaks, nothing more is said."""
        await self.session.abort()
        self.agent.give_up()
        await self._life.aclose()

    async def cut(self) -> None:
        """Lose the link, and find it again."""
        connects = self.session.stats.connects
        self.proxy.cut()
        async with asyncio.timeout(CONNECT_S):
            while self.session.stats.connects == connects:  # noqa: ASYNC110  # nothing tells
                await asyncio.sleep(0.02)
            await self.session.wait_connected(CONNECT_S)

    async def restart(self, times: int) -> None:
        for _ in range(times):
            how = self.chance.choice(("kill", "kill", "leave", "cut"))
            if how == "cut":
                await self.cut()
            else:
                await (self.die() if how == "kill" else self.leave())
                await self.start()
            self.restarts[how] += 1
            await asyncio.sleep(self.chance.uniform(0, 0.2))


class Mesh:
    """Broker, registry, router, and nodes behind proxies."""

    def __init__(self, stack: AsyncExitStack, site: BrokerSite, path: Path) -> None:
        self.stack = stack
        self.site = site
        self.topics = site.topics
        self.path = path
        self.nodes: dict[str, Node] = {}
        self.kept: dict[str, bytes] = {}
        self.ends: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()

    def settings(self, name: str, *, port: int | None = None, **more: Any) -> SessionSettings:
        return SessionSettings(
            urls=(self.site.url if port is None else f"mqtt://127.0.0.1:{port}",),
            client_id=name,
            username=name,
            password=SecretStr(self.site.passwords[name]),
            **more,
        )

    async def start(self) -> None:
        enter = self.stack.enter_async_context
        for name in NODES:
            proxy = await enter(TcpProxy(host="127.0.0.1", port=self.site.port))
            self.nodes[name] = Node(self, name, proxy)
        session = await enter(MqttSession(settings=self.settings("registry-1")))
        await session.wait_connected(CONNECT_S)
        self.store = await enter(SqliteStore(path=self.path / "registry.sqlite"))
        encoder = await enter(EncoderThread(encoder=WORDS))
        keys = {name: Identity(node.key.public) for name, node in self.nodes.items()}
        await enter(
            RegistryService(
                session=session,
                topics=self.topics,
                store=self.store,
                encoder=encoder,
                key=SigningKey.generate(),
                identities=keys.get,
                registry_id="registry-1",
                settings=RegistrySettings(grace_s=5.0, sweep_interval_s=0.1),
            )
        )
        ledger = await enter(Ledger(path=self.path / "router.sqlite"))
        session = MqttSession(
            settings=self.settings("router-1", clean=False),
            will=lambda: router_will(self.topics, "router-1", epoch=1, at=now_ms()),
        )
        self.router = RouterService(
            session=session,
            topics=self.topics,
            search=CapabilitySearch(space=encoder.space),
            encoder=encoder,
            ledger=ledger,
            router_id="router-1",
            settings=RouterSettings(sweep_s=0.1),
            epoch=1,
        )
        await self.router.listen()
        await enter(session)
        await session.wait_connected(CONNECT_S)
        await enter(self.router)
        self.device = await enter(MqttSession(settings=self.settings("pump-1")))
        await self.device.subscribe(
            self.topics.filter(TopicKind.REPLY, client="pump-1"), self._on_reply
        )
        await self.device.wait_connected(CONNECT_S)

    async def _on_reply(self, message: Message) -> None:
        event = json.loads(message.payload)
        task, attempt = event["task"], event.get("attempt") or 0
        if attempt < self.attempts[task]:
            return  # of an attempt that another one has replaced
        self.attempts[task] = attempt
        if event["event"] in {"result", "error"}:
            self.ends[task] += 1

    async def ask(self, count: int) -> None:
        """Have tasks run while nodes come and go."""
        for number in range(count):
            task = {
                "id": f"t-{number}",
                "function": "recite",
                "input": {"key": f"t-{number}", "pieces": 4, "ms": 200},
                "timeout_ms": 30_000,
            }
            topic = self.topics.build(TopicKind.TASK, client="pump-1")
            self.device.post(topic, json.dumps(task).encode())
            await asyncio.sleep(0.2)

    async def look(self) -> dict[str, bytes]:
        """Return what a newcomer finds kept at the broker."""
        kept: dict[str, bytes] = {}

        async def note(message: Message) -> None:
            if message.payload:
                kept[message.topic.removeprefix(f"{self.topics.root}/")] = message.payload
            else:
                kept.pop(message.topic.removeprefix(f"{self.topics.root}/"), None)

        async with MqttSession(settings=self.settings("admin-1")) as admin:
            for kind in (TopicKind.CAPABILITY, TopicKind.CATALOG, TopicKind.NODE_STATE):
                await admin.subscribe(self.topics.filter(kind), note)
            await admin.wait_connected(CONNECT_S)
            marks = -1
            while marks != len(kept):  # until nothing more comes
                marks = len(kept)
                await asyncio.sleep(0.5)
        return kept

    def connections(self) -> int:
        """Return how many connections the broker has."""
        served = 0
        for process in psutil.process_iter():
            try:
                served += sum(
                    link.status == psutil.CONN_ESTABLISHED and link.laddr.port == self.site.port
                    for link in process.net_connections("tcp4")
                )
            except (psutil.AccessDenied, psutil.NoSuchProcess):
                continue
        return served

    def records(self) -> set[tuple[str, str]]:
        return set(self.router.fleet.records)

    def live(self) -> set[str]:
        return {view.node for view in self.router.fleet.nodes.values() if view.live}


def all_of(*nodes: str) -> set[tuple[str, str]]:
    return {(node, spec.name) for node in nodes for spec in FUNCTIONS}


@pytest.fixture(
    params=[
        "embedded",
        pytest.param("mosquitto", marks=pytest.mark.external_broker),
        pytest.param("nats", marks=pytest.mark.external_broker),
    ]
)
async def mesh(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Mesh]:
    require_broker(request.param)
    store = CredentialStore(tmp_path / "credentials.json")
    passwords = {name: store.add(name, role) for name, role in ROLES.items()}
    site = BrokerSite(kind=request.param, engine=None, topics=Topics(), passwords=passwords)
    engine = make_engine(site, store, tmp_path, 0)
    async with engine, AsyncExitStack() as stack:
        made = Mesh(
            stack,
            BrokerSite(kind=request.param, engine=engine, topics=Topics(), passwords=passwords),
            tmp_path,
        )
        await made.start()
        yield made


async def test_two_hundred_restarts_leave_nothing_behind(mesh: Mesh, eventually: Any) -> None:
    async def come_to_rest(*, live: tuple[str, ...], known: tuple[str, ...]) -> dict[str, int]:
        await eventually(lambda: mesh.live() == set(live), timeout_s=WAIT_S)
        await eventually(lambda: mesh.records() == all_of(*known), timeout_s=WAIT_S)
        await eventually(lambda: len(mesh.router.dispatcher) == 0, timeout_s=WAIT_S)
        await eventually(
            lambda: mesh.connections() == len(live) + 3, timeout_s=WAIT_S
        )  # registry, router, device
        await asyncio.to_thread(gc.collect)
        return {
            "tasks": len(asyncio.all_tasks()),
            "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        }

    for node in mesh.nodes.values():
        await node.start()
    before = await come_to_rest(live=NODES, known=NODES)

    asking = asyncio.get_running_loop().create_task(mesh.ask(100))
    async with asyncio.TaskGroup() as group:
        for node in mesh.nodes.values():
            group.create_task(node.restart(RESTARTS // len(NODES)))
    await asking
    assert sum(sum(node.restarts.values()) for node in mesh.nodes.values()) == RESTARTS
    assert {how for node in mesh.nodes.values() for how in node.restarts} == {
        *("kill", "leave", "cut")
    }

    after = await come_to_rest(live=NODES, known=NODES)
    assert after["tasks"] <= before["tasks"] + 2  # what sweeps at the moment
    assert after["descriptors"] <= before["descriptors"] + 2
    views = mesh.router.fleet.nodes
    assert set(views) == set(NODES)
    assert {node: view.assigned for node, view in views.items() if view.assigned} == {}
    assert [view.given for view in views.values() if +view.given] == []
    assert {node: view.epoch for node, view in views.items()} == {
        node.name: node.epoch for node in mesh.nodes.values()
    }
    assert len(mesh.ends) == 100
    assert set(mesh.ends.values()) == {1}

    for name in LEAVE:
        await mesh.nodes[name].leave()
    for name in DIE:
        await mesh.nodes[name].die()
    await come_to_rest(live=STAY, known=STAY)
    kept = await mesh.look()
    states = {
        topic.split("/")[1]: json.loads(payload)["state"]
        for topic, payload in kept.items()
        if topic.startswith("node/")
    }
    assert states == {
        **dict.fromkeys(STAY, "birth"),
        **dict.fromkeys((*LEAVE, *DIE), "offline"),
    }
    catalogue = {tuple(topic.split("/")[1:]) for topic in kept if topic.startswith("catalog/")}
    assert catalogue == all_of(*STAY)
    claims = {tuple(topic.split("/")[1:]) for topic in kept if topic.startswith("capability/")}
    assert claims - all_of(*DIE) == all_of(*STAY)  # only their node may withdraw those
    stored = {one.record.key for one in await mesh.store.load() if not one.withdrawn}
    assert stored == all_of(*STAY)
    for name in STAY:
        await mesh.nodes[name].leave()
    await come_to_rest(live=(), known=())
