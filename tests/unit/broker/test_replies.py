"""The order of reply events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.replies import AnswerText, ReplyOrder
from capability_schemas.reply import Accepted, Chunk, ErrorEvent, Result, Routed, Working

TASK = "job-1"
NOW = 1_000_000


def chunk(seq: int, attempt: int = 1, data: object = None) -> Chunk:
    return Chunk(task=TASK, at=NOW, seq=seq, attempt=attempt, data=data or f"c{seq}")


def result(seq: int, attempt: int = 1) -> Result:
    return Result(task=TASK, at=NOW, seq=seq, attempt=attempt, output="done", node="edge-1")


def accepted() -> Accepted:
    return Accepted(task=TASK, at=NOW, router="router-1", deadline=NOW + 1000)


def routed(attempt: int = 1) -> Routed:
    return Routed(
        task=TASK, at=NOW, node="edge-1", function="f", version="1.0.0", score=1, attempt=attempt
    )


def test_numbered_events_come_out_by_number():
    order = ReplyOrder()
    assert order.push(chunk(1), "edge-1") == []
    assert order.push(result(2), "edge-1") == []
    assert order.held == 2
    assert order.push(chunk(0), "edge-1") == [chunk(0), chunk(1), result(2)]
    assert order.ended
    assert order.push(chunk(3), "edge-1") == []


def test_repetitions_are_dropped():
    order = ReplyOrder()
    assert order.push(accepted(), "router-1") == [accepted()]
    assert order.push(accepted(), "router-1") == []
    assert order.push(routed(), "router-1") == [routed()]
    assert order.push(routed(), "router-1") == []
    assert order.push(routed(2), "router-1") == [routed(2)]
    assert order.push(chunk(0, attempt=2), "edge-1") == [chunk(0, attempt=2)]
    assert order.push(chunk(0), "edge-1") == []
    working = Working(task=TASK, at=NOW)
    assert order.push(working, "edge-1") == [working]


def test_a_superseded_attempt_is_ignored():
    order = ReplyOrder()
    order.push(chunk(0), "edge-1")
    order.push(chunk(2, data="stale and held"), "edge-1")
    assert order.push(chunk(1, attempt=2), "edge-2") == [chunk(1, attempt=2)]
    assert order.held == 0
    assert order.push(chunk(2, data="stale"), "edge-1") == []
    assert order.push(result(2, attempt=2), "edge-2") == [result(2, attempt=2)]


def test_the_router_may_repeat_an_earlier_attempt():
    order = ReplyOrder()
    order.push(accepted(), "router-1")
    assert order.push(chunk(2, attempt=2), "edge-2") == []
    assert order.push(chunk(0), "router-1") == [chunk(0)]
    assert order.push(chunk(1), "router-1") == [chunk(1), chunk(2, attempt=2)]


def test_the_routers_error_counts_whatever_the_attempt():
    order = ReplyOrder()
    order.push(accepted(), "router-1")
    order.push(chunk(0, attempt=3), "edge-2")
    end = ErrorEvent(task=TASK, at=NOW, seq=1, code="cancelled", message="cancelled")
    assert order.push(end, "router-1") == [end]


@given(st.permutations(range(8)), st.lists(st.integers(0, 7), max_size=8))
def test_any_order_of_arrival_gives_one_order(arrival, again):
    events = [*(chunk(seq) for seq in range(7)), result(7)]
    order, out = ReplyOrder(), []
    for seq in [*arrival[:4], *again, *arrival[4:]]:
        out += order.push(events[seq], "edge-1")
    assert out == events


def said(*pieces, output):
    answer = AnswerText()
    events: list[Chunk | Result] = [
        Chunk(task="t", at=1, seq=seq, data=data) for seq, data in enumerate(pieces)
    ]
    events.append(Result(task="t", at=1, seq=len(pieces), output=output))
    return [text for event in events if (text := answer.add(event))]


@pytest.mark.parametrize(
    ("pieces", "output", "expected"),
    [
        (("a ", "b ", "c"), "a b c", ["a ", "b ", "c"]),
        ((), "a b c", ["a b c"]),
        (("a ", "", "", ""), "a b c d", ["a ", "b c d"]),
        (("a ", "", "c"), "a b c", ["a ", "b c"]),
        (("", "b"), "ab", ["ab"]),
        (("a ", "b"), "in short: b", ["a ", "b"]),
        (("a ", {"n": 1}, "b"), {"n": 1}, ["a ", "b"]),
        (({"n": 1},), {"n": 1}, []),
    ],
    ids=["all", "none", "end", "middle", "beginning", "summary", "mixed", "objects"],
)
def test_the_result_makes_good_for_what_is_missing(pieces, output, expected):
    assert said(*pieces, output=output) == expected
