"""Going on in mid-answer, and a second node beside a slow one."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from capability_schemas.errors import DeadlineExceeded, NodeLost, TaskCancelled
from router.commons import Budget, Commons
from router.events import (
    Action,
    Announce,
    CancelAsked,
    CancelNode,
    Choice,
    Choose,
    Chosen,
    End,
    Fenced,
    Invoke,
    Journaled,
    Learn,
    MarkShown,
    NodeGone,
    Observed,
    Phase,
    Tick,
)
from router.guard import GuardedMachine
from router.settings import RouterSettings
from support.journal import report

SETTINGS = RouterSettings(
    report_timeout_ms=100,
    cancel_grace_ms=50,
    deadline_grace_ms=30,
    finish_grace_ms=40,
    hang_ms=1_000,
    successor_ms=500,
    successor_pause_ms=100,
)


def offer(node: str, **fields: Any) -> Choice:
    known: dict[str, Any] = {"continues": "prefix", "model": "sha256:1"}
    return Choice(node, "f", "1.0.0", 0.9, **(known | fields))


A, B, C = offer("a"), offer("b"), offer("c")


def machine(
    *choices: Choice, hedge_after_ms: int | None = None, commons: Commons | None = None
) -> GuardedMachine:
    made = GuardedMachine(deadline=60_000, settings=SETTINGS, commons=commons)
    made.handle(Journaled(), 0)
    made.handle(Chosen(choices, hedge_after_ms=hedge_after_ms), 0)
    return made


def chunk(seq: int, data: Any, node: str = "a", attempt: int = 1) -> Observed:
    return Observed(node, "chunk", seq, attempt, json.dumps({"data": data}).encode())


def without_lessons(actions: list[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, Learn)]


def begun(*choices: Choice, pieces: tuple[Any, ...] = ("ab", "c")) -> GuardedMachine:
    task = machine(*choices)
    for seq, data in enumerate(pieces):
        assert task.handle(chunk(seq, data), 10) == [MarkShown()]
    return task


def test_the_next_node_is_announced_and_then_told_what_was_shown() -> None:
    task = begun(A, B)
    gone = without_lessons(task.handle(NodeGone("a", "offline"), 20))
    assert gone == [CancelNode("a", 1, "superseded"), Announce(B, 2)]
    assert task.phase is Phase.HANDING
    (invoke,) = task.handle(Fenced(2), 21)
    assert isinstance(invoke, Invoke)
    assert (invoke.choice, invoke.attempt, invoke.seq, invoke.announced) == (B, 2, 2, True)
    assert invoke.continuation is not None
    assert (invoke.continuation.shown, invoke.continuation.chunks) == (("abc",), 2)
    task.handle(chunk(2, "d", "b", 2), 30)
    (end,) = without_lessons(task.handle(Observed("b", "result", 3, 2, b"done"), 40))
    assert end == End(seq=3, attempt=2, payload=b"done")


def test_successors_that_were_lost_before_they_were_asked_do_not_count_as_tries() -> None:
    names = "abcdefgh"  # the wills of all but one come one after another: their broker was killed
    task = begun(*map(offer, names))
    for attempt, (lost, following) in enumerate(itertools.pairwise(names), 2):
        told = without_lessons(task.handle(NodeGone(lost, "offline"), 20))
        assert told[-1] == Announce(offer(following), attempt)
    (invoke,) = task.handle(Fenced(task.attempt), 30)
    assert isinstance(invoke, Invoke)
    assert invoke.choice.node == names[-1]


def test_what_the_old_node_said_before_the_fence_counts_and_nothing_after_it() -> None:
    task = begun(A, B)
    task.handle(NodeGone("a", "offline"), 20)
    assert task.handle(chunk(2, "late"), 21) == [MarkShown()]
    (invoke,) = task.handle(Fenced(2), 22)
    assert isinstance(invoke, Invoke)
    assert invoke.seq == 3
    assert invoke.continuation is not None
    assert invoke.continuation.shown == ("abclate",)
    assert task.handle(chunk(3, "too late"), 23) == []
    assert task.next_seq == 3


def test_an_end_of_the_old_node_before_the_fence_is_the_end() -> None:
    task = begun(A, B)
    task.handle(NodeGone("a", "offline"), 20)
    assert task.handle(Observed("a", "result", 2, 1, b"done"), 21) == [
        End(seq=2, attempt=1, payload=b"done")
    ]


def test_a_fence_that_does_not_come_back_is_put_up_again() -> None:
    task = begun(A, B)
    task.handle(NodeGone("a", "offline"), 20)
    assert task.handle(Tick(), task.wake_at or 0) == [Announce(B, 2)]
    assert isinstance(task.handle(Fenced(2), 500)[0], Invoke)
    assert task.handle(Fenced(2), 501) == []


def test_chunks_that_were_reported_are_waited_for_until_the_fence() -> None:
    task = begun(A, B, pieces=("x",))
    actions = without_lessons(task.handle(report("failed", code="node_lost", seq=2), 20))
    assert actions == [Announce(B, 2)]
    task.handle(chunk(1, "y"), 21)
    (invoke,) = task.handle(Fenced(2), 22)
    assert isinstance(invoke, Invoke)
    assert invoke.continuation is not None
    assert invoke.continuation.shown == ("xy",)


def test_a_chunk_that_was_reported_and_never_came_ends_it() -> None:
    task = begun(A, B, pieces=("x",))
    task.handle(report("failed", code="node_lost", reason="gone", seq=3), 20)
    (end,) = task.handle(Fenced(2), 22)
    assert isinstance(end, End)
    assert isinstance(end.error, NodeLost)
    assert end.seq == 3


@pytest.mark.parametrize(
    ("first", "other", "goes_on"),
    [
        (A, offer("b", model="sha256:2"), False),
        (offer("a", model=None), offer("b", model=None), False),
        (offer("a", continues="any"), offer("b", continues="any", model="sha256:2"), True),
        (offer("a", continues="skip"), offer("b", continues="skip"), True),
        (offer("a", continues="skip"), B, False),
        (A, replace(B, version="2.0.0"), False),
        (A, replace(B, function="g"), False),
        (offer("a", continues="restart"), offer("b", continues="restart"), False),
    ],
)
def test_who_may_go_on(first: Choice, other: Choice, goes_on: bool) -> None:
    task = begun(first, other)
    actions = without_lessons(task.handle(NodeGone("a", "offline"), 20))
    assert (actions[-1] == Announce(other, 2)) is goes_on


def test_the_same_model_goes_before_another_one() -> None:
    other, same = offer("b", continues="any", model="sha256:2"), offer("c", continues="any")
    task = begun(offer("a", continues="any"), other, same)
    assert task.handle(NodeGone("a", "offline"), 20)[-1] == Announce(same, 2)


def test_with_nobody_to_go_on_it_looks_again_for_a_while_and_says_why_it_ends() -> None:
    task = begun(A)
    assert task.handle(NodeGone("a", "offline"), 20)[-1] == Choose()
    assert task.handle(Chosen((), NodeLost("nobody")), 21) == []
    assert task.wake_at == 121
    assert task.handle(Tick(), 121) == [Choose()]
    assert task.handle(Chosen((A,)), 122) == [Announce(A, 2)]  # it is back
    task = begun(A)
    task.handle(NodeGone("a", "offline"), 20)
    fence = task.handle(Chosen((offer("b", model="sha256:2"),)), 700)[-1]
    assert isinstance(fence, Announce)
    assert fence.last
    (end,) = task.handle(Fenced(fence.attempt), 701)
    assert isinstance(end, End)
    assert end.error is not None
    assert "with the same model" in end.error.message


def test_a_beginning_that_is_no_longer_kept_is_not_gone_on_with() -> None:
    settings = SETTINGS.model_copy(update={"shown_bytes": 1024})
    task = GuardedMachine(deadline=60_000, settings=settings)
    task.handle(Journaled(), 0)
    task.handle(Chosen((A, B)), 0)
    for seq in range(20):
        task.handle(chunk(seq, "x" * 100), 1)
    fence = task.handle(NodeGone("a", "offline"), 2)[-1]
    assert isinstance(fence, Announce)
    assert fence.last


def test_a_node_that_falls_silent_in_mid_answer_is_lost() -> None:
    task = begun(A, B)
    assert task.wake_at == 1_010
    task.handle(Observed("a", "working", None, None, b""), 900)
    assert task.handle(Tick(), 1_010) == []
    actions = without_lessons(task.handle(Tick(), 1_900))
    assert actions == [CancelNode("a", 1, "superseded"), Announce(B, 2)]


def test_at_most_once_is_at_most_once() -> None:
    once = [offer(node, continues="none") for node in "abc"]
    task = machine(*once)
    assert isinstance(task.handle(report("refused", code="overloaded"), 5)[-1], Invoke)
    fence = task.handle(Tick(), 500)[-1]
    assert isinstance(fence, Announce)
    assert fence.last
    (end,) = task.handle(Fenced(fence.attempt), 501)
    assert isinstance(end, End)
    assert isinstance(end.error, NodeLost)


# ---- the router's own ends


@pytest.mark.parametrize("said", ["chunk", "result"])
def test_an_end_of_the_routers_own_waits_for_what_the_node_may_be_saying(said: str) -> None:
    task = begun(A)
    task.handle(CancelAsked(), 20)
    (fence,) = task.handle(Tick(), 70)
    assert isinstance(fence, Announce)
    assert (fence.attempt, fence.last, task.ended) == (2, True, False)
    if said == "result":
        (end,) = task.handle(Observed("a", "result", 2, 1, b"done"), 71)
        assert end == End(seq=2, attempt=1, payload=b"done")
    else:
        assert task.handle(chunk(2, "late"), 71) == [MarkShown()]
        (end,) = task.handle(Fenced(2), 72)
        assert isinstance(end, End)
        assert isinstance(end.error, TaskCancelled)
        assert (end.seq, end.attempt) == (3, 2)
    assert task.ended


def test_a_deadline_is_told_behind_a_fence_that_is_repeated() -> None:
    task = begun(A)
    task.handle(Tick(), 60_000)
    (fence,) = task.handle(Tick(), 60_030)
    assert task.handle(Tick(), task.wake_at or 0) == [fence]
    (end,) = task.handle(Fenced(2), 60_500)
    assert isinstance(end, End)
    assert isinstance(end.error, DeadlineExceeded)


# ---- a second node beside a slow one

FIRST, SECOND = (offer(node, continues="restart", idempotent=True) for node in "ab")


def commons(saved: int = 1) -> Commons:
    made = Commons.of(SETTINGS)
    for _ in range(20 * saved):
        made.hedges.earn()
    return made


def hedged() -> GuardedMachine:
    task = machine(FIRST, SECOND, hedge_after_ms=200, commons=commons())
    task.handle(report("admitted"), 1)
    assert task.wake_at == 200
    (invoke,) = task.handle(Tick(), 200)
    assert isinstance(invoke, Invoke)
    assert (invoke.choice, invoke.attempt, invoke.hold, invoke.announced) == (SECOND, 2, True, True)
    return task


def test_the_first_answer_of_the_first_node_ends_the_second() -> None:
    task = hedged()
    actions = without_lessons(task.handle(Observed("a", "result", 0, 1, b"done"), 300))
    assert actions == [
        CancelNode("b", 2, "superseded"),
        End(seq=0, attempt=1, payload=b"done"),
    ]


def test_the_answer_of_the_second_node_is_told_when_the_first_has_given_up() -> None:
    task = hedged()
    actions = without_lessons(task.handle(report("held", "b", 2, output="quick"), 300))
    assert actions == [CancelNode("a", 1, "overtaken")]
    gave_up = without_lessons(task.handle(report("failed", code="cancelled", seq=0), 310))
    assert gave_up == [Announce(SECOND, 2)]
    (end,) = task.handle(Fenced(2), 320)
    assert isinstance(end, End)
    assert end.draft is not None
    assert (end.attempt, end.draft.output, end.draft.step.node) == (2, b'"quick"', "b")


def test_the_first_node_may_answer_after_all() -> None:
    task = hedged()
    task.handle(report("held", "b", 2, output="quick"), 300)
    actions = without_lessons(task.handle(Observed("a", "chunk", 0, 1, b'{"data":"x"}'), 301))
    assert actions == [CancelNode("b", 2, "superseded"), MarkShown()]
    assert task.handle(report("held", "b", 2, output="quick"), 302) == []


def test_a_first_node_that_does_not_give_up_is_passed_over() -> None:
    task = hedged()
    task.handle(report("held", "b", 2, output="quick"), 300)
    actions = without_lessons(task.handle(Tick(), task.wake_at or 0))
    assert actions == [CancelNode("a", 1, "superseded"), Announce(SECOND, 2)]
    assert isinstance(task.handle(Fenced(2), 1_000)[-1], End)


def test_the_second_node_takes_the_place_of_a_first_that_is_lost() -> None:
    task = hedged()
    actions = without_lessons(task.handle(NodeGone("a", "offline"), 250))
    assert actions == [CancelNode("a", 1, "superseded"), Announce(SECOND, 2)]
    assert task.handle(Fenced(2), 251) == []
    (end,) = without_lessons(task.handle(report("held", "b", 2, output=1), 300))
    assert isinstance(end, End)
    assert end.draft is not None


def test_the_loss_or_refusal_of_the_second_node_changes_nothing() -> None:
    for event in (NodeGone("b", "offline"), report("refused", "b", 2, code="overloaded")):
        task = hedged()
        assert without_lessons(task.handle(event, 250)) == []
        (end,) = without_lessons(task.handle(Observed("a", "result", 0, 1, b"done"), 300))
        assert isinstance(end, End)


@pytest.mark.parametrize(
    ("choices", "after_ms", "saved"),
    [
        ((FIRST, SECOND), None, 1),
        ((FIRST, SECOND), 200, 0),
        ((FIRST, replace(SECOND, idempotent=False)), 200, 1),
        ((replace(FIRST, idempotent=False), SECOND), 200, 1),
        ((FIRST, replace(SECOND, version="2.0.0")), 200, 1),
    ],
)
def test_nobody_is_asked_beside_it(choices: Any, after_ms: int | None, saved: int) -> None:
    task = machine(*choices, hedge_after_ms=after_ms, commons=commons(saved))
    task.handle(report("admitted"), 1)
    assert without_lessons(task.handle(Tick(), 200)) == []


# ---- budgets


def test_retries_are_a_share_of_the_tasks_and_a_few_a_second() -> None:
    budget = Budget(share=0.2, least_per_s=1.0, saved=10)
    assert sum(budget.take(0) for _ in range(100)) == 10
    for _ in range(20):
        budget.earn()
    assert sum(budget.take(0) for _ in range(100)) == 4
    assert sum(budget.take(3_000) for _ in range(100)) == 3
    assert sum(budget.take(1_000_000) for _ in range(100)) == 10
    assert budget.refused > 0


def test_an_outage_is_not_answered_with_twice_the_work() -> None:
    shared = replace(Commons.of(SETTINGS), retries=Budget(share=0.0, least_per_s=0.2, saved=2))
    outcomes = []
    for _ in range(5):
        task = machine(A, B, commons=shared)
        actions = task.handle(NodeGone("a", "offline"), 10)
        last = actions[-1]
        assert isinstance(last, Announce)
        outcomes.append(last.last)
    assert outcomes == [False, False, True, True, True]
