"""Writes ``catalog/…`` and the registry's events; nothing else in the mesh writes there."""

from collections.abc import Callable
from typing import Any

import structlog

from broker.events import EventSource
from broker.session.base import Session
from capability_schemas.errors import BrokerUnavailable, Overloaded
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from registry.admission import Key
from registry.catalog import Catalog
from registry.leadership import Lead

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class CatalogPublisher:
    """Keeps the retained catalogue on the broker equal to the one in memory.

    Args:
        session: connection of the registry.
        topics: the site's topics.
        catalog: what is current; read at the moment a record is sent.
        registry_id: source of the events.
        clock: UTC milliseconds.
        lead: whether this registry leads; it writes nothing when it does not.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        catalog: Catalog,
        registry_id: str,
        clock: Callable[[], int],
        lead: Lead,
    ) -> None:
        self._session = session
        self._topics = topics
        self._catalog = catalog
        self._id = registry_id
        self._events = EventSource(
            session=session, topics=topics, source=registry_id, component="registry", clock=clock
        )
        self._lead = lead
        self._to_clear: set[Key] = set()
        self._wrote: dict[Key, int] = {}

    def announce(self, key: Key) -> None:
        """Publish the record of a key now and on every connection, as long as this one leads."""

        def payload() -> bytes | None:
            record = self._catalog.record(key) if self._lead.leads else None
            if record is None:
                return None
            made = encode(record)
            self._wrote[key] = hash(made)
            return made

        self._to_clear.discard(key)
        self._session.announce(self._topic(key), payload)

    def announce_all(self) -> None:
        """Publish every record: the broker may have forgotten them, or keep another one's."""
        for record in tuple(self._catalog.records()):
            self.announce(record.key)

    def wrote(self, key: Key, payload: bytes) -> bool:
        """Tell whether a payload is what was published last under a key."""
        return self._wrote.get(key) == hash(payload)

    def clear(self, key: Key) -> None:
        """Take a retained record off the broker; ``retry`` repeats it when there is no room.

        One who does not lead leaves it to the leader.
        """
        topic = self._topic(key)
        self._session.retract(topic)
        self._wrote.pop(key, None)
        if not self._lead.leads:
            return
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

    def _topic(self, key: Key) -> str:
        return self._topics.build(TopicKind.CATALOG, node=key[0], function=key[1])
