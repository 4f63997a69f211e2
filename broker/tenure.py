"""One member, one process: who comes second is refused, and says so.

Two processes with one identity would share a client id, so that each connection throws the other
one off, for ever. What is said on the identity's own state topic settles it, on any broker: last
wills and births carry the start of the process (``epoch``), whether it had made itself known
(``since``), and the time, so that every connection leaves another trace.

- A newcomer publishes nothing at first. It looks at what is kept there. A goodbye, or a word of a
  process that is known to be dead, settles it: the identity is free.
- Otherwise the one before may live: then it lost its connection to the newcomer just now, and comes
  back. The newcomer waits for that. A new trace of the one before means that it is there, and the
  newcomer ends (`Conflict`). Of two newcomers the one that started first stays.
- Whoever has made itself known keeps listening. A process with a later start that has made itself
  known too has taken over (the first one was away for longer than a newcomer waits): the first one
  ends, and says no more, for its topics are another's now. A word of an earlier process is
  answered by saying again what is true.

The rules are an arbitration by order of arrival, as for names on a link (RFC 6762 section 8,
RFC 5227 section 2); they do not hold against somebody who lies, which takes the identity's secret.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field

from broker.events import EventSource
from broker.lifecycle import Service
from broker.session.base import Message, Session
from capability_schemas.errors import AccessDenied, Conflict, ProtocolError
from capability_schemas.ids import now_ms
from capability_schemas.node import LOST, NodeState, RegistryState, RouterState
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode

State = NodeState | RouterState | RegistryState
Kind = Literal["node", "router", "registry"]

_TOPICS: Final[Mapping[Kind, TopicKind]] = {
    "node": TopicKind.NODE_STATE,
    "router": TopicKind.ROUTER_STATE,
    "registry": TopicKind.REGISTRY_STATE,
}
_FLUSH_S: Final = 5.0
"""How long what is said of a refusal may take to leave: the rival takes the connection away."""

_TICK_S: Final = 0.02
_LIMIT_BYTES: Final = 64 * 1024

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class TenureSettings(BaseModel):
    """How long a newcomer waits.

    Attributes:
        look_s: For what the broker kept, after each connection, seconds.
        doubt_s: For the one before to come back, seconds: more than a session waits before it
            connects again (`broker.session.settings.SessionSettings.reconnect_floor_s`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    look_s: Annotated[float, Field(gt=0)] = 0.3
    doubt_s: Annotated[float, Field(ge=0)] = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """The process that wants an identity.

    Attributes:
        identity: Which one.
        kind: What it is.
        epoch: Start of the process, UTC milliseconds.
        place: Where it runs, in words.
        alone_at: How the words of all processes begin of which at most one can run at a time
            (they share a lock, which this one holds); None: there is no such lock.
    """

    identity: str
    kind: Kind = "node"
    epoch: int
    place: str | None = None
    alone_at: str | None = None


class Tenure(Service):
    """Takes an identity, and keeps it; enter it after the session, before anything is published.

    Entering raises ``Conflict`` when another process has the identity; losing it later is the crash
    of this service.

    Args:
        session: Session of the identity, connected.
        topics: Topic grammar of the site.
        tenant: Who wants it.
        show: Says again how things are, for another process has written over it.
        give_up: Told before the crash: nothing may be published from then on.
        settings: How long a newcomer waits.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        tenant: Tenant,
        show: Callable[[], None],
        give_up: Callable[[], None],
        settings: TenureSettings | None = None,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        super().__init__(service_id=tenant.identity)
        self._session = session
        kind = _TOPICS[tenant.kind]
        self._topic = topics.build(kind, **{tenant.kind: tenant.identity})
        # Routers and registries follow all of their kind, over this very filter; nodes may not.
        self._filter = self._topic if tenant.kind == "node" else topics.filter(kind)
        self._tenant = tenant
        self._events = EventSource(
            session=session,
            topics=topics,
            source=tenant.identity,
            component=tenant.kind,
            clock=clock,
        )
        self._show = show
        self._give_up = give_up
        self._settings = settings or TenureSettings()
        self._before: State | None = None
        self._heard = asyncio.Event()
        self._settled = False
        self._rival: State | None = None
        self._taken = asyncio.Event()

    async def _on_start(self) -> None:
        try:
            await self._session.subscribe(self._filter, self._on_state)
        except AccessDenied as error:  # a broker with rules of before
            _log.warning("identity.unwatched", identity=self.identity, error=error.message)
            return
        remove = self._session.on_connection(self._on_connection)
        try:
            await self._look()
            if self._before is not None and self._may_live(self._before):
                await self._let_the_other_show_itself(self._before)
        finally:
            remove()
        self._settled = True
        self.spawn(self._watch(), name="watch")

    @property
    def identity(self) -> str:
        """Whose tenure it is."""
        return self._tenant.identity

    async def _look(self) -> None:
        """Wait for what the broker kept, in one connection that lasts."""
        while self._before is None:
            self._heard.clear()
            connections = self._session.stats.connects
            try:
                async with asyncio.timeout(self._settings.look_s):
                    await self._heard.wait()
            except TimeoutError:
                if self._session.connected and self._session.stats.connects == connections:
                    return

    async def _let_the_other_show_itself(self, before: State) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._settings.doubt_s
        _log.info("identity.in_doubt", identity=self.identity, before=describe(before))
        while True:
            self._heard.clear()
            if self._rival is not None:
                await self._refuse(self._rival)
            if not self._session.connected:
                await self._heard.wait()
                until_s = max(until_s, loop.time() + self._settings.look_s)
                continue
            try:
                async with asyncio.timeout_at(until_s):
                    await self._heard.wait()
            except TimeoutError:
                return

    async def _refuse(self, rival: State) -> None:
        error = self._conflict(rival)
        _log.error("identity.refused", identity=self.identity, error=error.message)
        self._tell("identity_refused", rival)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                while self._session.outbox_size:  # noqa: ASYNC110  # a number, not an event
                    await asyncio.sleep(_TICK_S)
        raise error

    async def _watch(self) -> None:
        await self._taken.wait()
        rival = self._rival
        if rival is not None:
            raise self._conflict(rival)

    def _on_connection(self, _: bool) -> None:
        self._heard.set()

    async def _on_state(self, message: Message) -> None:
        if not message.payload or message.topic != self._topic:
            return
        try:
            state = self._read(message.payload)
        except ProtocolError as error:
            _log.warning("identity.bad_state", identity=self.identity, error=error.message)
            return
        if self._is_own(state):
            return
        if self._settled:
            self._judge(state)
        elif self._before is None:
            self._before = state
        elif (state.epoch, state.at) != (self._before.epoch, self._before.at) and self._yields_to(
            state
        ):
            self._rival = state
        self._heard.set()

    def _read(self, payload: bytes) -> State:
        match self._tenant.kind:
            case "router":
                return decode(RouterState, payload, limit_bytes=_LIMIT_BYTES)
            case "registry":
                return decode(RegistryState, payload, limit_bytes=_LIMIT_BYTES)
            case _:
                return decode(NodeState, payload, limit_bytes=_LIMIT_BYTES)

    def _judge(self, state: State) -> None:
        """Take a word of another process, having made ourselves known."""
        own = self._tenant
        later = (state.epoch, state.place or "") > (own.epoch, own.place or "")
        if later and state.since is not None:
            if self._rival is None:
                self._rival = state
                _log.error("identity.taken", identity=self.identity, by=describe(state))
                self._tell("identity_taken", state)
                self._give_up()
                self._taken.set()
            return
        _log.warning("identity.contested", identity=self.identity, by=describe(state))
        self._show()

    def _is_own(self, state: State) -> bool:
        return (state.epoch, state.place) == (self._tenant.epoch, self._tenant.place)

    def _may_live(self, state: State) -> bool:
        """Tell whether the process that said this last may still be there."""
        if state.state == "offline" and state.reason != LOST:
            return False
        known = self._tenant.alone_at
        return known is None or not (state.place or "").startswith(known)

    def _yields_to(self, state: State) -> bool:
        """Tell whether a process that has shown that it lives goes before this one."""
        if state.since is not None:
            return True
        own = self._tenant
        return (state.epoch, state.place or "") < (own.epoch, own.place or "")

    def _conflict(self, rival: State) -> Conflict:
        return Conflict(
            f"{self.identity} is running elsewhere already: {describe(rival)}. End that one, or "
            "give this one an identity of its own",
            identity=self.identity,
            epoch=rival.epoch,
            since=rival.since,
            place=rival.place,
        )

    def _tell(self, action: str, rival: State) -> None:
        self._events.emit(
            "audit",
            {
                "action": action,
                "actor": self.identity,
                "subject": self.identity,
                "outcome": "refused",
                "detail": {
                    "refused": self._tenant.place,
                    "holder": rival.place,
                    "holder_epoch": rival.epoch,
                    "since": rival.since,
                },
            },
            subject=self.identity,
        )


def describe(state: State) -> str:
    """Say who said something, and since when it is there."""
    where = state.place or "a process that does not say where it runs"
    since = _time(state.since) if state.since is not None else "not announced yet"
    return f"{where} (since {since}, epoch {state.epoch})"


def _time(at: int) -> str:
    return f"{datetime.fromtimestamp(at / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
