"""Takes tasks from clients themselves while no router lives (ADR 37).

A client publishes on ``direct/{node}/{client}`` what it would have given to a router, naming a
function; the broker proves whose it is. The node decides: whether a router is there after all,
whether those that are gone let anybody past, whom it serves, what it was attested, how much of this
it has taken. What it takes runs like any invocation. A refusal is an error event whose detail says
``refused``: nothing was run, and another node may be asked.

No router keeps what such a task has shown, so the node does, in bounds, for ``…/resume``.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import structlog

from broker.fair_memory import FairMemory
from broker.presence import RouterPresence
from broker.replays import Replays
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
    TaskCancelled,
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
from node_agent.continuation import continues_of
from node_agent.direct_runs import DirectInvocation, DirectRun, DirectRuns, Key
from node_agent.executor import Executor
from node_agent.invocation import Asked, Named, Outcome, Standing
from node_agent.reporter import Reporter
from node_agent.settings import NodeSettings

Wanted = TypeVar("Wanted", CancelRequest, ResumeRequest)

_BACKLOG: Final = 256
_REFUSED_S: Final = 30.0
"""How long a refusal holds: a broker may deliver a task twice, and late."""

_MOST_REFUSALS: Final = 4_096

_OVERTAKEN_S: Final = 2.0
"""How long the task is waited for that a ``resume`` may have overtaken, seconds."""

_MOST_OVERTAKING: Final = 1_024

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
        self._replays = Replays(session=session)
        self._refusals: FairMemory[tuple[float, bytes]] = FairMemory(limit=_MOST_REFUSALS)
        self._overtaking: FairMemory[asyncio.TimerHandle] = FairMemory(limit=_MOST_OVERTAKING)
        self._barred: dict[str, str] = {}  # members that routers alone know how to treat, and why
        self._runner: Executor

    def attach(self, runner: Executor) -> None:
        """Name who runs what is taken; once, before `listen`."""
        self._runner = runner

    async def listen(self) -> None:
        """Subscribe; a broker that does not let this node do so is told of in the log.

        A node that is closed hears tasks only, to refuse them: silence would pass for its loss.

        Raises:
            BrokerUnavailable: The session has ended.
        """
        handlers: dict[TopicKind, Handler] = {
            TopicKind.DIRECT_CANCEL: self._on_cancel,
            TopicKind.DIRECT_RESUME: self._on_resume,
            TopicKind.DIRECT: self._on_task,
        }
        if self._settings.direct == "never":
            handlers = {TopicKind.DIRECT: self._on_task}
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
        self._replays.stop()
        for timer in self._overtaking.values():
            timer.cancel()

    # ---- what runs

    def post(self, topic: str, payload: bytes) -> None:
        """Publish an event of the node, and keep it where no router does.

        Raises:
            Overloaded: The session has no room.
        """
        self._session.post(topic, payload)
        self._runs.keep(topic, payload)

    def admitted(self, invocation: Named) -> None:
        """Tell the client that it will run, or still does."""
        run = self._runs.get((invocation.client, invocation.task))
        if run is not None:
            event = Working(task=invocation.task, at=self._clock(), attempt=invocation.attempt)
            self._say(run.topic, encode(event))

    def ended(self, invocation: Named, outcome: Outcome) -> None:
        """Tell the client what the run itself has not told it: that it was refused, or was lost.

        Nothing where the client did not ask for it here; it may have asked for the attempt of a
        router, while that ran.
        """
        key = (invocation.client, invocation.task)
        run = self._runs.get(key)
        if run is None or not self._runs.runs(run):
            return
        if run.invocation.attempt != invocation.attempt:
            return
        if outcome.status == "refused":
            self._runs.forget(key)
            self._refuse(*key, _error_of(outcome), attempt=invocation.attempt)
            return
        if outcome.status == "finished" and outcome.payload is not None:
            if run.last is None:  # it was said to somebody else
                self._end(run, outcome.payload)
        elif outcome.reason != "superseded":  # or there was no room for it
            event = ErrorEvent.from_error(
                _error_of(outcome),
                task=invocation.task,
                at=self._clock(),
                seq=run.next_seq,
                attempt=invocation.attempt,
            )
            self._end(run, encode(event))
        self._runs.end(run)

    def _end(self, run: DirectRun, payload: bytes) -> None:
        """Tell the end of a task; if it cannot be told now, it is when the client asks."""
        self._runs.keep(run.topic, payload)
        self._say(run.topic, payload)

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
            if known.last is not None:
                self._say(known.topic, known.last[1])
            elif self._runs.runs(known):
                self.admitted(known.invocation)
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
        self._begin(key, task, spec, now)

    def _begin(self, key: Key, task: Task, spec: FunctionSpec, now: int) -> None:
        """Run a task, unless it runs here or has ended here for a router that is gone now.

        The client repeats its id because it has not heard the end: it gets the one there was. An
        attempt that a router would mend by another one is followed by another one, where the
        function may run twice.
        """
        standing, once = self._runner.standing(key), continues_of(spec) == "none"
        status = standing.outcome.status if standing.outcome is not None else None
        running = standing.running
        if status == "finished":
            self._replay(key, 0)
            return
        if once and standing.attempt and running is None and status != "refused":
            self._tell_lost(key, standing.attempt, "may have run it, and it may run once only")
            return
        # An answer that goes to a router for its judgement would reach nobody.
        follow = running is not None and (once or not (running.hold or running.cascade))
        attempt = standing.attempt if follow else standing.attempt + 1
        invocation = self._invocation(key, task, spec, now, attempt)
        topic = self._topic(*key)
        self._runs.begin(key, invocation, topic)
        self.taken += 1
        _log.info("direct.taken", client=key[0], task=task.id, function=spec.name, attempt=attempt)
        if follow:
            self.admitted(invocation)
        else:
            self._runner.take(invocation, topic)

    def _recall(self, key: Key, standing: Standing) -> DirectRun | None:
        """Keep how a task ended here for a router; None where no end is known, or none kept."""
        outcome = standing.outcome
        if outcome is None or outcome.status != "finished" or outcome.payload is None:
            return None
        asked = Asked(client=key[0], task=key[1], attempt=standing.attempt, router=self.node)
        run = self._runs.begin(key, asked, self._topic(*key))
        self._runs.keep(run.topic, outcome.payload)
        self._runs.end(run)
        return run

    def _tell_lost(self, key: Key, attempt: int, why: str, *, seq: int = 0) -> None:
        lost = NodeLost(f"{self.node} {why}", node=self.node)
        event = ErrorEvent.from_error(lost, task=key[1], at=self._clock(), seq=seq, attempt=attempt)
        self._end_unrun(key, event)

    def _read(self, kind: type[Wanted], message: Message) -> tuple[Key, Wanted] | None:
        """Read what a client wants of a task of its own; None: nothing that counts."""
        client = self._client_of(message)
        try:
            wanted = decode(kind, message.payload)
        except ProtocolError:
            self.bad_frames += 1
            return None
        if client is None or message.retain:
            return None
        return (client, wanted.task), wanted

    async def _on_cancel(self, message: Message) -> None:
        wanted = self._read(CancelRequest, message)
        if wanted is None:
            return
        key, _ = wanted
        if key in self._runs:
            client, task = key
            order = Control(verb="cancel", task=task, client=client, reason="client")
            self._runner.cancel(order)
        elif self._refusal(key) is None:  # it may be on its way: topics overtake each other
            withdrawn = TaskCancelled("taken back before it began", reason="client")
            self._remember(key, self._refusal_of(key[1], withdrawn))

    async def _on_resume(self, message: Message) -> None:
        wanted = self._read(ResumeRequest, message)
        if wanted is None:
            return
        key, asked = wanted
        if key in self._runs:
            self._replay(key, asked.from_seq)
        elif key not in self._overtaking:
            timer = asyncio.get_running_loop().call_later(
                _OVERTAKEN_S, self._replay, key, asked.from_seq
            )
            dropped = self._overtaking.put(key, timer)
            if dropped is not None:
                dropped.cancel()

    def _replay(self, key: Key, from_seq: int) -> None:
        """Say again what a client has missed, or that nothing is known of its task."""
        self._overtaking.pop(key)
        standing = self._runner.standing(key)
        run = self._runs.get(key) or self._recall(key, standing)
        if run is None:
            if standing.running is None:
                why = "no longer knows this task, or how it ended: ask under another id"
                self._tell_lost(key, standing.attempt + 1, why, seq=from_seq)
            return
        self._replays.begin(key, run.topic, self._runs.missed(run, from_seq))

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
        if self._settings.direct == "never":
            raise PolicyDenied(f"{self.node} obeys routers only: wait for one", retryable=True)
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
                " does not know; wait for a router",
                retryable=True,
                router=barring,
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
        self, key: Key, task: Task, spec: FunctionSpec, now: int, attempt: int
    ) -> DirectInvocation:
        client, task_id = key
        return DirectInvocation(
            task=task_id,
            client=client,
            router=self.node,
            node=self.node,
            attempt=attempt,
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
        self._end_unrun((client, task), self._refusal_of(task, error, attempt=attempt))
        _log.info("direct.refused", client=client, task=task, reason=error.message)

    def _end_unrun(self, key: Key, event: ErrorEvent) -> None:
        """Tell a client that its task was not run, and hold to that for a while."""
        self._say(self._topic(*key), self._remember(key, event))

    def _remember(self, key: Key, event: ErrorEvent) -> bytes:
        payload = encode(event)
        self._refusals.put(key, (asyncio.get_running_loop().time() + _REFUSED_S, payload))
        return payload

    def _refusal_of(self, task: str, error: FoamError, *, attempt: int = 1) -> ErrorEvent:
        error.detail["refused"] = True
        return ErrorEvent.from_error(error, task=task, at=self._clock(), attempt=attempt)

    def _refusal(self, key: Key) -> bytes | None:
        until, payload = self._refusals.get(key) or (0.0, b"")
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
        if not isinstance(invocation, DirectInvocation):
            super().ended(invocation, outcome)
        self._direct.ended(invocation, outcome)


def _error_of(outcome: Outcome) -> FoamError:
    """Return what a client is told of a run that was refused, failed or was dropped."""
    code = ErrorCode(outcome.code) if outcome.code is not None else ErrorCode.NODE_LOST
    detail = {} if outcome.retry_after_ms is None else {"retry_after_ms": outcome.retry_after_ms}
    return error_from_wire(code.value, outcome.reason, code in _RETRYABLE, detail)
