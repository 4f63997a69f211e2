"""The router on the mesh: subscriptions in, one owner for everything behind them."""

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

import structlog

from broker.access.policy import Role
from broker.audit import AuditVoice
from broker.events import EventSource
from broker.lifecycle import Service
from broker.security import SecurityAlarm
from broker.session.base import Handler, Message, Session, Will
from capability_schemas.errors import FoamError, Overloaded, ProtocolError, TooLarge
from capability_schemas.ids import now_ms
from capability_schemas.invocation import UNSURE_LIMIT_BYTES, Report
from capability_schemas.node import Presence, RouterState
from capability_schemas.passport import Passport, PassportBook
from capability_schemas.provenance import Signer
from capability_schemas.task import CancelRequest, ResumeRequest
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import DEFAULT_LIMIT_BYTES, encode
from registry.search import CapabilitySearch
from router.admin import AdminDesk
from router.administration import AdminLine
from router.breaker import Breakers
from router.catalogue import Fleet
from router.dispatch import Dispatcher, note_refusal
from router.intake import Arrival, Intake, Refusal
from router.ledger import Ledger
from router.meaning import EncoderFactory, Meaning, QueryEncoder
from router.news import FRAME_LIMIT_BYTES, FleetNews, Frames
from router.observation import ReplyReader
from router.orders import OrderDesk
from router.people import People
from router.quota import QuotaFile, Quotas
from router.replies import Outcome, ReplyDesk
from router.reputation import Reputation
from router.routing import TaskRouting
from router.rules import RuleFile
from router.settings import RouterSettings
from router.statistics import RouterStats
from router.steering import SteeringDesk
from router.upkeep import Upkeep

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_REPORT_LIMIT_BYTES: Final = UNSURE_LIMIT_BYTES + FRAME_LIMIT_BYTES
_OVERFLOW_RETRY_MS: Final = 1_000
_LOOK_UPS: Final = 32
"""Refused tasks at a time that may be repetitions: of more nobody looks in the journal."""


def router_will(topics: Topics, router_id: str, *, epoch: int, at: int) -> Will:
    """Return the last will of a router: ``offline``, with its epoch.

    Args:
        topics: Topic grammar of the site.
        router_id: The router.
        epoch: The same as given to ``RouterService``, UTC milliseconds.
        at: Now, UTC milliseconds.
    """
    return Will(
        topic=topics.build(TopicKind.ROUTER_STATE, router=router_id),
        payload=_state(router_id, "offline", epoch, at, "connection lost", None),
    )


class RouterService(Service):
    """A router: takes tasks, has them run by one node each, ends each exactly once.

    The session should be persistent (``clean=False``), so that what nodes say while the router
    restarts is not lost; then ``listen`` before the session is entered. Session, ledger and
    encoder are entered by their owner. All state belongs to the event loop.

    Args:
        session: Connection to the mesh, with the identity ``router_id``.
        topics: Topic grammar of the site.
        search: Semantic index, filled from the catalogue by this service.
        encoder: Embeds the words of tasks in the space of ``search``; stopped early when another
            takes its place.
        ledger: Journal.
        router_id: Identity.
        settings: Limits, time limits, weights.
        rules: The file of rules, loaded by its owner; None: no rules.
        encoders: Makes other encoders, for the verb ``encoder``; None: this one stays.
        background: Builds indexes; ``search`` was made with it. None: they are built at once.
        index_folder: Where the index is kept over restarts; None: nowhere.
        chance: Randomness of exploration; None: no exploration.
        signer: Signs what nodes are told, and is shown with the router's state; None: unsigned.
        book: Knows the registries, which sign records and the passports of administrators; None
            where no registry of the site is known.
        unsigned_admin: Whether the broker's word will do for who administrates.
        quotas: The file of quotas, loaded by its owner; None: the defaults hold.
        epoch: Start of this process, UTC milliseconds; now when omitted.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        search: CapabilitySearch,
        encoder: QueryEncoder,
        ledger: Ledger,
        router_id: str,
        settings: RouterSettings | None = None,
        rules: RuleFile | None = None,
        encoders: EncoderFactory | None = None,
        background: Executor | None = None,
        index_folder: Path | None = None,
        chance: random.Random | None = None,
        signer: Signer | None = None,
        book: PassportBook | None = None,
        unsigned_admin: bool = True,
        quotas: QuotaFile | None = None,
        epoch: int | None = None,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        super().__init__(service_id=router_id)
        self._session = session
        self._topics = topics
        self._ledger = ledger
        self._router_id = router_id
        self._settings = settings or RouterSettings()
        self._clock = clock
        self._epoch = clock() if epoch is None else epoch
        self._presence: Presence = "birth"
        self._signer = signer
        self._people = People(topics=topics, book=book)
        self.stats = RouterStats()
        self.fleet = Fleet(
            heartbeat_s=self._settings.heartbeat_s,
            missed_heartbeats=self._settings.missed_heartbeats,
        )
        self._meaning = Meaning(
            search=search,
            encoder=encoder,
            encoders=encoders,
            background=background,
            folder=index_folder,
        )
        reputation = Reputation(self._settings.reputation)
        breakers = Breakers(self._settings.breaker)
        self.routing = TaskRouting(
            meaning=self._meaning,
            fleet=self.fleet,
            settings=self._settings,
            reputation=reputation,
            breakers=breakers,
            rules=rules,
            chance=chance,
            tenant_of=self._people.tenant,
        )
        self._intake = Intake(topics=topics, limit_bytes=self._settings.task_limit_bytes)
        self._reader = ReplyReader(
            root=topics.root, router_id=router_id, limit_bytes=DEFAULT_LIMIT_BYTES
        )
        self._replies = ReplyDesk(
            session=session,
            ledger=ledger,
            router_id=router_id,
            recent_bytes=self._settings.recent_bytes,
            clock=clock,
        )
        orders = OrderDesk(
            session=session,
            topics=topics,
            fleet=self.fleet,
            router_id=router_id,
            signer=signer,
            clock=clock,
        )
        events = EventSource(
            session=session, topics=topics, source=router_id, component="router", clock=clock
        )
        self._audit = AuditVoice(emit=events.emit, epoch=self._epoch, clock=clock)
        self._quotas = Quotas(file=quotas, role_of=self._role_of)
        self.dispatcher = Dispatcher(
            orders=orders,
            ledger=ledger,
            fleet=self.fleet,
            routing=self.routing,
            replies=self._replies,
            stats=self.stats,
            router_id=router_id,
            settings=self._settings,
            quotas=self._quotas,
            refusals=self._audit.tally,
            clock=clock,
            spawn=self.spawn,
        )
        self._steering = SteeringDesk(
            fleet=self.fleet,
            meaning=self._meaning,
            routing=self.routing,
            reputation=reputation,
            breakers=breakers,
            ledger=ledger,
            events=events,
            rules=rules,
            default=self._settings.weights,
            spawn=self.spawn,
            clock=clock,
        )
        desk = AdminDesk(
            orders=orders,
            fleet=self.fleet,
            meaning=self._meaning,
            dispatcher=self.dispatcher,
            ledger=ledger,
            stats=self.stats,
            steering=self._steering,
            quotas=self._quotas,
            router_id=router_id,
            clock=clock,
        )
        self._admin = AdminLine(
            desk=desk,
            people=self._people,
            book=book,
            unsigned=unsigned_admin,
            since=self._epoch,
            events=events,
            replies=self._replies,
            stats=self.stats,
            audit=self._audit,
            topics=topics,
            router_id=router_id,
            spawn=self.spawn,
            clock=clock,
        )
        self._upkeep = Upkeep(
            session=session,
            fleet=self.fleet,
            meaning=self._meaning,
            steering=self._steering,
            dispatcher=self.dispatcher,
            replies=self._replies,
            ledger=ledger,
            settings=self._settings,
            clock=clock,
        )
        self._frames = Frames(topics, self.stats)
        self._news = FleetNews(
            frames=self._frames,
            fleet=self.fleet,
            meaning=self._meaning,
            upkeep=self._upkeep,
            gone=self.dispatcher.node_gone,
            people=self._people,
            book=book,
            alarm=SecurityAlarm(events=events, own=router_id, clock=clock),
            clock=clock,
        )
        self._look_ups = asyncio.Semaphore(_LOOK_UPS)
        self._listening = False
        self._ready = asyncio.Event()
        self._forget_connection: Callable[[], None] | None = None

    # ---- life

    async def _on_start(self) -> None:
        self.fleet.cordon(await self._ledger.cordons())
        await self._steering.restore()
        await self._meaning.restore()
        unfinished, untold = await self._ledger.unfinished(), await self._ledger.untold()
        self.dispatcher.restore(unfinished)
        self._forget_connection = self._session.on_connection(self._on_connection)
        await self.listen()
        self._session.announce(self._state_topic, self._birth)
        self.spawn(self.dispatcher.keep_time(), name="clock")
        self.spawn(self._upkeep.get_informed(), name="inform")
        self.spawn(self._upkeep.sweep(), name="sweep")
        self.spawn(self._upkeep.calibrate(), name="calibrate")
        self.spawn(self._upkeep.embed_records(), name="embed")
        self.spawn(self._audit.keep_telling(), name="audit")
        self.spawn(self._quotas.follow(self._audit), name="quotas")
        for entry in untold:
            if entry.terminal is not None:
                telling = self._replies.tell(entry.key, entry.reply, entry.terminal)
                self.spawn(telling, name="tell")
        self._ready.set()
        _log.info(
            "router.started",
            router=self._router_id,
            unfinished=len(unfinished),
            untold=len(untold),
        )

    async def _on_stop(self) -> None:
        if self._forget_connection is not None:
            self._forget_connection()
        self._presence = "offline"
        self._session.announce(self._state_topic, self._birth)
        self._session.retract(self._state_topic)
        self.dispatcher.note_progress()
        self._audit.tell()
        try:
            await self._steering.save()
        except Overloaded as error:
            _log.warning("reputation.unsaved", error=error.message)

    async def _on_stopped(self) -> None:
        await self._meaning.close()

    @property
    def _state_topic(self) -> str:
        return self._topics.build(TopicKind.ROUTER_STATE, router=self._router_id)

    def show_passport(self) -> None:
        """Say again who the router is: its passport has been renewed."""
        self._session.announce(self._state_topic, self._birth)

    def _birth(self) -> bytes:
        passport = self._signer.passport if self._signer is not None else None
        return _state(self._router_id, self._presence, self._epoch, self._clock(), "", passport)

    def _on_connection(self, up: bool) -> None:
        if up:
            self.fleet.wake_all(self._clock())

    async def listen(self) -> None:
        """Subscribe; call it before the session is entered. Idempotent; starting implies it.

        A persistent session hands over what was kept for it with the connection: a message that
        no subscription asked for by then is lost. What arrives waits until the router has started.
        Catalogue and fleet come first, tasks last: a task should find them known.
        """
        if self._listening:
            return
        self._listening = True
        own = self._router_id
        filters: list[tuple[str, Handler, int]] = [
            (self._topics.filter(TopicKind.CATALOG), self._news.on_catalog, 1),
            (self._topics.filter(TopicKind.NODE_STATE), self._news.on_node_state, 1),
            (self._topics.filter(TopicKind.NODE_LOAD), self._news.on_node_load, 0),
            (self._topics.filter(TopicKind.TRUST), self._news.on_trust, 1),
            (self._topics.filter(TopicKind.REPORT, router=own), self._on_report, 1),
            (self._topics.filter(TopicKind.REPLY), self._on_reply, 1),
            (
                self._topics.filter(TopicKind.ADMIN, target=own),
                self._fresh(self._admin.on_message),
                1,
            ),
            (self._topics.filter(TopicKind.CANCEL), self._fresh(self._on_cancel), 1),
            (self._topics.filter(TopicKind.RESUME), self._fresh(self._on_resume), 1),
            (self._topics.filter(TopicKind.TASK), self._fresh(self._on_task), 1),
        ]
        tasks = filters[-1][0]
        for topic_filter, handler, qos in filters:
            await self._session.subscribe(
                topic_filter,
                self._when_ready(handler),
                qos=qos,
                queue_limit=self._settings.queue_limit,
                on_overflow=self._on_task_overflow if topic_filter == tasks else None,
            )

    def _fresh(self, handler: Handler) -> Handler:
        """Pass over commands that a client had the broker keep.

        The first delivery of such a message, which is not marked, was obeyed; the kept copy comes
        again with every subscription, and would have the task run at each start of the router.
        """

        async def handle(message: Message) -> None:
            if message.retain:
                self.stats.dropped["retained"] += 1
                _log.info("command.retained", topic=message.topic)
                return
            await handler(message)

        return handle

    def _when_ready(self, handler: Handler) -> Handler:
        async def handle(message: Message) -> None:
            if not self._ready.is_set():
                await self._ready.wait()
            await handler(message)

        return handle

    # ---- tasks

    async def _on_task(self, message: Message) -> None:
        try:
            read = self._intake.read(message.topic, message.payload, self._clock())
        except ProtocolError:
            self.stats.dropped["topic"] += 1
            return
        if await self._answer_known(read):
            return
        if isinstance(read, Refusal):
            self._refuse(read, read.error)
            return
        try:
            self.dispatcher.take(read)
        except (Overloaded, TooLarge) as error:
            if self._look_ups.locked() or not read.named:
                self._refuse(read, error)
            else:
                self.spawn(self._refuse_unless_known(read, error), name="refuse")

    async def _refuse_unless_known(self, read: Arrival, error: FoamError) -> None:
        """Refuse a task, unless it is no new one; the others do not wait for the look."""
        async with self._look_ups:
            known = await self._answer_journaled(read)
        if not known and self.dispatcher.live(read.key) is None:
            self._refuse(read, error)

    async def _answer_known(self, read: Arrival | Refusal) -> bool:
        """Answer a repeated id; tell whether it was one. Runs nothing.

        Ids that are neither live nor recent are left to the journal, which finds them while it
        writes; a refused task is not written, so its id is looked up here.
        """
        live = self.dispatcher.live(read.key)
        if live is not None:
            self.stats.repeated += 1
            self.dispatcher.accept_again(live)
            return True
        return self._repeat(self._replies.recall(read.key)) or (
            isinstance(read, Refusal) and await self._answer_journaled(read)
        )

    async def _answer_journaled(self, read: Arrival | Refusal) -> bool:
        return read.named and self._repeat(await self._look_up(read.key))

    def _repeat(self, outcome: Outcome | None) -> bool:
        if outcome is None:
            return False
        self.stats.repeated += 1
        self._replies.repeat(outcome.reply, [outcome.terminal])
        return True

    async def _look_up(self, key: tuple[str, str]) -> Outcome | None:
        try:
            entry = await self._ledger.find(*key)
        except FoamError as error:
            _log.warning("ledger.unread", error=error.message)
            return None
        return Outcome.of(entry) if entry is not None else None

    def _refuse(self, read: Arrival | Refusal, error: FoamError) -> None:
        self.stats.refused[error.code.value] += 1
        note_refusal(self._audit.tally, read.client, error.code.value, error)
        self._replies.refuse(read.reply, read.task_id, error)

    def _on_task_overflow(self, message: Message) -> None:
        if message.retain:
            return  # a kept copy, see _fresh
        error = Overloaded("the router has no room for the task", retry_after_ms=_OVERFLOW_RETRY_MS)
        try:
            refusal = self._intake.refuse(message.topic, message.payload, error, self._clock())
        except ProtocolError:
            self.stats.dropped["topic"] += 1
            return
        if refusal.named and self.dispatcher.live(refusal.key) is not None:
            return  # a repetition: the task itself is safe
        self._refuse(refusal, refusal.error)

    async def _on_cancel(self, message: Message) -> None:
        client = self._frames.level(message, "client")
        request = self._frames.read(CancelRequest, message)
        if client is not None and request is not None:
            self.dispatcher.cancel((client, request.task))

    async def _on_resume(self, message: Message) -> None:
        """Repeat what the client missed; a task not known (yet) is passed over."""
        client = self._frames.level(message, "client")
        request = self._frames.read(ResumeRequest, message)
        if client is None or request is None:
            return
        key = (client, request.task)
        live = self.dispatcher.live(key)
        if live is not None:
            missed = [data for seq, data in live.machine.shown if seq >= request.from_seq]
            self._replies.repeat(live.arrival.reply, missed)
            return
        outcome = self._replies.recall(key) or await self._look_up(key)
        if outcome is not None:
            self._replies.repeat(outcome.reply, outcome.replay(request.from_seq))

    # ---- nodes

    async def _on_reply(self, message: Message) -> None:
        observation = self._reader.read(message.topic, message.payload)
        if observation is not None:
            self.dispatcher.observe(observation)

    async def _on_report(self, message: Message) -> None:
        node = self._frames.level(message, "node")
        report = self._frames.read(Report, message, limit_bytes=_REPORT_LIMIT_BYTES)
        if report is None:
            return
        if report.node != node:
            self.stats.dropped["impostor"] += 1
            return
        self.dispatcher.report(report)

    def _role_of(self, client: str) -> Role:
        return self._people.role(client) or (
            Role.NODE if client in self.fleet.nodes else Role.DEVICE
        )


def _state(
    router_id: str, presence: Presence, epoch: int, at: int, reason: str, passport: Passport | None
) -> bytes:
    return encode(
        RouterState(
            router=router_id, state=presence, epoch=epoch, at=at, reason=reason, passport=passport
        )
    )
