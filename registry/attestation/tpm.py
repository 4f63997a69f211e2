"""Quotes of a TPM 2.0: the registers of a platform, signed inside the chip with our challenge.

Structures after "Trusted Platform Module Library, Part 2: Structures", sections 10.12.8
(TPMS_ATTEST) and 11.3 (TPMT_SIGNATURE); all integers are big-endian.
"""

import base64
import hmac
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from capability_schemas.errors import BadSignature, MalformedPayload
from capability_schemas.signing import verify_foreign

DEFAULT_REGISTERS: Final = "sha256:0,1,2,3,4,7"
"""What nodes quote: firmware, its settings, the boot loader, and whether Secure Boot is on (TCG PC
Client Platform Firmware Profile, section 3.3.4)."""

_GENERATED: Final = 0xFF544347
_ATTEST_QUOTE: Final = 0x8018
_RSASSA: Final = 0x0014
_ECDSA: Final = 0x0018
_SHA256: Final = 0x000B
_CLOCK_AND_FIRMWARE_BYTES: Final = 17 + 8
_BANKS: Final = {0x0004: "sha1", _SHA256: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
_ASKED_BANKS: Final = ("sha256", "sha384", "sha512")
_MOST_REGISTER: Final = 23
_MOST_TEXT: Final = 16_384
_MOST_BANKS: Final = 16


@dataclass(frozen=True, slots=True)
class Quote:
    """What a quote says.

    Attributes:
        challenge: The data it was asked to sign along.
        registers: Which registers it is of, as ``registers_text`` writes them; several banks are
            joined by ``+``.
        digest: SHA-256 over their values, hexadecimal.
    """

    challenge: bytes
    registers: str
    digest: str


def registers_text(text: str) -> str:
    """Write a selection of registers in the one form that selections are compared in.

    Args:
        text: A bank and numbers of registers, such as ``sha256:7,0,1``.

    Raises:
        ValueError: It is none, or of a bank whose hash is broken.
    """
    bank, _, listed = text.partition(":")
    numbers = [one.strip() for one in listed.split(",")]
    sound = all(re.fullmatch(r"[0-9]{1,2}", one) for one in numbers)
    if bank not in _ASKED_BANKS or not sound or max(map(int, numbers)) > _MOST_REGISTER:
        raise ValueError(
            f"{text!r}: write one of the banks {', '.join(_ASKED_BANKS)} and its registers, from 0 "
            f'to {_MOST_REGISTER}, such as "{DEFAULT_REGISTERS}"'
        )
    return _selected(bank, {int(one) for one in numbers})


def _selected(bank: str, numbers: Iterable[int]) -> str:
    return f"{bank}:{','.join(map(str, sorted(numbers)))}"


def _masked(algorithm: int, mask: bytes) -> str:
    """Write a TPMS_PCR_SELECTION: bit ``n % 8`` of byte ``n / 8`` stands for register ``n``."""
    bits = int.from_bytes(mask, "little")
    numbers = (number for number in range(bits.bit_length()) if bits >> number & 1)
    return _selected(_BANKS.get(algorithm, f"{algorithm:#06x}"), numbers)


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
    registers = [_masked(reader.number("H"), reader.take(reader.number("B"))) for _ in range(banks)]
    digest = reader.sized()
    reader.end()
    return Quote(challenge, "+".join(registers), digest.hex())


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
    except ValueError as exc:  # of characters beyond ASCII too
        raise MalformedPayload(f"statement of the TPM: {name} is no base64", field=name) from exc
