"""A task for which every node is full waits; one that has not begun may be given back."""

from dataclasses import replace
from typing import Any

import pytest

from capability_schemas.errors import (
    DeadlineExceeded,
    NoCapableNode,
    NodeLost,
    Overloaded,
    TaskCancelled,
)
from capability_schemas.invocation import Report
from router.events import (
    Announce,
    CancelAsked,
    Choice,
    Choose,
    Chosen,
    End,
    Event,
    Fenced,
    Invoke,
    Journaled,
    Learn,
    MoveAsked,
    NodeGone,
    Observed,
    Phase,
    Reported,
    Shed,
    TakeBack,
    Tick,
    Wait,
)
from router.guard import GuardedMachine
from router.settings import RouterSettings
from router.turns import Turn
from support.journal import journaled

SETTINGS = RouterSettings(report_timeout_ms=100, cancel_grace_ms=50, attempts=3)
A, B = Choice("a", "f", "1.0.0", 0.9), Choice("b", "f", "1.0.0", 0.8)
FULL = frozenset({("a", "f"), ("b", "f")})
BUSY = Chosen((), Overloaded("all are busy"), places=FULL, start_by=9_000)


class Task(GuardedMachine):
    """A machine whose lessons are of no interest here; each fence is back at once."""

    first: list[Any]

    def handle(self, event: Event, now: int) -> list[Any]:
        actions = super().handle(event, now)
        while actions and isinstance(fence := actions[-1], Announce):
            actions = actions[:-1] + super().handle(Fenced(fence.attempt), now)
        return [action for action in actions if not isinstance(action, Learn)]


def machine(chosen: Chosen, *, deadline: int = 10_000) -> Task:
    made = Task(deadline=deadline, settings=SETTINGS)
    made.handle(Journaled(), 0)
    made.first = made.handle(chosen, 0)
    return made


def report(status: Any, node: str = "a", attempt: int = 1, **fields: Any) -> Reported:
    return Reported(
        Report(task="t", client="c", attempt=attempt, node=node, status=status, **fields)
    )


FULL_NODE = report("refused", code="overloaded", retry_after_ms=300)


def error_of(actions: list[Any]) -> Any:
    (end,) = [action for action in actions if isinstance(action, End)]
    return end.error


def test_a_task_waits_for_whoever_is_full_and_goes_on_when_it_is_called() -> None:
    task = machine(BUSY)
    assert task.first == [Wait(FULL)]
    assert task.wake_at == 9_000
    assert task.handle(Chosen((B,)), 500) == [Invoke(B, 1, 0)]
    assert not task.waiting
    assert task.phase is Phase.INVOKED


def test_a_task_whose_busy_node_did_not_answer_waits_for_it_all_the_same() -> None:
    task = machine(Chosen((A,)), deadline=100_000)
    told = task.handle(Tick(), task.wake_at or 0)
    assert told[-1] == Choose()
    assert task.handle(BUSY, 2_000) == [Wait(FULL)]
    assert task.waiting
    (asked,) = task.handle(Chosen((A,)), 3_000)
    # Behind the fence, for it may be answering by now.
    assert asked == Invoke(A, 2, 0, announced=True)


def test_a_task_that_was_given_to_as_many_as_may_be_asked_waits_no_more() -> None:
    task = machine(Chosen((A,)), deadline=100_000)
    while task.turns.left:
        task.handle(Tick(), task.wake_at or 0)
        task.handle(Chosen((A,)), 0)
        task.handle(Fenced(task.attempt, "a"), 0)
    told = task.handle(Tick(), task.wake_at or 0)
    assert isinstance(error_of(told), NodeLost)


def test_it_may_have_to_wait_again() -> None:
    task = machine(BUSY)
    assert task.handle(BUSY, 500) == [Wait(FULL)]
    assert task.waiting


def test_it_looks_once_more_when_it_can_hardly_be_in_time_and_the_deadline_ends_it() -> None:
    task = machine(BUSY)
    assert task.handle(Tick(), 9_000) == [Choose()]
    assert task.wake_at == 10_000
    assert isinstance(error_of(task.handle(Tick(), 10_000)), DeadlineExceeded)
    assert not task.waiting


def test_the_client_can_cancel_what_waits() -> None:
    task = machine(BUSY)
    assert isinstance(error_of(task.handle(CancelAsked(), 1)), TaskCancelled)
    assert task.handle(Chosen((A,)), 2) == []


def test_what_waits_can_be_shed_and_nothing_else() -> None:
    error = Overloaded("no room", retry_after_ms=1_234)
    waiting = machine(BUSY)
    assert error_of(waiting.handle(Shed(error), 1)) is error
    assert waiting.handle(Shed(error), 2) == []
    running = machine(Chosen((A,)))
    assert running.handle(Shed(error), 1) == []
    assert not running.ended


def test_when_all_refuse_for_want_of_room_the_task_waits_for_them() -> None:
    task = machine(Chosen((A, B)))
    assert task.handle(FULL_NODE, 1) == [Invoke(B, 2, 0)]
    other = report("refused", "b", 2, code="overloaded")
    assert task.handle(other, 2) == [Wait(FULL)]


def test_it_waits_for_those_too_that_were_full_when_others_were_chosen() -> None:
    third = frozenset({("c", "f")})
    task = machine(Chosen((A,), places=third))
    assert task.handle(FULL_NODE, 1) == [Wait(third | {("a", "f")})]


def test_refusals_for_want_of_room_cost_no_attempts() -> None:
    task = machine(Chosen((A,)))
    for attempt in range(1, 10):  # three are allowed
        refusal = report("refused", attempt=attempt, code="overloaded")
        assert task.handle(refusal, attempt) == [Wait(frozenset({("a", "f")}))]
        assert task.handle(Chosen((A,)), attempt) == [Invoke(A, attempt + 1, 0)]


@pytest.mark.parametrize("floor", [1, 101])
def test_a_task_that_is_refused_for_ever_never_uses_the_numbers_of_another_router(
    floor: int,
) -> None:
    deadline = 3_600_000
    task = Task(deadline=deadline, settings=SETTINGS)
    task.turns.floor = floor
    task.handle(Journaled(), 0)
    now, actions = 0, task.handle(Chosen((A,)), 0)
    while not task.ended:
        assert kinds(actions) == ["Invoke"]
        assert task.handle(report("refused", attempt=task.attempt, code="overloaded"), now)
        if task.waiting:
            now += 100
        else:  # it has its own clock by now
            assert task.wake_at is not None
            now = task.wake_at
            assert kinds(task.handle(Tick(), now)) == ["Choose" if now < deadline else "End"]
        actions = task.handle(Chosen((A,)), now)
    assert now == deadline, "it is offered until its time is over"
    assert floor + 80 <= task.attempt < floor + 100


def test_a_task_whose_numbers_are_used_up_ends_within_its_generation() -> None:
    task = machine(Chosen((A, B)))
    task.turns.attempt = 90
    last = Turn("a", 90, A)
    task.turns.current = last
    end = error_of(task.handle(report("refused", attempt=90, code="overloaded"), 1))
    assert isinstance(end, Overloaded)
    assert task.attempt <= 100


@pytest.mark.parametrize("code", ["deadline_exceeded", "no_capable_node"])
def test_other_refusals_are_waited_out_by_nobody(code: str) -> None:
    assert error_of(machine(Chosen((A,))).handle(report("refused", code=code), 1)) is not None


def test_a_task_whose_node_sleeps_waits_for_it() -> None:
    asleep = NoCapableNode("asleep", retryable=True, wake_at=5_000)
    task = machine(Chosen((), asleep, places=frozenset({("a", "f")})))
    assert task.waiting
    away = machine(Chosen((), NoCapableNode("away", retryable=True)))
    assert away.ended


AT_A = frozenset({("a", "f")})
LOST = Chosen(
    (), NoCapableNode("just lost", retryable=True, wake_at=5_000), places=AT_A, start_by=5_000
)
AWAY = Chosen((), NoCapableNode("away", retryable=True))


def kinds(actions: list[Any]) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_a_task_whose_only_node_is_lost_with_it_waits_for_it_and_is_given_to_it_anew() -> None:
    task = machine(Chosen((A,)))
    task.handle(report("admitted"), 1)
    assert kinds(task.handle(NodeGone("a", "offline"), 10)) == ["CancelNode", "Choose"]
    assert task.handle(LOST, 11) == [Wait(AT_A)]
    assert task.wake_at == 5_000
    assert task.handle(Chosen((A,)), 2_000) == [Invoke(A, 2, 0, announced=True)]


def test_when_the_lost_node_does_not_come_back_its_loss_is_told() -> None:
    task = machine(Chosen((A,)))
    task.handle(NodeGone("a", "offline"), 10)
    task.handle(LOST, 11)
    assert task.handle(Tick(), 5_000) == [Choose()]
    assert isinstance(error_of(task.handle(AWAY, 5_001)), NodeLost)


def test_what_the_lost_node_had_under_way_ends_the_task_that_waits_for_it() -> None:
    task = machine(Chosen((A,)))
    task.handle(NodeGone("a", "offline"), 10)
    task.handle(LOST, 11)
    assert kinds(task.handle(Observed("a", "result", 0, 1, b"r"), 12)) == ["End"]
    assert not task.waiting
    assert task.handle(Chosen((A,)), 13) == []


def test_a_task_that_waits_for_a_lost_node_counts_its_attempts() -> None:
    task = machine(Chosen((A,)))
    for attempt in (1, 2):
        assert kinds(task.handle(NodeGone("a", "offline"), attempt))[-1] == "Choose"
        task.handle(LOST, attempt)
        again = [Invoke(A, attempt + 1, 0, announced=True)]
        assert task.handle(Chosen((A,)), attempt) == again
    assert isinstance(error_of(task.handle(NodeGone("a", "offline"), 3)), NodeLost)


def test_what_must_not_be_done_twice_does_not_wait_for_the_node_that_had_begun_it() -> None:
    task = machine(Chosen((replace(A, continues="none"),)))
    task.handle(report("admitted"), 1)
    assert isinstance(error_of(task.handle(NodeGone("a", "offline"), 10)), NodeLost)


def test_a_node_that_failed_with_the_task_is_not_asked_again_for_the_loss_of_another() -> None:
    task = machine(Chosen((A, B)))
    task.handle(report("failed", code="execution_failed"), 1)
    assert isinstance(error_of(task.handle(NodeGone("b", "offline"), 2)), NodeLost)


def test_nothing_waits_in_mid_answer() -> None:
    task = machine(Chosen((A,)))
    task.handle(Observed("a", "chunk", 0, 1, b"c"), 1)
    task.handle(report("failed", seq=1, code="node_lost"), 2)
    assert not task.waiting


def test_a_journaled_task_waits_after_a_restart() -> None:
    task = Task.restore(journaled(None), settings=SETTINGS, now=0)
    assert task.handle(Tick(), SETTINGS.settle_ms) == [Choose()]
    assert task.handle(BUSY, SETTINGS.settle_ms) == [Wait(FULL)]


# ---- moving


def admitted(*choices: Choice) -> Task:
    task = machine(Chosen(choices or (A, B)))
    task.handle(report("admitted"), 1)
    return task


def test_what_has_not_begun_is_asked_back_and_chosen_for_anew() -> None:
    task = admitted()
    assert task.movable
    assert task.handle(MoveAsked(), 2) == [TakeBack("a", 1)]
    assert task.handle(MoveAsked(), 2) == [], "once"
    assert task.handle(FULL_NODE, 3) == [Choose()]
    assert task.handle(Chosen((B,)), 4) == [Invoke(B, 2, 0)]


def test_a_node_that_has_begun_keeps_the_task() -> None:
    task = admitted()
    task.handle(MoveAsked(), 2)
    assert task.handle(report("admitted"), 3) == []
    assert not task.movable
    result = task.handle(Observed("a", "result", 0, 1, b"r"), 4)
    assert [type(action) for action in result] == [End]


def test_until_the_node_gives_it_back_the_task_is_the_nodes() -> None:
    task = admitted()
    task.handle(MoveAsked(), 2)
    assert task.node == "a"
    assert [type(one) for one in task.handle(Observed("a", "result", 0, 1, b"r"), 3)] == [End]
    assert task.handle(FULL_NODE, 4) == []


@pytest.mark.parametrize(
    "event",
    [
        Observed("a", "chunk", 0, 1, b"c"),
        Observed("a", "working", None, None, b"w"),
        CancelAsked(),
    ],
    ids=["chunk", "working", "cancelled"],
)
def test_what_has_begun_or_ends_is_not_asked_back(event: Event) -> None:
    task = admitted()
    task.handle(event, 2)
    assert not task.movable
    assert task.handle(MoveAsked(), 3) == []


def test_a_task_is_moved_twice_at_most() -> None:
    task = admitted()
    for attempt, choice in ((1, B), (2, A)):
        assert task.handle(MoveAsked(), 2)
        refusal = report("refused", task.node or "", attempt, code="overloaded")
        assert task.handle(refusal, 3) == [Choose()]
        task.handle(Chosen((choice,)), 4)
        task.handle(report("admitted", choice.node, attempt + 1), 5)
    assert not task.movable


def test_a_task_that_finds_nobody_after_a_move_waits() -> None:
    task = admitted()
    task.handle(MoveAsked(), 2)
    task.handle(FULL_NODE, 3)
    assert task.handle(BUSY, 4) == [Wait(FULL)]


def test_a_cascade_and_a_hedge_are_not_moved() -> None:
    cascade = machine(Chosen((A, replace(B, strength=2.0)), min_confidence=0.5))
    cascade.handle(report("admitted"), 1)
    assert not cascade.movable


def test_a_move_ends_in_an_error_when_the_node_is_lost_meanwhile() -> None:
    task = admitted(A)
    task.handle(MoveAsked(), 2)
    error = error_of(task.handle(report("failed", code="node_lost", reason="gone"), 3))
    assert isinstance(error, NodeLost)
