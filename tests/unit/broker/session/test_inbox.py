"""Routing of arrived messages to handlers."""

import asyncio

import pytest

from broker.lifecycle import Service
from broker.session.base import Message, SessionStats, Subscription
from broker.session.inbox import SubscriptionTable


class Host(Service):
    pass


@pytest.fixture
async def host():
    async with Host() as service:
        yield service


@pytest.fixture
def stats():
    return SessionStats()


@pytest.fixture
def table(host, stats):
    made = SubscriptionTable(stats=stats)
    made.open(lambda coro, role: host.spawn(coro, name=role))
    return made


class Collector:
    def __init__(self) -> None:
        self.got: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, message: Message) -> None:
        await self.gate.wait()
        self.got.append(message.topic)
        if message.payload == b"bad":
            raise ValueError("handler")


def subscription(topic_filter: str, handler: Collector, limit: int = 100, **more) -> Subscription:
    return Subscription(topic_filter, handler, 1, limit, **more)


async def settle(table: SubscriptionTable) -> None:
    for _ in range(50):
        await asyncio.sleep(0)
    assert all(lane.idle for lane in table)


async def test_every_matching_subscription_gets_the_message_in_order(table, stats):
    one, many = Collector(), Collector()
    table.add(subscription("a/1", one))
    table.add(subscription("a/#", many))
    for topic in ("a/1", "a/2", "b", "a/1"):
        table.deliver(Message(topic, b""))
    await settle(table)
    assert one.got == ["a/1", "a/1"]
    assert many.got == ["a/1", "a/2", "a/1"]
    assert stats.unmatched == 1


async def test_routes_follow_later_subscriptions(table):
    early, late = Collector(), Collector()
    first = subscription("a/+", early)
    table.add(first)
    table.deliver(Message("a/1", b""))
    await settle(table)
    table.add(subscription("a/+", late))
    table.deliver(Message("a/1", b""))
    await settle(table)
    assert (len(early.got), len(late.got)) == (2, 1)
    assert not table.remove(first)  # the filter is still wanted
    table.deliver(Message("a/1", b""))
    await settle(table)
    assert (len(early.got), len(late.got)) == (2, 2)


async def test_a_full_queue_drops_the_newest_and_says_so(table, stats):
    collector = Collector()
    collector.gate.clear()
    dropped: list[str] = []
    made = subscription(
        "#", collector, 2, on_overflow=lambda message: dropped.append(message.topic)
    )
    table.add(made)
    for topic in ("1", "2", "3", "4"):
        table.deliver(Message(topic, b""))
    collector.gate.set()
    await settle(table)
    assert collector.got == ["1", "2"]
    assert dropped == ["3", "4"]
    assert made.dropped == stats.overflowed == 2


async def test_a_failing_overflow_callback_harms_nobody(table, stats):
    collector = Collector()

    def fail(_message: Message) -> None:
        raise ValueError("callback")

    table.add(subscription("#", collector, 1, on_overflow=fail))
    table.deliver(Message("1", b""))
    table.deliver(Message("2", b""))
    await settle(table)
    assert collector.got == ["1"]
    assert stats.handler_errors == 1


async def test_a_failing_handler_is_counted_and_goes_on(table, stats, host):
    collector = Collector()
    made = subscription("#", collector)
    table.add(made)
    table.deliver(Message("1", b"bad"))
    table.deliver(Message("2", b""))
    await settle(table)
    assert collector.got == ["1", "2"]
    assert made.errors == stats.handler_errors == 1
    assert host.running


async def test_a_removed_subscription_gets_nothing_more(table, stats):
    collector = Collector()
    made = subscription("a", collector)
    table.add(made)
    table.deliver(Message("a", b""))
    assert table.remove(made)
    assert not table.remove(made)
    table.deliver(Message("a", b""))
    await settle(table)
    assert collector.got == []
    assert stats.unmatched == 1


async def test_a_handler_may_end_its_own_subscription(table, host):
    done = asyncio.Event()

    async def once(_message: Message) -> None:
        table.remove(made)
        await asyncio.sleep(0)
        done.set()

    made = Subscription("a", once, 1, 10)
    table.add(made)
    table.deliver(Message("a", b""))
    table.deliver(Message("a", b""))
    await done.wait()
    assert host.running


async def test_one_filter_asks_for_the_highest_quality_of_service(table):
    collector = Collector()
    table.add(Subscription("a", collector, 0, 10))
    table.add(Subscription("a", collector, 1, 10))
    assert table.filters() == {"a": 1}
