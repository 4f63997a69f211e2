"""Tells the mesh what its people are, and whose: routers know both by the registry's word."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from broker.access.credentials import Credential
from broker.access.policy import Role
from broker.lifecycle import Service
from capability_schemas.errors import ConfigurationError
from registry.trust import Description, TrustBoard

TOLD_ROLES: Final = frozenset({Role.ADMIN, Role.OPERATOR})
"""Roles that may order routers about: of others only those are told of that are of a tenant."""

_LOOK_S: Final = 0.5
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class MemberWatch(Service):
    """Keeps what the board says of roles equal to the credentials of the mesh.

    Members come and go by enrollment, and by commands on this machine; so the file is looked at
    twice a second, like the broker does.

    Args:
        board: Says it.
        members: Reads the credentials anew and returns them; blocks for a moment.
        registry_id: Identity of the registry.
        stirred: Told when the credentials have changed.
    """

    def __init__(
        self,
        *,
        board: TrustBoard,
        members: Callable[[], Mapping[str, Credential]],
        registry_id: str,
        stirred: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(service_id=registry_id)
        self._board = board
        self._members = members
        self._stirred = stirred
        self._seen: Mapping[str, Credential] | None = None
        self._told: dict[str, Description] = {}

    async def _on_start(self) -> None:
        await self._look()
        self.spawn(self._keep_looking(), name="members")

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._look()

    def refresh(self) -> None:
        """Say now what has changed; before a newcomer is told that it is let in."""
        try:
            self._tell(self._members())
        except ConfigurationError as error:
            _log.error("members.unread", error=error.message)

    async def _look(self) -> None:
        try:
            members = await asyncio.to_thread(self._members)
        except ConfigurationError as error:
            _log.error("members.unread", error=error.message)
            return
        self._tell(members)

    def _tell(self, members: Mapping[str, Credential]) -> None:
        if members is self._seen:
            return
        self._seen = members
        self._stirred()
        wanted = {
            name: Description(
                role=known.role.value,
                tenant=known.attested.tenant if known.apart and known.attested else None,
            )
            for name, known in members.items()
            if (known.role in TOLD_ROLES or known.apart) and not known.disabled
        }
        for name in self._told.keys() - wanted.keys():
            self._board.describe(name, None)
        for name, description in wanted.items():
            if self._told.get(name) != description:
                self._board.describe(name, description)
        self._told = wanted
