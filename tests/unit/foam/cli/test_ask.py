"""What ``foam ask`` shows of an answer and of the way to it."""

import pytest

from capability_schemas.errors import InvalidTask
from capability_schemas.reply import ENDS_HERE, CascadeStep, Chunk, Result, Routed, Step, Working
from foam.cli.ask import EventPrinter, read_numbers


def step(state, number=1, **detail):
    return Step(task="t", at=1, step=f"call-{number}", state=state, node="edge-1", detail=detail)


def show(capsys, *events, **options):
    printer = EventPrinter(**options)
    for event in events:
        printer.show(event)
    return capsys.readouterr()


def test_each_tool_call_is_one_line_beside_the_answer(capsys):
    seen = show(
        capsys,
        step("running", tool="add", arguments={"a": 1}),
        step("finished", tool="add", arguments={"a": 1}, result="3", ms=12.4),
        step("refused", tool="open_gate", arguments={}, error="Refused: not approved"),
        Chunk(task="t", at=1, seq=0, data="it is 3"),
        Result(task="t", at=1, seq=1, output="it is 3"),
    )
    assert seen.out == "it is 3\n"
    assert seen.err.splitlines() == [
        '   add({"a": 1}) finished, 12 ms: 3',
        "   open_gate({}) refused: Refused: not approved",
    ]


def test_a_result_cannot_write_over_the_terminal(capsys):
    hostile = "\x1b[2J\x1b]0;owned\x07line 1\nline 2 " + "x" * 500
    line = show(capsys, step("finished", tool="p\x1b[Jage", arguments=None, result=hostile)).err
    assert line.count("\n") == 1
    assert "\x1b" not in line
    assert len(line) < 120
    assert "line 1 line 2" in line


def test_a_step_of_a_plan_has_a_line_too(capsys):
    assert show(capsys, step("failed", error="no node")).err == "   call-1 failed: no node\n"


def test_what_a_task_waits_for_is_said_once(capsys):
    reasons = ["waits for dozy", "waits for dozy", "all are\x1b[2J busy", None]
    seen = show(capsys, *(Working(task="t", at=1, reason=reason) for reason in reasons))
    assert seen.out == ""
    assert seen.err.splitlines() == ["   waits for dozy", "   all are [2J busy"]


@pytest.mark.parametrize("options", [{"quiet": True}, {"as_json": True}])
def test_quiet_and_json_keep_stderr_empty(capsys, options):
    seen = show(capsys, step("finished", tool="add", result="3"), **options)
    assert seen.err == ""
    assert ("call-1" in seen.out) is ("as_json" in options)


def cascade(*confidences):
    return tuple(
        CascadeStep(
            node=f"edge-{number}",
            function="think",
            version="1.0.0",
            confidence=confidence,
            cost=0.002 * number,
            total_ms=12.4,
        )
        for number, confidence in enumerate(confidences, 1)
    )


def test_a_cascade_is_told_step_by_step(capsys):
    steps = cascade(0.31, None)
    result = Result(
        task="t", at=1, seq=0, output="x", node="edge-2", function="think", cascade=steps
    )
    seen = show(capsys, result)
    assert seen.out == "x\n"
    assert seen.err.splitlines() == [
        "   step 1: edge-1: think 1.0.0, confidence 0.31, cost 0.002, 12 ms",
        "   step 2: edge-2: think 1.0.0, cost 0.004, 12 ms, the answer",
        "   cost in all 0.006",
    ]


def test_an_answer_says_how_sure_it_is(capsys):
    result = Result(task="t", at=1, seq=0, output="x", confidence=0.876)
    assert show(capsys, result).err == "   confidence 0.88\n"


def test_numbers_are_read_by_name():
    assert read_numbers(["cost=0.1", "load=none"], "weight") == {"cost": 0.1, "load": None}
    assert read_numbers(None, "weight") == {}


@pytest.mark.parametrize("wrong", ["cost", "=1", "cost=much"])
def test_what_is_no_number_is_refused_by_name(wrong):
    with pytest.raises(InvalidTask, match="weight"):
        read_numbers([wrong], "weight")


def test_an_attempt_that_nobody_gets_is_not_shown(capsys):
    chosen = Routed(task="t", at=1, node="b", function="lamp", version="1.0.0", score=0.95)
    fence = chosen.model_copy(update={"attempt": 2, "reason": ENDS_HERE})
    (line,) = show(capsys, chosen, fence).err.splitlines()
    assert line == "-> b: lamp 1.0.0, score 0.95"
