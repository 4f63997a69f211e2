"""Refused subscriptions: by what a broker forbids, and by what it cannot do just now."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from broker.session import grants
from broker.session.base import SessionStats, Subscription
from broker.session.grants import Grants
from broker.session.inbox import SubscriptionTable
from capability_schemas.errors import BrokerUnavailable

OWN = "reply/pump-1/+/+"


async def ignore(_: Any) -> None:
    pass


class Broker:
    """One connection to a cluster that has no leader for a while; a `Link` as far as it goes.

    Args:
        leaderless: How many SUBSCRIBE with QoS 1 find it without.
        forbidden: What it never grants.
    """

    def __init__(self, *, leaderless: float, forbidden: frozenset[str] = frozenset()) -> None:
        self.leaderless = leaderless
        self._forbidden = forbidden
        self.asked: list[tuple[str, int]] = []

    async def subscribe(self, filters: Sequence[tuple[str, int]]) -> list[bool]:
        self.asked += filters
        return [self._grants(name, qos) for name, qos in filters]

    def _grants(self, name: str, qos: int) -> bool:
        if name in self._forbidden:
            return False
        if qos == 0:
            return True
        self.leaderless -= 1
        return self.leaderless < 0


def made(doubt_s: float = 60.0, *, qos: int = 1) -> Grants:
    table = SubscriptionTable(stats=SessionStats())
    table.open(lambda coro, _: asyncio.get_running_loop().create_task(coro))
    table.add(Subscription(OWN, ignore, qos, 10))
    return Grants(table=table, client_id="pump-1", doubt_s=doubt_s)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(grants, "_PAUSE_CAP_S", 0.002)


async def test_what_is_refused_for_want_of_a_leader_is_asked_for_until_there_is_one() -> None:
    broker: Any = Broker(leaderless=5)
    assert await asyncio.wait_for(made().subscribe(broker, OWN, doubted=False), 30)
    assert broker.asked.count((OWN, 1)) == 6
    assert broker.asked[-1] == (OWN, 1)


async def test_that_ends_with_the_broker_as_the_reason_never_with_rights() -> None:
    broker: Any = Broker(leaderless=float("inf"))
    with pytest.raises(BrokerUnavailable, match="with QoS 0 only, as a cluster without a leader"):
        await asyncio.wait_for(made(0.05).subscribe(broker, OWN, doubted=False), 30)


async def test_what_is_forbidden_is_refused_at_once() -> None:
    broker: Any = Broker(leaderless=0, forbidden=frozenset({OWN}))
    assert not await made().subscribe(broker, OWN, doubted=False)
    assert broker.asked == [(OWN, 1), (OWN, 0)]


async def test_a_filter_without_guarantee_is_refused_by_rights_only() -> None:
    broker: Any = Broker(leaderless=0, forbidden=frozenset({OWN}))
    assert not await made(qos=0).subscribe(broker, OWN, doubted=False)
    assert broker.asked == [(OWN, 0)]


async def test_a_connection_to_a_cluster_without_a_leader_is_given_up_for_another_try() -> None:
    held = made()
    broker: Any = Broker(leaderless=2)
    for _ in range(2):
        with pytest.raises(BrokerUnavailable, match="which it grants at other times"):
            await held.restore(broker)
    await held.restore(broker)
    assert broker.asked.count((OWN, 1)) == 3


async def test_it_is_not_given_up_for_ever() -> None:
    """Five connections in a row say so: then QoS 0 has to do, and QoS 1 is asked for again."""
    held = made()
    broker: Any = Broker(leaderless=float("inf"))
    tries = 0
    while True:
        tries += 1
        try:
            await held.restore(broker)
        except BrokerUnavailable:
            continue
        break
    assert tries == 6
    assert broker.asked[-1] == (OWN, 0)


async def test_what_is_forbidden_gives_up_no_connection() -> None:
    broker: Any = Broker(leaderless=0, forbidden=frozenset({OWN}))
    await made().restore(broker)
    assert broker.asked == [(OWN, 1), (OWN, 0)]
