"""``foam admin``: orders to the router; ``foam quotas``, ``foam waiting``: clients and tasks."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from foam.cli.app import app
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import connected
from foam.cli.look import JsonOption, new_table, print_rich, show
from foam.cli.several import summed_stats, told_best, waiting_of_all
from foam.settings import Settings

__all__ = ["admin", "quotas", "waiting"]

admin = typer.Typer(
    help="Steer the mesh: nodes, stats, task, reputation, encoder.",
    no_args_is_help=True,
    epilog=CODES_EPILOG,
)
app.add_typer(admin, name="admin")

_UNIT: Final = 1024

NodeArgument = Annotated[str, typer.Argument(help="The node.")]
TargetOption = Annotated[
    str | None,
    typer.Option("--target", help="Router (or registry) to ask, and no other."),
]


def _draw(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer, ensure_ascii=False, indent=2) + "\n")


def _order(verb: str, words: str) -> None:
    """Make the command for a verb that takes a node."""

    @connected()
    def order(
        settings: Settings,
        node: NodeArgument,
        *,
        target: TargetOption = None,
    ) -> None:
        show(settings, verb, _draw, target=target, node=node)

    admin.command(verb, help=words, epilog=CODES_EPILOG)(order)


_order("drain", "Have a node finish what it runs and take nothing new.")
_order("undrain", "Have a drained node take work again.")
_order("cordon", "Route nothing to a node any more; it hears nothing of it.")
_order("uncordon", "Route to a node again.")


@admin.command(epilog=CODES_EPILOG)
@connected()
def stats(
    settings: Settings,
    *,
    target: TargetOption = None,
) -> None:
    """Show the counters of the routers: summed up, and of each where there are several."""
    show(settings, "stats", _draw, target=target, merge=summed_stats)


@admin.command(epilog=CODES_EPILOG)
@connected()
def task(
    settings: Settings,
    task_id: Annotated[str, typer.Argument(help="Id of the task.")],
    *,
    client: Annotated[str | None, typer.Option("--client", help="Whose task it is.")] = None,
    target: TargetOption = None,
) -> None:
    """Show what became of a task, and why it went where it went."""
    args: dict[str, Any] = {"id": task_id} if client is None else {"id": task_id, "client": client}
    show(settings, "task", _draw, target=target, merge=told_best, **args)


@admin.command(epilog=CODES_EPILOG)
@connected()
def reputation(
    settings: Settings,
    *,
    node: Annotated[str | None, typer.Option("--node", help="That of one node.")] = None,
    function: Annotated[
        str | None, typer.Option("--function", help="That of one function.")
    ] = None,
    target: TargetOption = None,
) -> None:
    """Show how far nodes are trusted with their functions, and who is left alone for silence."""
    asked = {"node": node, "function": function}
    args: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    show(settings, "reputation", _draw, target=target, **args)


@admin.command(epilog=CODES_EPILOG)
@connected()
def encoder(
    settings: Settings,
    backend: Annotated[
        str | None,
        typer.Argument(help="Have this one take over: onnx or sentence_transformers."),
    ] = None,
    *,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Folder of its model, on the router's machine.")
    ] = None,
    target: TargetOption = None,
) -> None:
    """Show which encoder the router uses, or have another one take over.

    The old one serves until the whole catalogue is embedded anew; ask again to see how far it is.
    When the router starts anew, FOAM_ENCODER and FOAM_ENCODER_BACKEND decide.
    """
    asked = {"backend": backend, "folder": None if folder is None else str(folder)}
    args: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    show(settings, "encoder", _draw, target=target, **args)


_SHOWN: Final = 5


def _limit(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if not name.startswith("bytes"):
        return f"{value:g}"
    size, unit = value, "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < _UNIT:
            break
        size, unit = size / _UNIT, larger
    return f"{size:.4g} {unit}"


def _draw_quotas(answer: dict[str, Any]) -> None:
    if answer["problem"]:
        sys.stderr.write(f"not in force: {answer['problem']}\n")
    table = new_table(
        "who", "role", "tasks/s", "burst", "at a time", "bytes/s", "weight", "left", "refused"
    )

    def add(who: str, limits: dict[str, Any], *, role: str = "", use: tuple[str, ...]) -> None:
        names = ("tasks_per_s", "burst", "concurrent", "bytes_per_s", "weight")
        shown = [_limit(name, limits[name]) for name in names]
        shown[2] = use[0] + shown[2]
        table.add_row(who, role, *shown, *use[1:])

    add("default", answer["default"], use=("", "", ""))
    for role, limits in answer["role"].items():
        add(f"every {role}", limits, use=("", "", ""))
    for row in answer["clients"]:
        left = "" if row["tasks_left"] is None else str(row["tasks_left"])
        use = (f"{row['live']} of " if row["limits"]["concurrent"] else str(row["live"]), left)
        add(row["client"], row["limits"], role=row["role"], use=(*use, str(row["refused"])))
    print_rich(table)
    more = answer["total"] - len(answer["clients"])
    if more > 0:
        sys.stderr.write(f"and {more} more clients; name one to see it\n")


@app.command(epilog=CODES_EPILOG)
@connected()
def quotas(
    settings: Settings,
    client: Annotated[str | None, typer.Argument(help="Of this client alone.")] = None,
    *,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what clients may ask of the router, and what they use of it.

    Quotas stand in quotas.toml in the data folder of the router (docs/quotas.md), which it follows.
    """
    args: dict[str, Any] = {} if client is None else {"client": client}
    show(settings, "quotas", _draw_quotas, target=target, as_json=as_json, **args)


def _draw_waiting(answer: dict[str, Any]) -> None:
    table = new_table("function", "waiting", "longest", "leave/s", "priorities", "clients")
    for row in answer["functions"]:
        table.add_row(
            row["function"],
            str(row["waiting"]),
            f"{row['longest_ms'] / 1000:.1f} s",
            f"{row['leave_per_s']:g}",
            _counts(row["priorities"]),
            _counts(row["clients"]),
        )
    print_rich(table)
    share = answer["bytes"] / max(1, answer["limit_bytes"])
    sys.stderr.write(
        f"{answer['waiting']} of {answer['limit']} tasks wait, {share:.0%} of the bytes\n"
    )


def _counts(counted: dict[str, int]) -> str:
    shown = [f"{name}: {count}" for name, count in list(counted.items())[:_SHOWN]]
    more = len(counted) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


@app.command(epilog=CODES_EPILOG)
@connected()
def waiting(
    settings: Settings,
    *,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which accepted tasks wait for a node with room: by function, priority and client."""
    show(
        settings,
        "waiting",
        _draw_waiting,
        target=target,
        as_json=as_json,
        merge=waiting_of_all,
    )
