"""What routers tell each other: that they are there, which tasks they have, and how some ended.

``router/{router}/state`` is retained and repeated as a heartbeat, for some brokers lose wills. On
``event/{router}/claims`` a router says what it has when another one comes, which may have been cut
off and think the tasks its own; on ``event/{router}/outcome`` how tasks of the newcomer ended that
it had taken over.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Final

import structlog
from pydantic import Field, ValidationError

from broker.events import EventSource
from broker.session.base import Message, Session, Will
from capability_schemas.admin import CloudEvent
from capability_schemas.errors import FoamError, ProtocolError
from capability_schemas.ids import Identifier
from capability_schemas.node import LOST, Presence, RouterState
from capability_schemas.passport import Passport
from capability_schemas.provenance import Signer
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import MAX_COUNT, WirePart, decode, encode
from router.dispatch import Dispatcher
from router.ends import tell_end
from router.observation import RouterWord
from router.ownership import Claim, RouterBook, first_attempt
from router.reception import Reception
from router.replies import Outcome

CLAIMS: Final = "claims"
_BATCH: Final = 200
_LIMIT_BYTES: Final = 2 * 1024 * 1024
_STATE_LIMIT_BYTES: Final = 64 * 1024
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class _Held(WirePart):
    """A task that a router has."""

    client: Identifier
    task: Identifier
    attempt: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    deadline: Annotated[int, Field(ge=0, le=MAX_COUNT)]


class _Claims(WirePart):
    """Tasks that a router has."""

    tasks: tuple[_Held, ...]


class _Ended(WirePart):
    """How a task ended that a router had taken over."""

    client: Identifier
    task: Identifier
    reply: str
    seq: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    attempt: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    code: str | None = None
    at: int
    terminal: str


class PeerDesk:
    """A router among others. Owned by its event loop.

    Args:
        session: Connection to the mesh.
        topics: Topic grammar of the site.
        book: The routers of the site.
        reception: Whose tasks are whose.
        dispatcher: Tasks of this router.
        events: Tells the others.
        signer: Its passport is shown with the state; None: there is none.
        epoch: Start of this process, UTC milliseconds.
        place: Where it runs, in words.
        clock: UTC milliseconds.

    Attributes:
        presence: What this router says of itself.
        muted: Whether it says nothing more: another process has its place.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        book: RouterBook,
        reception: Reception,
        dispatcher: Dispatcher,
        events: EventSource,
        signer: Signer | None,
        epoch: int,
        place: str | None = None,
        direct: Callable[[], bool] = lambda: True,
        clock: Callable[[], int],
    ) -> None:
        self.presence: Presence = "birth"
        self.muted = False
        self._session = session
        self._topics = topics
        self._book = book
        self._reception = reception
        self._dispatcher = dispatcher
        self._events = events
        self._signer = signer
        self._epoch = epoch
        self._place = place
        self._direct = direct
        self._clock = clock

    @property
    def topic(self) -> str:
        """Where this router says how it is."""
        return self._topics.build(TopicKind.ROUTER_STATE, router=self._book.own)

    def state(self) -> bytes:
        """Return what it says."""
        return encode_state(
            self._book.own,
            self.presence,
            epoch=self._epoch,
            at=self._clock(),
            heartbeat_s=self._book.heartbeat_s,
            direct=self._direct(),
            since=self._epoch,
            place=self._place,
            passport=self._signer.passport if self._signer is not None else None,
        )

    async def beat(self) -> None:
        """Repeat the state, until cancelled."""
        while True:
            await asyncio.sleep(self._book.heartbeat_s)
            if self.muted:
                return
            try:
                self._session.post(self.topic, self.state(), qos=0)
            except FoamError as error:
                _log.debug("router.heartbeat_skipped", error=error.message)

    # ---- others

    async def hear_state(self, message: Message) -> None:
        """Take another router's presence."""
        try:
            router = self._topics.parse(message.topic).levels["router"]
            if not message.payload:
                if self._book.forget(router):
                    self._lost(router, "it was removed")
                return
            state = decode(RouterState, message.payload, limit_bytes=_STATE_LIMIT_BYTES)
        except ProtocolError as error:
            _log.debug("frame.dropped", topic=message.topic, reason=error.message)
            return
        if state.router != router:
            return
        news = self._book.hear(state, self._clock())
        if news == "gone":
            self._lost(router, state.reason or f"it is {state.state}")
        elif news == "came":
            _log.info("router.peer_came", router=self._book.own, peer=router)
            self.tell(router)

    def take_standing(self, member: str, revoked: bool) -> None:
        """Take what the registry says of a member, which may be a router that was thrown out."""
        if self._book.revoke(member, revoked=revoked):
            self._lost(member, "it was revoked")

    def look_for_silent(self, now: int) -> None:
        """Give up routers whose heartbeats stopped.

        Args:
            now: UTC milliseconds.
        """
        for router in self._book.silenced(now):
            self._lost(router, "its heartbeats stopped")

    def wake_all(self, now: int) -> None:
        """Restart every heartbeat clock: it was this router that heard nobody."""
        self._book.wake_all(now)

    def _lost(self, router: str, reason: str) -> None:
        _log.warning("router.peer_lost", router=self._book.own, peer=router, reason=reason)
        self._reception.router_gone(router)

    def tell(self, router: str) -> None:
        """Tell a newcomer what this router has, and what it has ended of the newcomer's tasks.

        And that it is there: a broker may have forgotten the retained state, and a newcomer asks
        for the ends of what its journal holds (`hear_claims`) only where it knows of somebody.
        """
        self._tell_held()
        self._reception.tell_ended(router)

    def tell_all(self) -> None:
        """Tell all that are there the same, after an absence.

        A broker that was restarted may have kept nothing for anybody: what this router has ended
        another one may have begun anew before either was back.
        """
        self._tell_held()
        for view in self._book.others:
            if view.live:
                self._reception.tell_ended(view.router)

    def _tell_held(self) -> None:
        try:
            self._session.post(self.topic, self.state())
        except FoamError as error:
            _log.warning("router.not_shown", error=error.message)
        held = [
            {
                "client": live.arrival.client,
                "task": live.arrival.task_id,
                "attempt": live.machine.turns.floor,
                "deadline": live.arrival.deadline,
            }
            for live in self._dispatcher
        ]
        held += [  # the least of claims: whoever has the task says so, or how it ended
            {
                "client": left.key[0],
                "task": left.key[1],
                "attempt": first_attempt(0),
                "deadline": left.deadline,
            }
            for left in self._reception.left
        ]
        for first in range(0, len(held), _BATCH):
            self._events.emit(CLAIMS, {"tasks": held[first : first + _BATCH]})

    async def hear_claims(self, message: Message) -> None:
        """Take what another router says that it has."""
        router, claims = self._read(message, _Claims)
        if claims is None:
            return
        for held in claims.tasks:
            await self._hear_claim(
                RouterWord(
                    (held.client, held.task),
                    "",
                    router,
                    claim=Claim(router, held.attempt),
                    deadline=held.deadline,
                )
            )

    async def _hear_claim(self, word: RouterWord) -> None:
        """Take what a router has that came: it may have missed how that ended.

        The end is told whichever attempt it is of: a task that was taken over before a word of the
        newcomer had been heard, or before this router was itself restarted, is in the journal only.
        """
        known = None
        if self._dispatcher.live(word.key) is None:
            known = await self._reception.find_outcome(word.key)
        if known is None:
            self._reception.hear_router(word)
        else:
            tell_end(self._events, known)

    async def hear_outcome(self, message: Message) -> None:
        """Take how another router ended a task of ours while we were away."""
        _, ended = self._read(message, _Ended)
        if ended is None:
            return
        self._reception.learn(
            Outcome(
                key=(ended.client, ended.task),
                reply=ended.reply,
                seq=ended.seq,
                attempt=ended.attempt,
                terminal=ended.terminal.encode(),
                code=ended.code,
                ended_at=ended.at,
                told=True,
            )
        )

    def _read(self, message: Message, model: Any) -> tuple[str, Any]:
        """Return who sent an event and its data; None for one of our own or of no router."""
        try:
            source = self._topics.parse(message.topic).levels["source"]
            if source == self._book.own or source not in self._book:
                return source, None
            event = decode(CloudEvent, message.payload, limit_bytes=_LIMIT_BYTES)
            return source, model.model_validate(event.data)
        except (ProtocolError, ValidationError) as error:
            _log.warning("peer.bad_event", topic=message.topic, reason=str(error)[:200])
            return "", None


def encode_state(
    router: str,
    presence: Presence,
    *,
    epoch: int,
    at: int,
    heartbeat_s: float | None = None,
    reason: str = "",
    direct: bool = True,
    since: int | None = None,
    place: str | None = None,
    passport: Passport | None = None,
) -> bytes:
    """Return a router's word about itself.

    Args:
        router: The router.
        presence: How it is.
        epoch: Start of its process, UTC milliseconds.
        at: Now, UTC milliseconds.
        heartbeat_s: How often it is repeated, seconds.
        reason: Why, in words.
        direct: Whether clients may ask nodes themselves once no router lives.
        since: When it made itself known, UTC milliseconds; None: it had not.
        place: Where it runs, in words.
        passport: How others know its signatures.
    """
    return encode(
        RouterState(
            router=router,
            state=presence,
            epoch=epoch,
            at=at,
            reason=reason,
            heartbeat_s=heartbeat_s,
            direct=direct,
            since=since,
            place=place,
            passport=passport,
        )
    )


def router_will(
    topics: Topics,
    router_id: str,
    *,
    epoch: int,
    at: int,
    direct: bool = True,
    known: bool = True,
    place: str | None = None,
) -> Will:
    """Return the last will of a router: ``offline``, with its epoch.

    Args:
        topics: Topic grammar of the site.
        router_id: The router.
        epoch: The same as given to ``RouterService``, UTC milliseconds.
        at: Now, UTC milliseconds.
        direct: What ``lets_past`` says at the moment.
        known: Whether the router has made itself known; a process that has not may be refused its
            place (`broker.tenure`), and its will says nothing about the router.
        place: Where it runs, in words.
    """
    return Will(
        topic=topics.build(TopicKind.ROUTER_STATE, router=router_id),
        payload=encode_state(
            router_id,
            "offline",
            epoch=epoch,
            at=at,
            reason=LOST,
            direct=direct,
            since=epoch if known else None,
            place=place,
        ),
    )
