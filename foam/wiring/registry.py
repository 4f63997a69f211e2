"""The process that keeps the catalogue, lets members in, and judges them: the registry."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from broker.access.policy import Role
from capability_schemas.errors import ConfigurationError
from capability_schemas.ids import now_ms
from capability_schemas.signing import SigningKey
from capability_schemas.topics import Topics
from foam.member import Member
from foam.mesh import REGISTRY_ID, MeshFolder, load_key
from foam.process import Process, run_process
from foam.settings import Settings
from foam.status import ProcessStatus
from foam.wiring.member import connect, encoder_thread, member_session, takes_unsigned

if TYPE_CHECKING:
    from broker.access.credentials import Credential
    from registry.admission import Identity
    from registry.enrollment import EnrollmentDesk
    from registry.store.audit import AuditLog

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


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
    from broker.events import EventSource
    from registry.attestation import AttestationFile, AttestationService
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
        default_id=REGISTRY_ID,
        identity_file=identity_file,
    )
    key = load_key(member.identity, member.folder)
    books = _Books(MeshFolder(settings.data).prepare(), member=member, key=key)
    asked = AttestationFile(books.folder.attestation_file)
    await asyncio.to_thread(asked.load)

    async def assemble(process: Process) -> Mapping[str, Any]:
        encoder = await encoder_thread(process, settings)
        store = await process.enter(SqliteStore(path=books.folder.registry_database))
        trail = await process.hold(_AuditTrail(AuditLog(books.folder.audit_trail, key=key)))
        session = member_session(member)
        await connect(process, session, member.url)
        own, topics = member.identity.id, Topics(site=member.site)
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
        )
        desk = await asyncio.to_thread(books.desk)
        board = TrustBoard(
            session=session,
            topics=topics,
            key=key,
            registry_id=own,
            voided=lambda: desk.revoked,
            members=books.members,
            due=desk.rotation.due,
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
            key=key,
            identities=books.enrolled,
            nodes=books.nodes,
            books=books.members,
            board=board,
            emit=events.emit,
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
        )
        registry = RegistryService(
            session=session,
            topics=topics,
            store=store,
            encoder=encoder,
            key=key,
            identities=attestation.narrowed,
            registry_id=own,
            verbs={**enrollment.verbs, **attestation.verbs},
            book=member.book,
            unsigned_admin=takes_unsigned(settings, member.url),
            auditor=auditor,
        )
        for part in (auditor, board, watch, enrollment, attestation, registry):
            await process.enter(part)
        return {"id": own}

    return await run_process(Process(name=member.identity.id, assemble=assemble, status=status))


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
        self._key = key
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
            key=self._key,
            credentials=self._credentials,
            authority=Authority(folder.authority, site=member.site) if with_tls else None,
            brokers=lambda: folder.public_brokers() or member.urls,
            member_brokers=folder.member_brokers,
            certificates=folder.takes_certificates(),
        )

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
