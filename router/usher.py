"""Calls waiting tasks in when a node has room, tells those that wait, and has queues evened out.

The joint between the waiting room and the stealing, which are pure, and the dispatcher, which alone
changes tasks. Places that have come free are served in a turn of their own of the event loop, so
that no task is chosen for in the middle of another one's event.
"""

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from capability_schemas.errors import Overloaded
from router.catalogue import Fleet
from router.finish import predict_finish
from router.gates import memory_lacking, tell_loss, tell_sleep
from router.live import LiveTask
from router.rests import Rests
from router.settings import RouterSettings
from router.statistics import RouterStats
from router.stealing import Crowd, Held, Idle, Mover
from router.waiting import Key, Place, Waiter, WaitingRoom

_OVERHEAD_BYTES: Final = 8_192
"""What a waiting task takes beside its message: its machine, its words as a vector (measured)."""

_ABSENCE_MS: Final = 10_000
"""How long tasks wait for a place none of which is there; then they are chosen for anew."""

_TAKERS: Final = 32
"""Idle nodes of a function that are looked at."""

_NAMED: Final = 3
"""Functions that a client is told of which its task waits for."""


class Floor(Protocol):
    """What the usher has done with tasks; the dispatcher does it."""

    def call_in(self, key: Key, level: int, node: str | None = None) -> None:
        """Choose for a task that has waited, by which its priority has risen; who has room now."""
        ...

    def shed(self, key: Key, error: Overloaded) -> None:
        """End a task for which there is no room."""
        ...

    def remind(self, key: Key, reason: str) -> None:
        """Tell a client that its task waits."""
        ...

    def movable(self) -> Iterable[LiveTask]:
        """Return the tasks that may be taken back from their nodes."""
        ...

    def move(self, key: Key, to: str) -> None:
        """Take a task back from its node, if policy lets another one have it."""
        ...


class Usher:
    """Owned by the router's event loop.

    Args:
        floor: Does it.
        fleet: Who is there, and has room.
        settings: Bounds.
        stats: Counters.
        weight: Share of a client relative to others.
        ready: Whether anybody may be chosen at the moment.
        clock: UTC milliseconds.

    Attributes:
        room: Who waits.
    """

    def __init__(
        self,
        *,
        floor: Floor,
        fleet: Fleet,
        settings: RouterSettings,
        stats: RouterStats,
        weight: Callable[[str], float],
        ready: Callable[[], bool],
        clock: Callable[[], int],
    ) -> None:
        self._floor = floor
        self._fleet = fleet
        self._stats = stats
        self._ready = ready
        self._clock = clock
        self._sweep_s = settings.sweep_s
        self.room = WaitingRoom(
            limit=settings.waiting_limit, limit_bytes=settings.waiting_bytes, weight=weight
        )
        self._mover = Mover(per_s=settings.moves_per_s)
        self._given: dict[Place, int] = {}
        self._rests = Rests()
        self._absent: dict[Key, int] = {}
        self._free: set[Place] = set()
        self._serving = False
        self._calling = False

    # ---- in and out

    def enter(self, live: LiveTask, places: frozenset[Place]) -> None:
        """Let a task wait for one of these; who has to go for it is shed."""
        arrival, now = live.arrival, self._clock()
        waiter = Waiter(
            key=arrival.key,
            client=arrival.client,
            priority=arrival.task.priority,
            deadline=arrival.deadline,
            places=places,
            size_bytes=arrival.size_bytes + _OVERHEAD_BYTES,
            since=arrival.received_at,
        )
        self._stats.waited += not live.waited
        live.waited = True
        for one in self.room.enter(waiter, now):
            self._shed(one, now)
        if not self._calling:
            for place in places:  # it may have come free since it was looked at
                self.mark(place)

    def make_way(self, client: str, priority: int) -> bool:
        """Shed a waiting task for a newcomer that goes before it; tell whether there was one."""
        victim = self.room.victim(client, priority)
        if victim is None:
            return False
        self.room.leave(victim.key)
        self._shed(victim, self._clock())
        return True

    def leave(self, key: Key) -> None:
        """Take a task out, if it waits."""
        self.room.leave(key)
        self._absent.pop(key, None)

    def _shed(self, waiter: Waiter, now: int) -> None:
        self._stats.shed[waiter.priority] += 1
        self._absent.pop(waiter.key, None)
        error = Overloaded(
            f"every node that could is busy, and {len(self.room)} tasks that go before it wait",
            retry_after_ms=self.room.retry_ms(waiter, now),
        )
        self._floor.shed(waiter.key, error)

    # ---- places

    def hold(self, live: LiveTask, place: Place | None) -> None:
        """Note which node has a task, and of which function; None: nobody has."""
        before, live.held_by = live.held_by, place
        if before is not None:
            self._count(before, -1)
            self.mark(before)
        if place is not None:
            self._count(place, 1)

    def _count(self, place: Place, change: int) -> None:
        view = self._fleet.node(place[0])
        view.assigned += change
        view.given[place[1]] += change
        if view.given[place[1]] > 0:
            self._given[place] = view.given[place[1]]
        else:
            del view.given[place[1]]
            self._given.pop(place, None)

    def rest(self, place: Place, pause_ms: int | None) -> None:
        """Leave a place alone for a while: its node has just refused for want of room."""
        self._rests.rest(place, self._clock(), wanted_ms=pause_ms or 0)

    def take(self, place: Place) -> None:
        """Take it that a node has admitted a task: it refuses no longer."""
        self._rests.serve(place)

    def heard(self, node: str) -> None:
        """Take it that a node has said how it is: it may have room."""
        if len(self.room):
            for function in self.room.functions:
                self.mark((node, function))

    def mark(self, place: Place) -> None:
        """Serve a place soon, if anybody waits for it."""
        if not self.room.waits_for(place):
            return
        self._free.add(place)
        if not self._serving:
            self._serving = True
            asyncio.get_running_loop().call_soon(self._serve_marked)

    def _serve_marked(self) -> None:
        self._serving = False
        free, self._free = self._free, set()
        for place in sorted(free):
            self._serve(place)

    def _serve(self, place: Place) -> None:
        while self._ready() and self.is_free(place):
            waiter = self.room.call(place, self._clock())
            if waiter is None:
                return
            self._absent.pop(waiter.key, None)
            self._calling = True
            try:
                self._floor.call_in(waiter.key, waiter.level, place[0])
            finally:
                self._calling = False
            if self.room.wants(waiter.key, place):  # of no use at the moment, though it seems free
                self._rests.rest(place, self._clock())
                return

    def is_free(self, place: Place) -> bool:
        """Tell whether a node takes another task of a function, as far as is known."""
        record, view = self._fleet.records.get(place), self._fleet.nodes.get(place[0])
        if record is None or view is None or not view.live or not view.open or view.full:
            return False
        if self._rests.is_resting(place, self._clock()):
            return False
        return view.has_room(record) and memory_lacking(record, view) is None

    def others_wait_for(self, place: Place) -> bool:
        """Tell whether somebody waits for a place who may be before a newcomer."""
        return self.room.waits_for(place)

    # ---- time

    async def keep_time(self) -> None:
        """Look after those that wait, until cancelled."""
        while True:
            await asyncio.sleep(self._sweep_s)
            self.tend()

    def tend(self) -> None:
        """Serve what has come free unnoticed, tell those that wait, even out queues."""
        now = self._clock()
        self._rests.tidy(now)
        if len(self.room):
            for place in self.room.places:
                self.mark(place)
            for waiter in self.room.reminded(now):
                self._floor.remind(waiter.key, self._what_for(waiter, now))
            self._look_for_absent(now)
        if self._given and self._ready():
            self._even_out(now)

    def _look_for_absent(self, now: int) -> None:
        absent = {one.key: one.level for one in self.room.out_of_reach(self._is_there)}
        self._absent = {key: self._absent.get(key, now) for key in absent}
        for key, since in list(self._absent.items()):
            if not 0 <= now - since < _ABSENCE_MS:
                self.leave(key)
                self._floor.call_in(key, absent[key])

    def _what_for(self, waiter: Waiter, now: int) -> str:
        """Say what a task waits for."""
        names = ", ".join(sorted(waiter.functions)[:_NAMED])
        nodes = {node for node, _ in waiter.places}
        views = [view for node in sorted(nodes) if (view := self._fleet.nodes.get(node))]
        if any(view.live for view in views):
            scant = all(self._lacks_memory(place) for place in waiter.places)
            why = "too little memory is free" if scant else "all are busy"
            return f"waits for a node that has room for {names}: {why}"
        asleep = [view for view in views if view.asleep]
        if asleep:
            first = min(asleep, key=lambda view: view.wake_at or math.inf)
            return f"waits for {first.node}, {tell_sleep(first, now)}"
        lost = [view for view in views if view.just_lost(now)]
        if lost:
            return f"waits for {lost[0].node}, lost {tell_loss(lost[0], now)}"
        return f"waits for a node that has {names}: all are away"

    def _lacks_memory(self, place: Place) -> bool:
        record, view = self._fleet.records.get(place), self._fleet.nodes.get(place[0])
        return record is None or view is None or memory_lacking(record, view) is not None

    def _is_there(self, place: Place) -> bool:
        view = self._fleet.nodes.get(place[0])
        return (
            place in self._fleet.records
            and view is not None
            and ((view.live and view.open) or view.asleep)
        )

    # ---- stealing

    def _even_out(self, now: int) -> None:
        crowded: dict[str, list[Place]] = {}
        for place, given in self._given.items():
            if given > self._places(place):
                crowded.setdefault(place[1], []).append(place)
        if not crowded:
            return
        held: dict[Place, list[Held]] = {}
        for live in self._floor.movable():
            turn = live.machine.turns.current
            if live.held_by is not None and turn is not None and live.held_by[1] in crowded:
                held.setdefault(live.held_by, []).append(Held(live.arrival.key, turn.since))
        for function, places in crowded.items():
            lines = [self._crowd(place, held.get(place, [])) for place in places]
            for move in self._mover.moves(lines, self._idle(function), now):
                self._floor.move(move.key, move.to)

    def _crowd(self, place: Place, held: list[Held]) -> Crowd:
        load = self._fleet.node(place[0]).function(place[1])
        return Crowd(place[0], self._places(place), self._given[place], load.total_ms, held)

    def _idle(self, function: str) -> list[Idle]:
        idle = []
        for node, record in self._fleet.named(function).items():
            view = self._fleet.nodes.get(node)
            place = node, function
            if view is None or place in self._given or not self.is_free(place):
                continue
            load = view.function(function)
            if load.degraded or load.running + load.queued >= load.concurrency:
                continue
            idle.append(Idle(node, predict_finish(record, view).wait_ms, load.total_ms))
            if len(idle) >= _TAKERS:
                break
        return idle

    def _places(self, place: Place) -> int:
        view = self._fleet.nodes.get(place[0])
        load = view.load.functions.get(place[1]) if view is not None and view.load else None
        record = self._fleet.records.get(place)
        if load is not None:
            return load.concurrency
        return 1 if record is None else record.resources.concurrency

    def describe(self) -> dict[str, Any]:
        """Return who waits as JSON."""
        return self.room.describe(self._clock())
