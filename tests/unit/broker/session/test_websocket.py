"""The client's side of WebSocket: handshakes that fail say why, and frames may come in any cut."""

import base64
import contextlib
import hashlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.session.websocket import UpgradeRefusedError, WebSocket

SUFFIX = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
Answer = Callable[[bytes], bytes]


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def _read_request(there: socket.socket) -> bytes:
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        request += there.recv(4096)
    return request


def _accept(request: bytes) -> bytes:
    key = request.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
    digest = base64.b64encode(hashlib.sha1(key + SUFFIX, usedforsecurity=False).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + digest + b"\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
    )


def _connect(answer: Answer, *, timeout_s: float = 20.0) -> tuple[WebSocket, bytes]:
    """Shake hands with a server that answers so; returns our side and its request."""
    requests: list[bytes] = []
    here, there = socket.socketpair()

    def serve() -> None:
        with there:
            requests.append(_read_request(there))
            there.sendall(answer(requests[0]))

    server = threading.Thread(target=serve)
    server.start()
    try:
        made = WebSocket.connect(here, authority="[::1]:99", path="/mqtt", timeout_s=timeout_s)
    finally:
        server.join(20)
    return made, requests[0]


def test_the_request_asks_for_mqtt() -> None:
    made, request = _connect(lambda asked: _accept(asked) + b"\x82\x02\x20\x00")
    lines = request.decode().split("\r\n")
    assert lines[0] == "GET /mqtt HTTP/1.1"
    assert {"Host: [::1]:99", "Sec-WebSocket-Protocol: mqtt", "Sec-WebSocket-Version: 13"} <= {
        *lines
    }
    assert not any(line.startswith("Origin") for line in lines)  # it is no page
    assert made.pending() == 2  # came with the answer
    assert made.recv(10) == b"\x20\x00"
    assert made.recv(10) == b""
    made.close()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda _: b"", "hangs up instead of opening a WebSocket"),
        (lambda _: b"\x20\x02\x00\x05", "speaks no WebSocket"),
        (lambda _: b"HTTP/1.1 101 Switch", "in the middle of its answer"),
        (lambda _: b"HTTP/1.1 404 Not Found\r\n\r\n", "usual path is /mqtt"),
        (lambda _: b"HTTP/1.1 403 Forbidden\r\n\r\n", "HTTP 403 Forbidden"),
        (lambda _: b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000, "never ends its answer"),
        (lambda asked: _accept(asked.replace(b"Key: ", b"Key: x")), "not to ours"),
        (lambda asked: _accept(asked).replace(b"mqtt", b"amqp"), "another protocol"),
    ],
)
def test_a_handshake_that_fails_says_why(answer: Answer, sentence: str) -> None:
    with pytest.raises(UpgradeRefusedError, match=sentence):
        _connect(answer)


def test_the_time_limit_is_for_the_whole_handshake() -> None:
    """And not from one byte to the next."""
    with pair() as (here, there):
        stop = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                there.sendall(b"HTTP/1.1 101 ")
                while not stop.wait(0.05):
                    there.sendall(b"x")

        server = threading.Thread(target=drip)
        server.start()
        try:
            with pytest.raises((UpgradeRefusedError, TimeoutError)):
                WebSocket.connect(here, authority="h:1", path="/mqtt", timeout_s=0.5)
        finally:
            stop.set()
            server.join(20)
        assert here.fileno() == -1


def _server_frame(payload: bytes, opcode: int = 0x82) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes((opcode, size)) + payload
    if size < 1 << 16:
        return bytes((opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((opcode, 127)) + size.to_bytes(8, "big") + payload


@given(st.lists(st.binary(max_size=70_000), max_size=4), st.integers(1, 4000))
def test_frames_survive_any_cut(payloads: list[bytes], step: int) -> None:
    stream = b"".join(map(_server_frame, payloads)) + _server_frame(b"late", 0x8A)
    with pair() as (here, there):
        made = WebSocket(here)
        made.setblocking(False)
        got = b""
        for start in range(0, len(stream), step):
            there.sendall(stream[start : start + step])
            with contextlib.suppress(BlockingIOError):
                while True:
                    got += made.recv(1000)
        assert got == b"".join(payloads)
        assert made.pending() == 0


def test_what_is_no_frame_of_a_broker_ends_the_connection() -> None:
    for bad in (b"\x81\x01x", b"\x82\x81\0\0\0\0x"):
        with pair() as (here, there):
            made = WebSocket(here)
            there.sendall(bad)
            with pytest.raises(ConnectionAbortedError):
                made.recv(10)


def _unmask(data: bytes) -> tuple[int, bytes, bytes]:
    """Take the first frame of a client apart: opcode, payload, the rest."""
    assert data[1] & 0x80, "clients mask"
    size, start = data[1] & 0x7F, 2
    if size >= 126:
        digits = 2 if size == 126 else 8
        size, start = int.from_bytes(data[2 : 2 + digits], "big"), 2 + digits
    key, body = data[start : start + 4], data[start + 4 : start + 4 + size]
    plain = bytes(byte ^ key[index % 4] for index, byte in enumerate(body))
    return data[0] & 0x0F, plain, data[start + 4 + size :]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 200_000])
def test_what_is_sent_is_masked_and_whole(size: int) -> None:
    payload = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    with pair() as (here, there):
        made = WebSocket(here)
        got = bytearray()

        def read() -> None:
            while data := there.recv(65_536):
                got.extend(data)

        reader = threading.Thread(target=read)
        reader.start()
        assert made.send(payload) == size
        made.close()
        reader.join(20)
        assert _unmask(bytes(got)) == (2, payload, b"")


def test_a_full_socket_asks_for_the_same_data_again() -> None:
    payload = bytes(3_000_000)
    with pair() as (here, there):
        made = WebSocket(here)
        made.setblocking(False)
        there.setblocking(False)
        sent, got = 0, b""
        while sent < len(payload):
            with contextlib.suppress(BlockingIOError):
                sent += made.send(payload[sent:])
            with contextlib.suppress(BlockingIOError):
                got += there.recv(1_000_000)
        with contextlib.suppress(BlockingIOError):
            while True:
                got += there.recv(1_000_000)
        plain = b""
        while got:
            opcode, piece, got = _unmask(got)
            assert opcode == 2
            plain += piece
        assert plain == payload


def test_pings_are_answered_and_a_goodbye_ends_the_stream() -> None:
    with pair() as (here, there):
        made = WebSocket(here)
        there.sendall(_server_frame(b"are you there", 0x89) + _server_frame(b"\x03\xe8", 0x88))
        assert made.recv(10) == b""
        assert _unmask(there.recv(1000)) == (10, b"are you there", b"")
