"""Nearest-neighbour indexes behind one contract.

``ExactIndex`` is always there. ``registry.index.hnsw.HnswIndex`` serves large catalogues and is
imported from its own module, because hnswlib has to be compiled and may be missing.
"""

from registry.index.base import Neighbour, VectorIndex
from registry.index.exact import ExactIndex

__all__ = ["ExactIndex", "Neighbour", "VectorIndex"]
