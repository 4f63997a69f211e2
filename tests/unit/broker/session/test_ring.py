"""The list of brokers of a session: who is next, who is in use, when nobody is left."""

import pytest

from broker.session.ring import BrokerRing, BrokerStanding
from broker.session.settings import BrokerUrl

A, B, C = (BrokerUrl.parse(f"mqtt://{name}") for name in "abc")


def ring_of(*urls: BrokerUrl) -> BrokerRing:
    return BrokerRing(urls)


def tried(ring: BrokerRing, count: int) -> list[BrokerUrl]:
    found = []
    for _ in range(count):
        found.append(ring.next())
        ring.failed("connection refused")
    return found


def test_they_are_tried_in_their_order_and_then_again() -> None:
    assert tried(ring_of(A, B, C), 7) == [A, B, C, A, B, C, A]


def test_after_a_loss_the_one_behind_is_next_and_nobody_goes_back_before() -> None:
    ring = ring_of(A, B, C)
    tried(ring, 1)
    assert ring.next() == B
    ring.connected()
    assert [one.state for one in ring.standings] == ["down", "in use", "not tried"]
    ring.lost("reset by peer", had_lasted=True)
    assert tried(ring, 3) == [C, A, B]


def test_a_round_is_over_when_each_was_tried() -> None:
    ring = ring_of(A, B)
    over = []
    for _ in range(4):
        tried(ring, 1)
        over.append(ring.round_is_over)
    assert over == [False, True, False, True]


def test_a_connection_that_lasted_begins_a_new_round_and_a_short_one_does_not() -> None:
    ring = ring_of(A, B)
    for had_lasted, over in ((True, False), (True, False), (False, False), (False, True)):
        ring.next()
        ring.connected()
        ring.lost("closed", had_lasted=had_lasted)
        assert ring.round_is_over is over


def test_of_one_broker_every_try_is_a_round() -> None:
    ring = ring_of(A)
    ring.next()
    ring.connected()
    ring.lost("closed", had_lasted=True)
    assert ring.round_is_over


def test_only_when_all_refuse_there_is_nobody_left() -> None:
    ring = ring_of(A, B)
    ring.next()
    ring.failed("bad password", refused=True)
    assert not ring.all_refuse
    ring.next()
    ring.failed("connection refused")
    assert not ring.all_refuse
    for _ in range(2):
        ring.next()
        ring.failed("bad password", refused=True)
    assert ring.all_refuse


def test_a_broker_that_has_served_us_is_believed_when_it_refuses_twice() -> None:
    ring = ring_of(A)
    ring.next()
    assert ring.failed("bad password", refused=True)
    ring.next()
    ring.connected()
    ring.lost("closed", had_lasted=True)
    ring.next()
    assert not ring.failed("not authorized", refused=True)
    assert not ring.all_refuse
    ring.next()
    assert ring.failed("not authorized", refused=True)
    assert ring.all_refuse


def test_it_says_what_is_wrong_with_which() -> None:
    ring = ring_of(A, B)
    ring.next()
    ring.failed("connection refused")
    ring.next()
    ring.connected()
    assert ring.troubles() == "mqtt://a:1883: connection refused"
    assert ring.standings[1] == BrokerStanding("mqtt://b:1883", "in use")


def test_of_one_broker_it_says_only_why() -> None:
    ring = ring_of(A)
    ring.next()
    ring.failed("connection refused")
    assert ring.troubles() == "connection refused"


@pytest.mark.parametrize("refused", [False, True])
def test_no_password_is_said(refused: bool) -> None:
    ring = ring_of(BrokerUrl.parse("mqtt://pump:hush@a"), B)
    ring.next()
    ring.failed("no", refused=refused)
    assert "hush" not in ring.troubles() + repr(ring.standings)
