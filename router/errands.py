"""What a task's machine wants done with nodes: asked, told, learnt about.

What comes of it at once (nobody may be asked any more, a node is not there) is returned as the next
event of the machine.
"""

import asyncio
from collections.abc import Callable
from typing import assert_never

import structlog

from capability_schemas.errors import FoamError
from router import events as ev
from router.catalogue import Fleet
from router.events import Event
from router.inquiry import InquiryDesk
from router.live import LiveTask
from router.messages import make_invocation, make_routed
from router.notes import TaskNotes
from router.orders import OrderDesk
from router.replies import ReplyDesk
from router.routing import TaskRouting
from router.statistics import RouterStats
from router.usher import Usher

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Errand = ev.Announce | ev.Invoke | ev.Ask | ev.Learn | ev.CancelNode | ev.TakeBack


class Errands:
    """Does them. Owned by the router's event loop; nothing awaits.

    Args:
        orders: Tells nodes what to do.
        fleet: Nodes and records.
        routing: Says who may be asked, and learns.
        replies: Tells clients.
        notes: Tells the journal.
        stats: Counters.
        usher: Counts what nodes have.
        router_id: This router.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        orders: OrderDesk,
        fleet: Fleet,
        routing: TaskRouting,
        replies: ReplyDesk,
        notes: TaskNotes,
        stats: RouterStats,
        usher: Usher,
        router_id: str,
        clock: Callable[[], int],
    ) -> None:
        self._orders = orders
        self._routing = routing
        self._replies = replies
        self._notes = notes
        self._stats = stats
        self._usher = usher
        self._router_id = router_id
        self._clock = clock
        self._inquiries = InquiryDesk(orders=orders, fleet=fleet, routing=routing)

    def run(self, live: LiveTask, action: Errand) -> Event | None:
        """Do what the machine of a task wants; return what comes of it at once."""
        match action:
            case ev.Announce():
                return self._announce(live, action)
            case ev.Invoke():
                return self._invoke(live, action)
            case ev.Ask():
                return self._ask(live, action)
            case ev.Learn():
                self._learn(action)
            case ev.CancelNode() | ev.TakeBack():
                self._order(live, action)
            case _:
                assert_never(action)
        return None

    def _invoke(self, live: LiveTask, action: ev.Invoke) -> Event | None:
        arrival, choice, now = live.arrival, action.choice, self._clock()
        objection = (
            self._routing.objection(live.wanted, choice, now) if action.attempt > 1 else None
        )
        if objection is not None:
            return ev.Uninvoked(objection, action.attempt)
        # The journal hears of it when the session has written: nobody waits for that. The client,
        # and this router after a restart, hears of it before the node does.
        asyncio.get_running_loop().call_soon(self._notes.route, live, action)
        if not action.announced:
            self._replies.say(arrival.reply, make_routed(arrival, action, now))
        try:
            self._orders.invoke(
                choice.node,
                make_invocation(
                    arrival,
                    action,
                    policy=self._routing.policy(live.wanted),
                    router=self._router_id,
                    now=now,
                    priority=live.level,
                ),
            )
        except FoamError as error:
            return ev.Uninvoked(error, action.attempt)
        if not action.hold:
            self._usher.hold(live, (choice.node, choice.function))
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
        return None

    def _announce(self, live: LiveTask, action: ev.Announce) -> Event | None:
        """Raise the fence: the event comes back to us behind all that the node before has said."""
        now = self._clock()
        if not action.last:
            objection = self._routing.objection(live.wanted, action.choice, now)
            if objection is not None:
                return ev.Uninvoked(objection, action.attempt)
            self._usher.hold(live, (action.choice.node, action.choice.function))
        self._notes.attempt(live, action.attempt)
        self._replies.say(live.arrival.reply, make_routed(live.arrival, action, now))
        return None

    def _ask(self, live: LiveTask, action: ev.Ask) -> Event | None:
        if action.node is None:
            self._inquiries.search(live, self._clock())
        elif not self._inquiries.ask(live.arrival, action.node, action.attempt):
            return ev.NodeGone(action.node, "it is not there")
        return None

    def _learn(self, action: ev.Learn) -> None:
        choice = action.choice
        self._routing.learn(
            choice.node, choice.function, action.verdict, self._clock(), took_ms=action.took_ms
        )
        if action.verdict == "good":
            self._stats.times.add(choice.function, choice.version, action.took_ms)

    def _order(self, live: LiveTask, action: ev.CancelNode | ev.TakeBack) -> None:
        client, task = live.arrival.key
        try:
            self._orders.control(
                action.node,
                "cancel" if isinstance(action, ev.CancelNode) else "return",
                task=task,
                client=client,
                attempt=action.attempt,
                reason=action.reason if isinstance(action, ev.CancelNode) else "",
            )
        except FoamError as error:
            _log.warning("control.dropped", node=action.node, error=error.message)
