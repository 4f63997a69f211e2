"""Ed25519 signatures over canonical bytes, so that a receiver need not trust the broker.

Canonical bytes are the RFC 8785 form of the message without its ``signature`` field; integers
beyond 2**53 - 1, which RFC 8785 section 3.2.2.3 excludes, stand as strings of their decimal
digits. Verification works on the payload as received, so that fields of a newer version are
covered too.
"""

import base64
import binascii
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import rfc8785
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from pydantic import BaseModel

from capability_schemas.errors import BadSignature, ConfigurationError, MalformedPayload
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


_SCALARS: Final = (str, bool, int, type(None))


def _is_plain(value: Any) -> bool:
    """Tell whether the standard encoder writes a value as RFC 8785 does.

    It does where no number is a fraction or beyond 2**53 - 1, and no key goes beyond ASCII, so
    that the order by code point is that by UTF-16 (RFC 8785 section 3.2.3).
    """
    waiting = [value]
    while waiting:
        one = waiting.pop()
        kind = type(one)
        if kind is dict:
            for key, item in one.items():
                if type(key) is not str or not key.isascii():
                    return False
                waiting.append(item)
        elif kind in {list, tuple}:
            waiting.extend(one)
        elif kind not in _SCALARS or (kind is int and abs(one) > _EXACT_INTEGER):
            return False
    return True


def _canonical_json(value: Any) -> bytes:
    if _is_plain(value):  # most messages are, and a large one would hold up the loop otherwise
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode()
    try:
        try:
            return rfc8785.dumps(value)
        except rfc8785.IntegerDomainError:
            return rfc8785.dumps(_within_ieee754(value))
    except rfc8785.CanonicalizationError as exc:  # NaN, and what else is no JSON
        raise MalformedPayload(f"it has no canonical form: {exc}") from exc


def canonical_bytes(message: BaseModel | dict[str, Any]) -> bytes:
    """Return the bytes a signature covers: RFC 8785 JSON without ``signature``.

    Raises:
        MalformedPayload: It holds what JSON cannot say, such as ``NaN``.
    """
    fields = (
        message.model_dump(mode="json", exclude_none=True)
        if isinstance(message, BaseModel)
        else message
    )
    return _canonical_json({key: value for key, value in fields.items() if key != "signature"})


def digest(value: Any) -> str:
    """Return ``sha256:`` and the hex digest of the canonical JSON of ``value``.

    Raises:
        MalformedPayload: It holds what JSON cannot say, such as ``NaN``.
    """
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
    """Return a copy of ``message`` with its ``signature`` set.

    Raises:
        MalformedPayload: It has no canonical form: it holds half a surrogate pair, or no number.
    """
    try:
        covered = canonical_bytes(message)
    except (ValueError, rfc8785.CanonicalizationError) as exc:
        raise MalformedPayload(f"message cannot be signed: {exc}") from exc
    return message.model_copy(update={"signature": key.sign_bytes(covered)})


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


def verify_foreign(data: bytes, parts: tuple[bytes, ...], public: str) -> None:
    """Check a signature of a key that is not of the mesh: of a TPM, over SHA-256.

    Args:
        data: What was signed.
        parts: The signature: one part for RSA (PKCS 1 version 1.5), ``r`` and ``s`` for ECDSA, each
            big-endian.
        public: Public key, PEM.

    Raises:
        BadSignature: It is not one of this key over these bytes, or the key is no such key.
    """
    try:
        key = serialization.load_pem_public_key(public.encode())
        if isinstance(key, rsa.RSAPublicKey) and len(parts) == 1:
            key.verify(parts[0], data, padding.PKCS1v15(), hashes.SHA256())
        elif isinstance(key, ec.EllipticCurvePublicKey) and len(parts) == 2:  # noqa: PLR2004 - r, s
            r, s = (int.from_bytes(part, "big") for part in parts)
            key.verify(encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
        else:
            raise BadSignature("signature and key are of different kinds, or the key is no RSA/EC")
    except (InvalidSignature, UnsupportedAlgorithm, ValueError) as exc:
        raise BadSignature("signature does not fit the data and the key") from exc
