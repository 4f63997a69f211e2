"""Enrollment on the wire: requests in, grants out, and the verbs of operators.

The desk hashes and signs for tens of milliseconds, so one thread of its own runs it, and whoever
holds a token can have it work only so often.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import structlog
from pydantic import TypeAdapter, ValidationError

from broker.access.policy import Role
from broker.lifecycle import Service
from broker.session.base import Message, Session
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.enrollment import EnrollRequest
from capability_schemas.errors import (
    BrokerUnavailable,
    FoamError,
    InvalidTask,
    InvalidTopic,
    Overloaded,
)
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode, first_problem
from registry.admin import Verb
from registry.enrollment.desk import Answer, EnrollmentDesk
from registry.store.audit import AuditLog

_QUEUE: Final = 1_000
_PER_SECOND: Final = 5.0
_BURST: Final = 20.0
_LEVELS: Final = 4_096
_PAGE: Final = 500
_T = TypeVar("_T")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_STRINGS: Final = TypeAdapter(tuple[str, ...])


class _Budget:
    """Requests that each token or member has left (a token bucket each)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, level: str) -> bool:
        now = self._clock()
        left, at = self._left.pop(level, (_BURST, now))
        left = min(_BURST, left + (now - at) * _PER_SECOND)
        self._left[level] = (max(0.0, left - 1.0), now)
        if len(self._left) > _LEVELS:
            self._left.popitem(last=False)
        return left >= 1.0


class EnrollmentService(Service):
    """Answers ``enroll/{request}``; entered with the registry's session.

    Args:
        session: Connection of the registry.
        topics: The site's topics.
        desk: Decides.
        trail: Where everything it does is written down; entered by the caller.
        emit: Publishes an event: kind and JSON fields.
        registry_id: Identity of the registry.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        desk: EnrollmentDesk,
        trail: AuditLog,
        emit: Callable[[str, dict[str, Any]], None],
        registry_id: str,
    ) -> None:
        super().__init__(service_id=registry_id)
        self._session = session
        self._topics = topics
        self._desk = desk
        self._trail = trail
        self._emit = emit
        self._id = registry_id
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="foam-enrollment")
        self._budget: _Budget | None = None
        self.dropped = 0

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """What operators may ask of the registry about members."""
        return {
            "token_create": self._token_create,
            "tokens": self._tokens,
            "token_revoke": self._token_revoke,
            "enrollments": self._enrollments,
            "approve": self._approve,
            "deny": self._deny,
            "revoke": self._revoke,
            "audit": self._audit,
        }

    async def _on_start(self) -> None:
        self._budget = _Budget(asyncio.get_running_loop().time)
        await self._session.subscribe(
            self._topics.filter(TopicKind.ENROLL),
            self._on_request,
            queue_limit=_QUEUE,
            on_overflow=self._overflowed,
        )

    async def _on_stopped(self) -> None:
        # What the desk has begun it ends: a grant is written, or it is not.
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _run(self, act: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)

    def _overflowed(self, message: Message) -> None:
        self.dropped += 1
        _log.warning("enrollment.overflow", topic=message.topic)

    async def _on_request(self, message: Message) -> None:
        if message.retain or not message.payload:
            return
        try:
            level = self._topics.parse(message.topic).levels["request"]
        except InvalidTopic as error:
            _log.warning("enrollment.bad_topic", error=error.message)
            return
        if self._budget is None or not self._budget.spend(level):
            self._overflowed(message)
            return
        try:
            answer = await self._run(lambda: self._desk.consider(level, message.payload))
        except FoamError as error:  # the files cannot be written: nothing was granted
            _log.error("enrollment.failed", level=level, error=error.message)
            return
        await self._tell(answer, actor=level)

    async def _tell(self, answer: Answer, *, actor: str) -> None:
        """Write down what was decided, then say it: nothing is granted that is not on record."""
        detail = {"reason": answer.reason} if answer.reason else {}
        await self._note(answer.happened, actor=actor, subject=answer.identity, detail=detail)
        if answer.reply is None:
            return
        topic = self._topics.build(TopicKind.ENROLL_REPLY, request=answer.level)
        try:
            self._session.post(topic, encode(answer.reply))
        except (Overloaded, BrokerUnavailable) as error:
            _log.warning("enrollment.reply_lost", level=answer.level, error=error.message)

    async def _note(
        self, action: str, *, actor: str, subject: str, detail: dict[str, Any] | None = None
    ) -> None:
        entry = await self._run(
            lambda: self._trail.write(
                f"enrollment_{action}", actor=actor, subject=subject, detail=detail
            )
        )
        _log.info(f"enrollment.{action}", actor=actor, subject=subject, **(detail or {}))
        self._emit("audit", entry.describe())

    # ---- verbs

    async def _token_create(self, args: dict[str, Any], client: str) -> Any:
        known = {"role", "ttl_ms", "uses", "names", "zones", "grants", "data", "approve", "replace"}
        _only(args, known)
        role = _role(args.get("role", "node"))
        attested = _attested(args, role)
        token = await self._run(
            lambda: self._desk.create_token(
                role=role,
                ttl_ms=_whole(args, "ttl_ms", 600_000),
                uses=_whole(args, "uses", 1),
                by=client,
                names=_strings(args, "names"),
                attested=attested,
                approve=_flag(args, "approve"),
                replace=_flag(args, "replace"),
            )
        )
        made = self._desk.tokens()[token.id]
        await self._note(
            "token_created",
            actor=client,
            subject=token.id,
            detail=made.model_dump(mode="json", exclude={"proof_key"}, exclude_none=True),
        )
        return {"id": token.id, "token": token.reveal(), "expires_at": made.expires_at}

    async def _tokens(self, args: dict[str, Any], _client: str) -> Any:
        _only(args, set())
        rows = [
            {"id": name, **token.model_dump(mode="json", exclude={"proof_key"})}
            for name, token in sorted(self._desk.tokens().items())
        ]
        return {"tokens": rows[:_PAGE], "more": len(rows[_PAGE:])}

    async def _token_revoke(self, args: dict[str, Any], client: str) -> Any:
        _only(args, {"token"})
        token = _text(args, "token")
        await self._run(lambda: self._desk.revoke_token(token))
        await self._note("token_revoked", actor=client, subject=token)
        return {"id": token}

    async def _enrollments(self, args: dict[str, Any], _client: str) -> Any:
        _only(args, set())
        rows = []
        for identity, waiting in sorted(self._desk.waiting.items()):
            request: EnrollRequest = decode(EnrollRequest, waiting.request.encode())
            rows.append(
                {
                    "id": identity,
                    "role": request.role,
                    "token": waiting.token,
                    "asked_at": waiting.asked_at,
                    "facts": request.facts,
                    "public_key": request.public_key,
                }
            )
        return {"enrollments": rows[:_PAGE], "more": len(rows[_PAGE:])}

    async def _approve(self, args: dict[str, Any], client: str) -> Any:
        _only(args, {"id"})
        identity = _text(args, "id")
        return await self._decide(identity, client, granted=True)

    async def _deny(self, args: dict[str, Any], client: str) -> Any:
        _only(args, {"id", "reason"})
        reason = _text(args, "reason") if "reason" in args else ""
        return await self._decide(_text(args, "id"), client, granted=False, reason=reason)

    async def _decide(
        self, identity: str, client: str, *, granted: bool, reason: str = ""
    ) -> dict[str, Any]:
        answer = await self._run(
            lambda: self._desk.decide(identity, granted=granted, reason=reason)
        )
        await self._tell(answer, actor=client)
        return {"id": identity, "status": answer.happened, "reason": answer.reason}

    async def _revoke(self, args: dict[str, Any], client: str) -> Any:
        _only(args, {"id"})
        identity = _text(args, "id")
        await self._run(lambda: self._desk.revoke(identity))
        await self._note("revoked", actor=client, subject=identity)
        return {"id": identity, "revoked_at": self._desk.revoked[identity]}

    async def _audit(self, args: dict[str, Any], _client: str) -> Any:
        _only(args, {"limit", "before"})
        limit = min(_PAGE, _whole(args, "limit", 50))
        before = _whole(args, "before", 0) or None
        entries = await self._run(lambda: self._trail.latest(limit, before=before))
        return {"entries": [entry.describe() for entry in entries]}


def _only(args: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(args.keys() - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        raise InvalidTask(f"unknown argument {unknown[0]!r}; this verb takes: {takes}")


def _text(args: dict[str, Any], name: str) -> str:
    value = args.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidTask(f"args.{name}: a text is needed", field=f"args.{name}")
    return value


def _whole(args: dict[str, Any], name: str, default: int) -> int:
    value = args.get(name, default)
    if type(value) is not int or value < 0:
        raise InvalidTask(f"args.{name}: a whole number from 0 is needed", field=f"args.{name}")
    return value


def _flag(args: dict[str, Any], name: str) -> bool:
    value = args.get(name, False)
    if not isinstance(value, bool):
        raise InvalidTask(f"args.{name}: true or false is needed", field=f"args.{name}")
    return value


def _strings(args: dict[str, Any], name: str) -> tuple[str, ...]:
    try:
        return _STRINGS.validate_python(args.get(name, ()))
    except ValidationError as exc:
        raise InvalidTask(f"args.{name}: a list of texts is needed", field=f"args.{name}") from exc


def _role(value: Any) -> Role:
    try:
        return Role(value)
    except ValueError as exc:
        raise InvalidTask(
            f"role {value!r}: use one of {', '.join(Role)}", field="args.role"
        ) from exc


def _attested(args: dict[str, Any], role: Role) -> CapabilityPolicy | None:
    given = {name: args[name] for name in ("zones", "grants", "data") if name in args}
    if not given:
        return None
    if role is not Role.NODE:
        raise InvalidTask("zones, grants and data are for nodes", field="args.role")
    try:
        return CapabilityPolicy.model_validate(given)
    except ValidationError as exc:
        field, problem = first_problem(exc)
        raise InvalidTask(f"args.{field}: {problem}", field=f"args.{field}") from exc
