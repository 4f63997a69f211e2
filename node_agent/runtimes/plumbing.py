"""What joins the agent to a child process: frames in both directions, and its output."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from node_agent.worker.frames import Frame, FrameBuffer, FrameError, pack, to_json

SURPLUS_LIMIT_CHARS: Final = 16 * 1024 * 1024
"""What may gather for a call that is full, for the sake of its neighbours; then it has failed."""

_FULL_FRAMES: Final = 256
"""Unread frames of one call at which the child's socket is left alone (its writes then wait), as
long as no other call needs what is in it."""

_TAIL_LINES: Final = 5


class FrameProtocol(asyncio.Protocol):
    """The agent's end of the socket pair, on the event loop.

    Args:
        on_frame: Gets every frame.
        on_end: Told once the socket is closed, with the problem when the bytes were no frames.
    """

    def __init__(self, on_frame: Callable[[Frame], None], on_end: Callable[[str], None]) -> None:
        self._on_frame = on_frame
        self._on_end = on_end
        self._buffer = FrameBuffer()
        self._transport: asyncio.Transport | None = None
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Cut the bytes into frames; a stream that is none ends the instance."""
        try:
            frames = self._buffer.feed(data)
        except FrameError as exc:
            self._on_end(str(exc))
            return
        for frame in frames:
            self._on_frame(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end."""
        self._transport = None
        self.closed.set()
        self._on_end("")

    def send(self, frame: Frame) -> None:
        """Write a frame; nothing once the child is gone, for its end is reported anyway."""
        if self._transport is not None:
            self._transport.write(pack(frame))

    def pause(self, *, paused: bool) -> None:
        """Stop or resume reading."""
        if self._transport is None:
            return
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def close(self) -> None:
        """Close the socket: the child takes it as the order to end at once."""
        if self._transport is not None:
            self._transport.close()


class CallFrames:
    """Frames of one call on their way to whoever iterates it.

    Attributes:
        arrived: Set when there is a frame.
        ended: Set when the call has left the child.
        waits: Whether its reader waits for the next frame.
        abandoned: Whether nobody wants further frames.
        surplus_chars: Size of what came while it was full.
        kill_timer: Ends the child, for it was asked to end the call.
    """

    def __init__(self) -> None:
        self.frames: deque[Frame] = deque()
        self.arrived = asyncio.Event()
        self.ended = asyncio.Event()
        self.waits = False
        self.abandoned = False
        self.surplus_chars = 0
        self.kill_timer: asyncio.TimerHandle | None = None

    @property
    def is_full(self) -> bool:
        """Whether the child should wait for the reader."""
        return len(self.frames) >= _FULL_FRAMES

    @property
    def is_half_full(self) -> bool:
        """Whether the child should go on waiting."""
        return len(self.frames) >= _FULL_FRAMES // 2

    @property
    def needs_frames(self) -> bool:
        """Whether somebody waits for its next frame, or for its end."""
        return self.waits or self.kill_timer is not None

    def put(self, frame: Frame) -> None:
        """Add a frame."""
        self.waits = False
        if self.is_full:
            piece = frame.get("d")
            self.surplus_chars += len(piece if isinstance(piece, str) else to_json(frame))
        self.frames.append(frame)
        self.arrived.set()

    def take(self) -> Frame:
        """Return the next frame."""
        if not self.is_full:
            self.surplus_chars = 0
        return self.frames.popleft()


class LogTap:
    """Turns a stream of a child into log lines, with a bound on their length and number.

    Args:
        log: Where the lines go.
        stream: ``stdout`` or ``stderr``.
        line_limit: Longest line, characters; the rest is cut off.
        window_limit: Lines a second; further ones are counted and dropped.
    """

    def __init__(
        self,
        log: structlog.stdlib.BoundLogger,
        *,
        stream: str,
        line_limit: int = 2000,
        window_limit: int = 100,
    ) -> None:
        self._log = log
        self._stream = stream
        self._line_limit = line_limit
        self._window_limit = window_limit
        self._window = 0
        self._count = 0
        self._dropped = 0
        self._rest = b""
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def feed(self, data: bytes, *, now_s: float) -> None:
        """Take what the child wrote."""
        block, newline, self._rest = (self._rest + data).rpartition(b"\n")
        if newline:
            self._take(block, now_s)
        if len(self._rest) > self._line_limit:
            self._take(self._rest, now_s)
            self._rest = b""

    def end(self, *, now_s: float) -> None:
        """Write the last, unfinished line and how many were dropped."""
        self._take(self._rest, now_s)
        self._rest = b""
        self._say_dropped()

    def _take(self, block: bytes, now_s: float) -> None:
        """Log lines; those beyond the limit are counted, but for the last not even looked at."""
        if int(now_s) != self._window:
            self._window, self._count = int(now_s), 0
            self._say_dropped()
        room = self._window_limit - self._count
        lines = block.split(b"\n", room)
        surplus = b"".join(lines[room:]).rstrip()
        for text in filter(None, map(self._text, lines[:room])):
            self.tail.append(text)
            self._count += 1
            self._log.info("instance.output", stream=self._stream, line=text)
        if surplus:
            self._dropped += surplus.count(b"\n") + 1
            last = surplus.rsplit(b"\n", _TAIL_LINES)[-_TAIL_LINES:]
            self.tail.extend(filter(None, map(self._text, last)))

    def _text(self, line: bytes) -> str:
        # A character takes four bytes at most; a cut one at the end is worth no more than a mark.
        start = line[: 4 * self._line_limit]
        return start.decode("utf-8", errors="replace").rstrip()[: self._line_limit]

    def _say_dropped(self) -> None:
        if self._dropped:
            self._log.warning("instance.output_dropped", stream=self._stream, lines=self._dropped)
            self._dropped = 0
