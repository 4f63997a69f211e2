"""A broker and its connections under a seed: delay, loss, duplicates, reordering, cuts, restarts.

What it may do is what MQTT lets a broker and a network do, and no more:

- a connection carries bytes in order, or ends; what was under way is lost with it;
- messages for one subscription keep the order in which the broker took them, those for different
  ones may overtake each other in the broker, but not on the connection: that is what a broker does
  that keeps a queue for each subscription (NATS), and more than one does that has a single queue;
- QoS 1 is confirmed once the broker has it; a sender whose confirmation was lost sends again, a
  broker whose subscriber did not confirm delivers again to a kept session (section 4.4);
- QoS 0 may be lost;
- a will is published when a connection ends without a goodbye, or is lost, as some brokers do.
"""

import asyncio
import contextvars
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from broker.session.base import Message, Will, WillFactory
from broker.session.core import SessionCore
from broker.session.link import LinkEvents
from broker.session.outbox import Outgoing
from broker.session.settings import SessionSettings
from capability_schemas.errors import BrokerUnavailable
from capability_schemas.topics import matches

__all__ = ["Network", "Quality", "SimulatedBroker", "SimulatedSession"]

_ROUTES: Final = 50_000
_STEM: Final = 4
"""Levels of a topic up to its kind: prefix, version, site, kind."""
_KEPT_MESSAGES: Final = 100_000
"""Messages kept for one absent session; further ones are dropped and counted."""
_KEEPALIVE_S: Final = 22.5
"""Silence after which either end gives a connection up: one and a half of 15 seconds."""
_STRAGGLERS: Final = 0.05
"""Share of messages that the broker holds up longer than the others."""
_HELD_UP: Final = 5
"""How much longer."""

Tap = Callable[[str, Message], None]
"""Told of every publication let through: publisher and message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How good the network is.

    Attributes:
        delay_s: Mean delay of one way, and in the broker; each message draws from an exponential
            distribution.
        loss: Share of QoS 0 messages lost.
        lost_wills: Share of wills that the broker forgets.
        keeps_retained: Whether retained messages survive the broker.
        keeps_sessions: Whether the sessions of absent clients do.
    """

    delay_s: float = 0.004
    loss: float = 0.01
    lost_wills: float = 0.05
    keeps_retained: bool = True
    keeps_sessions: bool = True


class Network:
    """The links there are, by client id, and what ails them."""

    def __init__(self) -> None:
        self._slow: dict[str, float] = {}
        self._stalled: dict[str, float] = {}

    def slow(self, client_id: str, factor: float) -> None:
        """Multiply the delays of a client's link from now on; 1 heals it."""
        self._slow[client_id] = factor

    def stall(self, client_id: str, until_s: float) -> None:
        """Hold back everything on a client's link until a time, loop's clock."""
        self._stalled[client_id] = until_s

    def factor(self, client_id: str) -> float:
        """Return by how much the link is slower than it should be."""
        return self._slow.get(client_id, 1.0)

    def stalled_until(self, client_id: str) -> float:
        """Return until when nothing passes, loop's clock."""
        return self._stalled.get(client_id, 0.0)


class SimulatedBroker:
    """The broker. It runs in no process of the simulation, so nothing but `down` hurts it.

    Args:
        quality: How good the network is.
        seed: Of all that is drawn.
        tap: Told of every publication.

    Attributes:
        network: What ails the links.
        retained: The messages kept, by topic.
        messages: Publications and deliveries so far.
        dropped: Messages dropped for absent sessions that had too many.
    """

    def __init__(self, *, quality: Quality, seed: str, tap: Tap) -> None:
        self.network = Network()
        self.retained: dict[str, Message] = {}
        self._shelves: dict[str, dict[str, Message]] = {}
        self.messages = 0
        self.dropped = 0
        self.quality = quality
        self.seed = seed
        self.is_up = True
        self._tap = tap
        self._chance = random.Random(f"{seed}/broker")  # noqa: S311  # a simulation
        self._context = contextvars.Context()
        self._links: dict[str, SimulatedLink] = {}
        self._away: dict[str, tuple[dict[str, int], deque[Message]]] = {}
        self._exact: dict[str, dict[SimulatedLink, int]] = {}
        self._wild: dict[str, dict[str, dict[SimulatedLink, int]]] = {}
        self._routes: dict[str, list[tuple[SimulatedLink, int]]] = {}

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop it runs on."""
        return asyncio.get_running_loop()

    def clients(self) -> list[str]:
        """Return who is connected."""
        return sorted(self._links)

    def later(self, when_s: float, call: Callable[..., object], *args: Any) -> None:
        """Do something of the broker's own at a time."""
        self.loop.call_at(when_s, call, *args, context=self._context)

    def down(self) -> None:
        """Die: connections end without wills; what is not kept is gone."""
        self.is_up = False
        for link in tuple(self._links.values()):
            self._detach(link)
            link.end("the broker went away")
        if not self.quality.keeps_sessions:
            self._away.clear()
        if not self.quality.keeps_retained:
            self.retained.clear()
            self._shelves.clear()

    def up(self) -> None:
        """Come back."""
        self.is_up = True

    def cut(self, client_id: str) -> bool:
        """Reset a client's connection; tell whether it had one."""
        link = self._links.get(client_id)
        if link is None:
            return False
        self.leave(link, will=True)
        link.end("the connection was reset")
        return True

    def stall(self, client_id: str, duration_s: float) -> None:
        """Let nothing pass on a client's link for a while; both ends may give it up meanwhile."""
        now = self.loop.time()
        self.network.stall(client_id, now + duration_s)
        link = self._links.get(client_id)
        if link is not None and duration_s > _KEEPALIVE_S:
            self.later(now + _KEEPALIVE_S, self._give_up, link)

    def accept(self, link: "SimulatedLink") -> None:
        """Attach a connection, taking over its client id."""
        client_id = link.client_id
        self.cut(client_id)
        self._links[client_id] = link
        self._routes.clear()
        filters, waiting = self._away.pop(client_id, ({}, deque()))
        if not link.clean:
            for topic_filter, qos in filters.items():
                self._enter(link, topic_filter, qos)
            for message in waiting:
                link.deliver(message)

    def leave(self, link: "SimulatedLink", *, will: bool) -> None:
        """Detach a connection; with ``will``, publish its last will."""
        if self._links.get(link.client_id) is not link:
            return
        self._detach(link)
        if will and link.will is not None and self._chance.random() >= self.quality.lost_wills:
            last = link.will
            self.route(link.client_id, Message(last.topic, last.payload, last.qos, last.retain))

    def route(self, publisher: str, message: Message) -> None:
        """Deliver a publication to everybody who asked for it, once each."""
        self._tap(publisher, message)
        self.messages += 1
        if message.retain:
            shelf = self._shelves.setdefault(_stem(message.topic), {})
            for kept in (self.retained, shelf):
                if message.payload:
                    kept[message.topic] = message
                else:
                    kept.pop(message.topic, None)
        for link, granted in self._takers(message.topic):
            link.deliver(Message(message.topic, message.payload, min(granted, message.qos)))
        for filters, waiting in self._away.values():
            if message.qos == 1 and _granted(filters, message.topic) == 1:
                if len(waiting) >= _KEPT_MESSAGES:
                    self.dropped += 1
                else:
                    waiting.append(Message(message.topic, message.payload, 1))

    def grant(self, link: "SimulatedLink", topic_filter: str, qos: int) -> None:
        """Add a subscription and send what is retained for it."""
        if self._links.get(link.client_id) is not link:
            return
        self._enter(link, topic_filter, qos)
        for message in self._retained_for(topic_filter):
            if matches(topic_filter, message.topic):
                level = min(qos, message.qos)
                link.deliver(Message(message.topic, message.payload, level, retain=True))

    def revoke(self, link: "SimulatedLink", topic_filter: str) -> None:
        """Take a subscription back."""
        link.filters.pop(topic_filter, None)
        self._forget(link, topic_filter)

    def loses(self) -> bool:
        """Draw whether a QoS 0 message is lost."""
        return self._chance.random() < self.quality.loss

    def _retained_for(self, topic_filter: str) -> list[Message]:
        """Return what may match a filter."""
        if not _is_wild(topic_filter):
            message = self.retained.get(topic_filter)
            return [] if message is None else [message]
        stem = _stem(topic_filter)
        return list((self._shelves.get(stem, {}) if stem else self.retained).values())

    def _takers(self, topic: str) -> "list[tuple[SimulatedLink, int]]":
        takers = self._routes.get(topic)
        if takers is None:
            if len(self._routes) >= _ROUTES:
                self._routes.clear()
            found = dict(self._exact.get(topic, {}))
            for stem in ("", _stem(topic)):
                for topic_filter, links in self._wild.get(stem, {}).items():
                    if matches(topic_filter, topic):
                        for link, qos in links.items():
                            found[link] = max(qos, found.get(link, 0))
            takers = self._routes[topic] = list(found.items())
        return takers

    def _enter(self, link: "SimulatedLink", topic_filter: str, qos: int) -> None:
        link.filters[topic_filter] = qos
        self._routes.clear()
        if _is_wild(topic_filter):
            alike = self._wild.setdefault(_stem(topic_filter), {})
            alike.setdefault(topic_filter, {})[link] = qos
        else:
            self._exact.setdefault(topic_filter, {})[link] = qos

    def _forget(self, link: "SimulatedLink", topic_filter: str) -> None:
        self._routes.clear()
        if _is_wild(topic_filter):
            self._wild.get(_stem(topic_filter), {}).get(topic_filter, {}).pop(link, None)
        else:
            self._exact.get(topic_filter, {}).pop(link, None)

    def _detach(self, link: "SimulatedLink") -> None:
        if self._links.get(link.client_id) is not link:
            return
        del self._links[link.client_id]
        for topic_filter in link.filters:
            self._forget(link, topic_filter)
        if not link.clean:
            self._away[link.client_id] = (dict(link.filters), deque(link.unconfirmed()))

    def _give_up(self, link: "SimulatedLink") -> None:
        stalled = self.network.stalled_until(link.client_id) > self.loop.time()
        if stalled and self._links.get(link.client_id) is link:
            self.leave(link, will=True)
            link.end("nothing was heard for a keep-alive")


def _is_wild(topic_filter: str) -> bool:
    return "+" in topic_filter or topic_filter.endswith("#")


def _stem(topic: str) -> str:
    """Return the levels that filters are sorted by; empty where a wildcard is among them."""
    levels = topic.split("/", _STEM)[:_STEM]
    return "" if any(level in {"+", "#"} for level in levels) else "/".join(levels)


def _granted(filters: dict[str, int], topic: str) -> int | None:
    return max((qos for wanted, qos in filters.items() if matches(wanted, topic)), default=None)


class SimulatedLink:
    """One connection; see `broker.session.link.Link`. Made in the process of its session.

    Args:
        broker: The broker.
        client_id: Name of the session.
        clean: Whether the broker forgets the session with the connection.
        will: Last will.
        events: Where to report.
    """

    window = 65_535

    def __init__(
        self,
        *,
        broker: SimulatedBroker,
        client_id: str,
        clean: bool,
        will: Will | None,
        events: LinkEvents,
    ) -> None:
        self.client_id = client_id
        self.clean = clean
        self.will = will
        self.filters: dict[str, int] = {}
        self._broker = broker
        self._events = events
        self._context = contextvars.copy_context()
        self._chance = random.Random(f"{broker.seed}/{client_id}")  # noqa: S311  # a simulation
        self._keys = 0
        self._up_at = 0.0
        self._down_at = 0.0
        self._lane_at: dict[tuple[str, int], float] = {}
        self._unconfirmed: OrderedDict[int, Message] = OrderedDict()
        self._deliveries = 0
        self._ended = asyncio.Event()
        self._reason = ""

    @property
    def description(self) -> dict[str, Any]:
        """What the log says about it."""
        return {"broker": "simulated"}

    def unconfirmed(self) -> list[Message]:
        """Return what was sent to the subscriber and not confirmed, oldest first."""
        return list(self._unconfirmed.values())

    # ---- the session's side

    def transmit(self, item: Outgoing) -> int | None:
        """Send a message on its way to the broker."""
        if self._ended.is_set():
            return None
        self._keys += item.qos
        message = Message(item.topic, bytes(item.payload), item.qos, item.retain)
        self._upwards(self._arrive, message, self._keys)
        return self._keys if item.qos else 0

    async def subscribe(self, filters: Sequence[tuple[str, int]]) -> list[bool]:
        """Subscribe."""
        for topic_filter, qos in filters:
            self._upwards(self._broker.grant, self, topic_filter, qos)
        await self._round_trip()
        return [True for _ in filters]

    async def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe."""
        self._upwards(self._broker.revoke, self, topic_filter)
        await self._round_trip()

    async def lost(self) -> str:
        """Wait for the end."""
        await self._ended.wait()
        return self._reason

    async def close(self) -> None:
        """Say goodbye, after what is under way."""
        if not self._ended.is_set():
            gone = asyncio.Event()
            self._upwards(self._say_goodbye, gone)
            ended = asyncio.get_running_loop().create_task(self._ended.wait())
            ready = asyncio.get_running_loop().create_task(gone.wait())
            try:
                await asyncio.wait([ended, ready], return_when=asyncio.FIRST_COMPLETED)
            finally:
                ended.cancel()
                ready.cancel()
        self.end("closed")

    def abort(self) -> None:
        """Cut the connection; the broker notices at once."""
        if not self._ended.is_set():
            self.end("aborted")
            self._broker.later(self._broker.loop.time(), self._leave)

    # ---- the broker's side

    def end(self, reason: str) -> None:
        """Note that the connection is over."""
        if not self._ended.is_set():
            self._reason = reason
            self._ended.set()

    def deliver(self, message: Message) -> None:
        """Send a message on its way to the session."""
        if message.qos == 0 and self._broker.loses():
            return
        number = 0
        if message.qos and not self.clean:
            self._deliveries += 1
            number = self._deliveries
            self._unconfirmed[number] = message
        now = self._broker.loop.time()
        lane = _stem(message.topic), message.topic.count("/")  # as filters are made
        at = self._lane_at[lane] = max(now + self._hold_up_s(), self._lane_at.get(lane, 0.0))
        self._broker.later(at, self._downwards, self._take, message, number)

    def _take(self, message: Message, number: int) -> None:
        """Hand an arrived message to the session, and confirm it."""
        if self._ended.is_set():
            return
        self._broker.messages += 1
        if number:
            self._upwards(self._unconfirmed.pop, number, None)
        self._events.message(message)

    def _arrive(self, message: Message, key: int) -> None:
        """Take a message at the broker, and send its confirmation back."""
        if message.qos == 0 and self._broker.loses():
            return
        self._broker.route(self.client_id, message)
        if message.qos:
            self._downwards(self._confirm, key)

    def _confirm(self, key: int) -> None:
        if not self._ended.is_set():
            self._events.confirmed(key, None)

    def _say_goodbye(self, gone: asyncio.Event) -> None:
        self._broker.leave(self, will=False)
        gone.set()

    def _leave(self) -> None:
        self._broker.leave(self, will=True)

    # ---- the way

    def _upwards(self, call: Callable[..., object], *args: Any) -> None:
        """Let something happen at the broker when what was sent before has arrived there."""
        now = self._broker.loop.time()
        self._up_at = max(self._up_at, now + self._delay_s(), self._stalled_until())
        self._broker.later(self._up_at, self._unless_ended, call, *args)

    def _downwards(self, call: Callable[..., object], *args: Any) -> None:
        """Let something happen at the session when what was sent before has arrived there."""
        now = self._broker.loop.time()
        self._down_at = max(self._down_at, now + self._delay_s(), self._stalled_until())
        self._broker.loop.call_at(self._down_at, call, *args, context=self._context)

    def _unless_ended(self, call: Callable[..., object], *args: Any) -> None:
        if not self._ended.is_set():
            call(*args)

    async def _round_trip(self) -> None:
        """Wait until the broker has answered.

        Raises:
            BrokerUnavailable: The connection ended before.
        """
        answered = asyncio.Event()
        self._upwards(self._answer, answered)
        loop = asyncio.get_running_loop()
        waits = [loop.create_task(answered.wait()), loop.create_task(self._ended.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._ended.is_set():
            raise BrokerUnavailable(self._reason)

    def _answer(self, answered: asyncio.Event) -> None:
        self._downwards(answered.set)

    def _delay_s(self) -> float:
        mean_s = self._broker.quality.delay_s * self._broker.network.factor(self.client_id)
        return mean_s * (0.2 + 0.8 * self._chance.expovariate(1.0))

    def _hold_up_s(self) -> float:
        """Draw how long a message is in the broker, however good or bad the connection is."""
        mean_s = self._broker.quality.delay_s
        factor = _HELD_UP if self._chance.random() < _STRAGGLERS else 1
        return mean_s * factor * self._chance.expovariate(1.0)

    def _stalled_until(self) -> float:
        return self._broker.network.stalled_until(self.client_id)


class SimulatedSession(SessionCore):
    """The real session over a simulated link; see `broker.session.base.Session`.

    Args:
        broker: The broker.
        client_id: Name of the session.
        will: Last will, or what makes it for each connection.
        clean: Whether the broker forgets the session with the connection.
    """

    def __init__(
        self,
        *,
        broker: SimulatedBroker,
        client_id: str,
        will: Will | WillFactory | None = None,
        clean: bool = True,
    ) -> None:
        super().__init__(
            settings=SessionSettings(urls=("mqtt://simulated",), client_id=client_id, clean=clean),
            rng=random.Random(f"{broker.seed}/{client_id}/pauses"),  # noqa: S311  # a simulation
        )
        self._broker = broker
        self._will = will
        self._clean = clean

    async def _connect(self) -> SimulatedLink:
        await asyncio.sleep(2 * self._broker.quality.delay_s)
        stalled_s = self._broker.network.stalled_until(self.client_id) - self._broker.loop.time()
        if stalled_s > 0:
            await asyncio.sleep(min(stalled_s, self._settings.connect_timeout_s))
        if not self._broker.is_up or stalled_s > self._settings.connect_timeout_s:
            raise BrokerUnavailable("nobody answers")
        link = SimulatedLink(
            broker=self._broker,
            client_id=self.client_id,
            clean=self._clean,
            will=self._will() if callable(self._will) else self._will,
            events=self._events,
        )
        self._broker.accept(link)
        return link
