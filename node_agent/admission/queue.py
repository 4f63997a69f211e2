"""The admission queue: what waits, what runs, what runs next, how long a new entry waits. Pure.

Among those that wait, the higher priority goes first, then what has a deadline within `URGENT_MS`
by that (earliest deadline first: Liu and Layland, JACM 1973), the rest as it came: routers send
tasks in the order in which they are due and fair, which deadlines that are far away must not upset,
nor what was predicted for those that are here. So that nothing starves, an entry rises by one
priority for every `AGING_MS` it has waited, up to the highest.

Two limits hold at a time: places of a *group* (the instances that several functions may share) and
the concurrency of each function in it. Time comes from outside, in UTC milliseconds.
"""

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from capability_schemas.errors import DeadlineExceeded, Overloaded

AGING_MS: Final = 10_000
"""Wait after which an entry counts as one priority higher, milliseconds."""

URGENT_MS: Final = 1_000
"""Time left at arrival below which a deadline is a reason to go before others, milliseconds."""

_HIGHEST: Final = 9
_SMOOTHING: Final = 0.2
"""Weight of the newest run in the smoothed run time."""

_LEAST_RETRY_MS: Final = 50
_UNKNOWN_RUN_MS: Final = 500.0
"""Retry hint while no run of a group has ended yet, milliseconds."""

_SPARE: Final = 16
"""Stale items a heap may hold beyond as many as live ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An invocation that wants to run.

    Attributes:
        key: Its identity, unique among what waits or runs.
        group: Which instances can run it.
        function: Its function.
        priority: 0 (last) to 9 (first).
        deadline: UTC milliseconds.
        run_ms: How long it will hold its place, predicted, milliseconds; None when unknown.
        least_ms: What its run takes at the very least, milliseconds: with less time than that left
            it cannot end in time.
        nested: Whether something that runs here waits for it.
    """

    key: str
    group: str
    function: str
    priority: int = 5
    deadline: int
    run_ms: float | None = None
    least_ms: float = 0.0
    nested: bool = False

    @property
    def start_by(self) -> int:
        """Latest sensible start, UTC milliseconds."""
        return self.deadline - math.ceil(self.least_ms)


@dataclass(slots=True)
class _Waiter:
    entry: Entry
    number: int
    level: int
    due: int

    @property
    def rank(self) -> tuple[int, int, int]:
        return (-self.level, self.due, self.number)


@dataclass(slots=True)
class _Lane:
    """One function in a group."""

    limit: int
    running: int = 0
    waiting: int = 0
    heap: list[tuple[tuple[int, int, int], str]] = field(default_factory=list)


@dataclass(slots=True)
class _Group:
    most: int
    measured: int | None = None
    offered: bool = True
    running: int = 0
    waiting: int = 0
    nested: int = 0
    run_ms: float | None = None
    lanes: dict[str, _Lane] = field(default_factory=dict)

    @property
    def places(self) -> int:
        # What something that runs waits for must not be held up by a measured limit: the runner
        # may hold the very place it needs.
        if self.measured is None or self.nested:
            return self.most
        return min(self.most, self.measured)

    @property
    def spoken_for(self) -> int:
        """Places that are held, or will be at once: not by what waits for its own function."""
        return self.running + sum(
            min(lane.waiting, max(0, lane.limit - lane.running)) for lane in self.lanes.values()
        )


class AdmissionQueue:
    """Bounded queue of a node; owned by the agent's event loop.

    Args:
        limit: Most entries that wait, all groups together. What finds a free place does not wait.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._groups: dict[str, _Group] = {}
        self._group_of: dict[str, str] = {}
        self._waiting: dict[str, _Waiter] = {}
        self._running: dict[str, tuple[Entry, int]] = {}
        self._rises: list[tuple[int, int, str]] = []
        self._arrivals = 0

    @property
    def waiting(self) -> int:
        """Entries that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Entries that run."""
        return len(self._running)

    @property
    def capacity(self) -> int:
        """Entries that can run at a time, all groups together."""
        return sum(group.places for group in self._groups.values() if group.offered)

    def configure(self, groups: Mapping[str, Mapping[str, int]]) -> None:
        """Say which groups there are; what waits or runs in any other still goes its way.

        Args:
            groups: By group, how many entries of each of its functions may run at a time. The
                group has as many places as the largest of these.
        """
        self._group_of = {name: group for group, lanes in groups.items() for name in lanes}
        for name, lanes in groups.items():
            group = self._groups.setdefault(name, _Group(most=1))
            group.most = max(lanes.values())
            group.offered = True
            for function, limit in lanes.items():
                group.lanes.setdefault(function, _Lane(limit=limit)).limit = limit
        for name in [name for name in self._groups if name not in groups]:
            self._groups[name].offered = False
            self._drop_group(name)

    def limit_places(self, group: str, places: int | None) -> None:
        """Let fewer entries of a group run at a time than configured.

        Args:
            group: The group; nothing happens when it is gone.
            places: At least 1; None lifts the limit.
        """
        if group in self._groups:
            self._groups[group].measured = places

    def capacity_of(self, group: str) -> int:
        """Return how many entries of a group run at a time at the moment."""
        return self._groups[group].places

    def concurrency_of(self, function: str) -> int | None:
        """Return how many entries of a function can run at a time; None for an unknown one."""
        name = self._group_of.get(function)
        if name is None:
            return None
        group = self._groups[name]
        return min(group.lanes[function].limit, group.places)

    def counts(self, function: str) -> tuple[int, int]:
        """Return how many entries of a function run and wait."""
        lanes = [
            group.lanes[function] for group in self._groups.values() if function in group.lanes
        ]
        return sum(lane.running for lane in lanes), sum(lane.waiting for lane in lanes)

    def running_in(self, group: str) -> int:
        """Return how many entries of a group run."""
        return self._groups[group].running

    def all_running(self) -> list[Entry]:
        """Return what runs."""
        return [entry for entry, _ in self._running.values()]

    def most_of(self, group: str, function: str) -> tuple[int, int]:
        """Return how many entries of a group, and of a function in it, may run as configured."""
        found = self._groups[group]
        return found.most, found.lanes[function].limit

    def is_free(self, group: str, function: str) -> bool:
        """Tell whether a new entry would find a place at once."""
        found = self._groups[group]
        lane = found.lanes[function]
        return lane.running + lane.waiting < lane.limit and found.spoken_for < found.places

    def wait_ms(self, entry: Entry, *, now: int) -> float:
        """Predict how long an entry would wait if it came now, milliseconds.

        What runs and what goes before it, put on the places as they come free (list scheduling:
        Graham, Bell System Technical Journal 1966); runs of unknown length count as nothing.
        """
        group = self._groups[entry.group]
        lane = group.lanes[entry.function]
        if self.is_free(entry.group, entry.function):  # the common case, which needs no list
            return 0.0
        rank = (-entry.priority, _due(entry, now), self._arrivals + 1)
        ahead = (
            sorted(
                (waiter.rank, waiter.entry)
                for waiter in self._waiting.values()
                if waiter.entry.group == entry.group and waiter.rank < rank
            )
            if group.waiting
            else []
        )
        running = [pair for pair in self._running.values() if pair[0].group == entry.group]
        whole = _line_ms(
            (self._left_ms(one, at, group, now) for one, at in running),
            (self._run_ms(one, group) for _, one in ahead),
            group.places,
        )
        own = _line_ms(
            (self._left_ms(o, at, group, now) for o, at in running if o.function == entry.function),
            (self._run_ms(one, group) for _, one in ahead if one.function == entry.function),
            lane.limit,
        )
        return max(whole, own)

    def offer(self, entry: Entry, *, now: int) -> float:
        """Admit an entry of a known group and function.

        Args:
            entry: What wants to run.
            now: UTC milliseconds.

        Returns:
            Predicted wait, milliseconds.

        Raises:
            DeadlineExceeded: Its deadline has passed.
            Overloaded: The queue is full, or it would wait until it cannot end in time any more.
        """
        if entry.deadline <= now:
            raise DeadlineExceeded(
                f"the deadline passed {now - entry.deadline} ms before the node saw it",
                late_ms=now - entry.deadline,
            )
        group = self._groups[entry.group]
        lane = group.lanes[entry.function]
        wait_ms = self.wait_ms(entry, now=now)
        if now + wait_ms >= entry.start_by:
            raise Overloaded(
                f"the wait of {wait_ms:.0f} ms is longer than the time left",
                retry_after_ms=self.retry_ms(entry.group, wait_ms),
            )
        free = self.is_free(entry.group, entry.function)
        if not free and len(self._waiting) >= self._limit:
            raise Overloaded(
                f"{len(self._waiting)} invocations wait, the limit is {self._limit}",
                retry_after_ms=self.retry_ms(entry.group, wait_ms),
            )
        self._arrivals += 1
        waiter = _Waiter(entry, self._arrivals, entry.priority, _due(entry, now))
        self._waiting[entry.key] = waiter
        self._count(entry, 1)
        heapq.heappush(lane.heap, (waiter.rank, entry.key))
        self._let_rise(waiter, now)
        return wait_ms

    def take(self, *, now: int) -> Entry | None:
        """Return the next entry that has a free place, now counted as running; else None.

        Args:
            now: UTC milliseconds.
        """
        self._age(now)
        best: tuple[tuple[int, int, int], str] | None = None
        for group in self._groups.values():
            if not group.waiting or group.running >= group.places:
                continue
            for lane in group.lanes.values():
                head = self._head(lane) if lane.waiting and lane.running < lane.limit else None
                if head is not None and (best is None or head < best):
                    best = head
        if best is None:
            return None
        entry = self._waiting.pop(best[1]).entry
        self._count(entry, -1)
        group = self._groups[entry.group]
        group.running += 1
        group.lanes[entry.function].running += 1
        self._running[entry.key] = (entry, now)
        return entry

    def remove(self, key: str) -> Entry | None:
        """Take a waiting entry out; None when it does not wait."""
        waiter = self._waiting.pop(key, None)
        if waiter is None:
            return None
        self._count(waiter.entry, -1)
        self._drop_group(waiter.entry.group)
        return waiter.entry

    def hopeless(self, *, now: int) -> list[Entry]:
        """Take out and return the waiting entries that cannot end in time any more."""
        late = [one.entry for one in self._waiting.values() if one.entry.start_by <= now]
        for entry in late:
            self.remove(entry.key)
        return late

    @property
    def next_start_by(self) -> int | None:
        """When the next waiting entry becomes hopeless, UTC milliseconds."""
        return min((one.entry.start_by for one in self._waiting.values()), default=None)

    def finished(self, key: str, *, run_ms: float | None) -> None:
        """Free the place of an entry that ran.

        Args:
            key: The entry.
            run_ms: How long it ran, milliseconds; None when that says nothing (it failed early).
        """
        found = self._running.pop(key, None)
        if found is None:
            return
        entry, _ = found
        group = self._groups[entry.group]
        group.running -= 1
        group.lanes[entry.function].running -= 1
        if run_ms is not None:
            old = group.run_ms
            group.run_ms = run_ms if old is None else old + _SMOOTHING * (run_ms - old)
        self._drop_group(entry.group)

    def retry_ms(self, group: str, wait_ms: float) -> int:
        """Return when another try is sensible: once a place has come free, milliseconds.

        Args:
            group: The group.
            wait_ms: Predicted wait, if any.
        """
        found = self._groups[group]
        run_ms = _UNKNOWN_RUN_MS if found.run_ms is None else found.run_ms
        soonest = run_ms / found.places
        return max(_LEAST_RETRY_MS, math.ceil(min(wait_ms, soonest) if wait_ms else soonest))

    def _count(self, entry: Entry, change: int) -> None:
        """Count an entry into, or out of, those that wait."""
        group = self._groups[entry.group]
        lane = group.lanes[entry.function]
        group.waiting += change
        lane.waiting += change
        group.nested += change * entry.nested
        if len(lane.heap) > 2 * lane.waiting + _SPARE:
            lane.heap = [item for item in lane.heap if self._is_current(item)]
            heapq.heapify(lane.heap)

    def _head(self, lane: _Lane) -> tuple[tuple[int, int, int], str] | None:
        while lane.heap and not self._is_current(lane.heap[0]):
            heapq.heappop(lane.heap)  # removed, taken or risen since
        return lane.heap[0] if lane.heap else None

    def _is_current(self, item: tuple[tuple[int, int, int], str]) -> bool:
        waiter = self._waiting.get(item[1])
        return waiter is not None and waiter.rank == item[0]

    def _let_rise(self, waiter: _Waiter, since: int) -> None:
        if waiter.level < _HIGHEST:
            heapq.heappush(self._rises, (since + AGING_MS, waiter.number, waiter.entry.key))

    def _age(self, now: int) -> None:
        """Raise what has waited long enough."""
        while self._rises and self._rises[0][0] <= now:
            due, number, key = heapq.heappop(self._rises)
            waiter = self._waiting.get(key)
            if waiter is None or waiter.number != number:
                continue
            waiter.level += 1
            lane = self._groups[waiter.entry.group].lanes[waiter.entry.function]
            heapq.heappush(lane.heap, (waiter.rank, key))
            self._let_rise(waiter, due)

    def _run_ms(self, entry: Entry, group: _Group) -> float:
        return (group.run_ms or 0.0) if entry.run_ms is None else entry.run_ms

    def _left_ms(self, entry: Entry, started_at: int, group: _Group, now: int) -> float:
        return max(0.0, started_at + self._run_ms(entry, group) - now)

    def _drop_group(self, name: str) -> None:
        """Forget a group nobody offers any more once it is empty."""
        group = self._groups[name]
        if not group.offered and not group.running and not group.waiting:
            del self._groups[name]


def _due(entry: Entry, now: int) -> int:
    """Return by when an entry that comes now should have begun, as far as the order goes."""
    return min(entry.deadline, now + URGENT_MS)


def _line_ms(running: Iterable[float], ahead: Iterable[float], places: int) -> float:
    """Return when a place comes free for the last in line, milliseconds.

    Args:
        running: Time left of what runs, milliseconds.
        ahead: Run times of what goes first, in order, milliseconds.
        places: How many run at a time.
    """
    ends = sorted(running)
    ends = ends[max(0, len(ends) - places) :]  # of more than there are places, the first free none
    ends = [0.0] * (places - len(ends)) + ends  # sorted, hence a heap
    for run_ms in ahead:
        heapq.heapreplace(ends, ends[0] + run_ms)
    return ends[0]
