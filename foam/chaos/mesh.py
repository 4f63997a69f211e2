"""A real mesh to break: every process a child of ours, every connection through a proxy of ours.

The children are those of ``foam up``, run by the same supervisor; it restarts what dies. Each
member and each device reaches the broker by a proxy of its own, so that its link alone can be cut
or slow.
"""

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from broker.access.policy import Role
from broker.lifecycle import Service
from broker.nats_cluster import ClusterPlan, ClusterServer
from broker.ports import free_port
from broker.session.mqtt import MqttSession
from broker.session.settings import BrokerUrl, SessionSettings
from capability_schemas.errors import FoamError, InvalidTopic
from capability_schemas.provenance import Signer
from capability_schemas.reply import Chunk
from capability_schemas.topics import DEFAULT_SITE, TopicKind, Topics
from foam.chaos.device import DeviceClient
from foam.chaos.judge import Judge
from foam.chaos.link import Link
from foam.chaos.schedule import Words
from foam.chaos.twist import Twist
from foam.mesh import ADMIN_ID, REGISTRY_ID, ROUTER_ID, Identity, MeshFolder, MeshRecord, Person
from foam.sdk.address import MeshAddress, find_mesh
from foam.sdk.client import MeshClient
from foam.settings import Settings, child_environment
from foam.supervisor import Child, ChildSpec, Facts, RestartPolicy, Supervisor

__all__ = ["BROKER", "ChaosMesh", "MeshPlan"]

BROKER: Final = "broker"
_FUNCTIONS: Final = Path(__file__).resolve().parent / "functions.py"
_WITH_MODEL: Final = _FUNCTIONS.with_name("node.toml")
_ASKED: Final = (
    "which pumps run?",
    "list the state of all pumps",
    "are the pumps in hall 2 on or off?",
)
_FOREVER: Final = RestartPolicy(base_s=0.5, cap_s=4.0, limit=1_000_000, settled_s=5.0)
"""As in ``foam up``, but without end: here things die on purpose."""
_LOOPBACK: Final = "127.0.0.1"
_POLL_S: Final = 0.2
_DOUBLED: Final = 0.3
"""Share of the messages delivered again on a link that is twisted."""
_NODE_STOP_S: Final = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """What is to be broken.

    Attributes:
        data: An empty folder.
        engine: Broker: ``embedded``, ``mosquitto`` or ``nats``.
        nodes: Nodes that run `foam.chaos.functions`.
        devices: Clients.
        routers: Routers that share the tasks.
        registries: Registries, of which one leads.
        brokers: Servers of the broker; several are a cluster of ``nats``.
        model: Whether the nodes offer a language model, too.
        twisted: Whether all deliveries are twisted from the beginning, each repeated at least once
            (`foam.chaos.twist`).
        start_s: How long the mesh may take to start, seconds.
    """

    data: Path
    engine: str
    nodes: int
    devices: int
    routers: int = 1
    registries: int = 1
    brokers: int = 1
    model: bool = False
    twisted: bool = False
    start_s: float = 120.0

    @property
    def registry_names(self) -> list[str]:
        """The registries, that of the mesh first."""
        return [REGISTRY_ID, *(f"registry-{number}" for number in range(2, self.registries + 1))]

    @property
    def broker_names(self) -> list[str]:
        """The servers of the broker."""
        return [BROKER, *(f"{BROKER}-{number}" for number in range(2, self.brokers + 1))]

    @property
    def router_names(self) -> list[str]:
        """The routers, that of the mesh first."""
        return [ROUTER_ID, *(f"router-{number}" for number in range(2, self.routers + 1))]

    @property
    def node_names(self) -> list[str]:
        """The nodes that run `foam.chaos.functions`."""
        return [f"chaos-{number}" for number in range(1, self.nodes + 1)]

    @property
    def device_names(self) -> list[str]:
        """The clients."""
        return [f"device-{number}" for number in range(1, self.devices + 1)]


class ChaosMesh(Service):
    """The mesh; entering it returns when every function can be served.

    Args:
        plan: What to run.
        judge: Hears what the devices get.
        clock: Milliseconds, the same for the judge.
        seed: Of what the devices draw.
        notify: Told in one sentence what the supervisor does.

    Attributes:
        links: The way of each member and device to the broker, by name.
        clients: The devices, by name.
        words: What the language model answers while nobody disturbs it; empty without one.
        twisted: How many messages of each kind were delivered out of order or again.
    """

    stop_timeout_s = 90.0

    def __init__(
        self,
        *,
        plan: MeshPlan,
        judge: Judge,
        clock: Callable[[], int],
        seed: str,
        notify: Callable[[str], None],
    ) -> None:
        super().__init__(service_id="chaos")
        self.links: dict[str, Link] = {}
        self.clients: dict[str, DeviceClient] = {}
        self.words: list[Words] = []
        self.twisted: Counter[TopicKind] = Counter()
        self._plan = plan
        self._judge = judge
        self._clock = clock
        self._seed = seed
        self._topics = Topics()
        self._folder = MeshFolder(plan.data)
        self._supervisor = Supervisor(policy=_FOREVER, notify=notify)
        self._children: dict[str, Child] = {}
        self._sessions: list[MqttSession] = []
        self._url = ""

    @property
    def members(self) -> list[str]:
        """The processes: broker, registry, router, nodes."""
        return list(self._children)

    def database(self, member: str) -> Path:
        """Return the database of a router or the registry."""
        if member in self._plan.registry_names:
            return self._folder.registry_files(member)[0]
        return self._folder.router_files(member)[0]

    def pid(self, member: str) -> int | None:
        """Return the process of a member, which leads a group; None while it has none."""
        return self._supervisor.pids.get(member)

    def signal(self, member: str, number: signal.Signals) -> bool:
        """Send a signal to a member and all below it; tell whether there was anybody."""
        pid = self.pid(member)
        if pid is None:
            return False
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            return False
        return True

    async def add_link(self, name: str) -> str:
        """Make a link to the broker, for one more client; returns its URL."""
        twist = Twist(
            chance=random.Random(f"{self._seed}/twist/{name}"),  # noqa: S311  # a test, no secret
            note=self._on_twisted,
            active=self._plan.twisted,
            doubled=1.0 if self._plan.twisted else _DOUBLED,
        )
        link = self.links[name] = Link.of(self._url, twist=twist, turn=len(self.links))
        await link.start()
        return link.url

    def admin_session(self) -> MqttSession:
        """Make a session for an administrator, past all proxies."""
        return self._session(self._folder.identity(ADMIN_ID), self._url)

    def admin_signer(self) -> Signer:
        """Load what that administrator signs its questions with.

        Raises:
            ConfigurationError: Its key cannot be read.
        """
        identity = self._folder.identity(ADMIN_ID)
        key = self._folder.signing_key(identity)
        return Signer(identity=identity.id, key=key, passport=identity.passport)

    async def _on_start(self) -> None:
        async with asyncio.timeout(self._plan.start_s):
            await self._bring_up()

    async def _bring_up(self) -> None:
        await asyncio.to_thread(self._folder.prepare)
        plan = self._plan
        file = str(_WITH_MODEL if plan.model else _FUNCTIONS)
        await asyncio.to_thread(self._enroll)
        await self._supervisor.start()
        if plan.brokers > 1:
            await asyncio.to_thread(self._plan_cluster)
        servers = [
            self._add(name, partial(self._broker_command, seat), "")
            for seat, name in enumerate(plan.broker_names, 1)
        ]
        self._url = ",".join([str((await server.wait_ready())["url"]) for server in servers])
        await asyncio.to_thread(self._write_record)
        for name in (*plan.registry_names, *plan.router_names, *plan.node_names):
            await self.add_link(name)
        for name in plan.device_names:
            await self.add_link(name)
        commands = {
            **{name: ("registry", "--id", name) for name in plan.registry_names},
            **{name: ("router", "--id", name) for name in plan.router_names},
            **{name: ("node", file, "--id", name) for name in plan.node_names},
        }
        added = [
            self._add(name, partial(_fixed, self._command(*arguments)), self._link(name))
            for name, arguments in commands.items()
        ]
        for child in added:
            await child.wait_ready()
        async with MeshClient.at(
            await asyncio.to_thread(self._admin_address), connect_timeout_s=None
        ) as client:
            await self._wait_served(client, plan.nodes)
            if plan.model:
                self.words = [await _learnt(client, text) for text in _ASKED]
        for name in plan.device_names:
            await self._start_device(name)

    async def _on_stop(self) -> None:
        for session in self._sessions:
            await session.stop()
        for member in self._children:
            self.signal(member, signal.SIGCONT)
        await self._supervisor.stop()

    async def _on_stopped(self) -> None:
        for link in self.links.values():
            await link.stop()

    def _on_twisted(self, topic: str) -> None:
        with contextlib.suppress(InvalidTopic):
            self.twisted[self._topics.parse(topic).kind] += 1

    def _enroll(self) -> None:
        wanted = {
            **dict.fromkeys(self._plan.registry_names, Role.REGISTRY),
            **dict.fromkeys(self._plan.router_names, Role.ROUTER),
            ADMIN_ID: Role.ADMIN,
            **dict.fromkeys(self._plan.node_names, Role.NODE),
            **dict.fromkeys(self._plan.device_names, Role.DEVICE),
        }
        for name, role in wanted.items():
            self._folder.ensure(name, role, site=DEFAULT_SITE)

    def _write_record(self) -> None:
        people = [
            Person(id=known.id, username=known.username or known.id, password=known.password)
            for known in map(self._folder.identity, (self._plan.device_names[0], ADMIN_ID))
        ]
        record = MeshRecord(broker=self._url, site=DEFAULT_SITE, device=people[0], admin=people[1])
        self._folder.write_record(record)

    def _add(self, name: str, command: Callable[[Facts | None], Sequence[str]], url: str) -> Child:
        extra = {"FOAM_URL": url, "FOAM_SITE": DEFAULT_SITE} if url else {}
        child = self._children[name] = self._supervisor.add(
            ChildSpec(
                name=name,
                command=command,
                log=self._folder.logs / f"{name}.log",
                environment=child_environment(**extra),
                stop_s=_NODE_STOP_S,
            )
        )
        return child

    def _plan_cluster(self) -> None:
        servers = tuple(
            ClusterServer(name=f"foam-{seat}", host=_LOOPBACK, port=free_port(_LOOPBACK))
            for seat in range(1, self._plan.brokers + 1)
        )
        ClusterPlan.of(servers).write(self._folder.cluster_plan)

    def _broker_command(self, seat: int, facts: Facts | None) -> Sequence[str]:
        port = 0 if facts is None else BrokerUrl.parse(str(facts["url"])).port
        seated = ("--seat", str(seat)) if self._plan.brokers > 1 else ()
        engine = ("--engine", self._plan.engine, "--port", str(port))
        return self._command("broker", *engine, *seated)

    def _command(self, *arguments: str) -> Sequence[str]:
        data = ("--data", str(self._folder.path), "--supervised")
        return (sys.executable, "-m", "foam", *arguments, *data)

    def _link(self, name: str) -> str:
        return self.links[name].url

    def _admin_address(self) -> MeshAddress:
        return find_mesh(Settings(data=self._folder.path), admin=True)

    async def _wait_served(self, client: MeshClient, nodes: int) -> None:
        while True:
            try:
                live = {node for node, _ in await client.live_functions()}
            except FoamError:
                live = set()
            if len(live) == nodes:
                return
            await asyncio.sleep(_POLL_S)

    async def _start_device(self, name: str) -> None:
        session = self._session(self._folder.identity(name), self._link(name))
        client = self.clients[name] = DeviceClient(
            client=name,
            session=session,
            topics=self._topics,
            judge=self._judge,
            clock=self._clock,
            chance=random.Random(f"{self._seed}/{name}"),  # noqa: S311  # a test, no secret
        )
        await session.start()
        self._sessions.append(session)
        await session.wait_connected()
        await client.listen()
        self.spawn(client.nag(), name=f"nag.{name}")

    def _session(self, identity: Identity, url: str) -> MqttSession:
        return MqttSession(
            settings=SessionSettings(
                urls=BrokerUrl.parse_all(url),
                client_id=f"{identity.id}-chaos",
                username=identity.username,
                password=identity.password,
            )
        )


def _fixed(command: Sequence[str], _facts: Facts | None) -> Sequence[str]:
    return command


async def _learnt(client: MeshClient, text: str) -> Words:
    """Ask the model, and keep its answer."""
    function = "list"
    handle = await client.submit(text, function=function)
    shown = [str(event.data) async for event in handle if isinstance(event, Chunk)]
    result = await handle.result()
    return Words(text=text, function=function, shown="".join(shown), output=result.output)
