"""Ed25519 signatures over canonical bytes, so that a receiver need not trust the broker.

Canonical bytes are the RFC 8785 form of the message without its ``signature`` field; integers
beyond 2**53 - 1, which RFC 8785 section 3.2.2.3 excludes, stand as strings of their decimal
digits. Verification works on the payload as received, so that fields of a newer version are
covered too.
"""

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import Any, Self, TypeVar

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from pydantic import BaseModel

from capability_schemas.errors import BadSignature, ConfigurationError
from capability_schemas.wire import WireModel, parse_json

Signed = TypeVar("Signed", bound=WireModel)


_EXACT_INTEGER = 2**53 - 1


def _within_ieee754(value: Any) -> Any:
    """Return ``value`` with the integers that RFC 8785 cannot carry as strings of digits."""
    if isinstance(value, dict):
        return {str(key): _within_ieee754(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_within_ieee754(item) for item in value]
    if isinstance(value, int) and abs(value) > _EXACT_INTEGER:
        return str(value)
    return value


def _canonical_json(value: Any) -> bytes:
    try:
        return rfc8785.dumps(value)
    except rfc8785.IntegerDomainError:
        return rfc8785.dumps(_within_ieee754(value))


def canonical_bytes(message: BaseModel | dict[str, Any]) -> bytes:
    """Return the bytes a signature covers: RFC 8785 JSON without ``signature``."""
    fields = (
        message.model_dump(mode="json", exclude_none=True)
        if isinstance(message, BaseModel)
        else message
    )
    return _canonical_json({key: value for key, value in fields.items() if key != "signature"})


def digest(value: Any) -> str:
    """Return ``sha256:`` and the hex digest of the canonical JSON of ``value``."""
    return "sha256:" + hashlib.sha256(_canonical_json(value)).hexdigest()


class SigningKey:
    """A private Ed25519 key (RFC 8032) of one identity.

    Args:
        private: The key; use ``generate`` or ``load``.
    """

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        raw = private.public_key().public_bytes_raw()
        self.public = base64.b64encode(raw).decode()

    def __repr__(self) -> str:
        """Show the public half only."""
        return f"SigningKey(public={self.public!r})"

    @classmethod
    def generate(cls) -> Self:
        """Make a new key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a key saved by ``save``.

        Raises:
            ConfigurationError: The file is missing, unreadable or holds no Ed25519 key.
        """
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError) as exc:
            raise ConfigurationError(f"signing key {path}: {exc}") from exc
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(f"signing key {path} is not an Ed25519 key")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key as PKCS 8 PEM, readable by the owner only, replacing nothing.

        Raises:
            ConfigurationError: The file exists or cannot be written.
        """
        pem = self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(pem)
        except OSError as exc:
            raise ConfigurationError(f"signing key {path} cannot be written: {exc}") from exc

    def sign_bytes(self, data: bytes) -> str:
        """Return the signature of raw bytes, base64."""
        return base64.b64encode(self._private.sign(data)).decode()


def verify_bytes(data: bytes, signature: str, public: str) -> None:
    """Check a signature of raw bytes.

    Args:
        data: What was signed.
        signature: Base64, as ``SigningKey.sign_bytes`` returned it.
        public: Public key, base64 of 32 raw bytes.

    Raises:
        BadSignature: It is not one of this key over these bytes.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True))
        key.verify(base64.b64decode(signature, validate=True), data)
    except (InvalidSignature, binascii.Error, ValueError) as exc:
        raise BadSignature("signature does not fit the data and the sender's key") from exc


def sign(message: Signed, key: SigningKey) -> Signed:
    """Return a copy of ``message`` with its ``signature`` set."""
    return message.model_copy(update={"signature": key.sign_bytes(canonical_bytes(message))})


def verify(message: bytes | BaseModel, public: str) -> None:
    """Check the signature of a message.

    Args:
        message: The payload as received (preferred), or a message made here.
        public: Public key, base64 of 32 raw bytes.

    Raises:
        MalformedPayload: The payload is not JSON.
        BadSignature: No signature, or not one of this key over these bytes.
    """
    fields = (
        message.model_dump(mode="json", exclude_none=True)
        if isinstance(message, BaseModel)
        else parse_json(message)
    )
    signature = fields.get("signature") if isinstance(fields, dict) else None
    if not isinstance(signature, str):
        raise BadSignature("message is not signed")
    try:
        covered = canonical_bytes(fields)
    except (ValueError, rfc8785.CanonicalizationError) as exc:
        raise BadSignature("message has no canonical form, so that nobody can sign it") from exc
    verify_bytes(covered, signature, public)
