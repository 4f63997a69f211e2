"""The connection loop and what happens on bad links, with scripted connections."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from broker.session import core, grants
from broker.session.backoff import full_jitter
from broker.session.base import Message
from broker.session.core import SessionCore
from broker.session.link import Link
from broker.session.outbox import POISON_ATTEMPTS, POISON_BYTES, Outgoing
from broker.session.settings import SessionSettings
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    ConfigurationError,
    TooLarge,
)


class ScriptedLink:
    """A connection that does what the test says."""

    def __init__(self, session: "ScriptedSession", *, refused: set[str], window: int) -> None:
        self.session = session
        self.refused = refused
        self.window = window
        self.sent: list[Outgoing] = []
        self.subscribed: list[tuple[str, int]] = []
        self.granted: set[str] = set()
        self.ended = asyncio.Event()
        self.takes = True
        self.packet_limit: int | None = None
        self.answers = True
        self.goodbye = False
        self.description: dict[str, Any] = {}

    def transmit(self, item: Outgoing) -> int | None:
        if not self.takes or self.ended.is_set():
            return None
        if self.packet_limit is not None and len(item.payload) > self.packet_limit:
            raise TooLarge("packet", size_bytes=len(item.payload), limit_bytes=self.packet_limit)
        self.sent.append(item)
        return len(self.sent)

    async def subscribe(self, filters: Sequence[tuple[str, int]]) -> list[bool]:
        await asyncio.sleep(0)
        if not self.answers:
            raise BrokerUnavailable("no answer")
        self.subscribed += filters
        self.granted |= {name for name, _ in filters} - self.refused
        return [name not in self.refused for name, _ in filters]

    async def unsubscribe(self, topic_filter: str) -> None:
        if not self.answers:
            raise BrokerUnavailable("no answer")
        self.subscribed = [one for one in self.subscribed if one[0] != topic_filter]

    async def lost(self) -> str:
        await self.ended.wait()
        return "lost"

    async def close(self) -> None:
        self.goodbye = True
        self.ended.set()

    def abort(self) -> None:
        self.ended.set()

    def confirm(self, key: int, refusal: str | None = None) -> None:
        self.session._events.confirmed(key, refusal)

    def topics(self) -> list[str]:
        return [item.topic for item in self.sent]


class ScriptedSession(SessionCore):
    def __init__(self, **settings: Any) -> None:
        super().__init__(
            settings=SessionSettings(
                urls=("mqtt://h",), client_id="a", **{"flush_timeout_s": 0.01, **settings}
            ),
            rng=random.Random(1),
        )
        self.links: list[ScriptedLink] = []
        self.pauses: list[float] = []
        self.failures: list[Exception] = []
        self.refused: set[str] = set()
        self.window = 100
        self.silent_links = 0

    @property
    def link(self) -> ScriptedLink:
        return self.links[-1]

    async def _connect(self) -> Link:
        if self.failures:
            raise self.failures.pop(0)
        link = ScriptedLink(self, refused=self.refused, window=self.window)
        link.answers = len(self.links) >= self.silent_links
        self.links.append(link)
        return self.link

    async def _pause(self, delay_s: float) -> None:
        self.pauses.append(delay_s)
        await asyncio.sleep(0)


async def spin() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def ignore(_message: Message) -> None:
    pass


Connected = Callable[..., Awaitable[ScriptedSession]]


@pytest.fixture
async def connect():
    made: list[ScriptedSession] = []

    async def run(**settings: Any) -> ScriptedSession:
        session = ScriptedSession(**settings)
        made.append(session)
        await session.start()
        await session.wait_connected()
        return session

    yield run
    for session in made:
        await session.abort()


def test_full_jitter_grows_to_its_cap():
    rng = random.Random(7)
    for attempt, limit in [(0, 0.5), (1, 1.0), (3, 4.0), (10, 30.0), (10_000, 30.0)]:
        waits = [full_jitter(attempt, 0.5, 30.0, rng) for _ in range(500)]
        assert 0 <= min(waits) < limit * 0.1
        assert limit * 0.9 < max(waits) <= limit


async def test_failed_tries_back_off_and_a_drop_keeps_its_distance(connect):
    session = ScriptedSession(reconnect_floor_s=1.0, backoff_base_s=0.25, backoff_cap_s=4.0)
    session.failures = [BrokerUnavailable("down") for _ in range(40)]
    async with session:
        await session.wait_connected()
        assert len(session.pauses) == 40
        assert min(session.pauses) >= 0.1
        assert max(session.pauses[-20:]) > 2.0
        assert max(session.pauses) <= 4.0
        session.pauses.clear()
        session.link.abort()
        await spin()
        assert session.pauses[0] >= 1.0
        assert session.stats.connects == 2


async def test_after_a_long_loss_members_are_back_in_seconds_and_not_all_at_once(connect):
    session = ScriptedSession()
    session.failures = [BrokerUnavailable("down") for _ in range(400)]
    async with session:
        await session.wait_connected()
        settled = session.pauses[20:]
        assert max(settled) <= 5.0
        for second in range(5):  # each of them has its share of the tries
            assert sum(second <= pause < second + 1 for pause in settled) > len(settled) * 0.1


async def test_a_connection_that_lasted_begins_with_short_waits_again(monkeypatch):
    monkeypatch.setattr("broker.session.core._SETTLED_S", -1.0)
    session = ScriptedSession(reconnect_floor_s=0.0, backoff_base_s=0.25, backoff_cap_s=1000)
    session.failures = [BrokerUnavailable("down") for _ in range(20)]
    async with session:
        await session.wait_connected()
        for _ in range(20):
            session.pauses.clear()
            session.link.abort()
            await spin()
            assert session.pauses[0] <= 0.25


@pytest.mark.parametrize("error", [AccessDenied("no"), ConfigurationError("no")])
async def test_what_no_retry_can_mend_ends_the_session(error):
    session = ScriptedSession()
    session.failures = [BrokerUnavailable("down"), error]
    async with session:
        session.post("a", b"")
        with pytest.raises(type(error)):
            await session.wait_connected()
        with pytest.raises(type(error)):
            await session.publish("a", b"")
        assert session.links == []


async def test_a_publisher_learns_that_the_session_was_refused():
    session = ScriptedSession()
    session.failures = [BrokerUnavailable("down"), AccessDenied("no")]
    async with session:
        with pytest.raises(AccessDenied):
            await session.publish("a", b"")
        with pytest.raises(AccessDenied):
            await session.wait()


async def test_subscriptions_births_listeners_outbox_in_that_order(connect):
    session = ScriptedSession()
    await session.subscribe("t/#", ignore)
    session.announce("birth", lambda: b"born")
    session.post("task", b"")
    order: list[object] = []
    session.on_connection(lambda up: order.append((up, list(session.link.topics()))))
    async with session:
        await session.wait_connected()
        assert session.link.subscribed == [("t/#", 1)]
        assert session.link.topics() == ["birth", "task"]
        assert order == [(True, [])]


async def test_the_broker_may_lower_the_window(connect):
    session = ScriptedSession(window=10)
    session.window = 2
    async with session:
        await session.wait_connected()
        for number in range(5):
            session.post(str(number), b"")
        assert session.link.topics() == ["0", "1"]
        session.link.confirm(1)
        assert session.link.topics() == ["0", "1", "2"]


async def test_what_was_under_way_is_sent_again(connect):
    session = await connect()
    session.post("1", b"")
    session.post("2", b"")
    session.link.confirm(1)
    session.link.abort()
    await spin()
    assert session.link.topics() == ["2"]
    assert session.stats.resent == 1


async def test_a_link_that_takes_nothing_loses_nothing(connect):
    session = await connect()
    session.link.takes = False
    session.post("1", b"")
    session.post("q0", b"", qos=0)
    assert session.stats.shed == 1
    session.link.abort()
    await spin()
    assert session.link.topics() == ["1"]


async def test_a_broker_that_stops_confirming_is_left(connect, eventually):
    session = await connect(ack_timeout_s=0.02)
    session.post("1", b"")
    await eventually(lambda: len(session.links) > 1 and session.link.topics() == ["1"])
    session.link.confirm(1)
    assert session.outbox_size == 0


async def test_a_refused_message_is_an_error_for_who_waits(connect):
    session = await connect()
    session.post("posted", b"")
    async with asyncio.TaskGroup() as group:
        group.create_task(_denied(session))
        await spin()
        session.link.confirm(1, "not authorized")
        session.link.confirm(2, "not authorized")
    assert session.stats.denied == 2
    assert session.outbox_size == 0


async def _denied(session: SessionCore) -> None:
    with pytest.raises(AccessDenied, match="not authorized"):
        await session.publish("waited", b"")


async def test_a_packet_over_the_brokers_limit_does_not_block_the_rest(connect):
    session = await connect()
    session.link.packet_limit = 10
    session.post("large", b"x" * 11)
    with pytest.raises(TooLarge):
        await session.publish("large", b"x" * 11)
    session.post("small", b"")
    assert session.link.topics() == ["small"]
    assert session.outbox_size == 1


async def test_a_message_that_breaks_every_connection_is_given_up(connect):
    session = await connect()
    session.post("large", bytes(POISON_BYTES + 1))
    session.post("small", b"")
    for _ in range(POISON_ATTEMPTS):
        session.link.abort()
        await spin()
    assert session.link.topics() == ["small"]


async def test_a_failing_birth_or_listener_harms_nothing_else(connect):
    session = ScriptedSession()

    def fail(*_: object) -> bytes:
        raise ValueError("not ours")

    session.announce("bad", fail)
    session.announce("none", lambda: None)
    session.announce("good", lambda: b"")
    session.on_connection(fail)  # type: ignore[arg-type]
    async with session:
        await session.wait_connected()
        assert session.link.topics() == ["good"]
        assert session.stats.handler_errors == 2


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not check():  # noqa: ASYNC110  # any condition, not an event
            await asyncio.sleep(0)


async def test_what_was_granted_once_is_not_given_up_for_one_refusal(connect):
    """A cluster of nats-servers without a leader refuses as if it forbade."""
    session = await connect()
    await session.subscribe("tasks/#", ignore)
    session.refused.add("tasks/#")
    session.link.ended.set()
    await until(lambda: len(session.links) == 3)
    assert not session.connected
    session.refused.clear()
    await session.wait_connected()
    assert "tasks/#" in session.link.granted
    assert len(session.links) < 7


async def test_what_is_refused_for_good_is_done_without_and_asked_for_again(connect, monkeypatch):
    monkeypatch.setattr(grants, "_ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(core, "_WATCH_PERIOD_S", 0.001)
    session = await connect()
    await session.subscribe("tasks/#", ignore)
    session.refused.add("tasks/#")
    session.link.ended.set()
    await until(lambda: len(session.links) == 7)  # five are doubted, the sixth is believed
    await session.wait_connected()
    session.refused.clear()
    await until(lambda: "tasks/#" in session.link.granted)
    assert len(session.links) == 7


async def test_a_refused_subscription_is_an_error_and_is_not_kept(connect):
    session = await connect()
    session.link.refused.add("secret")
    with pytest.raises(AccessDenied, match="secret"):
        await session.subscribe("secret", ignore)
    session.link.abort()
    await spin()
    assert session.link.subscribed == []


async def test_a_subscription_without_answer_begins_anew(connect):
    session = await connect()
    session.link.answers = False
    await session.subscribe("a", ignore)
    await spin()
    assert len(session.links) == 2
    assert session.link.subscribed == [("a", 1)]
    session.link.answers = False
    (lane,) = session._table
    await session.unsubscribe(lane.subscription)


async def test_a_restoration_without_answer_is_tried_again():
    session = ScriptedSession()
    await session.subscribe("a", ignore)
    session.silent_links = 1
    async with session:
        await session.wait_connected()
        assert len(session.links) == 2


async def test_stop_says_goodbye_and_abort_does_not(connect):
    session = await connect()
    await session.stop()
    assert session.link.goodbye
    rude = await connect()
    await rude.abort()
    assert not rude.link.goodbye
    assert len(rude.links) == 1


async def test_stop_gives_the_outbox_a_limited_time(connect):
    session = await connect(flush_timeout_s=0.01)
    session.post("never confirmed", b"")
    await session.stop()
    assert session.link.goodbye
    assert session.outbox_size == 0


async def test_a_cancelled_publish_is_taken_back(connect):
    session = await connect()
    session.link.takes = False
    async with asyncio.TaskGroup() as group:
        task = group.create_task(session.publish("a", b""))
        await spin()
        assert session.outbox_size == 1
        task.cancel()
    assert session.outbox_size == 0
