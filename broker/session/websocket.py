"""MQTT over WebSocket, seen from the client: a socket that speaks frames (RFC 6455).

``paho`` brings one of its own. It masks what it sends byte by byte in Python, during which the
loop stands still (some 80 ms for a megabyte), reads a frame again from its start for each packet
in it, bounds the handshake only from one byte to the next, and says of a refusal nothing but that
there was one. This one takes its place, behind the same few methods.
"""

import base64
import hashlib
import os
import socket
import ssl
import time
from typing import Final

# RFC 6455 section 1.3.
_ACCEPT_SUFFIX: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_HEAD_LIMIT_BYTES: Final = 16 * 1024
_CHUNK_BYTES: Final = 64 * 1024
# A packet above it leaves in several frames; MQTT 3.1.1 section 6 lets frames and packets differ.
_FRAME_BYTES: Final = 1024 * 1024
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING = 0x0, 0x1, 0x2, 0x8, 0x9
_CONTROL: Final = 0x8
_LAST: Final = 0x80
_MASKED: Final = 0x80
_SHORT_LENGTHS: Final = 126
_SHORTEST_HEADER: Final = 2


class UpgradeRefusedError(ConnectionError):
    """The other side opens no WebSocket; the message says what it did instead."""


class WebSocket:
    """A connected socket that wraps what passes through it into frames.

    Not blocking once ``setblocking(False)`` was called, and then used by one thread.

    Args:
        sock: The connection, TCP or TLS, the handshake of WebSocket done.
        received: What came after the answer to the handshake.
    """

    def __init__(self, sock: socket.socket, received: bytes = b"") -> None:
        self.raw = sock
        self._input = bytearray(received)
        self._ready = bytearray()
        self._payload_left = 0
        self._closed_by_peer = False
        self._output = b""
        self._output_holds = 0
        self._take_frames()

    @classmethod
    def connect(
        cls, sock: socket.socket, *, authority: str, path: str, timeout_s: float
    ) -> "WebSocket":
        """Ask for a WebSocket with the subprotocol ``mqtt``.

        Blocking; the socket is closed on failure.

        Args:
            sock: A connected socket, TCP or TLS.
            authority: Host and port, as in the URL.
            path: Path of the URL.
            timeout_s: Time limit for all of it, seconds.

        Raises:
            UpgradeRefusedError: It does not open one.
            OSError: The connection failed.
        """
        try:
            return cls(sock, _handshake(sock, authority, path, timeout_s))
        except BaseException:
            sock.close()
            raise

    def recv(self, size: int) -> bytes:
        """Return up to ``size`` bytes of payload; empty at the end of the stream.

        Raises:
            BlockingIOError: Nothing has come yet (``ssl.SSLWantReadError`` with TLS).
            ConnectionError: The other side broke the protocol.
        """
        while not self._ready:
            if self._closed_by_peer:
                return b""
            data = self.raw.recv(_CHUNK_BYTES)
            if not data:
                return b""
            self._input += data
            self._take_frames()
        taken = bytes(self._ready[:size])
        del self._ready[:size]
        return taken

    def send(self, data: bytes) -> int:
        """Send a frame that holds ``data``, or its first MiB, and return how much it holds.

        Raises:
            BlockingIOError: It has not left whole; the same data has to be given again
                (``ssl.SSLWantWriteError`` with TLS).
        """
        if not self._output_holds:
            piece = bytes(data[:_FRAME_BYTES])
            self._output += _frame(_BINARY, piece)
            self._output_holds = len(piece)
        self._flush()
        if self._output:
            raise BlockingIOError
        held, self._output_holds = self._output_holds, 0
        return held

    def pending(self) -> int:
        """Return how many bytes ``recv`` has without looking at the network."""
        below = getattr(self.raw, "pending", None)
        return len(self._ready) or (below() if below is not None else 0)

    def fileno(self) -> int:
        """Return the descriptor of the socket below."""
        return self.raw.fileno()

    def setblocking(self, flag: bool) -> None:
        """Set the mode of the socket below."""
        self.raw.setblocking(flag)

    def close(self) -> None:
        """Close the socket below; what ends the conversation is MQTT's DISCONNECT."""
        self.raw.close()

    def _flush(self) -> None:
        while self._output:
            sent = self.raw.send(self._output)
            self._output = self._output[sent:]

    def _take_frames(self) -> None:
        """Move payload from the input to what is ready, as far as it has come."""
        data = self._input
        while data:
            if self._payload_left:
                piece = data[: self._payload_left]
                self._ready += piece
                self._payload_left -= len(piece)
                del data[: len(piece)]
                continue
            header = _read_header(data)
            if header is None:
                return
            opcode, header_bytes, length = header
            if opcode in {_BINARY, _CONTINUATION}:
                del data[:header_bytes]
                self._payload_left = length
                continue
            if not opcode & _CONTROL:
                raise ConnectionAbortedError("the broker sent a WebSocket frame that is not binary")
            if len(data) < header_bytes + length:
                return
            body = bytes(data[header_bytes : header_bytes + length])
            del data[: header_bytes + length]
            self._take_control(opcode, body)

    def _take_control(self, opcode: int, body: bytes) -> None:
        if opcode == _CLOSE:
            self._closed_by_peer = True
        elif opcode == _PING and not self._output:  # the next one is answered as well
            self._output = _frame(_PING + 1, body)
            try:
                self._flush()
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return  # the rest leaves with the next frame


def _read_header(data: bytearray) -> tuple[int, int, int] | None:
    """Return opcode, length of the header and of the payload (RFC 6455 section 5.2)."""
    if len(data) < _SHORTEST_HEADER:
        return None
    if data[1] & _MASKED:
        raise ConnectionAbortedError("the broker masks its WebSocket frames")
    length, size = data[1] & 0x7F, _SHORTEST_HEADER
    if length >= _SHORT_LENGTHS:
        digits = 2 if length == _SHORT_LENGTHS else 8
        size += digits
        if len(data) < size:
            return None
        length = int.from_bytes(data[_SHORTEST_HEADER:size], "big")
    return data[0] & 0x0F, size, length


def _frame(opcode: int, payload: bytes) -> bytes:
    """Make a frame of a client: masked (RFC 6455 section 5.3)."""
    size = len(payload)
    if size < _SHORT_LENGTHS:
        head = bytes((_LAST | opcode, _MASKED | size))
    elif size < 1 << 16:
        head = bytes((_LAST | opcode, _MASKED | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((_LAST | opcode, _MASKED | 127)) + size.to_bytes(8, "big")
    key = os.urandom(4)
    mask = (key * (size // 4 + 1))[:size]
    # As one large number: linear, and no loop in Python.
    masked = int.from_bytes(payload, "little") ^ int.from_bytes(mask, "little")
    return head + key + masked.to_bytes(size, "little")


def _handshake(sock: socket.socket, authority: str, path: str, timeout_s: float) -> bytes:
    """Ask for the upgrade and check the answer; returns what came after it."""
    key = base64.b64encode(os.urandom(16))
    deadline = time.monotonic() + timeout_s
    request = (
        f"GET {path} HTTP/1.1\r\nHost: {authority}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key.decode()}\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
    )
    sock.settimeout(timeout_s)
    sock.sendall(request.encode("ascii"))
    answer = bytearray()
    while (end := answer.find(b"\r\n\r\n")) < 0:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or len(answer) > _HEAD_LIMIT_BYTES:
            raise UpgradeRefusedError("it never ends its answer to the WebSocket handshake")
        sock.settimeout(left_s)
        data = sock.recv(4096)
        if not data:
            _refuse_unfinished(bytes(answer))
        answer += data
        if answer[:5] != b"HTTP/"[: len(answer)]:
            _refuse_unfinished(bytes(answer))
    _check_answer(bytes(answer[:end]).decode("latin-1").split("\r\n"), key, path)
    return bytes(answer[end + 4 :])


def _refuse_unfinished(answer: bytes) -> None:
    if answer.startswith(b"HTTP/"):
        raise UpgradeRefusedError(
            "it hangs up in the middle of its answer to the WebSocket handshake"
        )
    if answer:
        raise UpgradeRefusedError(
            "the port speaks no WebSocket: is it one for mqtt:// or mqtts://?"
        )
    raise UpgradeRefusedError(
        "it hangs up instead of opening a WebSocket: is the port one for mqtt://, or does it want "
        "TLS (wss:// or mqtts://)?"
    )


def _check_answer(lines: list[str], key: bytes, path: str) -> None:
    status = lines[0].partition(" ")[2]
    code = status[:3]
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines[1:])
    }
    if code == "404":
        raise UpgradeRefusedError(f"there is no WebSocket at {path}: the usual path is /mqtt")
    if code != "101":
        raise UpgradeRefusedError(f"it opens no WebSocket at {path}: HTTP {status[:80]}")
    digest = hashlib.sha1(key + _ACCEPT_SUFFIX, usedforsecurity=False).digest()
    if headers.get("sec-websocket-accept") != base64.b64encode(digest).decode():
        raise UpgradeRefusedError("its answer to the WebSocket handshake is not to ours")
    if headers.get("sec-websocket-protocol", "mqtt") != "mqtt":
        raise UpgradeRefusedError("the WebSocket there speaks another protocol than mqtt")
