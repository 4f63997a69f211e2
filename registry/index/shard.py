"""One trust domain's vectors: compared one by one while few, through a graph when many.

Rows hold the truth; a graph is only a quicker way to most of them. Live rows that are not in the
graph wait: they are compared one by one, and taken in a few at a time. Dead rows that still are in
it are graves. So the answer is right at any moment, whatever the graph lags behind.

A graph is built on another thread from rows that nobody writes meanwhile: while anything reads
them there, a row once written keeps its vector, changes go to other rows, and freed ones are used
again afterwards. A finished graph is put in place by the owner's thread at its next call.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Final

import numpy as np
import structlog

from registry.encoders.base import Vectors
from registry.index.attributes import NOBODY, AttributeSets
from registry.index.base import NOTHING, ROOM, Found, Mask, Rows, nearest
from registry.index.build import Build
from registry.index.rows import VectorRows
from registry.index.snapshot import ShardState

if TYPE_CHECKING:
    from registry.index.hnsw import Graph

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_FIRST_CAPACITY: Final = 64
_GRAVES_SHARE: Final = 0.2
_GRAVES_FROM: Final = 64
_HOLES_FROM: Final = 1_024
_WAITING_MOST: Final = 512
"""Rows that may wait beside a graph that is being replaced: comparing them takes 60 µs."""
_ROUNDS: Final = 4
_TAKEN_IN: Final = 2
_BURIED: Final = 64
_FULL_SHARE: Final = 0.75
"""A graph whose places are taken to this share is built anew with more of them: enlarging one in
place stopped the event loop for 40 ms."""
_RETRY_AFTER: Final = 1_000
_ROWS_PER_RESULT: Final = 25
"""Rows compared one by one in the time that one more result takes from a graph."""
_SLACK: Final = 16


class Shard:
    """Keyed unit vectors with attributes; owned by one thread.

    Args:
        dimension: length of every vector.
        sets: attribute sets of the index.
        graphs: the class of graphs; None where its library is missing: all are compared then.
        background: where graphs are built.

    Attributes:
        limit: live vectors above which a graph is built.
        rebuilds: graphs put in place so far.
    """

    def __init__(
        self,
        *,
        dimension: int,
        sets: AttributeSets,
        graphs: "type[Graph] | None",
        background: Executor,
        limit: int,
    ) -> None:
        self._dimension = dimension
        self._sets = sets
        self._graphs = graphs
        self._background = background
        self._vectors = VectorRows(dimension)
        self._rows: dict[str, int] = {}
        self._keys: list[str | None] = []
        self._numbers = np.zeros(_FIRST_CAPACITY, dtype=np.int32)
        self._counts = np.zeros(sets.capacity, dtype=np.int64)
        self._free: list[int] = []
        self._graph: Graph | None = None
        self._held = np.zeros(_FIRST_CAPACITY, dtype=np.bool_)
        self._waiting: dict[int, None] = {}
        self._graves: list[int] = []
        self._build: Build | None = None
        self._frozen: Graph | None = None
        self._readers = 0
        self._patience = 0
        self.limit = limit
        self.rebuilds = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    @property
    def building(self) -> bool:
        """Whether a worker is busy with a graph."""
        return self._build is not None

    @property
    def approximate(self) -> bool:
        """Whether a graph serves."""
        return self._graph is not None

    def vector(self, key: str) -> Vectors:
        """A stored vector, not copied; KeyError when the key is not there."""
        return self._vectors[self._rows[key]]

    # ---- changes

    def upsert(self, key: str, vector: Vectors, attributes: frozenset[str]) -> None:
        """Store a checked vector; the same one again changes the attributes only."""
        number = self._sets.take(attributes)
        row = self._rows.get(key)
        if row is not None and np.array_equal(self._vectors[row], vector):
            self._label(row, number)
            return
        if row is not None and not self._readers and not self._held[row]:
            self._vectors[row] = vector
            self._label(row, number)
            return
        if row is not None:
            self._retire(row)
        row = self._free.pop() if self._free else self._grow()
        self._vectors[row] = vector
        self._keys[row] = key
        self._rows[key] = row
        self._label(row, number)
        if self._graph is not None:
            self._waiting[row] = None
        self._tend()

    def remove(self, key: str) -> bool:
        """Forget a key; tell whether it was there."""
        row = self._rows.get(key)
        if row is None:
            return False
        self._retire(row)
        self._tend()
        return True

    def admits(self, key: str, allowed: Mask) -> bool:
        """Whether a stored key's attributes are admitted."""
        return bool(allowed[self._numbers[self._rows[key]]])

    def tend(self, taken_in: int) -> bool:
        """Put a finished graph in place and take in what waits; tell whether more waits."""
        self._tend(taken_in)
        return bool(self._waiting or self._graves) and self._frozen is None

    def close(self) -> None:
        """Have a worker that is busy for this shard end soon."""
        if self._build is not None:
            self._build.stop()

    def _grow(self) -> int:
        row = len(self._keys)
        self._keys.append(None)
        if row == len(self._numbers):
            self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)])
            self._held = np.concatenate([self._held, np.zeros_like(self._held)])
        return row

    def _label(self, row: int, number: int) -> None:
        old = int(self._numbers[row])
        self._numbers[row] = number
        if number != NOBODY:
            if number >= len(self._counts):
                more = np.zeros(self._sets.capacity - len(self._counts), dtype=np.int64)
                self._counts = np.concatenate([self._counts, more])
            self._counts[number] += 1
        if old != NOBODY:
            self._counts[old] -= 1
            self._sets.drop(old)

    def _retire(self, row: int) -> None:
        key = self._keys[row]
        if key is not None:
            del self._rows[key]
        self._keys[row] = None
        self._label(row, NOBODY)
        if self._held[row]:
            self._graves.append(row)
            return
        self._waiting.pop(row, None)
        if not self._readers:
            self._free.append(row)

    def _tend(self, taken_in: int = _TAKEN_IN) -> None:
        self._settle()
        live = len(self._rows)
        if self._patience:
            self._patience -= 1
        if self._build is not None:
            if live < self.limit // 2:
                self._build.stop()
        elif self._graph is None:
            if live > self.limit and self._graphs is not None and not self._patience:
                self._start_build()
            elif not self._readers and len(self._keys) > 2 * live + _HOLES_FROM:
                self._compact()
        elif live < self.limit // 2 and not self._readers:
            self._graph = None
            self._compact()
        elif self._worn and not self._patience:
            self._start_build()
        self._take_in(taken_in)

    @property
    def _worn(self) -> bool:
        """Whether a fifth of the graph are graves, or it is about to be full."""
        if self._graph is None:
            return False
        graves = len(self._graph) - self._graph.living + len(self._graves)
        return graves >= max(_GRAVES_FROM, _GRAVES_SHARE * len(self._graph)) or (
            len(self._graph) + len(self._waiting) > _FULL_SHARE * self._graph.capacity
        )

    def _take_in(self, most: int) -> None:
        """Bring the graph a few steps nearer to the rows: about 0.3 ms for each taken in."""
        graph = self._graph
        if graph is None or graph is self._frozen:
            return
        for _ in range(min(_BURIED, len(self._graves))):
            graph.bury(self._graves.pop())
        if self._build is not None and len(self._waiting) <= _WAITING_MOST:
            return  # the graph is about to be replaced by one that holds them
        for _ in range(min(most, len(self._waiting), graph.capacity - len(graph))):
            row = next(reversed(self._waiting))
            graph.add(self._vectors[row][np.newaxis, :], np.array([row], dtype=np.intp))
            del self._waiting[row]
            self._held[row] = True

    def _compact(self) -> None:
        """Move the living together, when more than half of the rows stand empty."""
        rows = np.flatnonzero(self._numbers[: len(self._keys)])
        vectors = VectorRows(self._dimension)
        vectors.fill(np.arange(len(rows)), self._vectors.gather(rows))
        keys = [self._keys[row] for row in rows.tolist()]
        capacity = max(_FIRST_CAPACITY, 2 * len(rows))
        numbers = np.zeros(capacity, dtype=np.int32)
        numbers[: len(rows)] = self._numbers[rows]
        self._vectors, self._keys, self._numbers = vectors, keys, numbers
        self._rows = {key: row for row, key in enumerate(keys) if key is not None}
        self._held = np.zeros(capacity, dtype=np.bool_)
        self._free, self._waiting, self._graves = [], {}, []

    # ---- graphs

    def _start_build(self) -> None:
        if self._graphs is None:
            return
        rows = np.flatnonzero(self._numbers[: len(self._keys)])
        try:
            graph = self._graphs(dimension=self._dimension, capacity=ROOM * len(rows))
            build = Build(graph, self._vectors, self._background)
            build.send(rows)
        except (MemoryError, RuntimeError) as error:  # no room, or the executor was shut down
            _log.warning("index.build_failed", error=str(error), size=len(self))
            self._patience = _RETRY_AFTER
            return
        self._build = build
        self._readers += 1
        self._settle()

    def _settle(self) -> None:
        """Look after the build: put it in place, send it after what changed, or give it up."""
        build = self._build
        if build is None or not build.done:
            return
        if build.stopped or build.error is not None:
            if build.error is not None:
                _log.warning("index.build_failed", error=str(build.error), size=len(self))
                self._patience = _RETRY_AFTER
            self._build = None
            self.release()
            return
        held = build.held(len(self._numbers))
        alive = self._numbers != NOBODY
        behind = np.flatnonzero(alive & ~held)
        if len(behind) > _WAITING_MOST and build.rounds < _ROUNDS:
            try:
                build.send(behind)
            except RuntimeError:
                build.stop()
            return
        self._build = None
        self._graph, self._held = build.graph, held
        self._waiting = dict.fromkeys(behind.tolist())
        self._graves = np.flatnonzero(held & ~alive).tolist()
        self.rebuilds += 1
        self.release()
        _log.info("index.graph_ready", size=len(self), waiting=len(self._waiting))

    # ---- snapshots

    def pin(self) -> ShardState:
        """Return the present state and keep it unchanged until ``release``; changes go beside."""
        self._readers += 1
        self._frozen = self._graph
        return ShardState(
            vectors=self._vectors,
            keys=self._keys.copy(),
            numbers=self._numbers[: len(self._keys)].copy(),
            graph=self._graph,
            held=np.flatnonzero(self._held),
            buried=self._graph.buried if self._graph is not None else frozenset(),
        )

    def unfreeze(self) -> None:
        """End what ``pin`` began."""
        self._frozen = None
        self.release()

    def release(self) -> None:
        """One reader of the rows less; without any, the rows that nobody needs are free again."""
        self._readers -= 1
        if not self._readers:
            unused = (self._numbers[: len(self._keys)] == NOBODY) & ~self._held[: len(self._keys)]
            self._free = np.flatnonzero(unused).tolist()

    def restore(self, state: ShardState) -> None:
        """Take over a state, into a shard that holds nothing; its numbers count users anew."""
        self._vectors = state.vectors
        self._keys = state.keys
        capacity = max(_FIRST_CAPACITY, len(state.keys))
        self._numbers = np.zeros(capacity, dtype=np.int32)
        self._held = np.zeros(capacity, dtype=np.bool_)
        self._held[state.held] = True
        for row, key in enumerate(state.keys):
            if key is not None:
                self._rows[key] = row
                self._label(row, int(state.numbers[row]))
        alive = self._numbers != NOBODY
        self._graph = state.graph
        if self._graph is not None:
            self._waiting = dict.fromkeys(np.flatnonzero(alive & ~self._held).tolist())
            dead = np.flatnonzero(self._held & ~alive).tolist()
            self._graves = [row for row in dead if row not in state.buried]
        self._readers = 1
        self.release()

    # ---- search

    def search(
        self, query: Vectors, k: int, allowed: Mask | None, *, thorough: bool = True
    ) -> Found:
        """Find the nearest admitted rows.

        Args:
            query: checked.
            k: how many, at least 1.
            allowed: truth by number of attribute set; None admits everybody.
            thorough: as for ``Graph.search``.

        Returns:
            Rows and their cosines, in no order: the k nearest, and more as near as the last.
        """
        self._settle()
        passing = len(self._rows)
        if allowed is not None:
            passing = int(self._counts[allowed[: len(self._counts)]].sum())
            if passing == len(self._rows):
                allowed = None
        k = min(k, passing)
        if k < 1:
            return NOTHING
        if self._graph is not None:
            found = self._by_graph(self._graph, query, k, allowed, passing, thorough=thorough)
            if found is not None:
                return found
        return self._by_comparison(query, k, allowed, passing)

    def keys(self, rows: Rows) -> list[str]:
        """Keys of live rows."""
        return [self._keys[row] or "" for row in rows.tolist()]

    def _by_graph(
        self,
        graph: "Graph",
        query: Vectors,
        k: int,
        allowed: Mask | None,
        passing: int,
        *,
        thorough: bool,
    ) -> Found | None:
        """Ask the graph for so many that enough of them pass; None when comparing is quicker."""
        if allowed is None and not self._graves and not self._waiting:
            return graph.search(query, k, thorough=thorough)
        admitted = allowed if allowed is not None else self._everybody
        beside = np.sort(np.fromiter(self._waiting, dtype=np.intp, count=len(self._waiting)))
        beside = beside[admitted[self._numbers[beside]]]
        needed = min(k, passing - len(beside))
        sieve = passing / (len(self._rows) + len(self._graves))
        wanted = k if sieve == 1.0 else int(1.25 * k / sieve) + _SLACK
        while wanted * _ROWS_PER_RESULT <= passing:
            found = graph.search(query, wanted, thorough=thorough)
            if found is None:
                return None
            rows, similarities = found
            keep = admitted[self._numbers[rows]]
            if np.count_nonzero(keep) >= needed:
                near = self._vectors.similarities(query, beside)
                return nearest(
                    np.concatenate([rows[keep], beside]),
                    np.concatenate([similarities[keep], near]),
                    k,
                )
            wanted *= 4
        return None

    def _by_comparison(self, query: Vectors, k: int, allowed: Mask | None, passing: int) -> Found:
        count = len(self._keys)
        if allowed is None and passing == count:
            return nearest(None, self._vectors.first_similarities(query, count), k)
        admitted = allowed if allowed is not None else self._everybody
        rows = np.flatnonzero(admitted[self._numbers[:count]])
        return nearest(rows, self._vectors.similarities(query, rows), k)

    @property
    def _everybody(self) -> Mask:
        return self._sets.admitted(())
