"""A router that may have missed something asks the node that has the task before it acts."""

import json
from typing import Any

import pytest

from capability_schemas.errors import (
    DeadlineExceeded,
    NodeLost,
    Overloaded,
    TaskCancelled,
    Unavailable,
)
from capability_schemas.ids import is_identifier
from capability_schemas.invocation import Report
from router.commons import Commons
from router.doubt import DoubtingMachine
from router.entry import pack_chunks
from router.events import (
    Action,
    Announce,
    Ask,
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
    Missed,
    NodeGone,
    Observed,
    Phase,
    Reported,
    Shed,
    Tick,
    Wait,
)
from router.ownership import GENERATION
from router.settings import RouterSettings
from router.shown import Origin
from support.journal import journaled

SETTINGS = RouterSettings(
    report_timeout_ms=100,
    cancel_grace_ms=50,
    deadline_grace_ms=30,
    finish_grace_ms=40,
    hang_ms=1_000,
    doubt_ms=500,
)
SETTLED = SETTINGS.settle_ms


def offer(node: str, **fields: Any) -> Choice:
    known: dict[str, Any] = {"continues": "prefix", "model": "sha256:1"}
    return Choice(node, "f", "1.0.0", 0.9, **(known | fields))


A, B = offer("a"), offer("b")


def begun(*choices: Choice, shown: int = 2, deadline: int = 60_000) -> DoubtingMachine:
    """A task that the first node has, and of which something was shown."""
    made = DoubtingMachine(deadline=deadline, settings=SETTINGS)
    made.handle(Journaled(), 0)
    made.handle(Chosen(choices or (A, B)), 0)
    made.handle(report("admitted"), 1)
    for seq in range(shown):
        made.handle(chunk(seq), 2)
    return made


def missed(**about: Any) -> DoubtingMachine:
    """The same, after the connection was lost and the node asked."""
    made = begun(**about)
    assert made.handle(Missed(), 10) == []
    assert made.handle(Tick(), 10) == [Ask("a", 1)]
    return made


def restored(
    node: str | None = "a", *, deadline: int = 10_000, missed: bool = True, **known: Any
) -> DoubtingMachine:
    """A task of an earlier process, the node asked when all has been heard."""
    entry = journaled(node, deadline=deadline, **({"attempt": 1} | known))
    made = DoubtingMachine.restore(entry, settings=SETTINGS, now=0, missed=missed)
    assert made.wake_at == SETTLED
    return made


def chunk(seq: int, node: str = "a", attempt: int = 1) -> Observed:
    return Observed(node, "chunk", seq, attempt, json.dumps({"data": f"{seq} "}).encode())


def result(seq: int, node: str = "a", attempt: int = 1) -> Observed:
    return Observed(node, "result", seq, attempt, b"done")


def report(status: Any, node: str = "a", attempt: int = 1, **fields: Any) -> Reported:
    return Reported(
        Report(task="t", client="c", attempt=attempt, node=node, status=status, **fields)
    )


def plain(actions: list[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, Learn)]


def end_of(actions: list[Action]) -> End:
    (end,) = [action for action in actions if isinstance(action, End)]
    return end


# ---- after a lost connection


def test_the_end_that_was_missed_is_taken_from_the_node_and_told_once_more() -> None:
    task = missed()
    end = end_of(task.handle(result(9), 12))
    assert (end.seq, end.attempt, end.payload, end.retell) == (9, 1, b"done", True)
    assert task.ended
    assert task.handle(report("finished", seq=10), 13) == []


def test_an_end_without_doubt_is_not_told_twice() -> None:
    assert not end_of(begun().handle(result(2), 5)).retell


def test_no_limit_of_time_ends_a_task_before_the_node_has_answered() -> None:
    task = missed(deadline=100)
    assert task.handle(Tick(), 105) == []
    assert task.wake_at is not None
    assert task.handle(Tick(), task.wake_at) == [Ask("a", 1)]  # again and again
    assert end_of(task.handle(result(5), 320)).payload == b"done"


def test_a_node_that_runs_it_goes_on_and_what_it_has_said_counts() -> None:
    task = missed()
    assert task.handle(report("running", seq=7), 12) == []
    assert task.phase is Phase.STREAMING
    task.handle(CancelAsked(), 20)
    assert task.handle(Tick(), 70) == [Ask("a", 1)]
    fence = task.handle(report("running", seq=7), 71)[-1]
    assert isinstance(fence, Announce)
    end = end_of(task.handle(Fenced(fence.attempt), 72))
    assert isinstance(end.error, TaskCancelled)
    assert end.seq == 7  # after the last number that the client may have seen


def test_a_further_chunk_is_an_answer_too() -> None:
    task = missed()
    assert task.handle(chunk(1), 11) == []  # delivered once more: says nothing
    assert task.handle(Tick(), 150) == [Ask("a", 1)]
    assert task.handle(chunk(2), 160) == [MarkShown()]
    assert task.wake_at != 260
    assert task.handle(report("running", seq=3), 170) == []


def test_a_task_that_the_node_does_not_know_goes_to_another() -> None:
    task = missed(shown=0)
    assert task.handle(report("unknown"), 12) == [Choose()]
    assert task.handle(Chosen((B,)), 13) == [Announce(B, 2)]
    (invoke,) = task.handle(Fenced(2), 14)
    assert isinstance(invoke, Invoke)
    assert (invoke.choice, invoke.attempt) == (B, 2)


def test_what_the_node_says_of_its_end_ends_the_doubt() -> None:
    task = missed(shown=0)
    assert plain(task.handle(report("failed", code="node_lost", seq=0), 12)) == [
        Invoke(B, 2, 0),
    ]


def test_the_last_report_of_an_end_that_never_comes_is_believed_in_the_end() -> None:
    task = missed()
    assert task.handle(report("finished", seq=9), 12) == []
    at, actions = 12, list[Action]()
    while not task.ended:
        assert task.wake_at is not None
        at = max(at + 1, task.wake_at)
        actions = task.handle(Tick(), at)
        if actions and isinstance(actions[-1], Announce):
            actions = task.handle(Fenced(actions[-1].attempt), at)
    assert at < 2_000
    end = end_of(actions)
    assert end.error is not None
    assert end.seq == 8


def test_a_reported_end_that_does_not_come_is_asked_for_once() -> None:
    task = begun()
    task.handle(report("finished", seq=3), 10)
    assert task.handle(Tick(), 50) == [Ask("a", 1)]
    assert task.wake_at is not None
    assert task.wake_at > 50
    assert end_of(task.handle(result(2), 60)).payload == b"done"


@pytest.mark.parametrize("answer", ["result", "running", None])
def test_a_node_that_is_there_is_asked_before_a_task_ends_without_it(answer: str | None) -> None:
    task = begun(deadline=100)
    assert task.handle(Tick(), 100) == [CancelNode("a", 1, "deadline")]
    assert task.handle(Tick(), 130) == [Ask("a", 1)]
    if answer == "result":  # which the fence would have overtaken
        end = end_of(task.handle(result(4), 131))
        assert (end.payload, end.retell) == (b"done", False)
    elif answer == "running":
        fence = task.handle(report("running", seq=4), 131)[-1]
        assert isinstance(fence, Announce)
        assert end_of(task.handle(Fenced(fence.attempt), 132)).seq == 4
    else:
        assert task.wake_at is not None
        assert isinstance(task.handle(Tick(), task.wake_at)[-1], Announce)


def test_after_a_chunk_it_is_asked_once_more_before_the_end() -> None:
    task = missed(deadline=100)
    task.handle(CancelAsked(), 90)
    actions = task.handle(chunk(2), 320)
    assert CancelNode("a", 1, "client") in actions
    assert task.wake_at is not None
    assert task.handle(Tick(), task.wake_at) == [Ask("a", 1)]


def test_a_silent_node_that_answers_is_not_lost() -> None:
    task = begun()
    assert task.handle(Tick(), 1_002) == [Ask("a", 1)]
    assert task.handle(report("running", seq=2), 1_003) == []
    assert task.handle(Tick(), 1_900) == []
    assert task.handle(Tick(), 2_003) == [Ask("a", 1)]
    assert task.wake_at is not None
    assert plain(task.handle(Tick(), task.wake_at))[-1] == Announce(B, 2)


@pytest.mark.parametrize("back", [True, False])
def test_a_node_that_is_gone_is_given_time_to_come_back(back: bool) -> None:
    task = missed()
    assert task.handle(NodeGone("a", "offline"), 20) == []
    assert task.handle(Tick(), 200) == [Ask("a", 1)]
    if back:
        # Whether it really is there, the dispatcher knows.
        assert task.handle(report("running", seq=2), 300) == [Ask("a", 1)]
        assert task.phase is Phase.STREAMING
        assert task.handle(chunk(2), 310) == [MarkShown()]
    else:
        assert plain(task.handle(Tick(), 521)) == [
            CancelNode("a", 1, "superseded"),
            Announce(B, 2),
        ]


def test_another_node_may_go_meanwhile() -> None:
    task = missed()
    assert task.handle(NodeGone("b", "offline"), 20) == []
    assert task.handle(report("running", seq=2), 30) == []
    end_of_b = task.handle(NodeGone("a", "offline"), 40)
    assert plain(end_of_b)[-1] == Choose()  # b is not asked


def test_the_fence_waits_for_the_answer_of_the_node_before() -> None:
    task = begun()
    announced = plain(task.handle(NodeGone("a", "offline"), 20))[-1]
    assert announced == Announce(B, 2)
    task.handle(Missed(), 30)
    assert task.handle(Tick(), 30) == [Ask("a", 1)]
    assert task.handle(Fenced(2), 31) == []
    assert task.handle(chunk(4), 32) == []  # behind the fence: readers pass it over
    actions = task.handle(report("running", seq=6), 33)
    end = end_of(task.handle(Fenced(3), 34) or actions)
    assert isinstance(end.error, NodeLost)  # what was shown is not known here
    assert end.seq == 4


def test_an_end_that_waits_for_its_fence_takes_the_nodes_word_instead() -> None:
    task = begun(deadline=100)
    task.handle(Tick(), 100)
    task.handle(Tick(), 130)
    assert isinstance(task.handle(report("running", seq=2), 131)[-1], Announce)
    task.handle(Missed(), 135)
    assert task.handle(Tick(), 135) == [Ask("a", 1)]
    assert task.handle(Fenced(2), 136) == []
    end = end_of(task.handle(result(5), 140))
    assert (end.payload, end.retell) == (b"done", True)


def test_an_end_that_waits_for_its_fence_comes_after_what_the_node_said() -> None:
    task = begun(deadline=100)
    task.handle(Tick(), 100)
    task.handle(Tick(), 130)
    fence = task.handle(report("running", seq=2), 131)[-1]
    task.handle(Missed(), 135)
    task.handle(Tick(), 135)
    task.handle(report("running", seq=5), 136)
    assert isinstance(fence, Announce)
    end = end_of(task.handle(Fenced(fence.attempt), 137))
    assert isinstance(end.error, DeadlineExceeded)
    assert end.seq == 5


def test_questions_are_spread() -> None:
    task = begun()
    task.handle(Missed(wait_ms=40), 10)
    assert task.wake_at == 50
    assert task.handle(Tick(), 49) == []
    assert task.handle(Tick(), 50) == [Ask("a", 1)]


def test_nobody_is_asked_about_a_task_that_nobody_has() -> None:
    task = DoubtingMachine(deadline=1_000, settings=SETTINGS)
    task.handle(Journaled(), 0)
    task.handle(Missed(), 1)
    assert task.handle(Chosen((A,)), 2) == [Invoke(A, 1, 0)]


# ---- after a restart


def test_a_restored_task_takes_what_its_node_said_meanwhile() -> None:
    assert end_of(restored().handle(result(0), 1)).retell


def test_a_restored_task_stays_with_the_node_that_runs_it() -> None:
    task = restored()
    assert task.handle(Tick(), SETTLED) == [Ask("a", 1)]
    assert task.handle(report("running", seq=0), SETTLED + 5) == []
    assert task.phase is Phase.ADMITTED
    assert end_of(task.handle(result(0), SETTLED + 9)).payload == b"done"


def test_a_restored_task_that_its_node_does_not_know_is_routed_anew() -> None:
    task = restored()
    task.handle(Tick(), SETTLED)
    assert task.handle(report("unknown"), SETTLED + 5) == [Choose()]
    (announced,) = task.handle(Chosen((B,)), SETTLED + 6)
    assert isinstance(announced, Announce)
    assert announced.attempt > 2  # one attempt may have been made and not written down


def test_what_a_node_said_to_another_router_is_no_answer() -> None:
    made = restored()
    assert made.handle(report("unknown"), 1) == []  # of the backlog: who asked has the task
    assert made.phase is Phase.INVOKED
    assert made.handle(Tick(), SETTLED) == [Ask("a", 1)]
    assert made.handle(report("unknown"), SETTLED + 1) == [Choose()]


def test_a_number_that_was_announced_is_not_given_again() -> None:
    task = restored(given=7)
    task.handle(Tick(), SETTLED)
    task.handle(report("unknown"), SETTLED + 5)
    (announced,) = task.handle(Chosen((B,)), SETTLED + 6)
    assert isinstance(announced, Announce)
    assert announced.attempt > 8


def test_a_restored_stream_is_lost_with_its_node() -> None:
    task = restored(next_seq=4)
    assert task.handle(Tick(), SETTLED) == [Ask("a", 1)]
    assert task.handle(NodeGone("a", "it is not there"), SETTLED) == []
    (fence,) = [
        action
        for action in task.handle(Tick(), SETTLED + SETTINGS.doubt_ms)
        if isinstance(action, Announce)
    ]
    end = end_of(task.handle(Fenced(fence.attempt), 2_100))
    assert isinstance(end.error, NodeLost)
    assert end.seq == 4


def test_a_task_that_was_watched_all_the_time_does_not_wait_for_a_dead_node() -> None:
    chunks = pack_chunks([(0, b'{"data":"ab"}'), (1, b'{"data":{"n":1}}')])
    task = restored(
        attempt=3,
        next_seq=2,
        chunks=chunks,
        continues="prefix",
        model="sha256:1",
        missed=False,
    )
    assert task.handle(Tick(), SETTLED) == [Ask("a", 3)]
    assert task.handle(NodeGone("a", "it is not there"), SETTLED)[-1] == Choose()
    (announced,) = task.handle(Chosen((B,)), 2_001)
    assert isinstance(announced, Announce)
    (invoke,) = task.handle(Fenced(announced.attempt), 2_002)
    assert isinstance(invoke, Invoke)
    assert invoke.continuation is not None
    assert invoke.continuation.shown == ("ab", {"n": 1})


@pytest.mark.parametrize("known", ["routed", "result", "report"])
def test_an_attempt_that_was_not_written_down_is_learnt_of(known: str) -> None:
    task = restored(node=None, attempt=0)
    if known == "routed":
        task.handle(Fenced(1, "a", Origin("f", "1.0.0")), 5)
    elif known == "report":
        task.handle(report("finished", seq=1), 5)
    end = end_of(task.handle(result(0), 6))
    assert (end.payload, end.retell) == (b"done", True)


def test_of_such_an_attempt_an_end_can_be_announced() -> None:
    task = restored(node=None, attempt=0)
    task.handle(chunk(0), 5)
    task.handle(CancelAsked(), 6)
    assert task.handle(Tick(), 60) == [Ask("a", 1)]
    fence = task.handle(NodeGone("a", "offline"), 61)[-1]
    assert isinstance(fence, Announce)
    assert is_identifier(fence.choice.function)


def test_a_fence_before_an_end_is_no_attempt_of_a_node() -> None:
    task = restored()
    task.handle(Fenced(2), 5)
    assert task.handle(Tick(), SETTLED) == [Ask("a", 1)]


def test_all_are_asked_about_a_task_without_a_node_before_it_is_routed() -> None:
    task = restored(node=None, attempt=0)
    assert task.handle(Tick(), SETTLED) == [Ask()]
    assert task.wake_at == SETTLED + 100
    assert task.handle(Tick(), SETTLED + 100) == [Choose()]
    (invoke,) = task.handle(Chosen((B,)), SETTLED + 101)
    assert isinstance(invoke, Invoke)
    assert invoke.attempt == 2


@pytest.mark.parametrize("node", ["a", None])
def test_a_restored_task_past_its_deadline_asks_first(node: str | None) -> None:
    task = restored(node=node, deadline=-5)
    assert task.handle(Tick(), 10) == []
    (asked,) = task.handle(Tick(), SETTLED)
    assert isinstance(asked, Ask)
    at = SETTLED
    while not task.ended:
        assert task.wake_at is not None
        at = max(at + 1, task.wake_at)
        actions = task.handle(Tick(), at)
        if actions and isinstance(actions[-1], Announce):
            task.handle(Fenced(actions[-1].attempt), at)
    assert at < SETTLED + 3 * SETTINGS.doubt_ms


# ---- missed again and again


def live_through(
    task: DoubtingMachine, *, until: int, pause: int, cancel_at: int | None = None
) -> tuple[int, int]:
    """Have a machine miss something every ``pause``; return how often it asks, and when it ends."""
    asked = now = 0
    while now < until and not task.ended:
        events: list[Any] = [Missed(pause + 100), Tick()] if now % pause == 0 else [Tick()]
        if cancel_at == now:
            events.append(CancelAsked())
        for event in events:
            for action in task.handle(event, now):
                asked += isinstance(action, Ask)
                if isinstance(action, Announce):
                    task.handle(Fenced(action.attempt), now)
        now += 10
    return asked, now


def test_a_question_that_waits_is_not_put_off_by_the_next_loss() -> None:
    asked, _ = live_through(begun(shown=0), until=1_000, pause=500)
    assert asked > 1


@pytest.mark.parametrize("cancel_at", [None, 1_000])
def test_a_task_ends_however_often_something_is_missed(cancel_at: int | None) -> None:
    task = begun(deadline=2_000)
    _, ended_at = live_through(task, until=20_000, pause=50, cancel_at=cancel_at)
    assert task.ended
    # The longest doubt about its node, twice the time for an answer, and the fence.
    assert ended_at < (cancel_at or 2_000) + 3 * SETTINGS.doubt_ms


def test_an_end_on_its_way_that_is_lost_is_asked_for_once_more() -> None:
    task = missed()
    task.handle(report("finished", seq=3), 20)  # what held the end is lost with the connection
    assert task.handle(Missed(), 100) == []
    assert task.handle(Tick(), 300) == [Ask("a", 1)]
    assert task.handle(Tick(), 450) == [Ask("a", 1)]
    assert end_of(task.handle(result(2), 460)).payload == b"done"


@pytest.mark.parametrize("shown", [0, 2])
def test_a_cancellation_waits_until_it_is_known_whether_some_node_has_the_task(shown: int) -> None:
    nobody = restored(None, attempt=0, next_seq=shown)
    assert nobody.handle(CancelAsked(), 10) == []
    at, actions = 10, list[Action]()
    while not nobody.ended:
        at = max(at, nobody.wake_at or at)
        actions += nobody.handle(Tick(), at)
    assert at <= SETTLED + 2 * SETTINGS.doubt_ms
    assert Ask() in actions
    assert not any(isinstance(one, Choose) for one in actions)
    assert isinstance(end_of(actions).error, TaskCancelled)
    somebody = restored(None, attempt=0, next_seq=shown)
    assert somebody.handle(CancelAsked(), 10) == []
    cancel = CancelNode("a", 1, "client")
    assert plain(somebody.handle(chunk(shown), 20)) == [MarkShown(), cancel]
    told = somebody.handle(result(shown + 1), 30)
    assert (end_of(told).seq, end_of(told).payload) == (shown + 1, b"done")


def test_an_end_that_is_reported_is_waited_for_and_asked_for() -> None:
    task = begun()
    assert task.handle(report("finished", seq=4), 10) == []
    assert task.wake_at == 10 + SETTINGS.finish_grace_ms
    assert task.handle(NodeGone("a", "the node is offline"), 20) == []  # what it said counts
    assert task.handle(chunk(2), 30) == [MarkShown()]  # not all of it had come
    assert task.handle(Tick(), 50) == [Ask("a", 1)]
    assert task.handle(report("finished", seq=4), 60) == []
    end = end_of(task.handle(result(3), 70))
    assert (end.seq, end.attempt, end.payload, end.retell) == (3, 1, b"done", True)


def test_an_end_that_is_reported_counts_although_the_routers_own_was_announced() -> None:
    task = begun(deadline=100)
    at, last = 0, list[Action]()
    while not last or not isinstance(last[-1], Announce):  # it gives no account of itself
        at = max(at, task.wake_at or at)
        last = plain(task.handle(Tick(), at))
    assert last[-1].last
    assert at < 240
    assert task.handle(report("finished", seq=3), 240) == []
    assert task.handle(Fenced(2, ""), 250) == []
    end = end_of(task.handle(result(2), 300))
    assert (end.seq, end.attempt, end.payload, end.retell) == (2, 1, b"done", True)


@pytest.mark.parametrize("deadline", [100, 60_000])
def test_an_end_that_never_comes_is_waited_for_no_longer_than_a_doubt(deadline: int) -> None:
    task = begun(deadline=deadline)
    task.handle(report("finished", seq=3), 90)
    at, actions = 90, list[Action]()
    while not task.ended:
        at = max(at, task.wake_at or at)
        told = task.handle(Tick(), at)
        actions += told
        if any(isinstance(one, Announce) for one in told):
            actions += task.handle(Fenced(task.attempt, ""), at)
    end = end_of(actions)
    assert isinstance(end.error, Unavailable | DeadlineExceeded)
    assert end.seq == 2
    assert SETTINGS.doubt_ms <= at - 90 <= 2 * SETTINGS.doubt_ms


def test_nobody_is_given_up_while_the_router_itself_is_cut_off() -> None:
    commons = Commons.of(SETTINGS)
    entry = journaled("a", deadline=100, attempt=1)
    task = DoubtingMachine.restore(entry, settings=SETTINGS, now=0, commons=commons)
    commons.line.up = False
    for at in range(SETTLED, 10_000, 100):
        assert not [one for one in task.handle(Tick(), at) if not isinstance(one, Ask)]
    commons.line.up = True
    assert task.handle(Missed(), 10_000) == []
    assert task.handle(Tick(), 10_100) == [Ask("a", 1)]
    assert end_of(task.handle(result(0), 10_110)).payload == b"done"


def test_a_node_that_says_something_again_is_asked_again() -> None:
    task = begun(deadline=100_000)
    task.handle(Missed(), 10)
    task.handle(CancelAsked(), 20)
    task.handle(Tick(), 30)
    assert task.handle(Tick(), 20 + SETTINGS.doubt_ms) == [CancelNode("a", 1, "client")]
    task.handle(Missed(), 540)
    assert task.handle(Tick(), 540) == []  # it has not answered
    task.handle(chunk(2), 541)
    task.handle(Missed(), 542)
    assert task.handle(Tick(), 542) == [Ask("a", 1)]


# ---- whose word counts on what is not written down


def may_have_a(node: str, _now: int) -> bool:
    return node == "a"


@pytest.mark.parametrize("waits", [False, True])
def test_a_node_that_may_not_have_a_task_cannot_claim_it(waits: bool) -> None:
    task = restored(node=None, attempt=0)
    task.may_have = may_have_a
    at = SETTLED
    if waits:
        assert task.handle(Tick(), at) == [Ask()]
        at += 100
        assert task.handle(Tick(), at) == [Choose()]
        assert task.handle(Chosen((), Overloaded("full"), places=PLACES), at) == [Wait(PLACES)]
    assert task.handle(report("running", "x", 7, seq=0), at + 1) == []
    assert task.handle(result(0, "x", 7), at + 2) == []
    assert task.node is None
    assert not task.ended


PLACES = frozenset({("b", "f")})


def test_what_came_before_it_was_known_who_may_have_it_counts_after_all() -> None:
    task = restored(node=None, attempt=0)
    known: set[str] = set()
    task.may_have = lambda node, _now: node in known
    assert task.handle(result(0, "x", 7), 4) == []
    assert task.handle(result(0), 5) == []
    known.add("a")
    end = end_of(task.handle(Tick(), SETTLED))
    assert (end.payload, end.attempt, end.retell) == (b"done", 1, True)


def test_what_comes_too_early_is_bounded() -> None:
    task = restored(node=None, attempt=0)
    known: set[str] = set()
    task.may_have = lambda node, _now: node in known
    for number in range(100):
        task.handle(result(0, f"x{number}", 7), 4)
    task.handle(result(0), 5)
    known.add("a")
    assert task.handle(Tick(), SETTLED) == [Ask()]  # it says so once more when it is asked


def test_what_the_router_said_itself_it_believes() -> None:
    task = restored(node=None, attempt=0)
    task.may_have = may_have_a
    task.handle(Fenced(1, "b", Origin("f", "1.0.0")), 5)
    assert end_of(task.handle(result(0, "b"), 6)).payload == b"done"


def test_a_number_that_no_router_gives_is_made_up() -> None:
    task = restored(node=None, attempt=3)
    for attempt in (2**53 - 1, 5 * GENERATION):
        assert task.handle(report("running", attempt=attempt, seq=0), 5) == []
        assert task.node is None
    assert task.attempt == 4
    task.handle(report("running", attempt=GENERATION + 1, seq=0), 6)
    assert (task.node, task.attempt) == ("a", GENERATION + 1)


def test_once_somebody_was_asked_no_other_attempt_is_believed() -> None:
    task = restored(node=None, attempt=0)
    task.handle(Tick(), SETTLED)
    task.handle(Tick(), SETTLED + 100)
    (invoke,) = task.handle(Chosen((B,), places=PLACES), SETTLED + 101)
    assert isinstance(invoke, Invoke)
    full = report("refused", "b", invoke.attempt, code="overloaded")
    assert plain(task.handle(full, SETTLED + 102)) == [Wait(PLACES)]  # and the try is forgiven
    assert task.handle(report("running", "x", 50, seq=0), SETTLED + 103) == []
    assert task.node is None


def test_a_task_that_turns_out_to_run_waits_no_longer() -> None:
    task = restored(node=None, attempt=0)
    task.handle(Tick(), SETTLED)
    task.handle(Tick(), SETTLED + 100)
    task.handle(Chosen((), Overloaded("full"), places=PLACES), SETTLED + 101)
    waited = task.waiting
    task.handle(report("running", seq=0), SETTLED + 102)
    assert (waited, task.waiting) == (True, False)
    assert task.handle(Shed(Overloaded("no room")), SETTLED + 103) == []
    assert end_of(task.handle(result(0), SETTLED + 104)).payload == b"done"


def test_a_begun_task_without_a_node_is_asked_for_until_whoever_began_it_can_be_back() -> None:
    task = restored(node=None, attempt=0, next_seq=3)
    assert task.handle(Tick(), SETTLED) == [Ask()]
    assert task.wake_at == SETTLED + 100
    assert task.handle(Tick(), SETTLED + 100) == [Ask()]  # its node may have been cut off
    assert end_of(task.handle(result(4), SETTLED + 150)).payload == b"done"


def test_a_begun_task_that_nobody_knows_ends() -> None:
    task = restored(node=None, attempt=0, next_seq=3)
    at = SETTLED
    while not task.ended and at < SETTLED + 10_000:
        task.handle(Tick(), at)
        at += 10
    assert at < SETTLED + SETTINGS.doubt_ms + 200
