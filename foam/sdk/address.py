"""Which mesh to talk to, and as whom."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from broker.access.policy import Action, Role, grants
from broker.session.settings import BrokerUrl
from broker.tls import TlsSettings
from capability_schemas.errors import AccessDenied, ConfigurationError, NotFound
from capability_schemas.ids import is_identifier, now_ms
from capability_schemas.provenance import Signer
from capability_schemas.topics import DEFAULT_SITE, TopicKind
from foam.mesh import (
    ADMIN_ID,
    DEVICE_ID,
    ROUTER_ID,
    Identity,
    MeshFolder,
    MeshRecord,
    Person,
    load_signer,
    tls_files,
)
from foam.settings import Settings

__all__ = ["MeshAddress", "external_person", "find_mesh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshAddress:
    """A mesh and the identity to use there.

    Attributes:
        url: Broker, without credentials; of a cluster several, separated by commas.
        site: Site level of the topics.
        client: Level ``{client}`` of the topics.
        username: Name to log on with; None at a broker that asks for none.
        password: Its password.
        router: Router that answers administration.
        tls: How to check a broker with TLS.
        signer: Signs what it asks of routers and registries; None: it goes unsigned.
        registries: Public keys of the site's registries by id, for checking results.
        role: What the identity is in the mesh; None where only the broker knows.
        logins: The brokers of ``url`` with credentials of their own, where they have some.
    """

    url: str
    site: str
    client: str
    username: str | None
    password: SecretStr | None
    router: str = ROUTER_ID
    tls: TlsSettings = field(default_factory=TlsSettings)
    signer: Signer | None = None
    registries: Mapping[str, str] = field(default_factory=dict)
    role: Role | None = None
    logins: tuple[BrokerUrl, ...] = ()

    @property
    def urls(self) -> tuple[BrokerUrl, ...]:
        """The broker, or the brokers of the cluster, one by one."""
        return self.logins or BrokerUrl.parse_all(self.url)

    def require(self, kind: TopicKind) -> None:
        """Refuse what the broker would not let this identity publish.

        Brokers drop such a message without a word, and the asker would wait for nothing.

        Args:
            kind: ``TASK`` for whoever asks the mesh, ``ADMIN`` for whoever administrates it.

        Raises:
            AccessDenied: Its role may not.
        """
        if self.role is None or any(
            grant.action is Action.PUBLISH and grant.kind is kind for grant in grants(self.role)
        ):
            return
        does = _DOES.get(self.role, "it may not do this")
        raise AccessDenied(
            f"{self.client} is of the role {self.role.value}: {does}; "
            + ("this needs an administrator or operator" if kind is TopicKind.ADMIN else "")
            + ("asking needs a device: foam device add NAME" if kind is TopicKind.TASK else "")
            + " (--identity FILE)",
            identity=self.client,
            role=self.role.value,
        )


_DOES: Final = {
    Role.DEVICE: "it asks for tasks and administrates nothing",
    Role.NODE: "it does tasks and administrates nothing",
    Role.OBSERVER: "it reads topics and orders nothing",
}


def external_person(url: BrokerUrl) -> Person | None:
    """Return the credentials that stand in a broker URL.

    Raises:
        ConfigurationError: Its user name cannot be a topic level.
    """
    if url.username is None:
        return None
    if not is_identifier(url.username):
        raise ConfigurationError(
            f"user {url.username!r} in the broker URL cannot name a topic level: "
            "use A-Z a-z 0-9 _ -"
        )
    return Person(id=url.username, username=url.username, password=url.password)


def find_mesh(settings: Settings, *, admin: bool = False) -> MeshAddress:
    """Decide where to connect and as whom.

    An explicit ``url`` wins over the mesh of the data folder; explicit ``username`` and
    ``password`` win over those in the URL, and these over the ones in the data folder, which are
    used only for the mesh they belong to. An identity file brings all of it.

    Args:
        settings: Environment and options.
        admin: Whether administration is wanted.

    Raises:
        NotFound: No URL is given and the data folder holds no mesh.
        ConfigurationError: The URL cannot be read.
    """
    if settings.identity_file is not None:
        return _as_identity(settings, settings.identity_file)
    folder = MeshFolder(settings.data)
    record: MeshRecord | None = None
    try:
        record = folder.record()
    except NotFound:
        if settings.url is None:
            raise
    given = BrokerUrl.parse_all(settings.url) if settings.url is not None else ()
    url = ",".join(map(str, given)) or (record.broker if record is not None else "")
    own = record if record is not None and record.is_at(BrokerUrl.parse_all(url)) else None
    person = external_person(given[0]) if given else None
    if person is None and own is not None:
        person = own.admin if admin else own.device
    if settings.username is not None:
        person = Person(
            id=settings.username, username=settings.username, password=settings.password
        )
    site = settings.site or (own.site if own is not None else DEFAULT_SITE)
    identity, person_id = None, person.id if person is not None else None
    if own is not None and person is not None:
        names = [person.id]
        if person in {own.admin, own.device}:  # at a broker that is not ours it has another name
            names.append(ADMIN_ID if admin else DEVICE_ID)
        identity = _member(folder, names, site=site)
    return MeshAddress(
        url=url,
        site=site,
        client=person.id if person is not None else ("admin-1" if admin else "device-1"),
        username=person.username if person is not None else None,
        password=person.password if person is not None else None,
        router=own.router if own is not None else ROUTER_ID,
        tls=TlsSettings(
            ca_file=settings.ca
            or (folder.broker_authority(url) if own and own.own_broker else None)
        ),
        signer=_signer(identity, folder),
        registries=identity.registries if identity is not None else {},
        # At a broker of others the folder knows who signs, and not what its name there may do.
        role=identity.role if identity is not None and identity.id == person_id else None,
        logins=given if settings.username is None else (),
    )


def _member(folder: MeshFolder, names: Iterable[str], *, site: str) -> Identity | None:
    """Return the first of these that is a member of the folder, its passport still good."""
    for name in names:
        if not folder.identity_path(name).exists():
            continue
        with contextlib.suppress(ConfigurationError):  # then it asks without a signature
            identity = folder.identity(name)
            if identity.renew_at is not None and now_ms() >= identity.renew_at:
                identity = folder.vouch(identity, site=site)
            return identity
    return None


def _signer(identity: Identity | None, folder: MeshFolder) -> Signer | None:
    if identity is None or identity.passport is None:
        return None
    with contextlib.suppress(ConfigurationError):
        return load_signer(identity, folder.identity_path(identity.id).parent)
    return None


def _as_identity(settings: Settings, path: Path) -> MeshAddress:
    """Return the address of a member that has an identity file: of ``foam enroll``, say.

    Raises:
        ConfigurationError: The file or a key beside it cannot be read, or it names no broker and
            no ``url`` is given.
    """
    identity, where = Identity.read(path), path.resolve().parent
    url = settings.url or identity.broker
    if url is None:
        raise ConfigurationError(f"{path} names no broker: give --url")
    tls, brokers = tls_files(where, identity), BrokerUrl.parse_all(url)
    return MeshAddress(
        url=",".join(map(str, brokers)),
        site=settings.site or identity.site or DEFAULT_SITE,
        client=identity.id,
        username=settings.username or identity.username,
        password=settings.password or identity.password,
        tls=tls if settings.ca is None else tls.model_copy(update={"ca_file": settings.ca}),
        signer=load_signer(identity, where),
        registries=identity.registries,
        role=identity.role,
    )
