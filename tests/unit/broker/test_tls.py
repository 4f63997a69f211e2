"""TLS contexts and their failures, in handshakes that happen in memory."""

import contextlib
import gc
import socket
import ssl
import struct
import threading

import pytest

from broker.access.authority import Authority, make_key_and_request, read_request
from broker.access.policy import Role
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from broker.tls import (
    PeerCertificate,
    TlsListener,
    TlsSettings,
    client_context,
    explain,
    never_connected,
    peer_certificate,
    server_context,
)
from capability_schemas.errors import AccessDenied, BrokerUnavailable, ConfigurationError
from capability_schemas.ids import now_ms
from support.tls import handshake

DAY_MS = 86_400_000


class Site:
    """An authority, and files made with it."""

    def __init__(self, folder, *, shift_ms=0):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.authority = Authority.create(
            folder / "authority", site="hall-3", clock=lambda: now_ms() + shift_ms
        )
        (folder / "ca.pem").write_text(self.authority.bundle)

    def listener(self, hosts=("broker.test",), **changes):
        key, made = self.authority.issue_server(hosts, **changes)
        (self.folder / "server.key").write_text(key)
        (self.folder / "server.crt").write_text(made.pem)
        return TlsListener(
            cert_file=self.folder / "server.crt",
            key_file=self.folder / "server.key",
            ca_file=self.folder / "ca.pem",
        )

    def member(self, identity="pump-7", **changes):
        key, request = make_key_and_request(identity)
        made = self.authority.issue_client(
            read_request(request, identity), identity=identity, role=Role.DEVICE, **changes
        )
        (self.folder / f"{identity}.key").write_text(key)
        (self.folder / f"{identity}.crt").write_text(made.pem)
        return made.serial, TlsSettings(
            ca_file=self.folder / "ca.pem",
            cert_file=self.folder / f"{identity}.crt",
            key_file=self.folder / f"{identity}.key",
        )


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path / "site")


def test_a_member_is_known_by_its_certificate(site):
    serial, tls = site.member()
    here, there = handshake(server_context(site.listener()), client_context(tls))
    assert peer_certificate(here) == PeerCertificate("pump-7", serial)
    assert there.version() == "TLSv1.3"


def test_a_client_without_certificate_may_come_and_is_nobody(site):
    tls = TlsSettings(ca_file=site.folder / "ca.pem")
    here, _ = handshake(server_context(site.listener()), client_context(tls))
    assert peer_certificate(here) is None
    assert peer_certificate(None) is None


def test_old_tls_is_refused(site):
    old = client_context(TlsSettings(ca_file=site.folder / "ca.pem"))
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        handshake(server_context(site.listener()), old)


def test_weak_ciphers_are_refused(site):
    weak = client_context(TlsSettings(ca_file=site.folder / "ca.pem"))
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("AES128-SHA256:AES128-SHA")  # no forward secrecy
    with pytest.raises(ssl.SSLError) as caught:
        handshake(server_context(site.listener()), weak)
    assert "cipher" in str(explain(caught.value))


@pytest.mark.parametrize(
    ("make", "host", "words"),
    [
        (lambda site: site.listener(days=-1 / 1440), "broker.test", "has run out"),
        (lambda site: site.listener(hosts=("10.0.0.7",)), "broker.test", "another host"),
        (lambda site: site.listener(hosts=("broker.test",)), "10.0.0.7", "another host"),
    ],
    ids=["expired", "address for name", "name for address"],
)
def test_failures_of_the_brokers_certificate_are_explained(site, make, host, words):
    tls = TlsSettings(ca_file=site.folder / "ca.pem")
    with pytest.raises(ssl.SSLError) as caught:
        handshake(server_context(make(site)), client_context(tls), host)
    assert words in str(explain(caught.value))


def test_a_broker_of_another_site_is_not_trusted(site, tmp_path):
    other = Site(tmp_path / "other")
    tls = TlsSettings(ca_file=site.folder / "ca.pem")
    with pytest.raises(ssl.SSLError) as caught:
        handshake(server_context(other.listener()), client_context(tls))
    assert "nobody we trust" in str(explain(caught.value))


def test_a_clock_that_is_behind_is_suspected(tmp_path):
    ahead = Site(tmp_path / "ahead", shift_ms=2 * DAY_MS)
    tls = TlsSettings(ca_file=ahead.folder / "ca.pem")
    with pytest.raises(ssl.SSLError) as caught:
        handshake(server_context(ahead.listener()), client_context(tls))
    assert "clock" in str(explain(caught.value))


def test_a_members_certificate_is_none_of_a_broker(site):
    _, tls = site.member("fake")
    fake = TlsListener(cert_file=tls.cert_file, key_file=tls.key_file, ca_file=tls.ca_file)
    client = client_context(TlsSettings(ca_file=site.folder / "ca.pem", check_hostname=False))
    with pytest.raises(ssl.SSLError) as caught:
        handshake(server_context(fake), client)
    assert "not for brokers" in str(explain(caught.value))


def test_members_of_other_sites_and_expired_ones_are_refused(site, tmp_path):
    other = Site(tmp_path / "other")
    _, stranger = other.member()
    _, old = site.member("old", days=-1 / 1440)
    server = server_context(site.listener())
    for tls in (stranger.model_copy(update={"ca_file": site.folder / "ca.pem"}), old):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(server, client_context(tls))


def test_files_that_do_not_fit_are_named(site, tmp_path):
    listener = site.listener()
    with pytest.raises(ConfigurationError, match=r"missing\.pem"):
        server_context(listener.model_copy(update={"ca_file": tmp_path / "missing.pem"}))
    _, tls = site.member()
    with pytest.raises(ConfigurationError, match="certificate files"):
        client_context(tls.model_copy(update={"key_file": listener.key_file}))


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("TLSV1_ALERT_UNKNOWN_CA", "enroll again"),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", "has run out"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "wants a certificate"),
        ("WRONG_VERSION_NUMBER", "speaks no TLS"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "at least 1.2"),
        ("SOMETHING_NEW", "TLS failed: SOMETHING_NEW"),
    ],
)
def test_alerts_are_explained(reason, words):
    error = ssl.SSLError(1, "[SSL] failure")
    error.reason = reason
    outer = ConnectionError("closed")
    outer.__cause__ = error
    assert words in str(explain(outer))


def test_other_failures_are_not_explained():
    assert explain(ConnectionRefusedError("refused")) is None


def test_a_forgotten_socket_closes_itself(site):
    context = client_context(TlsSettings(ca_file=site.folder / "ca.pem"))
    listening = socket.create_server(("127.0.0.1", 0))
    with listening, socket.create_connection(listening.getsockname()) as here:
        there, _ = listening.accept()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there.close()  # a reset
        with pytest.raises(OSError, match="reset"):
            context.wrap_socket(here, server_hostname="broker.test")
    gc.collect()  # a warning about a socket left open fails the test


# ---- what the broker says after the handshake, and what nobody said


class RevokingBroker:
    """Takes connections by TLS, and asks a revocation list about certificates."""

    def __init__(self, site, revoked, *, newest=ssl.TLSVersion.TLSv1_3):
        context = server_context(site.listener(hosts=("127.0.0.1",)))
        context.maximum_version = newest
        (site.folder / "revoked.pem").write_text(site.authority.revocation_list(revoked))
        context.load_verify_locations(site.folder / "revoked.pem")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        self._context = context
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtts://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                raw, _ = self._socket.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), raw:
                raw.settimeout(20)
                self._context.wrap_socket(raw, server_side=True).recv(1)

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(30)


def session_to(url, tls):
    return MqttSession(settings=SessionSettings(urls=(url,), client_id="pump-7", tls=tls))


async def test_a_revoked_certificate_is_final_when_the_broker_itself_says_so(site):
    serial, tls = site.member()
    broker = RevokingBroker(site, [serial])
    try:
        with pytest.raises(AccessDenied, match="our certificate was revoked"):
            async with session_to(broker.url, tls) as session:
                await session.wait_connected(30)
    finally:
        broker.close()


async def test_what_anybody_on_the_way_may_have_written_is_not_final(site):
    serial, tls = site.member()
    broker = RevokingBroker(site, [serial], newest=ssl.TLSVersion.TLSv1_2)
    try:
        async with session_to(broker.url, tls) as session:
            with pytest.raises(BrokerUnavailable, match="our certificate was revoked"):
                await session.wait_connected(2)
    finally:
        broker.close()


async def test_a_broker_that_is_not_there_says_nothing_of_certificates(site):
    _, tls = site.member()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with session_to(f"mqtts://127.0.0.1:{port}", tls) as session:
        with pytest.raises(BrokerUnavailable, match="refused") as caught:
            await session.wait_connected(2)
    assert "certificate" not in caught.value.message


@pytest.mark.parametrize(
    ("error", "never"),
    [
        (ConnectionRefusedError(111, "refused"), True),
        (socket.gaierror(-2, "unknown"), True),
        (ConnectionResetError(104, "reset"), False),
        (BrokenPipeError(32, "pipe"), False),
        (ssl.SSLError(1, "alert"), False),
        (ValueError("x"), False),
    ],
)
def test_what_never_reached_a_broker_is_told_from_what_was_cut(error, never):
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = error
    assert never_connected(wrapped) is never
