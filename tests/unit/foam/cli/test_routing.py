"""What ``foam explain``, ``whatif`` and ``weights`` make of options and answers."""

from typing import Any

import pytest

from foam.cli import routing


def _row(node: str, value: float, verdict: str = "candidate", **weighted: float) -> dict[str, Any]:
    return {
        "node": node,
        "function": "summarise",
        "version": "1.0.0",
        "similarity": {"score": 0.7},
        "gates": {},
        "weighted": {"alpha": 0.7, **weighted},
        "value": value,
        "verdict": verdict,
    }


def _told(**fields: Any) -> dict[str, Any]:
    return {
        "by": "meaning",
        "threshold": 0.31,
        "window": 0.03,
        "probability": 0.87,
        "margin": 0.12,
        "ambiguous": False,
        "rules": {"matched": []},
        "demands": [],
        "chosen": ["edge-1", "summarise"],
        "problem": None,
        "candidates": [_row("edge-1", 0.68, load=-0.02, cost=0.0)],
        "looked_at": 1,
        "more": False,
        **fields,
    }


def test_an_explanation_names_what_decided(capsys: pytest.CaptureFixture[str]) -> None:
    routing.draw_explanation(
        _told(
            rules={"matched": ["private-stays-here"]},
            demands=[["zone:hall-1", "zone:hall-3"], ["local"]],
            ambiguous=True,
            candidates=[
                _row("edge-1", 0.68, load=-0.02, cost=0.0),
                _row("edge-2", 0.0, "zones: stands in hall-2, not in hall-1"),
            ],
            looked_at=40,
            more=True,
        )
    )
    shown = capsys.readouterr().out
    for part in (
        "probability 0.870",
        "margin 0.120, window 0.030",
        "threshold 0.310",
        "rules: private-stays-here",
        "demands: zone:hall-1 or zone:hall-3; local",
        "passes; load -0.020",
        "zones: stands in hall-2, not in hall-1",
        "and 38 more",
        "not all were looked at",
        "chosen: edge-1/summarise (ambiguous",
    ):
        assert part in shown
    assert "cost" not in shown


def test_nobody_is_told_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    problem = {"code": "no_capable_node", "message": "nobody offers this"}
    routing.draw_explanation(_told(chosen=None, problem=problem, candidates=[], looked_at=0))
    assert "nobody: no_capable_node: nobody offers this" in capsys.readouterr().out


def test_a_task_for_a_sleeper_is_told_to_wait(capsys: pytest.CaptureFixture[str]) -> None:
    problem = {
        "code": "no_capable_node",
        "message": "dozy could, but is asleep until 15:58:34 UTC",
        "waits_for": "dozy",
    }
    routing.draw_explanation(_told(chosen=None, problem=problem, candidates=[], looked_at=0))
    shown = capsys.readouterr().out
    assert "would wait for dozy: dozy could, but is asleep until 15:58:34 UTC" in shown
    assert "nobody" not in shown


def test_a_past_task_is_told_with_its_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    task = {"task": "t", "client": "pump-7", "outcome": "result", "node": "edge-1"}
    steps = [{"node": "edge-1", "function": "summarise", "confidence": 0.4, "cost": 0.0}]
    vetoed = [{"node": "cloud", "function": "summarise", "why": "outside of the site"}]
    told = _told(cascade={"accept": 0.6, "steps": steps, "vetoed": vetoed})
    routing._draw_answer({**task, "function": "summarise", "attempt": 2, "explanation": told})
    shown = capsys.readouterr().out
    assert "task t of pump-7: result by edge-1/summarise, attempt 2" in shown
    assert "answered: edge-1/summarise, confidence 0.400 of 0.600" in shown
    assert "not asked: cloud/summarise: outside of the site" in shown
    routing._draw_answer({**task, "function": None, "attempt": 0, "explanation": None})
    assert "no decision is stored" in capsys.readouterr().out


def test_whatif_shows_both_values_and_the_change(capsys: pytest.CaptureFixture[str]) -> None:
    then = _told(
        chosen=["edge-2", "summarise"],
        candidates=[_row("edge-2", 0.6), _row("edge-1", 0.0, "liveness: offline")],
    )
    routing._draw_whatif({"now": _told(), "then": then, "changed": True})
    shown = capsys.readouterr().out
    (gone,) = [line for line in shown.splitlines() if line.startswith("edge-1")]
    assert gone.split()[3:] == ["0.680", "liveness:", "offline"]  # no value without a chance
    assert "now: edge-1/summarise\nthen: edge-2/summarise\n" in shown
    routing._draw_whatif({"now": _told(), "then": _told(), "changed": False})
    assert "then: edge-1/summarise (the same)" in capsys.readouterr().out


def test_weights_are_shown_with_their_range(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        "cost": {"value": 0.2, "default": 0.03, "lowest": 0, "highest": 1},
        "window": {"value": None, "default": None, "lowest": 0, "highest": 0.2},
    }
    routing._draw_weights({"weights": rows, "changed": ["cost"]})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cost", "0.2", "0.03", "0", "to", "1", "changed"] in lines
    assert ["window", "calibrated", "calibrated", "0", "to", "0.2"] in lines


def test_offers_of_tenants_that_were_left_out_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    routing.draw_explanation(_told(apart=3))
    assert "left out: 3 offers of tenants; --client NAME" in capsys.readouterr().out
    routing.draw_explanation(_told())
    assert "left out" not in capsys.readouterr().out
