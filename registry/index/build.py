"""Graphs in the making, on another thread."""

from concurrent.futures import Executor, Future
from threading import Event
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from registry.index.base import Mask, Rows
from registry.index.rows import VectorRows

if TYPE_CHECKING:
    from collections.abc import Callable

    from registry.index.hnsw import Graph

_BATCH: Final = 256


class Inline(Executor):
    """Runs everything at once on the caller's thread: for tests and tools that may wait."""

    def submit(self, fn: "Callable[..., Any]", /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run it, and return its outcome."""
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  # supervision boundary: goes into the future
            done.set_exception(error)
        return done


class Build:
    """A graph that a worker fills from rows nobody writes meanwhile.

    Args:
        graph: empty; the worker's alone until ``done``.
        vectors: where the rows lie.
        background: whose thread works.
    """

    def __init__(self, graph: "Graph", vectors: VectorRows, background: Executor) -> None:
        self.graph = graph
        self.rounds = 0
        self._vectors = vectors
        self._background = background
        self._held: list[Rows] = []
        self._stop = Event()
        self._future: Future[None] | None = None

    @property
    def done(self) -> bool:
        """Whether the worker has finished with what it was sent after."""
        return self._future is None or self._future.done()

    @property
    def stopped(self) -> bool:
        """Whether nobody wants it any more."""
        cancelled = self._future is not None and self._future.cancelled()
        return cancelled or self._stop.is_set()

    @property
    def error(self) -> BaseException | None:
        """What stopped a round that is done."""
        if self._future is None or self._future.cancelled():
            return None
        return self._future.exception()

    def send(self, rows: Rows) -> None:
        """Have the worker add rows, ascending and none of them there yet.

        Raises:
            RuntimeError: the executor has been shut down.
        """
        self.rounds += 1
        self._held.append(rows)
        self._future = self._background.submit(self._add, rows)

    def stop(self) -> None:
        """Have the worker end after its present batch."""
        self._stop.set()
        if self._future is not None:
            self._future.cancel()

    def held(self, capacity: int) -> Mask:
        """Which rows the graph holds, shape ``(capacity,)``."""
        mask = np.zeros(capacity, dtype=np.bool_)
        for rows in self._held:
            mask[rows] = True
        return mask

    def _add(self, rows: Rows) -> None:
        for at in range(0, len(rows), _BATCH):
            if self._stop.is_set():
                return
            batch = rows[at : at + _BATCH]
            self.graph.add(self._vectors.gather(batch), batch)
