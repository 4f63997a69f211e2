"""The judge knows a broken promise when it sees one, and nothing else."""

import json
from typing import Any

import pytest

from foam.chaos.judge import Ask, Judge, percentile

PIECES = ({"i": 0}, {"i": 1})
ASK = Ask(client="c", task="t", function="count", pieces=PIECES, timeout_ms=1000)
TEXT = Ask(client="c", task="t", function="recite", pieces=("one ", "two "), output="one two ")


class Case:
    """One task, told event by event."""

    def __init__(self, ask: Ask = ASK) -> None:
        self.judge = Judge(grace_ms=100)
        self.judge.submitted(ask, at=0)
        self.now = 0

    def hear(self, event: str, source: str = "node-1", **fields: Any) -> "Case":
        self.now += 10
        body = {"v": 1, "task": "t", "event": event, "at": self.now, **fields}
        self.judge.heard("c", source, json.dumps(body).encode(), at=self.now)
        return self

    def accept(self) -> "Case":
        self.hear("accepted", "router-1", router="router-1", deadline=1000)
        return self.hear("routed", "router-1", node="node-1", attempt=1)

    def chunk(self, seq: int, data: Any = None, attempt: int = 1, source: str = "node-1") -> "Case":
        data = {"i": seq} if data is None else data
        return self.hear("chunk", source, seq=seq, attempt=attempt, data=data)

    def end(self, seq: int, *, attempt: int = 1, source: str = "node-1", **fields: Any) -> "Case":
        fields = fields or {"output": None}
        kind = "error" if "code" in fields else "result"
        return self.hear(kind, source, seq=seq, attempt=attempt, **fields)

    def broken(self, at: int = 10_000) -> dict[str, int]:
        return dict(self.judge.verdict(at=at).broken)


def test_a_whole_answer_breaks_nothing_however_often_it_comes() -> None:
    case = Case().accept().chunk(0).chunk(0).chunk(1).end(2).end(2).chunk(1)
    assert case.broken() == {}
    verdict = case.judge.verdict(at=0)
    assert (verdict.accepted, verdict.finished, verdict.repeated) == (1, 1, 3)
    assert case.judge.open_tasks() == []


def test_events_may_cross() -> None:
    case = Case().end(2).chunk(1)
    assert case.judge.missing("c") == [("t", 0)]
    case.accept().chunk(0)
    assert case.broken() == {}
    assert case.judge.missing("c") == []


def test_an_accepted_task_without_an_end_is_lost_when_its_time_and_a_grace_are_over() -> None:
    case = Case().accept()
    assert case.broken(at=1_100) == {}
    assert case.broken(at=1_111) == {"lost": 1}


def test_a_task_that_nobody_answers_is_told_from_a_lost_one() -> None:
    assert Case().broken(at=1_101) == {"unanswered": 1}


@pytest.mark.parametrize(
    "second",
    [
        {"seq": 2, "code": "node_lost"},
        {"seq": 3, "output": None},
        {"seq": 2, "output": "other"},
    ],
)
def test_two_ends_are_one_too_many(second: dict[str, Any]) -> None:
    seq = second.pop("seq")
    case = Case().accept().chunk(0).chunk(1).end(2).end(seq, source="router-1", **second)
    assert case.broken() == {"doubled": 1}


def test_an_end_of_an_attempt_that_was_replaced_is_passed_over() -> None:
    case = Case().accept().chunk(0).hear("routed", "router-1", node="node-2", attempt=2)
    case.end(1, code="node_lost").chunk(1, attempt=2, source="node-2")
    case.end(2, attempt=2, source="node-2").end(9, code="internal")
    assert case.broken() == {}
    assert case.judge.verdict(at=0).stale == 2


def test_the_router_may_repeat_what_an_earlier_attempt_said() -> None:
    case = Case().accept().hear("routed", "router-1", node="node-2", attempt=2)
    case.chunk(0, source="router-1").chunk(1, source="router-1").end(2, source="router-1")
    assert case.broken() == {}


def test_one_number_with_two_contents_is_found() -> None:
    assert Case(TEXT).accept().chunk(0, "one ").chunk(0, "two ").broken(at=20) == {"doubled": 1}


def test_nothing_may_follow_the_end() -> None:
    assert Case().accept().chunk(0).end(1, code="cancelled").chunk(1).broken() == {"doubled": 1}
    assert Case().accept().chunk(1).end(0, code="cancelled").broken() == {"doubled": 1}


def test_a_missing_number_is_a_gap() -> None:
    assert Case().accept().chunk(1).end(2).broken() == {"gap": 1}


def test_a_replay_may_stand_in_for_chunks_with_empty_ones() -> None:
    case = Case().accept().chunk(0, "", source="router-1").chunk(1, "", source="router-1").end(2)
    assert case.broken() == {}
    assert case.chunk(0).chunk(1).broken() == {}


def test_a_wrong_answer_is_found() -> None:
    assert Case().accept().chunk(0, {"i": 7}).end(1).broken() == {"wrong": 1}
    assert Case().accept().chunk(0).chunk(1).chunk(2).end(3).broken() == {"wrong": 1}
    assert Case(TEXT).accept().end(0, output="two ").broken() == {"wrong": 1}


def test_text_may_be_cut_anywhere_but_not_be_shown_twice() -> None:
    whole = Case(TEXT).accept().chunk(0, "one t").chunk(1, "wo ").end(2, output="one two ")
    assert whole.broken() == {}
    begun = Case(TEXT).accept().chunk(0, "one t").end(1, code="cancelled")
    assert begun.broken() == {}
    twice = Case(TEXT).accept().chunk(0, "one ").chunk(1, "one two ").end(2, output="one two ")
    assert twice.broken() == {"wrong": 1}


def test_a_refused_task_that_is_sent_again_may_be_taken() -> None:
    case = Case().end(0, code="overloaded", source="router-1")
    assert case.judge.open_tasks() == []
    case.accept().chunk(0).chunk(1).end(2)
    assert case.broken() == {}
    assert case.judge.verdict(at=0).failed == {}


def test_what_is_no_event_is_said() -> None:
    judge = Judge()
    judge.heard("c", "node-1", b"\xff", at=1)
    assert dict(judge.verdict(at=1).broken) == {"malformed": 1}


def test_the_wait_at_a_change_of_nodes_is_measured() -> None:
    case = Case().accept().chunk(0)
    case.now += 500
    case.hear("routed", "router-1", node="node-2", attempt=2).chunk(1, attempt=2, source="node-2")
    case.end(2, attempt=2, source="node-2")
    verdict = case.judge.verdict(at=0)
    assert (verdict.moved, verdict.gaps_ms) == (1, (520,))


def test_percentiles_go_by_the_nearest_rank() -> None:
    assert percentile([], 0.5) is None
    assert percentile([7], 0.99) == 7
    assert percentile(range(1, 101), 0.5) == 50
    assert percentile(range(1, 101), 0.99) == 99
