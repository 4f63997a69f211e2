"""Orders on ``admin/{router}/{client}``: who gives them, whether they may, what came of them."""

from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

import structlog

from broker.access.orders import Requester, changes, told_args
from broker.access.policy import Role
from broker.audit import AuditVoice
from broker.events import EventSource
from broker.security import SecurityAlarm
from broker.session.base import Message
from capability_schemas.admin import ADMIN_LIMIT_BYTES, AdminRequest, decode_admin_request
from capability_schemas.errors import (
    AccessDenied,
    FoamError,
    Overloaded,
    ProtocolError,
    Repeated,
)
from capability_schemas.passport import Passport, PassportBook
from capability_schemas.provenance import AdminCheck, Provenance
from capability_schemas.reply import ErrorEvent, Result
from capability_schemas.task import peek_task_id
from capability_schemas.topics import TopicKind, Topics
from router.admin import AdminDesk
from router.people import People
from router.replies import ReplyDesk
from router.statistics import RouterStats

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_AT_A_TIME: Final = 256
_WAIT_S: Final = 3.0
"""How long the registry's word on an unknown administrator is waited for; an asker waits 10 s."""


class _Spawn(Protocol):
    def __call__(self, coro: Coroutine[Any, Any, None], *, name: str) -> object: ...


class AdminLine:
    """Takes orders from the wire, checks them, has them done and writes them down.

    Args:
        desk: Does them.
        people: Knows who gives them.
        book: Passports of those who sign; None where no registry of the site is known.
        unsigned: Whether the broker's word will do for who asks.
        since: Nothing signed counts that was sent before, UTC milliseconds.
        events: Where it is told that a signature was wrong.
        replies: Tells the answer.
        stats: Counters.
        audit: Tells the audit trail.
        topics: Topic grammar of the site.
        router_id: This router.
        spawn: Runs background work in the router's life cycle.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        desk: AdminDesk,
        people: People,
        book: PassportBook | None,
        unsigned: bool,
        since: int,
        events: EventSource,
        replies: ReplyDesk,
        stats: RouterStats,
        audit: AuditVoice,
        topics: Topics,
        router_id: str,
        spawn: _Spawn,
        clock: Callable[[], int],
    ) -> None:
        self._desk = desk
        self._people = people
        self._check = AdminCheck(
            target=router_id,
            provenance=None
            if book is None
            else Provenance(own=router_id, book=book, clock=clock, since=since),
            unsigned=unsigned,
        )
        self._alarm = SecurityAlarm(events=events, own=router_id, clock=clock)
        self._replies = replies
        self._stats = stats
        self._audit = audit
        self._topics = topics
        self._router_id = router_id
        self._spawn = spawn
        self._clock = clock
        self._under_way = 0

    async def on_message(self, message: Message) -> None:
        """Take one order; what cannot be read is answered where its id can."""
        try:
            client = self._topics.parse(message.topic).levels["client"]
        except ProtocolError:
            self._stats.dropped["topic"] += 1
            return
        try:
            request = decode_admin_request(message.payload)
        except ProtocolError as error:
            self._stats.dropped["decode"] += 1
            task = peek_task_id(message.payload[:ADMIN_LIMIT_BYTES])
            if task is not None:
                self._replies.refuse(self._reply(client, task), task, error)
            return
        try:
            passport = self._check.verify(client, message.payload, request)
        except Repeated as error:
            self._stats.dropped["repeated"] += 1
            _log.info("admin.repeated", client=client, error=error.message)
            return
        except AccessDenied as error:
            self._alarm.tell(error, sender=client, what=f"admin {request.verb}")
            self._replies.refuse(self._reply(client, request.id), request.id, error)
            return
        if self._under_way >= _AT_A_TIME:
            full = Overloaded(f"{_AT_A_TIME} orders are under way, as many as may be")
            self._replies.refuse(self._reply(client, request.id), request.id, full)
            return
        self._under_way += 1
        self._spawn(self._obey(client, request, passport), name="admin")

    async def _obey(self, client: str, request: AdminRequest, passport: Passport | None) -> None:
        reply, now = self._reply(client, request.id), self._clock()
        try:
            requester = await self._requester(client, request, passport)
            requester.check_order(request.verb, request.args)
            output = await self._desk.answer(request)
        except FoamError as error:
            self._note_failure(client, request, error)
            self._replies.say(reply, ErrorEvent.from_error(error, task=request.id, at=now))
            return
        except Exception as error:  # noqa: BLE001  # supervision boundary: one request
            _log.error("admin.failed", verb=request.verb, exc_info=error)
            failure = FoamError(f"the verb {request.verb} failed in the router")
            self._note_failure(client, request, failure)
            self._replies.say(reply, ErrorEvent.from_error(failure, task=request.id, at=now))
            return
        finally:
            self._under_way -= 1
        if changes(request.verb, request.args):
            told = {
                "role": requester.role.value,
                "signed": passport is not None,
                "args": told_args(request.args),
            }
            self._audit.write("order", actor=requester.name, subject=request.verb, detail=told)
        self._replies.say(
            reply,
            Result(task=request.id, at=self._clock(), seq=0, output=output, node=self._router_id),
        )
        _log.info("admin.answered", client=client, verb=request.verb)

    async def _requester(
        self, client: str, request: AdminRequest, passport: Passport | None
    ) -> Requester:
        """Tell who asks: by its passport, else by what the registry says of the topic's client."""
        if passport is not None:
            told = self._people.role(passport.identity)  # it may have been changed since
            return Requester(passport.identity, told or Role(passport.role))
        requester = await self._people.requester(client)
        try:
            requester.check_order(request.verb, request.args)
        except AccessDenied:
            return await self._people.requester(client, wait_s=_WAIT_S)
        return requester

    def _note_failure(self, client: str, request: AdminRequest, error: FoamError) -> None:
        """Write down what was refused for want of rights, and orders that came to nothing."""
        if isinstance(error, AccessDenied):
            self._audit.tally.note(
                "order_refused", actor=client, subject=request.verb, message=error.message
            )
        elif changes(request.verb, request.args):
            told = {"args": told_args(request.args), "error": error.code.value}
            self._audit.write("order_failed", actor=client, subject=request.verb, detail=told)

    def _reply(self, client: str, task: str) -> str:
        root = self._topics.build(TopicKind.REPLY, client=client, task=task, source=self._router_id)
        return root.rpartition("/")[0]
