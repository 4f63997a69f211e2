"""Messages that are made anew for every connection."""

from collections.abc import Iterable, Iterator

import structlog

from broker.session.base import PayloadFactory, SessionStats
from broker.session.outbox import Outgoing

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class BirthBook:
    """The retained messages a session announces itself with, one for each topic.

    Args:
        stats: Counters of the session.
    """

    def __init__(self, *, stats: SessionStats) -> None:
        self._stats = stats
        self._factories: dict[str, PayloadFactory] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._factories))

    def enter(self, topic: str, factory: PayloadFactory) -> None:
        """Enter a birth or replace it."""
        self._factories[topic] = factory

    def remove(self, topic: str) -> None:
        """Take a birth out; unknown topics are ignored."""
        self._factories.pop(topic, None)

    def make(self, topics: Iterable[str]) -> list[Outgoing]:
        """Make the births of some topics; one whose factory fails is logged and left out."""
        made = []
        for topic in topics:
            try:
                payload = self._factories[topic]()
            except Exception as error:  # noqa: BLE001  # supervision boundary: not our code
                self._stats.handler_errors += 1
                _log.error("session.birth_failed", topic=topic, exc_info=error)
                continue
            if payload is not None:
                made.append(Outgoing(topic, payload, 1, retain=True, birth=True))
        return made
