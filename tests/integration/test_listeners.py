"""What a client is told when it cannot connect, and every listener that it can connect to."""

import asyncio
import contextlib
import datetime
import gc
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from broker.access import CredentialStore, Role
from broker.access.authority import Authority, make_key_and_request, read_request
from broker.embedded import EmbeddedBroker
from broker.embedded.crowd import Crowd
from broker.embedded.listener import Listener
from broker.engine import EngineSettings, WebSocketListener
from broker.mosquitto import MosquittoBroker
from broker.nats import NatsBroker
from broker.session.base import Message
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from broker.session.websocket import WebSocket
from broker.tls import TlsSettings
from capability_schemas.errors import AccessDenied, BrokerUnavailable, FoamError
from capability_schemas.topics import TopicKind, Topics
from conftest import require_broker
from foam.doctor import run_checks
from foam.settings import Settings
from mqtt_probe import connect_packet
from support.hostile import UPGRADE, Papers, Raw, connect, frame

pytestmark = pytest.mark.broker

TOPICS = Topics()
STATE = TOPICS.build(TopicKind.NODE_STATE, node="edge-1")
DAY_MS = 86_400_000
CONNECT_S = 30.0
IDENTITIES = {"edge-1": Role.NODE, "pump-1": Role.DEVICE, "watcher-1": Role.OBSERVER}


@dataclass(frozen=True)
class Place:
    """A broker with all its listeners, and the papers of its site."""

    engine: Any
    papers: Papers
    store: CredentialStore
    passwords: dict[str, str]
    folder: Path

    def url(self, scheme: str, port: int | None = None) -> str:
        ports = {"mqtt": self.engine.port, "mqtts": self.engine.tls_port}
        found = ports.get(scheme, self.engine.websocket_port) if port is None else port
        return f"{scheme}://127.0.0.1:{found}"

    def session(self, identity: str, url: str, **changes: Any) -> MqttSession:
        fields: dict[str, Any] = {
            "urls": (url,),
            "client_id": identity,
            "username": identity,
            "password": SecretStr(self.passwords[identity]),
            "tls": TlsSettings(ca_file=self.papers.listener.ca_file),
            "connect_timeout_s": CONNECT_S,
        }
        return MqttSession(settings=SessionSettings(**fields | changes))


@contextlib.asynccontextmanager
async def place(folder: Path, kind: str = "embedded", **changes: Any) -> Any:
    """Run a broker with TLS and WebSocket over TLS, unless ``changes`` say otherwise."""
    store = CredentialStore(folder / "credentials.json")
    passwords = {name: store.add(name, role) for name, role in IDENTITIES.items()}
    papers = changes.pop("papers", None) or Papers.make(folder)
    given: dict[str, Any] = {"tls": papers.listener, "websocket": WebSocketListener(secure=True)}
    settings = EngineSettings(data_dir=folder / "broker", **given | changes)
    parts: dict[str, Any] = {"settings": settings, "credentials": store, "topics": TOPICS}
    made: Any = {
        "embedded": lambda: EmbeddedBroker(**parts),
        "mosquitto": lambda: MosquittoBroker(**parts),
        "nats": lambda: NatsBroker(**parts, passwords=passwords),
    }[kind]()
    async with made:
        yield Place(made, papers, store, passwords, folder)


async def why_not(session: MqttSession) -> FoamError:
    """Return what a session says that cannot connect."""
    with contextlib.suppress(FoamError):
        async with session:
            loop = asyncio.get_running_loop()
            end = loop.time() + CONNECT_S
            while loop.time() < end:
                try:
                    await session.wait_connected(1.0)
                except BrokerUnavailable as error:
                    if "The last try" in error.message:
                        return error
                except FoamError as error:
                    return error
    raise AssertionError("it connected, or said nothing")


# ---- the certificate of the broker


def issued(folder: Path, *, names: tuple[str, ...] = ("127.0.0.1",), days_ago: int = 0) -> Papers:
    """Papers of an authority that was made, and signed, some days ago (or will be)."""
    folder.mkdir()
    made = Papers.make(folder, names=names)
    if days_ago:
        shift = days_ago * DAY_MS
        now_ms = int(datetime.datetime.now(datetime.UTC).timestamp() * 1000)
        authority = Authority.create(folder / "then", site="local", clock=lambda: now_ms - shift)
        key, server = authority.issue_server(list(names))
        made.listener.key_file.write_text(key)
        made.listener.cert_file.write_text(server.pem)
        made.listener.ca_file.write_text(authority.bundle)
    return made


def self_signed(folder: Path) -> Papers:
    made = issued(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    made.listener.cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    made.listener.key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return made


BROKER_CERTIFICATES = {
    "expired": (lambda at: issued(at, days_ago=3000), "has run out"),
    "not valid yet": (lambda at: issued(at, days_ago=-30), "not valid yet"),
    "another name": (lambda at: issued(at, names=("broker.test",)), "is for another host"),
    "self-signed": (self_signed, "signed by nobody we trust"),
}


@pytest.mark.parametrize("scheme", ["mqtts", "wss"])
@pytest.mark.parametrize("case", BROKER_CERTIFICATES)
async def test_what_is_wrong_with_the_brokers_certificate_is_said(tmp_path, case, scheme):
    make, sentence = BROKER_CERTIFICATES[case]
    async with place(tmp_path, papers=make(tmp_path / "papers")) as here:
        error = await why_not(here.session("pump-1", here.url(scheme)))
        assert isinstance(error, BrokerUnavailable)
        assert sentence in error.message
        assert here.url(scheme) in error.message


# ---- whom the client trusts, what it shows, and where it knocks


def _certificate(here: Place, authority: Authority, identity: str) -> TlsSettings:
    key, request = make_key_and_request(identity)
    made = authority.issue_client(
        read_request(request, identity), identity=identity, role=IDENTITIES[identity]
    )
    path = here.folder / f"{identity}.pem"
    path.write_text(key + made.pem)
    return TlsSettings(ca_file=here.papers.listener.ca_file, cert_file=path, key_file=path)


def _other_site(here: Place) -> Authority:
    return Authority.create(here.folder / "other", site="local")


def _trusting_others(here: Place) -> dict[str, Any]:
    path = here.folder / "other-ca.pem"
    path.write_text(_other_site(here).bundle)
    return {"tls": TlsSettings(ca_file=path)}


def _past(here: Place) -> Authority:
    """The authority of the site as it signed 400 days ago."""
    now_ms = int(datetime.datetime.now(datetime.UTC).timestamp() * 1000)
    return Authority(
        here.papers.authority_folder, site="local", clock=lambda: now_ms - 400 * DAY_MS
    )


def _with(here: Place, tls: TlsSettings) -> dict[str, Any]:
    return {"tls": tls, "password": None}


CLIENTS: dict[str, tuple[Any, type[FoamError], str]] = {
    "it trusts another authority": (
        lambda here: (here.url("mqtts"), _trusting_others(here)),
        BrokerUnavailable,
        "signed by nobody we trust",
    ),
    "it trusts another authority, over WebSocket": (
        lambda here: (here.url("wss"), _trusting_others(here)),
        BrokerUnavailable,
        "signed by nobody we trust",
    ),
    "no certificate and no password": (
        lambda here: (here.url("mqtts"), {"password": None}),
        AccessDenied,
        "it wants a password or a certificate, and got neither",
    ),
    "a certificate that was revoked": (
        lambda here: (
            here.url("mqtts"),
            _with(here, _certificate(here, here.papers.authority, "edge-1")),
        ),
        AccessDenied,
        "our certificate is revoked",
    ),
    "a revoked certificate, over WebSocket": (
        lambda here: (
            here.url("wss"),
            _with(here, _certificate(here, here.papers.authority, "edge-1")),
        ),
        AccessDenied,
        "our certificate is revoked",
    ),
    "a certificate of another site": (
        lambda here: (
            here.url("mqtts"),
            _with(here, _certificate(here, _other_site(here), "edge-1")),
        ),
        BrokerUnavailable,
        "perhaps our certificate is of another site",
    ),
    "a certificate of another site, over WebSocket": (
        lambda here: (
            here.url("wss"),
            _with(here, _certificate(here, _other_site(here), "edge-1")),
        ),
        BrokerUnavailable,
        "perhaps our certificate is of another site",
    ),
    "a certificate that has run out": (
        lambda here: (
            here.url("mqtts"),
            _with(here, _certificate(here, _past(here), "edge-1")),
        ),
        BrokerUnavailable,
        "or has run out; enroll again",
    ),
    "a wrong password": (
        lambda here: (here.url("wss"), {"password": SecretStr("wrong")}),
        AccessDenied,
        "Not authorized",
    ),
    "plain MQTT on the port for TLS": (
        lambda here: (here.url("mqtt", here.engine.tls_port), {}),
        BrokerUnavailable,
        "perhaps the port wants mqtts:// or ws://",
    ),
    "plain MQTT on the port for WebSocket with TLS": (
        lambda here: (here.url("mqtt", here.engine.websocket_port), {}),
        BrokerUnavailable,
        "perhaps the port wants mqtts:// or ws://",
    ),
    "TLS on the port without": (
        lambda here: (here.url("mqtts", here.engine.port), {}),
        BrokerUnavailable,
        "perhaps the port speaks no TLS",
    ),
    "WebSocket on the port for MQTT": (
        lambda here: (here.url("ws", here.engine.port), {}),
        BrokerUnavailable,
        "is the port one for mqtt://",
    ),
    "WebSocket without TLS on the port for TLS": (
        lambda here: (here.url("ws", here.engine.tls_port), {}),
        BrokerUnavailable,
        "wss://",
    ),
    "WebSocket with TLS on the port for MQTT": (
        lambda here: (here.url("wss", here.engine.port), {}),
        BrokerUnavailable,
        "perhaps the port speaks no TLS",
    ),
    "WebSocket with TLS on the port for MQTT with TLS": (
        lambda here: (here.url("wss", here.engine.tls_port), {}),
        BrokerUnavailable,
        "is the port one for mqtt",
    ),
    "MQTT with TLS on the port for WebSocket with TLS": (
        lambda here: (here.url("mqtts", here.engine.websocket_port), {}),
        BrokerUnavailable,
        "perhaps the port wants wss://",
    ),
    "WebSocket at another path": (
        lambda here: (here.url("wss") + "/elsewhere", {}),
        BrokerUnavailable,
        "there is no WebSocket at /elsewhere: the usual path is /mqtt",
    ),
}


@pytest.fixture(scope="module")
def shared(_site_loop, tmp_path_factory) -> Iterator[Place]:
    """One embedded broker for all the cases."""
    running = place(tmp_path_factory.mktemp("shared"))
    yield _site_loop.run(running.__aenter__())
    _site_loop.run(running.__aexit__(None, None, None))


@pytest.mark.parametrize("case", CLIENTS)
async def test_what_a_client_does_wrong_is_said(shared, case):
    prepare, kind, sentence = CLIENTS[case]
    url, changes = prepare(shared)
    error = await why_not(shared.session("edge-1", url, **changes))
    assert isinstance(error, kind)
    assert sentence in error.message


def test_the_doctor_says_the_same(shared, tmp_path):
    settings = Settings(data=tmp_path, url=shared.url("wss"), ca=None)
    (mesh,) = [check for check in run_checks(settings) if check.what == "mesh"]
    assert "signed by nobody we trust" in mesh.found


# ---- connections that work


LISTENERS = [
    ("embedded", {}, ["mqtt", "mqtts", "wss"]),
    ("embedded", {"websocket": WebSocketListener()}, ["ws"]),
    pytest.param(*("mosquitto", {}, ["mqtt", "mqtts", "wss"]), marks=pytest.mark.external_broker),
    pytest.param(
        *("mosquitto", {"websocket": WebSocketListener()}, ["ws"]),
        marks=pytest.mark.external_broker,
    ),
    pytest.param(*("nats", {}, ["mqtts", "wss"]), marks=pytest.mark.external_broker),
]


async def _talk(here: Place, scheme: str, eventually: Any, payload: bytes = b"hello") -> None:
    """A node announces itself over a listener, an observer hears it over the same one."""
    got: list[bytes] = []

    async def take(message: Message) -> None:
        got.append(message.payload)

    node = here.session("edge-1", here.url(scheme))
    watcher = here.session("watcher-1", here.url(scheme))
    async with watcher:
        await watcher.subscribe(TOPICS.filter(TopicKind.NODE_STATE), take)
        await watcher.wait_connected(CONNECT_S)
        async with node:
            await node.publish(STATE, payload, timeout_s=CONNECT_S)
            await eventually(lambda: payload in got, timeout_s=CONNECT_S)


@pytest.mark.parametrize(("kind", "changes", "schemes"), LISTENERS)
async def test_every_listener_carries_messages(tmp_path, eventually, kind, changes, schemes):
    require_broker(kind)
    async with place(tmp_path, kind, **changes) as here:
        assert here.engine.traits.websocket
        assert here.engine.traits.tls
        for scheme in schemes:
            await _talk(here, scheme, eventually, b"x" * 30_000)


@pytest.mark.external_broker
async def test_nats_with_tls_learns_of_newcomers(tmp_path, eventually):
    require_broker("nats")
    async with place(tmp_path, "nats") as here:
        assert here.engine.url == f"mqtts://127.0.0.1:{here.engine.tls_port}"
        here.passwords["pump-2"] = here.store.add("pump-2", Role.DEVICE)
        await here.engine.reload_access()
        for scheme in ("mqtts", "wss"):
            await _comes_in(here, "pump-2", here.url(scheme))


async def _comes_in(here: Place, identity: str, url: str) -> None:
    """Connect, again where the broker has not read the change yet."""
    async with asyncio.timeout(CONNECT_S):
        while True:
            with contextlib.suppress(AccessDenied):
                async with here.session(identity, url) as newcomer:
                    await newcomer.wait_connected(CONNECT_S)
                    return
            await asyncio.sleep(0.25)


@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_small_packets_leave_at_once(tmp_path, scheme):
    """TCP_NODELAY under WebSocket too: without it a round trip takes 44 ms and more."""
    async with place(tmp_path, websocket=WebSocketListener(secure=scheme == "wss")) as here:
        session = here.session("edge-1", here.url(scheme))
        async with session:
            await session.wait_connected(CONNECT_S)
            sockets = [
                one
                for one in gc.get_objects()
                # Not isinstance: it would ask proxies of other libraries for their __class__.
                if type(one) is WebSocket and one.raw.fileno() >= 0
            ]
            assert sockets
            for one in sockets:
                assert one.raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_the_brokers_side_sends_at_once_and_probes_peers_that_may_be_gone():
    found: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()

    async def serve(_: object, writer: asyncio.StreamWriter, __: object) -> None:
        sock = writer.get_extra_info("socket")
        found.set_result(
            (
                sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
            )
        )

    crowd = Crowd(limit=5, address_limit=5, clock=time.monotonic)
    listener = Listener(
        name="test",
        host="127.0.0.1",
        port=0,
        serve=serve,
        crowd=crowd,
        context=None,
        handshake_timeout_s=CONNECT_S,
    )
    async with listener, connect(listener.port), asyncio.timeout(CONNECT_S):
        assert await found == (1, 1, 60)
    assert len(crowd) == 0


@pytest.mark.parametrize("scheme", ["mqtts", "wss"])
async def test_a_renewed_certificate_counts_and_nobody_is_cut(tmp_path, eventually, scheme):
    async with place(tmp_path) as here:
        old = here.session("pump-1", here.url(scheme))
        async with old:
            await old.wait_connected(CONNECT_S)
            authority = Authority.create(tmp_path / "new", site="local")
            key, made = authority.issue_server(["127.0.0.1"])
            files = here.papers.listener
            files.key_file.write_text(key)
            files.cert_file.write_text(made.pem)
            new_ca = tmp_path / "new-ca.pem"
            new_ca.write_text(authority.bundle)
            await here.engine.reload_access()
            fresh = here.session(
                *("watcher-1", here.url(scheme)),
                tls=TlsSettings(ca_file=new_ca),
                backoff_cap_s=0.5,
            )
            async with fresh:
                await fresh.wait_connected(CONNECT_S)
            error = await why_not(here.session("edge-1", here.url(scheme)))
            assert "signed by nobody we trust" in error.message
            await old.publish(TOPICS.build(TopicKind.TASK, client="pump-1"), b"x")
            assert old.stats.connects == 1


# ---- WebSocket to the letter


def _request(**headers: str) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    return UPGRADE[:-2] + "".join(lines).encode() + b"\r\n"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://broker", b"101"),  # a page from the very host and port
        ("https://dash.example:8443", b"101"),  # named by the operator
        ("http://broker", b"403"),  # that page, without TLS
        ("https://evil.example", b"403"),
        ("null", b"403"),
    ],
)
async def test_pages_of_other_origins_are_refused(shared_origins, origin, status):
    async with connect(shared_origins.engine.websocket_port, "wss", upgraded=False) as raw:
        raw.writer.write(_request(Origin=origin))
        assert (await _head(raw)).split()[1] == status


@pytest.fixture(scope="module")
def shared_origins(_site_loop, tmp_path_factory) -> Iterator[Place]:
    ws = WebSocketListener(secure=True, origins=("https://dash.example:8443",))
    running = place(tmp_path_factory.mktemp("origins"), websocket=ws)
    yield _site_loop.run(running.__aenter__())
    _site_loop.run(running.__aexit__(None, None, None))


async def _head(raw: Raw) -> bytes:
    async with asyncio.timeout(CONNECT_S):
        return await raw.reader.readuntil(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (UPGRADE.replace(b"/mqtt", b"/"), b"101"),
        (UPGRADE.replace(b"/mqtt", b"/mqtt?token=x"), b"101"),
        (UPGRADE.replace(b"/mqtt", b"/other"), b"404"),
        (UPGRADE.replace(b"Protocol: mqtt", b"Protocol: amqp"), b"400"),
        (UPGRADE.replace(b"Sec-WebSocket-Protocol: mqtt\r\n", b""), b"400"),
        (b"GET /mqtt HTTP/1.1\r\nHost: broker\r\n\r\n", b"426"),
    ],
)
async def test_requests_are_answered(shared, request_line, status):
    async with connect(shared.engine.websocket_port, "wss", upgraded=False) as raw:
        raw.writer.write(request_line)
        assert (await _head(raw)).split()[1] == status


async def test_mqtt_in_text_frames_is_refused(shared):
    hello = connect_packet("p", username="pump-1", password=shared.passwords["pump-1"])
    async with connect(shared.engine.websocket_port, "wss") as raw:
        raw.writer.write(frame(hello, first=0x81))
        assert (1003).to_bytes(2, "big") in await raw.ended(CONNECT_S)


async def test_packets_and_frames_may_be_cut_anywhere(shared):
    """MQTT 3.1.1 section 6: a frame may hold half a packet, or two."""
    hello = connect_packet("p", username="pump-1", password=shared.passwords["pump-1"])
    stream = hello + b"\xc0\x00" * 3
    async with connect(shared.engine.websocket_port, "wss") as raw:
        for start in range(0, len(stream), 7):
            raw.writer.write(frame(stream[start : start + 7]))
        raw.writer.write(frame(b"ping", first=0x89) + frame(b"\xe0\x00"))
        said = await raw.ended(CONNECT_S)
        assert b"\x20\x02\x00\x00" in said
        assert said.count(b"\xd0\x00") == 3
        assert b"\x8a\x04ping" in said
        assert said.endswith(b"\x88\x02\x03\xe8")  # goodbye
