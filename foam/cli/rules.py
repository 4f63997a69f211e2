"""``foam rules``: look routing rules over, see what they make of a task, and what is in force."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError

from capability_schemas.errors import ConfigurationError, InvalidTask
from capability_schemas.task import Task
from capability_schemas.wire import first_problem
from foam.cli.app import app
from foam.cli.ask import read_json_option
from foam.cli.codes import CODES_EPILOG, exit_code
from foam.cli.connection import DataOption, client_settings, connected
from foam.cli.look import JsonOption, new_table, print_rich, show
from foam.settings import Settings

__all__ = ["check", "effect_lines", "reload", "rules", "show_rules", "try_out"]

_CLIENT: Final = "device-1"
_SHOWN_APART: Final = frozenset({"line", "name", "description"})

rules = typer.Typer(
    help="Routing rules: check a file, try it on a task, show what the router follows.",
    no_args_is_help=True,
    epilog=CODES_EPILOG,
)
app.add_typer(rules, name="rules")


@rules.command(epilog=CODES_EPILOG)
def check(
    file: Annotated[
        Path | None,
        typer.Argument(help="Rules file; that of the mesh when not named (FOAM_RULES)."),
    ] = None,
    *,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look for everything that is wrong with a rules file: mistakes, contradictions, dead rules.

    No mesh is needed; a router that follows the file takes it up only when this finds nothing.
    """
    from router.rules.file import read_text
    from router.rules.reading import read_rules

    source = client_settings(data=data).rules_file if file is None else file
    reading = read_rules(read_text(source) or "", str(source))
    if as_json:
        facts = {
            "source": str(source),
            "ok": not reading.problems,
            "rules": [rule.name for rule in reading.rules],
            "problems": [asdict(problem) for problem in reading.problems],
        }
        _write_json(facts)
    else:
        for problem in reading.problems:
            sys.stdout.write(f"error   {problem}\n")
        counts = ((len(reading.rules), "rule"), (len(reading.problems), "error"))
        told = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)
        sys.stdout.write(f"{source}: {told}\n")
    if reading.problems:
        raise typer.Exit(exit_code(ConfigurationError(str(source))))


@rules.command("try", epilog=CODES_EPILOG)
def try_out(
    file: Annotated[Path, typer.Argument(help="Rules file.")],
    text: Annotated[str | None, typer.Argument(help="Text of the task.")] = None,
    *,
    client: Annotated[str, typer.Option("--client", help="Who sends the task.")] = _CLIENT,
    task: Annotated[
        str | None,
        typer.Option("--task", help="Further fields of the task as JSON, or @file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which rules apply to a task, and what they demand and prefer; no mesh is needed."""
    from router.rules import RuleBook
    from router.rules.file import read_text

    fields = read_json_option(task, "--task") or {}
    if not isinstance(fields, dict):
        raise InvalidTask("--task is no JSON object", field="--task")
    try:
        wanted = Task.model_validate(fields if text is None else {**fields, "text": text})
    except ValidationError as exc:
        field, problem = first_problem(exc)
        raise InvalidTask(f"{field}: {problem}" if field else problem, field=field) from exc
    effect = RuleBook.parse(read_text(file) or "", str(file)).apply(client, wanted).describe()
    if as_json:
        _write_json(effect)
    else:
        sys.stdout.writelines(f"{line}\n" for line in effect_lines(effect))


@rules.command("show", epilog=CODES_EPILOG)
@connected()
def show_rules(settings: Settings, *, as_json: JsonOption = False) -> None:
    """Show the rules that the router follows, and what keeps an edit from being followed."""
    show(settings, "rules", _draw_rules, as_json=as_json)


@rules.command(epilog=CODES_EPILOG)
@connected()
def reload(settings: Settings, *, as_json: JsonOption = False) -> None:
    """Have the router look at its rules file now; it does so by itself within a second or two."""
    show(settings, "rules", _draw_rules, as_json=as_json, reload=True)


def _draw_rules(answer: dict[str, Any]) -> None:
    """Show the book of a router, and fail where its file as it is now is not followed."""
    table = new_table("line", "rule", "does")
    for rule in answer["rules"]:
        does = {name: value for name, value in rule.items() if name not in _SHOWN_APART}
        said = [f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in does.items()]
        table.add_row(str(rule.get("line", "")), rule["name"], "\n".join(said))
    if answer["rules"]:
        print_rich(table)
    changed = ""
    if "changed" in answer:
        changed = "; taken up now" if answer["changed"] else "; unchanged"
    count = answer["count"]
    print_rich(f"{answer['file']}: {count} rule{'' if count == 1 else 's'} in force{changed}")
    if answer.get("problem"):
        raise ConfigurationError(f"the file is not followed as it is now: {answer['problem']}")


def effect_lines(effect: dict[str, Any]) -> Iterable[str]:
    """Yield what rules make of a task, a line for each demand.

    Args:
        effect: As ``RuleEffect.describe`` returns it.
    """
    if not effect["matched"]:
        yield "no rule applies"
        return
    yield f"apply           {', '.join(effect['matched'])}"
    for action in ("require", "forbid", "prefer"):
        for pick in effect.get(action, ()):
            gain = f" +{pick['bonus']:g}" if "bonus" in pick else ""
            yield f"{action:15} {pick['target']}{gain}  (rule {pick['rule']})"
    for name in ("min_confidence", "route", "conflict"):
        if name in effect:
            yield f"{name:15} {effect[name]}"
    for name, value in effect.get("policy", {}).items():
        yield f"{'policy.' + name:15} {json.dumps(value, ensure_ascii=False)}"


def _write_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
