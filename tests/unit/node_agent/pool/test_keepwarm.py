"""How long idle instances stay, and which go first."""

import pytest

from node_agent.pool.keepwarm import Idle, KeepWarm, WarmthSettings, eviction_order

SETTINGS = WarmthSettings(worth=100.0, least_s=5.0, costly_s=1.0, costly_least_s=30.0, most_s=600.0)


def warmth(start_s, pauses=()):
    """Return one that has seen a start and pauses, and is idle since the returned time."""
    made, now = KeepWarm(SETTINGS), 0.0
    made.started(start_s)
    for pause in pauses:
        made.idle(now)
        now += pause
        made.called(now)
    made.idle(now)
    return made, now


@pytest.mark.parametrize(
    ("start_s", "keep_s"), [(0.01, 5.0), (0.2, 20.0), (1.0, 100.0), (60.0, 600.0)]
)
def test_without_experience_an_instance_stays_for_its_break_even_time(start_s, keep_s):
    assert warmth(start_s)[0].keep_s == keep_s


def test_a_costly_start_has_a_longer_least_stay():
    made = KeepWarm(WarmthSettings(worth=1.0, least_s=5.0, costly_s=1.0, costly_least_s=30.0))
    made.started(2.0)
    assert made.keep_s == 30.0


def test_short_pauses_let_it_go_soon_after_the_longest_usual_one():
    made, _ = warmth(2.0, [40.0] * 10)
    assert made.keep_s == pytest.approx(48.0)
    assert made.prewarm is None


def test_long_regular_pauses_let_it_go_at_once_and_start_it_ahead():
    made, idle_since = warmth(0.5, [300.0] * 10)
    assert made.keep_s == 5.0
    assert made.prewarm is None  # an uncertainty of 110 s is worth more than a start of 0.5 s
    made, idle_since = warmth(2.0, [300.0] * 10)
    assert made.prewarm is not None
    since, until = made.prewarm
    assert since == pytest.approx(idle_since + 250 - 4)
    assert until == pytest.approx(idle_since + 360)


def test_pauses_without_a_pattern_change_nothing():
    made, _ = warmth(0.5, [10.0, 2000.0, 90.0, 700.0, 30.0, 1200.0, 5.0, 400.0, 60.0])
    assert made.keep_s == 50.0
    assert made.prewarm is None


def test_what_is_at_work_is_not_started_ahead():
    made, now = warmth(2.0, [300.0] * 10)
    made.called(now + 10)
    assert made.prewarm is None


def idle(name, **fields):
    made = {"idle_s": 10.0, "start_s": 1.0, "memory_bytes": 10**8, **fields}
    return Idle(instance=name, **made)


def test_eviction_takes_the_longest_idle_the_cheapest_and_the_largest_first():
    assert [one.instance for one in eviction_order([idle("new"), idle("old", idle_s=90.0)])] == [
        "old",
        "new",
    ]
    assert [one.instance for one in eviction_order([idle("dear", start_s=9.0), idle("cheap")])] == [
        "cheap",
        "dear",
    ]
    some = [idle("small"), idle("large", memory_bytes=10**9), idle("unknown", memory_bytes=None)]
    assert [one.instance for one in eviction_order(some)] == ["large", "small", "unknown"]
