"""The process that routes tasks: the router."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from broker.access.policy import Role
from broker.tenure import Tenure
from capability_schemas.ids import now_ms
from capability_schemas.topics import Topics
from foam.identity_lock import IdentityLock
from foam.member import Member
from foam.mesh import ROUTER_ID, MeshFolder
from foam.process import Process, run_process
from foam.settings import Settings
from foam.status import ProcessStatus
from foam.wiring.member import (
    connect,
    encoder_thread,
    keep_papers,
    member_session,
    takes_unsigned,
    wait_for_access,
)


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
    from router.peers import router_will
    from router.quota import QuotaFile
    from router.rules import RuleFile
    from router.service import RouterService, lets_past

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
    lock = IdentityLock(member.folder, member.identity.id)
    rules = RuleFile(settings.rules_file, required=settings.rules is not None)
    await asyncio.to_thread(rules.load)
    quotas = QuotaFile(folder.path / "quotas.toml")
    await asyncio.to_thread(quotas.load)

    def another_encoder(backend: str, model: Path | None) -> EncoderThread:
        return EncoderThread(encoder=lambda: load_encoder(backend, model))

    async def assemble(process: Process) -> Mapping[str, Any]:
        encoder = await encoder_thread(process, settings)
        ledger = await process.hold(Ledger(path=database))
        background = await process.hold(_IndexThread())
        session = member_session(
            member,
            will=lambda: router_will(
                topics,
                member.identity.id,
                epoch=lock.tenant.epoch,
                at=now_ms(),
                direct=lets_past(rules, quotas),
                known=router.is_known,
                place=lock.tenant.place,
            ),
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
            quotas=quotas,
            encoders=another_encoder,
            background=background,
            index_folder=index,
            chance=random.SystemRandom(),
            signer=member.signer,
            book=member.book,
            unsigned_admin=takes_unsigned(settings, member.url),
            epoch=lock.tenant.epoch,
            place=lock.tenant.place,
        )
        # First the subscriptions: a kept session hands over what waited for it as it connects.
        await router.listen()
        if member.is_new:
            await wait_for_access(member)
        await connect(process, session, member.url)
        keep_papers(process, member, session, shown=router.show_passport)
        await process.enter(
            Tenure(
                session=session,
                topics=topics,
                tenant=replace(lock.tenant, kind="router"),
                show=router.show_passport,
                give_up=router.give_up,
            )
        )
        await process.enter(router)
        return {"id": member.identity.id}

    with lock:
        return await run_process(Process(name=member.identity.id, assemble=assemble, status=status))
