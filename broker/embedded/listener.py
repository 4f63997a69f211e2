"""One listening socket of the embedded broker: everything before the first byte of MQTT."""

import asyncio
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import structlog

from broker.embedded.crowd import Crowd, Guest
from broker.lifecycle import Service
from broker.ports import free_port

_log = structlog.get_logger(__name__)

_BACKLOG: Final = 1024
_PORT_TRIES: Final = 3
_READ_AHEAD_BYTES: Final = 64 * 1024
_ACCEPT_PAUSE_S: Final = 0.5
# A peer that vanished without a word is noticed after 60 + 4 * 15 s, whatever keep-alive it wanted
# of MQTT (none is allowed: MQTT 3.1.1 section 3.1.2.10). tcp(7); absent where the system has none.
_KEEPALIVE: Final = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Guest], Awaitable[None]]


class Listener(Service):
    """Accepts connections, counts them, shakes hands where TLS is spoken, and has them served.

    Its own accepting, and not that of ``asyncio.start_server``: that one hides a connection until
    its TLS handshake is over, so half handshakes could be neither counted nor told to make room.

    Args:
        name: What to call it in logs.
        host: Address.
        port: TCP port; 0 takes a free one.
        serve: Serves one connection; returns when it has ended.
        crowd: Who is connected, on every listener of the broker.
        context: How TLS is spoken; None for plain text. Replaced for renewed certificates: it
            counts for whoever connects from then on.
        handshake_timeout_s: How long a TLS handshake may take, seconds.
    """

    def __init__(
        self,
        *,
        name: str,
        host: str,
        port: int,
        serve: Serve,
        crowd: Crowd,
        context: ssl.SSLContext | None,
        handshake_timeout_s: float,
    ) -> None:
        super().__init__(service_id=name)
        self._name = name
        self._address = (host, port)
        self._serve = serve
        self._crowd = crowd
        self._handshake_timeout_s = handshake_timeout_s
        self._socket: socket.socket | None = None
        self.context = context

    @property
    def port(self) -> int:
        """TCP port it listens on, 0 when it does not."""
        return int(self._socket.getsockname()[1]) if self._socket is not None else 0

    async def _on_start(self) -> None:
        """Listen.

        Raises:
            OSError: The address is taken, or not ours.
        """
        self._socket = _listening(*self._address)
        self._socket.setblocking(False)
        self.spawn(self._accept(self._socket), name="accept")

    async def _on_stopped(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listening)
            except OSError as error:  # out of descriptors, or a peer that left in between
                _log.warning("listener.accept_failed", listener=self._name, reason=str(error))
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            guest = Guest(str(address[0]), partial(_cut, connection))
            if not self._crowd.enter(guest):
                connection.close()
                continue
            self.spawn(self._take(connection, guest), name="connection")

    async def _take(self, connection: socket.socket, guest: Guest) -> None:
        try:
            await self._shake_hands(connection, guest)
        except OSError as error:  # TLS errors and time-outs are OSErrors too
            _log.info(
                "client.no_handshake",
                listener=self._name,
                address=guest.address,
                reason=str(error) or "no TLS handshake in time",
            )
        except Exception as error:  # noqa: BLE001  # supervision boundary: one connection
            _log.error("client.failed", listener=self._name, exc_info=error)
        finally:
            self._crowd.leave(guest)

    async def _shake_hands(self, connection: socket.socket, guest: Guest) -> None:
        try:
            _set_options(connection)
        except OSError:
            connection.close()
            raise
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_READ_AHEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            connection,
            ssl=self.context,
            ssl_handshake_timeout=self._handshake_timeout_s if self.context else None,
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        guest.cut = transport.abort
        try:
            await self._serve(reader, writer, guest)
        finally:
            transport.abort()


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tries = 1 if port else _PORT_TRIES
    while True:
        tries -= 1
        address = (host, port or free_port(host))
        try:
            return socket.create_server(address, family=family, backlog=_BACKLOG)
        except OSError as error:
            if not tries or error.errno != errno.EADDRINUSE:
                raise


def _set_options(connection: socket.socket) -> None:
    # asyncio does so where the protocol number of the socket says TCP, which an accepted one has
    # from its listening socket; without it a QoS 1 round trip takes 44 ms instead of 0.5.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _cut(connection: socket.socket) -> None:
    """Drop a connection whose TLS handshake is under way; the transport sees the end of it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        _log.debug("listener.shutdown", reason=str(error))
