"""Frames between the agent and its children: a length and compact JSON.

A frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON, always an object with the
key ``t`` (its type). JSON and not a binary format because both ends have it in the standard
library and one frame costs about 5 microseconds, against 250 for a token of the smallest model.
"""

import json
import socket
import struct
import threading
from collections.abc import Mapping
from typing import Any, Final

Frame = dict[str, Any]

HEADER: Final = struct.Struct(">I")
FRAME_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""Largest frame either side accepts, bytes. Outputs have their own, smaller limit."""

_READ_BYTES: Final = 64 * 1024


class FrameError(Exception):
    """The byte stream is not a sequence of frames: the other side is broken, end it."""


class NotJsonError(ValueError):
    """A value that a function returned or yielded cannot be written as JSON."""


def _plain(value: Any) -> Any:
    """Turn what user code likes to return into JSON values, without importing its libraries.

    Arrays and scalars of numpy (and of everything that imitates it) offer ``tolist``; pydantic
    models offer ``model_dump``; sets become sorted lists where they sort.
    """
    for method in ("tolist", "model_dump", "isoformat"):
        convert = getattr(value, method, None)
        if callable(convert):
            return convert(mode="json") if method == "model_dump" else convert()
    fields = getattr(value, "__dataclass_fields__", None)
    if fields is not None and not isinstance(value, type):
        return {name: getattr(value, name) for name in fields}
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def to_json(value: Any) -> str:
    """Write a value as compact JSON.

    Raises:
        NotJsonError: It holds something JSON has no word for (an object, NaN, a circle).
    """
    try:
        return json.dumps(
            value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain
        )
    except (TypeError, ValueError, RecursionError) as exc:
        raise NotJsonError(str(exc)) from exc


def pack(frame: Mapping[str, Any]) -> bytes:
    """Return the bytes of one frame.

    Raises:
        NotJsonError: A value in it is not JSON.
        FrameError: It is longer than ``FRAME_LIMIT_BYTES``.
    """
    body = to_json(frame).encode("utf-8", errors="replace")
    if len(body) > FRAME_LIMIT_BYTES:
        raise FrameError(f"frame of {len(body)} bytes, the limit is {FRAME_LIMIT_BYTES}")
    return HEADER.pack(len(body)) + body


class FrameBuffer:
    """Cuts a byte stream into frames. Pure: no I/O."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Add bytes as they arrived and return the frames that are complete now.

        Raises:
            FrameError: A length is beyond the limit, or a body is not a JSON object with ``t``.
        """
        self._data += data
        frames: list[Frame] = []
        start = 0
        while len(self._data) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._data, start)
            if length > FRAME_LIMIT_BYTES:
                raise FrameError(f"frame of {length} bytes, the limit is {FRAME_LIMIT_BYTES}")
            end = start + HEADER.size + length
            if len(self._data) < end:
                break
            frames.append(_parse(self._data[start + HEADER.size : end]))
            start = end
        del self._data[:start]
        return frames


def _parse(body: bytearray) -> Frame:
    try:
        frame = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"frame is not JSON: {exc}") from exc
    if not isinstance(frame, dict) or "t" not in frame:
        raise FrameError("frame is not an object with a type")
    return frame


class FrameSocket:
    """The child's end of the socket pair: blocking, several writers, one reader.

    A full socket buffer makes ``send`` wait, which is the back-pressure that keeps a fast
    generator from filling the agent's memory.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = FrameBuffer()
        self._ready: list[Frame] = []
        self._lock = threading.Lock()

    def send(self, frame: Mapping[str, Any]) -> None:
        """Write one frame; any thread may call it.

        Raises:
            NotJsonError: The frame holds something that is not JSON; nothing was sent.
            OSError: The agent is gone.
        """
        data = pack(frame)
        with self._lock:
            self._socket.sendall(data)

    def receive(self) -> Frame | None:
        """Wait for the next frame; None once the agent has closed its end.

        Raises:
            FrameError: The agent's bytes are not frames.
        """
        while not self._ready:
            try:
                data = self._socket.recv(_READ_BYTES)
            except ConnectionError:
                return None
            if not data:
                return None
            self._ready = self._buffer.feed(data)
        return self._ready.pop(0)
