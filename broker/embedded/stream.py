"""Bytes in and out of one client connection: framing with a limit, gathered writes."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter

from broker.tls import PeerCertificate
from capability_schemas.errors import ProtocolError, TooLarge

_CHUNK_BYTES: Final = 64 * 1024
# Above this the client is slow: what is published to it waits in its bounded outbox instead.
_PAUSE_BYTES: Final = 256 * 1024
_MAX_LENGTH_DIGITS: Final = 4
_SHORTEST_BYTES: Final = 2


def take_frames(buffer: bytearray, limit_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Take the complete packets off the front of ``buffer`` (MQTT 3.1.1 section 2.2).

    Args:
        buffer: What was received; what is consumed is removed when the iterator is exhausted.
        limit_bytes: Largest remaining length.

    Yields:
        First byte and the rest of each packet after its length.

    Raises:
        TooLarge: A length exceeds the limit; nothing of that packet need be received for it.
        ProtocolError: A length has more than four digits.
    """
    start, end = 0, len(buffer)
    try:
        while end - start >= _SHORTEST_BYTES:
            length = shift = 0
            position = start + 1
            while position < end:
                digit = buffer[position]
                length |= (digit & 0x7F) << shift
                shift += 7
                position += 1
                if not digit & 0x80:
                    break
                if shift == 7 * _MAX_LENGTH_DIGITS:
                    raise ProtocolError("a packet length has more than four digits")
            else:
                return
            if length > limit_bytes:
                raise TooLarge("packet", size_bytes=length, limit_bytes=limit_bytes)
            if end - position < length:
                return
            first = buffer[start]
            start = position + length
            yield first, bytes(buffer[position:start])
    finally:
        del buffer[:start]


class ClientReader(StreamReaderAdapter):  # type: ignore[misc]  # amqtt ships no types
    """Reads whatever is there instead of waiting for exact sizes, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self._source = reader
        self.admitted: Callable[[], None] = lambda: None  # called when its client is let in

    async def read_some(self) -> bytes:
        """Return what has arrived, at least one byte; empty at the end of the stream."""
        try:
            return await self._source.read(_CHUNK_BYTES)
        except (ConnectionError, TimeoutError):
            return b""


class ClientWriter(StreamWriterAdapter):  # type: ignore[misc]  # amqtt ships no types
    """Gathers the packets of one loop turn into one system call, and knows when to pause.

    Args:
        writer: The socket's.
        certificate: What the client's certificate says, if it has shown one.
    """

    def __init__(
        self, writer: asyncio.StreamWriter, *, certificate: PeerCertificate | None = None
    ) -> None:
        super().__init__(writer)
        self.certificate = certificate
        self.is_closed = False
        self._sink = writer
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0

    @property
    def buffered_bytes(self) -> int:
        """Bytes written and not yet handed to the kernel."""
        return int(self._sink.transport.get_write_buffer_size()) + self._gathered_bytes

    def write(self, data: bytes) -> None:
        """Queue bytes; they leave with this turn of the loop."""
        if self.is_closed or self._sink.transport.is_closing():
            return
        if not self._gathered:
            asyncio.get_running_loop().call_soon(self.flush)
        self._gathered.append(data)
        self._gathered_bytes += len(data)

    def write_publish(self, packet: bytes) -> bool:
        """Queue a packet and tell whether more may follow before ``drained``."""
        self.write(packet)
        return self.buffered_bytes < _PAUSE_BYTES

    def flush(self) -> None:
        """Hand what was gathered to the transport."""
        if self._gathered:
            packets, self._gathered = self._gathered, []
            self._gathered_bytes = 0
            self.write_through(self.encode(packets))

    def encode(self, packets: Sequence[bytes]) -> bytes:
        """Return what goes over the wire for some packets."""
        return b"".join(packets)

    def write_through(self, data: bytes) -> None:
        """Hand bytes to the transport as they are, if it still takes any."""
        if data and not self._sink.transport.is_closing():
            self._sink.write(data)

    async def drained(self) -> None:
        """Wait until the client has read enough for more to be sent; returns when it is gone."""
        self.flush()
        try:
            await self._sink.drain()
        except ConnectionError:
            return

    async def close(self) -> None:
        """Send what is queued, within two seconds, and close. Idempotent."""
        if self.is_closed:
            return
        self.flush()
        self.is_closed = True
        try:
            async with asyncio.timeout(2.0):
                self._sink.close()
                await self._sink.wait_closed()
        except (OSError, TimeoutError):
            self.abort()

    def abort(self) -> None:
        """Drop the connection at once; the reader sees the end of the stream."""
        self.flush()
        self._sink.transport.abort()
