"""Who the members of the mesh are, as far as a router has to know: by the registry's word.

The registry says on ``trust/{member}``, signed, what administrators, operators and members of
tenants are. The broker proves who asks; what that member may do rests on what the registry says of
it, never on what it says of itself.
"""

import asyncio
from typing import Final

import structlog

from broker.access.orders import Requester
from broker.access.policy import Role
from broker.session.base import Message
from capability_schemas.errors import AccessDenied, FoamError
from capability_schemas.passport import PassportBook
from capability_schemas.topics import Topics
from capability_schemas.trust import TrustState, read_trust
from registry.trust import VOID_KEPT_MS

_MOST_MEMBERS: Final = 200_000
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class People:
    """What the registry has said of members. Owned by the router's event loop.

    Args:
        topics: Topic grammar of the site.
        book: Knows the registries, and is told which passports became void. Without one nothing can
            be checked: then the broker's word counts alone, and whoever may publish an order is
            taken for an administrator.
    """

    def __init__(self, *, topics: Topics, book: PassportBook | None) -> None:
        self._topics = topics
        self._book = book
        self._states: dict[str, TrustState] = {}
        self._heard = asyncio.Event()
        self.refused = 0
        """States that were forged, broken, or too many."""
        if book is None:
            _log.info("people.unchecked", reason="no key of a registry is known here")

    async def hear(self, message: Message) -> None:
        """Take a message on ``trust/{member}``; what is not the registry's word is dropped."""
        try:
            member = self._topics.parse(message.topic).levels["member"]
            if self._book is None:
                return
            if not message.payload:
                self._states.pop(member, None)
                return
            state = read_trust(message.payload, member=member, registries=self._book.registries)
        except FoamError as error:
            self.refused += 1
            _log.warning("people.refused", topic=message.topic[:200], error=error.message)
            return
        if state.void_before is not None:
            self._book.revoke(member, before=state.void_before)
        known = self._states.get(member)
        if known is not None and _is_older(state, known):
            return
        if known is None and len(self._states) >= _MOST_MEMBERS:
            self.refused += 1
            return
        self._states[member] = state
        self._heard.set()
        self._heard = asyncio.Event()

    def revoked(self, member: str) -> bool:
        """Tell whether a member was thrown out."""
        state = self._states.get(member)
        return state is not None and state.state == "revoked"

    def role(self, member: str) -> Role | None:
        """Return what a member is; None where the registry has not told."""
        state = self._states.get(member)
        if state is None or state.role is None or state.state == "revoked":
            return None
        return Role(state.role) if state.role in set(Role) else None

    def tenant(self, member: str) -> str | None:
        """Return whose a member is; None where it is of no tenant, or nothing was told of it."""
        state = self._states.get(member)
        return state.tenant if state is not None else None

    async def requester(self, client: str, *, wait_s: float = 0.0) -> Requester:
        """Tell who gives an order; cancellation is safe.

        A client that the registry has said nothing of is taken for the least that may publish an
        order at all, an operator.

        Args:
            client: Identity in the topic, as the broker proves it.
            wait_s: How long the registry's word is waited for, where it decides: both may have
                just started.

        Raises:
            AccessDenied: It was revoked.
        """
        if self._book is None:
            return Requester(client, Role.ADMIN)
        if client not in self._states and wait_s:
            try:
                async with asyncio.timeout(wait_s):
                    while client not in self._states:
                        await self._heard.wait()
            except TimeoutError:
                _log.warning("people.unknown", client=client)
        state = self._states.get(client)
        if state is not None and state.state == "revoked":
            raise AccessDenied(f"{client} was revoked: {state.reason}", identity=client)
        return Requester(client, self.role(client) or Role.OPERATOR)


def _is_older(state: TrustState, known: TrustState) -> bool:
    """Tell whether a state was said before the one that is known.

    What it voids comes first, for the clock of a registry may have been set back since, and a
    revocation counts all the same. A registry lets go of that after ``VOID_KEPT_MS``; before,
    whoever says less is older. Then the registry of the later term counts, whatever the clocks say.
    """
    void, known_void = state.void_before or 0, known.void_before or 0
    if void < known_void:
        return state.at <= known_void + VOID_KEPT_MS
    if void > known_void:
        return False
    return (state.term or 0, state.at) < (known.term or 0, known.at)
