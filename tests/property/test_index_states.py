"""The index against comparing all, through any changes, builds and snapshots in any order."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from registry.index import CapabilityIndex
from support.executors import SteppedExecutor

D = 8
LIMIT = 12
DIRECTIONS = np.random.default_rng(1).standard_normal((80, D)).astype(np.float32)
DIRECTIONS /= np.linalg.norm(DIRECTIONS, axis=1, keepdims=True)
KEYS = st.integers(0, 59).map(lambda number: f"k{number:02}")
AT = st.integers(0, len(DIRECTIONS) - 1)
ATTRIBUTES = st.frozensets(st.sampled_from(["zone:a", "zone:b", "data:x", "skill:s"]))
DOMAINS = st.sampled_from(["", "a", "b"])
DEMANDS = st.lists(
    st.frozensets(st.sampled_from(["zone:a", "zone:b", "data:x", "skill:s", "none"])), max_size=2
)


class IndexStates(RuleBasedStateMachine):
    """An index, the work its background still has to do, and what it should hold."""

    @initialize(background=st.booleans())
    def start(self, background: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="foam-index-"))
        self.worker = SteppedExecutor()
        self.background = self.worker if background else None
        self.index = self.make()
        self.truth: dict[str, tuple[int, frozenset[str]]] = {}
        self.saved: dict[str, tuple[int, frozenset[str]]] | None = None

    def make(self) -> CapabilityIndex:
        return CapabilityIndex(dimension=D, exact_limit=LIMIT, background=self.background)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @rule(key=KEYS, at=AT, attributes=ATTRIBUTES, domain=DOMAINS)
    def upsert(self, key: str, at: int, attributes: frozenset[str], domain: str) -> None:
        self.index.upsert(key, DIRECTIONS[at], attributes=attributes, domain=domain)
        self.truth[key] = (at, attributes)

    @rule(first=st.integers(0, 59), count=st.integers(1, 40), at=AT, attributes=ATTRIBUTES)
    def upsert_many(self, first: int, count: int, at: int, attributes: frozenset[str]) -> None:
        for number in range(first, min(60, first + count)):
            self.upsert(f"k{number:02}", (at + number) % len(DIRECTIONS), attributes, "")

    @rule(key=KEYS)
    def remove(self, key: str) -> None:
        assert self.index.remove(key) == (self.truth.pop(key, None) is not None)

    @rule(kept=st.frozensets(KEYS, max_size=30))
    def retain(self, kept: frozenset[str]) -> None:
        stale = self.truth.keys() - kept
        assert self.index.retain(kept) == len(stale)
        for key in stale:
            del self.truth[key]

    @rule()
    def work(self) -> None:
        self.worker.step()

    @rule()
    def maintain(self) -> None:
        self.index.maintain()

    @rule()
    def save(self) -> None:
        while self.worker.step():  # a save in progress would be returned instead of a new one
            pass
        self.index.maintain()
        saving = self.index.save(self.folder)
        self.saved = dict(self.truth)
        if self.background is None:
            saving.result()

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        while self.worker.step():
            pass
        self.index = CapabilityIndex.load(
            self.folder, dimension=D, exact_limit=LIMIT, background=self.background
        )
        self.truth = dict(self.saved or {})

    @rule(at=AT, k=st.integers(0, 20), demands=DEMANDS)
    def search(self, at: int, k: int, demands: list[frozenset[str]]) -> None:
        asked = DIRECTIONS[at]
        able = {
            key: float(DIRECTIONS[stored] @ asked)
            for key, (stored, attributes) in self.truth.items()
            if all(alternatives & attributes for alternatives in demands)
        }
        found = self.index.search(asked, k, demands=demands)
        assert len(found) == min(k, len(able))
        assert len({key for key, _ in found}) == len(found)
        assert found == sorted(found, key=lambda pair: (-pair.similarity, pair.key))
        best = sorted(able.values(), reverse=True)
        for place, (key, similarity) in enumerate(found):
            assert abs(similarity - able[key]) < 1e-5
            # A graph of so few finds all of them; ties may come in another order in float32.
            assert abs(similarity - best[place]) < 1e-5

    @rule(key=KEYS, demands=DEMANDS)
    def admits(self, key: str, demands: list[frozenset[str]]) -> None:
        held = self.truth.get(key)
        able = held is not None and all(alternatives & held[1] for alternatives in demands)
        assert self.index.admits(key, demands) == able

    @invariant()
    def holds_what_it_was_told(self) -> None:
        if hasattr(self, "truth"):
            assert len(self.index) == len(self.truth)


TestIndexStates = IndexStates.TestCase
TestIndexStates.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
