"""Writes ``catalog/…`` and the registry's events; nothing else in the mesh writes there."""

from collections.abc import Callable, Container
from typing import Any, Final

import structlog

from broker.events import EventSource
from broker.session.base import Message, Session, Subscription
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    InvalidTopic,
    Overloaded,
)
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from registry.admission import Key
from registry.catalog import Catalog

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_CATALOG_QUEUE: Final = 20_000


class CatalogPublisher:
    """Keeps the retained catalogue on the broker equal to the one in memory.

    Args:
        session: connection of the registry.
        topics: the site's topics.
        catalog: what is current; read at the moment a record is sent.
        registry_id: source of the events.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        catalog: Catalog,
        registry_id: str,
        clock: Callable[[], int],
    ) -> None:
        self._session = session
        self._topics = topics
        self._catalog = catalog
        self._id = registry_id
        self._events = EventSource(
            session=session, topics=topics, source=registry_id, component="registry", clock=clock
        )
        self._to_clear: set[Key] = set()
        self._seen: set[Key] = set()
        self._watching: Subscription | None = None

    def announce(self, key: Key) -> None:
        """Publish the record of a key now and on every connection."""

        def payload() -> bytes | None:
            record = self._catalog.record(key)
            return None if record is None else encode(record)

        self._to_clear.discard(key)
        self._session.announce(self._topic(key), payload)

    def clear(self, key: Key) -> None:
        """Take a retained record off the broker; ``retry`` repeats it when there is no room."""
        topic = self._topic(key)
        self._session.retract(topic)
        try:
            self._session.post(topic, b"", retain=True)
        except (Overloaded, BrokerUnavailable) as exc:
            self._to_clear.add(key)
            _log.warning("registry.clear_delayed", topic=topic, error=exc.message)
        else:
            self._to_clear.discard(key)

    def retry(self) -> None:
        """Clear what could not be cleared before."""
        for key in tuple(self._to_clear):
            self.clear(key)

    def emit(self, kind: str, key: Key, data: dict[str, Any]) -> None:
        """Publish a CloudEvent about a capability; lost, with a log line, when there is no room.

        Args:
            kind: last level of the topic, an identifier.
            key: what it is about.
            data: JSON fields.
        """
        self._events.emit(
            kind,
            {"node": key[0], "function": key[1], **data},
            subject=f"capability/{key[0]}/{key[1]}",
        )

    async def watch(self) -> None:
        """Look at the catalogue as the broker kept it, for ``clear_ghosts``."""
        try:
            self._watching = await self._session.subscribe(
                self._topics.filter(TopicKind.CATALOG), self._note, queue_limit=_CATALOG_QUEUE
            )
        except AccessDenied as exc:
            _log.warning("registry.ghosts_unseen", registry=self._id, error=exc.message)

    async def clear_ghosts(self, *, spare: Container[Key]) -> int:
        """Clear what the broker kept of a catalogue that is no longer true, once.

        Args:
            spare: keys that are about to be admitted.

        Returns:
            How many were cleared.
        """
        if self._watching is not None:
            await self._session.unsubscribe(self._watching)
            self._watching = None
        ghosts = [key for key in self._seen if key not in self._catalog and key not in spare]
        self._seen.clear()
        for key in sorted(ghosts):
            _log.info("registry.ghost_cleared", node=key[0], function=key[1])
            self.clear(key)
        return len(ghosts)

    async def _note(self, message: Message) -> None:
        if not (message.retain and message.payload):
            return
        try:
            levels = self._topics.parse(message.topic).levels
        except InvalidTopic as exc:
            _log.warning("registry.bad_topic", error=exc.message)
            return
        self._seen.add((levels["node"], levels["function"]))

    def _topic(self, key: Key) -> str:
        return self._topics.build(TopicKind.CATALOG, node=key[0], function=key[1])
