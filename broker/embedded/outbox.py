"""What waits for one session: bounded, in order, kept until acknowledged."""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

_PUBLISH: Final = 0x30
_DUP: Final = 0x08
_PACKET_IDS: Final = 65_535


def encode_length(length: int) -> bytes:
    """Encode a remaining length (MQTT 3.1.1 section 2.2.3).

    Args:
        length: 0 to 268,435,455 bytes.
    """
    out = bytearray()
    while True:
        length, digit = divmod(length, 128)
        out.append(digit | 0x80 if length else digit)
        if not length:
            return bytes(out)


class Publication:
    """One message on its way to subscribers; immutable, shared between sessions.

    Args:
        topic: Topic name.
        payload: Payload.
        qos: 0 or 1.
        retain: Whether it is sent because it was retained.
    """

    __slots__ = ("_plain", "payload", "qos", "retain", "topic")

    def __init__(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.retain = retain
        self._plain: bytes | None = None

    def __len__(self) -> int:
        return len(self.payload) + len(self.topic) + 7

    def encode(self, packet_id: int = 0, *, again: bool = False) -> bytes:
        """Return the PUBLISH packet.

        Args:
            packet_id: 1 to 65,535 for QoS 1; unused for QoS 0, whose bytes are made once.
            again: Set the DUP flag.
        """
        if not self.qos and self._plain is not None:
            return self._plain
        name = self.topic.encode()
        first = _PUBLISH | self.qos << 1 | self.retain | (_DUP if again else 0)
        tail = packet_id.to_bytes(2, "big") if self.qos else b""
        length = 2 + len(name) + len(tail) + len(self.payload)
        packet = b"".join(
            (
                bytes((first,)),
                encode_length(length),
                len(name).to_bytes(2, "big"),
                name,
                tail,
                self.payload,
            )
        )
        if not self.qos:
            self._plain = packet
        return packet


class Outbox:
    """Messages for one session, sent as fast as its client acknowledges and reads.

    Full means: the new message is dropped and counted (like ``max_queued_messages`` elsewhere);
    end-to-end acknowledgement is the mesh's own business. Owned by one loop; not thread-safe.

    Args:
        window: QoS 1 messages in flight.
        limit: Messages that may wait.
        limit_bytes: Bytes that may wait; one message fits always.
        dropped: Called with each dropped message and how many there were.
    """

    def __init__(
        self,
        *,
        window: int,
        limit: int,
        limit_bytes: int,
        dropped: Callable[[Publication, int], None],
    ) -> None:
        self._window = window
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._dropped = dropped
        self._drops = 0
        self._waiting: deque[Publication] = deque()
        self._waiting_bytes = 0
        self._inflight: OrderedDict[int, Publication] = OrderedDict()
        self._packet_id = 0
        self._write: Callable[[bytes], bool] | None = None
        self._writable = False

    @property
    def waiting(self) -> int:
        """Messages that are not yet sent."""
        return len(self._waiting)

    @property
    def inflight(self) -> int:
        """Messages sent and not yet acknowledged."""
        return len(self._inflight)

    def connect(self, write: Callable[[bytes], bool]) -> None:
        """Attach a connection: what was never acknowledged goes first, with DUP set.

        Args:
            write: Takes a packet; returns whether it may be called again before ``resume``.
        """
        self._write, self._writable = write, True
        for packet_id, publication in self._inflight.items():
            self._writable = write(publication.encode(packet_id, again=True))
        self.resume(writable=self._writable)

    def disconnect(self) -> None:
        """Detach the connection; QoS 0 messages that wait are forgotten."""
        self._write, self._writable = None, False
        self._waiting = deque(message for message in self._waiting if message.qos)
        self._waiting_bytes = sum(map(len, self._waiting))

    def offer(self, publication: Publication) -> bool:
        """Send a message now or queue it.

        Returns:
            False when it was dropped: the queue is full, or it is QoS 0 and nobody is connected.
        """
        if not self._waiting and self._can_send(publication):
            self._send(publication)
            return True
        if self._write is None and not publication.qos:
            return False
        size = len(publication)
        if len(self._waiting) >= self._limit or (
            self._waiting and self._waiting_bytes + size > self._limit_bytes
        ):
            self._drops += 1
            self._dropped(publication, self._drops)
            return False
        self._waiting.append(publication)
        self._waiting_bytes += size
        return True

    def acknowledge(self, packet_id: int) -> None:
        """Take a PUBACK; an unknown packet id is ignored."""
        if self._inflight.pop(packet_id, None) is not None:
            self.resume(writable=self._writable)

    def resume(self, *, writable: bool = True) -> None:
        """Send what waits, as far as the window and the connection allow."""
        self._writable = writable
        while self._waiting and self._can_send(self._waiting[0]):
            publication = self._waiting.popleft()
            self._waiting_bytes -= len(publication)
            self._send(publication)

    def _can_send(self, publication: Publication) -> bool:
        return self._writable and (not publication.qos or len(self._inflight) < self._window)

    def _send(self, publication: Publication) -> None:
        packet_id = 0
        if publication.qos:
            packet_id = self._next_packet_id()
            self._inflight[packet_id] = publication
        if self._write is not None:
            self._writable = self._write(publication.encode(packet_id))

    def _next_packet_id(self) -> int:
        while True:
            self._packet_id = self._packet_id % _PACKET_IDS + 1
            if self._packet_id not in self._inflight:
                return self._packet_id
