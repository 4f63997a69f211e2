"""A TCP proxy that can cut, hold and slow down what passes through it.

It stands between a client and a broker, so that the connection can be broken at any moment, without
touching either end::

    async with TcpProxy(host="127.0.0.1", port=1883) as proxy:
        client = connect(proxy.url)
        proxy.cut()                 # every connection is reset
        proxy.refuse()              # new ones are reset too ...
        proxy.accept()              # ... until now
        proxy.stall()               # bytes are held back, connections stay
        proxy.flow()
        proxy.cut_after(upstream_bytes=5000)
        proxy.delay_s = 0.05        # each way
"""

import asyncio
from typing import Final

from broker.lifecycle import Service
from foam.chaos.twist import Twist

__all__ = ["TcpProxy"]

_PIECE_BYTES: Final = 64 * 1024


class TcpProxy(Service):
    """Forwards TCP connections to one address; listens on a free port of the loopback.

    Args:
        host: Where to forward to.
        port: Where to forward to.
        twist: What may happen to the messages for the client, where the bytes are MQTT's.
    """

    def __init__(self, *, host: str, port: int, twist: Twist | None = None) -> None:
        super().__init__(service_id=f"{host}:{port}")
        self.twist = twist
        self._target = (host, port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self._budget: int | None = None
        self.delay_s = 0.0
        self.connections = 0
        self.port = 0

    @property
    def url(self) -> str:
        """Address of the proxy as a broker URL."""
        return f"mqtt://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Reset every connection there is."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    def refuse(self) -> None:
        """Reset every connection, those to come included."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Let new connections through again."""
        self._refusing = False

    def stall(self) -> None:
        """Hold back all bytes in both directions."""
        self._flowing.clear()

    def flow(self) -> None:
        """Let held bytes go."""
        self._flowing.set()

    def cut_after(self, *, upstream_bytes: int) -> None:
        """Cut all connections when this many more bytes have gone to the target."""
        self._budget = upstream_bytes

    async def _on_start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _on_stopped(self) -> None:
        self._server.close()
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing or not self.running:
            writer.transport.abort()
            return
        self.connections += 1
        task = self.spawn(self._join(reader, writer), name=f"connection {self.connections}")
        await asyncio.wait([task])

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        pumps = [
            self.spawn(self._pump(reader, far_writer, upstream=True), name="up"),
            self.spawn(self._pump(far_reader, writer, upstream=False), name="down"),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for one in (writer, far_writer):
                self._writers.discard(one)
                one.close()  # what was written still arrives: a DISCONNECT, for one

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upstream: bool
    ) -> None:
        twisted = None
        if self.twist is not None and not upstream:
            twisted = self.twist.connection(writer.write)
        try:
            while piece := await reader.read(_PIECE_BYTES):
                await self._flowing.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if upstream and self._budget is not None:
                    piece = piece[: self._budget]
                    self._budget -= len(piece)
                if twisted is None:
                    writer.write(piece)
                else:
                    twisted.feed(piece)
                await writer.drain()
                if self._budget == 0:
                    self._budget = None
                    self.cut()
        except OSError:
            return
        finally:
            if twisted is not None:
                twisted.end()
