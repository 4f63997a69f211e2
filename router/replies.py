"""What the router itself tells clients, and what it keeps to tell it again.

Everything goes out under the router's own last level. A final event made here is journaled first
and marked as told once the broker has it, so that a killed router tells it after all. Final
events and chunks of tasks that ended lately are kept in memory for ``resume`` and repeated ids.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Self

import structlog
from pydantic import BaseModel

from broker.replays import Replays
from broker.session.base import Session
from capability_schemas.errors import BrokerUnavailable, FoamError, Overloaded
from capability_schemas.reply import Chunk, ErrorEvent
from capability_schemas.wire import encode
from router.entry import Entry, pack_chunks, unpack_chunks
from router.ledger import Ledger

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Key = tuple[str, str]
_UNSAVED_LIMIT: Final = 10_000
_RECENT_LIMIT: Final = 10_000
_TELL_TIMEOUT_S: Final = 30.0
_REPLAY_LIMIT: Final = 8_192
_KEPT_BYTES: Final = 256 * 1024
"""Chunks of one task that are kept on disk; of a longer stream only the final event is."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended.

    Attributes:
        key: ``(client, task id)``.
        reply: Reply topic without its last level.
        seq: Number of the final event.
        attempt: Attempt it belongs to.
        terminal: The final event.
        code: Error code; None for a result.
        ended_at: UTC milliseconds.
        told: Whether the node has told the client.
        shown: Chunks with their numbers.
    """

    key: Key
    reply: str
    seq: int
    attempt: int
    terminal: bytes
    code: str | None
    ended_at: int
    told: bool
    shown: tuple[tuple[int, bytes], ...] = ()

    @classmethod
    def of(cls, entry: Entry) -> Self | None:
        """Return the outcome in a ledger entry; None while the task runs."""
        if entry.terminal is None:
            return None
        return cls(
            key=entry.key,
            reply=entry.reply,
            seq=entry.next_seq,
            # Not the entry's: a router ends a task as of an attempt that no node had.
            attempt=json.loads(entry.terminal).get("attempt", 1),
            terminal=entry.terminal,
            code=entry.code,
            ended_at=entry.ended_at or 0,
            told=True,
            shown=unpack_chunks(entry.chunks or b""),
        )

    @property
    def size_bytes(self) -> int:
        """What it takes to keep."""
        return len(self.terminal) + sum(len(payload) for _, payload in self.shown)

    def replay(self, from_seq: int) -> Iterator[bytes]:
        """Make the events from a number on, without gaps, one by one.

        A reader goes by the numbers, so chunks that are no longer kept are stood in for by empty
        ones: the whole answer is in the result. All are repeated as of the last attempt (`as_of`).

        Args:
            from_seq: First number wanted; beyond the end, the final event still comes.
        """
        kept = dict(self.shown)
        task, first = self.key[1], max(0, min(from_seq, self.seq))
        first = max(first, self.seq - _REPLAY_LIMIT)
        for seq in range(first, self.seq):
            chunk = Chunk(task=task, at=self.ended_at, seq=seq, attempt=self.attempt, data="")
            yield as_of(self.attempt, kept[seq]) if seq in kept else encode(chunk)
        yield self.terminal


def as_of(attempt: int, chunk: bytes) -> bytes:
    """Return a chunk as it is repeated: no reader passes it over for the attempt it was made by.

    A reader that missed who answers for the mesh hears a router like a node, and ignores a lower
    attempt than it has seen (PROTOCOL section 3).

    Args:
        attempt: The one that speaks now.
        chunk: The event as it was published.
    """
    event = json.loads(chunk) if attempt > 1 else {}
    if event.get("attempt", 1) >= attempt:
        return chunk
    return json.dumps({**event, "attempt": attempt}, separators=(",", ":")).encode()


class ReplyDesk:
    """Publishes the router's events and keeps outcomes. Owned by the router's event loop.

    Args:
        session: Connection to the mesh.
        ledger: Where outcomes are kept.
        router_id: Last level of the topics.
        recent_bytes: Most bytes of ended tasks kept in memory.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        ledger: Ledger,
        router_id: str,
        recent_bytes: int,
        clock: Callable[[], int],
    ) -> None:
        self._session = session
        self._replays = Replays(session=session)
        self._ledger = ledger
        self._router_id = router_id
        self._recent_limit = recent_bytes
        self._clock = clock
        self._recent: OrderedDict[Key, Outcome] = OrderedDict()
        self._recent_bytes = 0
        self._unsaved: OrderedDict[Key, Outcome] = OrderedDict()

    def say(self, reply: str, event: BaseModel) -> None:
        """Publish an event that informs; lost, and logged, when the outbox is full."""
        self.repeat(reply, [encode(event)])

    def refuse(self, reply: str, task_id: str, error: FoamError) -> None:
        """Publish the error that ends a task which was never accepted."""
        self.say(reply, ErrorEvent.from_error(error, task=task_id, at=self._clock()))

    def repeat(self, reply: str, payloads: Iterable[bytes]) -> None:
        """Publish events as they were, under the router's own level."""
        topic = f"{reply}/{self._router_id}"
        try:
            for payload in payloads:
                self._session.post(topic, payload)
        except FoamError as error:
            _log.warning("reply.dropped", topic=topic, error=error.message)

    def replay(self, key: Key, reply: str, payloads: Iterable[bytes]) -> None:
        """As `repeat`, for a client that has missed some: a little at a time (`Replays`)."""
        self._replays.begin(key, f"{reply}/{self._router_id}", iter(payloads))

    def stop(self) -> None:
        """Repeat nothing any more."""
        self._replays.stop()

    def recall(self, key: Key) -> Outcome | None:
        """Return the outcome of a task that ended lately."""
        return self._recent.get(key) or self._unsaved.get(key)

    def remember(self, outcome: Outcome) -> None:
        """Keep an outcome in memory, at the cost of the oldest."""
        self._recent[outcome.key] = outcome
        self._recent_bytes += outcome.size_bytes
        while self._recent and (
            self._recent_bytes > self._recent_limit or len(self._recent) > _RECENT_LIMIT
        ):
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= oldest.size_bytes

    async def conclude(self, outcome: Outcome) -> None:
        """Journal an outcome and, where the node has not told the client, tell it.

        Cancellation leaves it to the next start of the router to tell it.
        """
        await self._save(outcome)
        if not outcome.told:
            await self.tell(outcome.key, outcome.reply, outcome.terminal)

    async def tell(self, key: Key, reply: str, terminal: bytes) -> None:
        """Publish a final event until the broker has it."""
        topic = f"{reply}/{self._router_id}"
        while True:
            try:
                await self._session.publish(topic, terminal, timeout_s=_TELL_TIMEOUT_S)
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_ms / 1000)
            except BrokerUnavailable as error:
                _log.warning("reply.waits", topic=topic, error=error.message)
                await self._session.wait_connected()
            except FoamError as error:  # refused for good: another try would end alike
                _log.error("reply.refused", topic=topic, error=error.message)
                self._ledger.note_told(key)
                return
            else:
                self._ledger.note_told(key)
                return

    async def save_again(self) -> None:
        """Try once more to journal what a full or locked disk refused."""
        for key, outcome in list(self._unsaved.items()):
            del self._unsaved[key]
            await self._save(outcome)
            if key in self._unsaved:
                return

    async def _save(self, outcome: Outcome) -> None:
        chunks = pack_chunks(outcome.shown) if outcome.size_bytes <= _KEPT_BYTES else None
        try:
            await self._ledger.conclude(
                outcome.key,
                terminal=outcome.terminal,
                seq=outcome.seq,
                chunks=chunks or None,
                code=outcome.code,
                ended_at=outcome.ended_at,
                told=outcome.told,
            )
        except FoamError as error:
            self._unsaved[outcome.key] = outcome
            if len(self._unsaved) > _UNSAVED_LIMIT:
                self._unsaved.popitem(last=False)
            _log.warning("outcome.unsaved", task=outcome.key[1], error=error.message)
