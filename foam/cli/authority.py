"""``foam authority``: the certificate authority of the site, and its rotation."""

import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from foam.cli.app import app
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import connected
from foam.cli.look import LEADING_REGISTRY, JsonOption, new_table, print_rich
from foam.cli.look import show as ask
from foam.settings import Settings

__all__ = ["authority", "retire", "rotate", "show"]

_FINGERPRINT_SHOWN = 16
_NAMES_SHOWN = 20

authority = typer.Typer(
    help="The certificate authority of the site: look at it, rotate it.",
    no_args_is_help=True,
    epilog=CODES_EPILOG,
)
app.add_typer(authority, name="authority")


def _day(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _draw(answer: dict[str, Any]) -> None:
    table = new_table("root", "made", "good until", "fingerprint", "")
    for root in answer["roots"]:
        does = "signs members" if root["signing"] else "trusted"
        shown = root["fingerprint"][:_FINGERPRINT_SHOWN]
        table.add_row(
            str(root["number"]), _day(root["made_at"]), _day(root["not_after"]), shown, does
        )
    print_rich(table)
    if names := answer.get("locked_out"):
        print_rich(f"locked out, they have to enroll again: {_names(names)}")
    if not answer["rotating"]:
        return
    waiting = answer["not_renewed"]
    print_rich(
        f"{len(waiting)} have not renewed yet: {_names(waiting)}"
        if waiting
        else "every member has renewed: foam authority retire"
    )
    if names := answer["old_tokens"]:
        print_rich(f"join tokens of the old root, of no use once it is retired: {_names(names)}")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


@authority.command(epilog=CODES_EPILOG)
@connected()
def show(
    settings: Settings,
    *,
    pem: Annotated[
        bool,
        typer.Option(
            "--pem",
            help="Write the certificates that clients trust the broker by (--cafile), and no more.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the roots, and during a rotation who has not renewed yet."""
    draw = _write_pem if pem else _draw
    ask(settings, "authority", draw, target=LEADING_REGISTRY, as_json=as_json)


def _write_pem(answer: dict[str, Any]) -> None:
    sys.stdout.write(answer["bundle"])


@authority.command(epilog=CODES_EPILOG)
@connected()
def rotate(settings: Settings, *, as_json: JsonOption = False) -> None:
    """Make a new root. Both are trusted from now on, and running members renew by themselves."""
    ask(settings, "authority_rotate", _draw, target=LEADING_REGISTRY, as_json=as_json)


@authority.command(epilog=CODES_EPILOG)
@connected()
def retire(
    settings: Settings,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also when members have not renewed: locks them out.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Drop the old root, when every member has a certificate of the new one."""
    args: dict[str, Any] = {"force": True} if force else {}
    ask(
        settings,
        "authority_retire",
        _draw,
        target=LEADING_REGISTRY,
        as_json=as_json,
        **args,
    )
