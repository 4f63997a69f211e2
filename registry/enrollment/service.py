"""Enrollment on the wire: requests in, grants out, and the verbs of operators.

The desk hashes and signs for tens of milliseconds, so one thread of its own runs it, and whoever
holds a token can have it work only so often.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import structlog
from pydantic import TypeAdapter, ValidationError

from broker.access.orders import Requester
from broker.access.policy import Role
from broker.audit import Budget
from broker.lifecycle import Service
from broker.session.base import Message, Session
from capability_schemas.enrollment import EnrollRequest
from capability_schemas.errors import (
    BrokerUnavailable,
    ConfigurationError,
    FoamError,
    InvalidTask,
    InvalidTopic,
    Overloaded,
    Unavailable,
)
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode
from registry.admin import Verb
from registry.enrollment.departure import check_departure
from registry.enrollment.desk import EnrollmentDesk
from registry.enrollment.grants import Answer
from registry.enrollment.tenancy import ATTESTED, check_attested
from registry.leadership import Lead, Sole
from registry.store.audit import AuditLog

_QUEUE: Final = 1_000
_PER_SECOND: Final = 5.0
_BURST: Final = 20.0
_LEVELS: Final = 4_096
_PAGE: Final = 500
_AGAIN_S: Final = 5.0
_T = TypeVar("_T")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_STRINGS: Final = TypeAdapter(tuple[str, ...])


class EnrollmentService(Service):
    """Answers ``enroll/{request}``; entered with the registry's session.

    Args:
        session: Connection of the registry.
        topics: The site's topics.
        desk: Decides.
        trail: Where everything it does is written down; entered by the caller.
        emit: Publishes an event: kind and JSON fields.
        registry_id: Identity of the registry.
        changed: Told when members or their papers have changed.
        runs_here: Tells whether a registry, router or node is of the registry's own data folder.
        lead: Whether the registry leads; None: it is the only one.
        forget: Deletes what that folder holds of a member that was thrown out; blocks.
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
        changed: Callable[[], None] = lambda: None,
        runs_here: Callable[[str], bool] = lambda _: False,
        forget: Callable[[str], object] = lambda _: None,
        lead: Lead | None = None,
    ) -> None:
        super().__init__(service_id=registry_id)
        self._lead = lead or Sole()
        self._session = session
        self._topics = topics
        self._desk = desk
        self._trail = trail
        self._emit = emit
        self._id = registry_id
        self._changed = changed
        self._runs_here = runs_here
        self._forget = forget
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="foam-enrollment")
        self._budget: Budget | None = None
        self._stirred = asyncio.Event()
        self._unread = not self._lead.alone
        """Whether another registry may have written since."""
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
            "authority": self._authority,
            "authority_rotate": self._authority_rotate,
            "authority_retire": self._authority_retire,
        }

    async def _on_start(self) -> None:
        self._budget = Budget(
            asyncio.get_running_loop().time,
            burst=_BURST,
            per_second=_PER_SECOND,
            remembered=_LEVELS,
        )
        await self._session.subscribe(
            self._topics.filter(TopicKind.ENROLL),
            self._on_request,
            queue_limit=_QUEUE,
            on_overflow=self._overflowed,
        )
        self._lead.on_change(self._lead_changed)
        self._stirred.set()  # who was removed while the registry was away, or another one led
        self.spawn(self._follow_members(), name="follow")

    def _lead_changed(self, _leads: bool) -> None:
        self._unread = True
        self._stirred.set()

    def follow_members(self) -> None:
        """Look who has vanished from the credentials; told when they have changed."""
        self._stirred.set()

    async def _follow_members(self) -> None:
        gone: deque[str] = deque()  # and not written down yet
        while True:
            await self._stirred.wait()
            await self._lead.until()
            self._stirred.clear()
            try:
                if self._unread:
                    await self._run(self._desk.refresh)
                    self._unread = False
                    self._changed()
                gone.extend(await self._run(self._desk.follow_members))
                if gone:
                    self._changed()
                while gone:
                    await self._note("removed", actor=self._id, subject=gone[0])
                    gone.popleft()
            except (ConfigurationError, Unavailable) as error:
                _log.error("enrollment.unfollowed", error=error.message)
                await asyncio.sleep(_AGAIN_S)
                self._stirred.set()

    async def _on_stopped(self) -> None:
        # What the desk has begun it ends: a grant is written, or it is not.
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _run(self, act: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)

    def _overflowed(self, message: Message) -> None:
        self.dropped += 1
        _log.warning("enrollment.overflow", topic=message.topic)

    async def _on_request(self, message: Message) -> None:
        if message.retain or not message.payload or not self._lead.leads:
            return  # newcomers ask again until the registry that leads has answered
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
        self._changed()
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

    async def _token_create(self, args: dict[str, Any], asker: Requester) -> Any:
        known = {"role", "ttl_ms", "uses", "names", "approve", "replace", *ATTESTED}
        _only(args, known)
        role = _role(args.get("role", "node"))
        asker.check_member(role, "make a token for")
        given = {name: args[name] for name in ATTESTED if name in args}
        attested = check_attested(role, given, error=InvalidTask)
        token = await self._run(
            lambda: self._desk.create_token(
                role=role,
                ttl_ms=_whole(args, "ttl_ms", 600_000),
                uses=_whole(args, "uses", 1),
                by=asker.name,
                names=_strings(args, "names"),
                attested=attested,
                approve=_flag(args, "approve"),
                replace=_flag(args, "replace"),
            )
        )
        made = self._desk.tokens()[token.id]
        await self._note(
            "token_created",
            actor=asker.name,
            subject=token.id,
            detail=made.model_dump(mode="json", exclude={"proof_key"}, exclude_none=True),
        )
        return {"id": token.id, "token": token.reveal(), "expires_at": made.expires_at}

    async def _tokens(self, args: dict[str, Any], _asker: Requester) -> Any:
        _only(args, set())
        await self._run(self._desk.refresh)
        rows = [
            {"id": name, **token.model_dump(mode="json", exclude={"proof_key"})}
            for name, token in sorted(self._desk.tokens().items())
        ]
        return {"tokens": rows[:_PAGE], "more": len(rows[_PAGE:])}

    async def _token_revoke(self, args: dict[str, Any], asker: Requester) -> Any:
        _only(args, {"token"})
        token = _text(args, "token")
        allow = partial(asker.check_member, what="revoke a token for")
        await self._run(lambda: self._desk.revoke_token(token, allow=allow))
        await self._note("token_revoked", actor=asker.name, subject=token)
        return {"id": token}

    async def _enrollments(self, args: dict[str, Any], _asker: Requester) -> Any:
        _only(args, set())
        await self._run(self._desk.refresh)
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

    async def _approve(self, args: dict[str, Any], asker: Requester) -> Any:
        _only(args, {"id"})
        identity = _text(args, "id")
        return await self._decide(identity, asker, granted=True)

    async def _deny(self, args: dict[str, Any], asker: Requester) -> Any:
        _only(args, {"id", "reason"})
        reason = _text(args, "reason") if "reason" in args else ""
        return await self._decide(_text(args, "id"), asker, granted=False, reason=reason)

    async def _decide(
        self, identity: str, asker: Requester, *, granted: bool, reason: str = ""
    ) -> dict[str, Any]:
        await self._run(self._desk.refresh)
        waiting = self._desk.waiting.get(identity)
        if waiting is not None:
            request: EnrollRequest = decode(EnrollRequest, waiting.request.encode())
            asker.check_member(_role(request.role), "decide on a newcomer of")
        answer = await self._run(
            lambda: self._desk.decide(identity, granted=granted, reason=reason)
        )
        await self._tell(answer, actor=asker.name)
        return {"id": identity, "status": answer.happened, "reason": answer.reason}

    async def _revoke(self, args: dict[str, Any], asker: Requester) -> Any:
        _only(args, {"id", "force"})
        identity, force = _text(args, "id"), _flag(args, "force")

        def allow(role: Role) -> None:
            asker.check_member(role, "throw out members of")
            check_departure(
                identity,
                role,
                asker=asker,
                registry_id=self._id,
                administrators=self._desk.administrators(),
                runs_here=self._runs_here,
                force=force,
            )

        await self._run(lambda: self._desk.revoke(identity, allow=allow))
        await self._run(lambda: self._forget(identity))
        self._changed()
        await self._note("revoked", actor=asker.name, subject=identity)
        return {"id": identity, "revoked_at": self._desk.revoked[identity]}

    async def _authority(self, args: dict[str, Any], _asker: Requester) -> Any:
        _only(args, set())
        return await self._run(self._desk.rotation.facts)

    async def _authority_rotate(self, args: dict[str, Any], asker: Requester) -> Any:
        _only(args, set())
        facts = await self._run(self._desk.rotation.rotate)
        root = facts["roots"][0]
        detail = {"fingerprint": root["fingerprint"]}
        await self._note(
            "authority_rotated", actor=asker.name, subject=f"root-{root['number']}", detail=detail
        )
        return facts

    async def _authority_retire(self, args: dict[str, Any], asker: Requester) -> Any:
        _only(args, {"force"})
        force = _flag(args, "force")
        facts = await self._run(lambda: self._desk.rotation.retire(force=force))
        detail = {"locked_out": facts["locked_out"][:_PAGE]}
        root = f"root-{facts['roots'][0]['number']}"
        await self._note("authority_retired", actor=asker.name, subject=root, detail=detail)
        self._changed()
        return facts

    async def _audit(self, args: dict[str, Any], _asker: Requester) -> Any:
        _only(args, {"limit", "before", "action", "actor", "since"})
        limit = min(_PAGE, _whole(args, "limit", 50))
        before = _whole(args, "before", 0) or None
        action = _text(args, "action") if "action" in args else None
        actor = _text(args, "actor") if "actor" in args else None
        since = _whole(args, "since", 0) or None
        entries = await self._run(
            lambda: self._trail.latest(
                limit, before=before, action=action, actor=actor, since=since
            )
        )
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
