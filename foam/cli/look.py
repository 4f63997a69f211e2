"""Looking at a mesh: ``foam nodes``, ``functions``, ``routers``, ``registries``."""

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from capability_schemas.errors import FoamError, NotFound, Unavailable
from capability_schemas.topics import TopicKind
from foam.cli.app import app, run_async
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import connected
from foam.mesh import REGISTRY_ID
from foam.overview import node_condition
from foam.settings import Settings

if TYPE_CHECKING:
    from foam.sdk.client import MeshClient

__all__ = [
    "LEADING_REGISTRY",
    "JsonOption",
    "ask_admin",
    "functions",
    "new_table",
    "nodes",
    "print_rich",
    "registries",
    "routers",
    "show",
]

_PIPE_COLUMNS: Final = 160
"""Width of tables that no terminal limits."""

LEADING_REGISTRY: Final = "registry:leading"
"""Asks the registry that leads; no identity has such a name."""

_ATTEMPTS: Final = 8
_AGAIN_S: Final = 0.5

ANSWER_S: Final = 10.0
"""How long a router may take to answer, seconds."""

Merge = Callable[[Mapping[str, Mapping[str, Any]]], dict[str, Any]]
"""Makes one answer of those of several routers, by router."""

JsonOption = Annotated[bool, typer.Option("--json", help="Write the answer as JSON.")]


async def ask_admin(
    settings: Settings,
    verb: str,
    *,
    target: str | None = None,
    timeout_s: float = ANSWER_S,
    merge: Merge | None = None,
    **args: Any,
) -> dict[str, Any]:
    """Connect as the administrator, ask one verb, return the answer, all pages of it.

    Args:
        settings: Which mesh.
        verb: What to do.
        target: Who shall do it; the router when None, and the registry that leads when it is
            `LEADING_REGISTRY`.
        timeout_s: How long an answer may take, seconds.
        merge: Where nobody in particular is asked, all routers are, and this makes one answer of
            theirs; who is silent is said on stderr.
        args: Arguments of the verb.

    Raises:
        NotFound: The target does not know what was asked about.
        FoamError: No mesh, no broker, no answer, or what else the target answered.
    """
    from foam.sdk.address import find_mesh
    from foam.sdk.client import MeshClient

    address = find_mesh(settings, admin=True)
    address.require(TopicKind.ADMIN)
    async with MeshClient.at(address) as mesh:
        try:
            if target == LEADING_REGISTRY:
                return await _ask_leader(mesh, verb, timeout_s=timeout_s, **args)
            if merge is None or target is not None:
                answer = await mesh.admin_pages(verb, target=target, timeout_s=timeout_s, **args)
                if mesh.router != address.router:
                    sys.stderr.write(f"{address.router} does not answer: {mesh.router} does\n")
                return answer
            answers = await mesh.admin_all(verb, timeout_s=timeout_s, **args)
        except NotFound as error:
            # Its code on the wire is that of a task nobody can do, and nobody asked for that.
            raise NotFound(error.message, **error.detail) from error
    for router in answers.silent:
        sys.stderr.write(f"{router} does not answer: what it has is missing here\n")
    return merge(answers.given)


async def _ask_leader(
    mesh: "MeshClient", verb: str, *, timeout_s: float, **args: Any
) -> dict[str, Any]:
    """Ask the registry that leads; another one, should that change in between."""
    left = _ATTEMPTS
    while True:
        leader = await mesh.registries.leader() or REGISTRY_ID
        left -= 1
        try:
            return await mesh.admin_pages(verb, target=leader, timeout_s=timeout_s, **args)
        except NotFound:
            raise
        except FoamError as error:  # it refused, and so nothing was done; silence says retryable=no
            if not (error.retryable and left):
                raise
        await asyncio.sleep(_AGAIN_S)


def show(
    settings: Settings,
    verb: str,
    draw: Callable[[dict[str, Any]], None],
    *,
    as_json: bool = False,
    target: str | None = None,
    timeout_s: float = ANSWER_S,
    merge: Merge | None = None,
    **args: Any,
) -> None:
    """Ask one verb and show the answer.

    Args:
        settings: Which mesh.
        verb: What to ask.
        draw: Shows the answer to a person.
        as_json: Write it as JSON instead.
        target: Who is asked.
        timeout_s: How long an answer may take, seconds.
        merge: As for `ask_admin`.
        args: Arguments of the verb.
    """

    async def main() -> None:
        answer = await ask_admin(
            settings, verb, target=target, timeout_s=timeout_s, merge=merge, **args
        )
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
    # Patterns like [ab] are no markup.
    Console(highlight=False, markup=False, width=width).print(thing)


def _draw_nodes(answer: dict[str, Any]) -> None:
    table = new_table("node", "state", "running", "queued", "seen", "functions")
    for row in answer.get("nodes", ()):
        load = row.get("load") or {}
        state = node_condition(row)
        if state == "asleep":
            state = _asleep_until(row.get("wake_at"))
        seen = row.get("seen_ms_ago")
        degraded = row.get("degraded", ())
        offered = [
            f"{name} (degraded)" if name in degraded else name for name in row.get("functions", ())
        ]
        more = f" and {row['more_functions']} more" if row.get("more_functions") else ""
        table.add_row(
            row["node"],
            state,
            str(load.get("running", "")),
            str(load.get("queued", "")),
            f"{seen / 1000:.0f} s ago" if seen is not None else "",
            ", ".join(offered) + more,
        )
    print_rich(table)


def _draw_routers(answer: dict[str, Any]) -> None:
    table = new_table("router", "state", "seen")
    for row in answer.get("routers", ()):
        state = "ready" if row.get("state") == "birth" else str(row.get("state", ""))
        seen = row.get("seen_ms_ago")
        table.add_row(
            row["router"],
            state if row.get("live") or state != "ready" else "silent",
            f"{seen / 1000:.0f} s ago" if seen is not None else "",
        )
    print_rich(table)


def _draw_registries(rows: list[dict[str, Any]]) -> None:
    table = new_table("registry", "state", "lets members in")
    for row in rows:
        state = "leads" if row["leads"] else "follows"
        if row["state"] != "birth" or row["reason"]:
            state = row["reason"] or str(row["state"])
        table.add_row(row["registry"], state, "yes" if row["enrolls"] else "no")
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


def _asleep_until(wake_at: int | None) -> str:
    if wake_at is None:
        return "asleep"
    return f"asleep until {datetime.fromtimestamp(wake_at / 1000):%H:%M:%S}"  # noqa: DTZ006  # theirs


def _liveness(row: Mapping[str, Any]) -> str:
    if row.get("wake_at") is not None:
        return _asleep_until(row["wake_at"])
    if not row.get("live"):
        return "no"
    # Its instances crashed in a row; it still gets a task now and then, to see whether it recovers.
    return "degraded" if (row.get("load") or {}).get("degraded") else "yes"


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
def routers(
    settings: Settings,
    *,
    as_json: JsonOption = False,
) -> None:
    """List the routers that share the tasks of the mesh."""

    async def main() -> None:
        try:
            answer = await ask_admin(settings, "routers")
        except Unavailable as error:
            answer = await _last_words(settings)
            if not answer["routers"]:
                raise
            sys.stderr.write(f"{error.message}; this is what the broker has kept\n")
        if as_json:
            sys.stdout.write(json.dumps(answer, indent=2) + "\n")
        else:
            _draw_routers(answer)

    run_async(main())


async def _last_words(settings: Settings) -> dict[str, Any]:
    """Return what routers said of themselves last, in the shape of a router's answer."""
    from foam.sdk.address import find_mesh
    from foam.sdk.client import MeshClient

    async with MeshClient.at(find_mesh(settings, admin=True)) as mesh:
        heard = await mesh.routers()
    rows = [
        {"router": state.router, "state": state.state, "live": live, "seen_ms_ago": None}
        for state, live in heard
    ]
    return {"routers": rows, "answered_by": None}


@app.command(epilog=CODES_EPILOG)
@connected()
def registries(
    settings: Settings,
    *,
    as_json: JsonOption = False,
) -> None:
    """List the registries, and which of them leads: it admits, lets in and revokes."""

    async def main() -> None:
        from foam.sdk.address import find_mesh
        from foam.sdk.client import MeshClient

        address = find_mesh(settings, admin=True)
        address.require(TopicKind.ADMIN)
        async with MeshClient.at(address) as mesh:
            states = await mesh.registries.states()
        rows = [
            state.model_dump(
                mode="json", include={"registry", "state", "reason", "leads", "term", "enrolls"}
            )
            for state in states
        ]
        if as_json:
            sys.stdout.write(json.dumps({"registries": rows}, indent=2) + "\n")
        else:
            _draw_registries(rows)

    run_async(main())


@app.command(epilog=CODES_EPILOG)
@connected()
def functions(
    settings: Settings,
    *,
    node: Annotated[str | None, typer.Option("--node", help="Those of one node.")] = None,
    function: Annotated[str | None, typer.Option("--function", help="Those of one name.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the functions that the mesh can route to."""
    asked = {"node": node, "function": function}
    args: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    show(settings, "functions", _draw_functions, as_json=as_json, **args)
