"""Admission: which invocations wait, which are turned away, which runs next. Pure, no clock.

An invocation is admitted when there is room and a chance to meet its deadline; what cannot be done
in time is refused at once, while another node still can. Among those that wait, the higher
priority goes first, then the earlier deadline, then the earlier arrival (earliest deadline first:
Liu and Layland, JACM 1973, within a priority).
"""

import heapq
import math
from dataclasses import dataclass, field
from typing import Final

from capability_schemas.errors import DeadlineExceeded, Overloaded

_SMOOTHING: Final = 0.2
"""Weight of the newest run in the smoothed run time."""

_LEAST_RETRY_MS: Final = 50
_UNKNOWN_RUN_MS: Final = 500.0
"""Retry hint while no run of a group has ended yet, milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An invocation that wants to run.

    Attributes:
        key: Its identity, unique among what waits or runs.
        group: Which instances can run it.
        function: Its function, for the figures.
        priority: 0 (last) to 9 (first).
        deadline: UTC milliseconds.
    """

    key: str
    group: str
    function: str
    priority: int = 5
    deadline: int


@dataclass(slots=True)
class _Group:
    capacity: int
    running: int = 0
    waiting: int = 0
    run_ms: float | None = None
    heap: list[tuple[int, int, int, Entry]] = field(default_factory=list)


class AdmissionQueue:
    """Bounded queue of a node; owned by the agent's event loop.

    Args:
        limit: Most entries that wait, all groups together. What finds a free instance does not
            wait.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._groups: dict[str, _Group] = {}
        self._waiting: dict[str, Entry] = {}
        self._running: dict[str, Entry] = {}
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
        return sum(group.capacity for group in self._groups.values())

    def configure(self, group: str, *, capacity: int) -> None:
        """Say how many entries of a group run at a time; the largest of several calls holds.

        Args:
            group: The group.
            capacity: At least 1.
        """
        known = self._groups.get(group)
        if known is None:
            self._groups[group] = _Group(capacity=capacity)
        else:
            known.capacity = max(known.capacity, capacity)

    def counts(self, function: str) -> tuple[int, int]:
        """Return how many entries of a function run and wait."""
        running = sum(entry.function == function for entry in self._running.values())
        return running, sum(entry.function == function for entry in self._waiting.values())

    def wait_ms(self, group: str) -> float:
        """Predict how long a new entry of a group waits, milliseconds.

        Everything ahead of it, at the smoothed run time, over the instances of the group; entries
        of lower priority count too, so this errs on the long side.
        """
        known = self._groups[group]
        ahead = known.running + known.waiting - known.capacity + 1
        if ahead <= 0 or known.run_ms is None:
            return 0.0
        return math.ceil(ahead / known.capacity) * known.run_ms

    def offer(self, entry: Entry, *, now: int) -> float:
        """Admit an entry.

        Args:
            entry: What wants to run.
            now: UTC milliseconds.

        Returns:
            Predicted wait, milliseconds.

        Raises:
            DeadlineExceeded: Its deadline has passed.
            Overloaded: The queue is full, or its deadline would pass while it waits.
        """
        if entry.deadline <= now:
            raise DeadlineExceeded(
                f"the deadline passed {now - entry.deadline} ms before the node saw it",
                late_ms=now - entry.deadline,
            )
        group = self._groups[entry.group]
        wait_ms = self.wait_ms(entry.group)
        if now + wait_ms >= entry.deadline:
            raise Overloaded(
                f"the wait of {wait_ms:.0f} ms is longer than the time left",
                retry_after_ms=self._retry_ms(group),
            )
        if group.running + group.waiting >= group.capacity and len(self._waiting) >= self._limit:
            raise Overloaded(
                f"{len(self._waiting)} invocations wait, the limit is {self._limit}",
                retry_after_ms=self._retry_ms(group),
            )
        self._arrivals += 1
        self._waiting[entry.key] = entry
        group.waiting += 1
        heapq.heappush(group.heap, (-entry.priority, entry.deadline, self._arrivals, entry))
        return wait_ms

    def take(self) -> Entry | None:
        """Return the next entry that has a free instance, now counted as running; else None."""
        best: _Group | None = None
        for group in self._groups.values():
            while group.heap and self._waiting.get(group.heap[0][3].key) is not group.heap[0][3]:
                heapq.heappop(group.heap)  # cancelled or expired while it waited
            ready = group.heap and group.running < group.capacity
            if ready and (best is None or group.heap[0][:3] < best.heap[0][:3]):
                best = group
        if best is None:
            return None
        entry = heapq.heappop(best.heap)[3]
        del self._waiting[entry.key]
        best.waiting -= 1
        best.running += 1
        self._running[entry.key] = entry
        return entry

    def remove(self, key: str) -> Entry | None:
        """Take a waiting entry out; None when it does not wait."""
        entry = self._waiting.pop(key, None)
        if entry is not None:
            self._groups[entry.group].waiting -= 1
        return entry

    def expired(self, *, now: int) -> list[Entry]:
        """Take out and return the waiting entries whose deadline has passed."""
        late = [entry for entry in self._waiting.values() if entry.deadline <= now]
        for entry in late:
            self.remove(entry.key)
        return late

    @property
    def next_deadline(self) -> int | None:
        """The earliest deadline of what waits, UTC milliseconds."""
        return min((entry.deadline for entry in self._waiting.values()), default=None)

    def finished(self, key: str, *, run_ms: float | None) -> None:
        """Free the instance of an entry that ran.

        Args:
            key: The entry.
            run_ms: How long it ran, milliseconds; None when that says nothing (it failed early).
        """
        entry = self._running.pop(key, None)
        if entry is None:
            return
        group = self._groups[entry.group]
        group.running -= 1
        if run_ms is not None:
            old = group.run_ms
            group.run_ms = run_ms if old is None else old + _SMOOTHING * (run_ms - old)

    def _retry_ms(self, group: _Group) -> int:
        run_ms = _UNKNOWN_RUN_MS if group.run_ms is None else group.run_ms
        return max(_LEAST_RETRY_MS, math.ceil(run_ms / group.capacity))
