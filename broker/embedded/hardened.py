"""amqtt's broker with its defects mended, each override saying which.

The defects were found and measured on amqtt 0.12.1; another release needs every override looked at
again, so any other version is refused at construction.
"""

import asyncio
import time
from collections.abc import Collection
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import structlog
from amqtt.broker import Broker, ExternalServer
from amqtt.errors import AMQTTError, MQTTError, NoDataError
from amqtt.mqtt.connack import ConnackPacket
from amqtt.session import Session

from broker.access.policy import Action
from broker.embedded.connection import Connection, give_outbox, outbox_of
from broker.embedded.crowd import Crowd, Guest
from broker.embedded.gate import Admission, Gate
from broker.embedded.listener import Listener
from broker.embedded.outbox import Outbox, Publication
from broker.embedded.refusals import Refusals
from broker.embedded.routing import SubscriptionTree
from broker.embedded.store import BrokerStore, Found, StoredMessage
from broker.embedded.stream import ClientReader, ClientWriter
from broker.embedded.websocket import upgrade
from broker.engine import EngineSettings
from broker.tls import PeerCertificate, TlsListener, peer_certificate, server_context
from capability_schemas.errors import ConfigurationError, InvalidTopic
from capability_schemas.topics import matches

_log = structlog.get_logger(__name__)

AMQTT_VERSION: Final = "0.12.1"
_ADMISSION_TIMEOUT_S: Final = 30.0
_MONITOR_PERIOD_S: Final = 0.5
_FILTERS_PER_SESSION: Final = 1000
_RETAINED_LIMIT: Final = 50_000
_SESSIONS_PER_IDENTITY: Final = 64
_OUTBOX_LIMIT_BYTES: Final = 64 * 1024 * 1024
_REFUSED_FILTER: Final = 0x80
_LISTENER: Final = "default"
_TLS_LISTENER: Final = "tls"
_WEBSOCKET_LISTENER: Final = "websocket"
_DROPS_BETWEEN_REPORTS: Final = 1000


class HardenedBroker(Broker):  # type: ignore[misc]  # amqtt ships no types
    """The embedded broker; one loop owns it and all its state.

    Life cycle: ``await start()``, ``await shutdown()``, both amqtt's.

    Args:
        settings: Address and limits.
        gate: Who comes in and what each may do.
        refusals: Told of what is refused.
        store: Where retained messages and wills outlive the process; open.

    Raises:
        ConfigurationError: The installed amqtt is not the release the overrides were made for.
    """

    def __init__(
        self, *, settings: EngineSettings, gate: Gate, refusals: Refusals, store: BrokerStore
    ) -> None:
        installed = version("amqtt")
        if installed != AMQTT_VERSION:
            raise ConfigurationError(
                f"amqtt {installed} is installed, the embedded broker is hardened against "
                f"{AMQTT_VERSION}: install that, or use Mosquitto"
            )
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        bind = f"{host}:{settings.port}"
        # An empty plugin table, and not none: without one, anybody may connect.
        super().__init__({"listeners": {_LISTENER: {"type": "tcp", "bind": bind}}, "plugins": {}})
        self.settings = settings
        self._gate = gate
        self._refusals = refusals
        self._tree = SubscriptionTree()
        self._retained: dict[str, Publication] = {}
        self._store = store
        self._orphans: dict[str, StoredMessage] = {}
        # Guards the replacement of a session by a new connection of the same client.
        self._admission = asyncio.Lock()
        self._stopping = False
        self._listeners: dict[str, Listener] = {}
        self._crowd = Crowd(
            limit=settings.connection_limit,
            address_limit=settings.address_limit,
            clock=time.monotonic,
        )

    @property
    def port(self) -> int:
        """TCP port it listens on."""
        return self._listeners[_LISTENER].port

    @property
    def tls_port(self) -> int:
        """TCP port it listens on with TLS, 0 without."""
        found = self._listeners.get(_TLS_LISTENER)
        return found.port if found is not None else 0

    @property
    def websocket_port(self) -> int:
        """TCP port it listens on for WebSocket, 0 without."""
        found = self._listeners.get(_WEBSOCKET_LISTENER)
        return found.port if found is not None else 0

    async def _start_listeners(self) -> None:
        """Listen where the settings say so.

        Defects mended: stock leaves TLS handshakes a minute, and connections without number.
        """
        settings, tls, ws = self.settings, self.settings.tls, self.settings.websocket
        await self._listen(_LISTENER, settings.host, settings.port)
        if tls is not None:
            await self._listen(_TLS_LISTENER, tls.host, tls.port, tls)
        if ws is not None:
            await self._listen(_WEBSOCKET_LISTENER, ws.host, ws.port, tls if ws.secure else None)

    async def _listen(
        self, name: str, host: str, port: int, tls: TlsListener | None = None
    ) -> None:
        listener = Listener(
            name=name,
            host=host,
            port=port,
            serve=partial(self._serve, name),
            crowd=self._crowd,
            context=server_context(tls) if tls is not None else None,
            handshake_timeout_s=self.settings.connect_timeout_s,
        )
        await listener.start()
        self._listeners[name] = listener
        self._servers[name] = ExternalServer()  # for amqtt: we listen and count

    def renew_tls(self) -> None:
        """Use the certificate files as they are now for whoever connects from now on.

        Raises:
            ConfigurationError: They do not fit; the old ones stay in use.
        """
        if self.settings.tls is None:
            return
        context = server_context(self.settings.tls)
        for listener in self._listeners.values():
            if listener.context is not None:
                listener.context = context

    async def shutdown(self) -> None:
        """Stop listening, and cut every connection without sending wills."""
        self._stopping = True
        for listener in self._listeners.values():
            await listener.stop()
        await super().shutdown()

    async def revoke(self, identities: Collection[str]) -> None:
        """End the sessions of identities whose access was taken away."""
        for client_id, (session, _) in list(self._sessions.items()):
            if session.username in identities:
                await self._cleanup_session(client_id)

    # ------------------------------------------------------------------------ messages

    def take(self, session: Session, topic: str, payload: bytes, *, qos: int, retain: bool) -> None:
        """Handle a publish of a client: check it, keep it when retained, hand it out.

        A forbidden one is dropped; MQTT 3.1.1 has no way to say so (section 3.3.5).

        Args:
            session: Who publishes.
            topic: A checked topic.
            payload: Payload.
            qos: 0 to 2.
            retain: Its retain flag.
        """
        self._take_from(session.username, topic, payload, qos=qos, retain=retain)

    def _take_from(
        self, username: str, topic: str, payload: bytes, *, qos: int, retain: bool
    ) -> None:
        if not self._gate.may(username, Action.PUBLISH, topic):
            _log.warning("publish.denied", identity=username, topic=topic[:200])
            self._refusals.publication(username, topic)
            return
        if retain:
            self._retain(topic, payload, min(qos, 1))
        self._deliver(topic, payload, qos)

    def _deliver(self, topic: str, payload: bytes, qos: int) -> None:
        """Hand a message to every session that subscribed and may receive it.

        Defects mended: stock walks a dictionary that subscriptions change under it, which aborts
        the delivery of messages already acknowledged; it delivers with the quality of service of
        the subscription where the standard wants the lower one (MQTT 3.1.1 section 3.8.4); and it
        sends what waited for an absent client with the retain flag set.
        """
        shared: dict[int, Publication] = {}
        for client_id, granted in self._tree.match(topic):
            session, _ = self._sessions[client_id]
            if not self._gate.may(session.username, Action.RECEIVE, topic):
                continue
            level = min(qos, granted)
            publication = shared.get(level)
            if publication is None:
                publication = shared[level] = Publication(topic, payload, qos=level)
            outbox_of(session).offer(publication)

    def post(self, topic: str, payload: bytes) -> None:
        """Hand out a message of the broker's own, at QoS 1, to those who may receive it."""
        self._deliver(topic, payload, 1)

    def _retain(self, topic: str, payload: bytes, qos: int) -> None:
        if not payload:
            self._retained.pop(topic, None)
        elif topic in self._retained or len(self._retained) < _RETAINED_LIMIT:
            self._retained[topic] = Publication(topic, payload, qos=qos, retain=True)
        else:
            _log.error("retained.full", limit=_RETAINED_LIMIT, topic=topic[:200])
            return
        self._store.keep(StoredMessage(topic=topic, payload=payload, qos=qos))

    def remember(self, found: Found) -> None:
        """Take up what an earlier process left: before anybody connects.

        Args:
            found: What its store held.
        """
        for kept in found.retained:
            self._retained[kept.topic] = Publication(
                kept.topic, kept.payload, qos=kept.qos, retain=True
            )
        self._orphans = dict(found.wills)

    def publish_orphans(self) -> None:
        """Publish the wills of those who were connected to an earlier process and did not return.

        A broker that died may publish them when it runs again (MQTT 3.1.1 section 3.1.2.5).
        Otherwise whoever died with it would be retained as present for ever.
        """
        for client_id, will in list(self._orphans.items()):
            del self._orphans[client_id]
            self._store.settle(client_id)
            self._take_from(
                str(will.username), will.topic, will.payload, qos=will.qos, retain=will.retain
            )
            _log.info("client.did_not_return", client=client_id, identity=will.username)

    def send_retained(self, session: Session, topic_filter: str, granted: int) -> None:
        """Send the retained messages that a new subscription matches.

        Defects mended: stock hands them out without asking whether the client may receive them,
        and gives every new connection those of everybody's subscriptions.

        Args:
            session: Who subscribed.
            topic_filter: To what.
            granted: The quality of service granted, 0x80 when refused.
        """
        if granted == _REFUSED_FILTER:
            return
        for topic, kept in self._retained.items():
            if matches(topic_filter, topic) and self._gate.may(
                session.username, Action.RECEIVE, topic
            ):
                level = min(kept.qos, granted)
                outbox_of(session).offer(
                    kept
                    if level == kept.qos
                    else Publication(topic, kept.payload, qos=level, retain=True)
                )

    async def _broadcast_message(
        self, session: Any, topic: str, data: bytes, force_qos: int | None = None
    ) -> None:
        """Deliver at once instead of through stock's unbounded queue (plugins use this door)."""
        self._deliver(topic, bytes(data), force_qos or 0)

    # -------------------------------------------------------------------- subscriptions

    async def add_subscription(self, subscription: tuple[str, int], session: Session) -> int:
        """Subscribe a session to a filter within its rights.

        Shared subscriptions (``$share/...``) are refused: stock accepts them and never delivers.

        Returns:
            The quality of service granted, 0x80 when refused (MQTT 3.1.1 section 3.9.3).
        """
        topic_filter, qos = subscription
        if not self._gate.may(session.username, Action.SUBSCRIBE, topic_filter):
            _log.warning("subscribe.denied", identity=session.username, filter=topic_filter[:200])
            self._refusals.subscription(session.username, topic_filter)
            return _REFUSED_FILTER
        granted = min(qos, 1)
        if self._tree.count(session.client_id) >= _FILTERS_PER_SESSION:
            _log.warning("subscribe.too_many", client=session.client_id)
            return _REFUSED_FILTER
        try:
            self._tree.add(session.client_id, topic_filter, granted)
        except InvalidTopic:
            return _REFUSED_FILTER
        return granted

    def remove_subscription(self, session: Session, topic_filter: str) -> None:
        """Unsubscribe a session from a filter; nothing happens when it had not subscribed."""
        self._tree.remove(session.client_id, topic_filter)

    # ---------------------------------------------------------------------- connections

    async def _serve(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, guest: Guest
    ) -> None:
        """Wrap a connection of a listener in our own adapters, and serve it to its end."""
        certificate = peer_certificate(writer.get_extra_info("ssl_object"))
        source: ClientReader = ClientReader(reader)
        sink = ClientWriter(writer, certificate=certificate)
        ws = self.settings.websocket
        if name == _WEBSOCKET_LISTENER and ws is not None:
            try:
                async with asyncio.timeout(self.settings.connect_timeout_s):
                    source, sink = await upgrade(
                        reader,
                        writer,
                        origins=ws.origins,
                        limit_bytes=self.settings.packet_limit_bytes,
                        certificate=certificate,
                    )
            except (MQTTError, ConnectionError, TimeoutError) as exc:
                reason = str(exc) or "no WebSocket handshake in time"
                _log.info("client.refused", address=guest.address, reason=reason)
                await sink.close()
                return
        source.admitted = partial(self._crowd.admitted, guest)
        await self._client_connected(name, source, sink)

    async def _initialize_client_session(
        self,
        reader: ClientReader,
        writer: ClientWriter,
        remote_address: str,
        remote_port: int,
    ) -> tuple[Connection, Session]:
        """Read and judge a CONNECT before it touches anything.

        Defects mended: stock waits forever for a CONNECT, and ends the session of the client id it
        names before it looks at the password.
        """
        try:
            async with asyncio.timeout(self.settings.connect_timeout_s):
                connection, session = await Connection.open(reader, writer, self.plugins_manager)
            async with asyncio.timeout(_ADMISSION_TIMEOUT_S):  # a storm waits for the hashing
                connection.attach(session, reader, writer)
                await self._admit(session, connection, writer.certificate, remote_address)
            reader.admitted()
        except TimeoutError as exc:
            writer.abort()
            raise MQTTError("no CONNECT, or no decision on it, in time") from exc
        except (AMQTTError, MQTTError, NoDataError) as exc:
            _log.info("client.refused", address=remote_address, port=remote_port, reason=str(exc))
            await writer.close()
            raise
        return connection, session

    async def _admit(
        self,
        session: Session,
        connection: Connection,
        certificate: PeerCertificate | None,
        address: str,
    ) -> None:
        """Check who it is, then everything else, then register; refusals are answered.

        Raises:
            MQTTError: It was refused.
        """
        if session.username is None and certificate is not None:
            session.username = certificate.identity
        admission = await self._gate.admit(
            session.username,
            session.password,
            session.client_id,
            certificate=certificate,
            address=address,
        )
        session.password = None
        if admission is Admission.ACCEPTED:
            admission = self._judge(session)
        if admission is Admission.ACCEPTED:
            session.remote_address = address
            self._refusals.look_for_second(session, [one for one, _ in self._sessions.values()])
            admission = await self._register(session, connection)
        if admission is not Admission.ACCEPTED:
            self._refusals.connection(session.username, address, admission)
            connection.writer.write(ConnackPacket.build(0, admission).to_bytes())
            raise MQTTError(f"refused {session.username!r}: {admission.name}")

    def _judge(self, session: Session) -> Admission:
        """Check what a right password alone does not allow: a forbidden will, too many sessions."""
        if session.will_flag and not self._gate.may(
            session.username, Action.PUBLISH, session.will_topic
        ):
            return Admission.NOT_AUTHORIZED
        existing = self._sessions.get(session.client_id)
        if existing is not None and existing[0].username != session.username:
            return Admission.IDENTIFIER_REJECTED
        held = sum(other.username == session.username for other, _ in self._sessions.values())
        if existing is None and held >= _SESSIONS_PER_IDENTITY:
            return Admission.UNAVAILABLE
        return Admission.ACCEPTED

    async def _register(self, session: Session, connection: Connection) -> Admission:
        """Make the connection the one of its client id; the old one, if any, is wound up first.

        Defects mended: stock leaves the old socket of a clean session open, and keeps the will of
        the previous connection in part.
        """
        client_id = session.client_id
        async with self._admission:
            existing = self._sessions.get(client_id)
            if existing is not None:
                if existing[0].username != session.username:
                    return Admission.IDENTIFIER_REJECTED
                await existing[1].stop()
                existing = self._sessions.get(client_id)
            if existing is not None and session.clean_session:
                self._forget(client_id)
                existing = None
            if existing is None:
                give_outbox(session, self._new_outbox(client_id))
            else:
                give_outbox(session, outbox_of(existing[0]))
                session.parent = 1
            session.transitions.connect()
            self._sessions[client_id] = (session, connection)
            self._expect_will(session)
            return Admission.ACCEPTED

    def _expect_will(self, session: Session) -> None:
        """Have the will of a connection outlive this process, as long as the connection lasts."""
        self._orphans.pop(session.client_id, None)
        if not session.will_flag:
            self._store.settle(session.client_id)
            return
        will = StoredMessage(
            topic=session.will_topic,
            payload=bytes(session.will_message),
            qos=session.will_qos or 0,
            retain=bool(session.will_retain),
            username=session.username,
        )
        self._store.expect(session.client_id, will)

    def _new_outbox(self, client_id: str) -> Outbox:
        return Outbox(
            window=self.settings.inflight_limit,
            limit=self.settings.queue_limit,
            limit_bytes=_OUTBOX_LIMIT_BYTES,
            dropped=partial(_report_drop, client_id),
        )

    async def _handle_client_session(
        self,
        reader: ClientReader,
        writer: ClientWriter,
        client_session: Session,
        handler: Connection,
        server: Any,
        listener_name: str,
    ) -> None:
        """Serve a registered connection, then wind it up."""
        said_goodbye = False
        try:
            handler.accept()
            said_goodbye = await handler.serve(self)
        finally:
            self._wind_up(client_session, handler, said_goodbye=said_goodbye)
            await writer.close()

    def _wind_up(self, session: Session, connection: Connection, *, said_goodbye: bool) -> None:
        """Send the will when it is due, and keep or forget the session."""
        outbox_of(session).disconnect()
        session.transitions.disconnect()
        if session.clean_session and self._sessions.get(session.client_id) == (session, connection):
            self._forget(session.client_id)
        if not self._stopping:
            self._store.settle(session.client_id)
        if session.will_flag and not said_goodbye and not self._stopping:
            self.take(
                session,
                session.will_topic,
                bytes(session.will_message),
                qos=session.will_qos or 0,
                retain=bool(session.will_retain),
            )
        connection.ended.set()

    def _forget(self, client_id: str) -> None:
        self._tree.remove_session(client_id)
        self._sessions.pop(client_id, None)

    async def _cleanup_session(self, client_id: str) -> None:
        """Cut the connection of a session and forget both."""
        _, connection = self._sessions.get(client_id, (None, None))
        if connection is not None:
            try:
                await connection.stop()
            except TimeoutError:
                _log.warning("client.stuck", client=client_id)
        self._forget(client_id)

    async def _session_monitor(self) -> None:
        """Look after silent clients and abandoned sessions, twice a second.

        Defect mended: stock notices that a keepalive has run out and does nothing about it; the
        standard wants the client cut off after one and a half times the keepalive, and with it its
        will (MQTT 3.1.1 section 3.1.2.10).
        """
        loop = asyncio.get_running_loop()
        absent_since: dict[str, float] = {}
        while True:
            await asyncio.sleep(_MONITOR_PERIOD_S)
            now = loop.time()
            for client_id, (session, connection) in list(self._sessions.items()):
                if session.transitions.state == "connected":
                    absent_since.pop(client_id, None)
                    silent_s = now - connection.last_heard_s
                    if session.keep_alive and silent_s > 1.5 * session.keep_alive:
                        connection.cut("keepalive")
                elif now - absent_since.setdefault(client_id, now) > self.settings.session_expiry_s:
                    del absent_since[client_id]
                    self._forget(client_id)
                    _log.info("session.expired", client=client_id)
            for client_id in absent_since.keys() - self._sessions.keys():
                del absent_since[client_id]


def _report_drop(client_id: str, publication: Publication, count: int) -> None:
    """Say that a message was dropped, without a line for each when thousands are."""
    if count % _DROPS_BETWEEN_REPORTS == 1:
        _log.warning("outbox.full", client=client_id, dropped=count, topic=publication.topic)
