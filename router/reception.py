"""Where tasks arrive: this router takes its own, and watches over those of the others.

Which router has a task is worked out alike by all (`router.ownership`). The others keep a shadow of
it (`router.shadow`): when nobody says ``accepted`` in time, or the router that did is gone, the
next one goes on from what it has seen on the reply topics. A router that finds another one with the
better claim gives its task up without a word.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from broker.audit import Tally
from broker.events import EventSource
from broker.session.base import Message
from capability_schemas.errors import FoamError, Overloaded, ProtocolError, TooLarge
from router.catalogue import Fleet
from router.dispatch import Dispatcher, Spawn, note_refusal
from router.ends import tell_end
from router.entry import Entry
from router.intake import Arrival, Intake, Refusal
from router.ledger import Ledger
from router.live import LiveTask
from router.observation import Observation, RouterWord
from router.orders import OrderDesk
from router.ownership import Claim, RouterBook, first_attempt, generation_of
from router.replies import Key, Outcome, ReplyDesk
from router.settings import RouterSettings
from router.shadow import Shadow, ShadowTable
from router.statistics import RouterStats
from router.takeover import Takeover

_LOOK_UPS: Final = 32
"""Refused tasks at a time that may be repetitions: of more nobody looks in the journal."""

_LINGER_MS: Final = 60_000
"""How long a shadow outlives the deadline of its task, milliseconds."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Reception:
    """Takes tasks, refuses them, leaves them to other routers, takes them over. Of the event loop.

    Args:
        intake: Reads tasks.
        book: The routers of the site.
        dispatcher: Runs the tasks of this router.
        orders: Tells nodes what to do.
        fleet: What the nodes offer.
        replies: Tells clients.
        ledger: Journal.
        settings: Limits and time limits.
        stats: Counters.
        refusals: Counts what policy forbids, for the audit trail.
        events: Tells other routers.
        clock: UTC milliseconds.
        spawn: Runs background work in the router's life cycle.
        served: Told of each task of another router that belongs to a session, when it has its
            result: client, session and node.

    Attributes:
        shadows: Tasks of other routers.
    """

    def __init__(
        self,
        *,
        intake: Intake,
        book: RouterBook,
        dispatcher: Dispatcher,
        orders: OrderDesk,
        fleet: Fleet,
        replies: ReplyDesk,
        ledger: Ledger,
        settings: RouterSettings,
        stats: RouterStats,
        refusals: Tally,
        events: EventSource,
        clock: Callable[[], int],
        spawn: Spawn,
        served: Callable[[str, str, str], None],
    ) -> None:
        self._served = served
        self._intake = intake
        self._book = book
        self._dispatcher = dispatcher
        self._orders = orders
        self._replies = replies
        self._ledger = ledger
        self._settings = settings
        self._stats = stats
        self._refusals = refusals
        self._look_ups = asyncio.Semaphore(_LOOK_UPS)
        self._events = events
        self._clock = clock
        self._spawn = spawn
        self._own = book.own
        self.shadows = ShadowTable(
            limit=settings.queue_limit,
            limit_bytes=settings.shadow_bytes,
            evicted=self._on_evicted,
        )
        self._takeover = Takeover(
            shadows=self.shadows,
            book=book,
            dispatcher=dispatcher,
            fleet=fleet,
            replies=replies,
            ledger=ledger,
            settings=settings,
            stats=stats,
            clock=clock,
        )

    @property
    def caught_up(self) -> bool:
        """Whether it is known what others have done with tasks that waited."""
        return self._takeover.running

    @property
    def _shared(self) -> bool:
        """Whether tasks may be another router's; not known before all has been heard."""
        return not (self._book.alone and self.caught_up)

    @property
    def left(self) -> list[Shadow]:
        """Tasks of this router's journal that others have, and of which it may not know the end."""
        return [shadow for shadow in self.shadows if shadow.journaled and shadow.doubtful]

    def restore(self, entries: list[Entry]) -> None:
        """Take up the tasks of an earlier process; what it had left to others is watched."""
        self._takeover.restore(entries)

    # ---- tasks

    async def take(self, message: Message) -> None:
        """Take a message of a task topic."""
        now = self._clock()
        try:
            read = self._intake.read(message.topic, message.payload, now)
        except ProtocolError:
            self._stats.dropped["topic"] += 1
            return
        if self._shared:
            if self._has_ended(read, now):
                return
            named = self.shadows.awaited(read) if read.mark else None
            if named is not None:
                read = self._intake.renamed(read, named)
        # The end may come while the journal is asked.
        if not await self._answer_known(read) and not self._has_ended(read, now):
            self._place(read, now)
            if self.shadows.was_retracted(read.key, now):
                self.cancel(read.key)

    def _has_ended(self, read: Arrival | Refusal, now: int) -> bool:
        """Tell whether the end of a task was heard before the task."""
        if not self.shadows.has_ended(read, now):
            return False
        self.shadows.drop(read.key)
        return True

    def overflow(self, message: Message) -> None:
        """Refuse a task for which there is no room."""
        if message.retain:
            return  # a kept copy, which nobody takes
        error = Overloaded(
            "the router has no room for the task", retry_after_ms=self._dispatcher.retry_ms()
        )
        try:
            refusal = self._intake.refuse(message.topic, message.payload, error, self._clock())
        except ProtocolError:
            self._stats.dropped["topic"] += 1
            return
        if refusal.named and (
            self._dispatcher.live(refusal.key) is not None
            or self._replies.recall(refusal.key) is not None
        ):
            return  # a repetition: the task itself is safe, and its outcome
        if self._is_ours(refusal.subject):
            self._refuse(refusal, refusal.error)

    def cancel(self, key: Key) -> None:
        """Take a client's cancellation; it holds for whoever takes the task over, too."""
        shadow = self.shadows.get(key)
        if shadow is not None:
            shadow.cancelled = True
        if self._dispatcher.live(key) is not None:
            self._dispatcher.cancel(key)
        elif shadow is None:
            self.shadows.retract(key, self._clock())

    async def find_outcome(self, key: Key) -> Outcome | None:
        """Return how a task ended, from memory or the journal; None when that is not known."""
        outcome = self._replies.recall(key)
        if outcome is not None:
            return outcome
        try:
            entry = await self._ledger.find(*key)
        except FoamError as error:
            _log.warning("ledger.unread", error=error.message)
            return None
        return Outcome.of(entry) if entry is not None else None

    async def _answer_known(self, read: Arrival | Refusal) -> bool:
        """Answer a repeated id, where that is ours to do; tell whether it was one. Runs nothing.

        Ids that are neither live nor recent are left to the journal, which finds them while it
        writes; a refused task is not written, so its id is looked up here.
        """
        live = self._dispatcher.live(read.key)
        if live is not None:
            self._stats.repeated += 1
            self._dispatcher.accept_again(live)
            return True
        outcome = self._replies.recall(read.key)
        if outcome is None and isinstance(read, Refusal) and read.named:
            outcome = await self.find_outcome(read.key)
        if outcome is None:
            return False
        first = self._book.order(read.subject)[0]
        if first == self._own:
            self._stats.repeated += 1
            self._replies.repeat(outcome.reply, [outcome.terminal])
        elif self._book.epoch_of(first) > outcome.ended_at:
            tell_end(self._events, outcome)  # it came after the end and may not know of it
        return True

    def _place(self, read: Arrival | Refusal, now: int) -> None:
        """Take a task, or leave it to the router that it belongs to."""
        shadow = self.shadows.get(read.key)
        if shadow is not None and shadow.claim is not None:
            if shadow.read is None:  # its router's word came first
                shadow.read, shadow.reply = read, read.reply
                self.shadows.weigh(shadow)
                if not self._book.is_live(shadow.claim.router):
                    self._takeover.schedule(shadow, now)
            return
        place = self._book.order(read.subject).index(self._own)
        if place == 0 and self.caught_up:
            self._begin(read)
            return
        if shadow is None:
            deadline = read.deadline if isinstance(read, Arrival) else now
            shadow = Shadow(read.key, read=read, reply=read.reply, deadline=deadline)
            self.shadows.enter(shadow)
            self._takeover.schedule(shadow, now)

    def _on_evicted(self, shadow: Shadow) -> None:
        """Lose sight of a task: one that nobody has yet is taken or refused, if it is ours."""
        self._stats.unwatched += 1
        if shadow.claim is None and shadow.read is not None and self._is_ours(shadow.subject):
            self._begin(shadow.read, fence=False)

    def _is_ours(self, subject: str) -> bool:
        return self._book.order(subject)[0] == self._own

    def _begin(self, read: Arrival | Refusal, *, fence: bool = True) -> None:
        if isinstance(read, Refusal):
            self._refuse(read, read.error)
            return
        try:
            self._takeover.take(read, fence=fence)
        except (Overloaded, TooLarge) as error:
            if self._look_ups.locked() or not read.named:
                self._refuse(read, error)
            else:
                self._spawn(self._refuse_unless_known(read, error), name="refuse")

    async def _refuse_unless_known(self, read: Arrival, error: FoamError) -> None:
        """Refuse a task, unless it is no new one; the others do not wait for the look."""
        async with self._look_ups:
            outcome = await self.find_outcome(read.key)
        if outcome is not None:
            self._stats.repeated += 1
            self._replies.repeat(outcome.reply, [outcome.terminal])
        elif self._dispatcher.live(read.key) is None:
            self._refuse(read, error)

    def _refuse(self, read: Arrival | Refusal, error: FoamError) -> None:
        self._stats.refused[error.code.value] += 1
        note_refusal(self._refusals, read.client, error.code.value, error)
        self._replies.refuse(read.reply, read.task_id, error)

    # ---- what is said on the reply topics

    def hear(self, item: Observation | RouterWord) -> None:
        """Take what a node or a router told a client."""
        if isinstance(item, RouterWord):
            self._hear_word(item)
            return
        live = self._dispatcher.live(item.key)
        if live is None:
            if self._shared:
                self._watch(item)
        elif item.event.source in self._book:
            if item.event.event in {"result", "error"}:
                self._yield(live, Claim(item.event.source))
                self._watch(item)
        else:
            self._dispatcher.observe(item)

    def _hear_word(self, word: RouterWord) -> None:
        if word.router == self._own:
            if word.route is not None:
                self._dispatcher.fenced(word.key, word.route)
            elif word.claim is not None:
                self._takeover.fenced(word.key, word.claim)
        elif word.router in self._book or not self.caught_up:
            # A kept session brings it before the routers' states: `catch_up` looks who it was.
            self.hear_router(word)

    def hear_router(self, word: RouterWord) -> None:
        """Take another router's word on a task: that it has it, or whom it asked."""
        live = self._dispatcher.live(word.key)
        if live is not None:
            if not self._gives_up(live, word):
                return
        elif (outcome := self._replies.recall(word.key)) is not None:
            said = word.claim or word.route
            if said is not None and said.attempt > outcome.attempt:
                tell_end(self._events, outcome)  # it missed the end, and begins anew
            return
        shadow = self._shadow_of(word)
        if word.claim is not None and (
            shadow.claim is None or word.claim.outranks(shadow.claim, shadow.subject)
        ):
            shadow.claim, shadow.deadline = word.claim, word.deadline
            shadow.due = None if self._book.is_live(word.router) else shadow.due
            self._takeover.note_claim(shadow)
        elif word.claim is not None and shadow.claim and shadow.claim.router == self._own:
            self._takeover.repeat_claim(shadow)
        if (
            word.route is not None
            and not (word.route.last and shadow.route is not None)
            and (shadow.route is None or word.route.attempt >= shadow.route.attempt)
        ):
            shadow.route = word.route
            self._call_off(shadow)

    def _shadow_of(self, word: RouterWord) -> Shadow:
        """Find the shadow of a task, under the name its router gave it, or make one."""
        shadow = self.shadows.find(word.key)
        if shadow is None:
            shadow = Shadow(word.key, reply=word.reply, deadline=word.deadline)
            self.shadows.enter(shadow)
        elif shadow.key != word.key and shadow.read is not None:
            self.shadows.drop(shadow.key)
            shadow.read = self._intake.renamed(shadow.read, word.key[1])
            shadow.key, shadow.reply, shadow.claim = word.key, shadow.read.reply, word.claim
            self.shadows.enter(shadow)
        return shadow

    def _watch(self, item: Observation) -> None:
        """Follow a task of another router."""
        event, shadow = item.event, self.shadows.get(item.key)
        if event.event in {"result", "error"}:
            self._conclude(item, shadow)
        elif shadow is not None:
            shadow.see(
                event,
                most_events=self._settings.shown_events,
                most_bytes=self._settings.shown_bytes,
            )
            self.shadows.weigh(shadow)

    def _conclude(self, item: Observation, shadow: Shadow | None) -> None:
        """Keep the end of another router's task, so that the same id is not run again here."""
        event, now = item.event, self._clock()
        if shadow is None:
            shadow = self.shadows.find(item.key)
        if shadow is not None:
            # A kept session brings an end that a router repeats before the routers' states.
            own = shadow.route is not None and event.attempt == shadow.route.attempt
            routers = event.source in self._book or (own and not self.caught_up)
            if not routers and shadow.has_passed_over(event):
                return
            self.shadows.drop(shadow.key)
        if self._replies.recall(item.key) is not None:
            return
        if shadow is None or shadow.read is None:
            self.shadows.orphan(item.key, now)
        if shadow is None or shadow.claim is None:
            return  # refused, and perhaps welcome later; or no task at all
        session = shadow.read.task.session if isinstance(shadow.read, Arrival) else None
        if session is not None and shadow.route is not None and event.code is None:
            self._served(item.key[0], session, shadow.route.node)
        self._keep(
            Outcome(
                key=item.key,
                reply=item.reply,
                seq=event.seq or 0,
                attempt=event.attempt or 1,
                terminal=event.payload,
                code=event.code,
                ended_at=now,
                told=True,
                shown=tuple(shadow.shown),
            )
        )

    def learn(self, outcome: Outcome) -> None:
        """Take how a task ended from a router that saw it."""
        if self._replies.recall(outcome.key) is not None:
            return
        live = self._dispatcher.live(outcome.key)
        if live is not None:
            fresh = live.arrival.received_at > outcome.ended_at
            shadow = self._yield(live, None)
            if shadow.given_up is not None:
                self._cancel(shadow.key, *shadow.given_up)
            if fresh:  # a repeated id: the client waits for its outcome
                self._replies.repeat(outcome.reply, [outcome.terminal])
        self._keep(outcome)

    def _keep(self, outcome: Outcome) -> None:
        """Remember how a task of another router ended."""
        self.shadows.drop(outcome.key)
        self._replies.remember(outcome)
        self._spawn(self._journal(outcome), name="keep")

    async def _journal(self, outcome: Outcome) -> None:
        client, task_id = outcome.key
        at = outcome.ended_at
        entry = Entry(client, task_id, task=b"", reply=outcome.reply, accepted_at=at, deadline=at)
        try:
            await self._ledger.journal(entry)
        except FoamError as error:
            _log.warning("outcome.unkept", task=task_id, error=error.message)
            return
        await self._replies.conclude(outcome)

    # ---- two routers with one task

    def _gives_up(self, live: LiveTask, word: RouterWord) -> bool:
        """Give a task up to a router whose word on it counts rather than ours; tell whether."""
        claim = word.claim
        if claim is None and word.route is not None:  # who asks nodes has the task
            claim = Claim(word.router, first_attempt(generation_of(word.route.attempt)))
        if claim is None or word.router not in self._book:
            return False
        own = Claim(self._own, live.machine.turns.floor)
        if claim.outranks(own, live.arrival.subject):
            shadow = self._yield(live, claim)
            if not self._book.is_live(word.router):
                self._takeover.schedule(shadow, self._clock())
            return True
        if word.claim is not None:
            self._dispatcher.accept_again(live)
        return False

    def _yield(self, live: LiveTask, claim: Claim | None) -> Shadow:
        """Give a task up to a router with a better claim, and watch it from now on.

        The journal knows of it: a restart does not make the task ours again.

        The node that runs it is left alone until the other router asks another one: it may have
        gone on with the very same run.
        """
        arrival, machine = live.arrival, live.machine
        shadow = Shadow(
            arrival.key,
            read=arrival,
            reply=arrival.reply,
            deadline=arrival.deadline,
            claim=claim,
            next_seq=machine.next_seq,
            journaled=True,
        )
        for seq, payload in machine.course.shown.chunks:
            shadow.shown.append((seq, payload))
            shadow.shown_bytes += len(payload)
        if machine.node is not None:
            shadow.given_up = machine.node, machine.attempt
        self._dispatcher.give_up(arrival.key)
        self._takeover.note_claim(shadow)
        self._stats.given_up += 1
        self.shadows.enter(shadow)
        _log.info("task.given_up", client=arrival.client, task=arrival.task_id)
        return shadow

    def _call_off(self, shadow: Shadow) -> None:
        """Call off what a node runs for us of a task that another router has and runs elsewhere."""
        if shadow.given_up is None or shadow.route is None:
            return
        node, attempt = shadow.given_up
        if attempt >= shadow.route.attempt:
            return
        shadow.given_up = None
        self._cancel(shadow.key, node, attempt)

    def _cancel(self, key: Key, node: str, attempt: int) -> None:
        client, task = key
        try:
            self._orders.control(
                node, "cancel", task=task, client=client, attempt=attempt, reason="superseded"
            )
        except FoamError as error:
            _log.warning("control.dropped", node=node, error=error.message)

    # ---- the other routers

    def tell_ended(self, router: str) -> None:
        """Tell a router how tasks ended that were taken over from it; the latest ones."""
        for key, owner in self._takeover.taken.items():
            outcome = self._replies.recall(key) if owner == router else None
            if outcome is not None:
                tell_end(self._events, outcome)

    def catch_up(self) -> None:
        """Begin to take tasks: what others have said of those that waited has been heard."""
        for shadow in self.shadows:
            unknown = shadow.claim is not None and shadow.claim.router not in self._book
            if unknown and not shadow.journaled:
                shadow.claim = None
        self.shadows.caught_up_at = self._clock()
        self._takeover.begin()

    def fall_behind(self) -> None:
        """Leave tasks alone until `catch_up`: others may have taken them meanwhile."""
        self._takeover.pause()

    def router_gone(self, router: str) -> None:
        """Take the loss of a router: see whose turn it is with its tasks."""
        self._takeover.router_gone(router)

    async def keep_time(self) -> None:
        """Take over what is due; runs until cancelled."""
        await self._takeover.keep_time(self._begin)

    def sweep(self) -> None:
        """Forget shadows whose tasks must have ended long ago."""
        now = self._clock()
        for shadow in self.shadows:
            if shadow.due is None and shadow.deadline + _LINGER_MS < now:
                self.shadows.drop(shadow.key)
                if shadow.journaled:
                    self._ledger.forget(shadow.key)
