"""Admission: room, deadlines, order."""

import pytest

from capability_schemas.errors import DeadlineExceeded, Overloaded
from node_agent.queue import AdmissionQueue, Entry


def entry(key, *, group="g", priority=5, deadline=100_000):
    return Entry(key=key, group=group, function="f", priority=priority, deadline=deadline)


@pytest.fixture
def queue():
    made = AdmissionQueue(limit=3)
    made.configure("g", capacity=1)
    return made


def take_all(queue):
    taken = []
    while (one := queue.take()) is not None:
        taken.append(one.key)
        queue.finished(one.key, run_ms=None)
    return taken


def test_priority_goes_first_then_the_earlier_deadline_then_the_earlier_arrival(queue):
    queue.offer(entry("running"), now=0)
    queue.take()
    queue.offer(entry("late", deadline=90_000), now=0)
    queue.offer(entry("soon", deadline=50_000), now=0)
    queue.offer(entry("urgent", priority=9, deadline=99_000), now=0)
    queue.finished("running", run_ms=None)
    assert take_all(queue) == ["urgent", "soon", "late"]


def test_equal_entries_keep_their_order(queue):
    for key in ("a", "b", "c"):
        queue.offer(entry(key), now=0)
    assert take_all(queue) == ["a", "b", "c"]


def test_no_more_run_than_the_group_has_capacity(queue):
    queue.configure("g", capacity=2)
    for key in ("a", "b", "c"):
        queue.offer(entry(key), now=0)
    assert [queue.take().key, queue.take().key, queue.take()] == ["a", "b", None]
    queue.finished("a", run_ms=5)
    assert queue.take().key == "c"


def test_a_saturated_group_does_not_hold_up_another(queue):
    queue.configure("other", capacity=1)
    queue.offer(entry("a", priority=9), now=0)
    queue.offer(entry("b", priority=9), now=0)
    queue.offer(entry("c", group="other", priority=0), now=0)
    assert queue.take().key == "a"
    assert queue.take().key == "c"


def test_a_full_queue_refuses_and_says_when_to_come_back(queue):
    queue.offer(entry("running"), now=0)
    queue.take()
    for key in ("a", "b", "c"):
        queue.offer(entry(key), now=0)
    with pytest.raises(Overloaded) as refused:
        queue.offer(entry("d"), now=0)
    assert refused.value.retry_after_ms >= 50
    assert queue.waiting == 3


def test_what_finds_a_free_instance_needs_no_room_in_the_queue():
    queue = AdmissionQueue(limit=0)
    queue.configure("g", capacity=1)
    queue.offer(entry("a"), now=0)
    taken = queue.take()
    assert taken is not None
    assert taken.key == "a"
    with pytest.raises(Overloaded):
        queue.offer(entry("b"), now=0)


def test_a_deadline_that_has_passed_is_refused(queue):
    with pytest.raises(DeadlineExceeded):
        queue.offer(entry("a", deadline=1000), now=1000)
    assert queue.waiting == 0


def test_a_deadline_out_of_reach_is_refused_with_a_hint(queue):
    queue.offer(entry("first"), now=0)
    queue.take()
    queue.finished("first", run_ms=400)
    queue.offer(entry("running"), now=0)
    queue.take()
    assert queue.wait_ms("g") == 400
    with pytest.raises(Overloaded) as refused:
        queue.offer(entry("hasty", deadline=300), now=0)
    assert refused.value.retry_after_ms == 400
    assert queue.offer(entry("patient", deadline=500), now=0) == 400


def test_run_times_are_smoothed_and_shared_by_the_instances(queue):
    queue.configure("g", capacity=2)
    for run_ms in (100, 200):
        queue.offer(entry("a"), now=0)
        queue.take()
        queue.finished("a", run_ms=run_ms)
    for key in ("a", "b", "c"):
        queue.offer(entry(key), now=0)
    queue.take()
    queue.take()
    assert queue.wait_ms("g") == pytest.approx(120)


def test_expired_entries_are_taken_out(queue):
    queue.offer(entry("a", deadline=100), now=0)
    queue.offer(entry("b", deadline=200), now=0)
    assert queue.next_deadline == 100
    assert [one.key for one in queue.expired(now=150)] == ["a"]
    assert queue.next_deadline == 200
    assert take_all(queue) == ["b"]


def test_a_removed_entry_neither_runs_nor_counts(queue):
    queue.offer(entry("a"), now=0)
    queue.offer(entry("b"), now=0)
    removed = queue.remove("a")
    assert removed is not None
    assert removed.key == "a"
    assert queue.remove("a") is None
    assert queue.counts("f") == (0, 1)
    assert take_all(queue) == ["b"]


def test_a_key_that_left_may_come_back(queue):
    queue.offer(entry("a", priority=1), now=0)
    queue.remove("a")
    queue.offer(entry("a", priority=1), now=0)
    assert take_all(queue) == ["a"]
