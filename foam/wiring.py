"""The only place that joins concrete classes into processes.

`run_broker`, `run_registry`, `run_router` and `run_node` are each the whole life of one process:
settings in, sessions and services entered in order, ready reported, everything left in reverse
order on SIGTERM, SIGINT or the death of the parent. Nothing here decides anything about tasks.

Imports stand inside the functions on purpose: a node process must not load what only a router needs
(numpy and the encoder), and the broker process none of either.
"""

import asyncio
import os
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import structlog

from broker.access.policy import Role
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    ConfigurationError,
    Conflict,
    Unavailable,
)
from capability_schemas.ids import now_ms
from capability_schemas.topics import DEFAULT_SITE, Topics
from foam.listening import BrokerPapers, Listeners, own_names
from foam.member import Member
from foam.mesh import REGISTRY_ID, ROUTER_ID, MeshFolder, load_key
from foam.nodefile import NodeHead, place_problems, placed
from foam.process import STDIN, Process, run_process
from foam.settings import Settings
from foam.status import ProcessStatus

if TYPE_CHECKING:
    from broker.engine import BrokerEngine
    from broker.session.base import WillFactory
    from capability_schemas.functions import FunctionSpec
    from capability_schemas.problem import Problem
    from node_agent.declaration import Declaration
    from node_agent.declaration.watch import SourceWatch
    from registry.encoders.thread import EncoderThread
    from registry.store.audit import AuditLog

__all__ = [
    "ENGINES",
    "check_node",
    "engine_available",
    "run_broker",
    "run_node",
    "run_registry",
    "run_router",
]

ENGINES: Final = ("embedded", "mosquitto", "nats")
_WAITING_AFTER_S: Final = 3.0
_WAITING_AGAIN_S: Final = 30.0
_ACCESS_POLL_S: Final = 0.5
_ACCESS_TRIES: Final = 5
_PAPERS_POLL_S: Final = 60.0
_WATCH_S: Final = 1.0
"""How often a node looks for edits of its declaration, seconds."""

_WARM_S: Final = 60.0
"""How long a node's readiness waits for its warm instances, seconds (a large model is slow)."""
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def _session(
    member: Member, will: "WillFactory | None" = None, *, clean: bool = True
) -> MqttSession:
    """Make a member's session; its MQTT client id is the identity (PROTOCOL section 6)."""
    return MqttSession(
        settings=SessionSettings(
            urls=(member.url,),
            client_id=member.identity.id,
            username=member.username,
            password=member.password,
            tls=member.tls,
            clean=clean,
        ),
        will=will,
    )


async def _connect(process: Process, session: MqttSession, url: str) -> None:
    """Enter the session and wait for the broker, saying so when it takes long.

    Raises:
        AccessDenied: The broker refuses the identity.
    """
    await process.enter(session)
    patience_s = _WAITING_AFTER_S
    while True:
        try:
            await session.wait_connected(patience_s)
        except BrokerUnavailable:
            process.status.waiting(f"the broker {url} does not answer; waiting for it")
            patience_s = _WAITING_AGAIN_S
        else:
            return


def _keep_papers(process: Process, member: Member, session: MqttSession) -> None:
    """Have an enrolled member renew its papers as long as it runs."""
    from foam.renewal import Renewal

    if member.identity.renew_at is None:
        return
    renewal = Renewal(
        identity=member.identity,
        folder=member.folder,
        key=load_key(member.identity, member.folder),
        session=session,
        topics=Topics(site=member.site),
    )
    process.spawn(renewal.keep(), name="papers")


async def _wait_for_access(member: Member) -> None:
    """Wait until the running broker has read the access rules of a member made just now.

    A refusal is final for a session, so this asks with sessions of its own. Returns after a bounded
    number of refusals, and when the broker is not there: the member's own session tells.
    """
    for _ in range(_ACCESS_TRIES):
        await asyncio.sleep(2 * _ACCESS_POLL_S)
        try:
            async with _session(member) as session:
                await session.wait_connected(_WAITING_AFTER_S)
        except AccessDenied:
            continue
        except BrokerUnavailable:
            pass
        return


async def run_broker(
    settings: Settings, *, engine: str, listeners: Listeners, status: ProcessStatus
) -> int:
    """Run a broker over the identities of the data folder until told to end.

    Args:
        settings: Data folder and site.
        engine: One of `ENGINES`.
        listeners: Where to listen.
        status: Where readiness is reported.

    Raises:
        ConfigurationError: The port is in use, the program is missing, the folder unusable.
        Unavailable: The broker ended by itself.
    """
    from broker.access.credentials import CredentialStore

    folder = MeshFolder(settings.data).prepare()
    store = CredentialStore(folder.credentials_file)
    passwords = folder.passwords() if engine == "nats" else {}
    site = settings.site or DEFAULT_SITE
    papers: BrokerPapers | None = None
    if listeners.tls_host is not None:
        names = dict.fromkeys((*own_names(listeners.tls_host), *listeners.names))
        papers = BrokerPapers(folder, site=site, names=list(names))
        await asyncio.to_thread(papers.refresh)

    async def assemble(process: Process) -> Mapping[str, Any]:
        made = _engine(
            engine, folder, listeners=listeners, papers=papers, site=site, passwords=passwords
        )
        runner = await process.enter(_EngineRunner(made))
        process.spawn(_follow_access(store, made, passwords, folder, papers), name="access")
        return {
            "url": runner.engine.url,
            "engine": engine,
            "certificates": papers is not None and made.traits.certificates,
            "public": [
                f"mqtts://{f'[{name}]' if ':' in name else name}:{runner.engine.tls_port}"
                for name in (papers.names if papers is not None else ())
            ],
        }

    return await run_process(Process(name="broker", assemble=assemble, status=status))


class _EngineRunner:
    """A broker engine whose end is an error, for this process exists for it alone."""

    def __init__(self, engine: "BrokerEngine") -> None:
        self.engine = engine
        self._leaving = False

    async def __aenter__(self) -> Self:
        await self.engine.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leaving = True
        await self.engine.__aexit__(kind, error, trace)

    async def wait(self) -> None:
        code = await self.engine.wait()
        if self._leaving:
            return
        raise Unavailable(f"the broker process ended by itself (status {code})")


def _engine(
    name: str,
    folder: MeshFolder,
    *,
    listeners: Listeners,
    papers: BrokerPapers | None,
    site: str,
    passwords: Mapping[str, str],
) -> "BrokerEngine":
    from broker.engine import EngineSettings

    settings = EngineSettings(
        data_dir=folder.broker_data,
        host=listeners.host,
        port=listeners.port,
        tls=papers.listener(listeners.tls_host, listeners.tls_port)
        if papers is not None and listeners.tls_host is not None
        else None,
    )
    credentials, topics = folder.credentials(), Topics(site=site)
    if name == "mosquitto":
        from broker.mosquitto import MosquittoBroker

        return MosquittoBroker(settings=settings, credentials=credentials, topics=topics)
    if name == "nats":
        from broker.nats import NatsBroker

        return NatsBroker(
            settings=settings, credentials=credentials, topics=topics, passwords=passwords
        )
    from broker.embedded import EmbeddedBroker

    return EmbeddedBroker(settings=settings, credentials=credentials, topics=topics)


def engine_available(name: str) -> bool:
    """Tell whether the program an engine needs is on this machine."""
    from broker.engine import find_binary

    program = {"mosquitto": "mosquitto", "nats": "nats-server"}.get(name)
    return program is None or find_binary(program) is not None


async def _follow_access(
    store: Any,
    engine: "BrokerEngine",
    passwords: dict[str, str],
    folder: MeshFolder,
    papers: BrokerPapers | None,
) -> None:
    """Have the broker read its access and certificate files again when they change."""
    looked_at = asyncio.get_running_loop().time()
    while True:
        await asyncio.sleep(_ACCESS_POLL_S)
        now = asyncio.get_running_loop().time()
        try:
            changed = await asyncio.to_thread(store.refresh)
            if papers is not None and now - looked_at > _PAPERS_POLL_S:
                looked_at = now
                changed = await asyncio.to_thread(papers.refresh) or changed
            if not changed:
                continue
            if passwords:
                passwords.update(await asyncio.to_thread(folder.passwords))
            await engine.reload_access()
        except (ConfigurationError, BrokerUnavailable) as error:
            _log.warning("broker.access_not_reloaded", error=error.message)
        else:
            _log.info("broker.access_reloaded", identities=len(store.identities()))


async def _encoder(process: Process, settings: Settings) -> "EncoderThread":
    from registry.encoders import load_encoder
    from registry.encoders.thread import EncoderThread

    return await process.enter(
        EncoderThread(encoder=lambda: load_encoder(settings.encoder_backend, settings.encoder))
    )


async def run_registry(
    settings: Settings, *, identity_file: Path | None, status: ProcessStatus
) -> int:
    """Run the registry until told to end.

    Args:
        settings: Data folder, broker, site, encoder.
        identity_file: Its identity; that of the data folder when None.
        status: Where readiness is reported.

    Raises:
        FoamError: It cannot start or go on.
    """
    from broker.access.authority import Authority
    from broker.events import EventSource
    from registry.admission import ALL_DATA, Identity
    from registry.enrollment import EnrollmentDesk, EnrollmentService
    from registry.service import RegistryService
    from registry.store import SqliteStore
    from registry.store.audit import AuditLog

    member = await asyncio.to_thread(
        Member.resolve,
        settings,
        role=Role.REGISTRY,
        default_id=REGISTRY_ID,
        identity_file=identity_file,
    )
    folder = MeshFolder(settings.data).prepare()
    credentials = folder.credentials()

    key = load_key(member.identity, member.folder)
    topics = Topics(site=member.site)

    def desk() -> EnrollmentDesk:
        with_tls = folder.authority.exists()
        return EnrollmentDesk(
            path=folder.enrollment_file,
            site=member.site,
            registry_id=member.identity.id,
            key=key,
            credentials=credentials,
            authority=Authority(folder.authority, site=member.site) if with_tls else None,
            brokers=lambda: folder.public_brokers() or (member.url,),
            certificates=folder.takes_certificates(),
        )

    def enrolled(node: str) -> Identity | None:
        credentials.refresh()
        known = credentials.identities().get(node)
        if known is None or known.disabled or known.public_key is None:
            return None
        return Identity(known.public_key, attested=known.attested or ALL_DATA)

    async def assemble(process: Process) -> Mapping[str, Any]:
        encoder = await _encoder(process, settings)
        store = await process.enter(SqliteStore(path=folder.registry_database))
        trail = await process.hold(_AuditTrail(AuditLog(folder.audit_trail, key=key)))
        session = _session(member)
        await _connect(process, session, member.url)
        events = EventSource(
            session=session,
            topics=topics,
            source=member.identity.id,
            component="registry",
            clock=now_ms,
        )
        enrollment = EnrollmentService(
            session=session,
            topics=topics,
            desk=await asyncio.to_thread(desk),
            trail=trail,
            emit=events.emit,
            registry_id=member.identity.id,
        )
        await process.enter(enrollment)
        await process.enter(
            RegistryService(
                session=session,
                topics=topics,
                store=store,
                encoder=encoder,
                key=key,
                identities=enrolled,
                registry_id=member.identity.id,
                verbs=enrollment.verbs,
            )
        )
        return {"id": member.identity.id}

    return await run_process(Process(name=member.identity.id, assemble=assemble, status=status))


class _AuditTrail:
    """The audit trail as an async context, for its file is opened at once."""

    def __init__(self, log: "AuditLog") -> None:
        self._log = log

    async def __aenter__(self) -> "AuditLog":
        return self._log.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self._log.__exit__()


class _IndexThread:
    """The one thread that builds indexes, as long as a router lives."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="foam-index")

    async def __aenter__(self) -> ThreadPoolExecutor:
        return self._pool

    async def __aexit__(self, *_: object) -> None:
        # The router has told its indexes to end soon; a build under way must not hold the process.
        self._pool.shutdown(wait=False, cancel_futures=True)


async def run_router(
    settings: Settings, *, identity_file: Path | None, status: ProcessStatus
) -> int:
    """Run a router until told to end.

    Args:
        settings: Data folder, broker, site, encoder.
        identity_file: Its identity; that of the data folder when None.
        status: Where readiness is reported.

    Raises:
        FoamError: It cannot start or go on.
    """
    import random

    from registry.encoders import load_encoder
    from registry.encoders.thread import EncoderThread
    from registry.search import CapabilitySearch
    from router.ledger import Ledger
    from router.rules import RuleFile
    from router.service import RouterService, router_will

    member = await asyncio.to_thread(
        Member.resolve,
        settings,
        role=Role.ROUTER,
        default_id=ROUTER_ID,
        identity_file=identity_file,
    )
    folder = MeshFolder(settings.data).prepare()
    topics = Topics(site=member.site)
    epoch = now_ms()
    rules = RuleFile(settings.rules_file, required=settings.rules is not None)
    await asyncio.to_thread(rules.load)

    def another_encoder(backend: str, model: Path | None) -> EncoderThread:
        return EncoderThread(encoder=lambda: load_encoder(backend, model))

    async def assemble(process: Process) -> Mapping[str, Any]:
        encoder = await _encoder(process, settings)
        ledger = await process.hold(Ledger(path=folder.router_database))
        background = await process.hold(_IndexThread())
        session = _session(
            member,
            will=lambda: router_will(topics, member.identity.id, epoch=epoch, at=now_ms()),
            clean=False,  # tasks and answers that arrive while it restarts wait at the broker
        )
        router = RouterService(
            session=session,
            topics=topics,
            search=CapabilitySearch(space=encoder.space, background=background),
            encoder=encoder,
            ledger=ledger,
            router_id=member.identity.id,
            rules=rules,
            encoders=another_encoder,
            background=background,
            index_folder=folder.router_index,
            chance=random.SystemRandom(),
            epoch=epoch,
        )
        # First the subscriptions: a kept session hands over what waited for it as it connects.
        await router.listen()
        await _connect(process, session, member.url)
        _keep_papers(process, member, session)
        await process.enter(router)
        return {"id": member.identity.id}

    return await run_process(Process(name=member.identity.id, assemble=assemble, status=status))


async def run_node(
    settings: Settings,
    *,
    source: str,
    node_id: str | None,
    identity_file: Path | None,
    status: ProcessStatus,
) -> int:
    """Run a node agent until told to end; it drains before it goes.

    Args:
        settings: Data folder, broker, site; ``model`` replaces the model of its language functions.
        source: Node file, Python file or module with its functions.
        node_id: Its id; that of the declaration when None.
        identity_file: Its identity; that of the data folder when None.
        status: Where readiness is reported.

    Raises:
        ConfigurationError: The declaration, a function or the identity is not usable.
        FoamError: It cannot go on.
    """
    from node_agent.agent import NodeAgent
    from node_agent.declaration import load_declaration, read_declaration
    from node_agent.declaration.watch import SourceWatch
    from node_agent.mesh_client import MeshClient
    from node_agent.models import ModelStore
    from node_agent.runtimes.base import RuntimeContext

    declaration = load_declaration(source)
    head = NodeHead.of(declaration.head, source)
    member = Member.resolve(
        settings,
        role=Role.NODE,
        default_id=None if identity_file is not None else node_id or head.id,
        identity_file=identity_file,
        attested=head.attested,
    )
    if identity_file is not None and node_id not in {None, member.identity.id}:
        raise Conflict(
            f"--id {node_id} is not the identity {member.identity.id} of {identity_file}"
        )

    def offered(declared: "Declaration", place: NodeHead) -> "list[FunctionSpec]":
        return placed(
            (_with_model(spec, settings.model) for spec in declared.functions),
            place.attested or member.identity.attested,
        )

    functions = offered(declaration, head)
    agents: list[NodeAgent] = []
    session = _session(member, will=lambda: agents[0].last_will() if agents else None)
    topics = Topics(site=member.site)
    models = ModelStore(settings.models, budget_bytes=settings.models_budget)
    mesh = MeshClient(session=session, topics=topics, node=member.identity.id)
    agents.append(
        NodeAgent(
            session=session,
            topics=topics,
            settings=head.tuned(member.identity.id),
            functions=functions,
            key=load_key(member.identity, member.folder),
            context=RuntimeContext(
                model_path=models.resolve, mesh=mesh, mcp_servers=declaration.mcp
            ),
            model_digest=models.digest,
        )
    )

    async def take_up(edited: "Declaration") -> None:
        place = NodeHead.of(edited.head, source)
        if place.id != head.id:
            _log.warning("node.id_kept", node=member.identity.id, wanted=place.id, do="restart it")
        if identity_file is None and place.attested is not None:
            await asyncio.to_thread(
                MeshFolder(settings.data).ensure,
                member.identity.id,
                Role.NODE,
                attested=place.attested,
            )
        await agents[0].replace(offered(edited, place), mcp_servers=edited.mcp)

    async def assemble(process: Process) -> Mapping[str, Any]:
        if member.is_new:
            await _wait_for_access(member)
        await _connect(process, session, member.url)
        _keep_papers(process, member, session)
        await process.enter(mesh)
        await process.enter(agents[0])
        if not await agents[0].wait_warm(_WARM_S):
            _log.warning("node.still_warming", node=member.identity.id)
        watch = await process.enter(
            SourceWatch(
                node=member.identity.id,
                files=declaration.files,
                read=partial(read_declaration, source),
                apply=take_up,
                told=agents[0].remark,
                poll_s=_WATCH_S if settings.watch else None,
            )
        )
        _reload_on_hangup(watch)
        return {"id": member.identity.id, "functions": [spec.name for spec in functions]}

    process = Process(
        name=member.identity.id,
        assemble=assemble,
        status=status,
        stop_s=agents[0].stop_timeout_s + 5.0,
    )
    with models:
        return await run_process(process)


def _reload_on_hangup(watch: "SourceWatch") -> None:
    """Take SIGHUP as the wish to read the declaration again.

    A node started in a terminal that is closed gets it too, and shall end with the terminal.
    """
    in_terminal = os.isatty(STDIN)

    def reload() -> None:
        if not in_terminal or os.isatty(STDIN):
            watch.reload()
            return
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):  # a log line to a terminal that is gone is an error
            os.dup2(nowhere, stream)
        os.close(nowhere)
        os.kill(os.getpid(), signal.SIGTERM)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def check_node(settings: Settings, source: str) -> "tuple[Declaration, list[Problem]]":
    """Look a declaration over as a node on this machine would; blocks.

    Args:
        settings: Data folder, with its models.
        source: Node file, Python file or module with functions.

    Returns:
        What was read, and all that is wrong with it or could be better.
    """
    from node_agent.declaration import read_declaration
    from node_agent.declaration.inspection import inspect_declaration
    from node_agent.models import ModelStore
    from node_agent.runtimes.base import RuntimeContext

    declaration = read_declaration(source, thorough=True)
    found = [*declaration.problems, *place_problems(declaration, source)]
    with ModelStore(settings.models) as models:
        context = RuntimeContext(model_path=models.resolve)
        found += inspect_declaration(declaration, source=source, context=context)
    return declaration, found


def _with_model(spec: "FunctionSpec", model: Path | None) -> "FunctionSpec":
    """Put another model under a language function, without the phrasing for the shipped one."""
    if model is None or spec.runtime != "llama_cpp":
        return spec
    options = {name: value for name, value in spec.options.items() if name != "prepare"}
    return spec.model_copy(update={"model": str(model.expanduser().absolute()), "options": options})
