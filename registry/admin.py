"""Verbs of the registry's admin topic: ``claims``, ``history``, ``stats``, ``forget``."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

import structlog

from broker.access.orders import Requester, changes
from broker.access.policy import Role
from broker.security import SecurityAlarm
from broker.session.base import Message, Session
from capability_schemas.admin import ADMIN_LIMIT_BYTES, AdminRequest, decode_admin_request
from capability_schemas.errors import (
    AccessDenied,
    Conflict,
    FoamError,
    InvalidTask,
    ProtocolError,
    Repeated,
)
from capability_schemas.provenance import AdminCheck
from capability_schemas.reply import ErrorEvent, Result
from capability_schemas.task import peek_task_id
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from registry.auditor import Auditor
from registry.catalog import Catalog
from registry.leadership import Lead, Sole
from registry.store import SqliteStore

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_HISTORY_LIMIT: Final = 1_000

Verb = Callable[[dict[str, Any], Requester], Awaitable[Any]]
"""A verb of another part of the registry: arguments, and who asks."""


class RegistryAdmin:
    """Answers requests on ``admin/{registry}/{client}``.

    Args:
        session: sends the answers.
        topics: the site's topics.
        store: holds the history.
        catalog: what is current.
        counts: counters of the service.
        registry_id: source of the answers.
        clock: UTC milliseconds.
        more: verbs of others, which are told who asks.
        check: decides which requests are looked at; None: all that the broker lets through.
        alarm: told about those that are not.
        lead: whether this registry leads: what changes something only the leader does.
        auditor: knows who asks, and writes down what was ordered; None: the broker's word counts
            alone, and whoever may publish an order is taken for an administrator.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        store: SqliteStore,
        catalog: Catalog,
        counts: Counter[str],
        registry_id: str,
        clock: Callable[[], int],
        more: Mapping[str, Verb] | None = None,
        check: AdminCheck | None = None,
        alarm: SecurityAlarm | None = None,
        lead: Lead | None = None,
        auditor: Auditor | None = None,
    ) -> None:
        self._lead = lead or Sole()
        self._session = session
        self._topics = topics
        self._store = store
        self._catalog = catalog
        self._counts = counts
        self._id = registry_id
        self._clock = clock
        self._verbs = {
            "claims": self._claims,
            "forget": self._forget,
            "history": self._history,
            "stats": self._stats,
        }
        self._more = dict(more or {})
        self._check = check or AdminCheck(target=registry_id, provenance=None, unsigned=True)
        self._alarm = alarm
        self._auditor = auditor

    async def answer(self, message: Message) -> None:
        """Answer a request on ``reply/{client}/{id}/{registry}``; without an id, drop it."""
        if message.retain:
            return  # obeyed when it was published; a kept copy comes with every connection
        try:
            client = self._topics.parse(message.topic).levels["client"]
        except ProtocolError as exc:
            self._refuse_silently(message, exc)
            return
        try:
            request = decode_admin_request(message.payload)
        except ProtocolError as exc:
            task = peek_task_id(message.payload[:ADMIN_LIMIT_BYTES])
            if task is None:
                self._refuse_silently(message, exc)
            else:
                self._say(client, ErrorEvent.from_error(exc, task=task, at=self._clock()))
            return
        try:
            passport = self._check.verify(client, message.payload, request)
            requester = (
                Requester(client, Role.ADMIN)
                if self._auditor is None
                else self._auditor.requester(client, passport)
            )
        except Repeated as exc:
            self._counts["repeated_requests"] += 1
            _log.info("registry.request_repeated", client=client, error=exc.message)
            return
        except AccessDenied as exc:
            if self._alarm is not None:
                self._alarm.tell(exc, sender=client, what=f"admin {request.verb}")
            self._say(client, ErrorEvent.from_error(exc, task=request.id, at=self._clock()))
            return
        self._say(client, await self._ask(request, requester))

    def _refuse_silently(self, message: Message, error: ProtocolError) -> None:
        self._counts["bad_requests"] += 1
        _log.warning("registry.bad_request", topic=message.topic, error=error.message)

    async def _ask(self, request: AdminRequest, requester: Requester) -> Result | ErrorEvent:
        now = self._clock()
        try:
            requester.check_order(request.verb, request.args)
            if changes(request.verb, request.args):
                self._lead.check()
            output = await self._answer(request, requester)
        except FoamError as exc:
            self._note(requester, request, exc)
            return ErrorEvent.from_error(exc, task=request.id, at=now)
        self._note(requester, request)
        return Result(task=request.id, at=now, seq=0, output=output, node=self._id)

    def _note(
        self, requester: Requester, request: AdminRequest, error: FoamError | None = None
    ) -> None:
        if self._auditor is not None:
            self._auditor.note_order(requester, request, error=error)

    async def _answer(self, request: AdminRequest, requester: Requester) -> Any:
        verb, other = self._verbs.get(request.verb), self._more.get(request.verb)
        if verb is not None:
            return await verb(request.args)
        if other is not None:
            return await other(request.args, requester)
        known = ", ".join(sorted({*self._verbs, *self._more}))
        raise InvalidTask(f"unknown verb {request.verb!r}: this registry knows {known}")

    def _say(self, client: str, event: Result | ErrorEvent) -> None:
        topic = self._topics.build(TopicKind.REPLY, client=client, task=event.task, source=self._id)
        try:
            self._session.post(topic, encode(event))
        except FoamError as exc:
            _log.warning("registry.answer_lost", topic=topic, error=exc.message)

    async def _claims(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        node = _text(args, "node", needed=False)
        return [
            {
                "node": record.node,
                "function": record.function,
                "version": record.version,
                "epoch": record.epoch,
                "revision": record.revision,
                "description": record.description,
                "admitted_at": record.admitted_at,
                "expires_at": record.expires_at,
            }
            for record in sorted(self._catalog.records(), key=lambda record: record.key)
            if node is None or record.node == node
        ]

    async def _history(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        node = _text(args, "node", needed=True)
        function = _text(args, "function", needed=False)
        limit = args.get("limit", 100)
        if not isinstance(limit, int) or not 1 <= limit <= _HISTORY_LIMIT:
            raise InvalidTask(f"limit is a number from 1 to {_HISTORY_LIMIT}", field="args.limit")
        entries = await self._store.history(str(node), function, limit=limit)
        return [asdict(entry) for entry in entries]

    async def _stats(self, _args: dict[str, Any]) -> dict[str, Any]:
        return {"records": len(self._catalog), **dict(sorted(self._counts.items()))}

    async def _forget(self, args: dict[str, Any]) -> bool:
        """Admit any order under a withdrawn key again (a node whose clock was set back)."""
        key = (str(_text(args, "node", needed=True)), str(_text(args, "function", needed=True)))
        if key in self._catalog:
            raise Conflict(f"{key[0]}/{key[1]} is in the catalogue: it has to be withdrawn first")
        self._catalog.forget(key)
        return await self._store.forget(*key)


def _text(args: dict[str, Any], name: str, *, needed: bool) -> str | None:
    value = args.get(name)
    if value is None and not needed:
        return None
    if not isinstance(value, str):
        raise InvalidTask(f"args.{name}: a text is needed", field=f"args.{name}")
    return value
