from dataclasses import replace
from typing import Any

import pytest

from capability_schemas.errors import (
    DeadlineExceeded,
    ExecutionFailed,
    NoCapableNode,
    NodeLost,
    Overloaded,
    TaskCancelled,
)
from router.commons import Commons
from router.events import (
    Action,
    Announce,
    CancelAsked,
    CancelNode,
    Choice,
    Choose,
    Chosen,
    End,
    Event,
    Fenced,
    Invoke,
    Journaled,
    Learn,
    MarkShown,
    NodeGone,
    Observed,
    Phase,
    SendAccepted,
    Tick,
    Uninvoked,
    Unjournaled,
)
from router.guard import GuardedMachine
from router.patience import ReportPatience
from router.settings import RouterSettings
from support.journal import report

SETTINGS = RouterSettings(
    report_timeout_ms=100, cancel_grace_ms=50, deadline_grace_ms=30, finish_grace_ms=40
)
A, B = Choice("a", "f", "1.0.0", 0.9), Choice("b", "f", "1.0.0", 0.8)


class Task(GuardedMachine):
    """A machine that sets aside what it has learnt; each fence is back at once."""

    def handle(self, event: Event, now: int) -> list[Action]:
        actions = super().handle(event, now)
        while actions and isinstance(fence := actions[-1], Announce):
            behind = super().handle(Fenced(fence.attempt), now)
            actions = actions[:-1] + [
                replace(one, announced=False) if isinstance(one, Invoke) else one for one in behind
            ]
        self.learnt = [action for action in actions if isinstance(action, Learn)]
        return [action for action in actions if not isinstance(action, Learn)]


def machine(*choices: Choice, deadline: int = 10_000) -> Task:
    made = Task(deadline=deadline, settings=SETTINGS)
    if choices:
        made.handle(Journaled(), 0)
        made.handle(Chosen(choices), 0)
    return made


def chunk(seq: int, node: str = "a", attempt: int = 1) -> Observed:
    return Observed(node, "chunk", seq, attempt, b"chunk-%d" % seq)


def end_of(actions: list[Action]) -> End:
    ends = [action for action in actions if isinstance(action, End)]
    assert len(ends) == 1
    return ends[0]


def test_journaled_then_chosen_then_streamed_then_ended() -> None:
    task = machine()
    assert task.handle(Journaled(), 0) == [SendAccepted()]
    assert task.handle(Chosen((A, B)), 0) == [Invoke(A, 1, 0)]
    assert task.handle(report("admitted"), 1) == []
    assert task.phase is Phase.ADMITTED
    assert task.handle(chunk(0), 2) == [MarkShown()]
    assert task.handle(chunk(1), 2) == [MarkShown()]
    final = task.handle(Observed("a", "result", 2, 1, b"done"), 3)
    assert final == [End(seq=2, attempt=1, payload=b"done")]
    assert task.ended
    assert task.handle(CancelAsked(), 4) == []


def test_nothing_is_invoked_before_the_journal_has_it() -> None:
    task = machine()
    assert task.handle(Chosen((A,)), 0) == []
    assert task.handle(Journaled(), 0) == [SendAccepted(), Invoke(A, 1, 0)]


def test_a_task_the_journal_refuses_is_refused_unjournaled() -> None:
    end = end_of(machine().handle(Unjournaled(Overloaded("disk full")), 0))
    assert not end.journaled
    assert end.code == "overloaded"


def test_a_timeout_of_zero_ends_at_once() -> None:
    actions = machine(deadline=0).handle(Journaled(), 0)
    assert actions[0] == SendAccepted()
    assert isinstance(end_of(actions).error, DeadlineExceeded)


def test_no_candidate_is_told_as_chosen() -> None:
    task = machine()
    task.handle(Journaled(), 0)
    problem = NoCapableNode("nobody")
    assert end_of(task.handle(Chosen((), problem), 0)).error is problem


def test_a_refusal_moves_on_to_the_next_candidate() -> None:
    task = machine(A, B)
    assert task.handle(report("refused", code="overloaded"), 1) == [Invoke(B, 2, 0)]


def test_a_node_that_cannot_meet_the_deadline_is_passed_over() -> None:
    task = machine(A, B)
    code = "deadline_exceeded"
    assert task.handle(report("refused", code=code), 1) == [Invoke(B, 2, 0)]
    error = end_of(task.handle(report("refused", "b", 2, code=code), 2)).error
    assert isinstance(error, DeadlineExceeded)


def test_silence_supersedes_the_node_and_moves_on() -> None:
    task = machine(A, B)
    assert task.wake_at == 100
    assert task.handle(Tick(), 99) == []
    assert task.handle(Tick(), 100) == [CancelNode("a", 1, "superseded"), Invoke(B, 2, 0)]
    assert task.handle(chunk(0, attempt=3), 101) == []
    assert task.handle(report("admitted"), 101) == []
    assert task.phase is Phase.INVOKED


def test_a_silent_node_without_a_substitute_is_asked_again_a_bounded_number_of_times() -> None:
    task, now = machine(A), 0
    for attempt in range(1, SETTINGS.attempts):
        now = task.wake_at or now
        actions = task.handle(Tick(), now)
        assert actions == [CancelNode("a", attempt, "superseded"), Choose()]
        assert task.handle(Chosen((A,)), now) == [Invoke(A, attempt + 1, 0)]
    assert isinstance(end_of(task.handle(Tick(), task.wake_at or now)).error, NodeLost)


def test_a_silent_node_that_is_gone_when_asked_again_is_lost() -> None:
    task = machine(A)
    task.handle(Tick(), 100)
    ended = end_of(task.handle(Chosen((), NoCapableNode("nobody is alive")), 101))
    assert isinstance(ended.error, NodeLost)


def test_silence_is_judged_by_what_answers_take_by_then() -> None:
    patience = ReportPatience(base_ms=100)
    commons = replace(Commons.of(SETTINGS), patience=patience)
    task = Task(deadline=10_000, settings=SETTINGS, commons=commons)
    task.handle(Journaled(), 0)
    task.handle(Chosen((A, B)), 0)
    patience.answered(800)  # another task's, in the same burst
    assert task.handle(Tick(), 100) == []
    assert task.wake_at == patience.timeout_ms
    assert task.handle(Tick(), patience.timeout_ms)[-1] == Invoke(B, 2, 0)


def test_a_chunk_counts_as_a_report() -> None:
    task = machine(A, B)
    task.handle(chunk(0), 50)
    assert task.handle(Tick(), 100) == []
    assert task.wake_at == 10_000


def test_a_node_lost_before_anything_was_shown_is_replaced() -> None:
    task = machine(A, B)
    task.handle(report("admitted"), 1)
    actions = task.handle(NodeGone("a", "offline"), 2)
    assert actions == [CancelNode("a", 1, "superseded"), Invoke(B, 2, 0)]


def test_a_node_lost_in_mid_answer_ends_the_task() -> None:
    task = machine(A, B)
    task.handle(chunk(0), 1)
    end = end_of(task.handle(NodeGone("a", "offline"), 2))
    assert isinstance(end.error, NodeLost)
    assert end.seq == 1


def test_a_lost_candidate_is_not_tried() -> None:
    task = machine(A, B)
    assert task.handle(NodeGone("b", "offline"), 1) == []
    assert Choose() in task.handle(NodeGone("a", "offline"), 2)
    nobody = Chosen((), NoCapableNode("all are away", retryable=True))
    assert isinstance(end_of(task.handle(nobody, 3)).error, NodeLost)


def test_a_failure_after_output_is_told() -> None:
    task = machine(A, B)
    task.handle(chunk(0), 1)
    end = end_of(task.handle(report("failed", code="execution_failed", reason="crashed"), 2))
    assert isinstance(end.error, ExecutionFailed)


def test_an_invocation_that_cannot_be_sent_moves_on() -> None:
    assert machine(A, B).handle(Uninvoked(Overloaded("outbox")), 1) == [Invoke(B, 2, 0)]


def test_at_most_so_many_nodes_are_tried() -> None:
    choices = [Choice(f"n{number}", "f", "1.0.0", 0.5) for number in range(9)]
    task = machine(*choices)
    for number in range(SETTINGS.attempts - 1):
        task.handle(report("refused", f"n{number}", number + 1), 1)
    last = SETTINGS.attempts - 1
    assert end_of(task.handle(report("refused", f"n{last}", last + 1), 1)).code == "overloaded"


def test_a_cancelled_node_may_say_so_itself() -> None:
    task = machine(A)
    task.handle(report("admitted"), 1)
    assert task.handle(CancelAsked(), 2) == [CancelNode("a", 1, "client")]
    assert task.handle(CancelAsked(), 3) == []
    final = task.handle(Observed("a", "error", 0, 1, b"cancelled", "cancelled"), 20)
    assert final == [End(seq=0, attempt=1, payload=b"cancelled", code="cancelled")]


def test_the_router_says_it_for_a_silent_node() -> None:
    task = machine(A)
    task.handle(report("admitted"), 1)
    task.handle(chunk(0), 1)
    task.handle(CancelAsked(), 2)
    task.handle(chunk(1), 3)
    assert task.handle(Tick(), 51) == []
    end = end_of(task.handle(Tick(), 52))
    assert isinstance(end.error, TaskCancelled)
    assert end.seq == 2


def test_cancelled_before_the_journal_has_it() -> None:
    task = machine()
    assert task.handle(CancelAsked(), 0) == []
    actions = task.handle(Journaled(), 1)
    assert actions[0] == SendAccepted()
    assert isinstance(end_of(actions).error, TaskCancelled)


def test_a_refusal_while_cancelled_ends_it() -> None:
    task = machine(A, B)
    task.handle(CancelAsked(), 1)
    assert isinstance(end_of(task.handle(report("refused"), 2)).error, TaskCancelled)


def test_the_deadline_cancels_the_node_and_gives_it_a_moment() -> None:
    task = machine(A, deadline=500)
    task.handle(report("admitted"), 1)
    assert task.wake_at == 500
    assert task.handle(Tick(), 500) == [CancelNode("a", 1, "deadline")]
    assert task.wake_at == 530
    assert isinstance(end_of(task.handle(Tick(), 530)).error, DeadlineExceeded)


def test_a_final_event_may_lag_behind_its_report_but_not_for_ever() -> None:
    task = machine(A)
    task.handle(report("finished", seq=3), 1)
    assert task.handle(chunk(0), 2) == [MarkShown()]
    assert len(task.course.shown.chunks) == 1
    end = end_of(task.handle(Tick(), 41))
    assert end.code == "internal"
    assert end.seq == 2


@pytest.mark.parametrize(
    "event",
    [chunk(0, "b"), chunk(0, "a", 2), report("refused", "b"), report("failed", "a", 7)],
)
def test_the_word_of_others_does_not_count(event: Any) -> None:
    task = machine(A, B)
    assert task.handle(event, 1) == []
    assert task.next_seq == 0


def test_repeated_chunks_are_kept_once_and_gaps_are_counted() -> None:
    task = machine(A)
    for seq in (0, 0, 1, 4):
        task.handle(chunk(seq), 1)
    assert [seq for seq, _ in task.course.shown.chunks] == [0, 1, 4]
    assert task.next_seq == 5
    assert task.course.shown.missed == 2


def test_kept_chunks_are_bounded() -> None:
    settings = RouterSettings(shown_events=10, shown_bytes=1024)
    task = Task(deadline=1_000, settings=settings)
    task.handle(Journaled(), 0)
    task.handle(Chosen((A,)), 0)
    for seq in range(30):
        task.handle(Observed("a", "chunk", seq, 1, b"x" * 200), 1)
    assert [seq for seq, _ in task.course.shown.chunks] == [25, 26, 27, 28, 29]
    assert task.course.shown.size_bytes == 1_000


def test_a_refusal_that_names_a_candidate_has_it_tried_next() -> None:
    third = Choice("c", "f", "1.0.0", 0.7)
    task = machine(A, B, third)
    refused = report("refused", code="overloaded", retry_after_ms=100, peer="c")
    assert task.handle(refused, 10) == [Invoke(third, 2, 0)]
    assert task.handle(report("refused", node="c", attempt=2), 20) == [Invoke(B, 3, 0)]


def test_a_named_node_that_is_no_candidate_is_not_tried() -> None:
    task = machine(A, B)
    refused = report("refused", code="overloaded", retry_after_ms=100, peer="stranger")
    assert task.handle(refused, 10) == [Invoke(B, 2, 0)]
