"""The roots of a site's authority: keys and certificates in files, and the link between two.

A new root has the name of the one before it, which signs it once more: that link lets whoever
trusts either of them follow a certificate of the new one (RFC 4210 section 4.4). Roots of one name
are told apart by their key identifiers, and a link between them does not count for their path
length, which is 0 (RFC 5280 section 4.2.1.9, self-issued certificates).
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from broker.access.credentials import write_private
from capability_schemas.errors import ConfigurationError

ROOT_DAYS: Final = 3650
SKEW: Final = timedelta(minutes=5)
"""How far ahead of the others' clocks ours may be: certificates are valid from so long ago."""

HASH: Final = hashes.SHA256()
_WARNING: Final = (
    "# PRIVATE KEY of the authority of a site: keep it here, and give it to nobody.\n"
    "# What clients trust the broker by is another file: foam authority show --pem\n"
)
_BEGIN: Final = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Root:
    """One root with its key.

    Attributes:
        number: Which one of the site, from 1.
        key: Its private key.
        certificate: Signed by itself.
        link: The same key and name signed by the root before it, PEM; empty for the first.
    """

    number: int
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    link: str

    @property
    def made_at(self) -> int:
        """When it was made, UTC milliseconds."""
        return milliseconds(self.certificate.not_valid_before_utc + SKEW)


def root_file(folder: Path, number: int) -> Path:
    """Return where key and certificates of a root stand."""
    return folder / f"root-{number}.pem"


def read_roots(folder: Path) -> list[Root]:
    """Read the roots of a folder, the oldest first.

    Raises:
        ConfigurationError: There is none, or a file is damaged.
    """
    names = (path.stem.removeprefix("root-") for path in folder.glob("root-*.pem"))
    roots = [_read(folder, number) for number in sorted(int(one) for one in names if one.isdigit())]
    if not roots:
        raise ConfigurationError(f"there is no authority in {folder}")
    return roots


def _read(folder: Path, number: int) -> Root:
    path = root_file(folder, number)
    try:
        data = path.read_bytes()
        key = serialization.load_pem_private_key(data, password=None)
        root, *links = x509.load_pem_x509_certificates(data[data.index(_BEGIN) :])
    except (OSError, ValueError) as exc:
        raise ConfigurationError(f"{path} is damaged: {exc}") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError(f"{path} holds no ECDSA key")
    return Root(number, key, root, "".join(pem(link) for link in links))


def write_root(
    folder: Path, number: int, *, site: str, now: datetime, before: Root | None = None
) -> None:
    """Make a root, and the link from the one before it, in one private file.

    Args:
        folder: Folder of the authority.
        number: Its number.
        site: The site, for its name.
        now: Begin of its validity.
        before: The root that it follows, if any.

    Raises:
        OSError: The file cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"FOAM site {site}"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"FOAM {site[:48]} root"),
        ]
    )
    if before is not None:
        name = before.certificate.subject
    texts = [_WARNING, private_pem(key), pem(_certify(key.public_key(), name, key, now))]
    if before is not None:
        link = _certify(key.public_key(), name, before.key, now, before.certificate)
        texts.append(pem(link))
    write_private(root_file(folder, number), "".join(texts))


def _certify(
    key: ec.EllipticCurvePublicKey,
    name: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    now: datetime,
    issuer: x509.Certificate | None = None,
) -> x509.Certificate:
    """Certify the key of a root: by itself, or by the root before it."""
    until = now + timedelta(days=ROOT_DAYS)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(until if issuer is None else min(until, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    if issuer is not None:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
    return builder.sign(signer, HASH)


def key_usage(*, sign: bool) -> x509.KeyUsage:
    """Return what a key may be used for: to sign certificates and lists, or for TLS."""
    return x509.KeyUsage(
        digital_signature=not sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
    )


def pem(certificate: x509.Certificate) -> str:
    """Return a certificate as text."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a private key as text (PKCS 8)."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def milliseconds(at: datetime) -> int:
    """Return UTC milliseconds."""
    return round(at.timestamp() * 1000)


def moment(at: int) -> datetime:
    """Return the instant of UTC milliseconds."""
    return datetime.fromtimestamp(at / 1000, UTC)
