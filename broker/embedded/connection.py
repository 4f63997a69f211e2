"""One client's connection: reads packets in order, answers them, writes what is published to it."""

import asyncio
from typing import TYPE_CHECKING, Any, Final, Self

import structlog
from amqtt.adapters import BufferReader
from amqtt.errors import AMQTTError, MQTTError, NoDataError
from amqtt.mqtt.connack import ConnackPacket
from amqtt.mqtt.packet import SUBSCRIBE, UNSUBSCRIBE, MQTTFixedHeader
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.suback import SubackPacket
from amqtt.mqtt.subscribe import SubscribePacket
from amqtt.mqtt.unsubscribe import UnsubscribePacket
from amqtt.session import Session

from broker.embedded.outbox import Outbox
from broker.embedded.routing import check_topic
from broker.embedded.stream import ClientReader, ClientWriter, take_frames
from capability_schemas.errors import ProtocolError

if TYPE_CHECKING:
    from broker.embedded.hardened import HardenedBroker

_log = structlog.get_logger(__name__)

# A CONNECT holds a will of up to 64 KiB, and names.
_CONNECT_LIMIT_BYTES: Final = 256 * 1024
_LENGTH_DIGITS: Final = 4
_CONNECT: Final = 0x10
_MQTT_5: Final = 5
# MQTT 5 section 3.2: no session, reason 0x84 (unsupported protocol version), no properties.
_REFUSE_MQTT_5: Final = b"\x20\x03\x00\x84\x00"
_OUTBOX: Final = "foam.outbox"


def outbox_of(session: Session) -> Outbox:
    """Return the outbox that travels with a session from connection to connection."""
    found: Outbox = session.attributes[_OUTBOX]
    return found


def give_outbox(session: Session, outbox: Outbox) -> None:
    """Attach an outbox to a session."""
    session.attributes[_OUTBOX] = outbox


async def _read_connect(reader: ClientReader) -> bytes:
    """Read the first packet whole, at most 256 KiB."""
    try:
        frame = bytearray(await reader.read(1))
        length = 0
        for digit in range(_LENGTH_DIGITS):
            frame += await reader.read(1)
            length |= (frame[-1] & 0x7F) << (7 * digit)
            if not frame[-1] & 0x80:
                break
        if frame[0] != _CONNECT or length > _CONNECT_LIMIT_BYTES:
            raise MQTTError("the first packet is no CONNECT of sensible size")
        frame += await reader.read(length)
    except (asyncio.IncompleteReadError, ConnectionError) as exc:
        raise NoDataError("the connection ended before a CONNECT") from exc
    return bytes(frame)


def _speaks_mqtt_5(frame: bytes) -> bool:
    name = frame.find(b"\x00\x04MQTT", 2, 11)
    return name > 0 and frame[name + 6 : name + 7] == bytes((_MQTT_5,))


class Connection(BrokerProtocolHandler):  # type: ignore[misc]  # amqtt ships no types
    """Serves one client; owned by the task of its socket.

    Takes amqtt's place between socket and broker. Stock runs one task per packet and per delivery,
    waits five seconds for a PUBACK and then forgets the message, and gives up nothing when the
    client falls silent.
    """

    def __init__(self, plugins_manager: Any, session: Any = None, loop: Any = None) -> None:
        super().__init__(plugins_manager, session, loop)
        self.last_heard_s = asyncio.get_running_loop().time()
        self.ended = asyncio.Event()
        self._paused = asyncio.Event()
        self._received_qos2: set[int] = set()

    @classmethod
    async def open(
        cls, reader: ClientReader, writer: ClientWriter, plugins_manager: Any
    ) -> tuple[Self, Session]:
        """Read a CONNECT and take it apart.

        Defect mended: stock parses an MQTT 5 CONNECT that carries credentials as 3.1.1, stumbles,
        and leaves the client waiting for its own timeout. It is refused in its own language here,
        before anything else of it is read.

        Raises:
            MQTTError: It is no CONNECT for us; it has been answered where the protocol allows.
            NoDataError: The client left.
        """
        frame = await _read_connect(reader)
        if _speaks_mqtt_5(frame):
            writer.write(_REFUSE_MQTT_5)
            raise MQTTError("a client asked for MQTT 5")
        connection, session = await cls.init_from_connect(
            BufferReader(frame), writer, plugins_manager
        )
        return connection, session

    async def serve(self, broker: "HardenedBroker") -> bool:
        """Serve the client until it leaves or is cut off.

        Returns:
            Whether it said goodbye; its will is due otherwise.
        """
        client_id = self.session.client_id
        try:
            async with asyncio.TaskGroup() as tasks:
                pump = tasks.create_task(
                    self._pump(), name=f"broker.embedded.Connection[{client_id}].pump"
                )
                try:
                    return await self._read(broker)
                finally:
                    pump.cancel()
        except* (ProtocolError, MQTTError, AMQTTError, NoDataError) as group:
            _log.warning("client.broke_protocol", client=client_id, reason=str(group.exceptions[0]))
        except* OSError as group:
            _log.info("client.lost", client=client_id, reason=str(group.exceptions[0]))
        return False

    def accept(self) -> None:
        """Answer the CONNECT and send what waits for the session."""
        self.writer.write(ConnackPacket.build(self.session.parent, 0).to_bytes())
        outbox_of(self.session).connect(self._write_publish)

    def cut(self, reason: str) -> None:
        """Drop the connection; ``serve`` returns soon after."""
        _log.info("client.cut", client=self.session.client_id, reason=reason)
        self.writer.abort()

    async def stop(self) -> None:
        """Drop the connection and wait, at most 5 seconds, until it is wound up."""
        if self.ended.is_set():
            return
        self.cut("stopped")
        async with asyncio.timeout(5.0):
            await self.ended.wait()

    def _write_publish(self, packet: bytes) -> bool:
        more: bool = self.writer.write_publish(packet)
        if not more:
            self._paused.set()
        return more

    async def _pump(self) -> None:
        """Send on when a slow client has read what it was sent."""
        while True:
            await self._paused.wait()
            self._paused.clear()
            await self.writer.drained()
            outbox_of(self.session).resume()

    async def _read(self, broker: "HardenedBroker") -> bool:
        loop, limit = asyncio.get_running_loop(), broker.settings.packet_limit_bytes
        buffer = bytearray()
        while chunk := await self.reader.read_some():
            self.last_heard_s = loop.time()
            buffer += chunk
            try:
                for first, body in take_frames(buffer, limit):
                    if await self._take(broker, first, body):
                        return True
            except (IndexError, UnicodeDecodeError) as exc:
                raise ProtocolError("a packet is cut short or not UTF-8") from exc
            if self.writer.buffered_bytes > limit:  # a client that never reads its answers
                await self.writer.drained()
        return False

    async def _take(self, broker: "HardenedBroker", first: int, body: bytes) -> bool:
        """Handle one packet; true for DISCONNECT."""
        match first >> 4:
            case 3:
                self._take_publish(broker, first, body)
            case 4:
                outbox_of(self.session).acknowledge(int.from_bytes(body[:2], "big"))
            case 6:  # PUBREL ends a QoS 2 publish (MQTT 3.1.1 figure 4.3, method B)
                self._received_qos2.discard(int.from_bytes(body[:2], "big"))
                self.writer.write(b"\x70\x02" + body[:2])
            case 8:
                await self._take_subscribe(broker, body)
            case 10:
                await self._take_unsubscribe(broker, body)
            case 12:
                self.writer.write(b"\xd0\x00")
            case 14:
                return True
            case kind:
                raise ProtocolError(f"packet type {kind} does not belong in a session")
        return False

    def _take_publish(self, broker: "HardenedBroker", first: int, body: bytes) -> None:
        qos = first >> 1 & 3
        name_end = 2 + int.from_bytes(body[:2], "big")
        payload_start = name_end + (2 if qos else 0)
        if len(body) < payload_start or qos == 3:  # noqa: PLR2004 - the reserved value
            raise ProtocolError("a PUBLISH is cut short or of an unknown quality of service")
        topic = body[2:name_end].decode()
        # Defect mended: stock stops listening to a client that published to "$..." but keeps its
        # socket and acknowledges everything it sends from then on.
        check_topic(topic)
        packet_id = body[name_end:payload_start]
        number = int.from_bytes(packet_id, "big")
        if number not in self._received_qos2 or qos < 2:  # noqa: PLR2004
            broker.take(self.session, topic, body[payload_start:], qos=qos, retain=bool(first & 1))
        if qos == 1:
            self.writer.write(b"\x40\x02" + packet_id)
        elif qos:
            self._received_qos2.add(number)
            self.writer.write(b"\x50\x02" + packet_id)

    async def _take_subscribe(self, broker: "HardenedBroker", body: bytes) -> None:
        header = MQTTFixedHeader(SUBSCRIBE, 2, len(body))
        packet = await SubscribePacket.from_stream(BufferReader(body), fixed_header=header)
        if not packet.payload.topics:
            raise ProtocolError("a SUBSCRIBE names no filter")
        codes = [
            await broker.add_subscription(wanted, self.session) for wanted in packet.payload.topics
        ]
        answer = SubackPacket.build(packet.variable_header.packet_id, codes)
        self.writer.write(answer.to_bytes())
        for (topic_filter, _), granted in zip(packet.payload.topics, codes, strict=True):
            broker.send_retained(self.session, topic_filter, granted)

    async def _take_unsubscribe(self, broker: "HardenedBroker", body: bytes) -> None:
        header = MQTTFixedHeader(UNSUBSCRIBE, 2, len(body))
        packet = await UnsubscribePacket.from_stream(BufferReader(body), fixed_header=header)
        for topic_filter in packet.payload.topics:
            broker.remove_subscription(self.session, topic_filter)
        self.writer.write(b"\xb0\x02" + body[:2])
