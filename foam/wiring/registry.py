"""The process that keeps the catalogue, lets members in, and judges them: the registry."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from broker.access.policy import Role
from broker.tenure import Tenant, Tenure
from capability_schemas.errors import ConfigurationError
from capability_schemas.ids import now_ms
from capability_schemas.signing import SigningKey
from capability_schemas.topics import Topics
from foam.identity_lock import IdentityLock
from foam.member import Member
from foam.mesh import REGISTRY_ID, MeshFolder, load_key
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

if TYPE_CHECKING:
    from broker.access.credentials import Credential
    from broker.session.mqtt import MqttSession
    from registry.admission import Identity
    from registry.attestation import AttestationFile
    from registry.enrollment import EnrollmentDesk
    from registry.leadership import Leadership
    from registry.store.audit import AuditLog

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


async def run_registry(
    settings: Settings,
    *,
    registry_id: str | None = None,
    identity_file: Path | None,
    status: ProcessStatus,
) -> int:
    """Run a registry until told to end.

    Args:
        settings: Data folder, broker, site, encoder.
        registry_id: Its id; ``registry-1`` when None. Each registry of a data folder has its own.
        identity_file: Its identity; that of the data folder when None.
        status: Where readiness is reported.

    Raises:
        FoamError: It cannot start or go on.
    """
    from broker.events import EventSource
    from registry.attestation import AttestationService
    from registry.auditor import Auditor
    from registry.enrollment import EnrollmentService
    from registry.enrollment.members import MemberWatch
    from registry.service import RegistryService
    from registry.store import SqliteStore
    from registry.store.audit import AuditLog
    from registry.trust import TrustBoard

    member = await asyncio.to_thread(
        Member.resolve,
        settings,
        role=Role.REGISTRY,
        default_id=registry_id or REGISTRY_ID,
        identity_file=identity_file,
    )
    books = _Books(
        MeshFolder(settings.data).prepare(),
        member=member,
        key=load_key(member.identity, member.folder),
    )
    asked = await asyncio.to_thread(books.open)
    database, audit_trail = books.folder.registry_files(member.identity.id)
    lock = IdentityLock(member.folder, member.identity.id)

    async def assemble(process: Process) -> Mapping[str, Any]:
        encoder = await encoder_thread(process, settings)
        store = await process.enter(SqliteStore(path=database))
        trail = await process.hold(_AuditTrail(AuditLog(audit_trail, key=books.key)))
        own, topics = member.identity.id, Topics(site=member.site)
        session, lead = await _join(process, member, tenant=lock.tenant, books=books)
        events = EventSource(
            session=session, topics=topics, source=own, component="registry", clock=now_ms
        )
        auditor = Auditor(
            session=session,
            topics=topics,
            trail=trail,
            emit=events.emit,
            role_of=books.role_of,
            registry_id=own,
            registries=books.registries,
        )
        lead.on_change(partial(auditor.note_lead, lead))
        desk = await asyncio.to_thread(books.desk)
        board = TrustBoard(
            session=session,
            topics=topics,
            key=books.key,
            registry_id=own,
            voided=lambda: desk.revoked,
            members=books.members,
            due=desk.rotation.due,
            lead=lead,
            registries=lambda: member.book.registries if member.book is not None else {},
        )

        def forget_voided() -> None:
            if member.book is not None:  # at once: not only when the broker hands it back
                for name, at in desk.revoked.items():
                    member.book.revoke(name, before=at)

        watch = MemberWatch(
            board=board,
            members=books.members,
            registry_id=own,
            stirred=lambda: enrollment.follow_members(),  # noqa: PLW0108 - it is made below
        )

        def books_changed() -> None:
            forget_voided()
            board.refresh()
            watch.refresh()

        forget_voided()
        attestation = AttestationService(
            session=session,
            topics=topics,
            file=asked,
            key=books.challenge_key(),
            identities=books.enrolled,
            nodes=books.nodes,
            books=books.members,
            board=board,
            emit=lead.only_leading(events.emit),
            changed=lambda node: registry.readmit(node),  # noqa: PLW0108 - it is made below
        )
        enrollment = EnrollmentService(
            session=session,
            topics=topics,
            desk=desk,
            trail=trail,
            emit=events.emit,
            registry_id=own,
            changed=books_changed,
            runs_here=books.folder.runs,
            forget=books.folder.forget,
            lead=lead,
        )
        registry = RegistryService(
            session=session,
            topics=topics,
            store=store,
            encoder=encoder,
            key=books.key,
            identities=attestation.narrowed,
            registry_id=own,
            verbs={**enrollment.verbs, **attestation.verbs, **lead.verbs},
            book=member.book,
            unsigned_admin=takes_unsigned(settings, member.url),
            auditor=auditor,
            lead=lead,
        )
        for part in (lead, auditor, board, watch, enrollment, attestation, registry):
            await process.enter(part)
        return {"id": own}

    with lock:
        return await run_process(Process(name=member.identity.id, assemble=assemble, status=status))


async def _join(
    process: Process, member: Member, *, tenant: Tenant, books: "_Books"
) -> "tuple[MqttSession, Leadership]":
    """Connect, and take a place among the registries; the place is entered by the caller."""
    from registry.leadership import Leadership, registry_will

    own, topics = member.identity.id, Topics(site=member.site)
    session = member_session(
        member,
        will=lambda: registry_will(
            topics,
            own,
            epoch=tenant.epoch,
            at=now_ms(),
            known=lead.is_known,
            place=tenant.place,
        ),
    )
    lead = Leadership(
        session=session,
        topics=topics,
        registry_id=own,
        epoch=tenant.epoch,
        place=tenant.place,
        others=books.registries,
        signer=member.signer,
        book=member.book,
    )
    if member.is_new:
        await wait_for_access(member)
    await connect(process, session, member.url)
    await process.enter(
        Tenure(
            session=session,
            topics=topics,
            tenant=replace(tenant, kind="registry"),
            show=lead.show_passport,
            give_up=lead.give_up,
        )
    )
    keep_papers(process, member, session, shown=lead.show_passport)
    return session, lead


class _Books:
    """Who is a member, and what the registry gives members out of.

    Args:
        folder: The data folder.
        member: The registry.
        key: Its signing key.
    """

    def __init__(self, folder: MeshFolder, *, member: Member, key: SigningKey) -> None:
        self.folder = folder
        self._member = member
        self.key = key
        self._credentials = folder.credentials()
        self._problem = ""

    def desk(self) -> "EnrollmentDesk":
        """Open the enrollment desk; blocks."""
        from broker.access.authority import Authority
        from registry.enrollment import EnrollmentDesk

        folder, member = self.folder, self._member
        with_tls = folder.authority.exists()
        return EnrollmentDesk(
            path=folder.enrollment_file,
            site=member.site,
            registry_id=member.identity.id,
            key=self.key,
            credentials=self._credentials,
            authority=Authority(folder.authority, site=member.site) if with_tls else None,
            brokers=lambda: folder.public_brokers() or member.urls,
            member_brokers=folder.member_brokers,
            certificates=folder.takes_certificates(),
            registries=lambda: {
                name: known.public_key
                for name in self.registries()
                if (known := self._credentials.identities()[name]).public_key is not None
            },
        )

    def open(self) -> "AttestationFile":
        """Make sure that these are the books of the mesh, and read what is asked of nodes; blocks.

        Raises:
            ConfigurationError: The folder does not know the registry: it would take every node for
                a stranger, and throw out what they offer.
        """
        from registry.attestation import AttestationFile

        own = self._member.identity.id
        if own not in self.members():
            raise ConfigurationError(
                f"{self.folder.path} does not hold the members of the mesh that {own} is of: run "
                "it on the data folder of that mesh (--data), or on one that is shared with it",
                id=own,
            )
        found = AttestationFile(self.folder.attestation_file)
        found.load()
        return found

    def members(self) -> "Mapping[str, Credential]":
        """Return all credentials by name, as they are now.

        While the file is damaged (somebody edits it), as they were before.
        """
        try:
            self._credentials.refresh()
        except ConfigurationError as error:
            if error.message != self._problem:
                _log.error("members.unread", error=error.message)
            self._problem = error.message
        else:
            self._problem = ""
        return self._credentials.identities()

    def nodes(self) -> list[str]:
        """Return the names of the nodes that are members."""
        return [name for name, one in self.members().items() if one.role is Role.NODE]

    def registries(self) -> list[str]:
        """Return the names of the registries that are members."""
        found = self._credentials.identities().items()
        return [name for name, one in found if one.role is Role.REGISTRY and not one.disabled]

    def challenge_key(self) -> SigningKey:
        """Return the key that makes challenges: one for all registries of the folder."""
        return next(iter(self.folder.registry_keys().values()), self.key)

    def enrolled(self, node: str) -> "Identity | None":
        """Return what the directory knows of a node."""
        from registry.admission import ALL_DATA, Identity

        known = self.members().get(node)
        if known is None or known.disabled or known.public_key is None:
            return None
        return Identity(known.public_key, attested=known.attested or ALL_DATA)

    def role_of(self, name: str) -> Role | None:
        """Return what somebody is, unless it is nobody or disabled."""
        known = self._credentials.identities().get(name)
        return None if known is None or known.disabled else known.role


class _AuditTrail:
    """The audit trail as an async context, for its file is opened at once."""

    def __init__(self, log: "AuditLog") -> None:
        self._log = log

    async def __aenter__(self) -> "AuditLog":
        return self._log.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self._log.__exit__()
