"""The outbox: order, window, bound, repetition."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.session.outbox import POISON_ATTEMPTS, POISON_BYTES, Outbox, Outgoing
from capability_schemas.errors import Overloaded


def item(name: str, **options) -> Outgoing:
    return Outgoing(name, b"", **options)


def send_all(outbox: Outbox, first_key: int = 1) -> dict[int, Outgoing]:
    sent: dict[int, Outgoing] = {}
    while (taken := outbox.take()) is not None:
        key = first_key + len(sent)
        outbox.sent(key, taken, at=float(key))
        sent[key] = taken
    return sent


def test_takes_in_order_up_to_the_window():
    outbox = Outbox(limit=10, window=2)
    for name in "abc":
        outbox.add(item(name))
    sent = send_all(outbox)
    assert [one.topic for one in sent.values()] == ["a", "b"]
    assert outbox.oldest_sent_at == 1.0
    assert outbox.confirm(1) is sent[1]
    assert outbox.confirm(1) is None
    assert outbox.oldest_sent_at == 2.0
    assert [one.topic for one in send_all(outbox, 3).values()] == ["c"]


def test_is_bounded_by_what_is_unconfirmed():
    outbox = Outbox(limit=2, window=1)
    outbox.add(item("a"))
    outbox.add(item("b"))
    send_all(outbox)
    with pytest.raises(Overloaded) as caught:
        outbox.add(item("c"))
    assert caught.value.detail["limit"] == 2
    outbox.add(item("birth", birth=True))
    outbox.confirm(1)
    outbox.withdraw(outbox.take() or pytest.fail("nothing"))
    assert len(outbox) <= 2


def test_a_lost_connection_returns_what_was_under_way_in_order():
    outbox = Outbox(limit=10, window=3)
    for name in "abcde":
        outbox.add(item(name))
    send_all(outbox)
    outbox.confirm(2)
    assert outbox.requeue() == []
    assert len(outbox) == 4
    sent = send_all(outbox)
    assert [one.topic for one in sent.values()] == ["a", "c", "d"]
    assert sent[1].attempts == 2


def test_births_go_first_and_supersede_what_waits_for_their_topic():
    outbox = Outbox(limit=10, window=10)
    outbox.add(item("state", retain=True))
    outbox.add(item("other"))
    outbox.put_first([item("state", retain=True, birth=True), item("claim", birth=True)])
    assert [one.topic for one in send_all(outbox).values()] == ["state", "claim", "other"]


def test_births_are_not_repeated():
    outbox = Outbox(limit=10, window=1)
    outbox.put_first([item("sent", birth=True), item("waiting", birth=True)])
    outbox.add(item("task"))
    send_all(outbox)
    outbox.requeue()
    assert [one.topic for one in send_all(outbox).values()] == ["task"]


async def test_a_superseded_message_with_a_waiter_is_kept():
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    outbox = Outbox(limit=10, window=10)
    outbox.add(item("state", retain=True, waiter=waiter))
    outbox.put_first([item("state", retain=True, birth=True)])
    assert len(outbox) == 2


def test_withdrawn_messages_are_not_sent_and_not_counted():
    outbox = Outbox(limit=10, window=1)
    first, second, third = item("a"), item("b"), item("c")
    for one in (first, second, third):
        outbox.add(one)
    send_all(outbox)
    outbox.withdraw(first)
    outbox.withdraw(second)
    outbox.withdraw(second)
    assert len(outbox) == 2  # "a" is under way, whatever its caller thinks
    outbox.requeue()
    assert [one.topic for one in send_all(outbox).values()] == ["c"]
    assert len(outbox) == 1


def test_withdrawing_what_was_confirmed_changes_nothing():
    outbox = Outbox(limit=10, window=1)
    outbox.add(item("a"))
    (sent,) = send_all(outbox).values()
    outbox.confirm(1)
    outbox.withdraw(sent)
    assert len(outbox) == 0


def test_a_large_message_that_breaks_every_connection_is_given_up():
    outbox = Outbox(limit=10, window=10)
    large = Outgoing("large", bytes(POISON_BYTES + 1))
    outbox.add(large)
    outbox.add(item("small"))
    for attempt in range(1, POISON_ATTEMPTS + 1):
        send_all(outbox)
        assert outbox.requeue() == ([large] if attempt == POISON_ATTEMPTS else [])
    assert [one.topic for one in send_all(outbox).values()] == ["small"]


def test_clear_returns_what_was_unconfirmed():
    outbox = Outbox(limit=10, window=1)
    for name in "abc":
        outbox.add(item(name))
    send_all(outbox)
    assert [one.topic for one in outbox.clear()] == ["a", "b", "c"]
    assert len(outbox) == 0


@given(st.lists(st.sampled_from(["add", "send", "confirm", "lose", "withdraw"]), max_size=60))
def test_every_message_is_sent_until_confirmed_and_first_sendings_keep_their_order(steps):
    outbox = Outbox(limit=1000, window=3)
    added: list[Outgoing] = []
    first_sendings: list[Outgoing] = []
    under_way: dict[int, Outgoing] = {}
    confirmed: set[Outgoing] = set()
    key = 0
    for step in steps:
        if step == "add":
            added.append(item(str(len(added))))
            outbox.add(added[-1])
        elif step == "send" and (taken := outbox.take()) is not None:
            key += 1
            if not taken.attempts:
                first_sendings.append(taken)
            outbox.sent(key, taken, at=float(key))
            under_way[key] = taken
        elif step == "confirm" and under_way:
            oldest = min(under_way)
            confirmed.add(under_way.pop(oldest))
            assert outbox.confirm(oldest) is not None
        elif step == "lose":
            outbox.requeue()
            under_way.clear()
        elif step == "withdraw" and added:
            outbox.withdraw(added[len(added) // 2])
        living = [one for one in added if one not in confirmed and not one.withdrawn]
        assert len(outbox) >= len(living)
    outbox.requeue()
    outbox.window = 1000
    rest = list(iter(outbox.take, None))
    assert {one for one in added if one not in confirmed and not one.withdrawn} == set(rest)
    order = [int(one.topic) for one in first_sendings]
    assert order == sorted(order)
