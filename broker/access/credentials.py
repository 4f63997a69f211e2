"""The identities of a mesh and the verifiers of their passwords, in one file of mode 0600.

Passwords are made here (192 random bits) and returned once; the file keeps only verifiers. Two are
kept because two parties check: argon2id for the embedded broker, and Mosquitto's own PBKDF2 form
(``$7$``), which cannot be derived from the other later. nats-server understands neither, so its
users are written from the passwords themselves (``broker.access.compilers.nats_users``).
"""

import base64
import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Final, Literal

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from pydantic import BaseModel, ConfigDict, ValidationError

from broker.access.policy import Role
from capability_schemas.capability import EVERY_TENANT, CapabilityPolicy
from capability_schemas.errors import ConfigurationError, Conflict, NotFound
from capability_schemas.ids import Identifier, check_identifier, now_ms
from capability_schemas.wire import first_problem

_PASSWORD_BYTES: Final = 24
# Second recommended option of RFC 9106 scaled to a small machine: 19 MiB, 2 passes, 1 lane.
_HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
# Mosquitto derives this on its only thread at every CONNECT. The passwords carry 192 bits, so
# stretching them adds nothing; its own default is 101.
PBKDF2_ITERATIONS: Final = 101


class Credential(BaseModel):
    """One identity.

    Attributes:
        role: What it is in the mesh.
        argon2: Verifier of its password for the embedded broker, PHC string; empty for a member
            that has no password, only a certificate.
        mosquitto: The same password as Mosquitto's password file wants it.
        serials: Serial numbers (hexadecimal) of the certificates it may come with: the newest
            first, and the one before it until that has been used up.
        public_key: Base64 Ed25519 key its claims are signed with, when it signs.
        attested: Zones, grants and classes of data that the operator vouches for; None leaves a
            node what every enrolled node has (all data, no zone, no grant).
        disabled: Refused everywhere although known.
        created_at: UTC milliseconds.
        expires_at: When it counts for nothing any more, UTC milliseconds; for join tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    argon2: str = ""
    mosquitto: str = ""
    serials: tuple[str, ...] = ()
    public_key: str | None = None
    attested: CapabilityPolicy | None = None
    disabled: bool = False
    created_at: int
    expires_at: int | None = None

    @property
    def apart(self) -> bool:
        """Whether it is of one tenant, and so kept from what tells of the others."""
        tenant = self.attested.tenant if self.attested is not None else None
        return tenant not in {None, EVERY_TENANT}

    def counts(self, now: int) -> bool:
        """Tell whether it opens anything at a time, UTC milliseconds."""
        return not self.disabled and (self.expires_at is None or now < self.expires_at)


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    identities: dict[Identifier, Credential] = {}


@dataclass(frozen=True, slots=True)
class Pbkdf2:
    """A verifier as ``mosquitto_passwd`` 2.0 makes it: PBKDF2 with SHA-512.

    Attributes:
        iterations: Rounds.
        salt: 12 bytes; text in those that are made here, since EMQX takes no others.
        digest: 64 bytes.
    """

    iterations: int
    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, password: str) -> "Pbkdf2":
        """Derive one from a password, with a salt of 72 random bits."""
        salt = secrets.token_urlsafe(9).encode()
        digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, PBKDF2_ITERATIONS)
        return cls(PBKDF2_ITERATIONS, salt, digest)

    @classmethod
    def parse(cls, text: str) -> "Pbkdf2 | None":
        """Read one back; None when the text is none."""
        try:
            _, kind, iterations, salt, digest = text.split("$")
            made = cls(int(iterations), base64.b64decode(salt), base64.b64decode(digest))
        except ValueError:
            return None
        return made if kind == "7" else None

    def __str__(self) -> str:
        """Write it as a password file holds it."""
        salt, digest = (base64.b64encode(part).decode() for part in (self.salt, self.digest))
        return f"$7${self.iterations}${salt}${digest}"


class CredentialStore:
    """The credentials file.

    Every change is read-modify-write under a file lock and replaces the file atomically, so that
    a command line and a running broker may both hold the store. Methods block for some
    milliseconds (``add`` and ``verify`` hash for tens): call them from a thread in a loop. Any
    thread may: one lock keeps what is held and the file it was read from together.

    Args:
        path: The file; made on the first change.
        clock: UTC milliseconds.
    """

    def __init__(self, path: Path, *, clock: Callable[[], int] = now_ms) -> None:
        self.path = path
        self._clock = clock
        self._lock = Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._identities: Mapping[str, Credential] = MappingProxyType({})
        self._unknown = ""
        self.refresh()

    def refresh(self) -> bool:
        """Read the file again when it has changed.

        Returns:
            Whether it had.

        Raises:
            ConfigurationError: It cannot be read or is not a credentials file.
        """
        with self._lock:
            try:
                found = self.path.stat()
            except FileNotFoundError:
                changed, self._stamp = self._stamp is not None, None
                self._identities = MappingProxyType({})
                return changed
            stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
            if stamp == self._stamp:
                return False
            self._identities, self._stamp = self._read(), stamp
            return True

    def identities(self) -> Mapping[str, Credential]:
        """Return every identity by name, disabled ones included; a snapshot."""
        return self._identities

    def add(
        self,
        identity: str,
        role: Role,
        *,
        public_key: str | None = None,
        attested: CapabilityPolicy | None = None,
        serial: str | None = None,
        password: str | None = None,
        expires_at: int | None = None,
    ) -> str:
        """Make an identity.

        Args:
            identity: Its name: MQTT username and topic level.
            role: What it is.
            public_key: Base64 Ed25519 key, for those that sign.
            attested: What the operator vouches for, for nodes.
            serial: Serial number of its certificate; it then gets no password unless one is given.
            password: Its password, at least 128 random bits; made here when omitted.
            expires_at: When it ends by itself, UTC milliseconds.

        Returns:
            Its password, URL-safe; nobody can ask for it again. Empty when it has none.

        Raises:
            ProtocolError: ``identity`` is no identifier.
            Conflict: The identity exists.
            ConfigurationError: The file cannot be read or written.
        """
        check_identifier(identity, "identity")
        if password is None:
            password = "" if serial is not None else secrets.token_urlsafe(_PASSWORD_BYTES)
        made = Credential(
            role=role,
            argon2=_HASHER.hash(password) if password else "",
            mosquitto=str(Pbkdf2.of(password)) if password else "",
            serials=(serial,) if serial is not None else (),
            public_key=public_key,
            attested=attested,
            created_at=self._clock(),
            expires_at=expires_at,
        )
        with self._change() as identities:
            if identity in identities:
                raise Conflict(f"identity {identity!r} exists already", identity=identity)
            identities[identity] = made
        return password

    def remove(self, identity: str) -> None:
        """Forget an identity.

        Raises:
            NotFound: It is unknown.
            ConfigurationError: The file cannot be read or written.
        """
        with self._change() as identities:
            if identities.pop(identity, None) is None:
                raise NotFound(f"identity {identity!r} is unknown", identity=identity)

    def update(
        self,
        identity: str,
        *,
        disabled: bool | None = None,
        public_key: str | None = None,
        attested: CapabilityPolicy | None = None,
        serials: tuple[str, ...] | None = None,
    ) -> None:
        """Change what may change of an identity; what is omitted stays.

        Raises:
            NotFound: It is unknown.
            ConfigurationError: The file cannot be read or written.
        """
        given = {
            "disabled": disabled,
            "public_key": public_key,
            "attested": attested,
            "serials": serials,
        }
        fields = {name: value for name, value in given.items() if value is not None}
        with self._change() as identities:
            if identity not in identities:
                raise NotFound(f"identity {identity!r} is unknown", identity=identity)
            identities[identity] = identities[identity].model_copy(update=fields)

    def verify(self, identity: str, password: str) -> Credential | None:
        """Check a password; takes as long for an unknown identity as for a known one.

        Returns:
            The credential when the identity is known, enabled, and the password is its own.
        """
        found = self._identities.get(identity)
        if (found is None or not found.argon2) and not self._unknown:
            self._unknown = _HASHER.hash(secrets.token_urlsafe(_PASSWORD_BYTES))
        try:
            _HASHER.verify((found and found.argon2) or self._unknown, password)
        except (VerificationError, InvalidHashError):
            return None
        return found if found is not None and found.argon2 and found.counts(self._clock()) else None

    def _read(self) -> Mapping[str, Credential]:
        try:
            return MappingProxyType(_File.model_validate_json(self.path.read_bytes()).identities)
        except OSError as exc:
            raise ConfigurationError(f"cannot read the credentials {self.path}: {exc}") from exc
        except ValidationError as exc:
            problem = ": ".join(filter(None, first_problem(exc)))
            raise ConfigurationError(
                f"{self.path} is damaged: {problem}; restore it from a copy, or delete it together "
                "with the folder identities beside it: every member is then made anew"
            ) from exc

    @contextmanager
    def _change(self) -> Iterator[dict[str, Credential]]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Read anew, whatever is held: what is written below replaces the whole file.
                identities = dict(self._read()) if self.path.exists() else {}
                yield identities
                document = _File(identities=identities).model_dump(mode="json", exclude_none=True)
                write_private(self.path, json.dumps(document, indent=1) + "\n")
                self.refresh()
        except OSError as exc:
            raise ConfigurationError(f"cannot write the credentials {self.path}: {exc}") from exc


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically and durably, readable by its owner alone.

    Raises:
        OSError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class VerifiedCache:
    """Remembers passwords that were right, so that a storm of reconnections costs no hashing.

    Holds keyed digests (the key lives and dies with this object), never passwords. An entry counts
    only while the verifier in the store is the one it was checked against.

    Args:
        limit: Identities remembered; the oldest is forgotten.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        self._key = secrets.token_bytes(32)
        self._seen: dict[str, tuple[str, bytes]] = {}

    def knows(self, identity: str, credential: Credential, password: str) -> bool:
        """Tell whether this very password was right before."""
        verifier, digest = self._seen.get(identity, ("", b""))
        return verifier == credential.argon2 and hmac.compare_digest(digest, self._digest(password))

    def remember(self, identity: str, credential: Credential, password: str) -> None:
        """Note that a password was right."""
        self._seen.pop(identity, None)
        if len(self._seen) >= self._limit:
            self._seen.pop(next(iter(self._seen)))
        self._seen[identity] = (credential.argon2, self._digest(password))

    def _digest(self, password: str) -> bytes:
        return hmac.digest(self._key, password.encode(), "sha256")
