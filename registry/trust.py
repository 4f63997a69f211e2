"""``trust/{member}``: what the registry thinks of its members, said where all of them hear it.

The board joins what it is told of a member (when it was thrown out, what its evidence is worth,
what else is known of it) into one signed state, and keeps that retained on the broker. It says
nothing of members there is nothing to say of.
"""

import asyncio
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from broker.lifecycle import Service
from broker.session.base import Message, Session
from capability_schemas.errors import AccessDenied, BrokerUnavailable, FoamError, Overloaded
from capability_schemas.ids import now_ms
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import TrustState, read_trust
from capability_schemas.wire import encode
from registry.leadership import Lead, Sole

VOID_KEPT_MS: Final = 400 * 86_400_000
"""How long a revocation stays on the broker: longer than any passport is made for."""

_LOOK_S: Final = 2.0
_GHOSTS_AFTER_S: Final = 10.0
_QUEUE: Final = 20_000
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a member's evidence is worth.

    Attributes:
        trusted: Whether what was asked of it was shown.
        reason: Why not, or why.
        until: How long this counts, UTC milliseconds; None: as long as its passport.
        challenge: What its next evidence has to answer.
    """

    trusted: bool
    reason: str = ""
    until: int | None = None
    challenge: str | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """What else is known of a member.

    Attributes:
        role: What it is in the mesh.
        tenant: Whose it is.
    """

    role: str | None = None
    tenant: str | None = None


class TrustBoard(Service):
    """Keeps ``trust/…`` on the broker equal to what is known, as long as its registry leads.

    A registry that takes over says everything anew, in its own term, and mends what the one before
    still says.

    Entered with the registry's session, and owned by its event loop.

    Args:
        session: Connection of the registry.
        topics: The site's topics.
        key: Signs the states.
        registry_id: Who says so.
        voided: Returns the members whose older passports count for nothing, and since when (UTC
            milliseconds); another object when anything in it has changed.
        members: Returns who is a member now, likewise: of the voided, the others are ``revoked``.
        due: Returns the members that should renew their papers now, and since when.
        lead: Whether the registry leads; None: it is the only one.
        registries: Returns the public keys of the other registries that are believed.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        key: SigningKey,
        registry_id: str,
        voided: Callable[[], Mapping[str, int]],
        members: Callable[[], Container[str]],
        due: Callable[[], Mapping[str, int]] = dict,
        lead: Lead | None = None,
        registries: Callable[[], Mapping[str, str]] = dict,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        super().__init__(service_id=registry_id)
        self._session = session
        self._topics = topics
        self._key = key
        self._id = registry_id
        self._voided = voided
        self._members = members
        self._due = due
        self._lead = lead or Sole()
        self._registries = registries
        self._clock = clock
        self._opinions: dict[str, Opinion] = {}
        self._descriptions: dict[str, Description] = {}
        self._said: dict[str, tuple[TrustState, bytes]] = {}
        self._read: tuple[object, object] = (None, None)
        self._asked: Mapping[str, int] = {}
        self._found: dict[str, bool] = {}
        """Members of whom the broker keeps something, and whether they were thrown out."""
        self._ghosts_at: float | None = None
        self._to_clear: set[str] = set()

    def judge(self, member: str, opinion: Opinion | None) -> None:
        """Say what a member's evidence is worth; None takes it back."""
        if opinion is None:
            self._opinions.pop(member, None)
        else:
            self._opinions[member] = opinion
        self._say(member)

    def describe(self, member: str, description: Description | None) -> None:
        """Say what else is known of a member; None takes it back."""
        if description is None:
            self._descriptions.pop(member, None)
        else:
            self._descriptions[member] = description
        self._say(member)

    def refresh(self) -> None:
        """Say what has changed in the books; cheap, and called after every revocation."""
        if not self._lead.leads:
            return
        books = self._voided(), self._members()
        if any(now is not before for now, before in zip(books, self._read, strict=True)):
            self._read = books
            for member in books[0].keys() | self._said.keys():
                self._say(member)
        due = self._due()
        if due != self._asked:
            before, self._asked = self._asked, due
            for member in before.keys() | due.keys():
                self._say(member)
        for member in tuple(self._to_clear):
            self._clear(member)

    def state(self, member: str) -> TrustState | None:
        """Return what is said of a member, if anything."""
        said = self._said.get(member)
        return said[0] if said is not None else None

    async def _on_start(self) -> None:
        self._lead.on_change(self._lead_changed)
        if self._lead.leads:
            self._lead_changed(True)
        try:
            await self._session.subscribe(
                self._topics.filter(TopicKind.TRUST), self._note, queue_limit=_QUEUE
            )
        except AccessDenied as error:
            _log.warning("trust.ghosts_unseen", registry=self._id, error=error.message)
        self.spawn(self._look(), name="look")

    def _lead_changed(self, leads: bool) -> None:
        for member in self._said:
            self._session.retract(self._topic(member))
        self._said.clear()
        self._to_clear.clear()
        self._ghosts_at = None
        if not leads:
            return
        self._ghosts_at = time.monotonic() + _GHOSTS_AFTER_S
        self._read, self._asked = (None, None), {}
        self.refresh()
        for member in (*self._opinions, *self._descriptions):
            self._say(member)

    async def _look(self) -> None:
        """Members come and go in the file of credentials too, by commands on this machine."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self.refresh()
            if self._ghosts_at is not None and time.monotonic() >= self._ghosts_at:
                self._ghosts_at = None
                self._clear_ghosts()

    def _say(self, member: str) -> None:
        """Publish what is thought of a member, when that is new."""
        if not self._lead.leads:
            return
        wanted = self._wanted(member)
        said = self._said.get(member)
        if wanted is None:
            if said is not None:
                del self._said[member]
                self._session.retract(self._topic(member))
                self._clear(member)
            return
        if said is not None and said[0].model_copy(update={"at": wanted.at}) == wanted:
            return
        payload = encode(sign(wanted, self._key))
        self._said[member] = (wanted, payload)
        self._to_clear.discard(member)
        self._announce(member, payload)
        _log.info(
            "trust.said",
            member=member,
            state=wanted.state,
            reason=wanted.reason,
            until=wanted.until,
        )

    def _announce(self, member: str, payload: bytes) -> None:
        self._session.announce(self._topic(member), lambda: payload if self._lead.leads else None)

    def _wanted(self, member: str) -> TrustState | None:
        now = self._clock()
        void = self._voided().get(member)
        if void is not None and now > void + VOID_KEPT_MS:
            void = None
        opinion = self._opinions.get(member)
        known = self._descriptions.get(member, Description())
        if member not in self._members():
            if void is None:
                return None
            return TrustState(
                member=member,
                state="revoked",
                at=void,
                until=void + VOID_KEPT_MS,
                void_before=void,
                reason="an operator threw it out",
                registry=self._id,
                term=self._lead.term,
            )
        due = self._asked.get(member)
        if void is None and opinion is None and due is None and known == Description():
            return None
        opinion = opinion or Opinion(trusted=True)
        return TrustState(
            member=member,
            state="trusted" if opinion.trusted else "lapsed",
            at=now,
            until=opinion.until,
            void_before=void,
            reason=opinion.reason[:2_000],
            challenge=opinion.challenge,
            renew_from=due,
            role=known.role,
            tenant=known.tenant,
            registry=self._id,
            term=self._lead.term,
        )

    def _topic(self, member: str) -> str:
        return self._topics.build(TopicKind.TRUST, member=member)

    def _clear(self, member: str) -> None:
        try:
            self._session.post(self._topic(member), b"", retain=True)
        except (Overloaded, BrokerUnavailable) as error:
            self._to_clear.add(member)
            _log.warning("trust.clear_delayed", member=member, error=error.message)
        else:
            self._to_clear.discard(member)

    # ---- what an earlier life of the registry left on the broker, or another registry says

    async def _note(self, message: Message) -> None:
        try:
            member = self._topics.parse(message.topic).levels["member"]
            state = self._state_in(message, member)
        except FoamError as error:
            _log.warning("trust.not_ours", topic=message.topic, error=error.message)
            return
        if state is None:
            self._found.pop(member, None)
        else:
            self._found[member] = state.state == "revoked"
        said = self._said.get(member)
        if message.retain or not self._lead.leads:
            return
        if said is not None and (state is None or self._is_foreign(state)):
            _log.warning("trust.mended", member=member)
            self._announce(member, said[1])

    def _state_in(self, message: Message, member: str) -> TrustState | None:
        if not message.payload:
            return None
        registries = {**self._registries(), self._id: self._key.public}
        return read_trust(message.payload, member=member, registries=registries)

    def _is_foreign(self, state: TrustState) -> bool:
        return state.registry != self._id or state.term != self._lead.term

    def _clear_ghosts(self) -> None:
        for member, revoked in sorted(self._found.items()):
            if member in self._said or revoked:  # a lost book must not bring anybody back
                continue
            _log.info("trust.ghost_cleared", member=member)
            self._clear(member)
