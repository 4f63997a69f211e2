"""``foam status``: the whole mesh at one glance."""

import json
import sys
from collections import Counter
from typing import Any, Final

from capability_schemas.topics import TopicKind
from foam.cli.app import app, run_async
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import connected
from foam.cli.look import JsonOption, new_table, print_rich
from foam.settings import Settings

__all__ = ["draw", "status"]

_ATTENTION: Final = 1
_NOT_FOUND_OUT: Final = 22
_LISTED: Final = 6
_KINDS: Final = (
    ("brokers", "broker"),
    ("routers", "router"),
    ("registries", "registry"),
    ("nodes", "node"),
)


def draw(told: dict[str, Any]) -> None:
    """Show an overview to a person.

    Args:
        told: What `foam.overview.look_at` returns.
    """
    table = new_table("", "how many", "how they are")
    unknown = {sentence.partition(":")[0] for sentence in told["unknown"]}
    for what, name in _KINDS:
        rows = told[what]
        if what in unknown:
            table.add_row(what, "?", "")
        elif len(rows) <= _LISTED and what != "nodes":
            table.add_row(
                what, str(len(rows)), ", ".join(f"{row[name]} {row['state']}" for row in rows)
            )
        else:
            counted = Counter(row["state"] for row in rows).most_common()
            table.add_row(
                what, str(len(rows)), ", ".join(f"{count} {state}" for state, count in counted)
            )
    if (tasks := told["tasks"]) is None:
        table.add_row("tasks", "?", "")
    else:
        table.add_row(
            "tasks",
            str(tasks["running"] + tasks["waiting"]),
            f"{tasks['running']} running, {tasks['waiting']} waiting",
        )
    print_rich(table)
    for sign, sentences in (("!", told["warnings"]), ("?", told["unknown"])):
        for sentence in sentences:
            sys.stdout.write(f"{sign} {sentence}\n")
    if not told["warnings"] and not told["unknown"]:
        sys.stdout.write("all is well\n")


@app.command(epilog=CODES_EPILOG)
@connected()
def status(
    settings: Settings,
    *,
    as_json: JsonOption = False,
) -> None:
    """Show who is there and what is wrong, for administrators and operators.

    Exits with 1 when something needs a look (!), else with 22 when something could not be found
    out (?).
    """

    async def main() -> int:
        from foam.overview import look_at
        from foam.sdk.address import find_mesh
        from foam.sdk.client import MeshClient

        address = find_mesh(settings, admin=True)
        address.require(TopicKind.ADMIN)
        async with MeshClient.at(address) as mesh:
            told = await look_at(mesh)
        if as_json:
            sys.stdout.write(json.dumps(told, ensure_ascii=False, indent=2) + "\n")
        else:
            draw(told)
        if told["warnings"]:
            return _ATTENTION
        return _NOT_FOUND_OUT if told["unknown"] else 0

    run_async(main())
