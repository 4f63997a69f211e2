"""Whatever comes and goes: each task leaves the room exactly once, and the room stays bounded."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.waiting import Waiter, WaitingRoom

LIMIT, LIMIT_BYTES = 12, 60
PLACES = [("a", "f"), ("b", "f"), ("a", "g")]
WEIGHTS = {"quick": 4.0, "slow": 0.1}


class Room(RuleBasedStateMachine):
    """Newcomers, calls, cancellations, and a clock that goes forward."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.number = 0
        self.inside: dict[tuple[str, str], Waiter] = {}
        self.room = WaitingRoom(
            limit=LIMIT, limit_bytes=LIMIT_BYTES, weight=lambda client: WEIGHTS.get(client, 1.0)
        )

    @rule(
        client=st.sampled_from(["quick", "slow", "usual", "other"]),
        priority=st.integers(0, 9),
        deadline=st.integers(0, 100_000),
        places=st.sets(st.sampled_from(PLACES), min_size=1),
        size=st.integers(0, 30),
        waited=st.integers(0, 50_000),
    )
    def enter(self, client, priority, deadline, places, size, waited) -> None:
        self.number += 1
        waiter = Waiter(
            key=(client, f"t{self.number}"),
            client=client,
            priority=priority,
            deadline=deadline,
            places=frozenset(places),
            size_bytes=size,
            since=self.now - waited,
        )
        before = dict(self.inside)
        self.inside[waiter.key] = waiter
        shed = self.room.enter(waiter, self.now)
        for one in shed:
            assert self.inside.pop(one.key) is one
            assert one.priority <= priority
            assert not any(other.priority < one.priority for other in self.inside.values())
        if shed and shed[0] is not waiter:
            shares = Counter(
                other.client for other in before.values() if other.priority == shed[0].priority
            )
            most = max(count / WEIGHTS.get(who, 1.0) for who, count in shares.items())
            victim = shed[0].client
            assert shares[victim] / WEIGHTS.get(victim, 1.0) == most

    @rule(place=st.sampled_from(PLACES))
    def call(self, place) -> None:
        fitting = [one for one in self.inside.values() if place in one.places]
        called = self.room.call(place, self.now)
        assert (called is None) == (not fitting), "nobody waits in vain for a place that is free"
        if called is None:
            return
        assert self.inside.pop(called.key) is called
        assert called in fitting
        assert called.level == max(one.level for one in fitting)
        alike = [one for one in fitting if (one.client, one.level) == (called.client, called.level)]
        assert called.deadline == min(one.deadline for one in alike)

    @rule(pick=st.integers(0, 50))
    def leave(self, pick) -> None:
        keys = list(self.inside)
        if not keys:
            return
        key = keys[pick % len(keys)]
        assert self.room.leave(key) is self.inside.pop(key)
        assert self.room.leave(key) is None

    @rule(passed=st.integers(0, 40_000))
    def wait(self, passed) -> None:
        self.now += passed
        for one in self.room.reminded(self.now):
            assert one.key in self.inside

    @invariant()
    def is_bounded_and_keeps_count(self) -> None:
        assert len(self.room) == len(self.inside) <= LIMIT
        held = sum(one.size_bytes for one in self.inside.values())
        assert self.room.size_bytes == held <= LIMIT_BYTES
        for place in PLACES:
            assert self.room.waits_for(place) == sum(
                place in one.places for one in self.inside.values()
            )

    def teardown(self) -> None:
        """Everybody gets out in the end."""
        for place in PLACES:
            while self.room.call(place, self.now) is not None:
                pass
        assert len(self.room) == 0


Room.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestRoom = Room.TestCase


class Fair(RuleBasedStateMachine):
    """Clients that always have something waiting get shares that differ by a task at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.room = WaitingRoom(limit=1_000, limit_bytes=1_000_000)
        self.number = 0
        self.served = dict.fromkeys(("a", "b", "c"), 0)
        for client in self.served:
            for _ in range(3):
                self.more(client)

    def more(self, client) -> None:
        self.number += 1
        self.room.enter(
            Waiter(
                key=(client, f"t{self.number}"),
                client=client,
                priority=5,
                deadline=self.number % 7,
                places=frozenset(PLACES[:2]),
                size_bytes=1,
                since=0,
            ),
            0,
        )

    @rule(place=st.sampled_from(PLACES[:2]), extra=st.sampled_from(["a", "b", "c"]))
    def serve(self, place, extra) -> None:
        self.more(extra)
        called = self.room.call(place, 0)
        assert called is not None
        self.served[called.client] += 1
        self.more(called.client)

    @invariant()
    def shares_are_even(self) -> None:
        assert max(self.served.values()) - min(self.served.values()) <= 2


Fair.TestCase.settings = settings(max_examples=30, stateful_step_count=60, deadline=None)
TestFair = Fair.TestCase
