"""The waiting room: accepted tasks for which every capable node is full. Pure.

Queues at nodes are kept short and the long one stands here (late binding: Ousterhout et al.,
Sparrow, SOSP 2013, section 3.4): a task that waits here goes to whichever node has room first, and
in an order that looks at all clients. Whose turn it is:

1. the highest priority; a task rises by one for every ``AGING_MS`` it has waited, so that nothing
   starves;
2. among clients with tasks of that priority deficit round robin by their weights (Shreedhar and
   Varghese, IEEE/ACM Transactions on Networking 4(3), 1996), one task costing one; a client that
   had nothing waiting goes first once (RFC 8290 section 4.2: sparse flows);
3. of a client's tasks the one with the nearest deadline.

The room is bounded in tasks and bytes. When it is full, the client that has most of it (in relation
to its weight) makes room: its latest task of its lowest priority goes for one of a client that has
less, or has as much and a higher priority. So priority, which clients give themselves, decides
among the tasks of one client and among equals, and nobody can have the tasks of others shed by
sending many, large or important ones.
"""

import heapq
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from capability_schemas.capability import Resources
from capability_schemas.node import FunctionLoad

Place = tuple[str, str]
"""``(node, function)``: what a task waits for."""

Key = tuple[str, str]
"""``(client, task id)``."""

AGING_MS: Final = 10_000
"""Wait after which a task counts as one priority higher, milliseconds; as at nodes."""

LEAD_MS: Final = 100
"""Work a node is given ahead of its places, milliseconds: far more than a round trip, so that it
never stands idle, and less than anybody minds to wait behind."""

_AHEAD: Final = 64
"""Most invocations given ahead, however short they are."""

_MOST_PLACES: Final = 256
"""Most places of a function that a node is believed to have; more of its tasks wait here."""

_PLACE_BYTES: Final = 128
"""What a place takes in a set of them, as measured."""

_HIGHEST: Final = 9
_SPARE: Final = 64
"""Entries of heaps that may be out of date beyond as many as are not."""

_RATE_S: Final = 10.0
_UNKNOWN_MS: Final = 1_000
_LEAST_MS: Final = 50
_MOST_MS: Final = 60_000
_LEAST_RATE_S: Final = 1 / 60
_FUNCTIONS: Final = 2_000
_SHOWN: Final = 100

_FIRST_WORD_MS: Final = 1_000
_LONGEST_SILENCE_MS: Final = 15_000
"""A client hears after a second that its task waits, then ever less often, as from nodes."""


def allowance(load: FunctionLoad | None, resources: Resources) -> int:
    """Return how many invocations of a function a node is given at a time by one router.

    As many as it runs at a time, and what it gets done of them in ``LEAD_MS``. Of a function whose
    run time is not known yet it gets one more than it has places. How many it runs is its own word,
    so that is believed up to a bound: whoever boasts shall not get everything.

    Args:
        load: The function's live figures; None where its node has told none.
        resources: What its record promises.
    """
    places = min(_MOST_PLACES, resources.concurrency if load is None else load.concurrency)
    run_ms = None if load is None else load.total_ms
    if run_ms is None:
        return places + 1
    return places + min(_AHEAD, int(LEAD_MS * places / max(run_ms, 1.0)))


@dataclass(slots=True, kw_only=True, eq=False)
class Waiter:
    """One task that waits.

    Attributes:
        key: Its key.
        client: Whose it is.
        priority: As the client gave it, 0 to 9.
        deadline: UTC milliseconds.
        places: Who could do it; any of them will do.
        size_bytes: What it takes to keep, but for the places.
        since: When it was taken, UTC milliseconds.
        level: Its priority with what it has risen.
        gone: Whether it has left.
        functions: Names of what could do it.
    """

    key: Key
    client: str
    priority: int
    deadline: int
    places: frozenset[Place]
    size_bytes: int
    since: int
    level: int = 0
    gone: bool = False
    functions: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Begin at its own priority."""
        self.level = self.priority
        self.functions = frozenset(function for _, function in self.places)


_Heap = list[tuple[int, int, int, Waiter]]


@dataclass(slots=True)
class _Round:
    """Clients of one function at one level, in turn."""

    fresh: deque[str] = field(default_factory=deque)
    old: deque[str] = field(default_factory=deque)
    heaps: dict[str, dict[frozenset[Place], _Heap]] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)

    def add(self, waiter: Waiter, level: int, number: int) -> None:
        if waiter.client not in self.heaps:
            self.heaps[waiter.client] = {}
            self.left[waiter.client] = 0.0
            self.fresh.append(waiter.client)
        heap = self.heaps[waiter.client].setdefault(waiter.places, [])
        heapq.heappush(heap, (waiter.deadline, number, level, waiter))

    def take(self, place: Place, weight: Callable[[str], float]) -> Waiter | None:
        """Return whose turn it is for a place; None when nobody can use it."""
        for client in self.fresh:
            waiter = self._best(client, place)
            if waiter is not None:
                self.fresh.remove(client)
                self.old.append(client)
                self.left[client] = weight(client) - 1.0
                return waiter
        passed = 0
        while passed < len(self.old):
            client = self.old[0]
            waiter = self._best(client, place)
            if waiter is None:
                if self.heaps[client]:
                    self.old.rotate(-1)
                    passed += 1
                else:  # it has had its turn in this round, and has nothing more
                    self._drop(self.old.popleft())
                continue
            if self.left[client] >= 1.0:
                self.left[client] -= 1.0
                return waiter
            passed = 0  # each turn brings some client nearer to its next task
            self.left[client] += weight(client)
            self.old.rotate(-1)
        for client in [client for client in self.fresh if not self.heaps[client]]:
            self._drop(client)
        self.fresh = deque(client for client in self.fresh if client in self.heaps)
        return None

    def purge(self) -> int:
        """Drop what has left; return how many entries are kept."""
        kept = 0
        for heaps in self.heaps.values():
            for places, heap in list(heaps.items()):
                heap[:] = [item for item in heap if not _is_past(item)]
                heapq.heapify(heap)
                kept += len(heap)
                if not heap:
                    del heaps[places]
        self.heaps = {client: heaps for client, heaps in self.heaps.items() if heaps}
        self.left = {client: left for client, left in self.left.items() if client in self.heaps}
        self.fresh = deque(client for client in self.fresh if client in self.heaps)
        self.old = deque(client for client in self.old if client in self.heaps)
        return kept

    def _drop(self, client: str) -> None:
        del self.heaps[client], self.left[client]

    def _best(self, client: str, place: Place) -> Waiter | None:
        """Return the client's task with the nearest deadline among those that can use a place."""
        best: tuple[int, int, int, Waiter] | None = None
        heaps = self.heaps[client]
        for places in list(heaps):
            heap = heaps[places]
            while heap and _is_past(heap[0]):
                heapq.heappop(heap)
            if not heap:
                del heaps[places]
            elif place in places and (best is None or heap[0][:2] < best[:2]):
                best = heap[0]
        return None if best is None else best[3]


def _is_past(item: tuple[int, int, int, Waiter]) -> bool:
    return item[3].gone or item[3].level != item[2]


class _Stock:
    """What waits of one client, by priority."""

    def __init__(self) -> None:
        self.count = self.size_bytes = 0
        self._ranks: dict[int, OrderedDict[Key, Waiter]] = {}

    @property
    def last(self) -> Waiter:
        """The latest task of the lowest priority."""
        return next(reversed(self._ranks[min(self._ranks)].values()))

    def add(self, waiter: Waiter) -> None:
        self._ranks.setdefault(waiter.priority, OrderedDict())[waiter.key] = waiter
        self.count, self.size_bytes = self.count + 1, self.size_bytes + waiter.size_bytes

    def remove(self, waiter: Waiter) -> None:
        tasks = self._ranks[waiter.priority]
        del tasks[waiter.key]
        if not tasks:
            del self._ranks[waiter.priority]
        self.count, self.size_bytes = self.count - 1, self.size_bytes - waiter.size_bytes


class _Shares:
    """What each client has of the room in relation to its weight, and who has to go for whom."""

    def __init__(self, *, limit: int, limit_bytes: int, weight: Callable[[str], float]) -> None:
        self._limit, self._limit_bytes = max(1, limit), max(1, limit_bytes)
        self._weight = weight
        self._stocks: dict[str, _Stock] = {}
        # Shares as they once were: each client has an entry that is no less than its share now.
        self._known: list[tuple[float, str]] = []

    def add(self, waiter: Waiter) -> None:
        self._stocks.setdefault(waiter.client, _Stock()).add(waiter)
        heapq.heappush(self._known, (-self._share(waiter.client), waiter.client))
        if len(self._known) > 2 * len(self._stocks) + _SPARE:
            self._known = [(-self._share(client), client) for client in self._stocks]
            heapq.heapify(self._known)

    def remove(self, waiter: Waiter) -> None:
        stock = self._stocks[waiter.client]
        stock.remove(waiter)
        if not stock.count:
            del self._stocks[waiter.client]

    def victim(self, client: str, priority: int, size_bytes: int) -> Waiter | None:
        """Return who has to go for a newcomer; None when it is itself.

        A client with most of the room makes room for its own tasks. Another one takes from that
        client what is below its own priority; anything, while it stays below its share.
        """
        if not self._stocks:
            return None
        fullest = self._fullest()
        most, has = self._share(fullest), self._share(client)
        if has >= most:
            fullest = client
        last = self._stocks[fullest].last
        has_less = self._share(client, 1, size_bytes) < most
        return last if has_less or priority > last.priority else None

    def _fullest(self) -> str:
        while True:
            share, client = self._known[0]
            now = self._share(client)
            if now == -share:
                return client
            heapq.heappop(self._known)
            if now:
                heapq.heappush(self._known, (-now, client))

    def _share(self, client: str, more: int = 0, more_bytes: int = 0) -> float:
        stock = self._stocks.get(client)
        count, size = (0, 0) if stock is None else (stock.count, stock.size_bytes)
        share = max((count + more) / self._limit, (size + more_bytes) / self._limit_bytes)
        return share / self._weight(client)


class Drain:
    """How fast tasks leave, and when those that are turned away should come back.

    The rate is that of the last seconds, exponentially smoothed. Several that are turned away get
    times one after another, as far apart as tasks leave.
    """

    def __init__(self) -> None:
        self._count = 0.0
        self._since: int | None = None
        self._at = 0
        self._back_at = 0

    def left(self, now: int) -> None:
        """Count a task that has left.

        Args:
            now: UTC milliseconds.
        """
        self._fade(now)
        self._count += 1.0

    def rate_s(self, now: int) -> float:
        """Return tasks per second."""
        self._fade(now)
        watched_s = (now - (now if self._since is None else self._since)) / 1000
        return self._count / _RATE_S / max(1e-3, 1.0 - math.exp(-max(watched_s, 1.0) / _RATE_S))

    def retry_ms(self, now: int) -> int:
        """Return when the next one that is turned away should come back, milliseconds.

        Args:
            now: UTC milliseconds.
        """
        rate_s = self.rate_s(now)
        known = rate_s > _LEAST_RATE_S
        turn_ms = max(_LEAST_MS, 1000 / rate_s) if known else _UNKNOWN_MS
        last = min(self._back_at, now + _MOST_MS)  # a clock that was set back
        self._back_at = int(min(now + _MOST_MS, max(now, last) + turn_ms))
        return max(_LEAST_MS, self._back_at - now)

    def _fade(self, now: int) -> None:
        if self._since is None:
            self._since = self._at = now
        self._count *= math.exp(-max(0, now - self._at) / 1000 / _RATE_S)
        self._at = now


class WaitingRoom:
    """Who waits, and whose turn it is. Owned by the router's event loop.

    Args:
        limit: Most tasks.
        limit_bytes: Most bytes of them together.
        weight: Share of a client relative to others, 0.1 to 100.

    Attributes:
        size_bytes: Bytes of what waits.
    """

    def __init__(
        self, *, limit: int, limit_bytes: int, weight: Callable[[str], float] = lambda _: 1.0
    ) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._weight = weight
        self.size_bytes = 0
        self._waiting: dict[Key, Waiter] = {}
        # Who waits for the same shares one set, for sets are large: those in use, and by how many;
        # and how many sets a place is in.
        self._at: Counter[Place] = Counter()
        self._sets: dict[frozenset[Place], frozenset[Place]] = {}
        self._users: Counter[frozenset[Place]] = Counter()
        self._rounds: dict[str, dict[int, _Round]] = {}
        self._shares = _Shares(limit=limit, limit_bytes=limit_bytes, weight=weight)
        self._rises: list[tuple[int, int, Waiter]] = []
        self._words: list[tuple[int, int, Waiter]] = []
        self._drains: OrderedDict[str, Drain] = OrderedDict()
        self._entries = 0
        self._needed = 0
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: Key) -> bool:
        return key in self._waiting

    @property
    def places(self) -> list[Place]:
        """Places that somebody waits for."""
        return list(self._at)

    @property
    def functions(self) -> list[str]:
        """Functions that somebody waits for."""
        return list(self._rounds)

    def waits_for(self, place: Place) -> bool:
        """Tell whether anybody waits who could use a place."""
        return place in self._at

    def wants(self, key: Key, place: Place) -> bool:
        """Tell whether a task waits here and could use a place."""
        waiter = self._waiting.get(key)
        return waiter is not None and place in waiter.places

    # ---- in

    def enter(self, waiter: Waiter, now: int) -> list[Waiter]:
        """Let a task wait.

        Args:
            waiter: It, with at least one place; one with its key does not wait yet.
            now: UTC milliseconds.

        Returns:
            Those that have to go for it; itself when none of them may.
        """
        shed = self._victims(waiter)
        if shed is None:
            return [waiter]
        for victim in shed:
            self.leave(victim.key)
        self._waiting[waiter.key] = waiter
        self.size_bytes += self._needs_bytes(waiter)
        if waiter.places not in self._sets:
            self._sets[waiter.places] = waiter.places
            self._at.update(waiter.places)
        waiter.places = self._sets[waiter.places]
        self._users[waiter.places] += 1
        self._needed += len(waiter.functions)
        self._shares.add(waiter)
        waiter.level = min(_HIGHEST, waiter.priority + max(0, now - waiter.since) // AGING_MS)
        self._line_up(waiter)
        self._numbers += 1
        due = waiter.since + AGING_MS * (waiter.level - waiter.priority + 1)
        heapq.heappush(self._rises, (due, self._numbers, waiter))
        self._remind(waiter, now)
        return shed

    def victim(self, client: str, priority: int) -> Waiter | None:
        """Return who has to go for a newcomer when there is no room: None when it is itself.

        Args:
            client: Whose the newcomer is.
            priority: Its priority.
        """
        return self._shares.victim(client, priority, 0)

    def _victims(self, newcomer: Waiter) -> list[Waiter] | None:
        """Return all that have to go for a newcomer; None where it would find no room even so."""
        found: list[Waiter] = []
        count, size_bytes = len(self._waiting), self.size_bytes + self._needs_bytes(newcomer)
        fits = True
        while fits and (count >= self._limit or size_bytes > self._limit_bytes):
            victim = self._shares.victim(newcomer.client, newcomer.priority, newcomer.size_bytes)
            fits = victim is not None
            if victim is not None:
                self._shares.remove(victim)
                found.append(victim)
                count, size_bytes = count - 1, size_bytes - victim.size_bytes
        for victim in reversed(found):  # nobody goes before it is sure that it is of use
            self._shares.add(victim)
        return found if fits else None

    # ---- out

    def call(self, place: Place, now: int) -> Waiter | None:
        """Take out whose turn it is for a place that has come free; None when nobody can use it.

        Args:
            place: The place.
            now: UTC milliseconds.
        """
        self._age(now)
        if place not in self._at:
            return None
        rounds = self._rounds.get(place[1], {})
        for level in sorted(rounds, reverse=True):
            waiter = rounds[level].take(place, self._weight)
            if waiter is not None:
                self.drain(place[1]).left(now)
                return self.leave(waiter.key)
            if not rounds[level].heaps:
                del rounds[level]
        return None

    def leave(self, key: Key) -> Waiter | None:
        """Take a task out; None when it does not wait."""
        waiter = self._waiting.pop(key, None)
        if waiter is None:
            return None
        waiter.gone = True
        self._users[waiter.places] -= 1
        if not self._users[waiter.places]:
            del self._users[waiter.places], self._sets[waiter.places]
            for place in waiter.places:
                self._at[place] -= 1
                if self._at[place] <= 0:
                    del self._at[place]
        self.size_bytes -= self._needs_bytes(waiter)
        self._needed -= len(waiter.functions)
        self._shares.remove(waiter)
        self._tidy()
        return waiter

    # ---- what is told

    def drain(self, function: str) -> Drain:
        """Return how fast tasks leave for a function."""
        drain = self._drains.get(function)
        if drain is None:
            drain = self._drains[function] = Drain()
            if len(self._drains) > _FUNCTIONS:
                self._drains.popitem(last=False)
        self._drains.move_to_end(function)
        return drain

    def retry_ms(self, waiter: Waiter, now: int) -> int:
        """Return when a task that was turned away should come back, milliseconds.

        Args:
            waiter: It.
            now: UTC milliseconds.
        """
        return min(self.drain(function).retry_ms(now) for function in sorted(waiter.functions))

    def reminded(self, now: int) -> list[Waiter]:
        """Return those whose clients should hear that they wait.

        Args:
            now: UTC milliseconds.
        """
        told = []
        while self._words and self._words[0][0] <= now:
            waiter = heapq.heappop(self._words)[2]
            if not waiter.gone:
                self._remind(waiter, now)
                told.append(waiter)
        return told

    def out_of_reach(self, is_there: Callable[[Place], bool]) -> list[Waiter]:
        """Return those of which no place is there any more.

        Args:
            is_there: Tells of a place, be it full.
        """
        there = {place for place in self._at if is_there(place)}
        return [one for one in self._waiting.values() if there.isdisjoint(one.places)]

    def describe(self, now: int) -> dict[str, Any]:
        """Return who waits as JSON: by function, client and priority, the longest lists cut.

        Args:
            now: UTC milliseconds.
        """
        functions: dict[str, list[Waiter]] = {}
        for waiter in self._waiting.values():
            for function in waiter.functions:
                functions.setdefault(function, []).append(waiter)
        rows = [
            {
                "function": function,
                "waiting": len(waiters),
                "longest_ms": max(now - one.since for one in waiters),
                "leave_per_s": round(self.drain(function).rate_s(now), 3),
                "priorities": _counted(one.priority for one in waiters),
                "clients": _counted(one.client for one in waiters),
            }
            for function, waiters in functions.items()
        ]
        rows.sort(key=lambda row: (-int(str(row["waiting"])), str(row["function"])))
        return {
            "waiting": len(self._waiting),
            "limit": self._limit,
            "bytes": self.size_bytes,
            "limit_bytes": self._limit_bytes,
            "functions": rows[:_SHOWN],
        }

    def _needs_bytes(self, waiter: Waiter) -> int:
        """Return what a task takes that is not here: its set of places, if it is the only one."""
        shares = waiter.places in self._sets
        return waiter.size_bytes + (0 if shares else _PLACE_BYTES * len(waiter.places))

    # ---- order

    def _line_up(self, waiter: Waiter) -> None:
        for function in waiter.functions:
            self._numbers += 1
            rounds = self._rounds.setdefault(function, {})
            rounds.setdefault(waiter.level, _Round()).add(waiter, waiter.level, self._numbers)
            self._entries += 1

    def _age(self, now: int) -> None:
        """Raise what has waited long enough."""
        while self._rises and self._rises[0][0] <= now:
            due, _, waiter = heapq.heappop(self._rises)
            if waiter.gone or waiter.level >= _HIGHEST:
                continue
            waiter.level += 1
            self._line_up(waiter)
            self._numbers += 1
            heapq.heappush(self._rises, (due + AGING_MS, self._numbers, waiter))
        self._tidy()

    def _remind(self, waiter: Waiter, now: int) -> None:
        # At fixed times: one that is called in vain again and again is reminded of all the same.
        waited, told = now - waiter.since, _FIRST_WORD_MS
        while told <= min(waited, _LONGEST_SILENCE_MS):
            told *= 2
        if told <= waited:
            told = waited + _LONGEST_SILENCE_MS - (waited - told) % _LONGEST_SILENCE_MS
        self._numbers += 1
        heapq.heappush(self._words, (waiter.since + told, self._numbers, waiter))

    def _tidy(self) -> None:
        """Drop what is out of date, once it is more than what is not."""
        if self._entries <= 2 * self._needed + _SPARE:
            return
        self._entries = 0
        for function, rounds in list(self._rounds.items()):
            for level, one in list(rounds.items()):
                self._entries += one.purge()
                if not one.heaps:
                    del rounds[level]
            if not rounds:
                del self._rounds[function]
        for heap in (self._rises, self._words):
            heap[:] = [item for item in heap if not item[2].gone]
            heapq.heapify(heap)


def _counted(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common(_SHOWN)}
