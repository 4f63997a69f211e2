"""What several routers answered, shown as one answer."""

from foam.cli.several import summed_stats, told_best, waiting_of_all


def stats(router, **fields):
    given = {"live": 1, "waiting": 0, "accepted": 5, "ended": {"result": 4}, "nodes": 3}
    return {"router": router, "uptime_ms": 10, "route_ms": {"p50": 1}, **given, **fields}


def test_the_answer_of_one_router_stays_as_it_is():
    assert summed_stats({"router-1": stats("router-1")}) == stats("router-1")


def test_counters_are_summed_up_and_what_all_know_is_not():
    one, two = stats("router-1"), stats("router-2", live=2, ended={"result": 1, "cancelled": 7})
    total = summed_stats({"router-1": one, "router-2": two})
    assert (total["live"], total["accepted"], total["nodes"]) == (3, 10, 3)
    assert total["ended"] == {"result": 5, "cancelled": 7}
    assert total["routers"] == {"router-1": one, "router-2": two}
    assert "route_ms" not in total


def row(function, waiting, longest_ms, **fields):
    given = {"leave_per_s": 0.5, "priorities": {"5": waiting}, "clients": {"pump-1": waiting}}
    return {"function": function, "waiting": waiting, "longest_ms": longest_ms, **given, **fields}


def test_tasks_that_wait_with_any_router_are_shown():
    sunny = row("sun", 2, 5)
    room = {"limit": 8_000, "bytes": 10, "limit_bytes": 100}
    both = waiting_of_all(
        {
            "router-1": {**room, "waiting": 0, "functions": []},
            "router-2": {
                **room,
                "waiting": 3,
                "functions": [row("rain", 1, 900), row("sun", 2, 5)],
            },
            "router-3": {**room, "waiting": 2, "functions": [row("rain", 2, 700)]},
        }
    )
    assert (both["waiting"], both["limit"], both["limit_bytes"]) == (5, 24_000, 300)
    rain, sun = both["functions"]
    assert rain == row("rain", 3, 900, leave_per_s=1.0)
    assert sun == sunny


def told(phase="ended", **fields):
    return {
        "task": "t-1",
        "phase": phase,
        "node": None,
        "attempt": 0,
        "explanation": None,
        **fields,
    }


def test_the_router_that_had_a_task_tells_of_it():
    hearsay = told()
    own = told(node="edge-1", attempt=1, explanation={"by": "name"})
    for answers in ({"router-1": hearsay, "router-2": own}, {"router-2": own, "router-1": hearsay}):
        assert told_best(answers) == {**own, "router": "router-2"}


def test_an_end_counts_more_than_a_router_that_has_not_heard_of_it():
    before = told("invoked", node="edge-1", attempt=1, explanation={"by": "name"})
    after = told(node="edge-2", attempt=101, explanation={"by": "name"})
    assert told_best({"router-1": before, "router-2": after})["attempt"] == 101
