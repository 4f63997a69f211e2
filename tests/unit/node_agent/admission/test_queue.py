"""The admission queue: room, places, order, predicted waits."""

import pytest

from capability_schemas.errors import DeadlineExceeded, Overloaded
from node_agent.admission.queue import AGING_MS, URGENT_MS, AdmissionQueue, Entry


def entry(key, *, group="g", function="f", priority=5, deadline=100_000, **fields):
    return Entry(
        key=key, group=group, function=function, priority=priority, deadline=deadline, **fields
    )


@pytest.fixture
def queue():
    made = AdmissionQueue(limit=3)
    made.configure({"g": {"f": 1}})
    return made


def take(queue, now=0):
    taken = queue.take(now=now)
    return None if taken is None else taken.key


def take_all(queue, now=0):
    taken = []
    while (key := take(queue, now)) is not None:
        taken.append(key)
        queue.finished(key, run_ms=None)
    return taken


def test_priority_goes_first_then_the_earlier_deadline_then_the_earlier_arrival(queue):
    queue.offer(entry("running"), now=0)
    take(queue)
    queue.offer(entry("late", deadline=900), now=0)
    queue.offer(entry("soon", deadline=500), now=0)
    queue.offer(entry("urgent", priority=9, deadline=999), now=0)
    queue.finished("running", run_ms=None)
    assert take_all(queue) == ["urgent", "soon", "late"]


def test_a_deadline_that_is_far_away_lets_nothing_go_before_what_came_first(queue):
    queue.offer(entry("patient", deadline=900_000), now=0)
    queue.offer(entry("sooner", deadline=URGENT_MS + 100), now=50)
    queue.offer(entry("urgent", deadline=URGENT_MS - 1), now=90)
    assert take_all(queue) == ["urgent", "patient", "sooner"]


def test_equal_entries_keep_their_order(queue):
    for key in ("a", "b", "c"):
        queue.offer(entry(key), now=0)
    assert take_all(queue) == ["a", "b", "c"]


def test_what_has_waited_long_rises_above_what_came_later(queue):
    queue.offer(entry("old", priority=4, deadline=90_000), now=0)
    queue.offer(entry("new", priority=5, deadline=80_000), now=AGING_MS - 1)
    assert take(queue, AGING_MS - 1) == "new"
    queue.finished("new", run_ms=None)
    queue.offer(entry("newer", priority=5, deadline=95_000), now=AGING_MS)
    assert take_all(queue, AGING_MS) == ["old", "newer"]


def test_nothing_rises_above_the_highest_priority(queue):
    queue.offer(entry("old", priority=0, deadline=10_000_000), now=0)
    late = 20 * AGING_MS
    queue.offer(entry("urgent", priority=9, deadline=late + 900), now=late)
    queue.offer(entry("later", priority=9, deadline=late + 900), now=late)
    assert take_all(queue, late) == ["old", "urgent", "later"], "what is as high goes as it came"


def test_no_more_run_than_the_group_has_places(queue):
    queue.configure({"g": {"f": 2}})
    for key in ("a", "b", "c"):
        queue.offer(entry(key), now=0)
    assert [take(queue), take(queue), take(queue)] == ["a", "b", None]
    queue.finished("a", run_ms=5)
    assert take(queue) == "c"


def test_a_function_keeps_to_its_own_limit_in_a_shared_group(queue):
    queue.configure({"g": {"narrow": 1, "wide": 3}})
    for key in ("n1", "n2"):
        queue.offer(entry(key, function="narrow", priority=9), now=0)
    queue.offer(entry("w1", function="wide"), now=0)
    assert [take(queue), take(queue), take(queue)] == ["n1", "w1", None]
    assert queue.counts("narrow") == (1, 1)
    assert queue.concurrency_of("narrow") == 1
    assert queue.concurrency_of("wide") == 3
    assert queue.capacity_of("g") == 3


def test_what_waits_for_its_own_function_takes_no_room_from_another(queue):
    queue.configure({"g": {"narrow": 1, "wide": 3}})
    for key in ("n1", "n2", "n3", "n4"):
        queue.offer(entry(key, function="narrow"), now=0)
        take(queue)
    assert queue.waiting == 3  # as many as may
    assert queue.is_free("g", "wide")
    queue.offer(entry("w1", function="wide"), now=0)
    assert take(queue) == "w1"


def test_a_measured_limit_lowers_the_places_and_goes_away_again(queue):
    queue.configure({"g": {"f": 3}})
    queue.limit_places("g", 1)
    for key in ("a", "b"):
        queue.offer(entry(key), now=0)
    assert [take(queue), take(queue)] == ["a", None]
    assert queue.capacity == queue.concurrency_of("f") == 1
    queue.limit_places("g", None)
    assert take(queue) == "b"


def test_a_measured_limit_does_not_hold_up_what_something_running_waits_for(queue):
    queue.configure({"g": {"f": 2}})
    queue.limit_places("g", 1)
    queue.offer(entry("caller"), now=0)
    take(queue)
    queue.offer(entry("called", nested=True), now=0)
    assert take(queue) == "called"


def test_a_saturated_group_does_not_hold_up_another(queue):
    queue.configure({"g": {"f": 1}, "other": {"f2": 1}})
    queue.offer(entry("a", priority=9), now=0)
    queue.offer(entry("b", priority=9), now=0)
    queue.offer(entry("c", group="other", function="f2", priority=0), now=0)
    assert [take(queue), take(queue)] == ["a", "c"]


def test_a_full_queue_refuses_and_says_when_to_come_back(queue):
    queue.offer(entry("running"), now=0)
    take(queue)
    for key in ("a", "b", "c"):
        queue.offer(entry(key), now=0)
    with pytest.raises(Overloaded) as refused:
        queue.offer(entry("d"), now=0)
    assert refused.value.retry_after_ms >= 50
    assert queue.waiting == 3


def test_what_finds_a_free_place_needs_no_room_in_the_queue():
    queue = AdmissionQueue(limit=0)
    queue.configure({"g": {"f": 1}})
    queue.offer(entry("a"), now=0)
    assert take(queue) == "a"
    with pytest.raises(Overloaded):
        queue.offer(entry("b"), now=0)


def test_a_deadline_that_has_passed_is_refused(queue):
    with pytest.raises(DeadlineExceeded):
        queue.offer(entry("a", deadline=1000), now=1000)
    assert queue.waiting == 0


def test_a_deadline_out_of_reach_is_refused_with_a_hint(queue):
    queue.offer(entry("running", run_ms=400), now=0)
    take(queue)
    hasty = entry("hasty", deadline=300)
    assert queue.wait_ms(hasty, now=0) == 400
    with pytest.raises(Overloaded) as refused:
        queue.offer(hasty, now=0)
    assert refused.value.retry_after_ms == 400
    assert queue.offer(entry("patient", deadline=500), now=0) == 400
    with pytest.raises(Overloaded, match="longer than the time left"):
        queue.offer(entry("too long", deadline=500, least_ms=150), now=0)


def test_the_wait_counts_what_is_left_of_runs_and_only_what_goes_first(queue):
    queue.offer(entry("running", run_ms=400), now=0)
    take(queue)
    queue.offer(entry("sooner", deadline=900, run_ms=100), now=100)
    queue.offer(entry("later", deadline=60_000, run_ms=1000), now=100)
    assert queue.wait_ms(entry("x", deadline=950), now=100) == 300 + 100
    assert queue.wait_ms(entry("x", priority=9), now=100) == 300
    assert queue.wait_ms(entry("x", deadline=950), now=1000) == 100


def test_the_wait_is_for_the_first_of_several_places(queue):
    queue.configure({"g": {"f": 2}})
    queue.offer(entry("long", run_ms=500), now=0)
    queue.offer(entry("short", run_ms=200), now=0)
    assert [take(queue), take(queue)] == ["long", "short"]
    queue.offer(entry("next", run_ms=100), now=0)
    assert queue.wait_ms(entry("x"), now=0) == 300
    queue.limit_places("g", 1)
    assert queue.wait_ms(entry("x"), now=0) == 600


def test_runs_of_unknown_length_count_as_the_usual_one(queue):
    for run_ms in (100, 200):
        queue.offer(entry("a"), now=0)
        take(queue)
        queue.finished("a", run_ms=run_ms)
    queue.offer(entry("a"), now=0)
    take(queue)
    assert queue.wait_ms(entry("b"), now=0) == pytest.approx(120)


def test_hopeless_entries_are_taken_out_before_their_deadline(queue):
    queue.offer(entry("a", deadline=100), now=0)
    queue.offer(entry("b", deadline=400, least_ms=250), now=0)
    queue.offer(entry("c", deadline=200), now=0)
    assert queue.next_start_by == 100
    assert [one.key for one in queue.hopeless(now=150)] == ["a", "b"]
    assert queue.next_start_by == 200
    assert take_all(queue) == ["c"]


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


def test_a_group_nobody_offers_any_more_ends_its_work_and_is_forgotten(queue):
    queue.offer(entry("running"), now=0)
    take(queue)
    queue.offer(entry("waiting"), now=0)
    queue.configure({"new": {"f": 2}})
    assert queue.capacity == queue.concurrency_of("f") == 2
    assert queue.counts("f") == (1, 1)
    queue.finished("running", run_ms=1)
    assert take(queue) == "waiting"
    queue.finished("waiting", run_ms=1)
    with pytest.raises(KeyError):
        queue.capacity_of("g")
