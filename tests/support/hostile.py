"""Connections that mean no good, over each of the transports a broker listens on."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from broker.access.authority import Authority
from broker.tls import TlsListener

TRANSPORTS = ("tcp", "tls", "ws", "wss")
UPGRADE = (
    b"GET /mqtt HTTP/1.1\r\nHost: broker\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: mqtt\r\n\r\n"
)
# The length of a CONNECT, and of a frame, of 256 MB.
ENDLESS_CONNECT = b"\x10\xff\xff\xff\x7f"
ENDLESS_FRAME = b"\x82\xff" + (1 << 28).to_bytes(8, "big") + b"mask"
HELLO_START = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


@dataclass(frozen=True)
class Papers:
    """An authority, and a listener with a certificate of it for 127.0.0.1."""

    authority: Authority
    authority_folder: Path
    listener: TlsListener

    @classmethod
    def make(cls, folder: Path, *, names: tuple[str, ...] = ("127.0.0.1",)) -> "Papers":
        authority = Authority.create(folder / "authority", site="local")
        key, made = authority.issue_server(list(names))
        (folder / "server.key").write_text(key)
        (folder / "server.crt").write_text(made.pem)
        (folder / "ca.pem").write_text(authority.bundle)
        listener = TlsListener(
            host="127.0.0.1",
            port=0,
            cert_file=folder / "server.crt",
            key_file=folder / "server.key",
            ca_file=folder / "ca.pem",
        )
        return cls(authority, folder / "authority", listener)


def unchecked() -> ssl.SSLContext:
    """TLS that believes everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def frame(payload: bytes, *, first: int = 0x82) -> bytes:
    """A frame of a client, masked with zeros."""
    size = len(payload)
    if size < 126:
        return bytes((first, 0x80 | size)) + b"\0\0\0\0" + payload
    return bytes((first, 0xFE)) + size.to_bytes(2, "big") + b"\0\0\0\0" + payload


@dataclass
class Raw:
    """A connection after the handshakes of its transport."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    framed: bool

    def send(self, data: bytes) -> None:
        self.writer.write(frame(data) if self.framed else data)

    async def ended(self, timeout_s: float) -> bytes:
        """Wait until the other side hangs up; returns what it said before.

        Raises:
            TimeoutError: It did not.
        """
        said = b""
        async with asyncio.timeout(timeout_s):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while data := await self.reader.read(65_536):
                    said += data
        return said


@contextlib.asynccontextmanager
async def connect(
    port: int, transport: str = "tcp", *, upgraded: bool = True
) -> AsyncIterator[Raw]:
    """Connect to a port, up to where MQTT (or, not ``upgraded``, HTTP) begins."""
    context = unchecked() if transport in {"tls", "wss"} else None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        framed = upgraded and transport in {"ws", "wss"}
        if framed:
            writer.write(UPGRADE)
            async with asyncio.timeout(20):
                head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101"), head
        yield Raw(reader, writer, framed)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
