"""Decisions of the router: ``foam explain``, ``whatif``, ``weights``, ``calibrate``."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final

import typer

from capability_schemas.errors import InvalidTask
from foam.cli.app import app
from foam.cli.ask import read_json_option, read_numbers
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import connected
from foam.cli.look import JsonOption, new_table, print_rich, show
from foam.cli.several import told_best
from foam.settings import Settings

__all__ = ["calibrate", "explain", "weights", "whatif"]

_CALIBRATION_S: Final = 120.0

TextArgument = Annotated[str | None, typer.Argument(help="What would be asked.")]
FunctionOption = Annotated[
    str | None, typer.Option("--function", help="Address a function by name.")
]
InputOption = Annotated[str | None, typer.Option("--input", help="Input: JSON or @file.")]
SkillsOption = Annotated[
    list[str] | None, typer.Option("--skills", help="Skill the function must offer.")
]
PolicyOption = Annotated[
    str | None, typer.Option("--policy", help="Demands on the node: JSON or @file.")
]
PreferOption = Annotated[
    str | None, typer.Option("--prefer", help="balanced, best, cheapest or fastest.")
]
ClientOption = Annotated[
    str | None, typer.Option("--client", help="In whose name: its rules and its tenant count.")
]


# ---- reading options


def _task(
    text: str | None,
    function: str | None,
    input_: str | None,
    skills: list[str] | None,
    policy: str | None,
    prefer: str | None,
) -> dict[str, Any]:
    fields = {
        "text": text,
        "function": function,
        "input": read_json_option(input_, "input"),
        "skills": skills or None,
        "policy": read_json_option(policy, "policy"),
        "prefer": prefer,
    }
    return {name: value for name, value in fields.items() if value is not None}


# ---- drawing


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _chosen(told: Mapping[str, Any]) -> str:
    chosen = told.get("chosen")
    if chosen:
        return f"{chosen[0]}/{chosen[1]}"
    return f"nobody ({(told.get('problem') or {}).get('code', 'no reason given')})"


def _how(told: Mapping[str, Any]) -> list[str]:
    """Return the lines that stand above the candidates."""
    facts = [f"by {told.get('by')}"]
    if told.get("by") == "meaning":
        if told.get("probability") is not None:
            facts.append(f"probability {_number(told['probability'])}")
        if told.get("margin") is not None:
            facts.append(f"margin {_number(told['margin'])}, window {_number(told.get('window'))}")
        facts.append(f"threshold {_number(told.get('threshold'))}")
    if told.get("prefer", "balanced") != "balanced":
        facts.append(f"prefer {told['prefer']}")
    lines = ["; ".join(facts)]
    if (told.get("rules") or {}).get("matched"):
        lines.append(f"rules: {', '.join(told['rules']['matched'])}")
    if told.get("demands"):
        lines.append(f"demands: {'; '.join(' or '.join(any_) for any_ in told['demands'])}")
    return lines


def _value(row: Mapping[str, Any]) -> str:
    """Return the value of a candidate that may be chosen; that of another has no meaning."""
    return _number(row.get("value")) if row.get("verdict") == "candidate" else ""


def _standing(row: Mapping[str, Any]) -> str:
    """Return what made or undid a candidate: the gates it failed, or the terms that count."""
    if row.get("verdict") != "candidate":
        return str(row.get("verdict", ""))
    terms = {
        name: value
        for name, value in (row.get("weighted") or {}).items()
        if name != "alpha" and value and abs(value) >= 0.0005  # noqa: PLR2004  # shown as 0.000
    }
    listed = ", ".join(f"{name} {value:+.3f}" for name, value in terms.items())
    return f"passes; {listed}" if listed else "passes"


def draw_explanation(told: Mapping[str, Any]) -> None:
    """Show an explanation: how it was decided, every candidate, who was chosen."""
    for line in _how(told):
        print_rich(line)
    rows = list(told.get("candidates", ()))
    table = new_table("node", "function", "similar", "value", "verdict")
    for row in rows:
        table.add_row(
            str(row.get("node", "")),
            f"{row.get('function', '')} {row.get('version', '')}",
            _number((row.get("similarity") or {}).get("score")),
            _value(row),
            _standing(row),
        )
    if rows:
        print_rich(table)
    for line in _outcome(told, len(rows)):
        print_rich(line)


def _outcome(told: Mapping[str, Any], shown: int) -> Iterator[str]:
    """Yield the lines that stand below the candidates."""
    hidden = (told.get("looked_at") or 0) - shown
    if hidden > 0:
        yield f"and {hidden} more"
    if told.get("apart"):
        yield f"left out: {told['apart']} offers of tenants; --client NAME asks as one of theirs"
    if told.get("more"):
        yield "not all were looked at: enough of them pass"
    if told.get("explored"):
        yield f"explored: {'/'.join(told['explored'])} is given a chance to show itself"
    if told.get("chosen"):
        doubt = " (ambiguous: another function may be meant)" if told.get("ambiguous") else ""
        yield f"chosen: {_chosen(told)}{doubt}"
    elif told.get("problem"):
        yield _problem(told["problem"])
    cascade = told.get("cascade") or {}
    for step in cascade.get("steps", ()):
        yield (
            f"answered: {step['node']}/{step['function']},"
            f" confidence {_number(step.get('confidence')) or 'unknown'}"
            f" of {_number(cascade.get('accept'))}, cost {_number(step.get('cost'))}"
        )
    for veto in cascade.get("vetoed", ()):
        yield f"not asked: {veto['node']}/{veto['function']}: {veto['why']}"


def _problem(problem: Mapping[str, Any]) -> str:
    """Say why nobody is chosen; or for whom the task would wait."""
    if problem.get("waits_for"):
        return f"would wait for {problem['waits_for']}: {problem.get('message')}"
    return f"nobody: {problem.get('code')}: {problem.get('message')}"


def _draw_answer(answer: dict[str, Any]) -> None:
    """Show what would be chosen, or how a past task was routed."""
    if "explanation" not in answer:
        draw_explanation(answer)
        return
    node = f" by {answer['node']}/{answer['function']}" if answer.get("node") else ""
    attempt = answer.get("attempt") or 0
    again = f", attempt {attempt}" if attempt > 1 else ""
    outcome = answer.get("outcome") or "under way"
    print_rich(f"task {answer['task']} of {answer['client']}: {outcome}{node}{again}")
    if answer["explanation"] is None:
        print_rich("no decision is stored: it has not been made, or its record is gone")
    else:
        draw_explanation(answer["explanation"])


def _draw_whatif(answer: dict[str, Any]) -> None:
    now, then = answer["now"], answer["then"]
    before = {(row["node"], row["function"]): row for row in now.get("candidates", ())}
    for line in _how(then):
        print_rich(line)
    table = new_table("node", "function", "now", "then", "verdict then")
    for row in then.get("candidates", ()):
        was = before.get((row["node"], row["function"]), {})
        table.add_row(
            row["node"],
            f"{row['function']} {row.get('version', '')}",
            _value(was),
            _value(row),
            _standing(row),
        )
    if then.get("candidates"):
        print_rich(table)
    same = "" if answer["changed"] else " (the same)"
    print_rich(f"now: {_chosen(now)}")
    print_rich(f"then: {_chosen(then)}{same}")
    if then.get("problem"):
        print_rich(_problem(then["problem"]))


def _draw_weights(answer: dict[str, Any]) -> None:
    table = new_table("weight", "value", "default", "range", "")
    for name, row in answer["weights"].items():
        table.add_row(
            name,
            _weight(row["value"]),
            _weight(row["default"]),
            f"{row['lowest']:g} to {row['highest']:g}",
            "changed" if name in answer["changed"] else "",
        )
    print_rich(table)


def _weight(value: float | None) -> str:
    return "calibrated" if value is None else f"{value:g}"


def _draw_facts(answer: dict[str, Any]) -> None:
    table = new_table("calibrated", "", "what it is")
    for name, value in answer.items():
        shown = _number(value) if value is not None else "unknown"
        table.add_row(name.replace("_", " "), shown, _FACTS.get(name, ""))
    print_rich(table)


_FACTS: Final = {
    "threshold": "a request whose best score is below it is answered: nobody can",
    "half": "share of a request's words, rare ones counting more, at which they score 0.5",
    "held_out": "examples of the catalogue that it was fitted to",
    "window": "candidates nearer than this to the best compete by cost, time and load",
    "bias": "log odds that a choice with score and margin 0 is right",
}


# ---- commands


@app.command(epilog=CODES_EPILOG)
@connected()
def explain(
    settings: Settings,
    text: TextArgument = None,
    *,
    task: Annotated[
        str | None, typer.Option("--task", help="Id of a past task: how was it routed?")
    ] = None,
    function: FunctionOption = None,
    input_: InputOption = None,
    skills: SkillsOption = None,
    policy: PolicyOption = None,
    prefer: PreferOption = None,
    client: ClientOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who would be chosen for a task, and why, without running it.

    With --task it shows how a past task was routed; --client then says whose it was.
    """
    fields = _task(text, function, input_, skills, policy, prefer)
    if task is not None and fields:
        raise InvalidTask("--task asks for a past task: it goes with --client only", field="task")
    args: dict[str, Any] = {"task": task or fields}
    if client is not None:
        args["client"] = client
    # Any router can choose; how a past task was chosen for, the one knows that had it.
    merge = None if task is None else told_best
    show(settings, "explain", _draw_answer, as_json=as_json, merge=merge, **args)


@app.command(epilog=CODES_EPILOG)
@connected()
def whatif(
    settings: Settings,
    text: TextArgument = None,
    *,
    gone: Annotated[
        list[str] | None, typer.Option("--gone", help="Node that is not there.", metavar="NODE")
    ] = None,
    load: Annotated[
        list[str] | None,
        typer.Option("--load", help="Share of its places taken, 0 to 1.", metavar="NODE=SHARE"),
    ] = None,
    cost: Annotated[
        list[str] | None,
        typer.Option("--cost", help="Price of a call.", metavar="NODE[/FUNCTION]=MONEY"),
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option("--weight", help="Another weight.", metavar="NAME=NUMBER")
    ] = None,
    function: FunctionOption = None,
    input_: InputOption = None,
    skills: SkillsOption = None,
    policy: PolicyOption = None,
    prefer: PreferOption = None,
    client: ClientOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who would be chosen if nodes were gone, loaded or dearer; nothing is changed."""
    args: dict[str, Any] = {
        "task": _task(text, function, input_, skills, policy, prefer),
        "gone": gone or None,
        "load": read_numbers(load, "load") or None,
        "cost": read_numbers(cost, "cost") or None,
        "weights": read_numbers(weight, "weight") or None,
        "client": client,
    }
    given = {name: value for name, value in args.items() if value is not None}
    show(settings, "whatif", _draw_whatif, as_json=as_json, **given)


@app.command(epilog=CODES_EPILOG)
@connected()
def weights(
    settings: Settings,
    changes: Annotated[
        list[str] | None, typer.Argument(help="Weights to set.", metavar="NAME=NUMBER")
    ] = None,
    *,
    reset: Annotated[
        bool, typer.Option("--reset", help="Go back to the defaults, before anything is set.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what counts how much between candidates of like meaning, or change it.

    A change holds at once, and over restarts of the router until it is reset.
    """
    args: dict[str, Any] = {**read_numbers(changes, "weight")}
    if reset:
        args["reset"] = True
    show(settings, "weights", _draw_weights, as_json=as_json, **args)


@app.command(epilog=CODES_EPILOG)
@connected()
def calibrate(settings: Settings, *, as_json: JsonOption = False) -> None:
    """Fit the threshold and the window to the present catalogue, now."""
    show(settings, "calibrate", _draw_facts, as_json=as_json, timeout_s=_CALIBRATION_S)
