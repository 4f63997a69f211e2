"""MQTT over WebSocket, seen from the broker: the same streams, with frames around what passes.

The handshake and the frames are those of ``websockets`` without its network part, so that a client
over WebSocket has the deadlines, limits and gathered writes of every other client.

Who may come: programs, which send no Origin, and pages that were loaded from the very host and port
they connect to, or from an origin that the operator has named. Any other page is refused: a browser
would show the certificate of its user for it, or reach a broker on loopback for it (RFC 6455
section 10.2).
"""

import asyncio
import logging
from collections.abc import Collection, Sequence
from typing import Final
from urllib.parse import urlsplit

from amqtt.errors import MQTTError
from websockets.datastructures import Headers, MultipleValuesError
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from broker.embedded.stream import ClientReader, ClientWriter
from broker.tls import PeerCertificate

PATHS: Final = frozenset({"/", "/mqtt"})
_HANDSHAKE_LIMIT_BYTES: Final = 16 * 1024
_CONNECT_FRAME_BYTES: Final = 256 * 1024 + 16
_FRAME_ROOM_BYTES: Final = 64 * 1024
# Packets share a frame up to this size: browsers and small clients take a frame whole.
_FRAME_BYTES: Final = 8 * 1024
_PONGS_LIMIT_BYTES: Final = 64 * 1024
_DATA: Final = frozenset({Opcode.BINARY, Opcode.CONT})

# The library would write a line for each connection.
_silent = logging.getLogger("broker.embedded.websocket.frames")
_silent.setLevel(logging.CRITICAL)


class WebSocketReader(ClientReader):
    """Takes the payload out of the frames of a client.

    Args:
        reader: The socket's.
        writer: Where answers to its control frames go.
        frames: The protocol, after the handshake.
        limit_bytes: Largest frame once the client is admitted; 256 KiB before.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: "WebSocketWriter",
        frames: ServerProtocol,
        *,
        limit_bytes: int,
    ) -> None:
        super().__init__(reader)
        self._writer_side = writer
        self._frames = frames
        self._limit_bytes = limit_bytes
        self._ready = bytearray()

    async def read(self, n: int = -1) -> bytes:
        """Read exactly ``n`` bytes of the CONNECT.

        Raises:
            asyncio.IncompleteReadError: The stream ended before.
        """
        while len(self._ready) < n:
            if not await self._receive():
                raise asyncio.IncompleteReadError(bytes(self._ready), n)
        taken = bytes(self._ready[:n])
        del self._ready[:n]
        return taken

    async def read_some(self) -> bytes:
        """Return what has arrived, at least one byte; empty at the end of the stream."""
        self._frames.max_size = self._limit_bytes + _FRAME_ROOM_BYTES
        while not self._ready:
            if not await self._receive():
                return b""
        taken = bytes(self._ready)
        self._ready.clear()
        return taken

    async def _receive(self) -> bool:
        """Take in what the network has; false at the end."""
        if self._writer_side.buffered_bytes > _PONGS_LIMIT_BYTES and not self._ready:
            await self._writer_side.drained()  # a client that asks and never reads
        if self._frames.state is not State.OPEN:
            return False
        data = await super().read_some()
        if not data:
            return False
        self._frames.receive_data(data)
        for event in self._frames.events_received():
            if isinstance(event, Frame) and event.opcode in _DATA:
                self._ready += event.data
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                # MQTT 3.1.1 section 6.0-1: MQTT comes in binary frames, anything else ends it.
                self._frames.fail(CloseCode.UNSUPPORTED_DATA, "MQTT comes in binary frames")
        self._writer_side.write_control(self._frames.data_to_send())
        return bool(self._ready) or self._frames.state is State.OPEN


class WebSocketWriter(ClientWriter):
    """Puts what is written into frames.

    Args:
        writer: The socket's.
        frames: The protocol, after the handshake.
        certificate: What the client's certificate says, if it has shown one.
    """

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        frames: ServerProtocol,
        *,
        certificate: PeerCertificate | None,
    ) -> None:
        super().__init__(writer, certificate=certificate)
        self._frames = frames

    def write_control(self, pieces: Sequence[bytes]) -> None:
        """Hand frames that the protocol made to the transport; its mark of the end is left out."""
        self.write_through(b"".join(pieces))

    def encode(self, packets: Sequence[bytes]) -> bytes:
        """Put whole packets into frames of some kilobytes; a larger packet has its own."""
        if self._frames.state is not State.OPEN:
            return b""
        together: list[bytes] = []
        size = 0
        for packet in packets:
            if together and size + len(packet) > _FRAME_BYTES:
                self._frames.send_binary(b"".join(together))
                together, size = [], 0
            together.append(packet)
            size += len(packet)
        self._frames.send_binary(b"".join(together))
        return b"".join(self._frames.data_to_send())

    async def close(self) -> None:
        """Say goodbye in a frame, then close as every stream. Idempotent."""
        self.flush()
        if self._frames.state is State.OPEN:
            self._frames.send_close(CloseCode.NORMAL_CLOSURE)
            self.write_control(self._frames.data_to_send())
        await super().close()


async def upgrade(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    origins: Collection[str],
    limit_bytes: int,
    certificate: PeerCertificate | None,
) -> tuple[WebSocketReader, WebSocketWriter]:
    """Shake hands with a client; the caller bounds the time and closes the socket.

    Args:
        reader: The socket's.
        writer: The socket's.
        origins: Origins of pages that may connect beside those of the same host; ``*``: all.
        limit_bytes: Largest frame of an admitted client.
        certificate: What its certificate says, if it has shown one.

    Raises:
        MQTTError: It is no WebSocket client for us; it has been told so.
    """
    frames = ServerProtocol(
        subprotocols=[Subprotocol("mqtt")], max_size=_CONNECT_FRAME_BYTES, logger=_silent
    )
    request = await _request(reader, writer, frames)
    response = (
        frames.reject(404, "MQTT is at /mqtt\n")
        if not _is_ours(request.path)
        else frames.accept(request)
        if is_own_page(request.headers, origins, secure=bool(writer.get_extra_info("ssl_object")))
        else frames.reject(403, "pages of this origin may not connect: see --ws-origin\n")
    )
    frames.send_response(response)
    writer.write(b"".join(frames.data_to_send()))
    if frames.state is not State.OPEN:
        raise MQTTError(f"WebSocket refused: {response.status_code} {response.reason_phrase}")
    sink = WebSocketWriter(writer, frames, certificate=certificate)
    source = WebSocketReader(reader, sink, frames, limit_bytes=limit_bytes)
    return source, sink


async def _request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, frames: ServerProtocol
) -> Request:
    """Read the request for an upgrade, at most 16 KiB of it."""
    received = 0
    while True:
        data = await reader.read(_HANDSHAKE_LIMIT_BYTES - received)
        if not data:
            raise MQTTError("the connection ended in the WebSocket handshake")
        if not received and not data[:1].isalpha():
            raise MQTTError("no HTTP on the port for WebSocket: MQTT over TCP, or TLS?")
        received += len(data)
        frames.receive_data(data)
        for event in frames.events_received():
            if isinstance(event, Request):
                return event
        if frames.handshake_exc is not None or received >= _HANDSHAKE_LIMIT_BYTES:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            raise MQTTError("no request for a WebSocket")


def _is_ours(path: str) -> bool:
    try:
        return urlsplit(path).path in PATHS
    except ValueError:  # half an IPv6 address where a host would be
        return False


def is_own_page(headers: Headers, origins: Collection[str], *, secure: bool) -> bool:
    """Tell whether who asks is no page, or one that may connect.

    Args:
        headers: Of the request.
        origins: Further origins that may; ``*``: all.
        secure: Whether it came over TLS.
    """
    try:
        origin, host = headers.get("Origin"), headers.get("Host", "")
    except MultipleValuesError:
        return False
    if origin is None or "*" in origins or origin in origins:
        return True
    return origin.lower() == f"{'https' if secure else 'http'}://{host.lower()}"
