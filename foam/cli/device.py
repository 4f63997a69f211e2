"""``foam device``: who belongs to the mesh of the data folder."""

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import AccessDenied, ConfigurationError, FoamError, NotFound
from foam.cli.app import app, run_async
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import (
    DataClassOption,
    DataOption,
    GrantOption,
    TenantOption,
    ZoneOption,
    client_settings,
)

if TYPE_CHECKING:
    from broker.access.policy import Role
    from foam.mesh import Identity, MeshFolder

__all__ = ["device"]

_LIVE_TRIES: Final = 20
_LIVE_PAUSE_S: Final = 0.25
_CONNECT_S: Final = 3.0

device = typer.Typer(
    help="Add, list and remove members of the mesh: devices, nodes, administrators.",
    no_args_is_help=True,
    epilog=CODES_EPILOG,
)
app.add_typer(device, name="device")


@device.command(epilog=CODES_EPILOG)
def add(
    identity: Annotated[str, typer.Argument(help="Id: user name and topic level.")],
    *,
    role: Annotated[
        str,
        typer.Option("--role", help="device, node, router, registry, admin, operator or observer."),
    ] = "device",
    zone: ZoneOption = None,
    grant: GrantOption = None,
    data_class: DataClassOption = None,
    tenant: TenantOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to copy the identity file and its key to.")
    ] = None,
    data: DataOption = None,
) -> None:
    """Make a member (password, and a key where its role signs); a running broker learns of it."""
    from broker.access.policy import Role
    from foam.mesh import MeshFolder

    settings = client_settings(data=data)
    try:
        wanted = Role(role)
    except ValueError as exc:
        raise ConfigurationError(f"role {role!r}: use one of {', '.join(Role)}", role=role) from exc
    attested = _attested(wanted, zone, grant, data_class, tenant)
    folder = MeshFolder(settings.data).prepare()
    made = folder.create(identity, wanted, attested=attested)
    path = _export(folder, made, out)
    secret = made.password.get_secret_value() if made.password is not None else None
    facts = {
        "id": made.id,
        "role": made.role.value,
        "username": made.username,
        "password": secret,
        "broker": made.broker,
        "site": made.site,
        "file": str(path),
    }
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    if made.broker is not None:
        run_async(_report_live(folder, made))


def _attested(
    role: "Role",
    zones: list[str] | None,
    grants: list[str] | None,
    data: list[str] | None,
    tenant: str | None,
) -> CapabilityPolicy | None:
    """Read what the operator vouches for; None when nothing was said."""
    from registry.enrollment.tenancy import check_attested

    given = {"zones": zones, "grants": grants, "data": data}
    said: dict[str, Any] = {name: tuple(values) for name, values in given.items() if values}
    if tenant is not None:
        said["tenant"] = tenant
    return check_attested(role, said, error=ConfigurationError)


def _export(folder: "MeshFolder", made: "Identity", out: Path | None) -> Path:
    path = folder.identity_path(made.id)
    if out is None:
        return path
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (path.name, made.signing_key):
            if name is not None:
                shutil.copy2(path.parent / name, out / name)
    except OSError as exc:
        raise ConfigurationError(f"{out} cannot be written: {exc.strerror or exc}") from exc
    return out / path.name


async def _report_live(folder: "MeshFolder", made: "Identity") -> None:
    """Say whether the running broker lets the new member in."""
    from foam.sdk.address import MeshAddress
    from foam.sdk.client import MeshClient

    if not folder.record().own_broker:
        sys.stderr.write(f"{made.broker} is not ours: give {made.id} access there\n")
        return
    address = MeshAddress(
        url=str(made.broker),
        site=str(made.site),
        client=made.id,
        username=made.username,
        password=made.password,
    )
    if made.role.binds_client_id or made.role.value == "observer":
        sys.stderr.write("the broker reads the new access rules within a second\n")
        return
    for _ in range(_LIVE_TRIES):
        try:
            async with MeshClient.at(address, connect_timeout_s=_CONNECT_S):
                sys.stderr.write(f"{made.id} may log on at {made.broker} now\n")
                return
        except AccessDenied:
            await asyncio.sleep(_LIVE_PAUSE_S)
        except FoamError:
            sys.stderr.write(
                f"the broker {made.broker} does not run now; it will know {made.id} when it "
                "starts\n"
            )
            return
    sys.stderr.write(f"the broker {made.broker} does not let {made.id} in yet: see its log\n")


@device.command("list", epilog=CODES_EPILOG)
def list_members(*, data: DataOption = None) -> None:
    """List the members: id, role, whether enabled, what a node was given."""
    from foam.mesh import MeshFolder

    settings = client_settings(data=data)
    folder = MeshFolder(settings.data)
    members = folder.credentials().identities()
    if not members:
        raise NotFound(
            f"no members in {folder.path}; `foam up` makes the first ones", path=str(folder.path)
        )
    for name, credential in sorted(members.items()):
        state = "disabled" if credential.disabled else "enabled"
        held = credential.attested
        placed = [f"zones={','.join(held.zones)}"] if held is not None and held.zones else []
        placed += [f"grants={','.join(held.grants)}"] if held is not None and held.grants else []
        placed += [f"data={','.join(held.data)}"] if held is not None else []
        placed += [f"tenant={held.tenant}"] if held is not None and held.tenant else []
        sys.stdout.write("\t".join((name, credential.role.value, state, *placed)) + "\n")


@device.command(epilog=CODES_EPILOG)
def remove(
    identity: Annotated[str, typer.Argument(help="Id of the member.")], *, data: DataOption = None
) -> None:
    """Withdraw a member's access; where the broker can, its connections are cut at once."""
    from foam.mesh import MeshFolder

    settings = client_settings(data=data)
    MeshFolder(settings.data).remove(identity)
    sys.stderr.write(f"{identity} is removed\n")
