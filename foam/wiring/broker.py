"""The process of a broker of our own."""

import asyncio
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import structlog

from capability_schemas.errors import BrokerUnavailable, ConfigurationError, Unavailable
from capability_schemas.ids import now_ms
from capability_schemas.topics import DEFAULT_SITE, Topics
from foam.listening import BrokerPapers, Listeners, own_names
from foam.log_files import keep_small
from foam.mesh import MeshFolder
from foam.process import Process, run_process
from foam.settings import Settings
from foam.status import ProcessStatus
from foam.wiring.member import ACCESS_POLL_S

if TYPE_CHECKING:
    from broker.access.credentials import CredentialStore
    from broker.engine import BrokerEngine, ChildEngine

ENGINES: Final = ("embedded", "mosquitto", "nats")
_PAPERS_POLL_S: Final = 60.0
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


async def run_broker(
    settings: Settings,
    *,
    engine: str,
    listeners: Listeners,
    status: ProcessStatus,
    access: str | None = None,
    seat: int | None = None,
) -> int:
    """Run a broker over the identities of the data folder until told to end.

    Args:
        settings: Data folder and site.
        engine: One of `ENGINES`.
        listeners: Where to listen.
        status: Where readiness is reported.
        access: How Mosquitto learns of rights, ``static`` or ``dynamic``; None: by plugin where
            that is installed.
        seat: Which server of the cluster that ``foam up`` planned; None: it stands alone.

    Raises:
        ConfigurationError: It shall be one of a cluster, and is no ``nats``; the port is in use,
            the program is missing, the folder unusable.
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
        await asyncio.to_thread(papers.list_revoked, _serials(store))

    async def assemble(process: Process) -> Mapping[str, Any]:
        made = _engine(
            engine,
            folder,
            listeners=listeners,
            papers=papers,
            site=site,
            passwords=passwords,
            access=access,
            seat=seat,
        )
        runner = await process.enter(_EngineRunner(made))
        process.spawn(_follow_access(store, made, passwords, folder, papers), name="access")
        process.spawn(keep_small(made.settings.data_dir), name="logs")  # of the program it runs
        names = papers.names if papers is not None else ()
        certificates = papers is not None and made.traits.certificates
        return {
            "url": runner.engine.url,
            "engine": engine,
            "certificates": certificates,
            "public": _urls(names, made.tls_port),
            "members": _urls(names, made.members_port) if certificates else [],
            "websocket": _websocket_urls(listeners, names, made.websocket_port),
        }

    return await run_process(Process(name="broker", assemble=assemble, status=status))


def _urls(names: Iterable[str], port: int) -> list[str]:
    return [f"mqtts://{f'[{name}]' if ':' in name else name}:{port}" for name in names]


def _websocket_urls(listeners: Listeners, names: Iterable[str], port: int) -> list[str]:
    found = listeners.websocket()
    if found is None:
        return []
    scheme, hosts = ("wss", names) if found.secure else ("ws", [found.host])
    return [f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/mqtt" for host in hosts]


def _serials(store: "CredentialStore") -> set[str]:
    """Return the serial numbers of the certificates that count."""
    now = now_ms()
    return {
        serial
        for credential in store.identities().values()
        if credential.counts(now)
        for serial in credential.serials
    }


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
    access: str | None,
    seat: int | None,
) -> "ChildEngine":
    from broker.engine import EngineSettings

    if seat is not None and name != "nats":
        raise ConfigurationError(f"{name} does not run as a cluster: use --broker nats")

    tls = None
    if papers is not None and listeners.tls_host is not None:
        tls = papers.listener(
            listeners.tls_host, listeners.tls_port, members_port=listeners.port_of_members()
        )
    settings = EngineSettings.model_validate(
        {
            "data_dir": folder.broker_data if seat is None else folder.broker_data / f"nats-{seat}",
            "host": listeners.host,
            "port": listeners.port,
            "tls": tls,
            "websocket": listeners.websocket(),
            "access": access,
        }
    )
    credentials, topics = folder.credentials(), Topics(site=site)
    if name == "mosquitto":
        from broker.mosquitto import MosquittoBroker

        return MosquittoBroker(settings=settings, credentials=credentials, topics=topics)
    if name == "nats":
        from broker.nats import NatsBroker
        from broker.nats_cluster import ClusterPlan

        return NatsBroker(
            settings=settings,
            credentials=credentials,
            topics=topics,
            passwords=passwords,
            seat=None if seat is None else ClusterPlan.read(folder.cluster_plan).seat(seat),
        )
    from broker.embedded import EmbeddedBroker

    return EmbeddedBroker(settings=settings, credentials=credentials, topics=topics)


def engine_available(name: str) -> bool:
    """Tell whether the program an engine needs is on this machine."""
    from broker.engine import find_binary

    program = {"mosquitto": "mosquitto", "nats": "nats-server"}.get(name)
    return program is None or find_binary(program) is not None


async def _follow_access(
    store: "CredentialStore",
    engine: "BrokerEngine",
    passwords: dict[str, str],
    folder: MeshFolder,
    papers: BrokerPapers | None,
) -> None:
    """Have the broker read its access and certificate files again when they change."""
    looked_at = asyncio.get_running_loop().time()
    behind = False  # the broker knows less than the files: also because a reload went wrong
    while True:
        await asyncio.sleep(ACCESS_POLL_S)
        now = asyncio.get_running_loop().time()
        try:
            behind = await asyncio.to_thread(store.refresh) or behind
            if papers is not None and (
                behind or papers.authority_changed() or now - looked_at > _PAPERS_POLL_S
            ):
                looked_at = now
                behind = await asyncio.to_thread(papers.refresh) or behind
                serials = _serials(store)
                behind = await asyncio.to_thread(papers.list_revoked, serials) or behind
            if not behind:
                continue
            if passwords:
                passwords.update(await asyncio.to_thread(folder.passwords))
            await engine.reload_access()
        except (ConfigurationError, BrokerUnavailable) as error:
            _log.warning("broker.access_not_reloaded", error=error.message)
        else:
            behind = False
            _log.info("broker.access_reloaded", identities=len(store.identities()))
