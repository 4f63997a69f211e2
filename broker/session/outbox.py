"""What has to be sent and was not confirmed yet. Pure: no I/O, no clock of its own.

QoS 1 messages stand in one queue until the broker confirms them. At most ``window`` of them are
under way; when a connection is lost, those return to the head of the queue in their old order and
are sent again, so a receiver may see them twice but never in another order than a repetition of
what it has seen (at least once, MQTT 3.1.1 section 4.3.2).
"""

from asyncio import Future
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from capability_schemas.errors import InvalidTopic, Overloaded

_TOPIC_LIMIT_BYTES: Final = 65_535  # MQTT 3.1.1 section 1.5.3
POISON_BYTES: Final = 64 * 1024
POISON_ATTEMPTS: Final = 3


@dataclass(eq=False, slots=True)
class Outgoing:
    """One message on its way out.

    Attributes:
        topic: Topic name.
        payload: Its bytes.
        qos: 0 or 1.
        retain: Whether the broker keeps it.
        birth: Whether it is re-made on every connection instead of repeated.
        waiter: Resolved when the broker confirms it, for a caller who waits.
        attempts: How often it was sent.
        sent_at: When it was sent last, by the loop's clock, seconds.
        withdrawn: Its caller gave up; it is not sent any more.
        settled: It left the outbox: confirmed, superseded or given up.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    birth: bool = False
    waiter: Future[None] | None = None
    attempts: int = field(default=0, init=False)
    sent_at: float = field(default=0.0, init=False)
    withdrawn: bool = field(default=False, init=False)
    settled: bool = field(default=False, init=False)


def check_topic(topic: str) -> None:
    """Refuse what no broker here carries as a topic name.

    Raises:
        InvalidTopic: It is empty, too long, holds a wildcard or NUL, or starts with ``$``
            (reserved by brokers, MQTT 3.1.1 section 4.7.2).
    """
    if (
        not topic
        or topic[0] == "$"
        or "+" in topic
        or "#" in topic
        or "\0" in topic
        or len(topic) > _TOPIC_LIMIT_BYTES
    ):
        raise InvalidTopic(
            f"{topic[:200]!r} is no topic to publish to: it must not be empty, start with $ or "
            "hold + or #",
            topic=topic[:200],
        )


class Outbox:
    """Bounded queue of QoS 1 messages, with a window of those under way.

    Full: ``add`` raises ``Overloaded``. Births are exempt, for there is one for each topic.

    Args:
        limit: Most messages kept, those under way included.
        window: Most messages under way.
    """

    def __init__(self, *, limit: int, window: int) -> None:
        self.window = window
        self._limit = limit
        self._queue: deque[Outgoing] = deque()
        self._under_way: dict[int, Outgoing] = {}
        self._withdrawn = 0  # of the queue

    def __len__(self) -> int:
        return len(self._queue) - self._withdrawn + len(self._under_way)

    @property
    def oldest_sent_at(self) -> float | None:
        """When the longest unconfirmed message under way was sent, by the loop's clock."""
        return next((item.sent_at for item in self._under_way.values()), None)

    def add(self, item: Outgoing) -> None:
        """Append a message.

        Raises:
            Overloaded: The limit is reached.
        """
        if not item.birth and len(self) >= self._limit:
            raise Overloaded(
                f"outbox holds {len(self)} unconfirmed messages, its limit: "
                "the broker is away or slower than the sender",
                limit=self._limit,
            )
        self._queue.append(item)

    def put_first(self, items: Iterable[Outgoing]) -> None:
        """Put births before everything else, dropping retained messages they supersede."""
        births = list(items)
        topics = {item.topic for item in births}
        self._queue = deque(
            item
            for item in self._queue
            if not (item.retain and item.waiter is None and item.topic in topics)
        )
        self._queue.extendleft(reversed(births))

    def take(self) -> Outgoing | None:
        """Remove and return the next message to send; ``None``: nothing, or the window is full."""
        while self._queue and len(self._under_way) < self.window:
            item = self._queue.popleft()
            if not item.withdrawn:
                return item
            self._withdrawn -= 1
        return None

    def sent(self, key: int, item: Outgoing, at: float) -> None:
        """Note that ``item`` is under way as packet ``key``."""
        item.attempts += 1
        item.sent_at = at
        self._under_way[key] = item

    def give_back(self, item: Outgoing) -> None:
        """Return a message that ``take`` gave but that could not be sent."""
        self._queue.appendleft(item)
        self._withdrawn += item.withdrawn

    def confirm(self, key: int) -> Outgoing | None:
        """Remove the message that packet ``key`` carried; ``None`` when unknown."""
        item = self._under_way.pop(key, None)
        if item is not None:
            item.settled = True
        return item

    def withdraw(self, item: Outgoing) -> None:
        """Give up on a message: it is not sent (again)."""
        if item.withdrawn or item.settled:
            return
        item.withdrawn = True
        if item not in self._under_way.values():
            self._withdrawn += 1

    def requeue(self) -> list[Outgoing]:
        """The connection is lost: everything under way goes back to the head, in order.

        Returns:
            Messages given up instead: large ones whose every sending ended with the loss of the
            connection. A broker that closes on an oversized packet (mosquitto does for MQTT
            3.1.1) would otherwise be offered it for ever.
        """
        poison = []
        back = []
        for item in self._under_way.values():
            if item.birth or item.withdrawn:
                continue
            if item.attempts >= POISON_ATTEMPTS and len(item.payload) > POISON_BYTES:
                item.settled = True
                poison.append(item)
            else:
                back.append(item)
        self._under_way.clear()
        self._queue = deque(item for item in self._queue if not item.birth)
        self._queue.extendleft(reversed(back))
        return poison

    def clear(self) -> list[Outgoing]:
        """Empty it and return what was unconfirmed."""
        left = [*self._under_way.values(), *self._queue]
        self._under_way.clear()
        self._queue.clear()
        self._withdrawn = 0
        for item in left:
            item.settled = True
        return [item for item in left if not item.withdrawn]
