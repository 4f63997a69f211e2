"""Nearest-neighbour search over capability vectors.

``CapabilityIndex`` compares all vectors while they are few and goes through graphs when they are
many; ``registry.index.hnsw`` is imported when the first graph is due, because hnswlib has to be
compiled and may be missing.
"""

from registry.index.base import Demands, Neighbour
from registry.index.capability import EXACT_LIMIT, CapabilityIndex

__all__ = ["EXACT_LIMIT", "CapabilityIndex", "Demands", "Neighbour"]
