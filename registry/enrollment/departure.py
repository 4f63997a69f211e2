"""Whom nobody throws out by a slip: those without whom the site would stand still."""

from collections.abc import Callable, Collection

from broker.access.orders import Requester
from broker.access.policy import Role
from capability_schemas.errors import AccessDenied, Conflict


def check_departure(
    identity: str,
    role: Role,
    *,
    asker: Requester,
    registry_id: str,
    administrators: Collection[str],
    runs_here: Callable[[str], bool],
    force: bool,
) -> None:
    """Refuse to throw out a member that the mesh needs, unless that is what is meant.

    Args:
        identity: Who is to go.
        role: What it is.
        asker: Who orders it.
        registry_id: The registry that is asked.
        administrators: Who administrates now.
        runs_here: Tells whether a registry, router or node is of the registry's own data folder.
        force: Whether it was said that this is meant.

    Raises:
        Conflict: It is the registry itself, or needs ``force``.
        AccessDenied: An operator uses ``force``.
    """
    if force and asker.role is not Role.ADMIN:
        raise AccessDenied(
            f"{asker.role.value} {asker.name} may not use force: ask an administrator",
            role=asker.role.value,
        )
    if identity == registry_id:
        raise Conflict(
            f"{identity} is the registry that is asked, which vouches for all others: "
            "it cannot throw itself out; stop the mesh instead",
            id=identity,
        )
    if force:
        return
    if role is Role.ADMIN and set(administrators) <= {identity}:
        raise Conflict(
            f"{identity} is the last administrator: add another one first "
            "(foam device add NAME --role admin), or use --force",
            id=identity,
        )
    if identity == asker.name:
        raise Conflict(
            f"{identity} asks for itself to be thrown out: have another administrator do it, "
            "or use --force",
            id=identity,
        )
    if runs_here(identity):
        raise Conflict(
            f"{identity} is a {role.value} of this mesh's own data folder, which runs with it: "
            "if it shall go all the same, use --force (what `foam up` needs, it makes anew)",
            id=identity,
        )
