"""The process of a broker of our own."""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import structlog

from capability_schemas.errors import BrokerUnavailable, ConfigurationError, Unavailable
from capability_schemas.topics import DEFAULT_SITE, Topics
from foam.listening import BrokerPapers, Listeners, own_names
from foam.mesh import MeshFolder
from foam.process import Process, run_process
from foam.settings import Settings
from foam.status import ProcessStatus
from foam.wiring.member import ACCESS_POLL_S

if TYPE_CHECKING:
    from broker.engine import BrokerEngine

ENGINES: Final = ("embedded", "mosquitto", "nats")
_PAPERS_POLL_S: Final = 60.0
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


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
        await asyncio.sleep(ACCESS_POLL_S)
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
