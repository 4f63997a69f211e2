"""A member of a mesh as its own process sees it: who it is, and where it connects."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pydantic import SecretStr

from broker.access.policy import Role
from broker.session.settings import BrokerUrl
from broker.tls import TlsSettings
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError, NotFound
from capability_schemas.passport import PassportBook
from capability_schemas.provenance import Signer
from capability_schemas.topics import DEFAULT_SITE
from foam.mesh import Identity, MeshFolder, MeshRecord, load_signer, make_book, tls_files
from foam.settings import Settings

__all__ = ["Member"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An identity with everything its process needs to join a mesh.

    Attributes:
        identity: Who it is.
        folder: Folder of its identity file (its key stands beside it).
        brokers: The broker, or the brokers of a cluster; with credentials where they have some of
            their own.
        site: Site level of the topics.
        username: Name to log on with.
        password: Its password.
        tls: Its certificate files, and whom it trusts, where it was enrolled.
        is_new: Whether it was made just now, so that a running broker may not know it yet.
        home: The data folder that vouches for it itself, where that holds the registry's key.
        signer: What it signs with; None where it has no key.
        book: What it believes of others; None where it knows no registry.
    """

    identity: Identity
    folder: Path
    brokers: tuple[BrokerUrl, ...]
    site: str
    username: str | None
    password: SecretStr | None
    tls: TlsSettings = field(default_factory=TlsSettings)
    is_new: bool = False
    home: MeshFolder | None = None
    signer: Signer | None = None
    book: PassportBook | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """The brokers, without credentials."""
        return tuple(map(str, self.brokers))

    @property
    def url(self) -> str:
        """The brokers as one text, without credentials."""
        return ",".join(self.urls)

    @classmethod
    def resolve(
        cls,
        settings: Settings,
        *,
        role: Role,
        default_id: str | None = None,
        identity_file: Path | None = None,
        attested: CapabilityPolicy | None = None,
    ) -> Self:
        """Find or make the identity, and where it connects to.

        Without an identity file the data folder is ours, and a member it does not know yet is made.
        The broker is that of the settings, else of the identity file, else of the folder's mesh.

        Args:
            settings: Data folder and what overrides its mesh.
            role: Role that it must have.
            default_id: Its id in the data folder.
            identity_file: Its file, when it is not of the data folder.
            attested: What our own data folder shall vouch for; None changes nothing.

        Raises:
            ConfigurationError: No broker is named anywhere, or the identity has another role.
        """
        folder = MeshFolder(settings.data)
        record: MeshRecord | None = None
        is_new = False
        if identity_file is not None:
            identity, where = Identity.read(identity_file), identity_file.resolve().parent
        elif default_id is None:
            raise ConfigurationError("no identity: give --id, or --identity FILE")
        else:
            with contextlib.suppress(NotFound):
                record = folder.record()
            is_new = not folder.identity_path(default_id).exists()
            identity, where = (
                folder.prepare().ensure(default_id, role, attested=attested),
                folder.identity_path(default_id).parent,
            )
        if identity.role is not role:
            raise ConfigurationError(f"{identity.id} is a {identity.role}, not a {role}")
        site = (
            settings.site or identity.site or (record.site if record is not None else DEFAULT_SITE)
        )
        home = folder if identity_file is None or folder.holds(identity_file) else None
        if home is not None:
            identity = home.vouch(identity, site=site)
        found = settings.url or identity.broker or (record.broker if record is not None else None)
        if found is None:
            raise ConfigurationError(
                f"no broker is known in {settings.data}: give --url, or run `foam up` first"
            )
        brokers = BrokerUrl.parse_all(found)
        username, password = identity.username, identity.password
        if brokers[0].username is not None:
            username, password = brokers[0].username, brokers[0].password
        if settings.username is not None:
            username, password = settings.username, settings.password
            brokers = tuple(one.anonymous for one in brokers)
        tls = tls_files(where, identity)
        if settings.ca is not None:
            tls = tls.model_copy(update={"ca_file": settings.ca})
        elif tls.ca_file is None and record is not None and record.own_broker:
            tls = tls.model_copy(update={"ca_file": folder.broker_authority(found)})
        return cls(
            identity=identity,
            folder=where,
            brokers=brokers,
            site=site,
            username=username,
            password=password,
            tls=tls,
            is_new=is_new and (record is None or record.own_broker),
            home=home,
            signer=load_signer(identity, where),
            book=make_book(identity, site=site),
        )
