"""``foam access``: who may do what at the broker, and the same for a broker that runs elsewhere."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capability_schemas.errors import ConfigurationError, NotFound
from foam.cli.app import app
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import DataOption, SiteOption, client_settings

if TYPE_CHECKING:
    from broker.access.policy import AccessPolicy, Role
    from foam.settings import Settings

__all__ = ["access"]

_SELF = "{self}"

access = typer.Typer(
    help="Show what members may do at the broker, or export it for another one.",
    no_args_is_help=True,
    epilog=CODES_EPILOG,
)
app.add_typer(access, name="access")


@access.command(epilog=CODES_EPILOG)
def show(
    identity: Annotated[str | None, typer.Argument(help="A member of the mesh.")] = None,
    *,
    role: Annotated[
        str | None, typer.Option("--role", help="A role instead; {self} stands for its holder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data: DataOption = None,
    site: SiteOption = None,
) -> None:
    """Print the topic filters that one member, or a role, may publish and subscribe."""
    from foam.mesh import MeshFolder

    if (identity is None) == (role is None):
        raise ConfigurationError("name a member, or a role with --role")
    settings = client_settings(data=data, site=site)
    policy = _policy(settings)
    facts: dict[str, Any]
    if identity is None:
        wanted = _role(str(role))
        held = policy.template(wanted, _SELF)
        facts = {"role": wanted.value}
    else:
        found = MeshFolder(settings.data).credentials().identities().get(identity)
        if found is None:
            raise NotFound(f"{identity} is no member of the mesh in {settings.data}", id=identity)
        held = policy.filters(found.role, identity, apart=found.apart)
        facts = {
            "id": identity,
            "role": found.role.value,
            "disabled": found.disabled,
            "password": bool(found.argon2),
            "certificates": list(found.serials),
        }
    facts |= {"publish": list(held.publish), "subscribe": list(held.subscribe)}
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    for action in ("publish", "subscribe"):
        sys.stdout.writelines(f"{action:<10} {allowed}\n" for allowed in facts[action])
    if facts.get("disabled"):
        sys.stderr.write(f"{identity} is disabled: the broker refuses it\n")


@access.command(epilog=CODES_EPILOG)
def export(
    *,
    broker: Annotated[str, typer.Option("--for", help="mosquitto, emqx or nats.")],
    identity: Annotated[
        list[str] | None,
        typer.Option("--identity", help="Only this member; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder for the files; otherwise they are printed."),
    ] = None,
    data: DataOption = None,
    site: SiteOption = None,
) -> None:
    """Write the access table, and verifiers of passwords, for a broker that FOAM does not run.

    Passwords themselves are never written. What a broker cannot be told is said on stderr.
    """
    from broker.access.credentials import write_private
    from broker.access.export import EXPORTERS
    from foam.mesh import MeshFolder

    make = EXPORTERS.get(broker)
    if make is None:
        raise ConfigurationError(f"--for {broker!r}: use {', '.join(sorted(EXPORTERS))}")
    settings = client_settings(data=data, site=site)
    members = MeshFolder(settings.data).credentials().identities()
    if missing := sorted(set(identity or ()) - set(members)):
        raise NotFound(f"no member of the mesh in {settings.data}: {', '.join(missing)}")
    chosen = {name: found for name, found in members.items() if not identity or name in identity}
    made = make(chosen, _policy(settings))
    if out is not None:
        try:
            out.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, text in made.files.items():
                write_private(out / name, text)
        except OSError as exc:
            raise ConfigurationError(f"{out} cannot be written: {exc.strerror or exc}") from exc
        sys.stdout.writelines(f"{out / name}\n" for name in made.files)
    else:
        for name, text in made.files.items():
            sys.stdout.write(f"==> {name} <==\n{text}\n")
    sys.stderr.writelines(f"{note}\n" for note in made.notes)


def _policy(settings: "Settings") -> "AccessPolicy":
    from broker.access.policy import AccessPolicy
    from capability_schemas.topics import DEFAULT_SITE, Topics
    from foam.mesh import MeshFolder

    site = settings.site
    if site is None:
        try:
            site = MeshFolder(settings.data).record().site
        except NotFound:
            site = DEFAULT_SITE
    return AccessPolicy(Topics(site=site))


def _role(name: str) -> "Role":
    from broker.access.policy import Role

    try:
        return Role(name)
    except ValueError as exc:
        raise ConfigurationError(f"role {name!r}: use one of {', '.join(Role)}") from exc
