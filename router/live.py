"""Tasks from their receipt to their end, and the clock that wakes them."""

import asyncio
import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from capability_schemas.invocation import Report
from router.intake import Arrival
from router.meaning import Query
from router.patient import PatientMachine
from router.replies import Key
from router.routing import Wanted
from router.waiting import Place

_IDLE_ALARMS: Final = 1_000


@dataclass(eq=False, slots=True)
class LiveTask:
    """A task from receipt to its end.

    Attributes:
        arrival: What the client wants.
        machine: Its state.
        explanation: Why it went where it went, until all of that is in the journal.
        held_by: Node that has it, and of which function, as counted in the fleet.
        query: Its words, embedded; None while they are not, or it names its function.
        waited: Whether it ever had to wait for room.
        level: To what its priority has risen by that; None: it has not waited.
        called_by: Node that it was called in for at last.
        noted_seq: ``next_seq`` as journaled.
        wake_at: Its entry in the clock, UTC milliseconds.
    """

    arrival: Arrival
    machine: PatientMachine
    explanation: Callable[[], dict[str, Any]] | None = None
    held_by: Place | None = None
    query: Query | None = None
    waited: bool = False
    level: int | None = None
    called_by: str | None = None
    noted_seq: int = 0
    wake_at: int | None = None
    wanted: Wanted = field(init=False)

    def __post_init__(self) -> None:
        """Derive what routing needs."""
        arrival = self.arrival
        self.wanted = Wanted(arrival.client, arrival.task, arrival.function, arrival.deadline)

    def place_of(self, report: Report) -> Place | None:
        """Return the place that a report speaks for; None when it is not of who has the task."""
        turn, place = self.machine.turns.current, self.held_by
        if turn is None or place is None or not turn.is_of(report.node, report.attempt):
            return None
        return place if place[0] == report.node else None


class AlarmClock:
    """Wakes tasks when their time has come. Owned by the router's event loop.

    Args:
        tasks: The live ones; alarms of others are passed over.
    """

    def __init__(self, tasks: Mapping[Key, LiveTask]) -> None:
        self._tasks = tasks
        self._alarms: list[tuple[int, Key]] = []
        self._changed = asyncio.Event()

    def set(self, live: LiveTask) -> None:
        """Make sure that it rings for a task no later than it wants; earlier does no harm."""
        wanted = live.machine.wake_at
        if wanted is None or (live.wake_at is not None and live.wake_at <= wanted):
            return
        live.wake_at = wanted
        heapq.heappush(self._alarms, (wanted, live.arrival.key))
        if self._alarms[0][0] == wanted:
            self._changed.set()
        if len(self._alarms) > _IDLE_ALARMS + 3 * len(self._tasks):
            # Deadlines of ended tasks, up to a day ahead.
            self._alarms = [alarm for alarm in self._alarms if alarm[1] in self._tasks]
            heapq.heapify(self._alarms)

    async def ring(
        self, clock: Callable[[], int], wake: Callable[[Key], None], awake: asyncio.Event
    ) -> None:
        """Wake tasks at their time; runs until cancelled.

        Args:
            clock: UTC milliseconds.
            wake: Takes the key of a task.
            awake: While it is not set, all sleep on.
        """
        while True:
            await awake.wait()
            self._changed.clear()
            now = clock()
            while self._alarms and self._alarms[0][0] <= now:
                time, key = heapq.heappop(self._alarms)
                live = self._tasks.get(key)
                if live is not None and live.wake_at == time:
                    live.wake_at = None
                    wake(key)
            delay_s = max(0, self._alarms[0][0] - clock()) / 1000 if self._alarms else None
            try:
                async with asyncio.timeout(delay_s):
                    await self._changed.wait()
            except TimeoutError:
                continue
