"""The node agent: takes invocations, runs them, and says how it is."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from broker.events import EventSource
from broker.lifecycle import Service
from broker.security import SecurityAlarm
from broker.session.base import Message, Session, Will
from capability_schemas.errors import (
    AccessDenied,
    ConfigurationError,
    ErrorCode,
    ProtocolError,
)
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Control, Invocation
from capability_schemas.node import NodeLoad
from capability_schemas.passport import PassportBook
from capability_schemas.provenance import Signer
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode
from node_agent.admission.control import Admission
from node_agent.admission.forecast import Forecast
from node_agent.admission.local import NodeFunctions
from node_agent.admission.peers import PeerBook
from node_agent.admission.queue import AdmissionQueue
from node_agent.announcer import Announcer, offline_will
from node_agent.attestation.service import Offer
from node_agent.declaration.inspection import DeclaredFunctions
from node_agent.direct import DirectDesk, SplitReporter
from node_agent.executor import ExecutionCounters, Executor
from node_agent.gauge import LoadGauge
from node_agent.invocation import HANDED_BACK, Execution, Outcome
from node_agent.orders import OrderGate
from node_agent.pool.keepwarm import WarmthSettings
from node_agent.pool.memory import available_memory_bytes
from node_agent.pool.pool import InstancePool
from node_agent.runtimes.base import Runtime, RuntimeContext
from node_agent.runtimes.catalogue import make_runtimes
from node_agent.settings import NodeSettings
from node_agent.showing import ModelFiles, Showcase
from node_agent.sleeper import Sleeper

_STOP_MARGIN_S: Final = 5.0
_CONTROL_BACKLOG: Final = 1000

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class NodeAgent(Service):
    """One node of the mesh. All state is owned by the event loop it is started on.

    The session is entered first, for leaving the agent says goodbye over it; its last will is
    ``last_will``, or `offline_will` with the same ``epoch`` where the session connects before the
    agent is made. SIGTERM is the business of whoever runs the process: leave the agent, which
    drains, or call `drain` before.

    Args:
        session: The node's session, identity ``settings.node``.
        topics: The site's topics.
        settings: How it behaves.
        functions: What it offers, names unique.
        key: Signs the claims; that of ``signer`` when None.
        signer: Key and passport: signs the results, and the passport is shown with its state.
        book: Passports of routers, for checking what the node is told; None where its identity
            knows no registry: then whom the broker lets publish is obeyed.
        runtimes: Further runtimes by name, or replacements of the built-in ones.
        context: What runtimes may use beyond the node itself: models, the mesh, servers of tools.
        model_digest: Returns the digest of a model file where it is known without reading the
            file, else None.
        epoch: The node's epoch, UTC milliseconds, when a last will with it was made before; the
            time now when None.
        place: Where it runs, in words, for whoever has to find it.
        clock: UTC milliseconds.
        available: Returns the memory there is for more, bytes.

    Raises:
        ConfigurationError: A function names an unknown runtime or does not fit it.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        settings: NodeSettings,
        functions: Sequence[FunctionSpec],
        key: SigningKey | None = None,
        signer: Signer | None = None,
        book: PassportBook | None = None,
        runtimes: Mapping[str, Runtime] | None = None,
        context: RuntimeContext | None = None,
        model_digest: Callable[[Path], str | None] = lambda _: None,
        epoch: int | None = None,
        place: str | None = None,
        clock: Callable[[], int] = now_ms,
        available: Callable[[], int | None] = available_memory_bytes,
    ) -> None:
        super().__init__(service_id=settings.node)
        self.stop_timeout_s = settings.drain_timeout_s + settings.cancel_grace_s + _STOP_MARGIN_S
        self.epoch = clock() if epoch is None else epoch
        self.bad_frames = 0
        self._session = session
        self._topics = topics
        self._settings = settings
        self._clock = clock
        self._functions = self._by_name(functions)
        given = context or RuntimeContext()
        self._servers = dict(given.mcp_servers)
        self._runtimes = dict(runtimes or {})
        self._queue = AdmissionQueue(limit=settings.queue_limit)
        models = ModelFiles(runtimes=self._runtimes, path=given.model_path)
        self._pool = InstancePool(
            runtimes=self._runtimes,
            backoff_s=settings.backoff_s,
            backoff_limit_s=settings.backoff_limit_s,
            warmth=WarmthSettings(
                worth=settings.keep_warm_worth,
                least_s=settings.keep_warm_least_s,
                costly_least_s=settings.keep_warm_costly_s,
                most_s=settings.keep_warm_most_s,
            ),
            memory_reserve_bytes=settings.memory_reserve_bytes,
            model_file=models.file,
            available=available,
        )
        admission = Admission(queue=self._queue, pool=self._pool, clock=clock)
        self._context = dataclasses.replace(
            given,
            node=settings.node,
            start_timeout_s=settings.start_timeout_s,
            cancel_grace_s=settings.cancel_grace_s,
            mcp_servers=self._servers,
            local=NodeFunctions(
                admission=admission,
                queue=self._queue,
                pool=self._pool,
                runtimes=self._runtimes,
                clock=clock,
            ),
        )
        self._given = dict(self._runtimes)
        DeclaredFunctions(functions, self._context, self._given).check()
        self._runtimes |= self._missing_runtimes(functions)
        self._peers = PeerBook(settings.peers)
        self._direct = DirectDesk(
            session=session,
            topics=topics,
            settings=settings,
            functions=lambda: self._functions,
            signer=signer,
            book=book,
            clock=clock,
        )
        self._reporter = SplitReporter(session=session, topics=topics, direct=self._direct)
        self._executor = Executor(
            settings=settings,
            functions=self._functions,
            runtimes=self._runtimes,
            post=self._direct.post,
            crowded=lambda: session.outbox_size >= settings.unconfirmed_limit,
            reporter=self._reporter,
            admission=admission,
            pool=self._pool,
            peers=self._peers,
            on_ended=self._on_ended,
            on_change=self._on_change,
            signer=signer,
            clock=clock,
        )
        self._direct.attach(self._executor)
        self._alarm = SecurityAlarm(
            events=EventSource(
                session=session, topics=topics, source=settings.node, component="node", clock=clock
            ),
            own=settings.node,
            clock=clock,
        )
        self._gate = OrderGate(
            session=session,
            topics=topics,
            node=settings.node,
            epoch=self.epoch,
            book=book,
            alarm=self._alarm,
            clock=clock,
        )
        self._gauge = LoadGauge(
            node=settings.node,
            epoch=self.epoch,
            functions=self._functions,
            queue=self._queue,
            queue_limit=settings.queue_limit,
            admission=admission,
            pool=self._pool,
            clock=clock,
            available=available,
        )
        self._announcer = Announcer(
            session=session,
            topics=topics,
            settings=settings,
            functions=self._functions,
            key=key or (signer.key if signer is not None else None),
            signer=signer,
            epoch=self.epoch,
            place=place,
            load=self._gauge.load,
            model_file=models.describe,
            model_digest=model_digest,
            clock=clock,
        )
        self._place = place
        self._sleeper = (
            None
            if settings.sleep is None
            else Sleeper(
                session=session,
                settings=settings,
                cycle=settings.sleep,
                executor=self._executor,
                announcer=self._announcer,
                clock=clock,
            )
        )
        self._showcase = Showcase(
            runtimes=self._runtimes,
            functions=lambda: self._functions,
            pool=self._pool,
            queue=self._queue,
            gauge=self._gauge,
            announcer=self._announcer,
            spawn=self.spawn,
        )
        self._cut_off: asyncio.TimerHandle | None = None
        self._unlisten: Callable[[], None] | None = None

    @property
    def counters(self) -> ExecutionCounters:
        """What happened since the agent started."""
        return self._executor.counters

    @property
    def refused(self) -> Mapping[str, int]:
        """How many orders did not come from whom they say, by kind."""
        return self._alarm.refused

    @property
    def forecast(self) -> Forecast:
        """What it knows about run times, and how far its predictions were off."""
        return self._executor.forecast

    def offer(self) -> Offer:
        """Return what it offers at the moment, for its evidence."""
        return Offer(tuple(self._functions.values()), self._announcer.model_digests)

    def last_will(self) -> Will:
        """Return the last will for the session's next connection."""
        return offline_will(
            topics=self._topics,
            node=self._settings.node,
            epoch=self.epoch,
            at=self._clock(),
            since=self._announcer.since,
            place=self._place,
        )

    def load(self) -> NodeLoad:
        """Return the live figures of the node."""
        return self._gauge.load()

    async def replace(
        self,
        functions: Sequence[FunctionSpec],
        *,
        mcp_servers: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Offer other functions from now on; what was taken before ends as it began.

        What is new or changed gets a new claim, what is gone is withdrawn. One call at a time.
        Cancellation is safe: all or nothing of it happens.

        Args:
            functions: All that the node offers, names unique.
            mcp_servers: All its servers of tools by name; those it has when None.

        Raises:
            ConfigurationError: A function cannot run here; then everything stays as it is.
        """
        wanted = self._by_name(functions)
        context = self._context
        if mcp_servers is not None:
            context = dataclasses.replace(context, mcp_servers=mcp_servers)
        declared = DeclaredFunctions(functions, context, self._given)
        await asyncio.to_thread(declared.check)
        self._runtimes |= self._missing_runtimes(functions)
        if mcp_servers is not None:  # in place, for runtimes hold on to the mapping
            self._servers.clear()
            self._servers.update(mcp_servers)
        before, self._functions = self._functions, wanted
        self._executor.replace(wanted)
        self._gauge.replace(wanted)
        self._announcer.replace(wanted)
        edited = [spec for spec in functions if before.get(spec.name) != spec]
        self._showcase.warm(edited)
        _log.info(
            "node.functions_replaced",
            node=self._settings.node,
            added=sorted(wanted.keys() - before.keys()),
            changed=sorted(spec.name for spec in edited if spec.name in before),
            removed=sorted(before.keys() - wanted.keys()),
        )

    def remark(self, text: str) -> None:
        """Say something along with the state of the node, until the next remark.

        Args:
            text: For the operator (``foam nodes --json``); empty takes the last one back.
        """
        if self._executor.accepting:
            self._announcer.set_state("birth", text)

    def show_passport(self) -> None:
        """Say again who the node is: its passport has been renewed."""
        self._announcer.show_state()

    def give_up(self) -> None:
        """Drop everything without a word: another process has taken over the identity."""
        self._executor.accepting = False
        self._announcer.mute()
        dropped = self._executor.stop_all("cut off")
        _log.error("node.given_up", node=self._settings.node, dropped=dropped)

    async def drain(self, *, timeout_s: float | None = None, reason: str = "") -> bool:
        """Refuse what is new and wait for what is running.

        Args:
            timeout_s: Longest wait, seconds; the setting when None. What is left then goes on, and
                goes back to the router when the agent is left.
            reason: Why, for the state.

        Returns:
            Whether everything had ended in time. Cancellation is safe; the node stays draining.
        """
        self._cordon(reason)
        limit_s = self._settings.drain_timeout_s if timeout_s is None else timeout_s
        return await self._executor.wait_idle(limit_s)

    def undrain(self) -> None:
        """Take work again; not when the node is being left."""
        if self.running and not self._executor.accepting:
            self._executor.accepting = True
            self._announcer.set_state("birth")

    async def wait_warm(self, timeout_s: float) -> bool:
        """Wait until the first instances of all ``warm`` functions have started, or failed to.

        Tasks are taken meanwhile; they wait for the instance. Cancellation is safe.

        Args:
            timeout_s: Longest wait, seconds.

        Returns:
            Whether nothing was left to wait for.
        """
        return await self._showcase.wait(timeout_s)

    async def _on_start(self) -> None:
        node = self._settings.node
        await self._pool.start()
        await self._executor.start()
        await self._gate.listen()
        await self._session.subscribe(
            self._topics.build(TopicKind.INVOKE, node=node),
            self._on_invoke,
            queue_limit=self._settings.queue_limit + _CONTROL_BACKLOG,
        )
        await self._session.subscribe(
            self._topics.build(TopicKind.CONTROL, node=node),
            self._on_control,
            queue_limit=_CONTROL_BACKLOG,
        )
        await self._direct.listen()
        for peer in self._peers.peers:
            try:
                await self._session.subscribe(
                    self._topics.build(TopicKind.NODE_LOAD, node=peer), self._on_peer
                )
            except AccessDenied as error:  # a node of a tenant hears no others
                _log.warning("peer.unheard", peer=peer, error=error.message)
        self._unlisten = self._session.on_connection(self._on_connection)
        await self._announcer.start()
        if self._sleeper is not None:
            await self._sleeper.start()
        self._showcase.warm(self._functions.values())
        _log.info("node.started", node=node, functions=sorted(self._functions), epoch=self.epoch)

    async def _on_stop(self) -> None:
        if self._sleeper is not None:
            await self._sleeper.stop()
        if not await self.drain(reason="stopping"):
            left = self._executor.stop_all(HANDED_BACK)
            _log.warning("node.handed_back", node=self._settings.node, invocations=left)
            await self._executor.wait_idle(self._settings.cancel_grace_s + 1)

    async def _on_stopped(self) -> None:
        if self._cut_off is not None:
            self._cut_off.cancel()
        if self._unlisten is not None:
            self._unlisten()
        self._gate.stop()
        self._direct.stop()
        if self._announcer.running:
            await self._announcer.farewell("stopped")
        await self._announcer.stop()
        await self._executor.stop()
        await self._pool.stop()
        _log.info("node.stopped", node=self._settings.node)

    async def _on_invoke(self, message: Message) -> None:
        try:
            invocation = decode(
                Invocation, message.payload, limit_bytes=self._settings.invocation_limit_bytes
            )
            reply = self._gate.reply_topic(invocation)
        except ProtocolError as exc:
            self.bad_frames += 1
            _log.warning("invocation.bad_frame", error=exc.message, bytes=len(message.payload))
            return
        self._gate.check(
            message.payload,
            invocation,
            obey=lambda repeated: self._executor.take(invocation, reply, repeated=repeated),
            refuse=lambda error: self._reporter.ended(
                invocation,
                Outcome(status="refused", code=ErrorCode.UNAUTHORIZED, reason=error.message),
            ),
        )

    async def _on_control(self, message: Message) -> None:
        try:
            control = decode(Control, message.payload)
        except ProtocolError as exc:
            self.bad_frames += 1
            _log.warning("control.bad_frame", error=exc.message, bytes=len(message.payload))
            return
        self._gate.check(
            message.payload,
            control,
            obey=lambda repeated: None if repeated else self._obey(control),
            refuse=lambda _: None,
        )

    def _obey(self, control: Control) -> None:
        if control.verb == "drain":
            self._cordon(control.reason)
        elif control.verb == "undrain":
            self.undrain()
        elif control.verb == "return":
            self._executor.give_back(control)
        elif control.verb == "account":
            self._executor.account_for(control)
        elif control.task is not None:
            self._executor.cancel(control)

    async def _on_peer(self, message: Message) -> None:
        try:
            self._peers.heard(decode(NodeLoad, message.payload), now=self._clock())
        except ProtocolError as exc:
            self.bad_frames += 1
            _log.warning("peer.bad_frame", error=exc.message, topic=message.topic)

    def _cordon(self, reason: str) -> None:
        if self._executor.accepting:
            self._executor.accepting = False
            self._announcer.set_state("draining", reason)
            _log.info("node.draining", node=self._settings.node, reason=reason)

    def _by_name(self, functions: Sequence[FunctionSpec]) -> dict[str, FunctionSpec]:
        named = {spec.name: spec for spec in functions}
        if len(named) != len(functions):
            raise ConfigurationError(f"node {self._settings.node}: two functions share a name")
        return named

    def _missing_runtimes(self, functions: Iterable[FunctionSpec]) -> dict[str, Runtime]:
        """Make the runtimes that functions name and the node has not."""
        wanted = {spec.runtime for spec in functions} - self._runtimes.keys()
        return make_runtimes(sorted(wanted), self._context)

    def _on_ended(self, execution: Execution, outcome: Outcome) -> None:
        spec = execution.spec
        edited = self._functions.get(spec.name) != spec
        if outcome.answered and not edited:
            self._gauge.add_run(
                spec.name, first_ms=execution.warm_first_ms, total_ms=execution.run_ms
            )
            self._showcase.advertise(spec)

    def _on_change(self) -> None:
        if self._sleeper is not None:
            self._sleeper.stir()
        if self._gauge.saturation_changed():
            self._announcer.hurry()

    def _on_connection(self, up: bool) -> None:
        """Drop what runs when the node has been cut off for longer than its leases last."""
        if self._cut_off is not None:
            self._cut_off.cancel()
            self._cut_off = None
        if self._sleeper is not None:
            self._sleeper.stir()
            if self._sleeper.asleep:
                return
        if not up:
            self._cut_off = asyncio.get_running_loop().call_later(
                self._settings.cut_off_s, self._drop_leases
            )

    def _drop_leases(self) -> None:
        dropped = self._executor.stop_all("cut off")
        _log.warning("node.cut_off", node=self._settings.node, dropped=dropped)
