"""Whatever comes, goes and fails, in whatever order: places, order and accounts hold."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from capability_schemas.errors import FoamError
from node_agent.admission.forecast import Forecast, Work
from node_agent.admission.queue import AGING_MS, URGENT_MS, AdmissionQueue, Entry

GROUPS = {"a": {"a1": 2, "a2": 1}, "b": {"b1": 3}}
FUNCTIONS = st.sampled_from([("a", "a1"), ("a", "a2"), ("b", "b1")])
LIMIT = 5


class QueueMachine(RuleBasedStateMachine):
    """Every entry is in exactly one of: waiting, running, ended; as the queue says too."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = AdmissionQueue(limit=LIMIT)
        self.queue.configure(GROUPS)
        self.now = 0
        self.number = 0
        self.waiting: dict[str, tuple[Entry, int]] = {}
        self.running: dict[str, Entry] = {}
        self.most: dict[str, int] = {}

    def level(self, key: str) -> int:
        entry, since = self.waiting[key]
        return min(9, entry.priority + (self.now - since) // AGING_MS)

    @rule(
        function=FUNCTIONS,
        priority=st.integers(0, 9),
        within=st.integers(-5, 60_000),
        run_ms=st.none() | st.integers(0, 30_000),
    )
    def offer(
        self, function: tuple[str, str], priority: int, within: int, run_ms: int | None
    ) -> None:
        self.number += 1
        entry = Entry(
            key=str(self.number),
            group=function[0],
            function=function[1],
            priority=priority,
            deadline=self.now + within,
            run_ms=run_ms,
            least_ms=(run_ms or 0) / 2,
        )
        free = self.queue.is_free(*function)
        try:
            wait_ms = self.queue.offer(entry, now=self.now)
        except FoamError:
            assert within <= (run_ms or 0) / 2 or not free
            return
        assert free or len(self.waiting) < LIMIT
        assert wait_ms == 0 or not free
        self.waiting[entry.key] = (entry, self.now)

    @rule()
    def take(self) -> None:
        entry = self.queue.take(now=self.now)
        if entry is None:
            for waiting, _ in self.waiting.values():
                assert not self.has_place(waiting)
            return
        chosen = self.rank(entry.key)
        assert self.has_place(entry)
        for key, (other, _) in self.waiting.items():
            assert not self.has_place(other) or self.rank(key) >= chosen
        del self.waiting[entry.key]
        self.running[entry.key] = entry

    def rank(self, key: str) -> tuple[int, int, int]:
        entry, since = self.waiting[key]
        return (-self.level(key), min(entry.deadline, since + URGENT_MS), int(key))

    def has_place(self, entry: Entry) -> bool:
        inside = [one for one in self.running.values() if one.group == entry.group]
        own = [one for one in inside if one.function == entry.function]
        places = min(max(GROUPS[entry.group].values()), self.most.get(entry.group, 99))
        return len(inside) < places and len(own) < GROUPS[entry.group][entry.function]

    @rule(index=st.integers(0, 100), run_ms=st.none() | st.floats(0, 1e6))
    def finish(self, index: int, run_ms: float | None) -> None:
        if self.running:
            key = list(self.running)[index % len(self.running)]
            del self.running[key]
            self.queue.finished(key, run_ms=run_ms)

    @rule(index=st.integers(0, 100))
    def remove(self, index: int) -> None:
        if self.waiting:
            key = list(self.waiting)[index % len(self.waiting)]
            del self.waiting[key]
            assert self.queue.remove(key) is not None
        assert self.queue.remove("unknown") is None

    @rule(passed_ms=st.integers(0, 20_000))
    def wait(self, passed_ms: int) -> None:
        self.now += passed_ms

    @rule()
    def drop(self) -> None:
        dropped = {entry.key for entry in self.queue.hopeless(now=self.now)}
        late = {key for key, (one, _) in self.waiting.items() if one.start_by <= self.now}
        assert dropped == late
        for key in late:
            del self.waiting[key]

    @rule(group=st.sampled_from(["a", "b"]), places=st.integers(1, 4))
    def measure(self, group: str, places: int) -> None:
        self.most[group] = places
        self.queue.limit_places(group, places)

    @invariant()
    def accounts_agree(self) -> None:
        assert self.queue.waiting == len(self.waiting)
        assert self.queue.running == len(self.running)
        running = Counter(entry.function for entry in self.running.values())
        waiting = Counter(entry.function for entry, _ in self.waiting.values())
        for lanes in GROUPS.values():
            for function, limit in lanes.items():
                assert self.queue.counts(function) == (running[function], waiting[function])
                assert running[function] <= limit

    @invariant()
    def nothing_is_overdue_unseen(self) -> None:
        expected = min((one.start_by for one, _ in self.waiting.values()), default=None)
        assert self.queue.next_start_by == expected


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


class ForecastMachine(RuleBasedStateMachine):
    """A forecast stays within what it has seen, whatever it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.forecast = Forecast()
        self.seen = False

    @rule(
        size=st.integers(0, 10**7),
        run_ms=st.floats(0, 1e8),
        tokens=st.integers(0, 10**5),
        timed=st.booleans(),
    )
    def learn(self, size: int, run_ms: float, tokens: int, timed: bool) -> None:
        timing = {"prefill_ms": run_ms / 3, "decode_ms": run_ms / 2} if timed else {}
        usage = {"input_tokens": tokens, "output_tokens": tokens}
        work = Work(input_bytes=size)
        self.forecast.learn("f", work, run_ms=run_ms, usage=usage, timing=timing, now=0)
        self.seen = True

    @rule(size=st.integers(0, 10**7), most=st.none() | st.integers(1, 10**5))
    def predict(self, size: int, most: int | None) -> None:
        work = Work(input_bytes=size, max_tokens=most)
        found = self.forecast.predict("f", work, now=0)
        assert (found.run_ms is not None) == self.seen
        if found.run_ms is not None:
            assert 0 <= found.least_ms <= found.run_ms < float("inf")


TestForecast = ForecastMachine.TestCase
TestForecast.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
