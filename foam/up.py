"""``foam up``: a whole mesh on one machine.

Order: the folder is locked, identities are made, the broker starts; registry, router and nodes
start together and wait for each other over the broker; when the router lists every function of
every node as live, the line ``FOAM READY {json}`` goes to stdout. Stopping runs the other way
round: nodes drain first, together, then the routers, the registries, and the broker goes last.
"""

import asyncio
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from broker.access.policy import Role
from broker.lifecycle import ProcessEnd
from broker.session.settings import BrokerUrl
from broker.tls import TlsSettings
from capability_schemas.errors import ConfigurationError, FoamError
from capability_schemas.provenance import Signer
from foam.listening import LOOPBACK, Listeners
from foam.log_files import keep_small
from foam.logging import configure_logging
from foam.mesh import (
    ADMIN_ID,
    DEVICE_ID,
    REGISTRY_ID,
    ROUTER_ID,
    MeshFolder,
    MeshRecord,
    Person,
    load_signer,
)
from foam.nodefile import NodeHead
from foam.process import STDIN
from foam.sdk.address import MeshAddress, external_person
from foam.settings import Settings, child_environment
from foam.supervisor import Child, ChildSpec, Facts, RestartPolicy, Supervisor
from foam.wiring import ENGINES, engine_available

__all__ = ["UpPlan", "choose_engine", "run_up"]

_POLL_S: Final = 0.1
_NOTICE_AFTER_S: Final = 20.0
_KILLED: Final = 130
"""Exit code of a command that Ctrl-C ended (`foam.cli.codes`)."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpPlan:
    """What ``foam up`` was asked for.

    Attributes:
        broker: Name of an engine of `foam.wiring.ENGINES`, a broker URL (of a cluster several,
            separated by commas), or None to choose.
        listeners: Where a broker of our own listens.
        site: Site level of the topics.
        nodes: Declarations of the nodes to run.
        routers: How many routers share the tasks.
        registries: How many registries there are, of which one leads.
        brokers: How many servers the broker is; several are a cluster of ``nats``.
        access: How Mosquitto learns of rights, ``static`` or ``dynamic``; None: as it can.
        policy: When crashed children are restarted; the default when None.
        unsigned_admin: Whether requests of administrators have to be signed: ``allow``,
            ``refuse``, or None for what fits the broker.
        supervised: Whether standard input is a pipe whose end means that the parent is gone.
    """

    broker: str | None
    listeners: Listeners
    site: str
    nodes: tuple[Path, ...]
    routers: int = 1
    registries: int = 1
    brokers: int = 1
    access: str | None = None
    policy: RestartPolicy | None = None
    unsigned_admin: str | None = None
    supervised: bool = False


def choose_engine(wanted: str | None, *, servers: int = 1) -> tuple[str, str]:
    """Decide which broker engine runs.

    Args:
        wanted: What was asked for; None lets the machine decide.
        servers: How many servers it shall be.

    Returns:
        Its name, and the reason in words.

    Raises:
        ConfigurationError: There is no such engine, its program is not on this machine, or it is
            no cluster.
    """
    if servers > 1 and wanted not in {None, "nats"}:
        raise ConfigurationError(
            f"broker {wanted!r} runs as one server: --brokers {servers} needs --broker nats"
        )
    if servers > 1:
        wanted = "nats"
    if wanted is None:
        if engine_available("mosquitto"):
            return "mosquitto", "its program is on this machine"
        return "embedded", "no mosquitto on this machine"
    if wanted not in ENGINES:
        raise ConfigurationError(
            f"broker {wanted!r}: use {', '.join(sorted(ENGINES))} or a URL mqtt://host:port",
            broker=wanted,
        )
    if not engine_available(wanted):
        raise ConfigurationError(
            f"broker {wanted!r}: its program is not on this machine; "
            "install it, or use --broker embedded"
        )
    return wanted, "as asked"


class _Up:
    """One run of ``foam up``: makes identities, starts children in order, says READY.

    Args:
        settings: Environment and options.
        plan: What to run.
        folder: The prepared and locked data folder.
        supervisor: Runs the children.
        say: Takes sentences for the person who watches.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        plan: UpPlan,
        folder: MeshFolder,
        supervisor: Supervisor,
        say: Any,
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._folder = folder
        self._supervisor = supervisor
        self._say = say
        self._turns = itertools.count()

    async def bring_up(self) -> None:
        """Start everything and return once the READY line is out."""
        nodes = [(str(NodeHead.read(path).id), path) for path in self._plan.nodes]
        names = [node for node, _ in nodes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigurationError(
                f"two nodes are named {', '.join(twice)}: give the files different names, "
                "or [node] tables with different ids"
            )
        external = self._external()
        person = external_person(external[0]) if external else None
        people = await asyncio.to_thread(self._make_identities, names, person)
        shared = {"url": ",".join(map(str, external))}
        facts: Facts = shared if external else await self._start_broker()
        url = str(facts["url"])
        record = MeshRecord(
            broker=url,
            public=tuple(facts.get("public", ())),
            members=tuple(facts.get("members", ())),
            websocket=tuple(facts.get("websocket", ())),
            certificates=bool(facts.get("certificates", False)),
            site=self._plan.site,
            device=people[0],
            admin=people[1],
            own_broker=not external,
            ca=None if external or not facts.get("public") else self._authority(),
        )
        await asyncio.to_thread(self._folder.write_record, record)
        environment = self._environment(url, person)
        children = [
            self._add("registry", ("registry",), environment, group="registry"),
            *(
                self._add(registry, ("registry", "--id", registry), environment, group="registry")
                for registry in self._registries()[1:]
            ),
            self._add("router", ("router",), environment, group="router"),
            *(
                self._add(router, ("router", "--id", router), environment, group="router")
                for router in self._routers()[1:]
            ),
        ]
        workers = [
            self._add(
                f"node-{node}",
                ("node", str(path), "--id", node),
                environment,
                stop_s=25.0,
                spare=True,
                group="node",
            )
            for node, path in nodes
        ]
        async with asyncio.TaskGroup() as group:
            waits = [
                group.create_task(child.wait_ready(), name=f"foam.up.ready.{child.spec.name}")
                for child in (*children, *workers)
            ]
        expected = {
            (str(wait.result()["id"]), str(function))
            for wait in waits[len(children) :]
            for function in wait.result()["functions"]
        }
        await self._wait_served(record, expected)
        self._say_ready(record, names, sorted(name for _, name in expected))

    def _routers(self) -> list[str]:
        """Return the ids of the routers, that of the mesh first."""
        return [ROUTER_ID, *(f"router-{number}" for number in range(2, self._plan.routers + 1))]

    def _registries(self) -> list[str]:
        """Return the ids of the registries, that of the mesh first."""
        count = self._plan.registries
        return [REGISTRY_ID, *(f"registry-{number}" for number in range(2, count + 1))]

    def _external(self) -> tuple[BrokerUrl, ...]:
        broker = self._plan.broker
        if broker is None or "://" not in broker:
            return ()
        if self._plan.brokers > 1:
            raise ConfigurationError("--brokers is for brokers of our own: name theirs in --broker")
        urls = BrokerUrl.parse_all(broker)
        names = ", ".join(map(str, urls))
        self._say(f"broker: {names}, not ours: its access rules are left as they are")
        return urls

    def _make_identities(
        self, nodes: Sequence[str], external: Person | None
    ) -> tuple[Person, Person]:
        made = [
            self._folder.ensure(identity, role, site=self._plan.site, external=external)
            for identity, role in (
                *((registry, Role.REGISTRY) for registry in self._registries()),
                *((router, Role.ROUTER) for router in self._routers()),
                (DEVICE_ID, Role.DEVICE),
                (ADMIN_ID, Role.ADMIN),
                *((node, Role.NODE) for node in nodes),
            )
        ]
        people = {identity.id: identity for identity in made}

        def person(identity: str) -> Person:
            if external is not None:
                return external
            known = people[identity]
            return Person(id=identity, username=known.username or identity, password=known.password)

        return person(DEVICE_ID), person(ADMIN_ID)

    async def _start_broker(self) -> Facts:
        count = self._plan.brokers
        engine, reason = choose_engine(self._plan.broker, servers=count)
        self._say(f"broker: {engine} ({reason if count == 1 else f'{count} servers'})")
        if count == 1:
            children = [self._add_broker(engine)]
        else:
            await asyncio.to_thread(self._plan_cluster, count)
            children = [self._add_broker(engine, seat) for seat in range(1, count + 1)]
        facts = [await child.wait_ready() for child in children]
        joined = {
            "url": ",".join(str(one["url"]) for one in facts),
            "certificates": all(one.get("certificates", False) for one in facts),
            **{
                name: [url for one in facts for url in one.get(name, ())]
                for name in ("public", "members", "websocket")
            },
        }
        self._say_listeners(joined)
        return joined

    def _plan_cluster(self, count: int) -> None:
        """Write down where the servers find each other: anew at each start, while none runs."""
        from broker.nats_cluster import ClusterPlan, ClusterServer
        from broker.ports import free_port

        ClusterPlan.of(
            tuple(
                ClusterServer(name=f"foam-{seat}", host=LOOPBACK, port=free_port(LOOPBACK))
                for seat in range(1, count + 1)
            )
        ).write(self._folder.cluster_plan)

    def _add_broker(self, engine: str, seat: int | None = None) -> Child:
        def command(facts: Facts | None) -> Sequence[str]:
            listeners = self._plan.listeners.shifted((seat or 1) - 1)
            if facts is not None:  # it was up before: whoever knows it finds it where it was
                listeners = listeners.where_it_was(facts)
            arguments = ["--engine", engine, *listeners.arguments(), "--site", self._plan.site]
            if self._plan.access is not None:
                arguments += ["--access", self._plan.access]
            if seat is not None:
                arguments += ["--seat", str(seat)]
            return self._command(("broker", *arguments))

        name = "broker" if seat in {None, 1} else f"broker-{seat}"
        return self._supervisor.add(
            ChildSpec(
                name=name,
                command=command,
                log=self._folder.logs / f"{name}.log",
                environment=child_environment(),
                group="broker",
            )
        )

    def _say_listeners(self, facts: Facts) -> None:
        public = facts.get("public", ())
        apart = [url for url in facts.get("members", ()) if url not in public]
        for what, urls in (
            ("with TLS", public),
            ("with TLS, for members with a certificate,", apart),
            ("over WebSocket", facts.get("websocket", ())),
        ):
            for url in urls:
                self._say(f"broker: {what} at {url}")

    def _add(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        stop_s: float = 10.0,
        spare: bool = False,
        group: str = "",
    ) -> Child:
        return self._supervisor.add(
            ChildSpec(
                name=name,
                command=lambda _: self._command(arguments),
                log=self._folder.logs / f"{name}.log",
                environment=self._spread(environment),
                stop_s=stop_s,
                spare=spare,
                group=group,
            )
        )

    def _command(self, arguments: Sequence[str]) -> Sequence[str]:
        return (
            sys.executable,
            "-m",
            "foam",
            *arguments,
            "--data",
            str(self._folder.path),
            "--supervised",
        )

    def _environment(self, url: str, person: Person | None) -> dict[str, str]:
        """Tell the children where to connect: secrets by environment, never by argument."""
        extra = {"FOAM_URL": url, "FOAM_SITE": self._plan.site}
        if (authority := self._folder.broker_authority(url)) is not None and person is None:
            extra["FOAM_CA"] = str(authority)
        if self._plan.unsigned_admin is not None:
            extra["FOAM_UNSIGNED_ADMIN"] = self._plan.unsigned_admin
        if person is not None and self._plan.broker is not None:
            extra["FOAM_URL"] = self._plan.broker  # each broker of a list with its own credentials
        return child_environment(**extra)

    def _spread(self, environment: Mapping[str, str]) -> Mapping[str, str]:
        """Have each member begin with another server of our cluster than the one before."""
        if self._plan.brokers == 1:
            return environment
        urls = environment["FOAM_URL"].split(",")
        turn = next(self._turns) % len(urls)
        return {**environment, "FOAM_URL": ",".join(urls[turn:] + urls[:turn])}

    async def _wait_served(self, record: MeshRecord, expected: set[tuple[str, str]]) -> None:
        from foam.sdk.client import MeshClient  # loaded now: the children already start meanwhile

        address = MeshAddress(
            url=record.broker,
            site=record.site,
            client=record.admin.id,
            username=record.admin.username,
            password=record.admin.password,
            router=record.router,
            signer=await asyncio.to_thread(self._admin_signer),
            tls=TlsSettings(
                ca_file=self._folder.broker_authority(record.broker) if record.own_broker else None
            ),
        )
        loop = asyncio.get_running_loop()
        notice_at = loop.time() + _NOTICE_AFTER_S
        missing = expected
        async with MeshClient.at(address, connect_timeout_s=None) as mesh:
            while True:
                try:
                    missing = expected - await mesh.live_functions()
                    if not missing:
                        return
                except FoamError as error:
                    _log.info("up.router_silent", error=error.message)
                if loop.time() > notice_at:
                    names = ", ".join(sorted(f"{node}/{name}" for node, name in missing))
                    self._say(
                        f"still waiting for {names or 'the router'}; "
                        f"logs are in {self._folder.logs}"
                    )
                    notice_at = loop.time() + _NOTICE_AFTER_S
                await asyncio.sleep(_POLL_S)

    def _authority(self) -> str | None:
        path = self._folder.authority_certificate()
        return None if path is None else str(path)

    def _admin_signer(self) -> Signer | None:
        identity = self._folder.identity(ADMIN_ID)
        return load_signer(identity, self._folder.identity_path(ADMIN_ID).parent)

    def _say_ready(
        self, record: MeshRecord, nodes: Sequence[str], functions: Sequence[str]
    ) -> None:
        facts = {
            "broker": record.broker,
            "public": list(record.public),
            "members": list(record.members),
            "websocket": list(record.websocket),
            "ca": record.ca,
            "site": record.site,
            "device": record.device.shown(),
            "admin": record.admin.shown(),
            "data": str(self._folder.path),
            "router": record.router,
            "routers": self._routers(),
            "registry": record.registry,
            "registries": self._registries(),
            "nodes": list(nodes),
            "functions": list(functions),
            "pid": os.getpid(),
        }
        sys.stdout.write(f"FOAM READY {json.dumps(facts)}\n")
        sys.stdout.flush()
        self._say("ready; Ctrl-C stops it")


async def run_up(settings: Settings, plan: UpPlan) -> int:
    """Run a whole mesh until SIGTERM, Ctrl-C or a failure that cannot be mended.

    Args:
        settings: Environment and options.
        plan: What to run.

    Returns:
        Exit code: 0 after an orderly stop, 130 after one that was cut short.

    Raises:
        FoamError: What made it impossible to go on, in one sentence.
    """

    def say(sentence: str) -> None:
        sys.stderr.write(f"foam: {sentence}\n")
        sys.stderr.flush()

    folder = MeshFolder(settings.data).prepare()
    with folder.locked(), (folder.logs / "up.log").open("a") as log:
        configure_logging(settings.log_level, process="up", stream=log)
        async with (
            ProcessEnd(parent_fd=STDIN if plan.supervised else None) as end,
            Supervisor(policy=plan.policy, notify=say) as supervisor,
        ):
            up = _Up(settings=settings, plan=plan, folder=folder, supervisor=supervisor, say=say)
            supervisor.spawn(keep_small(folder.logs), name="logs")
            supervisor.spawn(up.bring_up(), name="bring-up")
            reason = await end.wait(supervisor)
            say(f"stopping ({reason}); once more kills")
            impatient = supervisor.spawn(_kill(end, supervisor), name="kill")
    return _KILLED if impatient.done() and not impatient.cancelled() else 0


async def _kill(end: ProcessEnd, supervisor: Supervisor) -> None:
    """Kill all children once somebody insists."""
    await end.wait_insisted()
    supervisor.kill()
