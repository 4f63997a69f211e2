"""Brokers side by side: messages a second and round trips, with access rules in force on all.

The load comes from a lean client (one ``asyncio.Protocol``), so that the brokers are compared and
not a client library. Stock amqtt runs with the same access table as plugins. Rounds are
interleaved: every round measures every broker once.
"""

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, p50
from broker.access import CredentialStore
from capability_schemas.topics import TopicKind, Topics
from mqtt_probe import connect_packet, packet, text
from support.broker_site import IDENTITIES, is_available, run_site

PAYLOAD_BYTES = 256
WINDOW = 100
FROM, TO = "router-1", "edge-1"
STOCK = "stock amqtt"


class LoadClient(asyncio.Protocol):
    """One connection that counts: PUBLISH received and confirmed, PUBACK received."""

    def __init__(self) -> None:
        self.received = 0
        self.acked = 0
        self.progress = asyncio.Event()
        self.transport: asyncio.Transport | None = None
        self._rest = b""

    @classmethod
    async def open(cls, port: int, identity: str, password: str) -> "LoadClient":
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(cls, "127.0.0.1", port)
        client.write(connect_packet(identity, username=identity, password=password))
        await client.until(acked=1)  # CONNACK counts as the first answer
        return client

    def write(self, data: bytes) -> None:
        if self.transport is None:
            raise ConnectionError("not connected")
        self.transport.write(data)

    async def until(self, *, received: int = 0, acked: int = 0, timeout_s: float = 60.0) -> None:
        """Wait until both counters have come that far."""
        async with asyncio.timeout(timeout_s):
            while self.received < received or self.acked < acked:
                self.progress.clear()
                await self.progress.wait()

    async def subscribe(self, topic: str) -> None:
        due = self.acked + 1
        self.write(packet(0x82, b"\x00\x01" + text(topic) + b"\x01"))
        await self.until(acked=due)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self.transport = transport

    def data_received(self, data: bytes) -> None:
        data, at, replies = self._rest + data, 0, []
        while (frame := _frame(data, at)) is not None:
            start, end = frame
            if data[at] >> 4 == 3:
                self.received += 1
                if data[at] & 0x06:
                    length = int.from_bytes(data[start : start + 2], "big")
                    replies.append(b"\x40\x02" + data[start + 2 + length : start + 4 + length])
            else:
                self.acked += 1
            at = end
        self._rest = data[at:]
        if replies:
            self.write(b"".join(replies))
        self.progress.set()


def _frame(data: bytes, at: int) -> tuple[int, int] | None:
    """Bounds of the body of the packet at ``at``; None when it is not complete."""
    length = shift = 0
    for place in range(at + 1, min(at + 5, len(data))):
        length |= (data[place] & 0x7F) << shift
        shift += 7
        if not data[place] & 0x80:
            end = place + 1 + length
            return (place + 1, end) if end <= len(data) else None
    return None


class Pair:
    """A publisher and a subscriber on one broker."""

    def __init__(self, publisher: LoadClient, subscriber: LoadClient) -> None:
        self._publisher = publisher
        self._subscriber = subscriber
        self._topic = text(Topics().build(TopicKind.INVOKE, node=TO))
        self._number = 0

    def _publish(self, qos: int) -> bytes:
        number = b""
        if qos:
            self._number = self._number % 65_535 + 1
            number = self._number.to_bytes(2, "big")
        return packet(0x30 | qos << 1, self._topic + number + bytes(PAYLOAD_BYTES))

    async def rate(self, qos: int, count: int) -> float:
        """Messages a second from one publisher to one subscriber."""
        publisher, subscriber = self._publisher, self._subscriber
        first, acked = subscriber.received, publisher.acked
        started = time.perf_counter()
        for sent in range(0, count, WINDOW):
            publisher.write(b"".join(self._publish(qos) for _ in range(WINDOW)))
            if qos:
                await publisher.until(acked=acked + sent)
            else:
                await subscriber.until(received=first + sent - 2 * WINDOW)
        await subscriber.until(received=first + count)
        return count / (time.perf_counter() - started)

    async def one_way_ms(self, count: int) -> float:
        """Median time of one QoS 1 message at a time, publisher to subscriber."""
        times = []
        for _ in range(count):
            due = self._subscriber.received + 1
            started = time.perf_counter()
            self._publisher.write(self._publish(1))
            await self._subscriber.until(received=due)
            times.append((time.perf_counter() - started) * 1000)
        return p50(times)


@contextlib.asynccontextmanager
async def stock_amqtt(folder: Path) -> AsyncIterator[tuple[int, dict[str, str]]]:
    """Run stock amqtt in a child process; yields its port and the passwords."""
    store = CredentialStore(folder / "credentials.json")
    passwords = {name: store.add(name, role) for name, role in IDENTITIES.items()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c"),
        "import asyncio, logging; logging.disable(); "
        "from support.stock_amqtt import main; asyncio.run(main())",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the child has no pipes")
    try:
        order = json.dumps({"credentials": str(folder / "credentials.json")})
        process.stdin.write(order.encode() + b"\n")
        async with asyncio.timeout(20):
            yield int(await process.stdout.readline()), passwords
    finally:
        process.kill()
        await process.wait()


async def _open(port: int, passwords: dict[str, str]) -> Pair:
    publisher = await LoadClient.open(port, FROM, passwords[FROM])
    subscriber = await LoadClient.open(port, TO, passwords[TO])
    await subscriber.subscribe(Topics().build(TopicKind.INVOKE, node=TO))
    return Pair(publisher, subscriber)


async def measure(*, rounds: int = 5) -> list[dict[str, Any]]:
    kinds = [kind for kind in ("mosquitto", "embedded", "nats") if is_available(kind)]
    found: dict[str, dict[str, list[float]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for kind in kinds:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="foam-bench-")))
            site = await stack.enter_async_context(run_site(kind, folder))
            pairs[kind] = await _open(site.port, site.passwords)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="foam-bench-")))
        pairs[STOCK] = await _open(*await stack.enter_async_context(stock_amqtt(folder)))
        for _ in range(rounds):
            for kind, pair in pairs.items():
                count = 1_000 if kind == STOCK else 10_000
                row = found.setdefault(kind, {"q0": [], "q1": [], "ms": []})
                row["q0"].append(await pair.rate(0, count))
                row["q1"].append(await pair.rate(1, count))
                row["ms"].append(await pair.one_way_ms(200))
    base = {name: p50(values) for name, values in found[kinds[0]].items()}
    return [
        {
            "broker": kind,
            "QoS 0 msg/s": round(p50(row["q0"])),
            "QoS 1 msg/s": round(p50(row["q1"])),
            "one way p50 ms": round(p50(row["ms"]), 3),
            f"QoS 1 rate / {kinds[0]}": round(p50(row["q1"]) / base["q1"], 2),
        }
        for kind, row in found.items()
    ]
