"""The session over MQTT 3.1.1 or 5, and the only door to ``aiomqtt``.

``aiomqtt`` makes and ends the connection, subscribes, and keeps it alive. The two hot paths go
past its public API, to the ``paho`` client it wraps, because the public one is the bottleneck of
a whole process (256-byte messages over Mosquitto): awaiting ``publish`` keeps one task and one
scan of all pending calls for each message (6 to 9 thousand messages a second against 22), and
the message iterator makes one task for each arrival (1.8 times the cost of the callback).

- Sending: ``paho.publish`` under our own window, confirmed by its ``on_publish``. A write asks for
  the socket through ``call_soon`` instead of ``aiomqtt``'s ``call_soon_threadsafe`` and
  ``add_writer``, which saves a wake-up and a round of the selector for each message.
- Receiving: ``paho.on_message`` straight into the subscription queues. The acknowledgement waits
  for a millisecond, unless something is sent sooner: most leave together with what the handler
  answers, which spares half of the system calls of a router.

Every connection gets a new client object, so ``paho`` never repeats anything by itself: the
outbox of the session does. Repetitions carry no DUP flag; receivers drop duplicates by id anyway
(PROTOCOL section 5), and MQTT 3.1.1 section 3.3.1.1 gives the flag no meaning for them.

TCP_NODELAY is set: without it a QoS 1 round trip takes 44 to 96 ms instead of 0.5.
"""

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final

import aiomqtt
import structlog
from aiomqtt.exceptions import MqttConnectError
from paho.mqtt.client import MQTT_ERR_SUCCESS, MQTTMessage
from paho.mqtt.client import Client as Paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker.session.base import Message, Will, WillFactory
from broker.session.core import SessionCore
from broker.session.link import LinkEvents
from broker.session.outbox import Outgoing
from broker.session.ring import BrokerRing, BrokerStanding
from broker.session.settings import BrokerUrl, SessionSettings, Version
from broker.session.silence import Known, why_closed, why_silent
from broker.session.versions import VersionChoice, VersionRefused
from broker.session.websocket import WebSocket
from broker.tls import (
    client_context,
    explain,
    failure_of,
    is_unverified,
    never_connected,
    says_revoked,
)
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    ConfigurationError,
    FoamError,
    TooLarge,
)

_NODELAY: Final = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)
_CORK: Final[int | None] = getattr(socket, "TCP_CORK", None)  # tcp(7), Linux only
_ACK_DELAY_S: Final = 0.001
_PACKET_HEADROOM_BYTES: Final = 128 * 1024  # topic and headers beside the payload
_UNSENT_QOS0_LIMIT: Final = 1000
_SUBSCRIBE_BATCH: Final = 50
_GOODBYE_LIMIT_S: Final = 2.0
_LEFTOVER_PACKETS: Final = 10_000
_REFUSED_FROM: Final = 0x80  # MQTT 5 section 2.4: reason codes from here on are failures

# CONNACK reason codes that no retry will mend, MQTT 5 section 3.2.2.2. paho maps the return codes
# of MQTT 3.1.1 section 3.2.2.3 to the same numbers (2 to 133, 4 to 134, 5 to 135).
_FATAL: Final[dict[int, type[FoamError]]] = {
    0x85: ConfigurationError,  # client identifier not valid
    0x86: AccessDenied,  # bad user name or password
    0x87: AccessDenied,  # not authorized
    0x8A: AccessDenied,  # banned
    0x8C: AccessDenied,  # bad authentication method
}
_UNSUPPORTED_VERSION: Final = 0x84
_PROTOCOLS: Final[dict[Version, aiomqtt.ProtocolVersion]] = {
    "3.1.1": aiomqtt.ProtocolVersion.V311,
    "5": aiomqtt.ProtocolVersion.V5,
}
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class MqttLink:
    """One MQTT connection; a ``broker.session.link.Link``.

    Args:
        client: A client that was not connected yet.
        url: Where it will connect to.
        version: The MQTT version it speaks.
        events: Where to report.
        settings: Limits.
        known: What is known of this broker.
    """

    def __init__(
        self,
        *,
        client: aiomqtt.Client,
        url: BrokerUrl,
        version: Version,
        events: LinkEvents,
        settings: SessionSettings,
        known: Known,
    ) -> None:
        client.pending_calls_threshold = 1_000_000_000  # else it warns about every busy moment
        self._client = client
        self._paho: Paho = client._client  # noqa: SLF001  # see the module docstring
        self._socket: socket.socket | None = None
        self._url = url
        self._version = version
        self._events = events
        self._settings = settings
        self._known = known
        self._loop = asyncio.get_running_loop()
        self._connecting: asyncio.Timeout | None = None
        self._abandoned = False
        self._over = False
        self._session_present = False
        self._max_packet_bytes: int | None = None
        self._writer_fd: int | None = None
        self._acknowledging = False
        self._ack_timer: asyncio.TimerHandle | None = None
        self._unsent_qos0: set[int] = set()
        self.window = 65_535

    @property
    def description(self) -> dict[str, Any]:
        """What the log says about it."""
        return {
            "broker": str(self._url),
            "mqtt": self._version,
            "session_present": self._session_present,
        }

    async def open(self, limit_s: float) -> None:
        """Connect.

        Cancellation is safe: the connection is dropped, even one that is still being made.

        Args:
            limit_s: Time limit for TCP, TLS and the broker's answer together, seconds.

        Raises:
            AccessDenied: The broker refuses the identity.
            ConfigurationError: The broker refuses the client id.
            BrokerUnavailable: No connection this time.
        """
        self._hook_opening()
        try:
            async with asyncio.timeout(limit_s) as self._connecting:
                await self._client.__aenter__()
        except TimeoutError:
            closed = self._over
            self._abandon()
            raise self._no_answer(limit_s, closed=closed) from None
        except MqttConnectError as error:
            self._abandon()
            raise self._refusal(error) from error
        except aiomqtt.MqttError as error:
            self._abandon()
            reason = explain(error) or f"{error}{self._certificate_hint(error)}"
            final = self._settings.unverified_is_final and is_unverified(error)
            raise BrokerUnavailable(f"{self._url}: {reason}", retryable=not final) from error
        except BaseException:
            self._abandon()
            raise
        finally:
            self._connecting = None
        self._hook_running()

    def transmit(self, item: Outgoing) -> int | None:
        """Hand a message to paho; it is written in the next round of the loop."""
        if self._over:
            return None
        limit_bytes = self._max_packet_bytes
        size_bytes = len(item.payload) + len(item.topic) + 16
        if limit_bytes is not None and size_bytes > limit_bytes:
            raise TooLarge("packet", size_bytes=size_bytes, limit_bytes=limit_bytes)
        if item.qos == 0 and len(self._unsent_qos0) >= _UNSENT_QOS0_LIMIT:
            return None
        info = self._paho.publish(item.topic, item.payload, item.qos, item.retain)
        if info.rc != MQTT_ERR_SUCCESS:
            return None
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
            self._loop.call_soon(self._write)
        if item.qos == 0:
            self._unsent_qos0.add(info.mid)
            return 0
        return info.mid

    async def subscribe(self, filters: Sequence[tuple[str, int]]) -> list[bool]:
        """Subscribe; some brokers (Mosquitto with an access file) grant what they then filter."""
        granted: list[bool] = []
        for start in range(0, len(filters), _SUBSCRIBE_BATCH):
            batch = list(filters[start : start + _SUBSCRIBE_BATCH])
            try:
                codes = await self._client.subscribe(
                    batch, timeout=self._settings.subscribe_timeout_s
                )
            except aiomqtt.MqttError as error:
                raise BrokerUnavailable(f"{self._url}: subscribing: {error}") from error
            granted.extend(_value(code) < _REFUSED_FROM for code in codes)
        return granted

    async def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe."""
        try:
            await self._client.unsubscribe(topic_filter, timeout=self._settings.subscribe_timeout_s)
        except aiomqtt.MqttError as error:
            raise BrokerUnavailable(f"{self._url}: unsubscribing: {error}") from error

    async def lost(self) -> str:
        """Wait for the end of the connection.

        The iterator yields nothing, for messages take the other way; it raises at the end. Of an
        end that came right behind the CONNACK it knows nothing: ``aiomqtt`` forgets that one.
        """
        if self._over:
            return "closed as soon as it was accepted"
        try:
            async for _ in self._client.messages:
                pass
        except aiomqtt.MqttError as error:
            return str(error.__cause__ or error)
        return "closed"

    async def close(self) -> None:
        """Send DISCONNECT, so that the broker discards the will."""
        try:
            async with asyncio.timeout(_GOODBYE_LIMIT_S):
                await self._client.__aexit__(None, None, None)
        except (TimeoutError, aiomqtt.MqttError) as error:
            _log.info("session.goodbye_failed", broker=str(self._url), reason=str(error))
        self.abort()

    def abort(self) -> None:
        """Cut the connection without DISCONNECT."""
        self._over = True
        sock = self._paho.socket()
        if sock is None:
            return
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError as error:  # not connected any more
                _log.debug("session.shutdown", reason=str(error))
        # paho reads what is left and the end of the stream, and cleans up: timer, reader, socket.
        for _ in range(_LEFTOVER_PACKETS):
            if self._paho.socket() is None:
                return
            self._paho.loop_read()

    def _abandon(self) -> None:
        self._abandoned = True
        self._connecting = None
        self.abort()

    def _hook_opening(self) -> None:
        paho = self._paho
        paho.disable_logger()  # it formats a line for every packet
        paho.connect_timeout = self._settings.connect_timeout_s
        if self._url.path is not None:
            self._open_websocket(paho._create_socket, self._url.path)  # noqa: SLF001
        opened, connected, disconnected = (
            paho.on_socket_open,
            paho.on_connect,
            paho.on_disconnect,
        )

        def on_socket_open(client: Paho, userdata: Any, sock: Any) -> None:
            # In a thread of the executor. A connection nobody waits for any more is closed.
            if self._abandoned:
                client.on_socket_register_write = None
                sock.close()
                return
            self._socket = sock.raw if isinstance(sock, WebSocket) else sock
            self._loop.call_soon_threadsafe(self._free_descriptor, sock.fileno())
            if opened is not None:
                opened(client, userdata, sock)

        def on_connect(*args: Any) -> None:
            _, _, flags, _, properties = args
            self._session_present = flags.session_present
            self.window = getattr(properties, "ReceiveMaximum", self.window)
            self._max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
            if connected is not None:
                connected(*args)

        def on_disconnect(*args: Any) -> None:
            self._over = True
            scope = self._connecting
            if (
                scope is not None and not scope.expired()
            ):  # no CONNACK will come: do not wait for it
                scope.reschedule(self._loop.time())
            # Of an abandoned attempt aiomqtt must not hear: it would look into a future that was
            # cancelled, and the CancelledError would end our task.
            if disconnected is not None and not self._abandoned:
                disconnected(*args)

        paho.on_socket_open = on_socket_open
        paho.on_connect = on_connect
        paho.on_disconnect = on_disconnect
        paho.on_message = self._on_message
        paho.on_publish = self._on_publish

    def _free_descriptor(self, number: int) -> None:
        """Make the loop forget an earlier socket of this number before it watches the new one.

        A connection that breaks while paho still makes it, in its thread, is closed there, and the
        loop may have gone to watch it after that. It then failed to watch the next one.
        """
        for forget in (self._loop.remove_reader, self._loop.remove_writer):
            with contextlib.suppress(OSError, RuntimeError):
                forget(number)

    def _open_websocket(self, connect: Callable[[], Any], path: str) -> None:
        """Have paho use our WebSocket over the connection that it makes, in its thread."""
        url, limit_s = self._url, self._settings.connect_timeout_s

        def create() -> WebSocket:
            sock = connect()
            for option in _NODELAY:
                sock.setsockopt(*option)
            authority = str(url).split("/")[2]
            return WebSocket.connect(sock, authority=authority, path=path, timeout_s=limit_s)

        self._paho._create_socket = create  # type: ignore[method-assign,assignment,unused-ignore]  # noqa: SLF001

    def _hook_running(self) -> None:
        # From here on paho is used from the loop's thread only.
        paho = self._paho
        paho.on_socket_register_write = self._on_want_write
        paho.on_socket_unregister_write = self._on_wrote_all
        if paho.want_write():
            self._loop.call_soon(self._write)

    def _on_want_write(self, *_: Any) -> None:
        # paho asks once, until all is written.
        if self._acknowledging:
            self._ack_timer = self._loop.call_later(_ACK_DELAY_S, self._write)
        else:
            self._loop.call_soon(self._write)

    def _write(self) -> None:
        self._acknowledging = False
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        sock = self._paho.socket()
        if sock is None:
            return
        # paho sends packet by packet; corked, they leave as one segment and wake the broker once.
        self._cork(corked=True)
        self._paho.loop_write()
        self._cork(corked=False)
        if self._paho.want_write() and self._writer_fd is None and self._paho.socket() is sock:
            self._writer_fd = sock.fileno()
            self._loop.add_writer(self._writer_fd, self._write)

    def _cork(self, *, corked: bool) -> None:
        sock = self._socket
        if _CORK is not None and sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.IPPROTO_TCP, _CORK, corked)

    def _on_wrote_all(self, *_: Any) -> None:
        if self._writer_fd is not None:
            self._loop.remove_writer(self._writer_fd)
            self._writer_fd = None

    def _on_message(self, _client: Paho, _userdata: Any, message: MQTTMessage) -> None:
        if self._over:
            return
        payload = message.payload
        try:
            topic = message.topic
        except UnicodeDecodeError:
            self._events.oversized("(a topic that is not UTF-8)", len(payload))
            return
        if len(payload) > self._settings.max_payload_bytes:
            self._events.oversized(topic, len(payload))
            return
        if type(payload) is not bytes:
            payload = bytes(payload)
        self._acknowledging = message.qos > 0  # paho queues it when this returns
        self._events.message(Message(topic, payload, message.qos, message.retain))

    def _on_publish(
        self, _client: Paho, _userdata: Any, mid: int, code: ReasonCode, _properties: Properties
    ) -> None:
        if mid in self._unsent_qos0:
            self._unsent_qos0.discard(mid)
            return
        value = _value(code)
        refusal = f"{code} [{value}]" if value >= _REFUSED_FROM else None
        # paho counts this message as under way until the callback is over.
        self._loop.call_soon(self._confirm, mid, refusal)

    def _confirm(self, mid: int, refusal: str | None) -> None:
        if not self._over:  # else the next connection may use this packet id for another message
            self._events.confirmed(mid, refusal)

    def _no_answer(self, limit_s: float, *, closed: bool) -> FoamError:
        """Say why no answer to CONNECT came; TLS 1.3 refuses our certificate only now."""
        trouble = failure_of(self._socket)
        if trouble is not None:
            # Only here is it the broker that says so: what comes before the end of the handshake
            # anybody on the way may have written.
            kind = AccessDenied if says_revoked(self._socket) else BrokerUnavailable
            return kind(f"{self._url}: {trouble}")
        if closed and (hint := self._certificate_hint()):
            said = f"{self._url} closed the connection{hint}"
        elif closed:
            said = why_closed(self._url, self._known)
        else:
            waited_s = limit_s if self._socket is not None else None
            said = why_silent(self._url, self._known, waited_s=waited_s)
        return VersionRefused(said, said_so=False)

    def _certificate_hint(self, error: BaseException | None = None) -> str:
        """Guess at what brokers do not say who hang up after the handshake (asyncio's do not).

        Args:
            error: What the try ended with; one that was never connected says nothing of this.
        """
        if not self._url.tls or self._settings.tls.cert_file is None:
            return ""
        if error is not None and never_connected(error):
            return ""
        return ": perhaps our certificate is of another site, or has run out; enroll again then"

    def _refusal(self, error: MqttConnectError) -> FoamError:
        value = _value(error.rc)
        if value == _UNSUPPORTED_VERSION:
            return VersionRefused(f"{self._url} does not speak MQTT {self._version}", said_so=True)
        kind = _FATAL.get(value, BrokerUnavailable)
        who = self._client.identifier
        hint = ""
        if kind is AccessDenied and self._settings.tls.cert_file is not None and self._url.tls:
            hint = ": our certificate is revoked, or of somebody else; enroll again"
        elif kind is AccessDenied and self._settings.password is None:
            hint = ": it wants a password or a certificate, and got neither"
        return kind(f"{self._url} refuses the connection of {who}: {error.rc} [{value}]{hint}")


class MqttSession(SessionCore):
    """A session over MQTT; see ``broker.session.base.Session``.

    Args:
        settings: Its settings.
        will: Last will, or what makes it for each connection.
        rng: Randomness of the back-off; injected by tests.
    """

    def __init__(
        self,
        *,
        settings: SessionSettings,
        will: Will | WillFactory | None = None,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(settings=settings, rng=rng)
        self._ring = BrokerRing(settings.brokers)
        self._versions = VersionChoice(settings=settings, open_link=self._open)
        self._make_will: Callable[[], Will | None] = will if callable(will) else lambda: will

    @property
    def brokers(self) -> tuple[BrokerStanding, ...]:
        """What is known of each broker of the list."""
        return self._ring.standings

    async def _connect(self) -> MqttLink:
        url = self._ring.next()
        try:
            link = await self._versions.open(url)
        except (AccessDenied, ConfigurationError, BrokerUnavailable) as error:
            final = not error.retryable
            believed = self._ring.failed(error.message, refused=final)
            if believed == final and (len(self._ring.standings) == 1 or self._ring.all_refuse):
                raise
            raise BrokerUnavailable(self._ring.troubles()) from error
        self._ring.connected()
        return link

    def _link_ended(self, reason: str, *, had_lasted: bool) -> None:
        self._ring.lost(reason, had_lasted=had_lasted)

    def _is_one_of_many(self) -> bool:
        return len(self._ring.standings) > 1

    def _round_is_over(self) -> bool:
        return self._ring.round_is_over

    async def _open(self, url: BrokerUrl, version: Version, limit_s: float) -> MqttLink:
        settings = self._settings
        username, password = settings.login_at(url)
        will = self._make_will()
        link = MqttLink(
            client=aiomqtt.Client(
                url.host,
                url.port,
                identifier=settings.client_id,
                username=username,
                password=password,
                protocol=_PROTOCOLS[version],
                will=None
                if will is None
                else aiomqtt.Will(will.topic, will.payload, will.qos, will.retain),
                keepalive=settings.keepalive_s,
                timeout=limit_s + 1.0,  # ours comes first
                max_inflight_messages=0,  # unlimited there: the outbox has the window
                tls_context=await self._tls() if url.tls else None,
                socket_options=_NODELAY,
                **self._version_options(version),
            ),
            url=url,
            version=version,
            events=self._events,
            settings=settings,
            known=self._ring.known_of(url),
        )
        await link.open(limit_s)
        return link

    def _version_options(self, version: Version) -> dict[str, Any]:
        settings = self._settings
        if version == "3.1.1":
            return {"clean_session": settings.clean}
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho's
        properties.MaximumPacketSize = settings.max_payload_bytes + _PACKET_HEADROOM_BYTES
        if not settings.clean:
            properties.SessionExpiryInterval = settings.session_expiry_s
        return {"clean_start": settings.clean, "properties": properties}

    async def _tls(self) -> ssl.SSLContext:
        return await asyncio.to_thread(client_context, self._settings.tls)

    def _broker_names(self) -> str:
        return ", ".join(one.url for one in self._ring.standings)


def _value(code: object) -> int:
    if isinstance(code, ReasonCode):
        return code.value
    return code if isinstance(code, int) else 0
