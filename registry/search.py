"""Which capabilities fit a request, by meaning and by words.

Pure and synchronous: records go in as the catalogue tells of them, a request and its vector go in,
ranked matches come out (``registry.ranking`` has the score). Gates, load and cost are the router's.
One owner (the router's loop) uses an instance; nothing here blocks for longer than a few
milliseconds, whatever the size of the catalogue.
"""

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from capability_schemas.capability import CatalogRecord, EncoderSpace
from registry.background import BACKGROUND
from registry.calibration import ENOUGH_EXAMPLES, Calibration, HeldOut, fit, fit_half, prior
from registry.encoders.base import Vectors, checked
from registry.index import CapabilityIndex, Demands
from registry.ranking import Ranking, bounded
from registry.representation import (
    Capability,
    Embedded,
    Key,
    attributes_of,
    published,
    sound_parts,
    text_id,
    words_of,
)
from registry.vectors import capability_texts, capability_vector, pack_parts

EXACT_LIMIT: Final = 4_000
_HELD_OUT_PER_CAPABILITY: Final = 4
_HELD_OUT_LIMIT: Final = 256
_STEPS_PER_TURN: Final = 4


class Match(NamedTuple):
    """One offer that fits a request to some degree.

    Attributes:
        key: ``(node, function)``.
        score: mixed score, 0 to 1; what ``threshold`` is compared with.
        dense: cosine of the request to the capability's vector, -1 to 1.
        lexical: squashed lexical coverage, 0 to 1; None for a bare name.
        capability: identity of the text; the same for offers of the very same.
    """

    key: Key
    score: float
    dense: float
    lexical: float | None
    capability: str


class CapabilitySearch:
    """Semantic index of the admitted records.

    The same text offered by several nodes is indexed once: ten nodes with one function neither
    crowd others out of the candidates nor bend word frequencies and calibration.

    Args:
        space: vector space of the requests. Records of another space stay addressable by name, but
            are never compared until ``upsert`` is given vectors of their texts in this one.
        exact_limit: distinct capabilities above which graphs take over.
        background: builds graphs and writes snapshots; see ``CapabilityIndex``.
    """

    def __init__(
        self,
        *,
        space: EncoderSpace,
        exact_limit: int = EXACT_LIMIT,
        background: Executor | None = None,
    ) -> None:
        self._space = space
        self._exact_limit = exact_limit
        self._background = background
        self._attributes: dict[Key, frozenset[str]] = {}
        self._text_of: dict[Key, str] = {}
        self._unembedded: dict[Key, CatalogRecord] = {}
        self._ranking = Ranking(
            index=CapabilityIndex(
                dimension=space.dimension,
                space=_name_of(space),
                exact_limit=exact_limit,
                background=background,
            ),
            dimension=space.dimension,
        )
        self._calibration: Calibration | None = None
        self._exampled = 0
        self._changed = False

    def __len__(self) -> int:
        return len(self._attributes)

    @property
    def space(self) -> EncoderSpace:
        """Vector space of the requests."""
        return self._space

    @property
    def index(self) -> CapabilityIndex:
        """The vectors; for ``maintain`` and ``close``, and to see how it is getting on."""
        return self._ranking.index

    @property
    def threshold(self) -> float:
        """Lowest score that counts as an answer; below it the answer is ``no_capable_node``."""
        return self.calibration.threshold

    @property
    def calibration(self) -> Calibration:
        """What holds now: the last fit, or the prior of this catalogue."""
        if self._calibration is not None:
            return self._calibration
        return prior(self._share_exampled, half=self._ranking.half)

    @property
    def needs_calibration(self) -> bool:
        """Whether the distinct capabilities have changed since the last fit."""
        return self._changed

    def __contains__(self, key: object) -> bool:
        return key in self._attributes

    def waiting(self, key: Key) -> CatalogRecord | None:
        """The record of a key that has no vectors in this space yet; None for any other."""
        return self._unembedded.get(key)

    def unembedded(self) -> list[Key]:
        """Keys whose records have no vectors in this space yet."""
        return list(self._unembedded)

    def upsert(self, record: CatalogRecord, *, parts: Vectors | None = None) -> bool:
        """Take up a record in place of an earlier one of its key.

        Of a record that can be found, no more is kept than what finding it takes.

        Args:
            record: an admitted record; order and signature are checked by the caller.
            parts: vectors of ``capability_texts`` of the record in this space, made here because
                the record has none; shape ``(n, dimension)``, rows of length 1. They serve every
                later record of the same texts too.

        Returns:
            Whether it can be found by meaning: its vector is there, sound, and of this space.

        Raises:
            ValueError: ``parts`` has another shape, or a row that is not of length 1.
        """
        key = record.key
        words = words_of(record)
        found = published(record, self._space, words)
        if found is None:
            found = self._made_here(record, parts, words)
        known = text_id(record.function, words) if found is None else found.text_id
        reachable = found is not None or known in self._capabilities
        if self._text_of.get(key) != known or not reachable:
            self._detach(key)
        self._attributes[key] = attributes_of(record)
        if not reachable:
            self._unembedded[key] = record
            return False
        self._unembedded.pop(key, None)
        self._attach(record, known, found, words)
        return True

    def remove(self, key: Key) -> bool:
        """Forget a key.

        Returns:
            Whether it was there.
        """
        known = self._attributes.pop(key, None)
        self._unembedded.pop(key, None)
        self._detach(key)
        return known is not None

    def search(self, text: str, vector: Vectors, k: int, *, demands: Demands = ()) -> list[Match]:
        """Rank what is on offer.

        Args:
            text: the request.
            vector: the request embedded in ``space``, shape ``(dimension,)``, length 1.
            k: how many distinct capabilities; each is returned with every key that offers it.
            demands: only capabilities of which every set shares a member with the attributes
                (``attributes_of``) of their offers taken together; the gates judge each offer.

        Returns:
            By falling score, then by capability and key; not cut at ``threshold``, so that near
            misses can be told.

        Raises:
            ValueError: the vector has another shape or length.
        """
        if k < 1 or not self._capabilities:
            return []
        ranked = self._ranking.rank(text, vector, k, demands=demands)
        shift = self._ranking.shift(vector, ranked.nearest)
        return [
            Match(key, score, one.dense, one.lexical, one.text_id)
            for one in ranked.found[:k]
            for score in (bounded(one.score + shift),)
            for key in self._capabilities[one.text_id].offers()
        ]

    # ---- snapshots

    def snapshot(self, path: Path) -> "Future[None]":
        """Write the index into a folder; see ``CapabilityIndex.save``."""
        return self.index.save(path)

    def restore(self, path: Path) -> None:
        """Read an index that ``snapshot`` wrote, before the first record comes.

        The records of the catalogue then find their vectors in place; ``forget_unclaimed`` drops
        those that no record came for.

        Args:
            path: folder.

        Raises:
            ConfigurationError: no snapshot, or one that is torn or of another space.
        """
        index = CapabilityIndex.load(
            path,
            dimension=self._space.dimension,
            space=_name_of(self._space),
            exact_limit=self._exact_limit,
            background=self._background,
        )
        self._ranking = Ranking(index=index, dimension=self._space.dimension)

    def forget_unclaimed(self) -> int:
        """Drop restored vectors that no record stands for; return how many."""
        return self.index.retain(self._capabilities)

    # ---- calibration

    def calibration_texts(self) -> list[str]:
        """Texts to embed for ``calibrate``.

        The background once, and held-out examples (256 at most) of records that came without
        single vectors.
        """
        talk = [] if len(self._ranking.background) else list(BACKGROUND)
        return talk + [
            example for at, example in self._held_out() if self._capabilities[at].parts is None
        ]

    def calibrate(self, vectors: Mapping[str, Vectors]) -> Calibration:
        """Fit threshold, probability and lexical squash to the catalogue by leave-one-out.

        Takes about a millisecond for each text; ``recalibrate`` does the same in small steps.

        Args:
            vectors: vectors of ``calibration_texts()``; texts without one are left out.

        Returns:
            What holds from now on.
        """
        for _ in self.calibrating(vectors):
            pass
        return self.calibration

    def calibrating(self, vectors: Mapping[str, Vectors]) -> Iterator[None]:
        """``calibrate`` in steps: pauses after every text, and changes may happen in between.

        Args:
            vectors: as for ``calibrate``.
        """
        asked = self._held_out()
        ranking = self._ranking
        self._changed = False
        if not len(ranking.background) and all(text in vectors for text in BACKGROUND):
            ranking.background = np.stack([vectors[text] for text in BACKGROUND])
        ranking.half = fit_half([ranking.covered_without(at, example) for at, example in asked])
        inside: list[HeldOut] = []
        for at, example in asked:
            if at in self._capabilities:
                one = ranking.hold_out(at, example, vectors)
                inside += [] if one is None else [one]
            yield
        outside: list[float] = []
        for text, vector in zip(BACKGROUND, ranking.background, strict=False):
            outside += [match.score for match in self.search(text, vector, 1)[:1]]
            yield
        self._calibration = fit(inside, outside, self._share_exampled, half=ranking.half)

    def _held_out(self) -> list[tuple[str, str]]:
        """Spread the sample over the capabilities, the same one for the same catalogue."""
        budget = max(1, _HELD_OUT_LIMIT // max(1, len(self._capabilities)))
        each = min(_HELD_OUT_PER_CAPABILITY, budget)
        first = _first(self._capabilities, _HELD_OUT_LIMIT)
        sample = [
            (at, example) for at in first for example in self._capabilities[at].examples[:each]
        ]
        return sample[:_HELD_OUT_LIMIT]

    # ---- what comes and goes

    @property
    def _capabilities(self) -> dict[str, Capability]:
        return self._ranking.capabilities

    @property
    def _share_exampled(self) -> float:
        most = ENOUGH_EXAMPLES * len(self._capabilities)
        return self._exampled / most if most else 1.0

    def _made_here(
        self, record: CatalogRecord, parts: Vectors | None, words: list[str]
    ) -> Embedded | None:
        if parts is None:
            return None
        texts = capability_texts(
            record.function, record.description, record.examples, record.input_schema
        )
        if parts.shape != (len(texts), self._space.dimension):
            raise ValueError(
                f"parts of {record.function} have the shape {parts.shape}, not"
                f" {(len(texts), self._space.dimension)}"
            )
        rows = np.stack([checked(row, self._space.dimension) for row in parts])
        vector = capability_vector(rows, len(record.examples))
        packed = sound_parts(pack_parts(rows), 1 + len(record.examples), self._space.dimension)
        return Embedded(text_id(record.function, words), vector, packed)

    def _attach(
        self, record: CatalogRecord, at: str, found: Embedded | None, words: list[str]
    ) -> None:
        key = record.key
        capability = self._capabilities.get(at)
        attributes = self._attributes[key]
        if capability is None and found is not None:
            capability = Capability(record.function, record.examples, found.parts, attributes)
            self._ranking.add(at, capability, found.vector, words)
            self._exampled += _exampled(capability)
            self._changed = True
        if capability is None:
            return
        capability.join(key)
        self._text_of[key] = at
        if len(capability.keys) == 1:
            self._ranking.describe(at, attributes)
        elif not attributes <= capability.attributes:
            self._ranking.describe(at, capability.attributes | attributes)

    def _detach(self, key: Key) -> None:
        at = self._text_of.pop(key, None)
        if at is None:
            return
        capability = self._capabilities[at]
        few = capability.leave(key)
        if capability.keys:
            if few:  # of many, what one of them had may stay: demands need be no sharper
                left = (self._attributes[one] for one in capability.keys)
                self._ranking.describe(at, frozenset().union(*left))
            return
        self._ranking.drop(at)
        self._exampled -= _exampled(capability)
        self._changed = True


async def recalibrate(
    search: CapabilitySearch, encode: Callable[[Sequence[str]], Awaitable[Vectors]]
) -> Calibration:
    """Embed what is missing and fit the calibration; for a background task.

    Args:
        search: what to calibrate; it may change meanwhile, the fit then uses what is still there.
        encode: embeds texts in the space of ``search`` without blocking (``EncoderThread.encode``).

    Returns:
        What holds from now on.
    """
    texts = list(dict.fromkeys(search.calibration_texts()))
    rows = await encode(texts) if texts else np.empty((0, search.space.dimension), np.float32)
    for step, _ in enumerate(search.calibrating(dict(zip(texts, rows, strict=True)))):
        if step % _STEPS_PER_TURN == 0:
            await asyncio.sleep(0)
    return search.calibration


def _first(names: Collection[str], count: int) -> list[str]:
    """The first of many hexadecimal digests, in order."""
    # Digests are spread evenly: what is below a bound is nearly always enough, and a quick sieve.
    bound = f"{min(0xFFFF_FFFF, 2 * count * 2**32 // max(1, len(names))):08x}"
    few = [name for name in names if name < bound]
    return heapq.nsmallest(count, few if len(few) >= count else names)


def _exampled(capability: Capability) -> int:
    """How many examples it counts for; a description is one, and more than enough are enough."""
    return min(ENOUGH_EXAMPLES, len(capability.examples) + capability.worded)


def _name_of(space: EncoderSpace) -> str:
    return f"{space.model} {space.revision} {space.dimension}"
