"""The processes that keep the catalogue and route tasks: registry and router."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.access.policy import Role
from capability_schemas.ids import now_ms
from capability_schemas.topics import Topics
from foam.member import Member
from foam.mesh import REGISTRY_ID, ROUTER_ID, MeshFolder, load_key
from foam.process import Process, run_process
from foam.settings import Settings
from foam.status import ProcessStatus
from foam.wiring.member import connect, keep_papers, member_session, wait_for_access

if TYPE_CHECKING:
    from registry.encoders.thread import EncoderThread
    from registry.store.audit import AuditLog


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
            brokers=lambda: folder.public_brokers() or member.urls,
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
        session = member_session(member)
        await connect(process, session, member.url)
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
    settings: Settings,
    *,
    router_id: str | None = None,
    identity_file: Path | None,
    status: ProcessStatus,
) -> int:
    """Run a router until told to end.

    Args:
        settings: Data folder, broker, site, encoder.
        router_id: Its id; ``router-1`` when None. Each router of a data folder has its own.
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
        default_id=router_id or ROUTER_ID,
        identity_file=identity_file,
    )
    folder = MeshFolder(settings.data).prepare()
    topics = Topics(site=member.site)
    database, index = folder.router_files(member.identity.id)
    epoch = now_ms()
    rules = RuleFile(settings.rules_file, required=settings.rules is not None)
    await asyncio.to_thread(rules.load)

    def another_encoder(backend: str, model: Path | None) -> EncoderThread:
        return EncoderThread(encoder=lambda: load_encoder(backend, model))

    async def assemble(process: Process) -> Mapping[str, Any]:
        encoder = await _encoder(process, settings)
        ledger = await process.hold(Ledger(path=database))
        background = await process.hold(_IndexThread())
        session = member_session(
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
            index_folder=index,
            chance=random.SystemRandom(),
            epoch=epoch,
        )
        # First the subscriptions: a kept session hands over what waited for it as it connects.
        await router.listen()
        if member.is_new:
            await wait_for_access(member)
        await connect(process, session, member.url)
        keep_papers(process, member, session)
        await process.enter(router)
        return {"id": member.identity.id}

    return await run_process(Process(name=member.identity.id, assemble=assemble, status=status))
