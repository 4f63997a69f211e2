"""Drives the machines of all live tasks: events in, their actions out, and their time kept."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from functools import partial
from typing import Any, Final, Protocol

import structlog

from broker.audit import Tally
from broker.session.base import Message
from capability_schemas.errors import FoamError, Overloaded
from capability_schemas.invocation import Report
from capability_schemas.reply import Accepted, Working
from capability_schemas.wire import encode
from router.catalogue import Fleet
from router.choosing import Chooser
from router.commons import Commons
from router.doubt import DoubtingMachine
from router.entry import Entry
from router.errands import Errands
from router.events import (
    Action,
    CancelAsked,
    Choose,
    End,
    Event,
    Fenced,
    Journaled,
    MarkShown,
    Missed,
    MoveAsked,
    NodeGone,
    Phase,
    Reported,
    SendAccepted,
    Shed,
    Tick,
    Unjournaled,
    Wait,
)
from router.intake import Arrival
from router.ledger import Ledger
from router.live import AlarmClock, LiveTask
from router.meaning import Query
from router.messages import make_final
from router.notes import TaskNotes
from router.observation import Observation
from router.orders import OrderDesk
from router.quota import Quotas
from router.replies import Key, Outcome, ReplyDesk
from router.routing import TaskRouting
from router.settings import RouterSettings
from router.shadow import Route
from router.statistics import RouterStats
from router.usher import Usher
from router.verdicts import is_want_of_room
from router.waiting import Drain

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_ASKED_PER_MS: Final = 4
_REFUSALS: Final = ("policy_denied", "unauthorized", "overloaded", "too_large")


class Spawn(Protocol):
    """Runs a coroutine in the background, as ``Service.spawn`` does."""

    def __call__(self, coro: Coroutine[Any, Any, None], *, name: str) -> object:
        """Run it."""
        ...


def note_refusal(tally: Tally, client: str, code: str | None, error: FoamError | None) -> None:
    """Count a task that was refused for want of rights or quota; other ends pass."""
    if code in _REFUSALS:
        message = error.message if error is not None else ""
        tally.note("task_refused", actor=client, subject=code, message=message)


class Dispatcher:
    """All live tasks of a router. Owned by its event loop; nothing awaits between check and act.

    Args:
        orders: Tells nodes what to do.
        ledger: Journal.
        fleet: Nodes and records.
        routing: Finds candidates.
        replies: Tells clients.
        stats: Counters.
        router_id: This router.
        settings: Limits and time limits.
        quotas: What each client may have.
        refusals: Counts what policy forbids, for the audit trail.
        clock: UTC milliseconds.
        spawn: Runs background work in the router's life cycle.
    """

    def __init__(
        self,
        *,
        orders: OrderDesk,
        ledger: Ledger,
        fleet: Fleet,
        routing: TaskRouting,
        replies: ReplyDesk,
        stats: RouterStats,
        router_id: str,
        settings: RouterSettings,
        quotas: Quotas,
        refusals: Tally,
        clock: Callable[[], int],
        spawn: Spawn,
    ) -> None:
        self._ledger = ledger
        self._fleet = fleet
        self._routing = routing
        self._replies = replies
        self._stats = stats
        self._router_id = router_id
        self._settings = settings
        self._quotas = quotas
        self._refusals = refusals
        self._clock = clock
        self._spawn = spawn
        self._commons = Commons.of(settings)
        self._notes = TaskNotes(ledger)
        self._live: dict[Key, LiveTask] = {}
        self._alarms = AlarmClock(self._live)
        self._informed = asyncio.Event()
        self.usher = Usher(
            floor=self,
            fleet=fleet,
            settings=settings,
            stats=stats,
            weight=quotas.weight,
            ready=self._informed.is_set,
            clock=clock,
        )
        self._chooser = Chooser(
            routing=routing,
            settings=settings,
            stats=stats,
            others_wait_for=self.usher.others_wait_for,
            clock=clock,
        )
        self._drain = Drain()
        self._overflowed = False
        self._asked_by = 0
        self._errands = Errands(
            orders=orders,
            fleet=fleet,
            routing=routing,
            replies=replies,
            notes=self._notes,
            stats=stats,
            usher=self.usher,
            router_id=router_id,
            clock=clock,
        )

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveTask]:
        return iter(tuple(self._live.values()))

    def live(self, key: Key) -> LiveTask | None:
        """Return a task that has not ended."""
        return self._live.get(key)

    # ---- events in

    def be_informed(self) -> None:
        """Start to choose nodes: what is known of the mesh is complete."""
        self._informed.set()

    def hold(self) -> None:
        """Choose nobody and let no time pass until `be_informed`: the router is cut off."""
        self._informed.clear()

    def retry_ms(self) -> int:
        """Return when a client that is turned away should come back, milliseconds, as measured."""
        return self._drain.retry_ms(self._clock())

    def take(self, arrival: Arrival, *, floor: int = 1) -> None:
        """Take a task; one whose key is live is a repetition of it.

        Args:
            arrival: The task.
            floor: Number of its first attempt.

        Raises:
            Overloaded: As many tasks are live as may be, or the client has had its share.
            TooLarge: The client may not send tasks of this size.
        """
        if arrival.key in self._live:
            self.accept_again(self._live[arrival.key])
            return
        self.vet(arrival)
        self._quotas.restore(arrival.client)
        machine = DoubtingMachine(
            deadline=arrival.deadline, settings=self._settings, commons=self._commons
        )
        machine.turns.floor = floor
        live = self._live[arrival.key] = LiveTask(arrival, machine)
        self._spawn(self._start(live), name="task")

    def vet(self, arrival: Arrival) -> None:
        """Refuse a task for which there is no room; one that is not refused counts at its rate.

        Args:
            arrival: The task.

        Raises:
            Overloaded: As for `take`.
            TooLarge: As for `take`.
        """
        self._quotas.admit(arrival.client, arrival.size_bytes)
        full = len(self._live) >= self._settings.live_limit
        if full and not self.usher.make_way(arrival.client, arrival.task.priority):
            self._quotas.refund(arrival.client, arrival.size_bytes)
            raise Overloaded(
                f"{len(self._live)} tasks are live, the limit of this router",
                retry_after_ms=self.retry_ms(),
            )
        self._quotas.end(arrival.client)

    def accept_again(self, live: LiveTask) -> None:
        """Answer a repeated id of a live task; nothing before the first ``accepted`` is out."""
        if live.machine.phase is not Phase.RECEIVED:
            self._say_accepted(live)

    def report(self, report: Report) -> None:
        """Take a node's report."""
        live = self._live.get((report.client, report.task))
        if live is not None:
            place = live.place_of(report)
            if place is not None and report.status == "admitted":
                self.usher.take(place)
            elif place is not None and is_want_of_room(report):
                self.usher.rest(place, report.retry_after_ms)
            moves = live.machine.moves
            self._feed(live, Reported(report))
            self._stats.moved += live.machine.moves - moves

    def observe(self, observation: Observation) -> None:
        """Take what a node told a client."""
        live = self._live.get((observation.client, observation.task_id))
        if live is not None:
            self._feed(live, observation.event)

    def fenced(self, key: Key, route: Route) -> None:
        """Take it that our own ``routed`` of a task has come back: all before it has been heard."""
        live = self._live.get(key)
        if live is None:
            return
        record = self._fleet.records.get((route.node, route.function))
        origin = route.origin(record)
        self._feed(live, Fenced(route.attempt, "" if route.last else route.node, origin))

    def connected(self, *, up: bool) -> None:
        """Take it that the connection is there (again), or lost: until then no node can answer."""
        self._commons.line.up = up
        if up:
            self.missed()  # the broker may have forgotten the session, or itself

    def missed(self) -> None:
        """Take it that something may not have been heard here: nodes are asked, not all at once."""
        self._overflowed = False
        self._asked_by = self._clock() + len(self) // _ASKED_PER_MS
        for number, live in enumerate(self):
            self._feed(live, Missed(number // _ASKED_PER_MS))

    def overflow(self, _message: Message) -> None:
        """Take note that a word of a node was dropped for want of room; see `missed`."""
        self._overflowed = True

    def node_gone(self, node: str, reason: str) -> None:
        """Take the loss of a node: every task it holds, or may get, hears of it."""
        _log.info("node.gone", node=node, reason=reason)
        event = NodeGone(node, reason)
        for live in list(self._live.values()):
            self._feed(live, event)

    def cancel(self, key: Key) -> None:
        """Take a client's cancellation; nothing when the task is not live."""
        live = self._live.get(key)
        if live is not None:
            self._feed(live, CancelAsked())

    def give_up(self, key: Key) -> None:
        """Forget a task without a word: another router has it."""
        live = self._live.pop(key, None)
        if live is not None:
            live.machine.leave()
            self._quotas.end(live.arrival.client)
            self._let_go(live)

    def restore(
        self,
        entries: Iterable[Entry],
        *,
        floor: int = 1,
        settled: bool = False,
        missed: bool = True,
    ) -> None:
        """Take up tasks that an earlier process, or another router, left.

        Args:
            entries: The tasks.
            floor: Least number of their next attempts.
            settled: Whether nothing is on its way any more that was said of them before.
            missed: Whether something may have been said of them that was never heard here.
        """
        now = self._clock() - (self._settings.settle_ms if settled else 0)
        for entry in entries:
            arrival = Arrival.of(entry)
            machine = DoubtingMachine.restore(
                entry, settings=self._settings, now=now, commons=self._commons, missed=missed
            )
            machine.turns.floor = max(floor, entry.claimed_from)
            self.give_up(arrival.key)  # it may have come once more while it was being taken over
            live = LiveTask(arrival, machine, noted_seq=entry.next_seq)
            machine.may_have = partial(self._routing.may_hold, live.wanted)
            self._live[arrival.key] = live
            self._quotas.restore(arrival.client)
            self.usher.hold(live, (entry.node, entry.function or "") if entry.node else None)
            self._alarms.set(live)

    def note_progress(self) -> None:
        """Journal how far streams have come, see to what was dropped; for the sweep."""
        if self._overflowed and self._clock() >= self._asked_by:
            self.missed()
        self._notes.shown(self._live.values())

    async def keep_time(self) -> None:
        """Wake tasks when their time has come; runs until cancelled."""
        await self._alarms.ring(self._clock, self._wake, self._informed)

    def _wake(self, key: Key) -> None:
        live = self._live.get(key)
        if live is not None:
            self._feed(live, Tick())

    # ---- one task

    async def _start(self, live: LiveTask) -> None:
        """Journal and embed at the same time, then choose.

        Choosing waits for the journal, so that of a burst each task sees where the last one went.
        """
        async with asyncio.TaskGroup() as group:
            embedding = group.create_task(
                self._chooser.embed(live), name=f"router.Dispatcher[{self._router_id}].embed"
            )
            await self._journal(live)
        await self._informed.wait()
        if self._live.get(live.arrival.key) is live:
            self._choose(live, embedding.result())

    async def _journal(self, live: LiveTask) -> None:
        arrival = live.arrival
        entry = Entry(
            client=arrival.client,
            task_id=arrival.task_id,
            task=encode(arrival.task),
            reply=arrival.reply,
            accepted_at=arrival.received_at,
            deadline=arrival.deadline,
            claimed_from=live.machine.turns.floor,
        )
        try:
            known = await self._ledger.journal(entry)
        except FoamError as error:
            known = await self._known_still(arrival.key)
            if known is None:
                self._feed(live, Unjournaled(error))
                return
        if known is None:
            self._stats.accepted += 1
            self._feed(live, Journaled())
            return
        if self._live.get(arrival.key) is live:
            del self._live[arrival.key]
            self._quotas.refund(arrival.client, arrival.size_bytes)
        self._stats.repeated += 1
        if known.terminal is not None:
            self._replies.repeat(known.reply, [known.terminal])
        else:
            self._say_accepted(live)

    async def _known_still(self, key: Key) -> Entry | None:
        """Return what a journal knows of a task that it cannot write: a full disk can be read."""
        try:
            return await self._ledger.find(*key)
        except FoamError:
            return None

    def _choose(
        self, live: LiveTask, query: Query | FoamError | None, *, called: bool = False
    ) -> None:
        self._feed(live, self._chooser.choose(live, query, called=called))

    async def _choose_again(self, live: LiveTask) -> None:
        query = await self._chooser.embed(live)
        await self._informed.wait()
        if self._live.get(live.arrival.key) is live:
            self._choose(live, query, called=live.waited)

    def _feed(self, live: LiveTask, event: Event) -> None:
        for action in live.machine.handle(event, self._clock()):
            self._do(live, action)
        self._alarms.set(live)

    # ---- actions out

    def _do(self, live: LiveTask, action: Action) -> None:
        match action:
            case SendAccepted():
                self._say_accepted(live)
            case Choose() | Wait():
                self._step_back(live, action)
            case MarkShown():
                self._notes.chunk(live)
            case End():
                self._finish(live, action)
            case _:
                event = self._errands.run(live, action)
                if event is not None:
                    self._feed(live, event)

    def _step_back(self, live: LiveTask, action: Choose | Wait) -> None:
        """Take a task from its node, to choose for it anew or have it wait."""
        self._let_go(live)
        if isinstance(action, Wait):
            self._notes.forget_candidates(live)
            if action.places:
                self.usher.enter(live, action.places)
        else:
            self._spawn(self._choose_again(live), name="task")

    def _say_accepted(self, live: LiveTask) -> None:
        arrival = live.arrival
        self._replies.say(
            arrival.reply,
            Accepted(
                task=arrival.task_id,
                at=self._clock(),
                router=self._router_id,
                deadline=arrival.deadline,
                attempt=live.machine.turns.floor if live.machine.turns.floor > 1 else None,
            ),
        )

    def _finish(self, live: LiveTask, end: End) -> None:
        arrival, now = live.arrival, self._clock()
        if self._live.get(arrival.key) is live:
            del self._live[arrival.key]
            self._quotas.end(arrival.client)
        self._let_go(live)
        if not end.journaled:
            self._stats.refused[end.code or ""] += 1
            if end.error is not None:
                self._replies.refuse(arrival.reply, arrival.task_id, end.error)
            return
        self._drain.left(now)
        self._notes.explanation(live)
        self._stats.ended[end.code or "result"] += 1
        note_refusal(self._refusals, arrival.client, end.code, end.error)
        self._stats.missed_chunks += live.machine.course.shown.missed
        outcome = Outcome(
            key=arrival.key,
            reply=arrival.reply,
            seq=end.seq,
            attempt=end.attempt,
            terminal=end.payload if end.payload is not None else make_final(arrival, end, now),
            code=end.code,
            ended_at=now,
            told=end.payload is not None and not end.retell,
            shown=tuple(live.machine.course.shown.chunks),
        )
        self._replies.remember(outcome)
        self._spawn(self._replies.conclude(outcome), name="conclude")
        _log.info(
            "task.ended",
            client=arrival.client,
            task=arrival.task_id,
            outcome=end.code or "result",
            node=live.machine.node,
            attempt=live.machine.attempt,
            total_ms=now - arrival.received_at,
        )

    def _let_go(self, live: LiveTask) -> None:
        """Take a task from its node, or out of the waiting room."""
        self.usher.hold(live, None)
        self.usher.leave(live.arrival.key)

    # ---- what the usher has done (`router.usher.Floor`)

    def call_in(self, key: Key, level: int, node: str | None = None) -> None:
        """Choose for a task that has waited, by which its priority has risen; who has room now."""
        live = self._live.get(key)
        if live is None:
            return
        live.level, live.called_by = level, node
        if self._routing.is_current(live.query):
            self._choose(live, live.query, called=True)
        else:
            self._spawn(self._choose_again(live), name="task")

    def shed(self, key: Key, error: Overloaded) -> None:
        """End a task for which there is no room."""
        live = self._live.get(key)
        if live is not None:
            self._feed(live, Shed(error))

    def remind(self, key: Key, reason: str) -> None:
        """Tell a client that its task waits."""
        live = self._live.get(key)
        if live is not None:
            event = Working(task=live.arrival.task_id, at=self._clock(), reason=reason)
            self._replies.say(live.arrival.reply, event)

    def movable(self) -> list[LiveTask]:
        """Return the tasks that may be taken back from their nodes."""
        # The next task of a session had better wait where its memory is.
        return [
            live
            for live in self._live.values()
            if live.arrival.task.session is None and live.machine.movable
        ]

    def move(self, key: Key, to: str) -> None:
        """Take a task back from its node, if policy lets another one have it."""
        live = self._live.get(key)
        if live is not None and self._routing.may_have(
            live.wanted, live.held_by, to, self._clock()
        ):
            self._feed(live, MoveAsked())
