import pytest

from capability_schemas.capability import Resources
from capability_schemas.node import FunctionLoad
from router.waiting import AGING_MS, LEAD_MS, Drain, Waiter, WaitingRoom, allowance

PLACE = ("node", "f")


def waiter(name, client="c", *, priority=5, deadline=60_000, places=(PLACE,), size=1, since=0):
    return Waiter(
        key=(client, name),
        client=client,
        priority=priority,
        deadline=deadline,
        places=frozenset(places),
        size_bytes=size,
        since=since,
    )


def room(limit=1_000, limit_bytes=1_000_000, **weights):
    return WaitingRoom(
        limit=limit, limit_bytes=limit_bytes, weight=lambda client: weights.get(client, 1.0)
    )


def calls(waiting, times, now=0, place=PLACE):
    called = [waiting.call(place, now) for _ in range(times)]
    return [one.key[1] if one else None for one in called]


def test_of_one_client_the_nearest_deadline_goes_first() -> None:
    waiting = room()
    for name, deadline in (("late", 9_000), ("soon", 1_000), ("then", 5_000)):
        waiting.enter(waiter(name, deadline=deadline), 0)
    assert calls(waiting, 4) == ["soon", "then", "late", None]
    assert len(waiting) == 0
    assert waiting.size_bytes == 0


def test_a_quiet_client_waits_for_no_more_than_one_task_of_a_noisy_one() -> None:
    waiting = room(limit=10_000)
    for number in range(1_000):
        waiting.enter(waiter(f"n{number}", "noisy", deadline=1_000), 0)
    calls(waiting, 10)
    waiting.enter(waiter("quiet", "quiet", deadline=90_000), 0)
    assert calls(waiting, 1) == ["quiet"]


def test_a_client_that_asks_again_and_again_gets_its_share_and_no_more() -> None:
    waiting = room()
    for number in range(100):
        waiting.enter(waiter(f"n{number}", "noisy"), 0)
    served = []
    for turn in range(20):
        if ("one", f"o{turn - 1}") not in waiting:
            waiting.enter(waiter(f"o{turn}", "one"), 0)
        served += calls(waiting, 1)
    assert 9 <= sum(name.startswith("n") for name in served) <= 11


def test_clients_share_by_weight() -> None:
    waiting = room(heavy=3.0, light=0.5)
    for number in range(200):
        for client in ("heavy", "usual", "light"):
            waiting.enter(waiter(f"{client}-{number}", client), 0)
    served = [name.partition("-")[0] for name in calls(waiting, 180)]
    shares = {client: served.count(client) for client in ("heavy", "usual", "light")}
    assert shares["heavy"] == pytest.approx(120, abs=4)
    assert shares["usual"] == pytest.approx(40, abs=3)
    assert shares["light"] == pytest.approx(20, abs=3)


def test_the_higher_priority_goes_first_and_what_waits_rises() -> None:
    waiting = room()
    waiting.enter(waiter("low", "a", priority=3), 0)
    waiting.enter(waiter("high", "b", priority=4), 0)
    assert calls(waiting, 1) == ["high"]
    later = 3 * AGING_MS
    waiting.enter(waiter("fresh", "b", priority=5, since=later), later)
    assert calls(waiting, 2, now=later) == ["low", "fresh"]


def test_a_task_that_comes_back_keeps_what_it_has_risen() -> None:
    waiting = room()
    waiting.enter(waiter("back", "a", priority=1, since=0), 5 * AGING_MS)
    waiting.enter(waiter("fresh", "b", priority=5, since=5 * AGING_MS), 5 * AGING_MS)
    assert calls(waiting, 1, now=5 * AGING_MS) == ["back"]


def test_only_who_can_use_a_place_is_called_for_it() -> None:
    waiting = room()
    other = ("other", "f")
    waiting.enter(waiter("here", "a"), 0)
    waiting.enter(waiter("there", "a", places=[other], deadline=1), 0)
    waiting.enter(waiter("both", "b", places=[PLACE, other, ("third", "g")]), 0)
    assert waiting.waits_for(PLACE)
    assert calls(waiting, 2, place=("third", "g")) == ["both", None]
    assert calls(waiting, 2, place=other) == ["there", None]
    assert calls(waiting, 2) == ["here", None]
    assert waiting.places == []


def test_a_full_room_sheds_the_latest_of_the_fullest_client_at_the_lowest_priority() -> None:
    waiting = room(limit=4)
    for name, client, priority in (
        ("a1", "a", 2),
        ("a2", "a", 2),
        ("b1", "b", 2),
        ("c1", "c", 7),
    ):
        assert waiting.enter(waiter(name, client, priority=priority), 0) == []
    shed = waiting.enter(waiter("d1", "d", priority=5), 0)
    assert [one.key[1] for one in shed] == ["a2"]
    assert len(waiting) == 4


def test_a_newcomer_of_the_lowest_priority_is_refused_itself() -> None:
    waiting = room(limit=2)
    waiting.enter(waiter("a1", "a", priority=2), 0)
    waiting.enter(waiter("b1", "b", priority=3), 0)
    low = waiter("low", "c", priority=1)
    assert waiting.enter(low, 0) == [low]
    assert waiting.victim("c", 2) is None, "as many as the fullest"


def test_a_client_cannot_keep_others_out_by_filling_the_room() -> None:
    waiting = room(limit=10)
    for number in range(10):
        waiting.enter(waiter(f"n{number}", "noisy"), 0)
    assert [one.key[1] for one in waiting.enter(waiter("q", "quiet"), 0)] == ["n9"]
    more = waiter("n10", "noisy")
    assert waiting.enter(more, 0) == [more]


def test_bytes_are_bounded_too() -> None:
    waiting = room(limit_bytes=1_000)
    waiting.enter(waiter("a", "a", size=500, priority=1), 0)
    waiting.enter(waiter("b", "b", size=300, priority=2), 0)
    shed = waiting.enter(waiter("c", "c", size=800, priority=9), 0)
    assert [one.key[1] for one in shed] == ["a", "b"]
    assert 800 < waiting.size_bytes <= 1_000
    huge = waiter("d", "d", size=1_001, priority=9)
    assert huge in waiting.enter(huge, 0)


@pytest.mark.parametrize(
    ("priority", "size", "tasks"), [(6, 2_500, 10_000), (5, 2_500, 10_000), (6, 1_000_000, 64)]
)
def test_nobody_has_the_tasks_of_others_shed_by_many_large_or_important_ones(
    priority, size, tasks
) -> None:
    waiting = room(limit=8_000, limit_bytes=60_000_000)
    for number in range(2_000):
        waiting.enter(waiter(f"t{number}", f"good-{number % 20}", size=2_500), 0)
    shed = []
    for number in range(tasks):
        shed += waiting.enter(waiter(f"n{number}", "noisy", priority=priority, size=size), 0)
    assert shed
    assert {one.client for one in shed} == {"noisy"}


def test_a_client_with_less_takes_from_who_has_most_whatever_the_priorities() -> None:
    waiting = room(limit=10)
    for number in range(10):
        waiting.enter(waiter(f"n{number}", "noisy", priority=9), 0)
    shed = [one for n in range(8) for one in waiting.enter(waiter(f"q{n}", "quiet", priority=1), 0)]
    assert [one.client for one in shed] == ["noisy"] * 5 + ["quiet"] * 3


def test_nobody_is_shed_for_a_task_that_finds_no_room_even_so() -> None:
    waiting = room(limit_bytes=10_000)
    waiting.enter(waiter("small", "a", size=1_000, priority=1), 0)
    waiting.enter(waiter("large", "b", size=8_000, priority=5), 0)
    newcomer = waiter("huge", "c", size=9_500, priority=4)
    assert waiting.enter(newcomer, 0) == [newcomer]
    assert len(waiting) == 2


def test_those_that_wait_for_the_same_share_one_set_of_places_which_counts_once() -> None:
    waiting = room()
    places = [(f"node-{number}", "f") for number in range(128)]
    tasks = [waiter(f"t{number}", places=places, size=1_000) for number in range(50)]
    for task in tasks:
        waiting.enter(task, 0)
    assert all(task.places is tasks[0].places for task in tasks)
    assert 50_000 + 128 * 56 < waiting.size_bytes < 80_000
    other = waiter("other", places=places[1:], size=1_000)
    before = waiting.size_bytes
    waiting.enter(other, 0)
    assert waiting.size_bytes - before > 1_000 + 127 * 56
    for task in [*tasks, other]:
        waiting.leave(task.key)
    assert waiting.size_bytes == 0


def test_the_time_to_come_back_follows_the_measured_rate() -> None:
    drain = Drain()
    for at in range(0, 20_000, 100):  # ten a second
        drain.left(at)
    assert drain.rate_s(20_000) == pytest.approx(10, rel=0.1)
    first, second = drain.retry_ms(20_000), drain.retry_ms(20_000)
    assert first == pytest.approx(100, rel=0.2)
    assert second == pytest.approx(2 * first, rel=0.2)
    assert max(drain.retry_ms(20_000) for _ in range(2_000)) <= 60_000


def test_a_clock_set_back_does_not_make_the_time_longer() -> None:
    drain = Drain()
    drain.left(10_000_000)
    drain.retry_ms(10_000_000)
    assert drain.retry_ms(0) <= 60_000


def test_clients_hear_ever_less_often_that_they_wait() -> None:
    waiting = room()
    waiting.enter(waiter("t"), 0)
    heard = [at for at in range(0, 62_000, 500) if waiting.reminded(at)]
    assert heard == [1_000, 2_000, 4_000, 8_000, 16_000, 31_000, 46_000, 61_000]


def test_a_task_that_is_called_in_vain_again_and_again_is_reminded_of_all_the_same() -> None:
    waiting, heard = room(), []
    for at in range(0, 62_000, 300):
        waiting.leave(("c", "t"))
        waiting.enter(waiter("t"), at)
        heard += [at // 1_000] if waiting.reminded(at + 299) else []
    assert heard == [0, 1, 3, 7, 15, 30, 45, 60]


def test_those_that_can_reach_nobody_are_found() -> None:
    waiting = room()
    waiting.enter(waiter("a"), 0)
    waiting.enter(waiter("b", places=[PLACE, ("other", "f")]), 0)
    gone = waiting.out_of_reach(lambda place: place != PLACE)
    assert [one.key[1] for one in gone] == ["a"]


@pytest.mark.parametrize(
    ("run_ms", "places", "given"), [(None, 2, 3), (LEAD_MS * 2, 4, 6), (10_000, 4, 4), (0.1, 2, 66)]
)
def test_a_node_is_given_no_more_ahead_than_it_does_in_a_moment(run_ms, places, given) -> None:
    load = FunctionLoad(concurrency=places, total_ms=run_ms)
    assert allowance(load, Resources()) == given


def test_a_node_that_boasts_is_not_given_everything() -> None:
    assert allowance(FunctionLoad(concurrency=2**40, total_ms=10_000), Resources()) <= 512
    assert allowance(None, Resources(concurrency=1_000)) <= 512


def test_the_record_tells_the_places_of_a_node_that_has_told_no_load() -> None:
    assert allowance(None, Resources(concurrency=4)) == 5


def test_the_room_tells_who_waits_for_what() -> None:
    waiting = room(limit=9)
    waiting.enter(waiter("a1", "a", priority=2), 0)
    waiting.enter(waiter("b1", "b", priority=2), 0)
    told = waiting.describe(500)
    assert (told["waiting"], told["limit"], told["bytes"]) == (2, 9, waiting.size_bytes)
    (row,) = told["functions"]
    assert row["function"] == "f"
    assert row["longest_ms"] == 500
    assert row["clients"] == {"a": 1, "b": 1}
    assert row["priorities"] == {"2": 2}
