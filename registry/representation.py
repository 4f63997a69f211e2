"""What a search keeps of a record: its words, its vectors, and what filters may ask of it."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np

from capability_schemas.capability import CapabilityPolicy, CatalogRecord, EncoderSpace
from registry.encoders.base import Vectors
from registry.vectors import input_text, readable, unpack_vector

Key = tuple[str, str]
"""``(node, function)``."""

_MOST_SINGLES: Final = 64
_FEW_KEYS: Final = 32
_SHARE: Final = 0.3
_SHARE_FROM: Final = 8
_SHARE_FULL: Final = 20
_SCATTERED: Final = 0.5
_TOGETHER: Final = 0.6


class Embedded(NamedTuple):
    """Vectors of a record.

    Attributes:
        text_id: identity of words and vectors, whoever offers them.
        vector: what stands for it, float32, length 1.
        parts: int8 rows of the single vectors; None where only ``vector`` is known.
    """

    text_id: str
    vector: Vectors
    parts: bytes | None


@dataclass(slots=True)
class Capability:
    """One distinct capability text and everybody who offers it.

    Attributes:
        name: function name of the record that brought it.
        examples: its utterances.
        parts: int8 rows of its single vectors, if known: name and description, then the examples.
        attributes: union over its offers, or more; see ``attributes_of``.
        keys: who offers it.
        worded: whether its words count; those of a bare name do not.
        ordered: ``keys`` in order, once asked for.
        share: weight of the nearest single vector beside the mean, once asked for.
    """

    name: str
    examples: tuple[str, ...]
    parts: bytes | None
    attributes: frozenset[str] = frozenset()
    keys: set[Key] = field(default_factory=set)
    worded: bool = False
    ordered: tuple[Key, ...] | None = None
    share: float | None = None

    def offers(self) -> tuple[Key, ...]:
        """Its keys in order; sorted once after a change."""
        if self.ordered is None:
            self.ordered = tuple(sorted(self.keys))
        return self.ordered

    def join(self, key: Key) -> None:
        """Add an offer."""
        if key not in self.keys:
            self.keys.add(key)
            self.ordered = None

    def leave(self, key: Key) -> bool:
        """Take an offer away; tell whether few enough are left to gather their attributes anew."""
        self.keys.discard(key)
        self.ordered = None
        return len(self.keys) <= _FEW_KEYS

    @property
    def domain(self) -> str:
        """Trust domain: the tenants that its offers serve, and the zones that they are in."""
        parts = (one for one in self.attributes if one.startswith(("tenant:", "zone:")))
        return "\x00".join(sorted(parts))


def attributes_of(record: CatalogRecord) -> frozenset[str]:
    """What demands of a search are compared with (``registry.index``).

    Returns:
        ``zone:X``, ``data:X``, ``grant:X`` and ``skill:X`` for each, ``tenant:X`` (``tenant:`` of
        no tenant), and ``local`` for one that hands nothing to a service outside.
    """
    return _attributes(record.policy, record.skills)


@lru_cache(maxsize=4_096)
def _attributes(policy: CapabilityPolicy, skills: tuple[str, ...]) -> frozenset[str]:
    """The same object for the same policy and skills: fleets have few of them."""
    found = [
        f"tenant:{policy.tenant or ''}",
        *(f"zone:{one}" for one in policy.zones),
        *(f"data:{one}" for one in policy.data),
        *(f"grant:{one}" for one in policy.grants),
        *(f"skill:{one}" for one in skills),
    ]
    return frozenset(found if policy.external else (*found, "local"))


def words_of(record: CatalogRecord) -> list[str]:
    """The words of a record; a description that only says the name again does not count twice."""
    name = readable(record.function)
    again = readable(record.description).lower() == name.lower()
    inputs = input_text(record.input_schema)
    return [
        name,
        *([] if again else [record.description]),
        *record.examples,
        *record.skills,
        *([inputs] if inputs else []),
    ]


def published(record: CatalogRecord, space: EncoderSpace, words: list[str]) -> Embedded | None:
    """The vectors that the registry put into a record.

    Args:
        record: the record.
        space: the space asked for.
        words: ``words_of`` the record.

    Returns:
        None for another space, or an embedding that is not sound. Parts that are not sound, or are
        fewer than the texts, are left out.
    """
    if record.embedding is None or record.space != space:
        return None
    try:
        vector = unpack_vector(record.embedding, space.dimension)
    except ValueError:
        return None
    identity = text_id(record.function, words, record.embedding)
    rows = 1 + len(record.examples)
    return Embedded(identity, vector, sound_parts(record.parts, rows, space.dimension))


def text_id(function: str, words: list[str], vector: str = "") -> str:
    """Identity of what is searched: the words and the vector, not who offers it.

    Args:
        function: name of the function.
        words: ``words_of`` the record.
        vector: packed vector; empty for one that was made here of the words.
    """
    parts = [part.encode() for part in (function, *words, vector)]
    # Each with its length before it: no two lists of parts make the same bytes.
    told = b"".join([piece for part in parts for piece in (len(part).to_bytes(4, "big"), part)])
    return hashlib.sha256(told).hexdigest()[:32]


def sound_parts(packed: str | None, spoken: int, dimension: int) -> bytes | None:
    """The int8 rows of packed single vectors; None for what is unsound, or less than is needed.

    Args:
        packed: as ``pack_parts`` makes it.
        spoken: rows needed.
        dimension: components of a row.
    """
    if packed is None:
        return None
    try:
        raw = base64.b64decode(packed, validate=True)
    except ValueError:
        return None
    return raw if len(raw) >= spoken * dimension and len(raw) % dimension == 0 else None


class SingleVectors:
    """Cosines to single vectors.

    The nearest single example says more than the mean where there are many examples: with thirty
    for each of 77 near-duplicate intents the right one is first in 89 % of the requests instead of
    87 %; with eight it says less. It never counts where the examples have nothing in common: a
    claim that lists everybody's requests would be the nearest of all.

    Args:
        dimension: of the vectors.
    """

    def __init__(self, *, dimension: int) -> None:
        self._dimension = dimension

    def nearest(self, capabilities: Sequence[Capability], vector: Vectors) -> list[float | None]:
        """Cosine of the nearest single vector of each, of 64 at most.

        Args:
            capabilities: some few.
            vector: the request, length 1.

        Returns:
            None where the single vectors are unknown.
        """
        parts = [self._spoken(one) for one in capabilities]
        known = [part for part in parts if part]
        if not known:
            return [None] * len(parts)
        rows = self._rows(b"".join(known))
        starts = np.cumsum([0, *(len(part) // self._dimension for part in known[:-1])])
        best = iter(np.maximum.reduceat(cosines(rows, vector), starts).tolist())
        return [next(best) if part else None for part in parts]

    def share(self, capability: Capability) -> float:
        """How much the nearest single vector counts beside the mean, 0 to 0.3."""
        if capability.share is None:
            rows = None
            if len(capability.examples) > _SHARE_FROM:
                rows = self.all_rows(capability)
            spoken = 1 + len(capability.examples)
            capability.share = 0.0 if rows is None else share_of_nearest(rows[:spoken])
        return capability.share

    def all_rows(self, capability: Capability) -> Vectors | None:
        """Every single vector, in the order of the texts; None where unknown or unsound."""
        if not capability.parts:
            return None
        rows = self._rows(capability.parts)
        lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        if not lengths.all():
            return None
        rows /= lengths[:, np.newaxis]
        return rows

    def _spoken(self, capability: Capability) -> bytes:
        count = min(1 + len(capability.examples), _MOST_SINGLES)
        return (capability.parts or b"")[: count * self._dimension]

    def _rows(self, raw: bytes) -> Vectors:
        return np.frombuffer(raw, dtype=np.int8).reshape(-1, self._dimension).astype(np.float32)


def cosines(rows: Vectors, vector: Vectors) -> Vectors:
    """Cosines of rows of any length to a vector of length 1; 0 for a row of zeros."""
    squares = np.einsum("ij,ij->i", rows, rows)
    near: Vectors = np.einsum("ij,j->i", rows, vector)
    near /= np.sqrt(np.maximum(squares, np.finfo(np.float32).tiny))
    return near


def share_of_nearest(rows: Vectors) -> float:
    """How much the nearest single vector counts beside the mean.

    Args:
        rows: description and examples, shape ``(n, dimension)``, length 1 each.

    Returns:
        0 below eight examples, 0.3 from twenty; less, down to 0, for rows with little in common.
    """
    many = _ramp(len(rows) - 1, _SHARE_FROM, _SHARE_FULL)
    if not many:
        return 0.0
    # The length of the mean of unit vectors is their mean cosine to its direction.
    mean = rows.mean(axis=0)
    together = float(np.sqrt(np.einsum("i,i->", mean, mean)))
    return _SHARE * many * _ramp(together, _SCATTERED, _TOGETHER)


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
