"""Approximate search by a hierarchical small-world graph: the only door to hnswlib.

Algorithm: Malkov and Yashunin, arXiv 1603.09320. The library's hazards, all seen in version 0.8.0,
are closed off here: querying before ``init_index`` crashes the process; asking for more than lives,
or of an empty graph, raises; adding beyond the capacity raises after a partial add; a label that
was deleted cannot be added again, one that is there is updated in place at 3.7 times the cost and
wears the graph out; burying twice raises; the breadth of search is 10 again after loading; adding
while another thread asks makes queries fail. A graph therefore belongs to one thread at a time.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import hnswlib
import numpy as np
import numpy.typing as npt

from registry.index.base import Rows, Similarities

M: Final = 16
EF_CONSTRUCTION: Final = 100
EF: Final = 64
"""Measured: these find 0.995 of the true ten nearest among 10,000; more links gain nothing."""
_EF_FEW: Final = 48
"""Finds 0.995 of the true six nearest among 25,000 in 0.17 instead of 0.2 ms; of 32, 0.955."""
_USUAL: Final = 32_000
"""Vectors that these breadths are for; of more the search must be broader by as much: a graph of
100,000 blended vectors gives 0.875 of the true ten nearest with a breadth of 64, 0.997 with 192."""
_SEED: Final = 7
_SPACE: Final = "ip"
"""The inner product of unit vectors is their cosine, and keeps the vectors as they were given."""


class Graph:
    """Labelled unit vectors in a graph; a label is used once and may then only be buried.

    Args:
        dimension: length of every vector.
        capacity: places to begin with; memory is taken as they fill. Going beyond enlarges it,
            which stops everything for 40 ms at a hundred thousand.
        stored: file that ``save`` wrote, known to be whole, to begin with; read at about 6 µs a
            vector, everything stops meanwhile.
        buried: labels buried in that file, which holds them but does not tell.

    Raises:
        RuntimeError: ``stored`` is no graph of this dimension.
    """

    def __init__(
        self,
        *,
        dimension: int,
        capacity: int,
        stored: Path | None = None,
        buried: Iterable[int] = (),
    ) -> None:
        self._graph: Any = hnswlib.Index(space=_SPACE, dim=dimension)
        self._buried = set(buried)
        places = max(1, capacity)
        if stored is not None:
            self._graph.load_index(str(stored), max_elements=places)
            return
        self._graph.init_index(
            max_elements=places, M=M, ef_construction=EF_CONSTRUCTION, random_seed=_SEED
        )

    def __len__(self) -> int:
        """How many labels are there, the buried among them."""
        return int(self._graph.get_current_count())

    @property
    def capacity(self) -> int:
        """How many labels there is room for."""
        return int(self._graph.get_max_elements())

    @property
    def buried(self) -> frozenset[int]:
        """Labels that stand for nothing any more."""
        return frozenset(self._buried)

    @property
    def living(self) -> int:
        """How many labels can be found."""
        return len(self) - len(self._buried)

    def add(self, vectors: npt.NDArray[np.float32], labels: Rows) -> None:
        """Add vectors; about 0.1 ms each at ten thousand, 0.3 ms at a hundred thousand.

        Lets go of the interpreter lock meanwhile.

        Args:
            vectors: float32, shape ``(n, dimension)``, finite and of length 1.
            labels: shape ``(n,)``, never added before.
        """
        needed = len(self) + len(labels)
        if needed > self.capacity:
            self._graph.resize_index(max(needed, 2 * len(self)))
        self._graph.add_items(vectors, labels, num_threads=1)

    def bury(self, label: int) -> None:
        """Have a label found no more; burying it again changes nothing."""
        if label not in self._buried:
            self._graph.mark_deleted(label)
            self._buried.add(label)

    def search(
        self, vector: npt.NDArray[np.float32], k: int, *, thorough: bool = True
    ) -> tuple[Rows, Similarities] | None:
        """Find the labels nearest to a vector, nearly always all of them.

        Args:
            vector: float32, shape ``(dimension,)``, of length 1.
            k: how many; fewer come back when fewer live.
            thorough: whether nearly all of many are wanted; else some few, in a little less time.

        Returns:
            Labels and their cosines, nearest first; None when clustered graves hide the living
            from so narrow a search, so that the caller must compare one by one.
        """
        k = min(k, self.living)
        if k < 1:
            return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.float32)
        breadth = (EF if thorough else _EF_FEW) * max(_USUAL, len(self)) // _USUAL
        self._graph.set_ef(max(breadth, k))
        try:
            labels, distances = self._graph.knn_query(vector[np.newaxis, :], k=k, num_threads=1)
        except RuntimeError:  # "Cannot return the results in a contiguous 2D array"
            return None
        return labels[0].astype(np.intp), np.float32(1.0) - distances[0]

    def save(self, path: Path) -> None:
        """Write the graph to a file.

        The library holds the interpreter lock meanwhile: everything stops, 8 µs a vector.

        Raises:
            RuntimeError: the file cannot be written.
        """
        self._graph.save_index(str(path))
