"""What a session is, whatever carries it.

A ``Session`` is one identity's connection to the mesh: it publishes, subscribes, keeps what could
not be sent, and repairs itself after every disconnection. ``broker.session.mqtt.MqttSession``
speaks MQTT; ``broker.session.memory.MemorySession`` is the double for tests. One contract suite
holds both to this page.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it arrived.

    Attributes:
        topic: Topic name.
        payload: Its bytes; may be empty.
        qos: Quality of service it was delivered with, 0 or 1.
        retain: Whether the broker sent it as a kept message, because of a new subscription.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


@dataclass(frozen=True, slots=True)
class Will:
    """The message the broker publishes when the connection ends without a goodbye.

    Attributes:
        topic: Topic name.
        payload: Its bytes.
        qos: 0 or 1.
        retain: Whether the broker keeps it.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = True


Handler = Callable[[Message], Awaitable[None]]
"""Called with one message at a time, in order of arrival."""

Overflow = Callable[[Message], None]
"""Called with each message a full subscription queue had no room for."""

ConnectionListener = Callable[[bool], None]
"""Called with ``True`` when subscriptions and births are back, ``False`` when the link is lost."""

PayloadFactory = Callable[[], bytes | None]
"""Makes the payload of a birth at the moment it is sent; ``None``: send nothing this time."""

WillFactory = Callable[[], Will | None]
"""Makes the last will of the next connection."""


@dataclass(eq=False, slots=True)
class Subscription:
    """A filter and who gets its messages; handed out by ``Session.subscribe``.

    Attributes:
        topic_filter: MQTT filter.
        handler: Receives the messages.
        qos: Highest quality of service wanted.
        queue_limit: Messages that may wait for the handler; further ones are dropped.
        on_overflow: Told about each dropped message.
        dropped: Messages dropped because the queue was full.
        errors: Messages whose handler raised.
    """

    topic_filter: str
    handler: Handler
    qos: int
    queue_limit: int
    on_overflow: Overflow | None = None
    dropped: int = field(default=0, init=False)
    errors: int = field(default=0, init=False)


@dataclass(slots=True)
class SessionStats:
    """Counters of one session since it was made.

    Attributes:
        sent: Messages handed to the connection, repetitions included.
        resent: Of these, repetitions after a lost connection (duplicates for the receiver).
        acked: QoS 1 messages the broker confirmed.
        received: Messages that arrived.
        shed: QoS 0 messages not sent because the link was down or its buffer full.
        refused: Messages turned away with ``Overloaded``.
        overflowed: Arrived messages dropped because a subscription queue was full.
        unmatched: Arrived messages no subscription of ours asked for (any more).
        oversized: Arrived messages dropped because of their size.
        handler_errors: Exceptions out of handlers.
        connects: Connections made.
        denied: Messages the broker refused in its confirmation (MQTT 5 only).
    """

    sent: int = 0
    resent: int = 0
    acked: int = 0
    received: int = 0
    shed: int = 0
    refused: int = 0
    overflowed: int = 0
    unmatched: int = 0
    oversized: int = 0
    handler_errors: int = 0
    connects: int = 0
    denied: int = 0


class Session(Protocol):
    """One identity's connection to the mesh. Not thread-safe: it belongs to one event loop.

    Everything but ``subscribe``, ``post`` and ``announce`` needs it to be entered first.
    """

    @property
    def client_id(self) -> str:
        """Name of the session at the broker."""
        ...

    @property
    def connected(self) -> bool:
        """Whether messages flow: connected, subscriptions restored."""
        ...

    @property
    def stats(self) -> SessionStats:
        """Live counters."""
        ...

    @property
    def outbox_size(self) -> int:
        """QoS 1 messages not yet confirmed by the broker."""
        ...

    async def __aenter__(self) -> Self:
        """Start connecting; does not wait for the connection."""
        ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        """Flush what waits, for a bounded time, and say goodbye (no last will)."""
        ...

    async def stop(self) -> None:
        """As leaving the context; idempotent."""
        ...

    async def rest(self) -> None:
        """Send what waits, say goodbye (no last will) and stay away until ``wake``; bounded.

        Meanwhile the session is as one whose broker is down. What is kept for it at the broker is
        what the broker keeps for its kind of session: nothing where it is ``clean``.
        """
        ...

    def wake(self) -> None:
        """Connect again after ``rest``; nothing when it does not rest."""
        ...

    async def wait(self) -> None:
        """Return when stopped; raise when the session cannot go on.

        Raises:
            AccessDenied: The broker refuses the identity or its secret.
            ConfigurationError: The settings can never work.
        """
        ...

    async def wait_connected(self, timeout_s: float | None = None) -> None:
        """Wait until ``connected``.

        Args:
            timeout_s: Time limit, seconds; ``None``: without end.

        Raises:
            BrokerUnavailable: The time is over, or the session was stopped.
            AccessDenied: The broker refuses the identity or its secret.
        """
        ...

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Publish and, with QoS 1, wait for the broker's confirmation.

        The message survives a reconnection while it waits (and may then arrive twice). A PUBACK
        proves neither delivery nor permission nor durability (PROTOCOL section 5). Cancelling
        or running out of time withdraws it, unless it had already been sent.

        Args:
            topic: Topic name, no wildcards.
            payload: Bytes to send; empty clears a retained message.
            qos: 0 or 1. 0 returns as soon as the connection has taken the message.
            retain: Whether the broker keeps it.
            timeout_s: Time limit, seconds; the setting ``publish_timeout_s`` when omitted.

        Raises:
            BrokerUnavailable: No confirmation in time; QoS 0 while disconnected.
            Overloaded: The outbox is full.
            TooLarge: ``payload`` exceeds ``max_payload_bytes``.
            ProtocolError: ``topic`` is empty, too long or holds a wildcard.
        """
        ...

    def post(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Publish without waiting.

        QoS 1 messages keep their order, wait in the bounded outbox while the link is down and
        are sent again until confirmed. QoS 0 messages are dropped while the link is down.

        Args:
            topic: As for ``publish``.
            payload: As for ``publish``.
            qos: 0 or 1.
            retain: As for ``publish``.

        Raises:
            Overloaded: QoS 1 and the outbox is full.
            TooLarge: ``payload`` exceeds ``max_payload_bytes``.
            ProtocolError: As for ``publish``.
            BrokerUnavailable: The session has ended.
        """
        ...

    async def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 1,
        queue_limit: int = 1000,
        on_overflow: Overflow | None = None,
    ) -> Subscription:
        """Route messages that match ``topic_filter`` to ``handler``.

        Returns once the broker has agreed; at once when not connected, and then subscribes with
        the next connection. Holds across reconnections. The handler gets one message at a time,
        in order; what it raises is logged and counted, nothing more. Filters of one session
        should not overlap: some brokers send one copy per filter.

        Args:
            topic_filter: MQTT filter.
            handler: Receives the messages.
            qos: 0 or 1.
            queue_limit: Messages that may wait; when full the newest is dropped and counted.
            on_overflow: Called with each dropped message.

        Raises:
            AccessDenied: The broker refuses the filter.
            BrokerUnavailable: The session has ended.
        """
        ...

    async def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; messages still queued for it are dropped. Idempotent."""
        ...

    def announce(self, topic: str, payload_factory: PayloadFactory) -> None:
        """Publish a retained birth now and again on every connection.

        Births follow the subscriptions and precede everything that waits in the outbox; retained
        messages for the same topic that still wait there are superseded and dropped.

        Args:
            topic: Topic name; a second call for it replaces the factory and publishes again.
            payload_factory: Makes the payload each time it is sent.
        """
        ...

    def retract(self, topic: str) -> None:
        """Stop re-publishing the birth on ``topic``; sends nothing. Unknown topics are ignored."""
        ...

    def on_connection(self, listener: ConnectionListener) -> Callable[[], None]:
        """Tell ``listener`` about every change of ``connected``.

        Returns:
            A function that removes it again.
        """
        ...
