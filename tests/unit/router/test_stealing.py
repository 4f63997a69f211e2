from router.stealing import LEAST_GAIN_MS, Crowd, Held, Idle, Mover

NOW = 100_000


def crowd(node="a", *, given=3, places=1, run_ms=2_000.0, asked=(0, 10, 20)):
    held = [Held(("c", f"{node}-{at}"), NOW - 100 + at) for at in asked]
    return Crowd(node, places, given, run_ms, held)


def idle(node="b", wait_ms=0.0, run_ms=2_000.0):
    return Idle(node, wait_ms, run_ms)


def moved(crowds, takers, *, per_s=10.0, now=NOW):
    return [(one.key[1], one.to) for one in Mover(per_s=per_s).moves(crowds, takers, now)]


def test_the_idle_node_gets_the_latest_of_the_longest_queue() -> None:
    assert moved([crowd("a"), crowd("l", given=9)], [idle()]) == [("l-20", "b")]


def test_each_idle_node_gets_one_at_a_time() -> None:
    takers = [idle("b"), idle("d", wait_ms=100.0), idle("e")]
    assert moved([crowd("a"), crowd("l", given=9)], takers) == [("l-20", "b"), ("a-20", "e")]


def test_what_would_not_be_done_clearly_sooner_stays() -> None:
    assert moved([crowd(run_ms=100.0)], [idle(run_ms=100.0)]) == []
    assert moved([crowd()], [idle(wait_ms=3_500.0)]) == []
    assert moved([crowd()], [idle(run_ms=6_000.0)]) == []


def test_a_node_without_a_queue_keeps_what_it_has() -> None:
    assert moved([crowd(given=1)], [idle()]) == []
    assert moved([crowd(asked=())], [idle()]) == []


def test_a_wait_that_turned_out_long_counts_where_run_times_are_not_known() -> None:
    unknown = crowd(run_ms=None)
    assert moved([unknown], [idle(run_ms=None)]) == []
    later = NOW + int(LEAST_GAIN_MS)
    assert moved([unknown], [idle(run_ms=None)], now=later) == [("a-20", "b")]


def test_so_many_are_moved_in_a_second_and_no_more() -> None:
    mover = Mover(per_s=2.0)
    count = sum(len(mover.moves([crowd()], [idle()], NOW + ms)) for ms in range(0, 1_000, 10))
    assert count <= 4
    assert mover.moves([crowd()], [idle()], NOW + 2_000)


def test_it_can_be_switched_off() -> None:
    assert moved([crowd()], [idle()], per_s=0.0) == []
