"""CloudEvents that components publish about themselves on ``event/{source}/{kind}``."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from capability_schemas.admin import CloudEvent
from capability_schemas.errors import BrokerUnavailable, Overloaded
from capability_schemas.ids import new_uuid7
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Posts(Protocol):
    """Publishes, as a session does."""

    def post(self, topic: str, payload: bytes) -> None:
        """Publish; raises ``Overloaded`` or ``BrokerUnavailable`` when there is no room."""
        ...


class EventSource:
    """Publishes what happened at one component; nobody waits for it, and nobody must have it.

    Args:
        session: Connection with the identity ``source``.
        topics: Topic grammar of the site.
        source: Identity of the component.
        component: What it is, ``registry`` or ``router``: part of the type of its events.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Posts,
        topics: Topics,
        source: str,
        component: str,
        clock: Callable[[], int],
    ) -> None:
        self._session = session
        self._topics = topics
        self._source = source
        self._component = component
        self._clock = clock

    def emit(self, kind: str, data: dict[str, Any], *, subject: str | None = None) -> None:
        """Publish an event; lost, with a log line, when there is no room for it.

        Args:
            kind: Last level of the topic, an identifier.
            data: JSON fields.
            subject: What it is about.
        """
        now = self._clock()
        event = CloudEvent(
            id=new_uuid7(now),
            source=f"/foam/{self._topics.site}/{self._source}",
            type=f"io.foam.{self._component}.{kind}.v1",
            time=datetime.fromtimestamp(now / 1000, UTC).isoformat(),
            subject=subject,
            data=data,
        )
        topic = self._topics.build(TopicKind.EVENT, source=self._source, kind=kind)
        try:
            self._session.post(topic, encode(event))
        except (Overloaded, BrokerUnavailable) as exc:
            _log.warning("event.lost", source=self._source, kind=kind, error=exc.message)
