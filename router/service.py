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
from broker.session.base import Handler, Message, Session
from capability_schemas.errors import Overloaded
from capability_schemas.ids import now_ms
from capability_schemas.invocation import UNSURE_LIMIT_BYTES, Report
from capability_schemas.passport import PassportBook
from capability_schemas.provenance import Signer
from capability_schemas.task import CancelRequest, ResumeRequest
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import DEFAULT_LIMIT_BYTES
from registry.search import CapabilitySearch
from router.admin import AdminDesk
from router.administration import AdminLine
from router.breaker import Breakers
from router.catalogue import Fleet
from router.dispatch import Dispatcher
from router.ends import OUTCOME
from router.intake import Intake
from router.ledger import Ledger
from router.meaning import EncoderFactory, Meaning, QueryEncoder
from router.news import FRAME_LIMIT_BYTES, FleetNews, Frames
from router.observation import ReplyReader
from router.orders import OrderDesk
from router.ownership import RouterBook
from router.peers import CLAIMS, PeerDesk
from router.people import People
from router.quota import QuotaBook, QuotaFile, Quotas
from router.reception import Reception
from router.replies import ReplyDesk, as_of
from router.reputation import Reputation
from router.routing import TaskRouting
from router.rules import RuleFile
from router.settings import RouterSettings
from router.statistics import RouterStats
from router.steering import SteeringDesk
from router.upkeep import Upkeep

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_REPORT_LIMIT_BYTES: Final = UNSURE_LIMIT_BYTES + FRAME_LIMIT_BYTES


def lets_past(rules: RuleFile | None, quotas: QuotaFile | None) -> bool:
    """Tell whether clients may ask nodes themselves once no router lives.

    Nodes know neither rules nor quotas: where any are set, nobody gets past who sees to them.

    Args:
        rules: The file of rules.
        quotas: The file of quotas.
    """
    has_rules = rules is not None and len(rules.book) > 0
    return not has_rules and (quotas is None or quotas.value == QuotaBook())


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
        place: Where it runs, in words.
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
        place: str | None = None,
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
        self._people = People(topics=topics, book=book)
        self.stats = RouterStats()
        self.fleet = Fleet(
            heartbeat_s=self._settings.heartbeat_s,
            missed_heartbeats=self._settings.missed_heartbeats,
            grace_ms=self._settings.grace_ms,
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
        self.book = RouterBook(
            own=router_id,
            heartbeat_s=self._settings.router_heartbeat_s,
            missed=self._settings.missed_heartbeats,
        )
        self.reception = Reception(
            intake=Intake(topics=topics, limit_bytes=self._settings.task_limit_bytes),
            book=self.book,
            dispatcher=self.dispatcher,
            orders=orders,
            fleet=self.fleet,
            replies=self._replies,
            ledger=ledger,
            settings=self._settings,
            stats=self.stats,
            refusals=self._audit.tally,
            events=events,
            clock=clock,
            spawn=self.spawn,
            served=self.routing.keep_session,
        )
        self._peers = PeerDesk(
            session=session,
            topics=topics,
            book=self.book,
            reception=self.reception,
            dispatcher=self.dispatcher,
            events=events,
            signer=signer,
            epoch=self._epoch,
            place=place,
            direct=lambda: lets_past(rules, quotas),
            clock=clock,
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
            book=self.book,
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
            reception=self.reception,
            peers=self._peers,
            replies=self._replies,
            ledger=ledger,
            events=events,
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
            heard=self.dispatcher.usher.heard,
            people=self._people,
            standing=self._peers.take_standing,
            book=book,
            alarm=SecurityAlarm(events=events, own=router_id, clock=clock),
            clock=clock,
        )
        self._listening = False
        self._was_cut = False
        self._ready = asyncio.Event()
        self._forget_connection: Callable[[], None] | None = None

    # ---- life

    async def _on_start(self) -> None:
        self.fleet.cordon(await self._ledger.cordons())
        await self._steering.restore()
        await self._meaning.restore()
        unfinished, untold = await self._ledger.unfinished(), await self._ledger.untold()
        self.reception.restore(unfinished)
        self._forget_connection = self._session.on_connection(self._on_connection)
        await self.listen()
        self._session.announce(self._peers.topic, self._peers.state)
        self.spawn(self.dispatcher.keep_time(), name="clock")
        self.spawn(self.dispatcher.usher.keep_time(), name="waiting")
        self.spawn(self.reception.keep_time(), name="shadows")
        self.spawn(self._peers.beat(), name="heartbeat")
        self.spawn(self._upkeep.catch_up(), name="catch-up")
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
        self._peers.presence = "offline"
        if not self._peers.muted:
            self._session.announce(self._peers.topic, self._peers.state)
            self._session.retract(self._peers.topic)
        self.dispatcher.note_progress()
        self._audit.tell()
        try:
            await self._steering.save()
        except Overloaded as error:
            _log.warning("reputation.unsaved", error=error.message)

    async def _on_stopped(self) -> None:
        self._replies.stop()
        await self._meaning.close()

    def show_passport(self) -> None:
        """Say again who the router is: its passport has been renewed."""
        self._session.announce(self._peers.topic, self._peers.state)

    @property
    def is_known(self) -> bool:
        """Whether it has made itself known."""
        return self._ready.is_set()

    def give_up(self) -> None:
        """Say nothing more of itself: another process has its place."""
        self._peers.muted = True
        self._session.retract(self._peers.topic)

    def _on_connection(self, up: bool) -> None:
        if up:
            self.fleet.wake_all(self._clock())
            self.book.wake_all(self._clock())
        self.dispatcher.connected(up=up)
        if self._was_cut and up:
            self.spawn(self._upkeep.resume(), name="resume")
        elif not up and not self.book.alone:
            # Others take its tasks over meanwhile: nothing may be begun that they do not see.
            self.dispatcher.hold()
            self.reception.fall_behind()
        self._was_cut = not up and not self.book.alone

    async def listen(self) -> None:
        """Subscribe; call it before the session is entered. Idempotent; starting implies it.

        A persistent session hands over what was kept for it with the connection: a message that
        no subscription asked for by then is lost. What arrives waits until the router has started.
        Catalogue and fleet come first, tasks last: a task should find them known.
        """
        if self._listening:
            return
        self._listening = True
        own, topics = self._router_id, self._topics
        filters: list[tuple[str, Handler, int]] = [
            (topics.filter(TopicKind.REGISTRY_STATE), self._news.on_registry_state, 1),
            (topics.filter(TopicKind.CATALOG), self._news.on_catalog, 1),
            (topics.filter(TopicKind.NODE_STATE), self._news.on_node_state, 1),
            (topics.filter(TopicKind.NODE_LOAD), self._news.on_node_load, 0),
            (topics.filter(TopicKind.TRUST), self._news.on_trust, 1),
            (topics.filter(TopicKind.ROUTER_STATE), self._on_router_state, 1),
            (topics.filter(TopicKind.EVENT, kind=CLAIMS), self._peers.hear_claims, 1),
            (topics.filter(TopicKind.EVENT, kind=OUTCOME), self._peers.hear_outcome, 1),
            (topics.filter(TopicKind.REPORT), self._on_report, 1),
            (topics.filter(TopicKind.REPLY), self._on_reply, 1),
            (topics.filter(TopicKind.ADMIN, target=own), self._fresh(self._admin.on_message), 1),
            (topics.filter(TopicKind.CANCEL), self._fresh(self._on_cancel), 1),
            (topics.filter(TopicKind.RESUME), self._fresh(self._on_resume), 1),
            (topics.filter(TopicKind.TASK), self._fresh(self.reception.take), 1),
        ]
        overflows: dict[str, Callable[[Message], None]] = {
            topics.filter(TopicKind.REPORT): self.dispatcher.overflow,
            topics.filter(TopicKind.REPLY): self.dispatcher.overflow,
            topics.filter(TopicKind.TASK): self.reception.overflow,
        }
        for topic_filter, handler, qos in filters:
            await self._session.subscribe(
                topic_filter,
                self._when_ready(handler),
                qos=qos,
                queue_limit=self._settings.queue_limit,
                on_overflow=overflows.get(topic_filter),
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

    async def _on_cancel(self, message: Message) -> None:
        self._upkeep.heard()  # a task that is withdrawn already had better not begin
        client = self._frames.level(message, "client")
        request = self._frames.read(CancelRequest, message)
        if client is not None and request is not None:
            self.reception.cancel((client, request.task))

    async def _on_resume(self, message: Message) -> None:
        """Repeat what the client missed; a task not known (yet) is passed over."""
        client = self._frames.level(message, "client")
        request = self._frames.read(ResumeRequest, message)
        if client is None or request is None:
            return
        key = (client, request.task)
        live = self.dispatcher.live(key)
        if live is not None:
            machine = live.machine
            missed = (data for _, data in machine.course.shown.since(request.from_seq))
            again = [as_of(machine.speaking_attempt, data) for data in missed]
            self._replies.replay(key, live.arrival.reply, again)
            return
        outcome = await self.reception.find_outcome(key)
        if outcome is not None:
            self._replies.replay(key, outcome.reply, outcome.replay(request.from_seq))

    # ---- nodes

    async def _on_reply(self, message: Message) -> None:
        item = self._reader.read(message.topic, message.payload)
        if item is not None:
            self.reception.hear(item)

    async def _on_router_state(self, message: Message) -> None:
        self._upkeep.heard()
        await self._peers.hear_state(message)

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
