"""The site's certificate authority: what it signs, what it refuses, and its rotation."""

import ssl
import stat
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.access.authority import (
    SETTLE_MS,
    Authority,
    check_certificate,
    make_key_and_request,
    read_request,
)
from broker.access.policy import Role
from capability_schemas.errors import BadSignature, ConfigurationError, Conflict, ProtocolError
from support.tls import handshake

NOW = 1_790_000_000_000


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "authority", site="hall-3", clock=lambda: NOW)


def request(key, *, names=("pump-7",), extension=None, algorithm=hashes.SHA256()):  # noqa: B008
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    )
    if extension is not None:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM).decode()


def shake_hands(server, client):
    """Return the certificate that the server saw."""
    return handshake(server, client)[0].getpeercert()


def contexts(tmp_path, authority, *, identity="pump-7", trust=None):
    """A server with a certificate of the authority, and a client with one."""
    key, made = authority.issue_server(["broker.test", "127.0.0.1"])
    (tmp_path / "server.pem").write_text(made.pem + key)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.pem")
    server.load_verify_locations(cadata=authority.bundle)
    server.verify_mode = ssl.CERT_REQUIRED
    own, asked = make_key_and_request(identity)
    signed = authority.issue_client(
        read_request(asked, identity), identity=identity, role=Role.NODE
    )
    (tmp_path / "client.pem").write_text(signed.pem + own)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_cert_chain(tmp_path / "client.pem")
    client.load_verify_locations(cadata=trust or authority.bundle)
    return server, client


@pytest.fixture
def current(tmp_path):
    """An authority of today, for real handshakes look at the clock."""
    return Authority.create(tmp_path / "authority", site="hall-3")


def test_both_sides_of_a_handshake_know_each_other(tmp_path, current):
    seen = shake_hands(*contexts(tmp_path, current))
    assert seen["subject"] == ((("commonName", "pump-7"),),)
    assert ("URI", "foam://hall-3/node/pump-7") in seen["subjectAltName"]


def test_a_certificate_of_another_site_opens_nothing(tmp_path, current):
    other = Authority.create(tmp_path / "other", site="hall-4")
    server, _ = contexts(tmp_path, current)
    _, stranger = contexts(tmp_path, other, trust=current.bundle)
    with pytest.raises(ssl.SSLError):
        shake_hands(server, stranger)


def test_the_file_with_the_key_says_so(tmp_path):
    Authority.create(tmp_path / "authority", site="hall-3")
    text = (tmp_path / "authority" / "root-1.pem").read_text()
    assert text.startswith("# PRIVATE KEY of the authority")
    assert "PRIVATE KEY" not in Authority(tmp_path / "authority", site="hall-3").bundle


def test_a_member_cannot_pass_for_a_broker(tmp_path, current):
    own, asked = make_key_and_request("pump-7")
    signed = current.issue_client(read_request(asked, "pump-7"), identity="pump-7", role=Role.NODE)
    (tmp_path / "fake.pem").write_text(signed.pem + own)
    fake = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    fake.load_cert_chain(tmp_path / "fake.pem")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=current.bundle)
    client.check_hostname = False  # its purpose alone must give it away
    with pytest.raises(ssl.SSLError, match="purpose"):
        shake_hands(fake, client)


def test_only_key_and_name_of_a_request_are_certified(authority):
    key, asked = make_key_and_request("pump-7")
    made = authority.issue_client(
        read_request(asked, "pump-7"), identity="pump-7", role=Role.DEVICE, days=2
    )
    found = x509.load_pem_x509_certificate(made.pem.encode())
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert made.not_after == NOW + 2 * 86_400_000
    assert int(made.serial, 16) == found.serial_number
    assert "PRIVATE KEY" in key


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (lambda: request(ec.generate_private_key(ec.SECP256R1()), names=("pump-8",)), "pump-7"),
        (
            lambda: request(ec.generate_private_key(ec.SECP256R1()), names=("pump-7", "admin")),
            "nothing else",
        ),
        (lambda: request(ec.generate_private_key(ec.SECP256R1()), names=()), "pump-7"),
        (
            lambda: request(
                ec.generate_private_key(ec.SECP256R1()),
                extension=x509.SubjectAlternativeName([x509.DNSName("router-1")]),
            ),
            "extensions",
        ),
        (
            lambda: request(
                ec.generate_private_key(ec.SECP256R1()),
                extension=x509.BasicConstraints(ca=True, path_length=None),
            ),
            "extensions",
        ),
        (lambda: request(rsa.generate_private_key(65537, 1024)), "1024 bits"),
        (lambda: request(ec.generate_private_key(ec.SECP192R1())), "curve"),
        (lambda: "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", "cannot be read"),
        (lambda: "", "cannot be read"),
        (lambda: "x" * 20_000, "at most"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(made, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        read_request(made(), "pump-7")


def test_a_request_signed_by_another_key_is_refused():
    _, asked = make_key_and_request("pump-7")
    damaged = x509.load_pem_x509_csr(asked.encode()).public_bytes(serialization.Encoding.DER)
    flipped = damaged[:-1] + bytes([damaged[-1] ^ 1])
    try:
        pem = x509.load_der_x509_csr(flipped).public_bytes(serialization.Encoding.PEM).decode()
    except ValueError:
        pytest.skip("the flipped bit broke the encoding, not the signature")
    with pytest.raises(ProtocolError):
        read_request(pem, "pump-7")


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["p384", "ed25519", "rsa2048"],
)
def test_other_strong_keys_are_taken(authority, key):
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    public = read_request(request(key, algorithm=algorithm), "pump-7")
    made = authority.issue_client(public, identity="pump-7", role=Role.NODE)
    found = x509.load_pem_x509_certificate(made.pem.encode())
    assert found.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    ) == key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def test_the_keys_are_private_and_outlive_the_process(tmp_path, authority):
    folder = tmp_path / "authority"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]
    again = Authority.create(folder, site="hall-3", clock=lambda: NOW)
    assert again.bundle == authority.bundle
    assert "PRIVATE" not in again.bundle


def test_rotation_overlaps_and_ends(tmp_path, current):
    server, old_member = contexts(tmp_path, current)
    before = current.bundle
    current.rotate()
    assert current.rotating
    with pytest.raises(Conflict, match="under way"):
        current.rotate()
    # Old and new members meet brokers that trust both roots, whichever bundle the members know.
    server, new_member = contexts(tmp_path, current, trust=before)
    shake_hands(server, new_member)
    shake_hands(server, old_member)
    server, newcomer = contexts(tmp_path, current, trust=newest_of(current))
    shake_hands(server, newcomer)
    current.retire()
    assert Authority.create(tmp_path / "authority", site="hall-3").bundle == current.bundle
    assert not current.rotating
    assert current.bundle != before
    server, renewed = contexts(tmp_path, current)
    shake_hands(server, renewed)
    old_member.load_verify_locations(cadata=current.bundle)  # even one that trusts the new root
    with pytest.raises(ssl.SSLError):
        shake_hands(server, old_member)
    with pytest.raises(Conflict, match="only one"):
        current.retire()


def newest_of(authority):
    """The bundle of somebody who has joined with a token of the new root alone."""
    newest = authority.bundle.split("-----END CERTIFICATE-----\n")[0]
    return newest + "-----END CERTIFICATE-----\n"


def test_a_new_root_signs_members_once_the_brokers_have_read_it(tmp_path):
    now = [NOW]
    authority = Authority.create(tmp_path / "authority", site="hall-3", clock=lambda: now[0])
    _, asked = make_key_and_request("pump-7")
    key = read_request(asked, "pump-7")

    def issue():
        return authority.issue_client(key, identity="pump-7", role=Role.NODE)

    first, token_root = issue(), authority.server_root()
    assert authority.is_by_newest(first.serial)
    authority.rotate()
    early = issue()
    assert not authority.is_by_newest(early.serial)
    assert authority.server_root() == token_root
    assert [(root.number, root.signing) for root in authority.roots()] == [(2, False), (1, True)]
    now[0] += SETTLE_MS
    late = issue()
    assert [authority.is_by_newest(one.serial) for one in (first, early, late)] == [
        False,
        False,
        True,
    ]
    assert authority.server_root() != token_root
    assert [(root.number, root.signing) for root in authority.roots()] == [(2, True), (1, False)]
    authority.retire()
    assert [root.number for root in authority.roots()] == [2]
    authority.rotate()  # and once more: the link is that of the root before it
    assert [root.number for root in authority.roots()] == [3, 2]


def test_revoked_serials_stand_in_the_list_of_every_root(tmp_path, current):
    _, asked = make_key_and_request("pump-7")
    key = read_request(asked, "pump-7")
    made = current.issue_client(key, identity="pump-7", role=Role.NODE)
    current.rotate()
    lists = current.revocation_list([made.serial]).split("-----END X509 CRL-----\n")[:-1]
    assert len(lists) == 2
    for pem in lists:
        found = x509.load_pem_x509_crl((pem + "-----END X509 CRL-----\n").encode())
        assert found.get_revoked_certificate_by_serial_number(int(made.serial, 16)) is not None


def test_no_certificate_outlives_its_root(authority):
    _, asked = make_key_and_request("pump-7")
    key = read_request(asked, "pump-7")
    made = authority.issue_client(key, identity="pump-7", role=Role.NODE, days=100_000)
    root = x509.load_pem_x509_certificate(authority.bundle.encode())
    assert made.not_after == round(root.not_valid_after_utc.timestamp() * 1000)
    assert root.not_valid_after_utc - root.not_valid_before_utc > timedelta(days=3000)


def test_a_damaged_folder_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="no authority"):
        Authority(tmp_path, site="hall-3")
    (tmp_path / "root-1.pem").write_text("nonsense")
    with pytest.raises(ConfigurationError, match="root-1"):
        Authority(tmp_path, site="hall-3")


def test_a_newcomer_takes_its_own_certificate_only(authority):
    key, asked = make_key_and_request("pump-7")
    other, _ = make_key_and_request("pump-7")
    made = authority.issue_client(
        read_request(asked, "pump-7"), identity="pump-7", role=Role.DEVICE
    )
    check_certificate(made.pem, key=key, identity="pump-7")
    for pem, held, name in (
        (made.pem, other, "pump-7"),
        (made.pem, key, "pump-8"),
        ("nonsense", key, "pump-7"),
        (made.pem, "nonsense", "pump-7"),
    ):
        with pytest.raises(BadSignature):
            check_certificate(pem, key=held, identity=name)
