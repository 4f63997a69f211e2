"""The certificate authority of a site: one root, short-lived certificates, overlapping rotation.

Profile after RFC 5280: ECDSA on P-256 (what the TLS stacks of small devices have), certificates
for one use only (server or client), the identity as the only common name and, with site and role,
as a URI in the subject alternative name. Nothing of a signing request but its key and its name ends
up in a certificate.

Rotation overlaps: ``rotate`` makes a new root that signs members from then on while both are
trusted and the broker still shows the old one's certificate; when every member has renewed, and so
has the new bundle, ``retire`` drops the old root.
"""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.access.credentials import write_private
from broker.access.policy import Role
from capability_schemas.errors import BadSignature, ConfigurationError, Conflict, ProtocolError
from capability_schemas.ids import check_identifier, now_ms

CLIENT_DAYS: Final = 30
SERVER_DAYS: Final = 397
ROOT_DAYS: Final = 3650
REQUEST_LIMIT_BYTES: Final = 16 * 1024

_SKEW: Final = timedelta(minutes=5)
"""How far ahead of the others' clocks ours may be: certificates are valid from so long ago."""

_LEAST_RSA_BITS: Final = 2048
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What the library raises for structures that are none."""

_PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate that was issued.

    Attributes:
        pem: The certificate.
        serial: Its serial number, hexadecimal.
        not_after: End of its validity, UTC milliseconds.
        identity: Whose it is.
    """

    pem: str
    serial: str
    not_after: int
    identity: str


def make_key_and_request(identity: str) -> tuple[str, str]:
    """Make a key pair and a signing request for it, on the machine of the newcomer.

    Args:
        identity: The only name in the request.

    Returns:
        Private key (PKCS 8) and request, both PEM.

    Raises:
        ProtocolError: ``identity`` is no identifier.
    """
    check_identifier(identity, "identity")
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(identity)).sign(key, _HASH)
    return _private_pem(key), request.public_bytes(serialization.Encoding.PEM).decode()


def read_request(pem: str, identity: str) -> _PublicKey:
    """Check a signing request and return its public key.

    Args:
        pem: The request as received.
        identity: The name it may ask for.

    Raises:
        ProtocolError: It is malformed, not signed with its own key, asks for another name or for
            more than the name, or its key is weak.
    """
    if len(pem) > REQUEST_LIMIT_BYTES:
        raise ProtocolError(f"a signing request has at most {REQUEST_LIMIT_BYTES} bytes")
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        sound = request.is_signature_valid
        key = request.public_key()
        names = [(part.oid, part.value) for part in request.subject]
        extensions = list(request.extensions)
    except _UNREADABLE as exc:
        raise ProtocolError(f"signing request cannot be read: {exc}") from exc
    if not sound:
        raise ProtocolError("signing request is not signed with the key it brings")
    if names != [(NameOID.COMMON_NAME, identity)]:
        raise ProtocolError(
            f"signing request must name {identity!r} as its common name, and nothing else"
        )
    if extensions:
        asked = ", ".join(found.oid.dotted_string for found in extensions)
        raise ProtocolError(f"signing request asks for extensions ({asked}): leave them out")
    return _strong(key)


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a certificate says of itself.

    Attributes:
        names: Names, addresses and URIs that it is good for.
        not_before: Begin of its validity, UTC milliseconds.
        not_after: End of its validity, UTC milliseconds.
    """

    names: frozenset[str]
    not_before: int
    not_after: int

    def left(self, now: int) -> float:
        """Return the share of its time that is left, 1 to below 0."""
        return (self.not_after - now) / max(1, self.not_after - self.not_before)


def read_certificate(pem: str) -> CertificateFacts | None:
    """Read a certificate; None when it is none, or names nothing."""
    try:
        found = x509.load_pem_x509_certificate(pem.encode())
        named = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (*_UNREADABLE, x509.ExtensionNotFound):
        return None
    return CertificateFacts(
        names=frozenset(str(entry.value) for entry in named),
        not_before=round(found.not_valid_before_utc.timestamp() * 1000),
        not_after=round(found.not_valid_after_utc.timestamp() * 1000),
    )


def check_certificate(pem: str, *, key: str, identity: str) -> None:
    """Make sure that a certificate that was granted is for our own key and name.

    Args:
        pem: The certificate.
        key: Our private key, PEM.
        identity: Our name.

    Raises:
        BadSignature: It is for another key or name, or cannot be read.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        own = serialization.load_pem_private_key(key.encode(), password=None)
        names = [(part.oid, part.value) for part in certificate.subject]
        fits = certificate.public_key() == own.public_key()
    except _UNREADABLE as exc:
        raise BadSignature(f"the certificate cannot be read: {exc}") from exc
    if not fits or names != [(NameOID.COMMON_NAME, identity)]:
        raise BadSignature("the certificate is not for our key and name")


def _strong(key: object) -> _PublicKey:
    if isinstance(key, ec.EllipticCurvePublicKey):
        if isinstance(key.curve, _CURVES):
            return key
        raise ProtocolError(f"key on curve {key.curve.name}: use P-256 or P-384")
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size >= _LEAST_RSA_BITS:
            return key
        raise ProtocolError(
            f"RSA key of {key.key_size} bits: at least {_LEAST_RSA_BITS} are needed"
        )
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise ProtocolError("kind of key: use ECDSA on P-256 or P-384, Ed25519, or RSA")


class Authority:
    """The roots of one site, in a folder of mode 0700. Blocking; used from a thread in a loop.

    Args:
        folder: Where keys and certificates of the roots are; made by ``create``.
        site: The site, which stands in every certificate.
        clock: UTC milliseconds.

    Raises:
        ConfigurationError: The folder holds no sound authority.
    """

    def __init__(self, folder: Path, *, site: str, clock: Callable[[], int] = now_ms) -> None:
        self._folder = folder
        self._site = site
        self._clock = clock
        self._roots = self._load()

    @classmethod
    def create(cls, folder: Path, *, site: str, clock: Callable[[], int] = now_ms) -> "Authority":
        """Open the authority of a folder, making its first root where there is none.

        Raises:
            ConfigurationError: The folder cannot be used, or is damaged.
        """
        check_identifier(site, "site")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            if not (folder / _file(1)).exists():
                _write_root(folder, 1, site=site, now=_time(clock()))
        except OSError as exc:
            raise ConfigurationError(f"authority {folder} cannot be written: {exc}") from exc
        return cls(folder, site=site, clock=clock)

    @property
    def bundle(self) -> str:
        """Certificates to trust, PEM: the newest root first."""
        return "".join(_pem(root) for _, root in reversed(self._roots))

    def server_root(self) -> bytes:
        """The certificate of the root that brokers are certified by, DER: for join tokens."""
        return self._roots[0][1].public_bytes(serialization.Encoding.DER)

    @property
    def rotating(self) -> bool:
        """Whether two roots are trusted."""
        return len(self._roots) > 1

    def issue_client(
        self, key: _PublicKey, *, identity: str, role: Role, days: float = CLIENT_DAYS
    ) -> Certificate:
        """Certify a member.

        Args:
            key: Its public key, as ``read_request`` returned it.
            identity: Its name.
            role: Its role, for people who look at the certificate; brokers go by the identity.
            days: How long it is valid, above 0.
        """
        check_identifier(identity, "identity")
        uri = f"foam://{self._site}/{role.value}/{identity}"
        signer, root = self._roots[-1]
        made = self._sign(
            key,
            signer,
            root,
            name=identity,
            names=[x509.UniformResourceIdentifier(uri)],
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
            days=days,
        )
        return self._described(made, identity)

    def issue_server(
        self, hosts: Sequence[str], *, days: float = SERVER_DAYS
    ) -> tuple[str, Certificate]:
        """Make key and certificate of a broker, signed by the oldest root that is trusted.

        Args:
            hosts: Names and addresses that clients connect to, at least one.
            days: How long it is valid, above 0.

        Returns:
            Private key (PKCS 8, PEM), and the certificate.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        signer, root = self._roots[0]
        made = self._sign(
            key.public_key(),
            signer,
            root,
            name=hosts[0][:64],
            names=[_host(host) for host in hosts],
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
            days=days,
        )
        return _private_pem(key), self._described(made, hosts[0])

    def revocation_list(self, serials: Sequence[str], *, days: float = 7) -> str:
        """Return the revocation lists of every trusted root, PEM (RFC 5280 section 5).

        Args:
            serials: Serial numbers, hexadecimal, whoever signed them.
            days: Until when the next list is to be expected.
        """
        now = _time(self._clock())
        lists = []
        for signer, root in self._roots:
            builder = (
                x509.CertificateRevocationListBuilder()
                .issuer_name(root.subject)
                .last_update(now - _SKEW)
                .next_update(now + timedelta(days=days))
            )
            for serial in serials:
                builder = builder.add_revoked_certificate(
                    x509.RevokedCertificateBuilder()
                    .serial_number(int(serial, 16))
                    .revocation_date(now - _SKEW)
                    .build()
                )
            made = builder.sign(signer, _HASH)
            lists.append(made.public_bytes(serialization.Encoding.PEM).decode())
        return "".join(lists)

    def rotate(self) -> None:
        """Make a new root; both are trusted until ``retire``.

        Raises:
            Conflict: A rotation is under way.
            ConfigurationError: The folder cannot be written.
        """
        if self.rotating:
            raise Conflict("a rotation is under way: retire the old root first")
        number = max(self._numbers()) + 1
        try:
            _write_root(self._folder, number, site=self._site, now=_time(self._clock()))
        except OSError as exc:
            raise ConfigurationError(f"authority {self._folder} cannot be written: {exc}") from exc
        self._roots = self._load()

    def retire(self) -> None:
        """Drop the old root: certificates it signed are worth nothing from now on.

        Raises:
            Conflict: There is only one.
        """
        if not self.rotating:
            raise Conflict("there is only one root: rotate first")
        (self._folder / _file(min(self._numbers()))).unlink()
        self._roots = self._load()

    def _numbers(self) -> list[int]:
        names = (path.stem.removeprefix("root-") for path in self._folder.glob("root-*.pem"))
        return sorted(int(name) for name in names if name.isdigit())

    def _load(self) -> list[tuple[ec.EllipticCurvePrivateKey, x509.Certificate]]:
        roots = []
        for number in self._numbers():
            path = self._folder / _file(number)
            try:
                data = path.read_bytes()
                key = serialization.load_pem_private_key(data, password=None)
                root = x509.load_pem_x509_certificate(data[data.index(_BEGIN) :])
            except (OSError, ValueError) as exc:
                raise ConfigurationError(f"{path} is damaged: {exc}") from exc
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ConfigurationError(f"{path} holds no ECDSA key")
            roots.append((key, root))
        if not roots:
            raise ConfigurationError(f"there is no authority in {self._folder}")
        return roots

    def _sign(
        self,
        key: _PublicKey,
        signer: ec.EllipticCurvePrivateKey,
        root: x509.Certificate,
        *,
        name: str,
        names: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        days: float,
    ) -> x509.Certificate:
        now = _time(self._clock())
        until = min(now + timedelta(days=days), root.not_valid_after_utc)
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(root.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(sign=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
            .sign(signer, _HASH)
        )

    def _described(self, made: x509.Certificate, identity: str) -> Certificate:
        return Certificate(
            pem=_pem(made),
            serial=f"{made.serial_number:x}",
            not_after=round(made.not_valid_after_utc.timestamp() * 1000),
            identity=identity,
        )


_HASH: Final = hashes.SHA256()
_BEGIN: Final = b"-----BEGIN CERTIFICATE-----"


def _file(number: int) -> str:
    return f"root-{number}.pem"


def _write_root(folder: Path, number: int, *, site: str, now: datetime) -> None:
    """Make a self-signed root; key and certificate stand in one private file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"FOAM site {site}"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"FOAM {site[:48]} root {number}"),
        ]
    )
    root = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=ROOT_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, _HASH)
    )
    write_private(folder / _file(number), _private_pem(key) + _pem(root))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, sign: bool) -> x509.KeyUsage:
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


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def _time(at: int) -> datetime:
    return datetime.fromtimestamp(at / 1000, UTC)
