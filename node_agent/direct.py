"""Takes tasks from clients themselves while no router lives (ADR 37).

A client publishes on ``direct/{node}/{client}`` what it would have given to a router, naming a
function; the broker proves whose it is. The node decides: whether a router is there after all,
whether those that are gone let anybody past, whom it serves, what it was attested, how much of this
it has taken. What it takes runs like any invocation. A refusal is an error event whose detail says
``refused``: nothing was run, and another node may be asked.

No router keeps what such a task has shown, so the node does, in bounds, for ``…/resume``.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog

from broker.presence import RouterPresence
from broker.session.base import Handler, Message, Session
from capability_schemas.errors import (
    AccessDenied,
    ErrorCode,
    FoamError,
    InvalidTask,
    NodeLost,
    NotFound,
    Overloaded,
    PolicyDenied,
    ProtocolError,
    error_from_wire,
)
from capability_schemas.functions import FunctionSpec
from capability_schemas.invocation import Control, Invocation
from capability_schemas.passport import PassportBook
from capability_schemas.provenance import Signer
from capability_schemas.reply import ErrorEvent, Working
from capability_schemas.task import (
    CancelRequest,
    FunctionRef,
    ResumeRequest,
    Task,
    TaskPolicy,
    decode_task,
    peek_task_id,
    skim_task_id,
)
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import read_trust
from capability_schemas.wire import decode, encode
from node_agent.direct_runs import DirectInvocation, DirectRuns, Key
from node_agent.invocation import Named, Outcome
from node_agent.reporter import Reporter
from node_agent.settings import NodeSettings

_BACKLOG: Final = 256
_KNOWN_LIMIT: Final = 1_024
_REFUSED_S: Final = 30.0
"""How long a refusal holds: a broker may deliver a task twice, and late."""

_OVERTAKEN_S: Final = 2.0
"""How long the task is waited for that a ``resume`` may have overtaken, seconds."""

_MOST_OVERTAKING: Final = 256

_MOST_MEMBERS: Final = 200_000
_RETRYABLE: Final = frozenset({ErrorCode.OVERLOADED, ErrorCode.NODE_LOST})

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class DirectDesk:
    """Takes, refuses, cancels and repeats direct tasks. Owned by the agent's event loop.

    Args:
        session: The node's session.
        topics: The site's topics.
        settings: How the node behaves.
        functions: Returns what it offers, by name.
        signer: Its passport, which says what the registry attests it; None where it has none.
        book: Knows the registries, by whose word a client is of a tenant or thrown out; None where
            none is known.
        clock: UTC milliseconds.

    Attributes:
        node: The node.
        bad_frames: Messages that were no task, and named none.
        taken: Tasks that were taken.
        refused: Tasks that were refused before anything else was done with them.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        settings: NodeSettings,
        functions: Callable[[], Mapping[str, FunctionSpec]],
        signer: Signer | None,
        book: PassportBook | None,
        clock: Callable[[], int],
    ) -> None:
        self.bad_frames = self.taken = self.refused = 0
        self._session = session
        self._topics = topics
        self._settings = settings
        self.node = settings.node
        self._functions = functions
        self._signer = signer
        self._book = book
        self._clock = clock
        self._presence = RouterPresence(session=session, topics=topics)
        self._runs = DirectRuns(clock=clock)
        self._tries: OrderedDict[Key, int] = OrderedDict()
        self._refusals: OrderedDict[Key, tuple[float, bytes]] = OrderedDict()
        self._overtaking: dict[Key, asyncio.TimerHandle] = {}
        self._barred: dict[str, str] = {}  # members that routers alone know how to treat, and why
        self._take: Callable[[DirectInvocation, str], None] = _nowhere
        self._stop: Callable[[Control], None] = _nowhere

    def attach(
        self,
        *,
        take: Callable[[DirectInvocation, str], None],
        stop: Callable[[Control], None],
    ) -> None:
        """Name who runs what is taken.

        Args:
            take: Takes an invocation and the topic of its events; answers for one known already.
            stop: Obeys an order to cancel.
        """
        self._take, self._stop = take, stop

    async def listen(self) -> None:
        """Subscribe; a broker that does not let this node do so is told of in the log.

        Raises:
            BrokerUnavailable: The session has ended.
        """
        if self._settings.direct == "never":
            return
        handlers: dict[TopicKind, Handler] = {
            TopicKind.DIRECT_CANCEL: self._on_cancel,
            TopicKind.DIRECT_RESUME: self._on_resume,
            TopicKind.DIRECT: self._on_task,
        }
        try:
            if self._book is not None:
                await self._session.subscribe(
                    self._topics.filter(TopicKind.TRUST), self._on_trust, queue_limit=4_096
                )
            for kind, handler in handlers.items():
                await self._session.subscribe(
                    self._topics.filter(kind, node=self.node), handler, queue_limit=_BACKLOG
                )
            # Without it no router passes for gone, and nothing is taken.
            await self._presence.listen()
        except AccessDenied as exc:
            _log.warning("direct.unheard", node=self.node, reason=exc.message)

    def stop(self) -> None:
        """Listen to routers no more."""
        self._presence.stop()
        for timer in self._overtaking.values():
            timer.cancel()
        self._overtaking.clear()

    # ---- what runs

    def post(self, topic: str, payload: bytes) -> None:
        """Publish an event of the node, and keep it where no router does.

        Raises:
            Overloaded: The session has no room.
        """
        self._session.post(topic, payload)
        self._runs.keep(topic, payload)

    def admitted(self, invocation: DirectInvocation) -> None:
        """Tell the client that it will run, or still does."""
        run = self._runs.get((invocation.client, invocation.task))
        if run is not None:
            event = Working(task=invocation.task, at=self._clock(), attempt=invocation.attempt)
            self._say(run.topic, encode(event))

    def ended(self, invocation: DirectInvocation, outcome: Outcome) -> None:
        """Tell the client what the run itself has not told it: that it was refused, or was lost."""
        key = (invocation.client, invocation.task)
        run = self._runs.get(key)
        if run is None:
            return
        if outcome.status == "refused":
            self._runs.forget(key)
            self._tries[key] = invocation.attempt
            while len(self._tries) > _KNOWN_LIMIT:
                self._tries.popitem(last=False)
            error = _error_of(outcome)
            self._refuse(*key, error, attempt=invocation.attempt)
            return
        if outcome.status != "finished" and outcome.reason != "superseded":
            event = ErrorEvent.from_error(
                _error_of(outcome),
                task=invocation.task,
                at=self._clock(),
                seq=run.next_seq,
                attempt=invocation.attempt,
            )
            self.post(run.topic, encode(event))
        self._runs.end(run)

    def repeat(self, invocation: DirectInvocation) -> None:
        """Tell again how a task ended."""
        run = self._runs.get((invocation.client, invocation.task))
        if run is not None and run.last is not None:
            self._say(run.topic, run.last[1])

    # ---- what arrives

    async def _on_task(self, message: Message) -> None:
        client = self._client_of(message)
        if client is None or message.retain:  # a kept copy, which nobody waits for
            return
        try:
            task = decode_task(message.payload)
            if task.id is None:
                raise InvalidTask("a task for a node itself needs an id", field="id")
        except FoamError as exc:
            named = peek_task_id(message.payload) or skim_task_id(message.payload)
            if named is None:
                self.bad_frames += 1
                _log.warning("direct.bad_frame", client=client, error=exc.message)
            else:
                self._refuse(client, named, exc)
            return
        key, now = (client, task.id), self._clock()
        known = self._runs.get(key)
        if known is not None:
            self._take(known.invocation, known.topic)
            return
        refusal = self._refusal(key)
        if refusal is not None:
            self._say(self._topic(*key), refusal)
            return
        try:
            spec = self._admissible(client, task)
        except FoamError as exc:
            self._refuse(client, task.id, exc)
            return
        invocation = self._invocation(client, task, spec, now)
        topic = f"{invocation.reply}/{self.node}"
        self._runs.begin(key, invocation, topic)
        self.taken += 1
        _log.info("direct.taken", client=client, task=task.id, function=spec.name)
        self._take(invocation, topic)

    async def _on_cancel(self, message: Message) -> None:
        client = self._client_of(message)
        try:
            wanted = decode(CancelRequest, message.payload)
        except ProtocolError:
            self.bad_frames += 1
            return
        run = self._runs.get((client or "", wanted.task))
        if client is not None and run is not None:
            self._stop(Control(verb="cancel", task=wanted.task, client=client, reason="client"))

    async def _on_resume(self, message: Message) -> None:
        client = self._client_of(message)
        try:
            wanted = decode(ResumeRequest, message.payload)
        except ProtocolError:
            self.bad_frames += 1
            return
        if client is None or message.retain:
            return
        key = client, wanted.task
        if key in self._runs:
            self._replay(key, wanted.from_seq)
        elif key not in self._overtaking and len(self._overtaking) < _MOST_OVERTAKING:
            self._overtaking[key] = asyncio.get_running_loop().call_later(
                _OVERTAKEN_S, self._replay, key, wanted.from_seq
            )

    def _replay(self, key: Key, from_seq: int) -> None:
        """Say again what a client has missed, or that nothing is known of its task."""
        self._overtaking.pop(key, None)
        run = self._runs.get(key)
        if run is None:
            lost = NodeLost(f"{self.node} knows nothing of this task: it was started again since")
            event = ErrorEvent.from_error(lost, task=key[1], at=self._clock(), seq=from_seq)
            self._end_unrun(key, event)
            return
        for payload in self._runs.missed(run, from_seq):
            self._say(run.topic, payload)
        if run.last is None:
            self.admitted(run.invocation)

    async def _on_trust(self, message: Message) -> None:
        try:
            member = self._topics.parse(message.topic).levels["member"]
            if self._book is None:
                return
            if not message.payload:
                self._barred.pop(member, None)
                return
            state = read_trust(message.payload, member=member, registries=self._book.registries)
        except FoamError:  # the order gate says so
            return
        why = None
        if state.state == "revoked":
            why = "was revoked"
        elif state.tenant is not None:
            why = f"is of tenant {state.tenant}, whom routers alone keep apart"
        if why is None:
            self._barred.pop(member, None)
        elif member in self._barred or len(self._barred) < _MOST_MEMBERS:
            self._barred[member] = why

    # ---- what is taken

    def _admissible(self, client: str, task: Task) -> FunctionSpec:
        """Return the function that a task is for.

        Raises:
            FoamError: It is not taken, in words.
        """
        self._check_alone()
        why = self._barred.get(client)
        if why is not None:
            raise AccessDenied(f"{client} {why}")
        if task.reply_to is not None:
            raise InvalidTask(
                f"a node itself answers on reply/{client}/{task.id} only", field="reply_to"
            )
        if task.function is None:
            raise InvalidTask(
                "a node itself is asked for a function by name: matching words is up to the client",
                field="function",
            )
        wanted = FunctionRef.parse(task.function)
        spec = self._functions().get(wanted.name)
        if spec is None or not wanted.admits(spec.version):
            offers = "no such function" if spec is None else f"version {spec.version}"
            raise NotFound(f"{self.node} has {offers}, not {task.function}")
        self._check_policy(task.policy, spec)
        self._check_room(client)
        return spec

    def _check_alone(self) -> None:
        """Make sure that nobody goes past a router.

        Raises:
            PolicyDenied: A router lives, or none lets anybody past it.
            Overloaded: It is not known yet.
        """
        router = self._presence.present()
        if router is not None:
            raise PolicyDenied(
                f"{router} lives: give it the task (on task/…)", retryable=True, router=router
            )
        if not self._presence.absent:
            raise Overloaded(f"{self.node} has just come back, and listens for routers first")
        barring = self._presence.forbids
        if barring is not None:
            raise PolicyDenied(
                f"{barring} is gone, and let nobody past it: rules or quotas hold that {self.node}"
                " does not know; wait for a router"
            )

    def _check_policy(self, asked: TaskPolicy, spec: FunctionSpec) -> None:
        passport = self._signer.passport if self._signer is not None else None
        attested = passport.attested if passport is not None else None
        if attested is not None and not attested.serves(None):
            raise PolicyDenied(f"{self.node} serves tenant {attested.tenant}")
        if asked.local_only and spec.policy.external:
            raise PolicyDenied(f"{spec.name} hands the task to a service outside the site")
        if asked.max_cost is not None and spec.cost.money > asked.max_cost:
            raise PolicyDenied(f"{spec.name} costs {spec.cost.money:g}, more than allowed")
        if asked.zones is None and asked.data is None and not asked.grants:
            return
        if attested is None:
            raise PolicyDenied(f"no registry attests {self.node} anything")
        if asked.zones is not None and set(asked.zones).isdisjoint(attested.zones):
            raise PolicyDenied(f"{self.node} stands in none of the zones asked for")
        if asked.data is not None and asked.data not in attested.data:
            raise PolicyDenied(f"{self.node} is not cleared for {asked.data} data")
        missing = sorted(set(asked.grants).difference(attested.grants))
        if missing:
            raise PolicyDenied(f"{self.node} lacks {', '.join(missing[:8])}")

    def _check_room(self, client: str) -> None:
        running = [run.invocation.client for run in self._runs.running()]
        for have, most, whose in (
            (running.count(client), self._settings.direct_per_client, f" of {client}"),
            (len(running), self._settings.direct_limit, ""),
        ):
            if have >= most:
                raise Overloaded(
                    f"{self.node} has {have} direct tasks{whose} already, the most it takes"
                )

    def _invocation(
        self, client: str, task: Task, spec: FunctionSpec, now: int
    ) -> DirectInvocation:
        task_id = str(task.id)
        return DirectInvocation(
            task=task_id,
            client=client,
            router=self.node,
            node=self.node,
            attempt=self._tries.get((client, task_id), 0) + 1,
            function=spec.name,
            version=spec.version,
            text=task.text,
            input=task.input,
            deadline=now + task.timeout_ms,
            reply=self._topic(client, task_id).rpartition("/")[0],
            stream=task.stream,
            priority=task.priority,
            session=task.session,
            policy=task.policy if task.policy != TaskPolicy() else None,
            proof=task.proof,
            trace=task.trace,
            sent_at=now,
        )

    # ---- words

    def _client_of(self, message: Message) -> str | None:
        try:
            return self._topics.parse(message.topic).levels["client"]
        except ProtocolError:
            self.bad_frames += 1
            return None

    def _topic(self, client: str, task: str) -> str:
        return self._topics.build(TopicKind.REPLY, client=client, task=task, source=self.node)

    def _refuse(self, client: str, task: str, error: FoamError, *, attempt: int = 1) -> None:
        self.refused += 1
        error.detail["refused"] = True
        event = ErrorEvent.from_error(error, task=task, at=self._clock(), attempt=attempt)
        self._end_unrun((client, task), event)
        _log.info("direct.refused", client=client, task=task, reason=error.message)

    def _end_unrun(self, key: Key, event: ErrorEvent) -> None:
        """Tell a client that its task was not run, and hold to that for a while."""
        payload = encode(event)
        self._refusals[key] = asyncio.get_running_loop().time() + _REFUSED_S, payload
        self._refusals.move_to_end(key)
        if len(self._refusals) > _KNOWN_LIMIT:
            self._refusals.popitem(last=False)
        self._say(self._topic(*key), payload)

    def _refusal(self, key: Key) -> bytes | None:
        until, payload = self._refusals.get(key, (0.0, b""))
        return payload if until > asyncio.get_running_loop().time() else None

    def _say(self, topic: str, payload: bytes) -> None:
        try:
            self._session.post(topic, payload)
        except FoamError as exc:  # the client asks again
            _log.warning("direct.unsent", topic=topic, error=exc.message)


class SplitReporter(Reporter):
    """Reports to the router that invoked, or to the client where none did.

    Args:
        session: The node's session.
        topics: The site's topics.
        direct: Tells clients.
    """

    def __init__(self, *, session: Session, topics: Topics, direct: DirectDesk) -> None:
        super().__init__(session=session, topics=topics, node=direct.node)
        self._direct = direct

    def admitted(self, invocation: Invocation, *, wait_ms: float) -> None:
        """Tell that it will run."""
        if isinstance(invocation, DirectInvocation):
            self._direct.admitted(invocation)
        else:
            super().admitted(invocation, wait_ms=wait_ms)

    def ended(self, invocation: Named, outcome: Outcome) -> None:
        """Tell how it ended."""
        if isinstance(invocation, DirectInvocation):
            self._direct.ended(invocation, outcome)
        else:
            super().ended(invocation, outcome)

    def repeat(self, invocation: Named, outcome: Outcome) -> None:
        """Say again how an attempt ended."""
        if isinstance(invocation, DirectInvocation):
            self._direct.repeat(invocation)
        else:
            super().repeat(invocation, outcome)


def _error_of(outcome: Outcome) -> FoamError:
    """Return what a client is told of a run that was refused, failed or was dropped."""
    code = ErrorCode(outcome.code) if outcome.code is not None else ErrorCode.NODE_LOST
    detail = {} if outcome.retry_after_ms is None else {"retry_after_ms": outcome.retry_after_ms}
    return error_from_wire(code.value, outcome.reason, code in _RETRYABLE, detail)


def _nowhere(*_: Any) -> None:
    """Stand in until `DirectDesk.attach`."""
