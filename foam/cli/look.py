"""Looking at a mesh: ``foam nodes``, ``foam functions``, ``foam explain``."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Annotated, Any, Final

import typer

from foam.cli.app import app, run_async
from foam.cli.ask import read_json_option
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import connected
from foam.settings import Settings

__all__ = [
    "JsonOption",
    "ask_admin",
    "explain",
    "functions",
    "new_table",
    "nodes",
    "print_rich",
    "show",
]

_PIPE_COLUMNS: Final = 160
"""Width of tables that no terminal limits."""

JsonOption = Annotated[bool, typer.Option("--json", help="Write the answer as JSON.")]


async def ask_admin(
    settings: Settings, verb: str, *, target: str | None = None, **args: Any
) -> dict[str, Any]:
    """Connect as the administrator, ask one verb, return the answer.

    Args:
        settings: Which mesh.
        verb: What to do.
        target: Who shall do it; the router when None.
        args: Arguments of the verb.

    Raises:
        FoamError: No mesh, no broker, no answer, or what the target answered.
    """
    from foam.sdk.address import find_mesh
    from foam.sdk.client import MeshClient

    async with MeshClient.at(find_mesh(settings, admin=True)) as mesh:
        answer: dict[str, Any] = await mesh.admin(verb, target=target, **args)
        return answer


def show(
    settings: Settings,
    verb: str,
    draw: Callable[[dict[str, Any]], None],
    *,
    as_json: bool = False,
    target: str | None = None,
    **args: Any,
) -> None:
    """Ask one verb and show the answer.

    Args:
        settings: Which mesh.
        verb: What to ask.
        draw: Shows the answer to a person.
        as_json: Write it as JSON instead.
        target: Who is asked.
        args: Arguments of the verb.
    """

    async def main() -> None:
        answer = await ask_admin(settings, verb, target=target, **args)
        if as_json:
            sys.stdout.write(json.dumps(answer, ensure_ascii=False, indent=2) + "\n")
        else:
            draw(answer)

    run_async(main())


def new_table(*columns: str) -> Any:
    """Make a table with these columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_rich(thing: Any) -> None:
    """Print a table, or text, to the width of the terminal."""
    from rich.console import Console

    width = shutil.get_terminal_size(fallback=(_PIPE_COLUMNS, 50)).columns
    Console(highlight=False, width=width).print(thing)


def _draw_nodes(answer: dict[str, Any]) -> None:
    table = new_table("node", "state", "running", "queued", "seen", "functions")
    for row in answer.get("nodes", ()):
        load = row.get("load") or {}
        state = "cordoned" if row.get("cordoned") else str(row.get("state", ""))
        if not row.get("live") and state == "birth":
            state = "silent"
        seen = row.get("seen_ms_ago")
        table.add_row(
            row["node"],
            "ready" if state == "birth" else state,
            str(load.get("running", "")),
            str(load.get("queued", "")),
            f"{seen / 1000:.0f} s ago" if seen is not None else "",
            ", ".join(row.get("functions", ())),
        )
    print_rich(table)


def _draw_functions(answer: dict[str, Any]) -> None:
    table = new_table("function", "version", "node", "live", "description")
    for row in answer.get("functions", ()):
        table.add_row(
            row["function"],
            row["version"],
            row["node"],
            _liveness(row),
            row.get("description", ""),
        )
    print_rich(table)


def _liveness(row: Mapping[str, Any]) -> str:
    if not row.get("live"):
        return "no"
    # Its instances crashed in a row; it still gets a task now and then, to see whether it recovers.
    return "degraded" if (row.get("load") or {}).get("degraded") else "yes"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "" if value is None else str(value)


def telling_terms(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Sort the terms of a score into those that tell candidates apart, and those that do not.

    A term that repeats the similarity or the score row by row is left out altogether.

    Args:
        rows: Candidates as the router explains them.

    Returns:
        Names of the terms worth a column; name and value of those equal for every candidate.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.get("terms", {})))
    known = [
        [row.get("similarity", {}).get("score") for row in rows],
        [row.get("value") for row in rows],
    ]
    columns: list[str] = []
    same: dict[str, Any] = {}
    for name in names:
        values = [row.get("terms", {}).get(name) for row in rows]
        if all(value == values[0] for value in values):
            same[name] = values[0]
        elif not any(map(_alike, known, repeat(values))):
            columns.append(name)
    return columns, same


def _alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return [_number(value) for value in one] == [_number(value) for value in other]


def _draw_explanation(answer: dict[str, Any]) -> None:
    print_rich(f"by {answer.get('by')}, threshold {_number(answer.get('threshold'))}")
    rows = list(answer.get("candidates", ()))
    terms, same = telling_terms(rows)
    table = new_table("node", "function", "similarity", *terms, "score", "verdict")
    for row in rows:
        values = row.get("terms", {})
        table.add_row(
            str(row.get("node", "")),
            f"{row.get('function', '')} {row.get('version', '')}",
            _number(row.get("similarity", {}).get("score")),
            *(_number(values.get(term)) for term in terms),
            _number(row.get("value")),
            str(row.get("verdict", "")),
        )
    if rows:
        print_rich(table)
    if same:
        listed = ", ".join(f"{name} {_number(value)}" for name, value in same.items())
        print_rich(f"the same for all: {listed}")
    chosen = answer.get("chosen")
    if chosen:
        print_rich(f"chosen: {chosen[0]}/{chosen[1]}")
    elif answer.get("problem"):
        print_rich(f"nobody: {answer['problem'].get('code')}: {answer['problem'].get('message')}")


@app.command(epilog=CODES_EPILOG)
@connected()
def nodes(
    settings: Settings,
    *,
    as_json: JsonOption = False,
) -> None:
    """List the nodes of the mesh."""
    show(settings, "nodes", _draw_nodes, as_json=as_json)


@app.command(epilog=CODES_EPILOG)
@connected()
def functions(
    settings: Settings,
    *,
    as_json: JsonOption = False,
) -> None:
    """List the functions that the mesh can route to."""
    show(settings, "functions", _draw_functions, as_json=as_json)


@app.command(epilog=CODES_EPILOG)
@connected()
def explain(
    settings: Settings,
    text: Annotated[str | None, typer.Argument(help="What would be asked.")] = None,
    *,
    function: Annotated[
        str | None, typer.Option("--function", help="Address a function by name.")
    ] = None,
    input_: Annotated[str | None, typer.Option("--input", help="Input: JSON or @file.")] = None,
    skills: Annotated[
        list[str] | None, typer.Option("--skills", help="Skill the function must offer.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Demands on the node: JSON or @file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show who would be chosen for a task, and why, without running it."""
    fields = {
        "text": text,
        "function": function,
        "input": read_json_option(input_, "input"),
        "skills": skills or None,
        "policy": read_json_option(policy, "policy"),
    }
    task = {name: value for name, value in fields.items() if value is not None}
    show(settings, "explain", _draw_explanation, as_json=as_json, task=task)
