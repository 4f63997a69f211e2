"""What the broker refuses, counted by who and what, for the audit trail.

MQTT 3.1.1 has no way to tell a client that its message was dropped (section 3.3.5), and a log is
read by nobody; so it is told on ``event/broker/audit`` every few seconds.
"""

from collections.abc import Iterable

import structlog
from amqtt.session import Session

from broker.audit import Tally
from broker.embedded.gate import Admission
from capability_schemas.errors import InvalidTopic
from capability_schemas.ids import is_identifier
from capability_schemas.topics import Topics

_NAMELESS = "unknown"
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Refusals:
    """Counts refused connections, messages and subscriptions. Owned by the broker's loop.

    Args:
        tally: Where they are counted; bounded.
        topics: Topic grammar of the site.
    """

    def __init__(self, *, tally: Tally, topics: Topics) -> None:
        self._tally = tally
        self._topics = topics

    def connection(self, identity: str | None, address: str, reason: Admission) -> None:
        """Count a refused CONNECT; the identity is what it claims, and proven by nothing."""
        actor = identity if identity is not None and is_identifier(identity) else _NAMELESS
        self._tally.note(
            "connect_refused", actor=actor, subject=address[:64], message=reason.name.lower()
        )

    def publication(self, identity: str, topic: str) -> None:
        """Count a message that was dropped."""
        self._tally.note(
            "publish_refused", actor=identity, subject=self._kind(topic), message=topic
        )

    def subscription(self, identity: str, topic_filter: str) -> None:
        """Count a filter that was refused."""
        self._tally.note(
            "subscribe_refused",
            actor=identity,
            subject=self._kind(topic_filter),
            message=topic_filter,
        )

    def look_for_second(self, session: Session, others: Iterable[Session]) -> None:
        """Tell when somebody connects who is connected already: the way of a stolen certificate.

        A member that comes back after a cut may find its old connection still open; so this is told
        and not refused. Devices may connect several times, but do so from one address.

        Args:
            session: Who connects.
            others: The sessions there are.
        """
        for other in others:
            if other.username != session.username or other.transitions.state != "connected":
                continue
            was, now = str(other.remote_address), str(session.remote_address)
            takes = other.client_id == session.client_id
            if not takes and was == now:
                continue
            what = "connection_taken_over" if takes else "connected_from_elsewhere"
            _log.warning(
                f"client.{what}",
                identity=session.username,
                client=session.client_id,
                was=was,
                now=now,
            )
            self._tally.note(
                what,
                actor=str(session.username),
                subject=now[:64],
                message=f"it was connected from {was}: if that was not itself, revoke it",
            )

    def _kind(self, topic: str) -> str:
        """Return the kind of a topic; of a filter the level after the root."""
        try:
            return self._topics.parse(topic).kind.value
        except InvalidTopic:
            below = topic.removeprefix(f"{self._topics.root}/")
            first = below.partition("/")[0] if below != topic else _NAMELESS
            return first[:64]
