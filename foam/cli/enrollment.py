"""``foam token``, ``foam enroll``, ``foam audit``, and what an operator decides about newcomers."""

import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from capability_schemas.errors import AccessDenied, BrokerUnavailable, ConfigurationError
from capability_schemas.ids import now_ms
from foam.cli.admin import admin
from foam.cli.app import app, run_async
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import (
    DataClassOption,
    DataOption,
    GrantOption,
    TenantOption,
    ZoneOption,
    client_settings,
    connected,
)
from foam.cli.look import LEADING_REGISTRY, JsonOption, new_table, print_rich, show
from foam.mesh import Identity, MeshFolder
from foam.settings import Settings

__all__ = ["audit", "enroll", "token"]

_WAIT_S: Final = 600.0

token = typer.Typer(
    help="Make, list and revoke join tokens.", no_args_is_help=True, epilog=CODES_EPILOG
)
app.add_typer(token, name="token")
audit = typer.Typer(
    help="Look at the audit trail of the registry.", no_args_is_help=True, epilog=CODES_EPILOG
)
app.add_typer(audit, name="audit")


def _time(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# ---- tokens


@token.command(epilog=CODES_EPILOG)
@connected()
def create(
    settings: Settings,
    *,
    role: Annotated[
        str,
        typer.Option(
            "--role", help="Role it gives: node, device, router, admin, operator or observer."
        ),
    ] = "node",
    ttl: Annotated[
        str, typer.Option("--ttl", help="How long it may be used, up to 30 days: 90s, 10m, 2h, 7d.")
    ] = "10m",
    uses: Annotated[int, typer.Option("--uses", help="How many newcomers.", min=1, max=10_000)] = 1,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="Identity it is good for; may be repeated. Default: any."),
    ] = None,
    zone: ZoneOption = None,
    grant: GrantOption = None,
    data_class: DataClassOption = None,
    tenant: TenantOption = None,
    approve: Annotated[
        bool, typer.Option("--approve", help="An operator decides on each newcomer.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Members named by --name may be enrolled again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a join token; it is shown once, alone on standard output."""
    given: dict[str, Any] = {
        "names": name,
        "zones": zone,
        "grants": grant,
        "data": data_class,
        "tenant": tenant,
        "approve": approve,
        "replace": replace,
    }
    args: dict[str, Any] = {field: value for field, value in given.items() if value}

    def draw(answer: dict[str, Any]) -> None:
        sys.stderr.write(f"token {answer['id']}, good until {_time(answer['expires_at'])}\n")
        sys.stdout.write(answer["token"] + "\n")

    show(
        settings,
        "token_create",
        draw,
        target=LEADING_REGISTRY,
        as_json=as_json,
        role=role,
        ttl_ms=_token_life(ttl),
        uses=uses,
        **args,
    )


def _token_life(text: str) -> int:
    from registry.enrollment.desk import MAX_TOKEN_MS

    ttl_ms = _milliseconds(text, "--ttl")
    if not 1 <= ttl_ms <= MAX_TOKEN_MS:
        raise ConfigurationError(f"--ttl {text!r}: a token lasts up to 30 days, such as 10m or 7d")
    return ttl_ms


def _milliseconds(text: str, option: str) -> int:
    units = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not number.isdigit():
        raise ConfigurationError(f"{option} {text!r}: write a number and s, m, h or d, such as 10m")
    return int(number) * units[unit]


@token.command("list", epilog=CODES_EPILOG)
@connected()
def list_tokens(settings: Settings, *, as_json: JsonOption = False) -> None:
    """List the tokens that may still be used; their secrets are not known any more."""

    def draw(answer: dict[str, Any]) -> None:
        table = new_table("token", "role", "uses left", "good until", "for", "made by")
        for row in answer["tokens"]:
            table.add_row(
                row["id"],
                row["role"],
                str(row["uses"]),
                _time(row["expires_at"]),
                ", ".join(row["names"]) or "any name",
                row["created_by"],
            )
        print_rich(table)

    show(settings, "tokens", draw, target=LEADING_REGISTRY, as_json=as_json)


@token.command("revoke", epilog=CODES_EPILOG)
@connected()
def revoke_token(
    settings: Settings, token_id: Annotated[str, typer.Argument(help="Id of the token.")]
) -> None:
    """Make a token worthless."""
    show(
        settings,
        "token_revoke",
        _say_revoked,
        target=LEADING_REGISTRY,
        token=token_id,
    )


# ---- newcomers


@app.command(epilog=CODES_EPILOG)
def enroll(
    *,
    broker: Annotated[
        str,
        typer.Option(
            "--broker",
            help="Broker, mqtts://host:port (or wss://host:port/mqtt); several of one cluster, "
            "separated by commas.",
        ),
    ],
    identity: Annotated[str, typer.Option("--id", help="Identity wanted.")],
    token_file: Annotated[
        str | None,
        typer.Option(
            "--token",
            help="The join token, the file it stands in, or - for standard input (which keeps it "
            "out of the process list). Not needed where the machine has joined.",
        ),
    ] = None,
    role: Annotated[str, typer.Option("--role", help="Role wanted.")] = "node",
    site: Annotated[str, typer.Option("--site", help="Site to join.")] = "local",
    password: Annotated[
        bool, typer.Option("--password", help="Ask for a password instead of a certificate.")
    ] = False,
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", help="Seconds to wait, an operator's decision included.", min=1),
    ] = _WAIT_S,
    data: DataOption = None,
) -> None:
    """Join a mesh: make keys here, ask for papers, keep them.

    Prints the path of the identity file; `foam node FILE --identity PATH` runs a node with it.
    A machine that has joined already is left as it is, as long as the broker takes its papers;
    otherwise it joins anew with the token.
    """
    from broker.access.policy import Role
    from capability_schemas.enrollment import JoinToken
    from foam.enrolling import enroll as ask
    from foam.enrolling import store_papers

    settings = client_settings(data=data)
    folder = MeshFolder(settings.data).prepare()
    path = folder.identity_path(identity)
    has_papers = path.exists()
    if has_papers and asyncio.run(_papers_count(folder, identity, url=broker, site=site)):
        sys.stdout.write(f"{path}\n")
        return
    if token_file is None:
        if has_papers:
            raise AccessDenied(
                f"the broker refuses the papers of {identity} in {path}: it was thrown out, or its "
                "papers have run out; give a new join token (--token) to join anew"
            )
        raise ConfigurationError(f"{identity} has not joined yet: give a join token (--token)")
    try:
        wanted = Role(role)
    except ValueError as exc:
        raise ConfigurationError(f"role {role!r}: use one of {', '.join(Role)}") from exc
    join_token = JoinToken.parse(_token_text(token_file))

    async def main() -> None:
        papers = await ask(
            url=broker,
            token=join_token,
            identity=identity,
            role=wanted,
            site=site,
            timeout_s=timeout_s,
            certificate=not password and bool(join_token.authority),
            waiting=_say_waiting,
        )
        folder.forget(identity)  # only now: a refused token leaves everything as it was
        stored = await asyncio.to_thread(store_papers, papers, path.parent)
        sys.stderr.write(f"{identity} has joined site {site} as {role}\n")
        sys.stdout.write(f"{stored}\n")

    run_async(main())


async def _papers_count(folder: MeshFolder, identity: str, *, url: str, site: str) -> bool:
    """Tell whether the papers of this machine still serve, and say so."""
    from foam.enrolling import is_still_member

    path = folder.identity_path(identity)
    try:
        counts = await is_still_member(Identity.read(path), path.parent, url=url, site=site)
    except (BrokerUnavailable, TimeoutError) as error:
        sys.stderr.write(
            f"{identity} has joined already; its papers could not be tried: "
            f"{str(error) or 'the broker does not answer'}\n"
        )
        return True
    sys.stderr.write(
        f"{identity} has joined already\n" if counts else f"the papers of {identity} are refused\n"
    )
    return counts


def _token_text(given: str) -> str:
    if given == "-":
        return sys.stdin.read()
    if given.startswith("foam1."):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"--token {given}: neither a token nor a file to read") from exc


@admin.command(epilog=CODES_EPILOG)
@connected()
def enrollments(settings: Settings, *, as_json: JsonOption = False) -> None:
    """List newcomers that wait for a decision."""

    def draw(answer: dict[str, Any]) -> None:
        table = new_table("id", "role", "asked", "host", "system", "key", "token")
        for row in answer["enrollments"]:
            facts = row.get("facts") or {}
            table.add_row(
                row["id"],
                row["role"],
                _time(row["asked_at"]),
                facts.get("host", ""),
                facts.get("system", ""),
                (row.get("public_key") or "")[:12],
                row["token"],
            )
        print_rich(table)

    show(settings, "enrollments", draw, target=LEADING_REGISTRY, as_json=as_json)


IdentityArgument = Annotated[str, typer.Argument(help="The identity.")]


@admin.command(epilog=CODES_EPILOG)
@connected()
def approve(settings: Settings, identity: IdentityArgument) -> None:
    """Let a newcomer in."""
    show(settings, "approve", _say_decision, target=LEADING_REGISTRY, id=identity)


@admin.command(epilog=CODES_EPILOG)
@connected()
def deny(
    settings: Settings,
    identity: IdentityArgument,
    *,
    reason: Annotated[str, typer.Option("--reason", help="What it is told.")] = "",
) -> None:
    """Keep a newcomer out."""
    args: dict[str, Any] = {"reason": reason} if reason else {}
    show(settings, "deny", _say_decision, target=LEADING_REGISTRY, id=identity, **args)


@admin.command(epilog=CODES_EPILOG)
@connected()
def revoke(
    settings: Settings,
    identity: IdentityArgument,
    *,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also yourself, the last administrator, or what this mesh itself runs with.",
        ),
    ] = False,
) -> None:
    """Throw a member out: its connections are cut, its password and papers are void."""
    args: dict[str, Any] = {"force": True} if force else {}
    show(
        settings,
        "revoke",
        _say_revoked,
        target=LEADING_REGISTRY,
        id=identity,
        **args,
    )


def _say_revoked(answer: dict[str, Any]) -> None:
    sys.stderr.write(f"{answer['id']} is revoked\n")


def _say_waiting(reason: str) -> None:
    sys.stderr.write(f"waiting: {reason}\n")


def _say_decision(answer: dict[str, Any]) -> None:
    reason = f": {answer['reason']}" if answer.get("reason") else ""
    sys.stderr.write(f"{answer['id']}: {answer['status']}{reason}\n")


# ---- the trail


@audit.command("show", epilog=CODES_EPILOG)
@connected()
def show_audit(
    settings: Settings,
    *,
    limit: Annotated[int, typer.Option("--limit", help="How many entries.", min=1)] = 20,
    action: Annotated[
        str | None,
        typer.Option("--action", help="Only this; those that begin so, where it ends in *."),
    ] = None,
    actor: Annotated[str | None, typer.Option("--actor", help="Only what this one did.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Only of the last 90s, 10m, 2h, 7d.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the latest entries, newest last."""
    asked = {
        "action": action,
        "actor": actor,
        "since": None if since is None else now_ms() - _milliseconds(since, "--since"),
    }
    args: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}

    def draw(answer: dict[str, Any]) -> None:
        table = new_table("number", "when", "who", "what", "whom", "more")
        for row in reversed(answer["entries"]):
            table.add_row(
                str(row["number"]),
                _time(row["at"]),
                row["actor"],
                row["action"],
                row["subject"],
                json.dumps(row["detail"], ensure_ascii=False) if row["detail"] else "",
            )
        print_rich(table)

    show(settings, "audit", draw, target=LEADING_REGISTRY, as_json=as_json, limit=limit, **args)


@audit.command(epilog=CODES_EPILOG)
def verify(*, data: DataOption = None) -> None:
    """Check that nobody has touched the trails of the registries of this data folder."""
    from registry.store.audit import verify_trail

    settings = client_settings(data=data)
    folder = MeshFolder(settings.data)
    keys = folder.registry_keys()
    if not keys:
        raise ConfigurationError(f"there is no registry in {settings.data}: name its data folder")
    trails = {name: folder.registry_files(name)[1] for name in keys}
    # One that was never started has no trail; of the first one that would be a loss.
    written = [name for name in keys if trails[name].exists()] or [min(keys)]
    for name in written:
        found = verify_trail(trails[name], keys[name].public)
        if found.problem:
            raise ConfigurationError(
                f"the audit trail {trails[name]} was touched: {found.problem}",
                number=found.broken_at,
            )
        of = f"{name}: " if len(written) > 1 else ""
        sys.stdout.write(f"{of}{found.entries} entries, whole; the last one is {found.head}\n")
