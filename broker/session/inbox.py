"""Where arrived messages go: from a topic to the handlers that asked for it."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

import structlog

from broker.session.base import Message, SessionStats, Subscription
from capability_schemas.topics import matches

_ROUTE_CACHE_LIMIT: Final = 4096
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Lane:
    """One subscription with its queue and its one worker.

    Args:
        subscription: Whose messages these are.
        stats: Counters of the session.
    """

    def __init__(self, subscription: Subscription, stats: SessionStats) -> None:
        self.subscription = subscription
        self.task: asyncio.Task[None] | None = None
        self.closed = False
        self.busy = False
        self._stats = stats
        self._queue: asyncio.Queue[Message] = asyncio.Queue(subscription.queue_limit)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and the handler is not at work."""
        return not self.busy and self._queue.empty()

    def put(self, message: Message) -> None:
        """Queue a message; drop it when the queue is full."""
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self._drop(message)

    async def run(self) -> None:
        """Hand queued messages to the handler, one at a time, until closed."""
        subscription = self.subscription
        while not self.closed:
            message = await self._queue.get()
            self.busy = True
            try:
                await subscription.handler(message)
            except Exception as error:  # noqa: BLE001  # supervision boundary: handlers are not ours
                subscription.errors += 1
                self._stats.handler_errors += 1
                _log.error(
                    "session.handler_failed",
                    topic=message.topic,
                    topic_filter=subscription.topic_filter,
                    exc_info=error,
                )
            finally:
                self.busy = False

    def close(self) -> None:
        """End the worker; a handler that is at work and closes its own lane may finish."""
        self.closed = True
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()

    def _drop(self, message: Message) -> None:
        subscription = self.subscription
        subscription.dropped += 1
        self._stats.overflowed += 1
        if subscription.dropped & (subscription.dropped - 1) == 0:  # at 1, 2, 4, 8 ...
            _log.warning(
                "session.queue_full",
                topic_filter=subscription.topic_filter,
                limit=subscription.queue_limit,
                dropped=subscription.dropped,
            )
        if subscription.on_overflow is not None:
            try:
                subscription.on_overflow(message)
            except Exception as error:  # noqa: BLE001  # supervision boundary, as for handlers
                self._stats.handler_errors += 1
                _log.error("session.overflow_callback_failed", exc_info=error)


Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]


class SubscriptionTable:
    """All subscriptions of a session, and the way from a topic to their lanes.

    Args:
        stats: Counters of the session.
    """

    def __init__(self, *, stats: SessionStats) -> None:
        self._stats = stats
        self._lanes: dict[Subscription, Lane] = {}
        self._routes: dict[str, tuple[Lane, ...]] = {}
        self._spawn: Spawn | None = None

    def __contains__(self, subscription: Subscription) -> bool:
        return subscription in self._lanes

    def __iter__(self) -> Iterator[Lane]:
        return iter(tuple(self._lanes.values()))

    def open(self, spawn: Spawn) -> None:
        """Start the workers: of the lanes there are and of those to come."""
        self._spawn = spawn
        for lane in self:
            self._start(lane)

    def add(self, subscription: Subscription) -> None:
        """Enter a subscription."""
        lane = self._lanes[subscription] = Lane(subscription, self._stats)
        self._routes.clear()
        self._start(lane)

    def remove(self, subscription: Subscription) -> bool:
        """Take a subscription out.

        Returns:
            Whether it was the last one with its filter.
        """
        lane = self._lanes.pop(subscription, None)
        if lane is None:
            return False
        lane.close()
        self._routes.clear()
        return subscription.topic_filter not in self.filters()

    def filters(self) -> dict[str, int]:
        """Return each filter with the highest quality of service asked for it."""
        found: dict[str, int] = {}
        for subscription in self._lanes:
            qos = found.get(subscription.topic_filter, 0)
            found[subscription.topic_filter] = max(qos, subscription.qos)
        return found

    def deliver(self, message: Message) -> None:
        """Queue a message in every lane whose filter matches."""
        lanes = self._routes.get(message.topic)
        if lanes is None:
            lanes = self._find(message.topic)
        if not lanes:
            self._stats.unmatched += 1
        for lane in lanes:
            lane.put(message)

    def _find(self, topic: str) -> tuple[Lane, ...]:
        if len(self._routes) >= _ROUTE_CACHE_LIMIT:
            self._routes.clear()
        lanes = tuple(
            lane
            for subscription, lane in self._lanes.items()
            if matches(subscription.topic_filter, topic)
        )
        self._routes[topic] = lanes
        return lanes

    def _start(self, lane: Lane) -> None:
        if self._spawn is not None:
            lane.task = self._spawn(lane.run(), f"handle {lane.subscription.topic_filter}")
