"""The certificate authority of a site: one root, short-lived certificates, overlapping rotation.

Profile after RFC 5280: ECDSA on P-256 (what the TLS stacks of small devices have), certificates
for one use only (server or client), the identity as the only common name and, with site and role,
as a URI in the subject alternative name. Nothing of a signing request but its key and its name ends
up in a certificate.

Rotation overlaps: ``rotate`` makes a new root that the old one signs (see ``roots``). Then the
broker shows a certificate of the new root together with that link, so that whoever trusts either
root can follow it. Members get certificates of the new root from a few seconds later, when every
broker trusts it; when all have renewed, and so have the new bundle, ``retire`` drops the old root.
"""

import ipaddress
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.access.issued import IssuedLog
from broker.access.policy import Role
from broker.access.roots import (
    HASH,
    SKEW,
    Root,
    key_usage,
    milliseconds,
    moment,
    pem,
    private_pem,
    read_roots,
    root_file,
    write_root,
)
from capability_schemas.errors import BadSignature, ConfigurationError, Conflict, ProtocolError
from capability_schemas.ids import check_identifier, now_ms

CLIENT_DAYS: Final = 30
SERVER_DAYS: Final = 397
REQUEST_LIMIT_BYTES: Final = 16 * 1024
SETTLE_MS: Final = 5_000
"""How old a new root has to be before it signs members: the brokers have read it by then."""

_LEAST_RSA_BITS: Final = 2048
_SERIAL_BITS: Final = 120
"""Random bits of a serial number (RFC 5280 section 4.1.2.2 allows 159 in all); the number of the
root stands above them, so that it can be told of a certificate nobody has at hand."""

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


@dataclass(frozen=True, slots=True)
class RootFacts:
    """What a root is, for people.

    Attributes:
        number: Which one of the site, from 1.
        fingerprint: SHA-256 of its certificate, hexadecimal.
        made_at: UTC milliseconds.
        not_after: End of its validity, UTC milliseconds.
        signing: Whether it signs members now.
    """

    number: int
    fingerprint: str
    made_at: int
    not_after: int
    signing: bool


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
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(identity)).sign(key, HASH)
    return private_pem(key), request.public_bytes(serialization.Encoding.PEM).decode()


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
        self._issued = IssuedLog(folder / "issued")
        self._roots = read_roots(folder)

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
            if not root_file(folder, 1).exists() and not any(folder.glob("root-*.pem")):
                write_root(folder, 1, site=site, now=moment(clock()))
        except OSError as exc:
            raise ConfigurationError(f"authority {folder} cannot be written: {exc}") from exc
        return cls(folder, site=site, clock=clock)

    @property
    def bundle(self) -> str:
        """Certificates to trust, PEM: the newest root first."""
        return "".join(pem(root.certificate) for root in reversed(self._roots))

    def server_root(self) -> bytes:
        """The root that newcomers shall trust from now on, DER: for join tokens."""
        return self._signer().certificate.public_bytes(serialization.Encoding.DER)

    def roots(self) -> list[RootFacts]:
        """What the roots say of themselves, the newest first."""
        signing = self._signer()
        return [
            RootFacts(
                number=root.number,
                fingerprint=root.certificate.fingerprint(HASH).hex(),
                made_at=root.made_at,
                not_after=milliseconds(root.certificate.not_valid_after_utc),
                signing=root is signing,
            )
            for root in reversed(self._roots)
        ]

    def is_by_newest(self, serial: str) -> bool:
        """Tell whether the newest root signed a certificate.

        Args:
            serial: Its serial number, hexadecimal.
        """
        return int(serial, 16) >> _SERIAL_BITS == self._roots[-1].number

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

        Raises:
            ConfigurationError: It cannot be written down that it was issued.
        """
        check_identifier(identity, "identity")
        uri = f"foam://{self._site}/{role.value}/{identity}"
        made = self._sign(
            key,
            self._signer(),
            name=identity,
            names=[x509.UniformResourceIdentifier(uri)],
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
            days=days,
        )
        described = self._described(made, identity)
        # Before anybody has it: what is not written down could never be revoked at every broker.
        self._issued.note(described.serial, described.not_after, now=self._clock())
        return described

    def issue_server(
        self, hosts: Sequence[str], *, days: float = SERVER_DAYS
    ) -> tuple[str, Certificate]:
        """Make key and certificate of a broker, with what leads from it to every trusted root.

        Args:
            hosts: Names and addresses that clients connect to, at least one.
            days: How long it is valid, above 0.

        Returns:
            Private key (PKCS 8, PEM), and the certificate.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._sign(
            key.public_key(),
            self._roots[-1],
            name=hosts[0][:64],
            names=[_host(host) for host in hosts],
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
            days=days,
        )
        described = self._described(made, hosts[0])
        link = self._roots[-1].link if self.rotating else ""
        return private_pem(key), replace(described, pem=described.pem + link)

    def not_on_record(self, on_record: Collection[str]) -> list[str]:
        """Return the serial numbers of certificates that are valid, but nobody's any more.

        Args:
            on_record: Serial numbers that count, hexadecimal.

        Raises:
            ConfigurationError: The record of what was issued cannot be read.
        """
        counting = frozenset(on_record)
        return [one for one in self._issued.valid(self._clock()) if one not in counting]

    def revocation_list(self, serials: Sequence[str], *, days: float = 7) -> str:
        """Return the revocation lists of every trusted root, PEM (RFC 5280 section 5).

        Args:
            serials: Serial numbers, hexadecimal, whoever signed them.
            days: Until when the next list is to be expected.
        """
        now = moment(self._clock())
        lists = []
        for root in self._roots:
            builder = (
                x509.CertificateRevocationListBuilder()
                .issuer_name(root.certificate.subject)
                .last_update(now - SKEW)
                .next_update(now + timedelta(days=days))
                .add_extension(  # the roots share one name: this tells whose list it is
                    x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key()),
                    critical=False,
                )
            )
            for serial in serials:
                builder = builder.add_revoked_certificate(
                    x509.RevokedCertificateBuilder()
                    .serial_number(int(serial, 16))
                    .revocation_date(now - SKEW)
                    .build()
                )
            made = builder.sign(root.key, HASH)
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
        newest = self._roots[-1]
        try:
            write_root(
                self._folder,
                newest.number + 1,
                site=self._site,
                now=moment(self._clock()),
                before=newest,
            )
        except OSError as exc:
            raise ConfigurationError(f"authority {self._folder} cannot be written: {exc}") from exc
        self._roots = read_roots(self._folder)

    def retire(self) -> None:
        """Drop the old root: certificates it signed are worth nothing from now on.

        Raises:
            Conflict: There is only one.
        """
        if not self.rotating:
            raise Conflict("there is only one root: rotate first")
        root_file(self._folder, self._roots[0].number).unlink()
        self._roots = read_roots(self._folder)

    def _signer(self) -> Root:
        """Return the root that signs members: the newest, once brokers had the time to read it."""
        newest = self._roots[-1]
        return newest if self._clock() - newest.made_at >= SETTLE_MS else self._roots[0]

    def _sign(
        self,
        key: _PublicKey,
        root: Root,
        *,
        name: str,
        names: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        days: float,
    ) -> x509.Certificate:
        now = moment(self._clock())
        until = min(now + timedelta(days=days), root.certificate.not_valid_after_utc)
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(root.certificate.subject)
            .public_key(key)
            .serial_number((root.number << _SERIAL_BITS) | secrets.randbits(_SERIAL_BITS))
            .not_valid_before(now - SKEW)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(sign=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key()),
                critical=False,
            )
            .sign(root.key, HASH)
        )

    def _described(self, made: x509.Certificate, identity: str) -> Certificate:
        return Certificate(
            pem=pem(made),
            serial=f"{made.serial_number:x}",
            not_after=milliseconds(made.not_valid_after_utc),
            identity=identity,
        )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
