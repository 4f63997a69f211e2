"""What may be vouched for of whom: zones, grants and data of nodes, and tenants of clients too."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from broker.access.policy import Role
from capability_schemas.capability import EVERY_TENANT, CapabilityPolicy
from capability_schemas.errors import FoamError
from capability_schemas.wire import first_problem

ATTESTED: Final[tuple[str, ...]] = ("zones", "grants", "data", "tenant")
"""Names of what may be vouched for."""

_OF_TENANTS: Final = frozenset({Role.NODE, Role.DEVICE})
"""Roles that may be of a tenant: people and routers are the site's, and see all of it."""


def check_attested(
    role: Role, given: Mapping[str, Any], *, error: Callable[[str], FoamError]
) -> CapabilityPolicy | None:
    """Return what is vouched for; None when nothing was said.

    Args:
        role: Role of the member.
        given: Values by the names of ``ATTESTED``.
        error: Makes the error of a message.

    Raises:
        FoamError: What ``error`` makes: not for this role, or malformed.
    """
    if not given:
        return None
    if role is not Role.NODE and given.keys() - {"tenant"}:
        raise error(f"zones, grants and data are for nodes, not for a {role.value}")
    tenant = given.get("tenant")
    if tenant is not None and role not in _OF_TENANTS:
        raise error(f"role {role.value} is of no tenant: nodes and devices are")
    if tenant == EVERY_TENANT and role is not Role.NODE:
        raise error(f"tenant {EVERY_TENANT} is for nodes that serve all; name the {role.value}'s")
    try:
        return CapabilityPolicy.model_validate(given)
    except ValidationError as exc:
        field, problem = first_problem(exc)
        raise error(f"{field}: {problem}") from exc
