"""Drives the machines of all live tasks: events in, their actions out, and their time kept."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, Final, Protocol, assert_never

import structlog

from broker.audit import Tally
from capability_schemas.errors import FoamError, Overloaded
from capability_schemas.invocation import Report
from capability_schemas.reply import Accepted
from capability_schemas.task import FunctionRef, Task, decode_task
from capability_schemas.wire import encode
from router.catalogue import Fleet
from router.commons import Commons
from router.entry import Entry
from router.events import (
    Action,
    Announce,
    CancelAsked,
    CancelNode,
    CheckNode,
    Choice,
    Choose,
    Chosen,
    End,
    Event,
    Fenced,
    Invoke,
    Journaled,
    Learn,
    MarkShown,
    NodeGone,
    Phase,
    Reported,
    SendAccepted,
    Tick,
    Uninvoked,
    Unjournaled,
)
from router.guard import GuardedMachine
from router.intake import Arrival
from router.ledger import Ledger
from router.live import AlarmClock, LiveTask
from router.meaning import Query
from router.messages import make_final, make_invocation, make_routed
from router.notes import TaskNotes
from router.observation import Observation
from router.orders import OrderDesk
from router.quota import Quotas
from router.replies import Key, Outcome, ReplyDesk
from router.routing import TaskRouting
from router.settings import RouterSettings
from router.statistics import RouterStats

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_LIVE_RETRY_MS: Final = 1_000
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
        self._orders = orders
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
        if len(self._live) >= self._settings.live_limit:
            raise Overloaded(
                f"{len(self._live)} tasks are live, the limit of this router",
                retry_after_ms=_LIVE_RETRY_MS,
            )
        self._quotas.admit(arrival.client, arrival.size_bytes)
        machine = GuardedMachine(
            deadline=arrival.deadline, settings=self._settings, commons=self._commons
        )
        machine.turns.floor = floor
        live = self._live[arrival.key] = LiveTask(arrival, machine)
        self._spawn(self._start(live), name="task")

    def accept_again(self, live: LiveTask) -> None:
        """Answer a repeated id of a live task; nothing before the first ``accepted`` is out."""
        if live.machine.phase is not Phase.RECEIVED:
            self._say_accepted(live)

    def report(self, report: Report) -> None:
        """Take a node's report."""
        live = self._live.get((report.client, report.task))
        if live is not None:
            self._feed(live, Reported(report))

    def observe(self, observation: Observation) -> None:
        """Take what a node told a client."""
        live = self._live.get((observation.client, observation.task_id))
        if live is not None:
            self._feed(live, observation.event)

    def fenced(self, key: Key, attempt: int) -> None:
        """Take it that our own ``routed`` of a task has come back: all before it has been heard."""
        live = self._live.get(key)
        if live is not None:
            self._feed(live, Fenced(attempt))

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
            self._hold(live, None)

    def restore(self, entries: Iterable[Entry], *, floor: int = 1, settled: bool = False) -> None:
        """Take up tasks that an earlier process, or another router, left.

        Args:
            entries: The tasks.
            floor: Least number of their next attempts.
            settled: Whether all that was said of them has been heard.
        """
        now = self._clock() - (self._settings.settle_ms if settled else 0)
        for entry in entries:
            task = decode_task(entry.task, limit_bytes=max(len(entry.task), 1))
            arrival = Arrival(
                client=entry.client,
                task_id=entry.task_id,
                task=task,
                reply=entry.reply,
                received_at=entry.accepted_at,
                deadline=entry.deadline,
                function=FunctionRef.parse(task.function) if task.function else None,
            )
            machine = GuardedMachine.restore(
                entry, settings=self._settings, now=now, commons=self._commons
            )
            machine.turns.floor = floor
            self.give_up(arrival.key)  # it may have come once more while it was being taken over
            live = LiveTask(arrival, machine, noted_seq=entry.next_seq)
            self._live[arrival.key] = live
            self._quotas.restore(arrival.client)
            self._hold(live, entry.node)
            self._alarms.set(live)

    def note_progress(self) -> None:
        """Journal how far streams have come; for the sweep."""
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
                self._embed(live), name=f"router.Dispatcher[{self._router_id}].embed"
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
        )
        try:
            known = await self._ledger.journal(entry)
        except FoamError as error:
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

    async def _embed(self, live: LiveTask) -> Query | FoamError | None:
        try:
            return await self._routing.embed(live.wanted)
        except FoamError as error:
            return error
        except Exception as error:  # noqa: BLE001  # supervision boundary: one task, not the router
            _log.error("task.embedding_failed", task=live.arrival.task_id, exc_info=error)
            return FoamError("the router failed to embed the task")

    def _choose(self, live: LiveTask, query: Query | FoamError | None) -> None:
        if isinstance(query, FoamError):
            self._feed(live, Chosen((), query))
            return
        try:
            selection = self._routing.select(live.wanted, query, self._clock())
        except Exception as error:  # noqa: BLE001  # supervision boundary: one task, not the router
            _log.error("task.selection_failed", task=live.arrival.task_id, exc_info=error)
            self._feed(live, Chosen((), FoamError("the router failed to select a node")))
            return
        live.explanation = selection.explain
        chosen = Chosen(
            selection.choices,
            selection.problem,
            min_confidence=selection.min_confidence,
            policy=self._routing.policy(live.wanted),
            hedge_after_ms=self._hedge_after_ms(live.arrival.task, selection.choices),
        )
        self._feed(live, chosen)

    def _hedge_after_ms(self, task: Task, choices: tuple[Choice, ...]) -> int | None:
        """Return after what time the best candidate takes long; None: nobody is asked beside it."""
        if not choices or not choices[0].idempotent or not self._settings.hedge_share:
            return None
        if task.proof:  # what was held back is told by the router: no node has signed it
            return None
        first, samples = choices[0], self._settings.hedge_samples
        return self._stats.times.slow_ms(first.function, first.version, samples=samples)

    async def _choose_again(self, live: LiveTask) -> None:
        query = await self._embed(live)
        await self._informed.wait()
        if self._live.get(live.arrival.key) is live:
            self._choose(live, query)

    def _feed(self, live: LiveTask, event: Event) -> None:
        for action in live.machine.handle(event, self._clock()):
            self._do(live, action)
        self._alarms.set(live)

    # ---- actions out

    def _do(self, live: LiveTask, action: Action) -> None:
        match action:
            case SendAccepted():
                self._say_accepted(live)
            case Choose():
                self._hold(live, None)
                self._spawn(self._choose_again(live), name="task")
            case Announce():
                self._announce(live, action)
            case Invoke():
                self._invoke(live, action)
            case CheckNode():
                self._check_node(live, action.node)
            case Learn():
                self._learn(action)
            case CancelNode():
                self._cancel_node(live, action)
            case MarkShown():
                self._notes.chunk(live)
            case End():
                self._finish(live, action)
            case _:
                assert_never(action)

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

    def _invoke(self, live: LiveTask, action: Invoke) -> None:
        arrival, choice, now = live.arrival, action.choice, self._clock()
        objection = (
            self._routing.objection(live.wanted, choice, now) if action.attempt > 1 else None
        )
        if objection is not None:
            self._feed(live, Uninvoked(objection, action.attempt))
            return
        # The journal hears of it when the session has written: nobody waits for that.
        asyncio.get_running_loop().call_soon(self._notes.route, live, action)
        try:
            self._orders.invoke(
                choice.node,
                make_invocation(
                    arrival,
                    action,
                    policy=self._routing.policy(live.wanted),
                    router=self._router_id,
                    now=now,
                ),
            )
        except FoamError as error:
            self._feed(live, Uninvoked(error, action.attempt))
            return
        if not action.hold:
            self._hold(live, choice.node)
        self._routing.remember(live.wanted, choice, now)
        if action.attempt == 1:
            self._stats.route_ms.append(now - arrival.received_at)
        elif action.hold:
            self._stats.hedged += 1
        elif action.continuation is not None:
            self._stats.continued += 1
        elif action.cascade is not None and action.cascade.steps:
            self._stats.escalated += 1
        else:
            self._stats.rerouted += 1
        if not action.announced:
            self._replies.say(arrival.reply, make_routed(arrival, action, now))

    def _announce(self, live: LiveTask, action: Announce) -> None:
        """Raise the fence: the event comes back to us behind all that the node before has said."""
        now = self._clock()
        if not action.last:
            objection = self._routing.objection(live.wanted, action.choice, now)
            if objection is not None:
                self._feed(live, Uninvoked(objection, action.attempt))
                return
            self._hold(live, action.choice.node)
        self._replies.say(live.arrival.reply, make_routed(live.arrival, action, now))

    def _check_node(self, live: LiveTask, node: str) -> None:
        if not self._fleet.node(node).live:
            self._feed(live, NodeGone(node, "it is not there"))

    def _learn(self, action: Learn) -> None:
        choice = action.choice
        self._routing.learn(
            choice.node, choice.function, action.verdict, self._clock(), took_ms=action.took_ms
        )
        if action.verdict == "good":
            self._stats.times.add(choice.function, choice.version, action.took_ms)

    def _cancel_node(self, live: LiveTask, action: CancelNode) -> None:
        try:
            self._orders.control(
                action.node,
                "cancel",
                task=live.arrival.task_id,
                client=live.arrival.client,
                attempt=action.attempt,
                reason=action.reason,
            )
        except FoamError as error:
            _log.warning("control.dropped", node=action.node, error=error.message)

    def _finish(self, live: LiveTask, end: End) -> None:
        arrival, now = live.arrival, self._clock()
        if self._live.get(arrival.key) is live:
            del self._live[arrival.key]
            self._quotas.end(arrival.client)
        self._hold(live, None)
        if not end.journaled:
            self._stats.refused[end.code or ""] += 1
            if end.error is not None:
                self._replies.refuse(arrival.reply, arrival.task_id, end.error)
            return
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
            told=end.payload is not None,
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

    def _hold(self, live: LiveTask, node: str | None) -> None:
        """Count which node has a task."""
        if live.held_by is not None:
            self._fleet.node(live.held_by).assigned -= 1
        live.held_by = node
        if node is not None:
            self._fleet.node(node).assigned += 1
