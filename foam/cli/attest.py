"""``foam attest``: what nodes show of themselves, and what is asked of them."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from broker.access.credentials import write_private
from capability_schemas.errors import ConfigurationError, Conflict
from foam.cli.app import app, run_async
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import DataOption, client_settings, connected
from foam.cli.look import LEADING_REGISTRY, JsonOption, ask_admin, new_table, print_rich
from foam.cli.look import show as ask
from foam.mesh import MeshFolder
from foam.settings import Settings

__all__ = ["attest", "check", "reference", "show"]

attest = typer.Typer(
    help="Attestation: what nodes show of themselves, and which rights need it.",
    no_args_is_help=True,
    epilog=CODES_EPILOG,
)
app.add_typer(attest, name="attest")


@attest.command(epilog=CODES_EPILOG)
@connected()
def show(
    settings: Settings,
    node: Annotated[str | None, typer.Argument(help="One node, with all it has shown.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Show which nodes are trusted, until when, and what is withheld from the others."""

    def draw(answer: dict[str, Any]) -> None:
        if answer["problem"]:
            sys.stderr.write(f"not in force as it is now: {answer['problem']}\n")
        table = new_table("node", "state", "until", "withheld", "why")
        for row in answer["nodes"]:
            until = row["until"]
            day = datetime.fromtimestamp(until / 1000, UTC) if until else None
            why = "; ".join(row["problems"]) or row["last_refusal"]
            when = day.strftime("%Y-%m-%d %H:%M UTC") if day else ""
            table.add_row(row["node"], row["state"], when, row["withheld"], why)
        print_rich(table)
        if node is not None:
            _draw_evidence(answer["nodes"][0].get("evidence") or {})

    args: dict[str, Any] = {} if node is None else {"node": node}
    ask(settings, "attestation", draw, target=LEADING_REGISTRY, as_json=as_json, **args)


def _draw_evidence(evidence: dict[str, Any]) -> None:
    table = new_table("measured", "digest")
    for what, digest in sorted(evidence.get("measurements", {}).items()):
        table.add_row(what, digest)
    print_rich(table)


@attest.command(epilog=CODES_EPILOG)
@connected()
def reference(
    settings: Settings,
    node: Annotated[str, typer.Argument(help="The node whose evidence is taken for good.")],
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the reference; the node's when omitted.")
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Add it to attestation.toml in the data folder.")
    ] = False,
) -> None:
    """Write a reference that fits what a node shows at the moment; look at it before you use it."""

    async def main() -> None:
        args: dict[str, Any] = {"node": node} if name is None else {"node": node, "name": name}
        answer = await ask_admin(settings, "attestation_reference", target=LEADING_REGISTRY, **args)
        text = str(answer["toml"])
        if add:
            _add(MeshFolder(settings.data).attestation_file, name or node, text)
        else:
            sys.stdout.write(text)

    run_async(main())


def _add(path: Path, name: str, text: str) -> None:
    """Put a reference at the end of the file, where a table may always stand.

    Raises:
        Conflict: It has one of this name.
        ConfigurationError: The file is broken, or cannot be written.
    """
    from registry.attestation.policy import parse_policy

    try:
        before = path.read_text("utf-8") if path.exists() else ""
        known = parse_policy(before, str(path)).references
        if name in known:
            raise Conflict(
                f"{path} has a reference {name!r} already: give another --name, and let the rule "
                "accept both, or remove the old one"
            )
        made = f"{before.rstrip()}\n\n{text}" if before.strip() else text
        parse_policy(made, str(path))
        write_private(path, made)
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    sys.stderr.write(f"added to {path}; a rule has to name it before anything is asked\n")


@attest.command(epilog=CODES_EPILOG)
def check(
    file: Annotated[
        Path | None, typer.Argument(help="File; attestation.toml of the mesh when not named.")
    ] = None,
    *,
    data: DataOption = None,
) -> None:
    """Look a file over; the registry takes it up only when this finds nothing."""
    from registry.attestation.policy import parse_policy

    settings = client_settings(data=data)
    path = MeshFolder(settings.data).attestation_file if file is None else file
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc}") from exc
    policy = parse_policy(text, str(path))
    if not policy.rules:
        sys.stdout.write(f"{path}: no rules: nothing is asked of any node\n")
    for number, rule in enumerate(policy.rules, 1):
        whom = ", ".join((*rule.nodes, *(f"zone {zone}" for zone in rule.zones))) or "every node"
        needs = " or ".join(rule.references) or "any evidence"
        tpm = ", with a quote of its TPM" if rule.pcrs else ""
        sys.stdout.write(f"rule {number}: {whom} needs {needs}{tpm} for {rule.gates.words()}\n")
