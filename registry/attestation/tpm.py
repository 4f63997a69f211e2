"""Quotes of a TPM 2.0: the registers of a platform, signed inside the chip with our challenge.

Structures after "Trusted Platform Module Library, Part 2: Structures", sections 10.12.8
(TPMS_ATTEST) and 11.3 (TPMT_SIGNATURE); all integers are big-endian.
"""

import base64
import binascii
import hmac
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from capability_schemas.errors import BadSignature, MalformedPayload
from capability_schemas.signing import verify_foreign

_GENERATED: Final = 0xFF544347
_ATTEST_QUOTE: Final = 0x8018
_RSASSA: Final = 0x0014
_ECDSA: Final = 0x0018
_SHA256: Final = 0x000B
_CLOCK_AND_FIRMWARE_BYTES: Final = 17 + 8
_MOST_TEXT: Final = 16_384
_MOST_BANKS: Final = 16


@dataclass(frozen=True, slots=True)
class Quote:
    """What a quote says.

    Attributes:
        challenge: The data it was asked to sign along.
        registers: Which registers it is of: ``(hash algorithm, bit mask)`` for each bank.
        digest: SHA-256 over their values, hexadecimal.
    """

    challenge: bytes
    registers: tuple[tuple[int, bytes], ...]
    digest: str


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        if len(found) != size:
            raise MalformedPayload("the quote of the TPM is cut off")
        self._at += size
        return found

    def number(self, kind: str) -> int:
        found: int = struct.unpack(">" + kind, self.take(struct.calcsize(">" + kind)))[0]
        return found

    def sized(self) -> bytes:
        return self.take(self.number("H"))

    def end(self) -> None:
        if self._at != len(self._data):
            raise MalformedPayload("the quote of the TPM has bytes too many")


def read_quote(data: bytes) -> Quote:
    """Take a TPMS_ATTEST structure apart.

    Raises:
        MalformedPayload: It is none, or no quote.
    """
    reader = _Reader(data)
    if reader.number("I") != _GENERATED or reader.number("H") != _ATTEST_QUOTE:
        raise MalformedPayload("the data was not quoted by a TPM")
    reader.sized()
    challenge = reader.sized()
    reader.take(_CLOCK_AND_FIRMWARE_BYTES)
    banks = reader.number("I")
    if banks > _MOST_BANKS:
        raise MalformedPayload(f"the quote of the TPM names {banks} banks of registers")
    registers = tuple((reader.number("H"), reader.take(reader.number("B"))) for _ in range(banks))
    digest = reader.sized()
    reader.end()
    return Quote(challenge, registers, digest.hex())


def check_quote(data: Mapping[str, Any], *, key: str, challenge: str) -> Quote:
    """Check the statement of a TPM.

    Args:
        data: Its fields: ``quoted`` and ``signature``, base64.
        key: The public attestation key of that node's TPM, PEM.
        challenge: What it has to answer, hexadecimal.

    Raises:
        MalformedPayload: A field is missing or is no such structure.
        BadSignature: That key did not sign it, or it answers another challenge.
    """
    quoted = _bytes(data, "quoted")
    reader = _Reader(_bytes(data, "signature"))
    algorithm, hashed = reader.number("H"), reader.number("H")
    if algorithm not in {_RSASSA, _ECDSA} or hashed != _SHA256:
        raise MalformedPayload(
            f"the TPM signed with {algorithm:#06x}/{hashed:#06x}: RSASSA or ECDSA with SHA-256 is "
            "needed"
        )
    parts = (reader.sized(),) if algorithm == _RSASSA else (reader.sized(), reader.sized())
    reader.end()
    verify_foreign(quoted, parts, key)
    quote = read_quote(quoted)
    if not hmac.compare_digest(quote.challenge, bytes.fromhex(challenge)):
        raise BadSignature("the quote of the TPM answers another challenge: it is an old one")
    return quote


def _bytes(data: Mapping[str, Any], name: str) -> bytes:
    text = data.get(name)
    if not isinstance(text, str) or len(text) > _MOST_TEXT:
        raise MalformedPayload(f"statement of the TPM: {name} is missing or too long", field=name)
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as exc:
        raise MalformedPayload(f"statement of the TPM: {name} is no base64", field=name) from exc
