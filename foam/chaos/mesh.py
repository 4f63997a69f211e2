"""A real mesh to break: every process a child of ours, every connection through a proxy of ours.

The children are those of ``foam up``, run by the same supervisor; it restarts what dies. Each
member and each device reaches the broker by a proxy of its own, so that its link alone can be cut
or slow.
"""

import asyncio
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from broker.access.policy import Role
from broker.lifecycle import Service
from broker.session.mqtt import MqttSession
from broker.session.settings import BrokerUrl, SessionSettings
from capability_schemas.errors import FoamError
from capability_schemas.provenance import Signer
from capability_schemas.topics import DEFAULT_SITE, Topics
from foam.chaos.device import DeviceClient
from foam.chaos.judge import Judge
from foam.chaos.proxy import TcpProxy
from foam.mesh import ADMIN_ID, REGISTRY_ID, ROUTER_ID, Identity, MeshFolder, MeshRecord, Person
from foam.nodefile import NodeHead
from foam.sdk.address import MeshAddress, find_mesh
from foam.sdk.client import MeshClient
from foam.settings import Settings, child_environment
from foam.supervisor import Child, ChildSpec, Facts, RestartPolicy, Supervisor

__all__ = ["BROKER", "ChaosMesh", "MeshPlan"]

BROKER: Final = "broker"
_FUNCTIONS: Final = Path(__file__).resolve().parent / "functions.py"
_FOREVER: Final = RestartPolicy(base_s=0.5, cap_s=4.0, limit=1_000_000, settled_s=5.0)
"""As in ``foam up``, but without end: here things die on purpose."""
_POLL_S: Final = 0.2
_NODE_STOP_S: Final = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """What is to be broken.

    Attributes:
        data: An empty folder.
        engine: Broker: ``embedded``, ``mosquitto`` or ``nats``.
        nodes: Nodes that run `foam.chaos.functions`.
        devices: Clients.
        node_files: Further nodes.
        start_s: How long the mesh may take to start, seconds.
    """

    data: Path
    engine: str
    nodes: int
    devices: int
    node_files: Sequence[Path] = ()
    start_s: float = 120.0

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
        proxies: The link of each member and device, by name.
        clients: The devices, by name.
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
        self.proxies: dict[str, TcpProxy] = {}
        self.clients: dict[str, DeviceClient] = {}
        self._plan = plan
        self._judge = judge
        self._clock = clock
        self._seed = seed
        self._folder = MeshFolder(plan.data)
        self._supervisor = Supervisor(policy=_FOREVER, notify=notify)
        self._children: dict[str, Child] = {}
        self._sessions: list[MqttSession] = []
        self._url = ""

    @property
    def members(self) -> list[str]:
        """The processes: broker, registry, router, nodes."""
        return list(self._children)

    @property
    def router_database(self) -> Path:
        """The router's journal."""
        return self._folder.router_database

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
        files = {str(NodeHead.read(path).id): path for path in self._plan.node_files}
        files |= dict.fromkeys(self._plan.node_names, _FUNCTIONS)
        await asyncio.to_thread(self._enroll, list(files))
        await self._supervisor.start()
        broker = self._add(BROKER, self._broker_command, "")
        facts = await broker.wait_ready()
        self._url = str(facts["url"])
        await asyncio.to_thread(self._write_record)
        target = BrokerUrl.parse(self._url)
        for name in (REGISTRY_ID, ROUTER_ID, *files, *self._plan.device_names):
            proxy = self.proxies[name] = TcpProxy(host=target.host, port=target.port)
            await proxy.start()
        added = [
            self._add(REGISTRY_ID, lambda _: self._command("registry"), self._link(REGISTRY_ID)),
            self._add(ROUTER_ID, lambda _: self._command("router"), self._link(ROUTER_ID)),
        ]
        for name, path in files.items():
            command = self._command("node", str(path), "--id", name)
            added.append(self._add(name, partial(_fixed, command), self._link(name)))
        for child in added:
            await child.wait_ready()
        await self._wait_served(len(files))
        for name in self._plan.device_names:
            await self._start_device(name)

    async def _on_stop(self) -> None:
        for session in self._sessions:
            await session.stop()
        for member in self._children:
            self.signal(member, signal.SIGCONT)
        await self._supervisor.stop()

    async def _on_stopped(self) -> None:
        for proxy in self.proxies.values():
            await proxy.stop()

    def _enroll(self, nodes: Sequence[str]) -> None:
        wanted = {
            REGISTRY_ID: Role.REGISTRY,
            ROUTER_ID: Role.ROUTER,
            ADMIN_ID: Role.ADMIN,
            **dict.fromkeys(nodes, Role.NODE),
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

    def _broker_command(self, facts: Facts | None) -> Sequence[str]:
        port = 0 if facts is None else BrokerUrl.parse(str(facts["url"])).port
        return self._command("broker", "--engine", self._plan.engine, "--port", str(port))

    def _command(self, *arguments: str) -> Sequence[str]:
        data = ("--data", str(self._folder.path), "--supervised")
        return (sys.executable, "-m", "foam", *arguments, *data)

    def _link(self, name: str) -> str:
        return self.proxies[name].url

    def _admin_address(self) -> MeshAddress:
        return find_mesh(Settings(data=self._folder.path), admin=True)

    async def _wait_served(self, nodes: int) -> None:
        address = await asyncio.to_thread(self._admin_address)
        async with MeshClient.at(address, connect_timeout_s=None) as mesh:
            while True:
                try:
                    live = {node for node, _ in await mesh.live_functions()}
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
            topics=Topics(),
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
                urls=(url,),
                client_id=f"{identity.id}-chaos",
                username=identity.username,
                password=identity.password,
            )
        )


def _fixed(command: Sequence[str], _facts: Facts | None) -> Sequence[str]:
    return command
