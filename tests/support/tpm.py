"""A TPM made of software: keys of our own, and the structures of the TPM 2.0 library."""

import base64
import hashlib
import struct

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


class SoftTpm:
    """Quotes registers as ``tpm2_quote`` writes it.

    Args:
        kind: ``rsa`` or ``ec``.
        private: PEM of its key; made when empty.
        registers: What the registers come to, hexadecimal.
        selection: Which they are: the list of a TPML_PCR_SELECTION, 0-4 and 7 of SHA-256 when
            empty.
    """

    def __init__(
        self, kind: str, private: str = "", registers: str = "", selection: bytes = b""
    ) -> None:
        if private:
            self._key = serialization.load_pem_private_key(private.encode(), password=None)
        elif kind == "rsa":
            self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        else:
            self._key = ec.generate_private_key(ec.SECP256R1())
        self.selection = selection or struct.pack(">IHB", 1, 0x000B, 3) + b"\x9f\x00\x00"
        self.registers = registers or hashlib.sha256(b"what the firmware measured").hexdigest()

    @property
    def public(self) -> str:
        """The public attestation key, PEM."""
        return (
            self._key.public_key()
            .public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            .decode()
        )

    @property
    def private(self) -> str:
        """The private one, PEM."""
        return self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode()

    def attest(self, challenge: str) -> bytes:
        """Make a TPMS_ATTEST of kind quote."""
        return b"".join(
            (
                struct.pack(">IH", 0xFF544347, 0x8018),
                _sized(b"\x00\x0b" + bytes(32)),
                _sized(bytes.fromhex(challenge)),
                struct.pack(">QIIB", 1234, 5, 6, 1),
                struct.pack(">Q", 0x2019),
                self.selection,
                _sized(bytes.fromhex(self.registers)),
            )
        )

    def signature(self, data: bytes) -> bytes:
        """Make a TPMT_SIGNATURE over SHA-256."""
        if isinstance(self._key, rsa.RSAPrivateKey):
            made = self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())
            return struct.pack(">HH", 0x0014, 0x000B) + _sized(made)
        assert isinstance(self._key, ec.EllipticCurvePrivateKey)
        parts = decode_dss_signature(self._key.sign(data, ec.ECDSA(hashes.SHA256())))
        return struct.pack(">HH", 0x0018, 0x000B) + b"".join(
            _sized(part.to_bytes(32, "big")) for part in parts
        )

    def quote(self, challenge: str) -> dict[str, str]:
        """Make the fields of a statement."""
        quoted = self.attest(challenge)
        return {
            "quoted": base64.b64encode(quoted).decode(),
            "signature": base64.b64encode(self.signature(quoted)).decode(),
        }
