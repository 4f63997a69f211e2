"""A raw MQTT 3.1.1 client for tests: does what it is told, also what no library would do."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self

DEADLINE_S = 10.0


class Refused(Exception):  # noqa: N818  # an answer, not an error
    """The broker answered CONNECT with a code other than 0."""

    def __init__(self, code: int) -> None:
        super().__init__(f"CONNACK {code}")
        self.code = code


class Lost(Exception):  # noqa: N818  # as above
    """The connection ended."""


@dataclass(frozen=True)
class Received:
    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    packet_id: int


@dataclass(frozen=True)
class Will:
    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return len(data).to_bytes(2, "big") + data


def packet(first: int, body: bytes) -> bytes:
    length, out = len(body), bytearray((first,))
    while True:
        length, digit = divmod(length, 128)
        out.append(digit | (0x80 if length else 0))
        if not length:
            return bytes(out) + body


def connect_packet(
    client_id: str,
    *,
    username: str | None = None,
    password: str | None = None,
    clean: bool = True,
    keepalive: int = 60,
    will: Will | None = None,
    level: int = 4,
) -> bytes:
    flags = 2 if clean else 0
    tail = text(client_id)
    if will is not None:
        flags |= 4 | will.qos << 3 | (0x20 if will.retain else 0)
        tail += (b"\0" if level == 5 else b"") + text(will.topic) + text(will.payload)
    if username is not None:
        flags |= 0x80
        tail += text(username)
    if password is not None:
        flags |= 0x40
        tail += text(password)
    head = text("MQTT") + bytes((level, flags)) + keepalive.to_bytes(2, "big")
    return packet(0x10, head + (b"\0" if level == 5 else b"") + tail)


@dataclass
class Probe:
    """One connection. ``got`` holds every PUBLISH received, in order."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    auto_ack: bool = True
    got: list[Received] = field(default_factory=list)
    session_present: bool = False
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    _answers: dict[tuple[int, int], asyncio.Future[bytes]] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _reading: asyncio.Task[None] | None = None
    _listening: asyncio.Event = field(default_factory=asyncio.Event)
    _packet_id: int = 0

    @classmethod
    async def open(
        cls,
        port: int,
        client_id: str,
        *,
        auto_ack: bool = True,
        tls: ssl.SSLContext | None = None,
        **fields: Any,
    ) -> Self:
        """Connect; ``fields`` are those of ``connect_packet``.

        Raises:
            Refused: The broker said no.
            Lost: It hung up without an answer.
        """
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        except (ssl.SSLError, ConnectionError) as exc:
            if tls is None:
                raise
            raise Lost("no TLS") from exc
        self = cls(reader, writer, auto_ack)
        self._listening.set()
        writer.write(connect_packet(client_id, **fields))
        try:
            async with asyncio.timeout(DEADLINE_S):
                answer = await reader.readexactly(4)
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError) as exc:
            writer.close()
            raise Lost("no CONNACK") from exc
        if answer[3]:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            raise Refused(answer[3])
        self.session_present = bool(answer[2])
        self._reading = asyncio.get_running_loop().create_task(self._read())
        return self

    async def subscribe(self, topic_filter: str, qos: int = 1) -> int:
        body = text(topic_filter) + bytes((qos,))
        return (await self._ask(0x82, 9, body))[-1]

    async def unsubscribe(self, topic_filter: str) -> None:
        await self._ask(0xA2, 11, text(topic_filter))

    async def publish(
        self, topic: str, payload: bytes = b"", *, qos: int = 1, retain: bool = False
    ) -> None:
        """Publish; QoS 1 returns at PUBACK, QoS 2 at PUBCOMP."""
        first = 0x30 | qos << 1 | retain
        if not qos:
            self.send(packet(first, text(topic) + payload))
            return
        number = self._next_id()
        answer = self._expect({1: 4, 2: 5}[qos], number)
        self.send(packet(first, text(topic) + number.to_bytes(2, "big") + payload))
        await self._wait(answer)
        if qos == 2:
            answer = self._expect(7, number)
            self.send(packet(0x62, number.to_bytes(2, "big")))
            await self._wait(answer)

    async def ping(self) -> None:
        """Round trip: everything sent before it has been handled."""
        answer = self._expect(13, 0)
        self.send(b"\xc0\x00")
        await self._wait(answer)

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def acknowledge(self, message: Received) -> None:
        self.send(b"\x40\x02" + message.packet_id.to_bytes(2, "big"))

    async def expect(self, count: int, *, timeout_s: float = DEADLINE_S) -> list[Received]:
        """Wait until ``count`` messages have come in all."""
        async with asyncio.timeout(timeout_s):
            while len(self.got) < count:
                if self.lost.is_set():
                    raise Lost(f"after {len(self.got)} of {count} messages")
                self._news.clear()
                await self._news.wait()
        return self.got

    async def payloads(self, count: int) -> list[bytes]:
        return [message.payload for message in await self.expect(count)]

    async def wait_lost(self, *, timeout_s: float = DEADLINE_S) -> None:
        async with asyncio.timeout(timeout_s):
            await self.lost.wait()

    def stop_reading(self) -> None:
        """Leave what comes in the socket, as a stalled device does."""
        self._listening.clear()

    def go_on_reading(self) -> None:
        self._listening.set()

    async def disconnect(self) -> None:
        """Say goodbye and hang up."""
        if not self.lost.is_set():
            self.send(b"\xe0\x00")
        await self._end()

    async def abort(self) -> None:
        """Reset the connection without goodbye."""
        self.writer.transport.abort()
        await self._end()

    async def _end(self) -> None:
        self._listening.set()
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    async def _ask(self, first: int, kind: int, body: bytes) -> bytes:
        number = self._next_id()
        answer = self._expect(kind, number)
        self.send(packet(first, number.to_bytes(2, "big") + body))
        return await self._wait(answer)

    def _next_id(self) -> int:
        self._packet_id = self._packet_id % 65_535 + 1
        return self._packet_id

    def _expect(self, kind: int, number: int) -> asyncio.Future[bytes]:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._answers[kind, number] = answer
        return answer

    async def _wait(self, answer: asyncio.Future[bytes]) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await answer

    async def _read(self) -> None:
        try:
            while True:
                await self._listening.wait()
                first, body = await self._packet()
                self._take(first, body)
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            self.lost.set()
            self._news.set()
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(Lost("the broker hung up"))
                    answer.exception()

    async def _packet(self) -> tuple[int, bytes]:
        first = (await self.reader.readexactly(1))[0]
        length = shift = 0
        while True:
            digit = (await self.reader.readexactly(1))[0]
            length |= (digit & 0x7F) << shift
            shift += 7
            if not digit & 0x80:
                return first, await self.reader.readexactly(length)

    def _take(self, first: int, body: bytes) -> None:
        kind = first >> 4
        if kind != 3:
            number = int.from_bytes(body[:2], "big") if kind != 13 else 0
            answer = self._answers.pop((kind, number), None)
            if answer is not None and not answer.done():
                answer.set_result(body)
            return
        qos = first >> 1 & 3
        end = 2 + int.from_bytes(body[:2], "big")
        start = end + (2 if qos else 0)
        number = int.from_bytes(body[end:start], "big")
        message = Received(
            body[2:end].decode(), body[start:], qos, bool(first & 1), bool(first & 8), number
        )
        self.got.append(message)
        if qos and self.auto_ack:
            self.acknowledge(message)
        self._news.set()


@contextlib.asynccontextmanager
async def probes() -> AsyncIterator[Any]:
    """Yield a function like ``Probe.open`` whose connections are closed at the end."""
    opened: list[Probe] = []

    async def connect(port: int, client_id: str, **fields: Any) -> Probe:
        probe = await Probe.open(port, client_id, **fields)
        opened.append(probe)
        return probe

    try:
        yield connect
    finally:
        for probe in reversed(opened):
            await probe.abort()


async def raw_answer(port: int, data: bytes, *, timeout_s: float = 5.0) -> bytes | None:
    """Send bytes and return the first thing that comes back; empty when the broker hangs up.

    ``None``: nothing at all within ``timeout_s``.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(timeout_s):
            return await reader.read(100)
    except TimeoutError:
        return None
    except ConnectionError:
        return b""
    finally:
        writer.close()
