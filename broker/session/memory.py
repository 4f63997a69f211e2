"""A broker and sessions in memory, for tests: no sockets, no real time.

It passes the contract suite that ``MqttSession`` passes: MQTT matching, retained messages, last
wills, take-over of a client id, sessions that outlive their connection. Delivery happens in the
event loop in a fixed order, so a test that awaits ``MemoryBroker.settle`` is deterministic.

::

    broker = MemoryBroker()
    async with MemorySession(broker=broker, client_id="a") as session:
        await session.wait_connected()
        session.post("foam/v1/local/task/a", b"hello")
        await broker.settle()
    assert broker.published("foam/v1/local/task/+")[0].payload == b"hello"
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Protocol

from broker.session.base import Message, Will, WillFactory
from broker.session.core import SessionCore
from broker.session.link import LinkEvents
from broker.session.outbox import Outgoing
from broker.session.settings import SessionSettings
from capability_schemas.errors import AccessDenied, BrokerUnavailable
from capability_schemas.topics import matches

_LOG_LIMIT: Final = 100_000
_SETTLE_ROUNDS: Final = 100_000

Action = Literal["publish", "subscribe"]
AccessRule = Callable[[str, Action, str], bool]
"""Takes identity, action and topic or filter."""


class _Settling(Protocol):
    @property
    def settled(self) -> bool: ...


class MemoryBroker:
    """The broker of ``MemorySession``. Owned by one event loop.

    Args:
        allows: Access rule; everything is allowed when omitted. A publication that is not
            allowed is confirmed and dropped, as brokers do under MQTT 3.1.1.

    Attributes:
        log: Every message that was let through, oldest first (bounded).
        retained: The messages kept, by topic.
    """

    def __init__(self, *, allows: AccessRule | None = None) -> None:
        self.log: deque[Message] = deque(maxlen=_LOG_LIMIT)
        self.retained: dict[str, Message] = {}
        self.allows = allows
        self._links: dict[str, MemoryLink] = {}
        self._away: dict[str, tuple[dict[str, int], deque[Message]]] = {}
        self._sessions: dict[str, _Settling] = {}
        self._banned: set[str] = set()
        self._held: set[str] = set()
        self._is_up = True
        self._changed = asyncio.Event()

    @property
    def is_up(self) -> bool:
        """Whether it accepts connections."""
        return self._is_up

    def admits(self, client_id: str) -> bool:
        """Whether this session can connect now: the broker is up and does not hold it."""
        return self._is_up and client_id not in self._held

    def published(self, topic_filter: str) -> list[Message]:
        """Return the logged messages whose topic matches."""
        return [message for message in self.log if matches(topic_filter, message.topic)]

    def clients(self) -> list[str]:
        """Return the ids of the connected sessions."""
        return list(self._links)

    def down(self) -> None:
        """Die: every connection breaks, no will is published, absent sessions are forgotten."""
        self._is_up = False
        self._away.clear()
        for link in tuple(self._links.values()):
            self._detach(link)
            link.end("the broker went away")

    def up(self) -> None:
        """Come back; retained messages are still there, as on a broker with persistence."""
        self._is_up = True
        self._changed.set()
        self._changed = asyncio.Event()

    def drop(self, client_id: str) -> None:
        """Break one connection; its will is published. The session connects again by itself."""
        link = self._links[client_id]
        self.leave(link, will=True)
        link.end("the connection was cut")

    def forget_absent(self) -> None:
        """Forget the sessions that outlived their connections, as a restarted broker does."""
        self._away.clear()

    def hold(self, client_id: str) -> None:
        """Break one connection and let it wait outside until ``release``."""
        self._held.add(client_id)
        if client_id in self._links:
            self.drop(client_id)

    def release(self, client_id: str) -> None:
        """Let a held session in again."""
        self._held.discard(client_id)
        self._changed.set()
        self._changed = asyncio.Event()

    def ban(self, client_id: str) -> None:
        """Refuse a client id from now on and break its connection."""
        self._banned.add(client_id)
        if client_id in self._links:
            self.drop(client_id)

    async def settle(self) -> None:
        """Return when nothing moves any more: outboxes empty, queues empty, handlers idle.

        Raises:
            TimeoutError: Something keeps moving, or a handler waits for something else.
        """
        for _ in range(_SETTLE_ROUNDS):
            for _ in range(3):
                await asyncio.sleep(0)
            if all(session.settled for session in self._sessions.values()):
                return
        raise TimeoutError(f"the sessions do not come to rest: {sorted(self._sessions)}")

    def enter(self, session_id: str, session: _Settling) -> None:
        """Count a session among those ``settle`` waits for."""
        self._sessions[session_id] = session

    def forget(self, session_id: str) -> None:
        """Take a stopped session out again."""
        self._sessions.pop(session_id, None)

    async def accept(self, link: "MemoryLink") -> None:
        """Attach a connection, taking over its client id.

        Raises:
            AccessDenied: The client id is banned.
        """
        client_id = link.client_id
        while not self.admits(client_id):
            await self._changed.wait()
        if client_id in self._banned:
            raise AccessDenied(f"the broker refuses {client_id}: bad user name or password")
        if client_id in self._links:
            self.drop(client_id)
        self._links[client_id] = link
        filters, waiting = self._away.pop(client_id, ({}, deque()))
        if not link.clean:
            link.filters.update(filters)
            for message in waiting:
                link.deliver(message)

    def leave(self, link: "MemoryLink", *, will: bool) -> None:
        """Detach a connection; with ``will``, publish its last will."""
        if self._links.get(link.client_id) is not link:
            return
        self._detach(link)
        if not link.clean:
            self._away[link.client_id] = (dict(link.filters), deque())
        if will and link.will is not None:
            last = link.will
            self.route(link.identity, Message(last.topic, last.payload, last.qos, last.retain))

    def route(self, identity: str, message: Message) -> None:
        """Deliver a publication to everybody who asked for it, once each."""
        if self.allows is not None and not self.allows(identity, "publish", message.topic):
            return
        self.log.append(message)
        if message.retain:
            if message.payload:
                self.retained[message.topic] = message
            else:
                self.retained.pop(message.topic, None)
        for link in tuple(self._links.values()):
            qos = _granted(link.filters, message)
            if qos is not None:
                link.deliver(Message(message.topic, message.payload, qos))
        for filters, waiting in self._away.values():
            if _granted(filters, message) == 1:
                waiting.append(Message(message.topic, message.payload, 1))

    def grant(self, link: "MemoryLink", topic_filter: str, qos: int) -> bool:
        """Add a subscription and send what is retained for it; tell whether it is allowed."""
        if self.allows is not None and not self.allows(link.identity, "subscribe", topic_filter):
            return False
        link.filters[topic_filter] = qos
        for message in tuple(self.retained.values()):
            if matches(topic_filter, message.topic):
                level = min(qos, message.qos)
                link.deliver(Message(message.topic, message.payload, level, retain=True))
        return True

    def _detach(self, link: "MemoryLink") -> None:
        if self._links.get(link.client_id) is link:
            del self._links[link.client_id]


def _granted(filters: dict[str, int], message: Message) -> int | None:
    levels = [qos for wanted, qos in filters.items() if matches(wanted, message.topic)]
    return min(max(levels), message.qos) if levels else None


class MemoryLink:
    """One connection to a ``MemoryBroker``.

    Args:
        broker: The broker.
        client_id: Name of the session.
        identity: User name the access rule goes by.
        clean: Whether the broker forgets the session with the connection.
        will: Last will.
        events: Where to report.
        max_payload_bytes: Larger messages are dropped on arrival.
    """

    window = 65_535

    def __init__(
        self,
        *,
        broker: MemoryBroker,
        client_id: str,
        identity: str,
        clean: bool,
        will: Will | None,
        events: LinkEvents,
        max_payload_bytes: int,
    ) -> None:
        self.client_id = client_id
        self.identity = identity
        self.clean = clean
        self.will = will
        self.filters: dict[str, int] = {}
        self._broker = broker
        self._events = events
        self._max_payload_bytes = max_payload_bytes
        self._keys = 0
        self._ended = asyncio.Event()
        self._reason = ""

    @property
    def description(self) -> dict[str, Any]:
        """What the log says about it."""
        return {"broker": "memory"}

    def transmit(self, item: Outgoing) -> int | None:
        """Take a message: it is routed and confirmed in the next round of the loop."""
        if self._ended.is_set():
            return None
        self._keys += item.qos
        message = Message(item.topic, bytes(item.payload), item.qos, item.retain)
        asyncio.get_running_loop().call_soon(self._sent, message, self._keys)
        return self._keys if item.qos else 0

    async def subscribe(self, filters: Sequence[tuple[str, int]]) -> list[bool]:
        """Subscribe."""
        await asyncio.sleep(0)
        self._check()
        return [self._broker.grant(self, name, qos) for name, qos in filters]

    async def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe."""
        await asyncio.sleep(0)
        self._check()
        self.filters.pop(topic_filter, None)

    async def lost(self) -> str:
        """Wait for the end."""
        await self._ended.wait()
        return self._reason

    async def close(self) -> None:
        """Say goodbye."""
        self._broker.leave(self, will=False)
        self.end("closed")

    def abort(self) -> None:
        """Cut the connection; the broker publishes the will."""
        self._broker.leave(self, will=True)
        self.end("aborted")

    def end(self, reason: str) -> None:
        """Note that the connection is over."""
        if not self._ended.is_set():
            self._reason = reason
            self._ended.set()

    def deliver(self, message: Message) -> None:
        """Hand an arrived message to the session."""
        if self._ended.is_set():
            return
        if len(message.payload) > self._max_payload_bytes:
            self._events.oversized(message.topic, len(message.payload))
            return
        self._events.message(message)

    def _sent(self, message: Message, key: int) -> None:
        if self._ended.is_set():
            return
        self._broker.route(self.identity, message)
        if message.qos:
            self._events.confirmed(key, None)

    def _check(self) -> None:
        if self._ended.is_set():
            raise BrokerUnavailable(self._reason)


class MemorySession(SessionCore):
    """A session on a ``MemoryBroker``; see ``broker.session.base.Session``.

    Connects again at once after a break, without waiting.

    Args:
        broker: The broker.
        client_id: Name of the session.
        username: Identity; the client id when omitted.
        will: Last will, or what makes it for each connection.
        clean: Whether the broker forgets the session with the connection.
        settings: Limits and windows; address and identity in it are ignored.
    """

    def __init__(
        self,
        *,
        broker: MemoryBroker,
        client_id: str,
        username: str | None = None,
        will: Will | WillFactory | None = None,
        clean: bool = True,
        settings: SessionSettings | None = None,
    ) -> None:
        base = settings or SessionSettings(urls=("mqtt://memory",), client_id=client_id)
        super().__init__(settings=base.model_copy(update={"client_id": client_id}))
        self._broker = broker
        self._identity = username or client_id
        self._will = will
        self._clean = clean

    @property
    def settled(self) -> bool:
        """Whether nothing of this session moves: for ``MemoryBroker.settle``."""
        if not self._ready:
            return not self.running or not self._broker.admits(self.client_id)
        return not len(self._outbox) and all(lane.idle for lane in self._table)

    async def _connect(self) -> MemoryLink:
        link = MemoryLink(
            broker=self._broker,
            client_id=self.client_id,
            identity=self._identity,
            clean=self._clean,
            will=self._will() if callable(self._will) else self._will,
            events=self._events,
            max_payload_bytes=self._settings.max_payload_bytes,
        )
        await self._broker.accept(link)
        return link

    async def _pause(self, delay_s: float) -> None:  # no time passes in memory
        await asyncio.sleep(0)

    async def _on_start(self) -> None:
        self._broker.enter(self.client_id, self)
        await super()._on_start()

    async def _on_stopped(self) -> None:
        self._broker.forget(self.client_id)
        await super()._on_stopped()
