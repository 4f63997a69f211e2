"""When a router takes tasks that another one had, or should have had, and how it goes on with them.

The next router in the order of a task waits a while for a word about it, the one after that twice
as long. A task that was accepted is taken only from a router that is gone. It is journaled here,
then claimed (``accepted``, with attempts of the next generation), and when the claim has come back
on the reply topics it goes on from what its shadow has seen by then.
"""

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

from capability_schemas.errors import FoamError
from capability_schemas.reply import Accepted
from capability_schemas.wire import encode
from router.catalogue import Fleet
from router.dispatch import Dispatcher
from router.entry import Entry
from router.intake import Arrival, Refusal
from router.ledger import Ledger
from router.ownership import Claim, RouterBook, first_attempt
from router.replies import Key, ReplyDesk
from router.settings import RouterSettings
from router.shadow import Shadow, ShadowTable
from router.statistics import RouterStats

_TAKEN_LIMIT: Final = 10_000
_AT_ONCE: Final = 64
"""Claims written to the journal together."""

Begin = Callable[[Arrival | Refusal], None]
"""Takes a task that no router has said a word about."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Takeover:
    """Takes tasks over when they are due. Owned by the router's event loop.

    Args:
        shadows: Tasks of other routers.
        book: The routers of the site.
        dispatcher: Runs the tasks of this router.
        fleet: What the nodes offer.
        replies: Tells clients.
        ledger: Journal.
        settings: Time limits.
        stats: Counters.
        clock: UTC milliseconds.

    Attributes:
        running: Whether tasks may be taken; not before it is known what others have done.
        taken: Tasks taken over, with the router each was taken from; the latest ones.
    """

    def __init__(
        self,
        *,
        shadows: ShadowTable,
        book: RouterBook,
        dispatcher: Dispatcher,
        fleet: Fleet,
        replies: ReplyDesk,
        ledger: Ledger,
        settings: RouterSettings,
        stats: RouterStats,
        clock: Callable[[], int],
    ) -> None:
        self.running = False
        self.taken: OrderedDict[Key, str] = OrderedDict()
        self._shadows = shadows
        self._book = book
        self._dispatcher = dispatcher
        self._fleet = fleet
        self._replies = replies
        self._ledger = ledger
        self._settings = settings
        self._stats = stats
        self._clock = clock
        self._alarms: list[tuple[int, Key]] = []
        self._alarm_set = asyncio.Event()

    def begin(self) -> None:
        """Take tasks from now on, those that waited among them."""
        self.running = True
        now = self._clock()
        for shadow in self._shadows:
            if shadow.claim is None or self._may_claim(shadow.claim):
                self.schedule(shadow, now)

    def pause(self) -> None:
        """Take nothing until `begin`: what is said of tasks meanwhile may not be heard."""
        self.running = False
        for shadow in self._shadows:
            shadow.doubtful = True

    def router_gone(self, router: str) -> None:
        """Take the loss of a router: see whose turn it is with its tasks."""
        now = self._clock()
        for shadow in self._shadows:
            if shadow.claim is None or shadow.claim.router == router:
                self.schedule(shadow, now)

    def take(self, read: Arrival, *, fence: bool) -> None:
        """Take a task of our own; one that a silent router may have is claimed first.

        What that router's node says counts until the claim has come back: its end is the end.

        Args:
            read: The task.
            fence: Whether there is time and room for that.

        Raises:
            Overloaded: There is no room for it.
            TooLarge: The client may not send tasks of this size.
        """
        doubts = self._book.doubts(read.subject)
        if not doubts or not fence:
            generation = doubts + self._book.order(read.subject).index(self._book.own)
            self._dispatcher.take(read, floor=first_attempt(generation))
            return
        self._dispatcher.vet(read)
        shadow = self._shadows.get(read.key)
        if shadow is None:
            shadow = Shadow(read.key, read=read, reply=read.reply, deadline=read.deadline)
            self._shadows.enter(shadow)
        elif shadow.read is None:
            shadow.read, shadow.reply = read, read.reply
            self._shadows.weigh(shadow)
        self.schedule(shadow, self._clock())

    def schedule(self, shadow: Shadow, now: int) -> None:
        """Have a task taken when it is our turn, unless somebody claims it before.

        Args:
            shadow: The task; one that has not arrived itself stays with its router.
            now: From when the others are waited for, UTC milliseconds.
        """
        if shadow.read is None or not self.running:
            return
        others = shadow.claim is not None and shadow.claim.router != self._book.own
        if shadow.doubtful and others and now > shadow.deadline:
            return  # it has most likely ended: the journal of the router that had it knows
        place = self._book.order(shadow.subject).index(self._book.own)
        shadow.due = now + place * self._settings.takeover_ms
        heapq.heappush(self._alarms, (shadow.due, shadow.key))
        self._alarm_set.set()

    async def keep_time(self, begin: Begin) -> None:
        """Take over what is due; runs until cancelled."""
        while True:
            self._alarm_set.clear()
            await self._ring(self._clock(), begin)
            delay_s = max(0, self._alarms[0][0] - self._clock()) / 1000 if self._alarms else None
            try:
                async with asyncio.timeout(delay_s):
                    await self._alarm_set.wait()
            except TimeoutError:
                continue

    async def _ring(self, now: int, begin: Begin) -> None:
        claims: list[Coroutine[Any, Any, None]] = []  # the journal writes many at once
        while self._alarms and self._alarms[0][0] <= now and len(claims) < _AT_ONCE:
            due, key = heapq.heappop(self._alarms)
            shadow = self._shadows.get(key)
            if shadow is None or shadow.due != due or not self.running:
                continue
            shadow.due, read = None, shadow.read
            fresh = self._book.alone and not shadow.journaled
            if isinstance(read, Refusal) or (read is not None and fresh):
                self._shadows.drop(key)
                begin(read)
                if shadow.cancelled:
                    self._dispatcher.cancel(read.key)
            elif read is not None and (shadow.claim is None or self._may_claim(shadow.claim)):
                claims.append(self._claim(shadow, read))
        async with asyncio.TaskGroup() as group:
            for claim in claims:
                group.create_task(claim)

    def _may_claim(self, claim: Claim) -> bool:
        return claim.router == self._book.own or not self._book.is_live(claim.router)

    async def _claim(self, shadow: Shadow, arrival: Arrival) -> None:
        """Journal a task and say that it is ours; `fenced` goes on with it.

        That very word comes back behind all that was said of the task before: only then it is known
        how far it has come, and whether it has not ended long ago.
        """
        try:
            known = await self._ledger.journal(shadow.entry(arrival, encode(arrival.task), None))
        except FoamError as error:
            _log.warning("task.not_taken_over", task=arrival.task_id, error=error.message)
            self.schedule(shadow, self._clock() + self._settings.takeover_ms)
            return
        shadow.journaled, claim = True, shadow.claim
        if self._shadows.get(shadow.key) is not shadow:  # it has ended since we asked
            unknown = self._replies.recall(arrival.key) is None
            if unknown and self._dispatcher.live(arrival.key) is None:
                self._ledger.forget(arrival.key)
            return
        if claim is not None and not self._may_claim(claim):
            self.note_claim(shadow)
            return
        if known is not None and known.terminal is not None:
            self._shadows.drop(shadow.key)
            self._replies.repeat(known.reply, [known.terminal])
            return
        if claim is None or claim.router != self._book.own:
            place = self._book.order(shadow.subject).index(self._book.own)
            generation = max(shadow.next_generation, self._book.doubts(shadow.subject)) + place
            attempt = first_attempt(generation)
            first = self._book.order(shadow.subject)[0]  # it may have taken it without being heard
            lost = claim.router if claim is not None else first
            shadow.lost = lost if lost != self._book.own else ""
            shadow.claim = Claim(self._book.own, attempt)
        self.repeat_claim(shadow)
        self.schedule(
            shadow, self._clock() + self._settings.takeover_ms
        )  # if it does not come back

    def note_claim(self, shadow: Shadow) -> None:
        """Note whose a task is that stands in the journal: a restarted router leaves it to them."""
        if shadow.journaled and shadow.claim is not None:
            own = shadow.claim.router == self._book.own
            router = None if own else shadow.claim.router
            self._ledger.note_claim(shadow.key, router, shadow.claim.attempt)

    def restore(self, entries: list[Entry]) -> None:
        """Take up what an earlier process had, and watch over what it had left to others."""
        own = []
        for entry in entries:
            if entry.claimed_by is None:
                own.append(entry)
            else:
                claim = Claim(entry.claimed_by, entry.claimed_from)
                self._shadows.enter(Shadow.of(entry, claim))
        self._dispatcher.restore(own)

    def repeat_claim(self, shadow: Shadow) -> None:
        """Say that a task is ours which is not gone on with yet."""
        if shadow.claim is None or not isinstance(shadow.read, Arrival):
            return
        self._replies.say(
            shadow.read.reply,
            Accepted(
                task=shadow.key[1],
                at=self._clock(),
                router=self._book.own,
                deadline=shadow.deadline or shadow.read.deadline,
                attempt=shadow.claim.attempt,
            ),
        )

    def fenced(self, key: Key, claim: Claim) -> None:
        """Go on with a task: our claim has come back, everything before it has been heard."""
        shadow = self._shadows.get(key)
        if shadow is None or shadow.claim != claim or not isinstance(shadow.read, Arrival):
            return
        self._shadows.drop(key)
        self.note_claim(shadow)
        entry = self._journaled(shadow, shadow.read)
        self._dispatcher.restore([entry], floor=claim.attempt, settled=True, missed=shadow.doubtful)
        if shadow.cancelled:
            self._dispatcher.cancel(key)
        if shadow.lost:
            self._stats.taken_over += 1
            self.taken[key] = shadow.lost
            if len(self.taken) > _TAKEN_LIMIT:
                self.taken.popitem(last=False)
        _log.info(
            "task.taken_over",
            client=key[0],
            task=key[1],
            router=shadow.lost or None,
            shown=shadow.next_seq,
        )

    def _journaled(self, shadow: Shadow, arrival: Arrival) -> Entry:
        """Note in the journal how far a task has come that was entered there just now."""
        route = shadow.route
        record = self._fleet.records.get((route.node, route.function)) if route else None
        if record is not None and route is not None and record.version != route.version:
            record = None
        entry = shadow.entry(arrival, encode(arrival.task), record)
        if route is not None:
            self._ledger.note_route(
                arrival.key,
                node=route.node,
                function=route.function,
                version=route.version,
                attempt=route.attempt,
                continues=entry.continues,
                model=entry.model,
            )
        if entry.next_seq:
            chunks = entry.chunks or b""
            self._ledger.note_shown(arrival.key, entry.next_seq, since=0, chunks=chunks)
        return entry
