"""Joining a mesh over MQTT: join tokens, what a newcomer asks, what the registry grants.

A join token is an identifier, a secret, and (so that the newcomer can check the broker before it
says anything) the certificate of the site's authority. From the secret both sides derive, with
HKDF (RFC 5869), the password of the bootstrap login, which the broker sees, and the key of the
proofs, which it does not: HMAC-SHA256 over the canonical bytes of request and reply shows each side
that the other one knows the token. What is secret in a reply is sealed to a key of the newcomer
with HPKE (RFC 9180), for newcomers that share a token share its topics.

The newcomer logs on as the token's identifier, publishes ``enroll/{identifier}`` and reads
``enroll/{identifier}/reply``. A member renews under its own name, signing with the key it has.
"""

import base64
import binascii
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import rfc8785
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field, SecretStr, StringConstraints

from capability_schemas.errors import BadSignature, ConfigurationError, ProtocolError
from capability_schemas.ids import Identifier, is_identifier
from capability_schemas.passport import Passport
from capability_schemas.signing import canonical_bytes
from capability_schemas.wire import WireModel, parse_json

ENROLL_LIMIT_BYTES: Final = 64 * 1024
LOGIN_PREFIX: Final = "join-"

_HEAD: Final = "foam1"
_SECRET_BYTES: Final = 32
_SUITE: Final = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
_Key = Annotated[str, StringConstraints(min_length=44, max_length=44)]
_Fact = Annotated[str, StringConstraints(max_length=256)]
Provable = TypeVar("Provable", "EnrollRequest", "EnrollReply")


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What an operator hands to a newcomer.

    Attributes:
        id: Name of the bootstrap login and level of the enrollment topics.
        secret: 32 random bytes; never shown by ``repr``.
        authority: Certificate of the site's authority, DER; empty where the broker has no TLS.
    """

    id: str
    secret: SecretStr
    authority: bytes = b""

    @classmethod
    def make(cls, *, authority: bytes = b"") -> Self:
        """Make a new one."""
        return cls(
            id=LOGIN_PREFIX + secrets.token_hex(6),
            secret=SecretStr(_text(secrets.token_bytes(_SECRET_BYTES))),
            authority=authority,
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the form that ``reveal`` writes.

        Raises:
            ConfigurationError: It is no join token; the message repeats nothing of it.
        """
        parts = "".join(text.split()).split(".")
        hint = "copy the whole line that `foam token create` printed"
        if parts[0] != _HEAD or len(parts) not in {3, 4}:
            raise ConfigurationError(f"this is no join token: {hint}")
        try:
            secret = _bytes(parts[2])
            authority = _bytes(parts[3]) if len(parts) > 3 else b""  # noqa: PLR2004
        except ValueError as exc:
            raise ConfigurationError(f"the join token is damaged: {hint}") from exc
        if not is_identifier(parts[1]) or len(secret) != _SECRET_BYTES:
            raise ConfigurationError(f"the join token is cut off: {hint}")
        return cls(id=parts[1], secret=SecretStr(parts[2]), authority=authority)

    def reveal(self) -> str:
        """Return the whole token as one word, secret included: for the operator's eyes."""
        parts = [_HEAD, self.id, self.secret.get_secret_value()]
        if self.authority:
            parts.append(_text(self.authority))
        return ".".join(parts)

    @property
    def password(self) -> SecretStr:
        """Password of the bootstrap login."""
        return SecretStr(_text(self._derive(b"login")))

    @property
    def proof_key(self) -> bytes:
        """Key of the proofs; the registry keeps this, and not the secret."""
        return self._derive(b"proof")

    def _derive(self, purpose: bytes) -> bytes:
        info = b"foam enrollment v1 " + purpose
        kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info)
        return kdf.derive(_bytes(self.secret.get_secret_value()))


class EnrollRequest(WireModel):
    """A newcomer asks to join, or a member asks for new papers.

    Attributes:
        nonce: Chosen by the sender; the reply repeats it.
        id: Identity it wants, or has.
        role: Role it wants, or has.
        site: Site it means to join.
        at: UTC milliseconds.
        public_key: Its Ed25519 key, base64; None for a device that signs nothing.
        csr: Certificate signing request, PEM; None where it cannot do TLS with certificates, which
            is then given a password.
        seal_key: Its X25519 key, base64, that secrets in the reply are sealed to.
        facts: What it says of itself, for the operator who decides: host name, platform.
        evidence: Measurements for attestation.
        proof: HMAC of the token over everything else, base64; None in a renewal.
        signature: With ``public_key``'s private half, which shows that the sender has it; in a
            renewal with the key that is known.
    """

    nonce: Identifier
    id: Identifier
    role: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")]
    site: Identifier
    at: Annotated[int, Field(ge=0)]
    public_key: _Key | None = None
    csr: Annotated[str, StringConstraints(max_length=16 * 1024)] | None = None
    seal_key: _Key | None = None
    facts: Annotated[dict[Identifier, _Fact], Field(max_length=16)] = Field(default_factory=dict)
    evidence: dict[str, Any] | None = None
    proof: str | None = None
    signature: str | None = None


class EnrollReply(WireModel):
    """The answer to a newcomer.

    Attributes:
        nonce: Of the request.
        status: ``granted``, ``pending`` (an operator decides; another reply follows) or
            ``refused``.
        at: UTC milliseconds.
        id: Identity granted.
        role: Role granted.
        site: Site joined.
        certificate: Its certificate, PEM.
        authority: Certificates to trust, PEM.
        brokers: Where to connect from now on.
        passport: What the registry vouches for, for those that sign.
        registries: Public keys of the registries by id.
        sealed: Secrets (the password), sealed to ``seal_key``, base64.
        renew_at: When to ask for new papers, UTC milliseconds.
        reason: Why it was refused, or waits.
        retryable: Whether asking again may help.
        proof: HMAC of the token over everything else, base64; None in a renewal.
        signature: Of the registry.
    """

    nonce: Identifier
    status: Literal["granted", "pending", "refused"]
    at: Annotated[int, Field(ge=0)]
    id: Identifier | None = None
    role: str | None = None
    site: Identifier | None = None
    certificate: str | None = None
    authority: str | None = None
    brokers: tuple[str, ...] = ()
    passport: Passport | None = None
    registries: dict[Identifier, str] = Field(default_factory=dict)
    sealed: str | None = None
    renew_at: int | None = None
    reason: str = ""
    retryable: bool = False
    proof: str | None = None
    signature: str | None = None


def prove(message: Provable, proof_key: bytes) -> Provable:
    """Return a copy of a message with its ``proof`` set; sign it afterwards."""
    return message.model_copy(update={"proof": _proof(message, proof_key)})


def check_proof(payload: bytes | EnrollRequest | EnrollReply, proof_key: bytes) -> None:
    """Check that the sender of a message knows the token.

    Args:
        payload: As received (preferred), or a message made here.
        proof_key: Of the token.

    Raises:
        MalformedPayload: The payload is not JSON.
        BadSignature: It does not.
    """
    fields = (
        parse_json(payload)
        if isinstance(payload, bytes)
        else payload.model_dump(mode="json", exclude_none=True)
    )
    given = fields.get("proof") if isinstance(fields, dict) else None
    try:
        passes = isinstance(given, str) and hmac.compare_digest(
            given.encode(), _proof(fields, proof_key).encode()
        )
    except (ValueError, rfc8785.CanonicalizationError):  # text that is none (RFC 8259, 8.2)
        passes = False
    if not passes:
        raise BadSignature("the sender does not know the join token, or the message was altered")


def _proof(message: Any, proof_key: bytes) -> str:
    fields = (
        message if isinstance(message, dict) else message.model_dump(mode="json", exclude_none=True)
    )
    covered = canonical_bytes({name: value for name, value in fields.items() if name != "proof"})
    return base64.b64encode(hmac.digest(proof_key, covered, "sha256")).decode()


class SealKey:
    """A key pair that secrets are sealed to; lives as long as one enrollment."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = base64.b64encode(self._private.public_key().public_bytes_raw()).decode()

    def open(self, sealed: str, *, nonce: str) -> dict[str, Any]:
        """Open what ``seal`` closed.

        Raises:
            BadSignature: It was not sealed to this key, or for another request.
        """
        try:
            opened = _SUITE.decrypt(
                base64.b64decode(sealed, validate=True), self._private, info=_context(nonce)
            )
            secrets_: dict[str, Any] = json.loads(opened)
        except (InvalidTag, ValueError, binascii.Error) as exc:
            raise BadSignature("the sealed part of the grant cannot be opened") from exc
        return secrets_


def seal(values: dict[str, Any], seal_key: str, *, nonce: str) -> str:
    """Seal secrets to the key of a newcomer.

    Args:
        values: JSON object.
        seal_key: X25519 key, base64.
        nonce: Of the request, which the seal is bound to.

    Raises:
        ProtocolError: The key is none.
    """
    try:
        key = X25519PublicKey.from_public_bytes(base64.b64decode(seal_key, validate=True))
        sealed = _SUITE.encrypt(json.dumps(values).encode(), key, info=_context(nonce))
    except (ValueError, binascii.Error) as exc:
        raise ProtocolError(f"seal_key is no X25519 key: {exc}", field="seal_key") from exc
    return base64.b64encode(sealed).decode()


def _context(nonce: str) -> bytes:
    return b"foam enrollment v1 grant " + nonce.encode()


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
