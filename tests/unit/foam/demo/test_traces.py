import io

import pytest
from rich.console import Console

from foam.demo.recording import Truth, load_recording
from foam.demo.traces import Trace, quantile, summarise
from foam.demo.view import DemoView

TRUTH = Truth(task="t", node="n", function="f", why="", checks=({"path": "", "equals": "Hot."},))


def played(*events):
    trace = Trace(task="t", device="d", text="what?")
    for after_ms, event in events:
        trace.take(event, after_ms)
    return trace


ROUTED = (1.0, {"event": "routed", "node": "n", "function": "f", "score": 0.5})


def chunk(text):
    return (5.0, {"event": "chunk", "data": text})


def result(output, source="n"):
    usage = {"output_tokens": 7}
    timing = {"queue_ms": 1.0, "total_ms": 8.0}
    event = {"event": "result", "output": output, "source": source, "function": "f"}
    return (9.0, {**event, "usage": usage, "timing": timing})


def test_streamed_answer_is_right_and_timed():
    trace = played(ROUTED, chunk("Ho"), chunk("t."), result("Hot."))
    assert trace.judged(TRUTH).right
    assert (trace.first_ms, trace.total_ms, trace.tokens, trace.run_ms) == (5.0, 9.0, 7, 7.0)


def test_stream_that_differs_from_the_result_is_wrong():
    trace = played(ROUTED, chunk("Cold"), result("Hot."))
    assert "streamed" in trace.judged(TRUTH).reason


def test_the_author_is_the_last_level_of_the_topic():
    assert not played(ROUTED, result("Hot.", source="other")).judged(TRUTH).right


def test_error_is_wrong_with_its_message():
    error = (3.0, {"event": "error", "code": "node_lost", "message": "gone"})
    trace = played(ROUTED, error)
    assert trace.judged(TRUTH).reason == "node_lost: gone"


def test_unanswered_task_is_not_right():
    assert not played(ROUTED).judged(TRUTH).right


@pytest.mark.parametrize(("share", "value"), [(0.5, 2), (0.95, 4), (1.0, 4), (0.0, 1)])
def test_quantile(share, value):
    assert quantile([4, 1, 3, 2], share) == value


def test_summary_counts_missing_and_fails_then():
    recording = load_recording()
    summary = summarise(recording, {})
    assert (summary.right, summary.missing) == (0, len(recording.texts))
    assert not summary.passed


def test_blocks_are_readable_without_a_terminal():
    recording = load_recording()
    task = "pump-7-1"
    trace = Trace(task=task, device="pump-7", text=recording.texts[task])
    out = io.StringIO()
    view = DemoView(Console(file=out, width=100))
    with view:
        view.progress(trace, "06:10")
        trace.take(ROUTED[1], 1.0)
        trace.take(result("x " * 400)[1], 9.0)
        trace.judged(recording.truths[task])
        view.progress(trace, "06:10")
        view.summary(summarise(recording, {task: trace}))
    shown = out.getvalue()
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert "WRONG" in shown
    assert shown.count(recording.texts[task]) == 1
    assert "\x1b" not in shown
