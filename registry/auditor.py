"""Keeps the audit trail: what the registry does itself, and what other components tell.

Routers, nodes and the embedded broker tell on ``event/{source}/audit`` what they granted, refused
and were ordered; the broker proves who tells. What is told is taken as told: a component that lies
about itself is not found out here, one that falls silent is, for its entries are numbered. What was
told while this registry was away itself (cut off, suspended, not running) is told apart from that:
``events_unheard``, not ``events_missing``; other registries have heard it.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Container
from typing import Annotated, Any, Final

import structlog
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from broker.access.orders import Requester, changes, told_args
from broker.access.policy import Role
from broker.audit import AUDIT_KIND, BROKER_SOURCE, AuditVoice, Budget
from broker.lifecycle import Service
from broker.session.base import Message, Session
from capability_schemas.admin import AdminRequest, CloudEvent
from capability_schemas.errors import (
    AccessDenied,
    FoamError,
    InvalidTopic,
    ProtocolError,
    Unavailable,
)
from capability_schemas.ids import now_ms
from capability_schemas.passport import Passport
from capability_schemas.signing import canonical_bytes
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import parse_json
from registry.leadership import Lead
from registry.store.audit import AuditEntry, AuditLog, AuditNote

_WRITTEN_ELSEWHERE: Final = frozenset({"token_create", "token_revoke", "approve", "deny", "revoke"})
"""Orders that enrollment writes down itself, with what came of them."""

_TELLERS: Final = frozenset({Role.ROUTER, Role.NODE, Role.REGISTRY})
_QUEUE: Final = 2_000
_PENDING: Final = 2_000
_AT_ONCE: Final = 200
_LIMIT_BYTES: Final = 16 * 1024
_SOURCES: Final = 4_096
_BURST: Final = 200.0
_PER_SECOND: Final = 10.0
_LOOK_BACK: Final = 2_000
_RETRY_S: Final = 1.0
_LONGEST_RETRY_S: Final = 30.0
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_Name = Annotated[str, StringConstraints(max_length=512)]


class _Told(BaseModel):
    """What an event of another component says."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    action: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z_]{0,63}$")]
    actor: _Name | None = None
    subject: _Name = ""
    detail: dict[str, Any] = {}
    outcome: _Name | None = None
    epoch: Annotated[int, Field(ge=0)] | None = None
    number: Annotated[int, Field(ge=1)] | None = None


class Auditor(Service):
    """Writes down what happens in the mesh; entered with the registry's session.

    Owned by the registry's event loop; the disk is waited for in a thread. Nothing waits for it:
    of what is told faster than it can be written, or faster than a component may tell, the rest is
    counted, and the count written down.

    Args:
        session: Connection of the registry.
        topics: The site's topics.
        trail: The trail; entered by the caller.
        emit: Publishes an event: kind and JSON fields.
        role_of: Returns what a member is; None where it is none.
        registry_id: Identity of the registry.
        registries: Returns the registries that make passports of these members; None: this one.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        trail: AuditLog,
        emit: Callable[[str, dict[str, Any]], None],
        role_of: Callable[[str], Role | None],
        registry_id: str,
        registries: Callable[[], Container[str]] | None = None,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        super().__init__(service_id=registry_id)
        self._registries = registries or (lambda: {registry_id})
        self._session = session
        self._topics = topics
        self._trail = trail
        self._emit = emit
        self._role_of = role_of
        self._id = registry_id
        self._clock = clock
        self._pending: deque[AuditNote] = deque()
        self._waiting = asyncio.Event()
        self._writing = asyncio.Lock()
        self._lost = 0
        self._last: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._unheard: set[str] = set()
        """Components of whom nothing has come since this registry was away."""
        self._forget: Callable[[], None] | None = None
        self._budgets: Budget | None = None
        self.voice = AuditVoice(emit=self._take_own, epoch=clock(), clock=clock)
        """For what the registry has to tell itself."""

    # ---- who orders

    def requester(self, client: str, passport: Passport | None) -> Requester:
        """Tell who gives an order: by the credentials of the mesh.

        One that has none here (at a broker that is not ours) is taken for the least that may order
        at all, or for what its passport says.

        Args:
            client: Identity in the topic, as the broker proves it.
            passport: The passport of who signed the order, checked; None for an unsigned one.

        Raises:
            AccessDenied: The passport was made here, for one that is no member any more: taken out
                of the credentials on this machine, or disabled there.
        """
        name = client if passport is None else passport.identity
        role = self._role_of(name)
        if role is None and passport is not None and passport.registry in self._registries():
            raise AccessDenied(f"{name} is no member any more: enroll it anew", sender=name)
        unknown = Role.OPERATOR if passport is None else Role(passport.role)
        return Requester(name, role or unknown)

    def note_order(
        self, requester: Requester, request: AdminRequest, *, error: FoamError | None = None
    ) -> None:
        """Write down an order that changes something, or one that was refused."""
        if isinstance(error, AccessDenied):
            self.voice.tally.note(
                "order_refused",
                actor=requester.name,
                subject=request.verb,
                message=error.message,
            )
        elif changes(request.verb, request.args) and not (
            error is None and request.verb in _WRITTEN_ELSEWHERE
        ):
            detail: dict[str, Any] = {
                "role": requester.role.value,
                "args": told_args(request.args),
            }
            if error is not None:
                detail["error"] = error.code.value
            self.voice.write(
                "order" if error is None else "order_failed",
                actor=requester.name,
                subject=request.verb,
                detail=detail,
            )

    def note_lead(self, lead: Lead, leads: bool) -> None:
        """Write down that this registry leads from now on, or does no more."""
        self.voice.write(
            "registry_leads" if leads else "registry_follows",
            actor=self._id,
            subject=lead.leader or "",
            detail={"term": lead.term},
        )

    # ---- life

    async def _on_start(self) -> None:
        self._budgets = Budget(
            asyncio.get_running_loop().time,
            burst=_BURST,
            per_second=_PER_SECOND,
            remembered=_SOURCES,
        )
        for entry in reversed(await asyncio.to_thread(self._trail.latest, _LOOK_BACK)):
            told = entry.detail.get("told")
            if isinstance(told, dict) and isinstance(told.get("number"), int):
                self._last[str(told.get("by"))] = (told["epoch"], told["number"])
        self._on_connection(False)  # nor was anything heard before this start
        self._forget = self._session.on_connection(self._on_connection)
        self.spawn(self._keep_writing(), name="write")
        self.spawn(self.voice.keep_telling(), name="tell")
        try:
            await self._session.subscribe(
                self._topics.filter(TopicKind.EVENT),
                self._on_event,
                queue_limit=_QUEUE,
                on_overflow=self._overflowed,
            )
        except AccessDenied as error:
            _log.warning("audit.unheard", registry=self._id, error=error.message)

    async def _on_stop(self) -> None:
        if self._forget is not None:
            self._forget()
        self.voice.tell()
        try:
            await self._write_pending()
        except Unavailable as error:
            _log.error("audit.unwritten", entries=len(self._pending), error=error.message)

    # ---- what is told

    def _take_own(self, _kind: str, data: dict[str, Any]) -> None:
        self._put(AuditNote(data["action"], data["actor"], data["subject"], data["detail"]))

    def _on_connection(self, up: bool) -> None:
        if not up:
            self._unheard.update(self._last)

    def _overflowed(self, message: Message) -> None:
        if message.topic.rpartition("/")[2] == AUDIT_KIND:
            self._lose()

    async def _on_event(self, message: Message) -> None:
        try:
            levels = self._topics.parse(message.topic).levels
        except InvalidTopic as error:
            _log.warning("audit.bad_topic", error=error.message)
            return
        source = levels["source"]
        if levels["kind"] != AUDIT_KIND or source == self._id or message.retain:
            return
        role = self._role_of(source)
        if role not in _TELLERS and not (role is None and source == BROKER_SOURCE):
            return
        if self._budgets is not None and not self._budgets.spend(source):
            self._lose()
            return
        told = _read(message.payload)
        if told is None:
            self.voice.tally.note("event_refused", actor=source, message="no audit event")
            return
        if role is Role.REGISTRY:
            self._hear_registry(source, told)
            return
        if not self._is_new(source, told):
            return
        by: dict[str, Any] = {"by": source}
        if told.epoch is not None and told.number is not None:
            by |= {"epoch": told.epoch, "number": told.number}
        detail = {**told.detail, "told": by}
        if told.outcome is not None:
            detail["outcome"] = told.outcome
        self._put(AuditNote(told.action, told.actor or "", told.subject, detail))

    def _hear_registry(self, source: str, told: _Told) -> None:
        """Chain what another registry did itself; what it was told, this one was told as well.

        Its entries are numbered through all its starts.
        """
        if told.number is None:
            return
        first = source not in self._last
        if first:  # its trail may be long: what counts is what comes from now on
            self._last[source] = (0, told.number - 1)
        if self._is_new(source, told.model_copy(update={"epoch": 0})) and not told.detail.get(
            "told"
        ):
            by = {"by": source, "epoch": 0, "number": told.number}
            self._put(
                AuditNote(told.action, told.actor or "", told.subject, {**told.detail, "told": by})
            )

    def _is_new(self, source: str, told: _Told) -> bool:
        """Tell whether it is no repetition, and write down where numbers are missing."""
        if told.epoch is None or told.number is None:
            return True
        epoch, number = self._last.pop(source, (told.epoch, 0))
        if (told.epoch, told.number) <= (epoch, number):  # at least once: the same again
            self._last[source] = (epoch, number)
            return False
        known = number if told.epoch == epoch else 0
        self._last[source] = (told.epoch, told.number)
        if len(self._last) > _SOURCES:
            forgotten, _ = self._last.popitem(last=False)
            self._unheard.discard(forgotten)
        missing = told.number - known - 1
        was_away = source in self._unheard
        self._unheard.discard(source)
        if missing > 0:
            action = "events_unheard" if was_away else "events_missing"
            self._put(AuditNote(action, self._id, source, {"count": missing, "after": known}))
        return True

    def _lose(self) -> None:
        self._lost += 1
        self._waiting.set()

    def _put(self, note: AuditNote) -> None:
        if len(self._pending) >= _PENDING:
            self._lost += 1
            return
        self._pending.append(note)
        self._waiting.set()

    # ---- the disk

    async def _keep_writing(self) -> None:
        retry_s = _RETRY_S
        while True:
            await self._waiting.wait()
            try:
                await self._write_pending()
            except Unavailable as error:
                _log.error("audit.unwritten", entries=len(self._pending), error=error.message)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _LONGEST_RETRY_S)
            else:
                retry_s = _RETRY_S

    async def _write_pending(self) -> None:
        async with self._writing:  # at the end both the task and the goodbye want to
            await self._write_all_pending()

    async def _write_all_pending(self) -> None:
        while self._pending or self._lost:
            notes = [note for note, _ in zip(self._pending, range(_AT_ONCE), strict=False)]
            lost, taken = self._lost, len(notes)
            if lost:
                notes.append(AuditNote("events_lost", self._id, "", {"count": lost}))
            entries = await asyncio.to_thread(self._trail.write_all, notes)
            for _ in range(taken):
                self._pending.popleft()
            self._lost -= lost
            for entry in entries:
                self._tell(entry)
        self._waiting.clear()

    def _tell(self, entry: AuditEntry) -> None:
        _log.info("audit.entry", action=entry.action, actor=entry.actor, subject=entry.subject)
        self._emit(AUDIT_KIND, entry.describe())


def _read(payload: bytes) -> _Told | None:
    """Read an event; None when it is none, too large, or nothing that a chain can hold."""
    if len(payload) > _LIMIT_BYTES:
        return None
    try:
        told = _Told.model_validate(CloudEvent.model_validate(parse_json(payload)).data)
        canonical_bytes(told.model_dump())  # half a surrogate pair passes for JSON, and has none
    except (ProtocolError, ValueError, RecursionError):
        return None
    return told
