"""The one table of administration: which role may give which order (issue 5, least privilege).

The broker proves who asks and lets administrators and operators publish on the same topic; what an
order needs is checked by the router or registry that gets it. An **administrator** decides what the
mesh is: its people, its weights, its encoder. An **operator** keeps it running: looks at
everything, takes nodes out of service and back, lets nodes and devices in and throws them out.

An order that does not stand in the table needs an administrator.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from broker.access.policy import Role
from capability_schemas.errors import AccessDenied

OPERATED_ROLES: Final = frozenset({Role.DEVICE, Role.NODE})
"""Roles that an operator may let in and throw out; the others decide over others themselves."""

_SECRET: Final = re.compile(r"password|secret|private|proof|credential", re.IGNORECASE)
_TOLD_BYTES: Final = 2_048
_TOLD_NAMES: Final = 20


@dataclass(frozen=True, slots=True)
class _Order:
    """What a verb needs.

    Attributes:
        least: Least role for it.
        changes: Whether it changes anything, and so belongs into the audit trail.
        look: Least role for it without arguments, where it then only shows something.
    """

    least: Role
    changes: bool = True
    look: Role | None = None


_LOOK: Final = _Order(Role.OPERATOR, changes=False)
_OPERATE: Final = _Order(Role.OPERATOR)
_DECIDE: Final = _Order(Role.ADMIN)
_SET: Final = _Order(Role.ADMIN, look=Role.OPERATOR)

ORDERS: Final[Mapping[str, _Order]] = MappingProxyType(
    {
        **dict.fromkeys(("nodes", "routers", "functions", "stats", "task"), _LOOK),
        **dict.fromkeys(("explain", "whatif"), _LOOK),
        **dict.fromkeys(("reputation", "quotas", "waiting", "claims", "history", "audit"), _LOOK),
        **dict.fromkeys(("tokens", "enrollments", "registries"), _LOOK),
        **dict.fromkeys(("attestation", "attestation_reference", "authority"), _LOOK),
        **dict.fromkeys(("cordon", "uncordon", "drain", "undrain"), _OPERATE),
        # about members, as far as OPERATED_ROLES goes
        **dict.fromkeys(("token_create", "token_revoke", "approve", "deny", "revoke"), _OPERATE),
        **dict.fromkeys(("weights", "rules", "encoder"), _SET),
        **dict.fromkeys(("calibrate", "forget"), _DECIDE),
        **dict.fromkeys(("authority_rotate", "authority_retire"), _DECIDE),
    }
)


def changes(verb: str, args: Mapping[str, Any]) -> bool:
    """Tell whether an order changes anything, rather than to show it."""
    order = ORDERS.get(verb, _DECIDE)
    return order.changes and (bool(args) or order.look is None)


def told_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an order as they may be written down.

    What is named like a secret is left out, and of what is very long only the size is told.
    """
    told = {name: "…" if _SECRET.search(name) else value for name, value in args.items()}
    size = len(json.dumps(told, ensure_ascii=False).encode())
    return told if size <= _TOLD_BYTES else {"bytes": size, "names": sorted(told)[:_TOLD_NAMES]}


@dataclass(frozen=True, slots=True)
class Requester:
    """Who gives an order.

    Attributes:
        name: Identity, as the broker proves it.
        role: ``ADMIN`` or ``OPERATOR``; any other may order nothing.
    """

    name: str
    role: Role

    def check_order(self, verb: str, args: Mapping[str, Any]) -> None:
        """Refuse an order that the role does not reach.

        Args:
            verb: What is ordered.
            args: Its arguments.

        Raises:
            AccessDenied: The role is too low; the message names what is needed.
        """
        order = ORDERS.get(verb, _DECIDE)
        least = order.least if args or order.look is None else order.look
        if self.role is Role.ADMIN or (self.role is Role.OPERATOR and least is Role.OPERATOR):
            return
        needed = "an administrator" if least is Role.ADMIN else "an operator or administrator"
        raise AccessDenied(
            f"{verb} needs {needed}, {self.name} is known here as {self.role.value}",
            verb=verb,
            needed=least.value,
            role=self.role.value,
        )

    def check_member(self, role: Role, what: str) -> None:
        """Refuse an order about a member that the requester's role does not decide over.

        Args:
            role: Role of the member.
            what: What is ordered, in words: ``make a token for``.

        Raises:
            AccessDenied: It takes an administrator.
        """
        if self.role is not Role.ADMIN and role not in OPERATED_ROLES:
            allowed = " and ".join(sorted(OPERATED_ROLES))
            raise AccessDenied(
                f"{self.role.value} {self.name} may not {what} role {role.value}, "
                f"only for {allowed}: ask an administrator",
                role=role.value,
            )
