"""``foam node``: run a node, and look its declaration over before."""

import difflib
import json
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from capability_schemas.errors import ConfigurationError
from foam.cli.app import app
from foam.cli.codes import CODES_EPILOG, exit_code
from foam.cli.connection import DataOption, client_settings, connected, process_settings
from foam.cli.look import JsonOption
from foam.cli.processes import IdentityOption, SupervisedOption, run_reporting
from foam.settings import Settings
from foam.status import ProcessStatus

if TYPE_CHECKING:
    from capability_schemas.problem import Problem

__all__ = ["check", "node", "run"]

_RUN: Final = "run"


class _NodeGroup(TyperGroup):
    """The commands on nodes; without the name of one, ``foam node FILE`` runs FILE."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put in the name of the command that is meant when none is named."""
        if args and args[0] != "--help" and not self._is_command(args):
            args = [_RUN, *args]
        return super().parse_args(ctx, args)

    def _is_command(self, args: list[str]) -> bool:
        """Tell whether a command is named, or meant: ``foam node chek FILE`` is no node."""
        first, *rest = args
        if first in self.commands or not rest or rest[0].startswith("-"):
            return first in self.commands
        return bool(difflib.get_close_matches(first, self.commands, n=1))


node = typer.Typer(
    cls=_NodeGroup,
    help="Run a node (`foam node FILE`), or check what it would run.",
    no_args_is_help=True,
    epilog=CODES_EPILOG,
)
app.add_typer(node, name="node")

SourceArgument = Annotated[
    str,
    typer.Argument(help="Node file (.toml), Python file (.py) or module with its functions."),
]


@node.command(_RUN, epilog=CODES_EPILOG)
@connected(partial(process_settings, "node"))
def run(
    settings: Settings,
    source: SourceArgument,
    *,
    node_id: Annotated[
        str | None, typer.Option("--id", help="Id of the node; that of the file otherwise.")
    ] = None,
    identity: IdentityOption = None,
    no_watch: Annotated[
        bool,
        typer.Option(
            "--no-watch",
            help="Take up edits of the file and its code on SIGHUP only (FOAM_WATCH=0).",
        ),
    ] = False,
    supervised: SupervisedOption = False,
) -> None:
    """Run a node: its functions become capabilities of the mesh, and edits are taken up live.

    On another machine: `foam device add ID --role node` here, copy the identity file and its key
    there, then `foam node FILE --identity ID.json`.
    """
    from foam.wiring import run_node

    if no_watch:
        settings = settings.model_copy(update={"watch": False})
    status = ProcessStatus(title="node", supervised=supervised)
    run_reporting(
        run_node(settings, source=source, node_id=node_id, identity_file=identity, status=status),
        status,
    )


@node.command(epilog=CODES_EPILOG)
def check(
    source: SourceArgument,
    *,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look for everything in a declaration that would keep it from running, or from being found.

    Its code is imported, in a process of its own; nothing is run, no mesh is needed. Warnings do
    not change the exit code.
    """
    from foam.wiring import check_node

    declaration, problems = check_node(client_settings(data=data), source)
    names = [spec.name for spec in declaration.functions]
    failed = any(not problem.warning for problem in problems)
    if as_json:
        facts = {
            "source": source,
            "ok": not failed,
            "functions": names,
            "problems": [asdict(problem) for problem in problems],
        }
        sys.stdout.write(json.dumps(facts, ensure_ascii=False, indent=2) + "\n")
    else:
        _tell(source, names, problems)
    if failed:
        raise typer.Exit(exit_code(ConfigurationError(source)))


def _tell(source: str, names: "list[str]", problems: "list[Problem]") -> None:
    """Write what is wrong, then what could be better, then the sum."""
    for problem in sorted(problems, key=lambda one: one.warning):
        kind = "warning" if problem.warning else "error  "
        sys.stdout.write(f"{kind} {problem}\n")
    warnings = sum(problem.warning for problem in problems)
    counts = (
        (len(names), "function"),
        (len(problems) - warnings, "error"),
        (warnings, "warning"),
    )
    told = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)
    sys.stdout.write(f"{source}: {told}\n")
