"""Which capabilities fit a request, by meaning and by words.

Pure and synchronous: records go in as the catalogue tells of them, a request and its vector go in,
ranked matches come out. Gates, load and cost are the router's. One owner (the router's loop) uses
an instance; nothing here blocks for longer than a few milliseconds on catalogues of thousands.

Score of a capability: 0.7 of the cosine to the centroid that the registry embedded (``name:
description`` and examples), 0.3 of the squashed lexical coverage. On the developers' set this mix
found the right one of 199 first in 76 % of the requests; reciprocal rank fusion and the nearest
single example were worse.
"""

import asyncio
import hashlib
import heapq
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from capability_schemas.capability import CatalogRecord, EncoderSpace
from registry.calibration import (
    DEFAULT_HALF,
    Calibration,
    fit_half,
    fit_threshold,
    prior_threshold,
)
from registry.encoders.base import Vectors, unit
from registry.index.base import VectorIndex
from registry.index.exact import ExactIndex
from registry.lexical import LexicalIndex, squash
from registry.vectors import unpack_vector

if TYPE_CHECKING:
    from registry.index.hnsw import HnswIndex

Key = tuple[str, str]
"""``(node, function)``."""

LEXICAL_SHARE: Final = 0.3
EXACT_LIMIT: Final = 10_000
_CANDIDATES: Final = 64
_MOVED_PER_CHANGE: Final = 32
_HELD_OUT_PER_CAPABILITY: Final = 4
_HELD_OUT_LIMIT: Final = 256
_STEPS_PER_TURN: Final = 4


class Match(NamedTuple):
    """One offer that fits a request to some degree.

    Attributes:
        key: ``(node, function)``.
        score: mixed score, 0 to 1; what ``threshold`` is compared with.
        dense: cosine of the request to the capability's centroid, -1 to 1.
        lexical: squashed lexical coverage, 0 to 1; None for a bare name, whose score is ``dense``.
    """

    key: Key
    score: float
    dense: float
    lexical: float | None


@dataclass(slots=True)
class _Capability:
    """One distinct capability text and everybody who offers it."""

    name: str
    examples: tuple[str, ...]
    vector: Vectors
    keys: set[Key] = field(default_factory=set)


class CapabilitySearch:
    """Semantic index of the admitted records.

    The same text offered by several nodes is indexed once: ten nodes with one function neither
    crowd others out of the candidates nor bend word frequencies and calibration.

    Args:
        space: vector space of the requests. Records of another space stay addressable by name,
            but are never compared.
        exact_limit: distinct capabilities above which the graph index takes over.
    """

    def __init__(self, *, space: EncoderSpace, exact_limit: int = EXACT_LIMIT) -> None:
        self._space = space
        self._exact_limit = exact_limit
        self._records: dict[Key, CatalogRecord] = {}
        self._text_of: dict[Key, str] = {}
        self._capabilities: dict[str, _Capability] = {}
        self._lexical = LexicalIndex()
        self._exact: VectorIndex = ExactIndex(dimension=space.dimension)
        self._graph: VectorIndex | None = None
        self._to_move: list[str] = []
        self._calibration: Calibration | None = None
        self._half = DEFAULT_HALF
        self._changed = False

    def __len__(self) -> int:
        return len(self._records)

    @property
    def space(self) -> EncoderSpace:
        """Vector space of the requests."""
        return self._space

    @property
    def threshold(self) -> float:
        """Lowest score that counts as an answer; below it the answer is ``no_capable_node``."""
        return self.calibration.threshold

    @property
    def calibration(self) -> Calibration:
        """What holds now: the last fit, or the prior of this catalogue."""
        if self._calibration is not None:
            return self._calibration
        return Calibration(threshold=self._prior(), half=self._half, held_out=0)

    @property
    def needs_calibration(self) -> bool:
        """Whether the distinct capabilities have changed since the last fit."""
        return self._changed

    def record(self, key: Key) -> CatalogRecord | None:
        """The record of a key, searchable or not."""
        return self._records.get(key)

    def records(self) -> Iterable[CatalogRecord]:
        """Every record, searchable or not."""
        return self._records.values()

    def upsert(self, record: CatalogRecord) -> bool:
        """Store a record in place of an earlier one of its key.

        Args:
            record: an admitted record; order and signature are checked by the caller.

        Returns:
            Whether it can be found by meaning: its vector is there, sound, and of this space.
        """
        key = record.key
        vector = self._vector(record)
        text_id = _text_id(record) if vector is not None else None
        if self._text_of.get(key) != text_id:
            self._detach(key)
        self._records[key] = record
        if vector is None or text_id is None:
            return False
        capability = self._capabilities.get(text_id)
        if capability is None:
            capability = _Capability(record.function, record.examples, vector)
            self._capabilities[text_id] = capability
            self._lexical.upsert(text_id, _lexical_parts(record))
            self._add_vector(text_id, vector)
            self._changed = True
        capability.keys.add(key)
        self._text_of[key] = text_id
        return True

    def remove(self, key: Key) -> bool:
        """Forget a key.

        Returns:
            Whether it was there.
        """
        self._detach(key)
        return self._records.pop(key, None) is not None

    def search(self, text: str, vector: Vectors, k: int) -> list[Match]:
        """Rank what is on offer.

        Args:
            text: the request.
            vector: the request embedded in ``space``, shape ``(dimension,)``, length 1.
            k: how many distinct capabilities; each is returned with every key that offers it.

        Returns:
            By falling score, then by key; not cut at ``threshold``, so that near misses can be
            told.

        Raises:
            ValueError: the vector has another shape or length.
        """
        if k < 1 or not self._capabilities:
            return []
        scored = self._scored(text, vector, max(_CANDIDATES, 4 * k))
        scored.sort(key=lambda entry: (-entry[1], entry[0]))
        return [
            Match(key, score, cosine, lexical)
            for text_id, score, cosine, lexical in scored[:k]
            for key in sorted(self._capabilities[text_id].keys)
        ]

    def calibration_texts(self) -> list[str]:
        """Examples to embed for ``calibrate``: a few of each capability, 256 at most."""
        return [example for _, example in self._held_out()]

    def calibrate(self, vectors: Mapping[str, Vectors]) -> Calibration:
        """Fit threshold and lexical squash to the present catalogue by leave-one-out.

        Takes about a millisecond for each text; ``recalibrate`` does the same in small steps.

        Args:
            vectors: vectors of ``calibration_texts()``; examples without one are left out.

        Returns:
            What holds from now on.
        """
        for _ in self.calibrating(vectors):
            pass
        return self.calibration

    def calibrating(self, vectors: Mapping[str, Vectors]) -> Iterator[None]:
        """``calibrate`` in steps: pauses after every example, and changes may happen in between.

        Args:
            vectors: as for ``calibrate``.
        """
        asked = [(at, example) for at, example in self._held_out() if example in vectors]
        self._changed = False
        self._half = fit_half(
            [self._lexical.coverage_without(at, example) for at, example in asked]
        )
        tops = []
        for text_id, example in asked:
            if text_id in self._capabilities:
                tops.append(self._score_held_out(text_id, example, vectors[example]))
            yield
        self._calibration = Calibration(
            threshold=fit_threshold(tops, self._prior()), half=self._half, held_out=len(tops)
        )

    @property
    def _index(self) -> VectorIndex:
        return self._graph if self._graph is not None and not self._to_move else self._exact

    def _scored(
        self, text: str, vector: Vectors, wanted: int
    ) -> list[tuple[str, float, float, float | None]]:
        """Score the nearest by meaning and the best covering by words, in no order."""
        dense = dict(self._index.search(vector, wanted))
        covered = self._lexical.coverage(text, dense)
        for text_id in heapq.nlargest(wanted, covered, key=lambda at: (covered[at], at)):
            if text_id not in dense:
                dense[text_id] = float(self._capabilities[text_id].vector @ vector)
        return [self._mix(at, cosine, covered.get(at, 0.0)) for at, cosine in dense.items()]

    def _mix(
        self, text_id: str, cosine: float, covered: float
    ) -> tuple[str, float, float, float | None]:
        if text_id not in self._lexical:
            return text_id, _bounded(cosine), cosine, None
        lexical = squash(covered, self._half)
        mixed = (1.0 - LEXICAL_SHARE) * cosine + LEXICAL_SHARE * lexical
        return text_id, _bounded(mixed), cosine, lexical

    def _score_held_out(self, text_id: str, example: str, vector: Vectors) -> float:
        """Best score over the catalogue for an example nobody advertised."""
        others = (
            score for at, score, _, _ in self._scored(example, vector, _CANDIDATES) if at != text_id
        )
        best_other = max(others, default=0.0)
        centroid = self._centroid_without(self._capabilities[text_id], vector)
        covered = self._lexical.coverage_without(text_id, example)
        return max(self._mix(text_id, float(centroid @ vector), covered)[1], best_other)

    def _centroid_without(self, capability: _Capability, left_out: Vectors) -> Vectors:
        """Take one of the n averaged unit vectors out of a centroid.

        The mean's length, lost when the registry scaled it to 1, is the mean cosine of the parts to
        the centroid; the left-out part stands in for all of them. Exact when the parts are equally
        far from their centroid.
        """
        parts = len(capability.examples) + 1
        length = max(0.2, float(capability.vector @ left_out))
        rest = parts * length * capability.vector - left_out
        try:
            return unit(rest)
        except ValueError:
            return capability.vector

    def _held_out(self) -> list[tuple[str, str]]:
        """Spread the sample over the capabilities, the same one for the same catalogue."""
        budget = max(1, _HELD_OUT_LIMIT // max(1, len(self._capabilities)))
        each = min(_HELD_OUT_PER_CAPABILITY, budget)
        sample = [
            (text_id, example)
            for text_id in sorted(self._capabilities)
            for example in self._capabilities[text_id].examples[:each]
        ]
        return sample[:_HELD_OUT_LIMIT]

    def _prior(self) -> float:
        return prior_threshold([len(entry.examples) for entry in self._capabilities.values()])

    def _vector(self, record: CatalogRecord) -> Vectors | None:
        if record.embedding is None or record.space != self._space:
            return None
        try:
            return unpack_vector(record.embedding, self._space.dimension)
        except ValueError:
            return None

    def _detach(self, key: Key) -> None:
        text_id = self._text_of.pop(key, None)
        if text_id is None:
            return
        capability = self._capabilities[text_id]
        capability.keys.discard(key)
        if capability.keys:
            return
        del self._capabilities[text_id]
        self._lexical.remove(text_id)
        self._exact.remove(text_id)
        if self._graph is not None:
            self._graph.remove(text_id)
        self._changed = True

    def _add_vector(self, text_id: str, vector: Vectors) -> None:
        """Index a vector; past the limit, move the catalogue to the graph a few vectors at a time.

        A graph of ten thousand takes a second to build, which no event loop can spare at once.
        """
        self._exact.upsert(text_id, vector)
        if self._graph is None:
            if len(self._exact) <= self._exact_limit:
                return
            self._graph = _make_graph(self._space.dimension)
            if self._graph is None:
                return
            self._to_move = list(self._capabilities)
        self._graph.upsert(text_id, vector)
        for _ in range(min(_MOVED_PER_CHANGE, len(self._to_move))):
            moved = self._to_move.pop()
            if moved in self._capabilities and moved not in self._graph:
                self._graph.upsert(moved, self._capabilities[moved].vector)


async def recalibrate(
    search: CapabilitySearch, encode: Callable[[Sequence[str]], Awaitable[Vectors]]
) -> Calibration:
    """Embed the sample of examples and fit the threshold; for a background task.

    Args:
        search: what to calibrate; it may change meanwhile, the fit then uses what is still there.
        encode: embeds texts in the space of ``search`` without blocking (``EncoderThread.encode``).

    Returns:
        What holds from now on.
    """
    texts = list(dict.fromkeys(search.calibration_texts()))
    rows = await encode(texts)
    for step, _ in enumerate(search.calibrating(dict(zip(texts, rows, strict=True)))):
        if step % _STEPS_PER_TURN == 0:
            await asyncio.sleep(0)
    return search.calibration


@lru_cache(maxsize=1)
def _graph_class() -> "type[HnswIndex] | None":
    """The graph index, or None where hnswlib was not built: exact search is slower, never wrong."""
    try:
        from registry.index.hnsw import HnswIndex  # noqa: PLC0415 - compiled, and optional
    except ImportError:
        return None
    return HnswIndex


def _make_graph(dimension: int) -> VectorIndex | None:
    made = _graph_class()
    return None if made is None else made(dimension=dimension)


def _bounded(score: float) -> float:
    return min(1.0, max(0.0, score))


def _lexical_parts(record: CatalogRecord) -> list[str]:
    return [record.function, record.description, *record.examples, *record.skills]


def _text_id(record: CatalogRecord) -> str:
    """Identity of what is searched: the words and the vector, not who offers it."""
    digest = hashlib.sha256()
    for part in (*_lexical_parts(record), record.embedding or ""):
        data = part.encode()
        digest.update(len(data).to_bytes(4, "big"))
        digest.update(data)
    return digest.hexdigest()[:32]
