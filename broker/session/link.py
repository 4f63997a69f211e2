"""The seam below a session: one connection, from its acceptance to its end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from broker.session.base import Message
from broker.session.outbox import Outgoing


class Link(Protocol):
    """One connection that does not repair itself.

    Everything that waits raises ``BrokerUnavailable`` when the connection ends meanwhile.
    """

    @property
    def window(self) -> int:
        """Unconfirmed messages the broker takes at once (MQTT 5 Receive Maximum)."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """What the log says about it: broker, version."""
        ...

    def transmit(self, item: Outgoing) -> int | None:
        """Hand a message to the connection.

        Returns:
            The key its confirmation will bear (0 with QoS 0); ``None`` when it was not taken.

        Raises:
            TooLarge: The broker said it takes no packet of this size.
        """
        ...

    async def subscribe(self, filters: Sequence[tuple[str, int]]) -> list[bool]:
        """Subscribe; tell for each filter whether it was granted."""
        ...

    async def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe."""
        ...

    async def lost(self) -> str:
        """Wait for the end of the connection and say why."""
        ...

    async def close(self) -> None:
        """Say goodbye: the broker discards the last will."""
        ...

    def abort(self) -> None:
        """Cut the connection: the broker publishes the last will."""
        ...


@dataclass(frozen=True, slots=True)
class LinkEvents:
    """What a link reports, from the event loop, without blocking.

    Attributes:
        message: A message arrived.
        confirmed: The message sent under this key was confirmed; the second argument says why
            the broker did not want it (MQTT 5), else it is ``None``.
        oversized: A message of this topic and size was dropped.
    """

    message: Callable[[Message], None]
    confirmed: Callable[[int, str | None], None]
    oversized: Callable[[str, int], None]
