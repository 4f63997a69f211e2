"""A registry among the others of its site, on ``registry/{registry}/state``.

What a registry writes for all (catalogue, trust, papers) it writes while it ``leads``; whoever
writes asks for that each time. The rules are those of ``registry.election``; this module joins them
to the session and the clock.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Protocol

import structlog

from broker.access.orders import Requester
from broker.lifecycle import Service
from broker.security import hear_registry
from broker.session.base import Message, Session, Will
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    InvalidTopic,
    Overloaded,
    ProtocolError,
    Unavailable,
)
from capability_schemas.ids import now_ms
from capability_schemas.node import LOST, Presence, RegistryState
from capability_schemas.passport import PassportBook
from capability_schemas.provenance import Signer
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode
from registry.election import Election, Mode, Word

LEASE_MS: Final = 2_000
"""How long a leader may write unheard; the same at every registry of a site."""

_LOOKS: Final = 4
"""Looks at the clock between two words."""

_UNHEARD_S: Final = 10.0
_LEARN_S: Final = 1.0
Emit = Callable[[str, dict[str, Any]], None]
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Lead(Protocol):
    """Whether one may write for the site."""

    @property
    def leads(self) -> bool:
        """Whether it may now; asked before everything that is written."""
        ...

    @property
    def term(self) -> int | None:
        """Of its leading; stands in what it signs. None where there are no terms."""
        ...

    @property
    def leader(self) -> str | None:
        """Who leads, as far as is known."""
        ...

    @property
    def alone(self) -> bool:
        """Whether no other registry of the site is known of."""
        ...

    def on_change(self, listener: Callable[[bool], None]) -> None:
        """Have somebody told when it begins to lead, and when it ends."""
        ...

    async def until(self) -> None:
        """Return when it leads. Cancellation is safe."""
        ...

    def check(self) -> None:
        """Refuse what only a leader does.

        Raises:
            Unavailable: Another registry leads, or none at the moment.
        """
        ...


class Sole:
    """The one registry of a site without any other, that need not ask."""

    leads = True
    term: int | None = None
    leader: str | None = None
    alone = True

    def on_change(self, listener: Callable[[bool], None]) -> None:
        """Nothing ever changes."""

    async def until(self) -> None:
        """Return at once."""

    def check(self) -> None:
        """Never refuse."""


def registry_will(
    topics: Topics,
    registry: str,
    *,
    epoch: int,
    at: int,
    known: bool = True,
    place: str | None = None,
) -> Will:
    """Return what the broker says when the connection of a registry ends without a goodbye.

    Args:
        topics: The site's topics.
        registry: The registry.
        epoch: Start of its process, UTC milliseconds.
        at: Time of the connection, UTC milliseconds.
        known: Whether the registry has made itself known; a process that has not may be refused its
            place (`broker.tenure`), and its will says nothing about the registry.
        place: Where it runs, in words.
    """
    state = RegistryState(
        registry=registry,
        state="offline",
        epoch=epoch,
        at=at,
        reason=LOST,
        since=epoch if known else None,
        place=place,
    )
    return Will(topics.build(TopicKind.REGISTRY_STATE, registry=registry), encode(state))


class Leadership(Service):
    """Says how this registry is, hears the others, and knows who leads.

    Entered with the session, before whatever writes. Owned by its event loop.

    Where the broker's rules do not know the topic (one that is not ours), no registry ever hears
    itself: after ten seconds in which none was heard this one leads all the same, and says so in
    its log. Two registries must not be run there.

    Args:
        session: Connection of the registry.
        topics: The site's topics.
        registry_id: Its id.
        epoch: Start of its process, UTC milliseconds.
        place: Where it runs, in words.
        lease_ms: Length of a lease, milliseconds.
        enrolls: Whether it could let members in.
        others: Returns registries that are known to exist; asked every second.
        signer: Its passport is shown; None: there is none.
        book: Knows whose key is a registry's; None: the broker's word counts.
        clock: UTC milliseconds.
        monotonic: Seconds that only pass.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        registry_id: str,
        epoch: int,
        place: str | None = None,
        lease_ms: int = LEASE_MS,
        enrolls: bool = True,
        others: Callable[[], Iterable[str]] = tuple,
        signer: Signer | None = None,
        book: PassportBook | None = None,
        clock: Callable[[], int] = now_ms,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(service_id=registry_id)
        self._session = session
        self._topics = topics
        self._id = registry_id
        self._epoch = epoch
        self._place = place
        self._enrolls = enrolls
        self._known_others = others
        self._signer = signer
        self._book = book
        self._clock = clock
        self._monotonic = monotonic
        self._election = Election(
            own=registry_id, epoch=epoch, lease_ms=lease_ms, others=tuple(others())
        )
        self._listeners: list[Callable[[bool], None]] = []
        self._led = False
        self._leading = asyncio.Event()
        self._kept: tuple[bool, int, Presence] | None = None
        self._known = False
        self._heard = False
        self._unfenced = False
        self._left = False
        self._up_at: float | None = None
        self._forget: Callable[[], None] | None = None

    # ---- what writers ask

    @property
    def leads(self) -> bool:
        """Whether it may write now."""
        return self._election.leads(self._now()) or self._unfenced

    @property
    def term(self) -> int | None:
        """Of its leading, or the highest it has heard of."""
        return self._election.term or None

    @property
    def leader(self) -> str | None:
        """Who leads or claims to."""
        return self._id if self._unfenced else self._election.leader

    @property
    def alone(self) -> bool:
        """Whether no other registry is known of."""
        return self._election.alone

    def on_change(self, listener: Callable[[bool], None]) -> None:
        """Have somebody told when it begins to lead, and when it ends."""
        self._listeners.append(listener)

    async def until(self) -> None:
        """Return when it leads."""
        while not self.leads:
            self._leading.clear()
            await self._leading.wait()

    def check(self) -> None:
        """Refuse what only the leader does."""
        if self.leads:
            return
        leader = self.leader
        if leader is None or leader == self._id:
            raise Unavailable(
                f"{self._id} does not lead the registries at the moment, and knows of none that "
                "does: ask again in a few seconds"
            )
        raise Unavailable(
            f"{self._id} follows: {leader} leads the registries of this site; ask that one",
            leader=leader,
        )

    @property
    def verbs(self) -> Mapping[str, Callable[[dict[str, Any], Requester], Awaitable[Any]]]:
        """What operators may ask about the registries."""
        return {"registries": self._describe}

    def only_leading(self, emit: Emit) -> Emit:
        """Return what tells an event of something that all registries hear: the leader tells it.

        Args:
            emit: Publishes it: kind and JSON fields.
        """

        def tell(kind: str, data: dict[str, Any]) -> None:
            if self.leads:
                emit(kind, data)

        return tell

    async def _describe(self, _args: dict[str, Any], _asker: Requester) -> dict[str, Any]:
        now = self._now()
        return {
            "registry": self._id,
            "leader": self.leader,
            "leads": self.leads,
            "term": self.term,
            "lease_ms": self._election.lease_ms,
            "enrolls": self._enrolls,
            "others": [
                {
                    "registry": name,
                    "heard_ms_ago": round(now - other.heard_at) if other.word else None,
                    "gone": other.gone,
                }
                for name, other in sorted(self._election.others.items())
            ],
        }

    @property
    def is_known(self) -> bool:
        """Whether it has made itself known."""
        return self._known

    def give_up(self) -> None:
        """Say nothing more: another process has its place."""
        self._left = True

    def show_passport(self) -> None:
        """Say again who the registry is: its passport has been renewed."""
        self._kept = None

    # ---- life

    async def _on_start(self) -> None:
        try:
            await self._session.subscribe(
                self._topics.filter(TopicKind.REGISTRY_STATE), self._on_state
            )
        except AccessDenied as error:
            self._lead_unfenced(error.message)
        self._forget = self._session.on_connection(self._line_changed)
        if self._session.connected:
            self._line_changed(True)
        self.spawn(self._follow_clock(), name="lease")

    async def _on_stop(self) -> None:
        self._unfenced = False
        self._say(self._election.leave(self._now()), presence="offline")
        self._left = True  # nothing is said after that
        self._tell_change()

    async def _on_stopped(self) -> None:
        if self._forget is not None:
            self._forget()

    def _now(self) -> float:
        return 1000 * self._monotonic()

    def _line_changed(self, up: bool) -> None:
        if up:
            self._up_at = self._monotonic()
            self._election.connect(self._now())
            self._kept = None
            self._look()
        else:
            self._up_at = None
            self._election.disconnect()
        self._tell_change()

    async def _follow_clock(self) -> None:
        learn_at = 0.0
        while True:
            await asyncio.sleep(self._election.beat_ms / _LOOKS / 1000)
            if self._monotonic() >= learn_at:
                learn_at = self._monotonic() + _LEARN_S
                self._election.expect(self._known_others(), self._now())
                self._look_whether_heard()
            self._look()
            self._tell_change()

    def _look(self) -> None:
        now = self._now()
        if self._election.look(now, least_term=self._clock() // 1000):
            self._say(self._election.speak(now))

    def _look_whether_heard(self) -> None:
        if self._heard or self._unfenced or self._up_at is None:
            return
        if self._monotonic() - self._up_at >= _UNHEARD_S:
            self._lead_unfenced("the broker confirms the state of this registry, and loses it")

    def _lead_unfenced(self, reason: str) -> None:
        self._unfenced = True
        _log.warning(
            "registry.lease_unheard",
            registry=self._id,
            reason=reason,
            do="let registries publish and read registry/+/state; until then run only one",
        )

    # ---- words

    def _say(self, word: Word, *, presence: Presence = "birth") -> None:
        if self._left or not self._session.connected:
            return
        kept = word.leads, word.term, presence
        state = RegistryState(
            registry=self._id,
            state=presence,
            epoch=word.epoch,
            at=self._clock(),
            leads=word.leads,
            term=word.term,
            beat=word.beat,
            lease_ms=round(self._election.lease_ms),
            enrolls=self._enrolls,
            since=self._epoch,
            place=self._place,
            passport=self._signer.passport if self._signer is not None else None,
        )
        topic = self._topics.build(TopicKind.REGISTRY_STATE, registry=self._id)
        try:
            self._session.post(topic, encode(state), retain=kept != self._kept)
        except (Overloaded, BrokerUnavailable) as error:
            _log.debug("registry.word_skipped", registry=self._id, error=error.message)
        else:
            self._kept = kept
            self._known = True

    async def _on_state(self, message: Message) -> None:
        try:
            registry = self._topics.parse(message.topic).levels["registry"]
        except InvalidTopic as error:
            _log.warning("registry.bad_topic", error=error.message)
            return
        if not message.payload:
            self._election.lose(registry)
            return
        state = self._read(registry, message.payload)
        if state is None:
            return
        if registry == self._id:
            self._heard = True
            if self._unfenced:  # the rules have been mended
                self._unfenced = False
        elif not self._is_believed(registry):
            _log.warning("registry.stranger", registry=registry, own=self._id)
            return
        self._take(state, kept=message.retain)
        self._tell_change()

    def _read(self, registry: str, payload: bytes) -> RegistryState | None:
        if self._book is not None:
            return hear_registry(payload, registry=registry, book=self._book)
        try:
            state: RegistryState = decode(RegistryState, payload)
        except ProtocolError as error:
            _log.warning("registry.ignored", registry=registry, error=error.message)
            return None
        return state if state.registry == registry else None

    def _is_believed(self, registry: str) -> bool:
        return self._book is None or registry in self._book.registries

    def _take(self, state: RegistryState, *, kept: bool) -> None:
        if state.beat is None:  # a last will: it says nothing of what its sender holds
            known = self._election.others.get(state.registry)
            word = known.word if known is not None else None
            if state.unborn and word is not None and word.epoch != state.epoch:
                return  # of one that was refused the place of another
            if known is not None and (known.word is None or state.epoch >= known.word.epoch):
                self._election.lose(state.registry)
            return
        self._heard = True
        word = Word(
            registry=state.registry,
            term=state.term,
            epoch=state.epoch,
            beat=state.beat,
            leads=state.leads,
            leaves=state.state == "offline",
        )
        if self._election.hear(word, self._now(), kept=kept):
            self._say(self._election.speak(self._now()))

    def _tell_change(self) -> None:
        leads = self.leads
        if leads == self._led:
            return
        self._led = leads
        if leads:
            self._leading.set()
        following = self._election.mode is Mode.FOLLOWING
        _log.info(
            "registry.leads" if leads else "registry.steps_down",
            registry=self._id,
            term=self.term,
            leader=self.leader,
            for_good=following and not leads,
        )
        for listener in self._listeners:
            listener(leads)
