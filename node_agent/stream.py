"""The reply stream of one invocation: numbering, coalescing, limits, keep-alive."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import structlog

from capability_schemas.errors import Overloaded, TooLarge
from capability_schemas.invocation import Report
from capability_schemas.reply import Chunk, ErrorEvent, Result, Step, Working
from capability_schemas.wire import encode
from node_agent.runtimes.base import Progress
from node_agent.worker.frames import to_json

_RETRY_S: Final = 0.1
"""Pause before another try when the session's outbox is full, seconds."""

Post = Callable[[str, bytes], None]
"""Publishes without waiting; raises ``Overloaded`` when there is no room."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ReplyStream:
    """Writes the events of one invocation; owned by the event loop it was made on.

    The first piece is sent at once, later text is gathered for ``coalesce_s``. Numbers are given
    when an event is handed to the session, so there is never a gap. Chunks are credited: while the
    session holds more than enough that the broker has not taken (``crowded``), none is handed to
    it, and whoever makes the pieces waits in `room`. Terminal events and reports need no credit.

    Args:
        topic: Reply topic, source level included; its last level is the node. Kept.
        task: The task.
        attempt: Its attempt.
        seq: First number to use.
        chunks: Whether the client wants chunks.
        held: Whether no piece may be shown before it is known what the whole answer is worth.
        post: Where events go.
        crowded: Whether chunks have to wait.
        clock: UTC milliseconds.
        coalesce_s: Gathering time, seconds.
        working_s: Silence after which a ``working`` event is sent, seconds.
        chunk_limit_bytes: Largest text of one chunk.
        output_limit_bytes: Largest sum of all pieces.
        shown_bytes: What others have sent of it already.
    """

    def __init__(
        self,
        *,
        topic: str,
        task: str,
        attempt: int,
        seq: int,
        chunks: bool,
        held: bool = False,
        post: Post,
        crowded: Callable[[], bool] = lambda: False,
        clock: Callable[[], int],
        coalesce_s: float = 0.03,
        working_s: float = 15.0,
        chunk_limit_bytes: int = 64 * 1024,
        output_limit_bytes: int = 1024 * 1024,
        shown_bytes: int = 0,
    ) -> None:
        self.topic = topic
        self._node = topic.rpartition("/")[2]
        self._task = task
        self._attempt = attempt
        self._chunks = chunks
        self._held = held
        self._post = post
        self._crowded = crowded
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._clock = clock
        self._coalesce_s = coalesce_s
        self._working_s = working_s
        self._chunk_limit_bytes = chunk_limit_bytes
        self._output_limit_bytes = output_limit_bytes
        self._pending: list[Any] = []
        self._size_bytes = shown_bytes
        self._timer: asyncio.TimerHandle | None = None
        self._working: asyncio.TimerHandle | None = None
        self._closed = False
        self._silent = False
        self.seq = self._first = seq
        self.sent = 0

    @property
    def blank(self) -> bool:
        """Whether the client has been shown nothing of the answer."""
        return self.seq == self._first

    def open(self) -> None:
        """Begin the keep-alive."""
        self._arm_working()

    def add(self, data: Any) -> None:
        """Take a piece: text is joined with its neighbours, any other JSON is a chunk of its own.

        Raises:
            TooLarge: The pieces exceed the output limit together.
        """
        is_text = isinstance(data, str)
        self._size_bytes += len(data.encode()) if is_text else len(to_json(data))
        if self._size_bytes > self._output_limit_bytes:
            raise TooLarge(
                "output", size_bytes=self._size_bytes, limit_bytes=self._output_limit_bytes
            )
        if not self._chunks or self._held or (is_text and not data):
            return
        if is_text and self._pending and isinstance(self._pending[-1], list):
            self._pending[-1].append(data)
        else:
            # Text under way is a list of its parts, JSON stands in a tuple of one.
            self._pending.append([data] if is_text else (data,))
        if self.sent == 0 or not is_text:
            self.flush()
        elif self._timer is None:
            self._arm(self._coalesce_s)

    async def room(self) -> None:
        """Wait until the next piece may be made; returns at once while the broker keeps up.

        Cancellation is safe.
        """
        await self._flowing.wait()

    def show(self, progress: Progress) -> None:
        """Send a step on the way to the answer, after what was said before it; it has no number."""
        self.flush()
        if self._closed or not self._chunks:
            return
        event = Step(
            task=self._task,
            at=self._clock(),
            step=progress.step,
            state=progress.state,
            node=self._node,
            detail=progress.detail,
        )
        try:
            self._post(self.topic, encode(event))
        except Overloaded:
            _log.debug("reply.step_skipped", task=self._task)
        self._arm_working()

    def flush(self, *, last: bool = False) -> bool:
        """Send what has gathered.

        Args:
            last: Whether the end comes next: then it needs no credit.

        Returns:
            Whether all of it went out; what did not is tried again soon.
        """
        self._disarm()
        while self._pending and not self._closed:
            item = self._pending[0]
            if self._crowded() and not last:
                self._flowing.clear()
                self._arm(_RETRY_S)
                return False
            try:
                if isinstance(item, tuple):
                    self._send_chunk(item[0])
                else:
                    self._send_text(item)
            except Overloaded:
                self._flowing.clear()
                self._arm(_RETRY_S)
                return False
            self._pending.pop(0)
        self._flowing.set()
        return True

    async def end(
        self,
        make: Callable[[int, int], Result | ErrorEvent | Report],
        *,
        limit_s: float,
        instead: str | None = None,
    ) -> bytes | None:
        """Send the rest and the last word: the terminal event, or a report in its place.

        Args:
            make: Makes it from the next free number and the time.
            limit_s: Longest wait for room in the session, seconds.
            instead: Topic of a report, which takes no number; None for a terminal event.

        Returns:
            Its payload; None when there was no room in all that time, or it was silenced.
            Cancellation leaves the stream without its end.
        """
        try:
            async with asyncio.timeout(limit_s):
                while not self._silent:
                    if self.flush(last=True):
                        payload = encode(make(self.seq, self._clock()))
                        try:
                            self._post(instead or self.topic, payload)
                        except Overloaded:
                            pass
                        else:
                            self.seq += int(instead is None)
                            return payload
                    await asyncio.sleep(_RETRY_S)
                return None
        except TimeoutError:
            _log.error("reply.no_room", task=self._task, limit_s=limit_s)
            return None
        finally:
            self.drop()

    def silence(self) -> None:
        """Send nothing any more, the terminal event included: another attempt has the word."""
        self._silent = True
        self.drop()

    def drop(self) -> None:
        """End without a further word; what has not been sent is forgotten."""
        self._closed = True
        self._pending.clear()
        self._flowing.set()
        self._disarm()
        if self._working is not None:
            self._working.cancel()

    def _send_text(self, parts: list[str]) -> None:
        text = "".join(parts)
        if len(text.encode()) <= self._chunk_limit_bytes:
            self._send_chunk(text)
            return
        step = self._chunk_limit_bytes // 4  # characters: UTF-8 takes at most four bytes for one
        pieces = [text[at : at + step] for at in range(0, len(text), step)]
        while pieces:
            parts[:] = pieces  # what is left should the session run out of room here
            self._send_chunk(pieces.pop(0))

    def _send_chunk(self, data: Any) -> None:
        chunk = Chunk(
            task=self._task, at=self._clock(), seq=self.seq, attempt=self._attempt, data=data
        )
        self._emit(encode(chunk))
        self.seq += 1

    def _emit(self, payload: bytes) -> None:
        self._post(self.topic, payload)
        self.sent += 1
        self._arm_working()

    def _arm(self, delay_s: float) -> None:
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.flush)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm_working(self) -> None:
        if self._working is not None:
            self._working.cancel()
        if not self._closed:
            self._working = asyncio.get_running_loop().call_later(
                self._working_s, self._say_working
            )

    def _say_working(self) -> None:
        event = Working(task=self._task, at=self._clock(), attempt=self._attempt)
        try:
            self._post(self.topic, encode(event))
        except Overloaded:
            _log.debug("reply.working_skipped", task=self._task)
        self._arm_working()
