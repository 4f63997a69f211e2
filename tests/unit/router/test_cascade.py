"""The ladder of a cascade, and the machine that climbs it."""

import json
from dataclasses import replace
from typing import Any

import pytest

from capability_schemas.errors import (
    DeadlineExceeded,
    ErrorCode,
    InvalidTask,
    NodeLost,
    Overloaded,
    PolicyDenied,
    TaskCancelled,
)
from capability_schemas.invocation import Cascade, Report
from capability_schemas.reply import Usage
from capability_schemas.task import TaskPolicy
from router.cascade import Escalation
from router.commons import Commons, Room
from router.events import (
    Action,
    Announce,
    CancelAsked,
    CancelNode,
    Choice,
    Chosen,
    End,
    Event,
    Fenced,
    Invoke,
    Journaled,
    Learn,
    NodeGone,
    Observed,
    Reported,
    Tick,
    Uninvoked,
)
from router.guard import GuardedMachine
from router.settings import RouterSettings
from support.journal import journaled

SETTINGS = RouterSettings(
    report_timeout_ms=100, cancel_grace_ms=50, deadline_grace_ms=30, finish_grace_ms=40
)
SMALL = Choice("small", "f", "1.0.0", 0.9, strength=1e9, finish_ms=100)
TWIN = Choice("twin", "f", "1.0.0", 0.8, strength=1.05e9, finish_ms=200)
LARGE = Choice("large", "f", "1.0.0", 0.7, strength=8e9, finish_ms=400)
CLOUD = Choice("cloud", "f", "1.0.0", 0.95, cost=0.5, finish_ms=300, external=True)
ALL = (CLOUD, SMALL, TWIN, LARGE)


def escalation(**policy: Any) -> Escalation:
    return Escalation(accept=0.6, policy=TaskPolicy(**policy))


def names(choices: Any) -> list[str]:
    return [choice.node for choice in choices]


def unsure(choice: Choice, confidence: float | None = 0.3, attempt: int = 1, **more: Any) -> Report:
    return Report(
        task="t",
        client="c",
        attempt=attempt,
        node=choice.node,
        status="unsure",
        output=f"said by {choice.node}",
        confidence=confidence,
        total_ms=12.5,
        **more,
    )


def test_near_and_small_comes_first_and_dearer_and_farther_last() -> None:
    dear = replace(LARGE, node="dear", cost=0.1)
    assert names(escalation().order((*ALL, dear))) == ["small", "twin", "large", "dear", "cloud"]


def test_of_equals_the_one_that_is_done_first_comes_first() -> None:
    slow = replace(SMALL, node="slow", finish_ms=900)
    assert names(escalation().order((slow, SMALL))) == ["small", "slow"]


@pytest.mark.parametrize("policy", [{"data": "private"}, {"local_only": True}])
def test_privacy_comes_before_everything(policy: dict[str, Any]) -> None:
    ladder = escalation(**policy)
    assert names(ladder.order(ALL)) == ["small", "twin", "large"]
    (veto,) = ladder.describe()["vetoed"]
    assert (veto["node"], veto["why"].split(":")[0]) == ("cloud", "privacy")


def test_of_another_function_only_what_may_as_well_be_meant() -> None:
    other = replace(LARGE, node="other", function="g")
    assert names(escalation().order((SMALL, other))) == ["small"]
    meant = [replace(choice, ambiguous=True) for choice in (SMALL, other)]
    assert names(escalation().order(meant)) == ["small", "other"]


def test_another_function_that_may_be_meant_need_not_be_stronger() -> None:
    first, other = (
        replace(SMALL, ambiguous=True),
        replace(SMALL, node="other", function="g", ambiguous=True),
    )
    ladder = escalation()
    waiting = ladder.order((first, other))
    assert ladder.ask(waiting[0], waiting[1:], now=0, ends_at=9_000, tries_left=4)[1] == Cascade(
        accept=0.6
    )
    ladder.answered(first, unsure(first))
    assert names(ladder.admissible([other], now=0, ends_at=9_000)) == ["other"]


def test_a_step_up_is_dearer_larger_or_outside() -> None:
    ladder = escalation()
    ladder.order(ALL)
    ladder.answered(SMALL, unsure(SMALL))
    allowed = ladder.admissible([TWIN, LARGE, CLOUD], now=0, ends_at=9_000)
    assert names(allowed) == ["large", "cloud"]
    assert "no stronger than small" in ladder.vetoes["twin", "f"]
    ladder.answered(CLOUD, unsure(CLOUD))
    assert ladder.admissible([LARGE, TWIN], now=0, ends_at=9_000) == []


def test_a_step_that_would_end_too_late_is_not_taken() -> None:
    ladder = escalation()
    ladder.answered(SMALL, unsure(SMALL))
    allowed = ladder.admissible([LARGE, CLOUD], now=1_000, ends_at=1_350)
    assert names(allowed) == ["cloud"]
    assert ladder.vetoes["large", "f"] == "time: it needs 400 ms, 350 ms are left"
    unknown = replace(LARGE, finish_ms=None)
    assert names(ladder.admissible([unknown], now=1_000, ends_at=1_001)) == ["large"]
    assert ladder.admissible([unknown], now=1_000, ends_at=1_000) == []


def test_the_budget_is_for_all_steps_together() -> None:
    ladder = escalation(max_cost=0.3)
    steps = [replace(SMALL, cost=0.1), replace(LARGE, cost=0.2), replace(CLOUD, cost=0.25)]
    ladder.answered(steps[0], unsure(steps[0]))
    assert ladder.spent == 0.1
    assert names(ladder.admissible(steps[1:], now=0, ends_at=9_000)) == ["large"]
    assert ladder.vetoes["cloud", "f"].startswith("budget: 0.1 spent and 0.25 more, at most 0.3")


def test_the_last_step_takes_any_answer_and_each_says_why() -> None:
    ladder = escalation()
    small, large = replace(SMALL, reason="similarity 0.9", cost=0.002), replace(LARGE, cost=0.01)
    asked, terms = ladder.ask(small, [large], now=0, ends_at=9_000, tries_left=4)
    assert asked.reason == "step 1 of at most 2: similarity 0.9"
    assert terms == Cascade(accept=0.6)
    ladder.answered(small, unsure(small, 0.31))
    asked, terms = ladder.ask(large, [], now=0, ends_at=9_000, tries_left=3)
    assert asked.reason == "step 2 of at most 2: confidence 0.31 below 0.60; spent 0.002"
    assert terms == Cascade(accept=0.0, steps=ladder.steps)
    assert ladder.steps[0].model_dump() == {
        "node": "small",
        "function": "f",
        "version": "1.0.0",
        "confidence": 0.31,
        "cost": 0.002,
        "total_ms": 12.5,
    }


@pytest.mark.parametrize(
    ("rest", "ends_at", "tries_left", "policy"),
    [
        ([], 9_000, 4, {}),
        ([TWIN], 9_000, 4, {}),
        ([LARGE], 9_000, 0, {}),
        ([LARGE], 499, 4, {}),
        ([CLOUD], 9_000, 4, {"max_cost": 0.4}),
    ],
)
def test_where_nobody_may_follow_it_is_a_task_like_any_other(
    rest: list[Choice], ends_at: int, tries_left: int, policy: dict[str, Any]
) -> None:
    asked = escalation(**policy).ask(SMALL, rest, now=0, ends_at=ends_at, tries_left=tries_left)
    assert asked == (SMALL, None)


def test_the_surest_draft_is_kept_and_of_equals_the_latest() -> None:
    ladder = escalation()
    for choice, confidence in ((SMALL, 0.3), (LARGE, 0.5), (CLOUD, 0.4)):
        assert ladder.answered(choice, unsure(choice, confidence))
    assert ladder.draft is not None
    assert ladder.draft.step.node == "large"
    ladder.answered(TWIN, unsure(TWIN, 0.5))
    assert ladder.draft.step.node == "twin"


@pytest.mark.parametrize("output", [float("nan"), {"x": float("inf")}])
def test_what_json_has_no_words_for_is_no_answer(output: Any) -> None:
    ladder = escalation()
    report = unsure(SMALL).model_copy(update={"output": output})
    assert not ladder.answered(SMALL, report)
    assert ladder.draft is None


# ---- the machine


class Task(GuardedMachine):
    """A machine that sets aside what it has learnt; each fence is back at once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.learnt: list[tuple[str, str, int]] = []

    def handle(self, event: Event, now: int) -> list[Action]:
        actions = super().handle(event, now)
        while actions and isinstance(fence := actions[-1], Announce):
            behind = super().handle(Fenced(fence.attempt), now)
            actions = actions[:-1] + [
                replace(one, announced=False) if isinstance(one, Invoke) else one for one in behind
            ]
        self.learnt += [
            (action.choice.node, action.verdict, action.took_ms)
            for action in actions
            if isinstance(action, Learn)
        ]
        return [action for action in actions if not isinstance(action, Learn)]


def begun(
    *choices: Choice, deadline: int = 10_000, room: Room | None = None, **policy: Any
) -> Task:
    """Return a task in a cascade over the choices, with the first one invoked at 0."""
    commons = Commons.of(SETTINGS)
    if room is not None:
        commons = replace(commons, drafts=room)
    task = Task(deadline=deadline, settings=SETTINGS, commons=commons)
    task.handle(Journaled(), 0)
    chosen = Chosen(choices, min_confidence=0.6, policy=TaskPolicy(**policy))
    (invoke,) = task.handle(chosen, 0)
    assert isinstance(invoke, Invoke)
    return task


def after_a_draft(**options: Any) -> Task:
    """Return a task with a draft of the small node that the large one has been asked about."""
    task = begun(SMALL, LARGE, **options)
    (invoke,) = task.handle(Reported(unsure(SMALL)), 10)
    assert isinstance(invoke, Invoke)
    assert (invoke.choice.node, invoke.attempt, invoke.seq) == ("large", 2, 0)
    return task


def report(status: Any, choice: Choice = LARGE, attempt: int = 2, **fields: Any) -> Reported:
    return Reported(
        Report(task="t", client="c", attempt=attempt, node=choice.node, status=status, **fields)
    )


def end_of(actions: list[Action]) -> End:
    ends = [action for action in actions if isinstance(action, End)]
    assert len(ends) == 1
    return ends[0]


def assert_drafted(actions: list[Action]) -> None:
    end = end_of(actions)
    assert end.draft is not None
    assert (json.loads(end.draft.output), end.code, end.seq) == ("said by small", None, 0)
    assert [step.node for step in end.steps] == ["small"]


def test_a_sure_answer_ends_the_cascade() -> None:
    task = begun(SMALL, LARGE)
    end = end_of(task.handle(Observed("small", "result", 0, 1, b"sure"), 20))
    assert end == End(seq=0, attempt=1, payload=b"sure")
    assert task.learnt == [("small", "good", 20)]


def test_an_unsure_answer_is_kept_and_a_stronger_node_asked() -> None:
    task = begun(SMALL, TWIN, LARGE, CLOUD)
    (second,) = task.handle(Reported(unsure(SMALL, 0.31)), 10)
    assert isinstance(second, Invoke)
    assert second.cascade is not None
    assert (second.choice.node, second.attempt) == ("large", 2)
    assert (second.cascade.accept, len(second.cascade.steps)) == (0.6, 1)
    (third,) = task.handle(Reported(unsure(LARGE, 0.5, attempt=2)), 20)
    assert isinstance(third, Invoke)
    assert third.cascade is not None
    assert (third.choice.node, third.cascade.accept, len(third.cascade.steps)) == ("cloud", 0.0, 2)
    assert third.choice.reason == "step 3 of at most 3: confidence 0.50 below 0.60"
    assert task.learnt == [("small", "unsure", 10), ("large", "unsure", 10)]


def test_the_surest_answer_is_the_answer_when_nobody_may_be_asked() -> None:
    usage = Usage(output_tokens=3)
    task = begun(SMALL, replace(LARGE, finish_ms=None), deadline=1_000)
    end = end_of(task.handle(Reported(unsure(SMALL, usage=usage)), 970))
    assert end.draft is not None
    assert (json.loads(end.draft.output), end.draft.usage) == ("said by small", usage)
    assert end.error is None
    assert end.payload is None


@pytest.mark.parametrize(
    "event",
    [
        report("refused", code="overloaded"),
        report("failed", code="execution_failed"),
        report("failed", code="invalid_task"),
        NodeGone("large", "offline"),
        Uninvoked(Overloaded("outbox")),
        report("unsure", confidence=0.1, output="said by small"),
    ],
)
def test_whatever_becomes_of_the_next_step_the_draft_is_the_answer(event: Event) -> None:
    task = after_a_draft()
    end = end_of(task.handle(event, 20))
    assert end.draft is not None
    assert (json.loads(end.draft.output), end.code) == ("said by small", None)
    lost = isinstance(event, NodeGone)
    assert end.attempt == (3 if lost else 2)  # what a node may say yet is of a lower one


def test_a_silent_next_step_is_superseded_and_not_asked_again() -> None:
    task = after_a_draft()
    silent_at = task.wake_at or 0
    actions = task.handle(Tick(), silent_at)
    assert actions[0] == CancelNode("large", 2, "superseded")
    assert_drafted(actions)
    assert task.learnt[-1] == ("large", "lost", silent_at - 10)


def test_a_twin_takes_the_place_of_a_lost_next_step() -> None:
    other = replace(LARGE, node="other")
    task = begun(SMALL, LARGE, other)
    task.handle(Reported(unsure(SMALL)), 10)
    (_, again) = task.handle(NodeGone("large", "offline"), 20)
    assert isinstance(again, Invoke)
    assert (again.choice.node, again.attempt) == ("other", 3)
    assert again.cascade is not None
    assert again.cascade.accept == 0.0


def test_an_end_that_never_arrives_is_the_draft() -> None:
    task = after_a_draft()
    assert task.handle(report("finished", seq=1), 20) == []
    assert_drafted(task.handle(Tick(), 60))


def test_what_was_shown_cannot_be_taken_back() -> None:
    task = after_a_draft()
    task.handle(Observed("large", "chunk", 0, 2, b"piece"), 20)
    end = end_of(task.handle(NodeGone("large", "offline"), 30))
    assert isinstance(end.error, NodeLost)
    assert end.seq == 1


def test_the_draft_is_told_in_time() -> None:
    task = after_a_draft(deadline=1_000)
    task.handle(report("admitted"), 20)
    assert task.wake_at == 970
    assert task.handle(Tick(), 970) == [CancelNode("large", 2, "deadline")]
    assert_drafted(task.handle(Tick(), 1_000))
    assert task.learnt == [("small", "unsure", 10)]


def test_a_node_that_hands_back_at_the_deadline_is_not_waited_for() -> None:
    task = after_a_draft(deadline=1_000)
    task.handle(Tick(), 970)
    assert_drafted(task.handle(report("failed", code="deadline_exceeded"), 975))
    assert task.learnt == [("small", "unsure", 10)]


def test_a_better_draft_at_the_deadline_counts() -> None:
    task = begun(SMALL, LARGE, CLOUD, deadline=2_000)
    task.handle(Reported(unsure(SMALL)), 10)
    task.handle(report("admitted"), 20)
    assert task.handle(Tick(), 1_970) == [CancelNode("large", 2, "deadline")]
    end = end_of(task.handle(Reported(unsure(LARGE, 0.5, attempt=2)), 1_980))
    assert end.draft is not None
    assert json.loads(end.draft.output) == "said by large"
    assert [step.node for step in end.steps] == ["small", "large"]


def test_once_something_is_shown_the_deadline_is_the_deadline() -> None:
    task = after_a_draft(deadline=1_000)
    task.handle(Observed("large", "chunk", 0, 2, b"piece"), 960)
    assert task.wake_at == 1_000
    assert task.handle(Tick(), 970) == []
    task.handle(Tick(), 1_000)
    assert isinstance(end_of(task.handle(Tick(), 1_030)).error, DeadlineExceeded)


def test_a_client_that_cancels_wants_no_draft() -> None:
    task = after_a_draft()
    assert task.handle(CancelAsked(), 20) == [CancelNode("large", 2, "client")]
    end = end_of(task.handle(report("failed", code="cancelled"), 25))
    assert isinstance(end.error, TaskCancelled)
    assert end.draft is None
    assert task.learnt == [("small", "unsure", 10)]


def test_the_result_of_a_node_in_its_grace_comes_before_the_draft() -> None:
    task = after_a_draft(deadline=1_000)
    task.handle(Tick(), 970)
    assert end_of(task.handle(Observed("large", "result", 0, 2, b"done"), 980)).payload == b"done"


def test_a_first_step_that_fails_is_followed_by_a_stronger_one() -> None:
    task = begun(SMALL, LARGE)
    (second,) = task.handle(report("failed", SMALL, 1, code="execution_failed"), 10)
    assert isinstance(second, Invoke)
    assert (second.choice.node, second.cascade) == ("large", None)


def test_when_every_step_fails_the_last_failure_is_told() -> None:
    task = begun(SMALL, LARGE, CLOUD)
    task.handle(report("failed", SMALL, 1, code="execution_failed"), 10)
    task.handle(NodeGone("cloud", "offline"), 11)
    end = end_of(task.handle(report("failed", LARGE, 2, code="invalid_task"), 20))
    assert isinstance(end.error, InvalidTask)
    assert not end.error.retryable
    assert task.learnt == [("small", "failed", 10)]


def test_as_many_are_asked_as_in_any_task() -> None:
    ladder = [replace(SMALL, node=f"n{size}", strength=1e9 * 2**size) for size in range(9)]
    task = begun(*ladder)
    invoke: Action | None = None
    for number in range(SETTINGS.attempts - 1):
        (invoke,) = task.handle(Reported(unsure(ladder[number], attempt=number + 1)), 10)
    assert isinstance(invoke, Invoke)
    assert invoke.cascade is not None
    assert (invoke.attempt, invoke.cascade.accept) == (SETTINGS.attempts, 0.0)
    assert "step 5 of at most 5" in invoke.choice.reason


def test_a_peer_that_a_node_names_skips_no_step() -> None:
    task = begun(SMALL, TWIN, LARGE)
    refused = report("refused", SMALL, 1, code="overloaded", peer="large")
    (invoke,) = task.handle(refused, 10)
    assert isinstance(invoke, Invoke)
    assert invoke.choice.node == "twin"


def test_privacy_that_leaves_nobody_is_a_denial() -> None:
    task = Task(deadline=1_000, settings=SETTINGS)
    task.handle(Journaled(), 0)
    policy = TaskPolicy(data="private")
    end = end_of(task.handle(Chosen((CLOUD,), min_confidence=0.6, policy=policy), 0))
    assert isinstance(end.error, PolicyDenied)
    assert "cloud" in end.error.message


def test_candidates_chosen_anew_go_on_from_where_the_cascade_stands() -> None:
    task = begun(SMALL)
    actions = task.handle(Tick(), 100)
    assert actions[0] == CancelNode("small", 1, "superseded")
    (invoke,) = task.handle(Chosen((SMALL, LARGE), min_confidence=0.6), 101)
    assert isinstance(invoke, Invoke)
    assert (invoke.choice.node, invoke.cascade) == ("small", Cascade(accept=0.6))


def test_what_was_shown_counts_although_its_chunks_lag_behind_the_report() -> None:
    task = after_a_draft()
    end = end_of(task.handle(report("failed", seq=2, code="execution_failed"), 20))
    assert (end.seq, end.code, end.draft) == (2, "execution_failed", None)
    assert task.course.shown.missed == 2


def test_a_client_that_cancels_in_the_grace_of_the_deadline_gets_no_draft() -> None:
    task = after_a_draft(deadline=1_000)
    task.handle(Tick(), 970)
    assert task.handle(CancelAsked(), 975) == []
    assert end_of(task.handle(Tick(), 1_000)).code == "cancelled"


def test_an_answer_handed_back_though_it_is_sure_enough_is_the_answer() -> None:
    task = begun(SMALL, LARGE)
    end = end_of(task.handle(Reported(unsure(SMALL, 0.6)), 10))
    assert end.draft is not None
    assert (end.draft.step.confidence, end.seq) == (0.6, 0)


def test_a_cancelled_task_is_cancelled_whatever_is_handed_back() -> None:
    task = begun(SMALL, LARGE)
    task.handle(CancelAsked(), 5)
    assert end_of(task.handle(Reported(unsure(SMALL, 0.9)), 10)).code == "cancelled"


def test_drafts_of_all_tasks_together_are_bounded() -> None:
    room = Room(20)  # one answer of 15 bytes
    first, second, third = (begun(SMALL, LARGE, room=room) for _ in range(3))
    assert isinstance(first.handle(Reported(unsure(SMALL)), 10)[0], Invoke)
    assert room.held_bytes == 15
    assert_drafted(second.handle(Reported(unsure(SMALL)), 10))
    first.handle(Observed("large", "result", 0, 2, b"sure"), 20)
    assert room.held_bytes == 0
    assert isinstance(third.handle(Reported(unsure(SMALL)), 30)[0], Invoke)
    assert_drafted(third.handle(report("failed"), 40))
    assert room.held_bytes == 0


def test_a_surer_draft_takes_the_place_of_the_one_before() -> None:
    room = Room(20)
    task = begun(SMALL, LARGE, CLOUD, room=room)
    task.handle(Reported(unsure(SMALL)), 10)
    (invoke,) = task.handle(Reported(unsure(LARGE, 0.4, attempt=2)), 20)
    assert isinstance(invoke, Invoke)
    assert room.held_bytes == 15
    assert json.loads(end_of(task.handle(report("failed", CLOUD, 3), 30)).draft.output) == (  # type: ignore[union-attr]
        "said by large"
    )


def test_a_restored_cascade_starts_again() -> None:
    task = Task.restore(journaled("large", attempt=2), settings=SETTINGS, now=0)
    actions = task.handle(Reported(unsure(LARGE, attempt=2)), 5)
    assert not [action for action in actions if isinstance(action, End | Learn)]
    (invoke,) = task.handle(Chosen((SMALL, LARGE), min_confidence=0.6), 6)
    assert isinstance(invoke, Invoke)
    assert (invoke.choice.node, invoke.attempt) == ("small", 3)


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (ErrorCode.EXECUTION_FAILED, "failed"),
        (ErrorCode.INTERNAL, "failed"),
        (ErrorCode.INVALID_TASK, None),
        (ErrorCode.DEADLINE_EXCEEDED, None),
    ],
)
def test_an_error_says_something_about_the_node_or_nothing(code: str, verdict: str | None) -> None:
    task = begun(SMALL)
    task.handle(Observed("small", "error", 0, 1, b"bad", code), 30)
    assert [learnt[1] for learnt in task.learnt] == ([verdict] if verdict else [])
