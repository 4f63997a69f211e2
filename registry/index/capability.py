"""The index of capability vectors: shards by trust domain behind one search.

::

    index = CapabilityIndex(dimension=384, background=executor)
    index.upsert("ab12", vector, attributes=frozenset({"zone:plant"}), domain="plant")
    index.search(asked, 10, demands=[frozenset({"zone:plant", "zone:lab"})])

Every domain has a shard of its own as long as there are few: they are kept apart in memory, one
that changes wildly wears out no other's graph, and a demand that only one domain meets looks at
that one only. Further domains share one shard, for every shard costs time in each search (four cost
2.7 times one, measured); there, as for any demand, a mask over the attributes sieves.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from registry.encoders.base import checked
from registry.index.attributes import AttributeSets
from registry.index.base import (
    DEFAULT_DIMENSION,
    NO_DEMANDS,
    NOTHING,
    Demands,
    Neighbour,
    Similarities,
    ranked,
)
from registry.index.build import Inline
from registry.index.shard import Shard
from registry.index.snapshot import read_snapshot, write_snapshot

if TYPE_CHECKING:
    from registry.index.hnsw import Graph

EXACT_LIMIT: Final = 4_000
"""Measured: comparing all of ten thousand takes 0.7 ms, graphs answer in 0.3 ms."""
_OWN_SHARDS: Final = 8
_SHARED: Final = "*"
_FEW: Final = 1_000
"""A shard smaller than this has no graph, however many shards there are."""
_TAKEN_IN: Final = 8
_BEYOND_SHARE: Final = 8


class CapabilityIndex:
    """Keyed unit vectors with nearest-neighbour search under demands; owned by one thread.

    Compares all while they are few (0.25 ms for four thousand), and goes through graphs above. With
    a ``background`` executor no call takes longer than a few milliseconds at a hundred thousand
    vectors: graphs are built and snapshots written there, and the owner's next call puts a finished
    graph in place. Without one, the call that makes a graph necessary builds it.

    Args:
        dimension: length of every vector.
        space: identity of the vector space, kept in snapshots.
        exact_limit: vectors above which graphs are used; several shards divide it.
        background: one thread is enough. Call ``close`` before shutting it down.
    """

    def __init__(
        self,
        *,
        dimension: int = DEFAULT_DIMENSION,
        space: str = "",
        exact_limit: int = EXACT_LIMIT,
        background: Executor | None = None,
    ) -> None:
        self._dimension = dimension
        self._space = space
        self._exact_limit = exact_limit
        self._background = background or Inline()
        self._sets = AttributeSets()
        self._shards: dict[str, Shard] = {}
        self._homes: dict[str, Shard] = {}
        self._saving: Future[None] | None = None
        self._pinned: list[Shard] = []

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, key: object) -> bool:
        return key in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    @property
    def approximate(self) -> bool:
        """Whether a graph serves any part of it."""
        return any(shard.approximate for shard in self._shards.values())

    @property
    def building(self) -> bool:
        """Whether a graph is being built."""
        return any(shard.building for shard in self._shards.values())

    @property
    def rebuilds(self) -> int:
        """Graphs put in place so far."""
        return sum(shard.rebuilds for shard in self._shards.values())

    def upsert(
        self,
        key: str,
        vector: npt.NDArray[Any],
        *,
        attributes: frozenset[str] = frozenset(),
        domain: str = "",
    ) -> None:
        """Store a vector under a key, in place of an earlier one.

        Args:
            key: any string.
            vector: shape ``(dimension,)``, length 1; copied.
            attributes: what demands are compared with.
            domain: trust domain, which chooses the shard.

        Raises:
            ValueError: another shape, not finite, or not of length 1; nothing has changed then.
        """
        row = checked(vector, self._dimension)
        self._settle()
        before = self._homes.get(key)
        shard = self._place(domain)
        shard.upsert(key, row, attributes)
        self._homes[key] = shard
        if before is not None and before is not shard:
            before.remove(key)
            self._drop_empty()

    def remove(self, key: str) -> bool:
        """Forget a key; tell whether it was there."""
        self._settle()
        shard = self._homes.pop(key, None)
        if shard is None:
            return False
        shard.remove(key)
        self._drop_empty()
        return True

    def retain(self, keys: Collection[str]) -> int:
        """Forget every key but these, as after loading a snapshot older than the catalogue.

        Args:
            keys: a set, or anything else with a quick ``in``.

        Returns:
            How many were forgotten.
        """
        stale = [key for key in self if key not in keys]
        for key in stale:
            self.remove(key)
        return len(stale)

    def search(
        self, vector: npt.NDArray[Any], k: int, *, demands: Demands = NO_DEMANDS
    ) -> list[Neighbour]:
        """Find the keys nearest to a vector among those whose attributes meet the demands.

        Args:
            vector: shape ``(dimension,)``, length 1.
            k: how many; fewer come back when fewer are there, none when ``k < 1``.
            demands: every set must share a member with the attributes of a key.

        Returns:
            By falling similarity; equal similarities in the order of their keys.

        Raises:
            ValueError: as for ``upsert``.
        """
        keys, similarities = self.near(vector, k, demands=demands)
        return ranked(keys, similarities, k)

    def near(
        self, vector: npt.NDArray[Any], k: int, *, demands: Demands = NO_DEMANDS
    ) -> tuple[list[str], Similarities]:
        """As ``search``, in no order; a few more than k when several are as near as the last."""
        query = checked(vector, self._dimension)
        self._settle()
        if k < 1 or not self._shards:
            return [], NOTHING[1]
        allowed = self._sets.admitted(demands) if demands else None
        shards = list(self._shards.values())
        if len(shards) == 1:
            rows, near = shards[0].search(query, k, allowed)
            return shards[0].keys(rows), near
        # Each is asked for a little more than its share, and thoroughly where that may not have
        # been enough: the nearest of all may lie in one of them.
        share = min(k, k // len(shards) + _BEYOND_SHARE)
        found = [shard.search(query, share, allowed, thorough=False) for shard in shards]
        together = np.concatenate([near for _, near in found])
        edge = np.partition(together, -k)[-k] if len(together) > k else -np.inf
        keys: list[str] = []
        kept: list[Similarities] = []
        for shard, part in zip(shards, found, strict=True):
            more = share < k and len(part[1]) >= share and part[1].min() >= edge
            rows, near = shard.search(query, k, allowed) if more else part
            inside = near >= edge
            keys += shard.keys(rows[inside])
            kept.append(near[inside])
        return keys, np.concatenate(kept)

    def admits(self, key: str, demands: Demands) -> bool:
        """Whether a key is stored and its attributes meet demands."""
        shard = self._homes.get(key)
        return shard is not None and shard.admits(key, self._sets.admitted(demands))

    def vector(self, key: str) -> npt.NDArray[np.float32]:
        """Return a copy of a stored vector.

        Raises:
            KeyError: the key is not stored.
        """
        return self._homes[key].vector(key).copy()

    def similarities(
        self, keys: Sequence[str], vector: npt.NDArray[Any]
    ) -> npt.NDArray[np.float32]:
        """Cosines of stored keys to a vector, each compared exactly.

        Args:
            keys: stored keys.
            vector: shape ``(dimension,)``, length 1.

        Returns:
            float32, shape ``(len(keys),)``.

        Raises:
            KeyError: a key is not stored.
            ValueError: as for ``upsert``.
        """
        query = checked(vector, self._dimension)
        rows = np.stack([self._homes[key].vector(key) for key in keys])
        found: npt.NDArray[np.float32] = np.einsum("ij,j->i", rows, query)
        return found

    def maintain(self) -> bool:
        """Put finished graphs in place and take in some of what waits: a few milliseconds.

        Changes do the same in passing; call it now and then where changes and searches may cease.

        Returns:
            Whether calling it again would do more.
        """
        self._settle()
        more = [shard.tend(_TAKEN_IN) for shard in self._shards.values()]
        return any(more)

    def close(self) -> None:
        """Have the background end what it builds soon; the index still serves."""
        for shard in self._shards.values():
            shard.close()

    # ---- snapshots

    def save(self, path: Path) -> "Future[None]":
        """Write a snapshot into a folder, in place of an earlier one.

        What it holds is the state at this moment; changes may go on while the background writes.
        Writing a graph stops the whole process for about 8 µs a vector, though (hnswlib keeps the
        interpreter lock): save when nobody waits, as at a clean stop.

        Args:
            path: folder; made when missing.

        Returns:
            Done when the snapshot is in place; ConfigurationError when it cannot be written. A
            second call before then returns the same future.

        Raises:
            RuntimeError: the background has been shut down.
        """
        self._settle()
        if self._saving is not None:
            return self._saving
        self._pinned = list(self._shards.values())
        states = {name: shard.pin() for name, shard in self._shards.items()}
        try:
            self._saving = self._background.submit(
                write_snapshot,
                path,
                states,
                self._sets.copy(),
                dimension=self._dimension,
                space=self._space,
            )
        except RuntimeError:
            self._unpin()
            raise
        return self._saving

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dimension: int = DEFAULT_DIMENSION,
        space: str = "",
        exact_limit: int = EXACT_LIMIT,
        background: Executor | None = None,
    ) -> "CapabilityIndex":
        """Read a snapshot; many times faster than building. May run on any thread.

        Args:
            path: folder that ``save`` wrote.
            dimension: as for the index; must be that of the snapshot, as must ``space``.
            space: as for the index.
            exact_limit: as for the index.
            background: as for the index.

        Raises:
            ConfigurationError: no snapshot, a torn or foreign one, or one of another space or
                version of the format.
        """
        made = cls(dimension=dimension, space=space, exact_limit=exact_limit, background=background)
        states = read_snapshot(path, made._sets, graph_class(), dimension=dimension, space=space)
        for name, state in states.items():
            shard = made._new_shard(name)
            shard.restore(state)
            made._homes.update(dict.fromkeys(shard, shard))
        return made

    # ---- parts

    def _place(self, domain: str) -> Shard:
        shard = self._shards.get(domain)
        if shard is not None:
            return shard
        name = domain if len(self._shards) < _OWN_SHARDS else _SHARED
        return self._shards.get(name) or self._new_shard(name)

    def _new_shard(self, name: str) -> Shard:
        shard = self._shards[name] = Shard(
            dimension=self._dimension,
            sets=self._sets,
            graphs=graph_class(),
            background=self._background,
            limit=self._exact_limit,
        )
        self._share_limit()
        return shard

    def _drop_empty(self) -> None:
        empty = [name for name, shard in self._shards.items() if not len(shard)]
        for name in empty:
            if len(self._shards) > 1:
                self._shards.pop(name).close()
                self._share_limit()

    def _share_limit(self) -> None:
        """Divide the limit, so that many shards together compare no more than one would."""
        fair = max(min(_FEW, self._exact_limit), self._exact_limit // len(self._shards))
        for shard in self._shards.values():
            shard.limit = fair

    def _settle(self) -> None:
        if self._saving is not None and self._saving.done():
            self._unpin()

    def _unpin(self) -> None:
        self._saving = None
        for shard in self._pinned:
            shard.unfreeze()
        self._pinned = []


@lru_cache(maxsize=1)
def graph_class() -> "type[Graph] | None":
    """The graph, or None where hnswlib was not built: comparing all is slower, never wrong."""
    try:
        from registry.index.hnsw import Graph  # noqa: PLC0415 - compiled, and optional
    except ImportError:
        return None
    return Graph
