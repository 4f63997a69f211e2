"""The session itself, whatever carries its messages.

``SessionCore`` owns everything a session promises (``broker.session.base``): one loop that
connects and reconnects, the subscriptions, the births and the outbox. What differs between MQTT
and the in-memory double is one ``Link``: a single connection that cannot repair itself.

On every connection, in this order: subscriptions, births, listeners, outbox.
"""

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, NoReturn

import structlog

from broker.lifecycle import Service
from broker.session.backoff import Backoff
from broker.session.base import (
    ConnectionListener,
    Handler,
    Message,
    Overflow,
    PayloadFactory,
    SessionStats,
    Subscription,
)
from broker.session.births import BirthBook
from broker.session.grants import Grants
from broker.session.inbox import SubscriptionTable
from broker.session.link import Link, LinkEvents
from broker.session.outbox import Outbox, Outgoing, check_topic
from broker.session.settings import SessionSettings
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    ConfigurationError,
    FoamError,
    Overloaded,
    TooLarge,
)

_WATCH_PERIOD_S: Final = 2.0
_SETTLED_S: Final = 5.0
_FIRST_RETRY_FLOOR_S: Final = 0.1
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class SessionCore(Service, ABC):
    """A session over links that ``_connect`` makes. See ``broker.session.base.Session``.

    All state is owned by the event loop; nothing awaits between checking and changing it.

    Args:
        settings: Its settings.
        rng: Randomness of the back-off; injected by tests.
    """

    def __init__(self, *, settings: SessionSettings, rng: random.Random | None = None) -> None:
        super().__init__(service_id=settings.client_id)
        self.stop_timeout_s = settings.flush_timeout_s + 3.0
        self._settings = settings
        self._backoff = Backoff(
            base_s=settings.backoff_base_s,
            cap_s=settings.backoff_cap_s,
            rng=rng or random.Random(),  # noqa: S311  # jitter is no secret
        )
        self._stats = SessionStats()
        self._table = SubscriptionTable(stats=self._stats)
        self._grants = Grants(
            table=self._table, client_id=settings.client_id, doubt_s=settings.doubt_s
        )
        self._outbox = Outbox(limit=settings.outbox_limit, window=settings.window)
        self._births = BirthBook(stats=self._stats)
        self._listeners: dict[ConnectionListener, None] = {}
        self._events = LinkEvents(
            message=self._arrived, confirmed=self._confirmed, oversized=self._oversized
        )
        self._link: Link | None = None
        self._ready = False
        self._closing = False
        self._trouble = ""
        self._fatal: FoamError | None = None
        self._change = asyncio.Event()
        self._awake = asyncio.Event()
        self._awake.set()
        self._drained = asyncio.Event()
        self._log = _log.bind(client_id=settings.client_id)

    @property
    def client_id(self) -> str:
        """Name of the session at the broker."""
        return self._settings.client_id

    @property
    def connected(self) -> bool:
        """Whether messages flow: connected, subscriptions restored."""
        return self._ready

    @property
    def stats(self) -> SessionStats:
        """Live counters."""
        return self._stats

    @property
    def outbox_size(self) -> int:
        """QoS 1 messages not yet confirmed by the broker."""
        return len(self._outbox)

    def post(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Publish without waiting; see ``Session.post``."""
        self._check(topic, payload)
        if qos == 0:
            if not self._send_now(Outgoing(topic, payload, 0, retain)):
                self._stats.shed += 1
            return
        self._enqueue(Outgoing(topic, payload, 1, retain))

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Publish and wait for the broker; see ``Session.publish``."""
        self._check(topic, payload)
        if qos == 0:
            if not self._send_now(Outgoing(topic, payload, 0, retain)):
                self._stats.shed += 1
                raise BrokerUnavailable(f"not connected: the message on {topic} was not sent")
            return
        limit_s = self._settings.publish_timeout_s if timeout_s is None else timeout_s
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        item = Outgoing(topic, payload, 1, retain, waiter=waiter)
        self._enqueue(item)
        try:
            async with asyncio.timeout(limit_s):
                await waiter
        except TimeoutError:
            fate = "may have arrived" if item.attempts else "was not sent"
            raise BrokerUnavailable(
                f"no confirmation of a message on {topic} within {limit_s:g} s: it {fate}",
                topic=topic,
                sent=item.attempts > 0,
            ) from None
        finally:
            self._outbox.withdraw(item)

    def announce(self, topic: str, payload_factory: PayloadFactory) -> None:
        """Publish a birth now and on every connection; see ``Session.announce``."""
        check_topic(topic)
        self._births.enter(topic, payload_factory)
        if self._ready:
            self._outbox.put_first(self._births.make([topic]))
            self._pump()

    def retract(self, topic: str) -> None:
        """Stop re-publishing a birth; see ``Session.retract``."""
        self._births.remove(topic)

    async def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 1,
        queue_limit: int = 1000,
        on_overflow: Overflow | None = None,
    ) -> Subscription:
        """Route matching messages to ``handler``; see ``Session.subscribe``."""
        self._check_usable()
        subscription = Subscription(topic_filter, handler, qos, queue_limit, on_overflow)
        self._table.add(subscription)
        link = self._link
        if link is None or not self._ready:
            return subscription
        try:
            granted = await self._grants.subscribe(
                link, topic_filter, doubted=self._is_one_of_many()
            )
        except asyncio.CancelledError:
            self._table.remove(subscription)
            raise
        except BrokerUnavailable as error:
            if self._link is link:  # no answer on a living link: begin anew, which subscribes all
                self._log.warning("session.subscribe_failed", reason=error.message)
                link.abort()
            return subscription
        if not granted:
            self._table.remove(subscription)
            raise AccessDenied(
                f"the broker refuses {self.client_id} the subscription {topic_filter}",
                topic_filter=topic_filter,
            )
        return subscription

    async def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; see ``Session.unsubscribe``."""
        last = self._table.remove(subscription)
        if last:
            self._grants.forget(subscription.topic_filter)
        link = self._link
        if not last or link is None:
            return
        try:
            await link.unsubscribe(subscription.topic_filter)
        except BrokerUnavailable as error:  # the next connection does not know it any more
            self._log.info("session.unsubscribe_unconfirmed", reason=error.message)

    async def wait_connected(self, timeout_s: float | None = None) -> None:
        """Wait until ``connected``; see ``Session.wait_connected``."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._ready:
                    self._check_usable()
                    await self._change.wait()
        except TimeoutError:
            last_try = f" The last try: {self._trouble}" if self._trouble else ""
            raise BrokerUnavailable(
                f"{self.client_id} is not connected to {self._broker_names()} "
                f"after {timeout_s:g} s: is the broker running?{last_try}",
                reason=self._trouble,
            ) from None

    def on_connection(self, listener: ConnectionListener) -> Callable[[], None]:
        """Tell ``listener`` about changes of ``connected``; see ``Session.on_connection``."""
        self._listeners[listener] = None

        def remove() -> None:
            self._listeners.pop(listener, None)

        return remove

    async def rest(self) -> None:
        """Say goodbye and stay away until ``wake``; see ``Session.rest``."""
        if not self._awake.is_set() or self._closing:
            return
        await self._flush()
        self._awake.clear()
        if self._link is not None:
            await self._link.close()

    def wake(self) -> None:
        """Connect again after ``rest``; see ``Session.wake``."""
        self._awake.set()

    async def abort(self) -> None:
        """End at once and without a goodbye: nothing is flushed, the last will is published."""
        self._closing = True
        if self._link is not None:
            self._link.abort()
        await self.stop()

    @abstractmethod
    async def _connect(self) -> Link:
        """Make one try to connect.

        Raises:
            BrokerUnavailable: It may work later; when it is not retryable, it will not.
            AccessDenied: It will not: the broker knows us and refuses.
            ConfigurationError: It cannot work with these settings.
        """

    def _link_ended(self, reason: str, *, had_lasted: bool) -> None:
        """Hear why the connection ended, before the next try."""

    def _is_one_of_many(self) -> bool:
        """Tell whether the broker is a cluster."""
        return False

    def _round_is_over(self) -> bool:
        """Tell whether every broker was tried: only then pauses grow."""
        return True

    async def _pause(self, delay_s: float) -> None:
        """Wait between two tries."""
        await asyncio.sleep(delay_s)

    def _broker_names(self) -> str:
        """Name the brokers for a message, without secrets."""
        return "the broker"

    async def _on_start(self) -> None:
        self._table.open(lambda coro, role: self.spawn(coro, name=role))
        self.spawn(self._keep_connected(), name="connection")

    async def _on_stop(self) -> None:
        if not self._closing:
            await self._flush()
        if self._link is not None and not self._closing:
            self._closing = True
            await self._link.close()

    async def _on_stopped(self) -> None:
        if self._link is not None:
            self._link.abort()
        self._give_up(BrokerUnavailable(f"session {self.client_id} has ended", retryable=False))

    async def _flush(self) -> None:
        self._drained.clear()
        if not len(self._outbox) or self.crash is not None:
            return
        try:
            async with asyncio.timeout(self._settings.flush_timeout_s):
                await self._drained.wait()
        except TimeoutError:
            self._log.warning("session.flush_timeout", unconfirmed=len(self._outbox))

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._is_closing():
            floor_s = _FIRST_RETRY_FLOOR_S
            await self._awake.wait()
            try:
                link = await self._connect()
                if not self._awake.is_set():  # sent to rest meanwhile
                    await link.close()
                    continue
                since = loop.time()
                floor_s = self._settings.reconnect_floor_s
                try:
                    reason = await self._run_link(link)
                except BrokerUnavailable as error:
                    self._link_ended(error.message, had_lasted=False)
                    raise
                if self._is_closing():
                    return
                if not self._awake.is_set():
                    self._log.info("session.resting")
                    continue
                had_lasted = loop.time() - since > _SETTLED_S
                if had_lasted:
                    self._backoff.reset()
                self._link_ended(reason, had_lasted=had_lasted)
                self._log.warning("session.lost", reason=reason, **link.description)
            except BrokerUnavailable as error:
                if not error.retryable:
                    self._log.error("session.refused", reason=error.message)
                    self._give_up(error)
                    raise
                self._trouble = error.message
                self._log.warning(
                    "session.waiting", broker=self._broker_names(), reason=error.message
                )
            except (AccessDenied, ConfigurationError) as error:
                self._log.error("session.refused", reason=error.message)
                self._give_up(error)
                raise
            grows = self._round_is_over()
            await self._pause(self._backoff.next_s(floor_s=floor_s, grows=grows))

    def _is_closing(self) -> bool:
        return self._closing

    async def _run_link(self, link: Link) -> str:
        self._link = link
        try:
            self._outbox.window = min(self._settings.window, link.window)
            await self._grants.restore(link)
            self._stats.connects += 1
            self._log.info("session.connected", **link.description)
            self._outbox.put_first(self._births.make(self._births))
            self._set_ready(True)
            self._pump()
            return await self._watch(link)
        finally:
            self._link = None
            link.abort()
            for item in self._outbox.requeue():
                self._poisoned(item)
            if self._ready:
                self._set_ready(False)

    async def _watch(self, link: Link) -> str:
        limit_s = self._settings.ack_timeout_s
        while True:
            try:
                async with asyncio.timeout(min(_WATCH_PERIOD_S, limit_s / 2)):
                    return await link.lost()
            except TimeoutError:
                oldest = self._outbox.oldest_sent_at
                now = asyncio.get_running_loop().time()
                if oldest is not None and now - oldest > limit_s:
                    return f"no confirmation for {limit_s:g} s"
                await self._grants.ask_again(link)

    def _set_ready(self, ready: bool) -> None:
        self._ready = ready
        self._signal_change()
        for listener in tuple(self._listeners):
            try:
                listener(ready)
            except Exception as error:  # noqa: BLE001  # supervision boundary: not our code
                self._stats.handler_errors += 1
                self._log.error("session.listener_failed", exc_info=error)

    def _signal_change(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _give_up(self, error: FoamError) -> None:
        if self._fatal is None:
            self._fatal = error
        for item in self._outbox.clear():
            self._fail_waiter(item, error)
        self._signal_change()

    def _check(self, topic: str, payload: bytes) -> None:
        self._check_usable()
        check_topic(topic)
        limit_bytes = self._settings.max_payload_bytes
        if len(payload) > limit_bytes:
            raise TooLarge("message", size_bytes=len(payload), limit_bytes=limit_bytes)

    def _check_usable(self) -> None:
        if self._fatal is not None:
            self._refuse(self._fatal)

    def _refuse(self, error: FoamError) -> NoReturn:
        self._crash_seen = True  # the caller learns it here; stop() need not raise it again
        raise error

    def _enqueue(self, item: Outgoing) -> None:
        try:
            self._outbox.add(item)
        except Overloaded:
            self._stats.refused += 1
            raise
        self._pump()

    def _send_now(self, item: Outgoing) -> bool:
        link = self._link
        if link is None or not self._ready or link.transmit(item) is None:
            return False
        self._stats.sent += 1
        return True

    def _pump(self) -> None:
        link = self._link
        if link is None or not self._ready:
            return
        now = asyncio.get_running_loop().time()
        while (item := self._outbox.take()) is not None:
            try:
                key = link.transmit(item)
            except TooLarge as error:
                item.settled = True
                self._log.error("session.too_large", topic=item.topic, **error.detail)
                self._fail_waiter(item, error)
                continue
            if key is None:  # the link is going down: _run_link will say so
                self._outbox.give_back(item)
                return
            self._stats.sent += 1
            self._stats.resent += item.attempts > 0
            self._outbox.sent(key, item, now)

    def _fail_waiter(self, item: Outgoing, error: FoamError) -> None:
        if item.waiter is not None and not item.waiter.done():
            item.waiter.set_exception(error)

    def _poisoned(self, item: Outgoing) -> None:
        self._log.error(
            "session.poison_dropped",
            topic=item.topic,
            size_bytes=len(item.payload),
            attempts=item.attempts,
        )
        self._fail_waiter(
            item,
            BrokerUnavailable(
                f"the connection broke each of the {item.attempts} times a message of "
                f"{len(item.payload)} bytes on {item.topic} was sent: is it over the "
                "broker's packet limit?",
                retryable=False,
                size_bytes=len(item.payload),
            ),
        )

    def _arrived(self, message: Message) -> None:
        self._stats.received += 1
        self._table.deliver(message)

    def _confirmed(self, key: int, refusal: str | None) -> None:
        item = self._outbox.confirm(key)
        if item is None:
            return
        self._stats.acked += 1
        if refusal is not None:
            self._stats.denied += 1
            self._log.error("session.publish_refused", topic=item.topic, reason=refusal)
            self._fail_waiter(
                item, AccessDenied(f"the broker refuses a message on {item.topic}: {refusal}")
            )
        elif item.waiter is not None and not item.waiter.done():
            item.waiter.set_result(None)
        self._pump()
        if not len(self._outbox):
            self._drained.set()

    def _oversized(self, topic: str, size_bytes: int) -> None:
        self._stats.oversized += 1
        self._log.warning("session.oversized_dropped", topic=topic, size_bytes=size_bytes)
