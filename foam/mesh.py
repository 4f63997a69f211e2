"""The data folder of a mesh: what outlives its processes, and how another terminal finds them.

::

    DIR/                     0700
      mesh.json              0600  where the running mesh is, and credentials for people
      credentials.json       0600  who may log on, hashed (broker.access.credentials)
      identities/<id>.json   0600  one identity: role, username, password, broker, site
      identities/<id>.key    0600  its Ed25519 signing key (all that sign: not devices, observers)
      identities/<id>.tls.pem, .tls.ca  0600  its TLS key with certificate; whom it trusts
      broker/                      the broker's own files; of a cluster each server's below it
      enrollment.json        0600  join tokens (not their secrets), who waits, who was revoked
      audit.sqlite           0600  the audit trail
      authority/             0700  keys of the site's certificate authority
      registry.sqlite  router.sqlite  router-index/
      router-2.sqlite  router-2-index/   further routers, by their ids
      registry-2.sqlite  registry-2-audit.sqlite   further registries, likewise
      logs/<process>.log
      lock                         held by the ``foam up`` that runs on this folder

Passwords stand in clear in ``identities/`` because the processes of this machine log on with them;
the folder is readable by its owner only, and everything in it that a mesh can do, its owner can do.
"""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, field_serializer

from broker.access.credentials import CredentialStore, write_private
from broker.access.policy import Role
from broker.session.settings import BrokerUrl
from broker.tls import TlsSettings
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import BadSignature, ConfigurationError, Conflict, NotFound
from capability_schemas.ids import Identifier, check_identifier, now_ms
from capability_schemas.passport import Passport, PassportBook, issue
from capability_schemas.provenance import Signer
from capability_schemas.signing import SigningKey, verify
from capability_schemas.topics import DEFAULT_SITE
from capability_schemas.wire import first_problem

__all__ = ["REGISTRY_ID", "ROUTER_ID", "Identity", "MeshFolder", "MeshRecord", "Person"]

ROUTER_ID: Final = "router-1"
REGISTRY_ID: Final = "registry-1"
DEVICE_ID: Final = "device-1"
ADMIN_ID: Final = "admin-1"
_VOUCHED_ROLES: Final = frozenset({Role.NODE, Role.ROUTER, Role.ADMIN, Role.OPERATOR})
"""Who signs with a key that the registry vouches for; the registry's own is known to all."""

_RUN_ROLES: Final = frozenset({Role.NODE, Role.ROUTER, Role.REGISTRY})
_SIGNING_ROLES: Final = _VOUCHED_ROLES | {Role.REGISTRY}
_PASSPORT_MS: Final = 30 * 86_400_000
_RENEW_SHARE: Final = 2 / 3
"""As the registry does it (registry.enrollment.papers)."""


class _Stored(BaseModel):
    """A file of the folder: secrets are written in clear, and only into files with mode 0600."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_serializer("password", when_used="json", check_fields=False)
    def _reveal(self, password: SecretStr | None) -> str | None:
        return password.get_secret_value() if password is not None else None


_S = TypeVar("_S", bound=_Stored)


class Identity(_Stored):
    """One member of the mesh as its own process needs it.

    Attributes:
        id: Its name in topics (``{client}``, ``{node}`` …).
        role: What it may do (PROTOCOL section 6).
        username: Name it logs on with; equals ``id`` at our own broker.
        password: Its password; None where the broker asks for none.
        signing_key: File name of its key, beside the identity file; None for roles that sign
            nothing.
        broker: Broker URL it was made for; None means the mesh of the folder.
        site: Site it was made for; likewise.
        attested: Zones, grants and classes of data it was given when it was made.
        tls: Whether TLS key, certificate and authorities stand beside the identity file.
        passport: What the registry vouches for; shown to those who check its signatures.
        registries: Public keys of the site's registries by id.
        renew_at: When to ask for new papers, UTC milliseconds.
    """

    id: Identifier
    role: Role
    username: str | None
    password: SecretStr | None = None
    signing_key: str | None = None
    broker: str | None = None
    site: Identifier | None = None
    attested: CapabilityPolicy | None = None
    tls: bool = False
    passport: Passport | None = None
    registries: dict[Identifier, str] = {}
    renew_at: int | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an identity file, wherever it is.

        Raises:
            ConfigurationError: It is missing, unreadable or not an identity file. Nothing is said
                of deleting it: it may be any file of the user's.
        """
        if not path.exists():
            raise ConfigurationError(
                f"{path}: there is no such file; `foam enroll` and `foam device add` make one",
                path=str(path),
            )
        return _read(cls, path, what="is no identity file", hint="give the one of a member")


class Person(_Stored):
    """Credentials that a person or a device may use: what ``FOAM READY`` prints."""

    id: Identifier
    username: str
    password: SecretStr | None = None

    def shown(self) -> dict[str, str | None]:
        """Return the three fields in clear, for the one place that is meant to show them."""
        secret = self.password.get_secret_value() if self.password is not None else None
        return {"id": self.id, "username": self.username, "password": secret}


class MeshRecord(_Stored):
    """``mesh.json``: where a mesh is and how to log on to it.

    Attributes:
        broker: Broker URL, without credentials.
        site: Site level of its topics.
        router: Router that answers administration.
        registry: Registry of the mesh.
        device: Credentials to ask with.
        admin: Credentials to administrate with.
        own_broker: Whether ``foam`` runs the broker (and may write its access rules).
        public: Where others connect, with TLS: newcomers, and members with a password.
        members: Where members with a certificate connect; the same where one port takes both.
        websocket: Where clients over WebSocket connect.
        certificates: Whether the broker knows members by their certificates.
        ca: File of the certificates that clients trust the broker by, PEM, without any key; None
            where it has no TLS.
    """

    broker: str
    site: Identifier
    router: Identifier = ROUTER_ID
    registry: Identifier = REGISTRY_ID
    device: Person
    admin: Person
    own_broker: bool = True
    public: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    websocket: tuple[str, ...] = ()
    certificates: bool = False
    ca: str | None = None

    def is_at(self, urls: Iterable[BrokerUrl]) -> bool:
        """Tell whether the mesh is reached at all of these, with the passwords of its people."""
        plain = {url.anonymous for url in urls}
        own = (self.broker, *self.public, *self.websocket)
        return plain <= {known for one in own for known in BrokerUrl.parse_all(one)}


class MeshFolder:
    """The files of one mesh on this machine. Blocking; used at start-up and by one-shot commands.

    Args:
        path: The folder; made on first use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self.broker_data = path / "broker"
        self.cluster_plan = self.broker_data / "cluster.json"
        self.registry_database = path / "registry.sqlite"
        self.router_database = path / "router.sqlite"
        self.enrollment_file = path / "enrollment.json"
        self.audit_trail = path / "audit.sqlite"
        self.attestation_file = path / "attestation.toml"
        self.authority = path / "authority"
        self.router_index = path / "router-index"
        self.credentials_file = path / "credentials.json"
        self._identities = path / "identities"
        self._record = path / "mesh.json"

    def prepare(self) -> Self:
        """Make the folders, readable by their owner only.

        Raises:
            ConfigurationError: They cannot be made or written.
        """
        try:
            for folder in (self.path, self._identities, self.logs, self.broker_data):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
            self._identities.chmod(0o700)
        except OSError as exc:
            raise ConfigurationError(
                f"data folder {self.path} cannot be used: {exc.strerror or exc}; "
                "name another one with --data or FOAM_DATA",
                path=str(self.path),
            ) from exc
        return self

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one running mesh.

        Raises:
            Conflict: Another ``foam up`` runs on it.
        """
        with (self.path / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise Conflict(
                    f"a mesh already runs on {self.path}; stop it, or name another folder "
                    "with --data",
                    path=str(self.path),
                ) from exc
            yield

    def router_files(self, router: str) -> tuple[Path, Path]:
        """Return where a router keeps its journal and its index.

        Args:
            router: Its id.
        """
        if router == ROUTER_ID:
            return self.router_database, self.router_index
        name = check_identifier(router, "router")
        return self.path / f"{name}.sqlite", self.path / f"{name}-index"

    def registry_files(self, registry: str) -> tuple[Path, Path]:
        """Return where a registry keeps its catalogue and its audit trail.

        Args:
            registry: Its id.
        """
        if registry == REGISTRY_ID:
            return self.registry_database, self.audit_trail
        name = check_identifier(registry, "registry")
        return self.path / f"{name}.sqlite", self.path / f"{name}-audit.sqlite"

    def registry_keys(self) -> dict[str, SigningKey]:
        """Return the keys of the registries of this folder, by id in order."""
        return {
            name: SigningKey.load(path)
            for name, known in sorted(self.credentials().identities().items())
            if known.role is Role.REGISTRY and (path := self._identities / f"{name}.key").exists()
        }

    def credentials(self) -> CredentialStore:
        """Return the store of who may log on."""
        return CredentialStore(self.credentials_file)

    def identity_path(self, identity: str) -> Path:
        """Return where the file of ``identity`` is, whether or not it exists."""
        return self._identities / f"{check_identifier(identity, 'identity')}.json"

    def identity(self, identity: str) -> Identity:
        """Read the file of one member.

        Raises:
            ConfigurationError: There is none, or it cannot be read.
        """
        path = self.identity_path(identity)
        hint = (
            f"delete it and `foam up` makes it anew, or: foam device remove {identity}; "
            f"foam device add {identity}"
            if path.exists()
            else f"make one: foam device add {identity} --role node"
        )
        return _read(Identity, path, hint=hint)

    def signing_key(self, identity: Identity) -> SigningKey:
        """Load the key of a member of this folder.

        Raises:
            ConfigurationError: It has none, or the file cannot be read.
        """
        return load_key(identity, self._identities)

    def ensure(
        self,
        identity: str,
        role: Role,
        *,
        site: str | None = None,
        external: Person | None = None,
        attested: CapabilityPolicy | None = None,
    ) -> Identity:
        """Return a member, making it (password, key, right to log on) where it does not exist.

        Args:
            identity: Its id.
            role: Its role.
            site: Its site, for its passport; None leaves that to `vouch`.
            external: Credentials of a broker that is not ours: used as they are, nothing is stored
                in the access file.
            attested: What the mesh shall vouch for from now on; None changes nothing.

        Raises:
            Conflict: It exists with another role.
        """
        path = self.identity_path(identity)
        enrolled = self.credentials().identities()
        known = self.identity(identity) if path.exists() and identity in enrolled else None
        if known is not None and known.role is not role:
            raise Conflict(f"{identity} already exists as {known.role}, not {role}", id=identity)
        if known is None:
            if identity in enrolled:  # its file is lost: nobody can know its password any more
                self.credentials().remove(identity)
            known = self._create(identity, role, attested=attested)
        elif attested is not None:
            before = enrolled[identity].attested
            if before is not None and attested.tenant is None:
                # What is declared on a node tells its place, and takes it out of no tenant.
                attested = attested.model_copy(update={"tenant": before.tenant})
            if attested != before:
                self.credentials().update(identity, attested=attested)
        if site is not None:
            known = self.vouch(known, site=site)
        if external is not None:
            return known.model_copy(
                update={"username": external.username, "password": external.password}
            )
        return known

    def create(
        self, identity: str, role: Role, *, attested: CapabilityPolicy | None = None
    ) -> Identity:
        """Make a new member that may be carried to another machine: it knows broker and site.

        Args:
            identity: Its id.
            role: Its role.
            attested: What the mesh vouches for, for a node.

        Raises:
            Conflict: It exists.
            ConfigurationError: Its files cannot be written.
        """
        record: MeshRecord | None = None
        with contextlib.suppress(NotFound):
            record = self.record()
        made = self._create(
            identity,
            role,
            broker=record.broker if record is not None else None,
            site=record.site if record is not None else None,
            attested=attested,
        )
        return self.vouch(made, site=made.site or DEFAULT_SITE)

    def _create(
        self,
        identity: str,
        role: Role,
        *,
        broker: str | None = None,
        site: str | None = None,
        attested: CapabilityPolicy | None = None,
    ) -> Identity:
        if identity in self.credentials().identities():
            raise Conflict(f"identity {identity!r} exists already", identity=identity)
        key_name = None
        public = None
        if role in _SIGNING_ROLES:
            key_name = f"{identity}.key"
            public = self._make_key(identity)
        password = self.credentials().add(identity, role, public_key=public, attested=attested)
        made = Identity(
            id=identity,
            role=role,
            username=identity,
            password=SecretStr(password),
            signing_key=key_name,
            broker=broker,
            site=site,
            attested=attested,
        )
        _write(self.identity_path(identity), made.model_dump_json(indent=1))
        return made

    def vouch(
        self, identity: Identity, *, site: str, clock: Callable[[], int] = now_ms
    ) -> Identity:
        """Give a member of this folder what it needs to sign and to check signatures.

        That is a key where it has none, a passport where it has none that is good for a while, and
        the public keys of the registries. Whoever owns the folder holds the registry's key, so
        that nobody need be asked. Does nothing without that key, and for who is no member here.

        Args:
            identity: The member, as its file has it.
            site: Its site.
            clock: UTC milliseconds.

        Returns:
            The identity as its file has it now.

        Raises:
            ConfigurationError: A file cannot be read or written.
        """
        enrolled = self.credentials().identities()
        credential = enrolled.get(identity.id)
        registries = self.registry_keys()
        if credential is None or not registries:
            return identity
        update: dict[str, Any] = {}
        known_keys = {name: key.public for name, key in registries.items()}
        if not known_keys.items() <= identity.registries.items():
            update["registries"] = {**identity.registries, **known_keys}
        first = min(registries)
        if identity.role in _VOUCHED_ROLES or (
            # Who was let in before this registry came does not know it yet.
            identity.role is Role.REGISTRY and identity.id != first
        ):
            public = credential.public_key
            if identity.signing_key is not None:
                public = public or self.signing_key(identity).public
            else:
                public = self._make_key(identity.id)
                self.credentials().update(identity.id, public_key=public)
                update["signing_key"] = f"{identity.id}.key"
            wanted = Passport(
                identity=identity.id,
                role=identity.role.value,
                site=site,
                public_key=str(public),
                attested=credential.attested,
                issued_at=clock(),
                expires_at=clock() + _PASSPORT_MS,
                registry=first,
            )
            if not _still_good(identity.passport, wanted, known_keys):
                update["passport"] = issue(wanted, registries[wanted.registry])
                update["renew_at"] = wanted.issued_at + round(_PASSPORT_MS * _RENEW_SHARE)
        if not update:
            return identity
        vouched = identity.model_copy(update=update)
        _write(self.identity_path(identity.id), vouched.model_dump_json(indent=1))
        return vouched

    def holds(self, path: Path) -> bool:
        """Tell whether an identity file is one of this folder."""
        return path.resolve().parent == self._identities.resolve()

    def _make_key(self, identity: str) -> str:
        key = SigningKey.generate()
        with contextlib.suppress(FileNotFoundError):
            # Of one that was never written down, or was thrown out: nobody vouches for that key.
            (self._identities / f"{identity}.key").unlink()
        key.save(self._identities / f"{identity}.key")
        return key.public

    def remove(self, identity: str) -> None:
        """Withdraw a member's right to log on and delete its files.

        Raises:
            NotFound: It is not known, and no file of it is here.
        """
        try:
            self.credentials().remove(identity)
        except NotFound:
            if not self.forget(identity):
                raise
        self.forget(identity)

    def forget(self, identity: str) -> bool:
        """Delete the files of a member here: identity, signing key, TLS key, whom it trusts.

        Returns:
            Whether there was one.
        """
        found = False
        path = self.identity_path(identity)  # first: without it the others mean nothing
        for ending in (".json", ".key", ".tls.pem", ".tls.ca"):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(identity + ending).unlink()
                found = True
        return found

    def runs(self, identity: str) -> bool:
        """Tell whether a member is of this folder: its own registry, router or nodes."""
        try:
            return self.identity(identity).role in _RUN_ROLES
        except ConfigurationError:  # without a file nothing here can run as it
            return False

    def passwords(self) -> dict[str, str]:
        """Return the clear passwords of the members made here (NATS keeps no verifiers)."""
        found: dict[str, str] = {}
        for path in self._identities.glob("*.json"):
            identity = self.identity(path.stem)
            if identity.username is not None and identity.password is not None:
                found[identity.username] = identity.password.get_secret_value()
        return found

    def write_record(self, record: MeshRecord) -> None:
        """Say where the mesh is, for other terminals."""
        _write(self._record, record.model_dump_json(indent=1))

    def public_brokers(self) -> tuple[str, ...]:
        """Return where members on other machines connect; empty where that is not known."""
        with contextlib.suppress(NotFound):
            return self.record().public
        return ()

    def broker_authority(self, url: str) -> Path | None:
        """Return whom to trust at our own broker, where it is reached with TLS.

        Args:
            url: Where it is reached; of a cluster several, separated by commas.
        """
        with_tls = any(one.tls for one in BrokerUrl.parse_all(url))
        return self.authority_certificate() if with_tls else None

    def authority_certificate(self) -> Path | None:
        """Return the certificates that clients trust our broker by; None where it has no TLS."""
        path = self.broker_data / "authority.pem"
        return path if path.exists() else None

    def member_brokers(self) -> tuple[str, ...]:
        """Return where members with a certificate connect; empty where that is not known."""
        with contextlib.suppress(NotFound):
            return self.record().members
        return ()

    def takes_certificates(self) -> bool:
        """Tell whether the broker of this mesh knows members by their certificates."""
        with contextlib.suppress(NotFound):
            return self.record().certificates
        return False

    def record(self) -> MeshRecord:
        """Read where the mesh is.

        Raises:
            NotFound: No mesh was ever up on this folder.
            ConfigurationError: The file cannot be read.
        """
        if not self._record.exists():
            raise NotFound(
                f"no mesh in {self.path}: start one with `foam up`, "
                "or name one with --data or --url",
                path=str(self.path),
            )
        return _read(MeshRecord, self._record, hint="start the mesh again with: foam up")


def _still_good(passport: Passport | None, wanted: Passport, registries: Mapping[str, str]) -> bool:
    """Tell whether a passport says what is wanted, and will for a while."""
    if passport is None or passport.registry not in registries:
        return False
    times = {"issued_at", "expires_at", "signature", "registry"}
    if passport.model_dump(exclude=times) != wanted.model_dump(exclude=times):
        return False
    left_ms = passport.expires_at - wanted.issued_at
    if left_ms < (1 - _RENEW_SHARE) * (passport.expires_at - passport.issued_at):
        return False
    try:
        verify(passport, registries[passport.registry])
    except BadSignature:  # of a registry that was made anew under the same name
        return False
    return True


def load_signer(identity: Identity, folder: Path) -> Signer | None:
    """Load what a member signs with; None for one that has no key.

    Args:
        identity: Whose.
        folder: Folder of its identity file.

    Raises:
        ConfigurationError: The key cannot be read, or the passport is for another one.
    """
    if identity.signing_key is None:
        return None
    return Signer(identity=identity.id, key=load_key(identity, folder), passport=identity.passport)


def make_book(identity: Identity, *, site: str) -> PassportBook | None:
    """Make the book of passports of a member; None for one that knows no registry."""
    if not identity.registries:
        return None
    return PassportBook(site=site, registries=identity.registries)


def load_key(identity: Identity, folder: Path) -> SigningKey:
    """Load the signing key that stands beside an identity file.

    Args:
        identity: Whose key.
        folder: Folder of its identity file.

    Raises:
        ConfigurationError: It has none, or the file cannot be read.
    """
    if identity.signing_key is None:
        raise ConfigurationError(f"identity {identity.id} ({identity.role}) has no signing key")
    return SigningKey.load(folder / identity.signing_key)


def tls_files(folder: Path, identity: Identity) -> TlsSettings:
    """Return the TLS files beside an identity file, as far as it has them.

    Args:
        folder: Folder of the identity file.
        identity: Whose.
    """
    if not identity.tls:
        return TlsSettings()
    trusted, own = folder / f"{identity.id}.tls.ca", folder / f"{identity.id}.tls.pem"
    if not own.exists():
        return TlsSettings(ca_file=trusted)
    return TlsSettings(ca_file=trusted, cert_file=own, key_file=own)


def _write(path: Path, text: str) -> None:
    try:
        write_private(path, text + "\n")
    except OSError as exc:
        raise ConfigurationError(
            f"{path} cannot be written: {exc.strerror or exc}", path=str(path)
        ) from exc


def _read(model: type[_S], path: Path, *, hint: str, what: str = "is damaged") -> _S:
    try:
        return model.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError as exc:
        raise ConfigurationError(f"{path} does not exist; {hint}", path=str(path)) from exc
    except OSError as exc:
        raise ConfigurationError(
            f"{path} cannot be read: {exc.strerror or exc}", path=str(path)
        ) from exc
    except (ValueError, ValidationError) as exc:
        problem = (
            ": ".join(filter(None, first_problem(exc)))
            if isinstance(exc, ValidationError)
            else str(exc)
        )
        raise ConfigurationError(f"{path} {what} ({problem}); {hint}", path=str(path)) from exc
