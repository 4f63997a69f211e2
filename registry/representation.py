"""What a search keeps of a record: its words, its vectors, and what filters may ask of it."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from capability_schemas.capability import CatalogRecord, EncoderSpace
from registry.encoders.base import Vectors
from registry.vectors import input_text, readable, unpack_parts, unpack_vector

Key = tuple[str, str]
"""``(node, function)``."""

_UNPACKED: Final = 512
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
        parts: packed single vectors; None where only ``vector`` is known.
    """

    text_id: str
    vector: Vectors
    parts: str | None


@dataclass(slots=True)
class Capability:
    """One distinct capability text and everybody who offers it.

    Attributes:
        name: function name of the record that brought it.
        examples: its utterances.
        parts: packed single vectors, if known.
        keys: who offers it.
        attributes: union over its offers, or more; see ``attributes_of``.
        worded: whether its words count; those of a bare name do not.
        ordered: ``keys`` in order, once asked for.
    """

    name: str
    examples: tuple[str, ...]
    parts: str | None
    keys: set[Key] = field(default_factory=set)
    attributes: frozenset[str] = frozenset()
    worded: bool = False
    ordered: tuple[Key, ...] | None = None

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
        """Trust domain: the zones that its offers are in."""
        return "\x00".join(sorted(one for one in self.attributes if one.startswith("zone:")))


def attributes_of(record: CatalogRecord) -> frozenset[str]:
    """What demands of a search are compared with (``registry.index``).

    Returns:
        ``zone:X``, ``data:X``, ``grant:X`` and ``skill:X`` for each, and ``local`` for one that
        hands nothing to a service outside.
    """
    policy = record.policy
    found = [
        *(f"zone:{one}" for one in policy.zones),
        *(f"data:{one}" for one in policy.data),
        *(f"grant:{one}" for one in policy.grants),
        *(f"skill:{one}" for one in record.skills),
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


def published(record: CatalogRecord, space: EncoderSpace) -> Embedded | None:
    """The vectors that the registry put into a record.

    Returns:
        None for another space, or an embedding that is not sound. Parts that are not sound, or are
        more or fewer than the texts, are left out.
    """
    if record.embedding is None or record.space != space:
        return None
    try:
        vector = unpack_vector(record.embedding, space.dimension)
    except ValueError:
        return None
    identity = text_id(record, record.embedding)
    rows = (1 + len(record.examples)) * space.dimension
    parts = record.parts
    if parts is not None and len(parts) // 4 * 3 < rows:
        parts = None
    return Embedded(identity, vector, parts)


def text_id(record: CatalogRecord, vector: str = "") -> str:
    """Identity of what is searched: the words and the vector, not who offers it.

    Args:
        record: the record.
        vector: packed vector; empty for one that was made here of the words.
    """
    digest = hashlib.sha256()
    for part in (record.function, *words_of(record), vector):
        data = part.encode()
        digest.update(len(data).to_bytes(4, "big"))
        digest.update(data)
    return digest.hexdigest()[:32]


class Singles(NamedTuple):
    """Single vectors of a capability, ready to compare.

    Attributes:
        rows: description and examples, float32, shape ``(n, dimension)``, 64 at most.
        share: weight of the nearest of them in the score beside the mean, 0 to 0.3.
    """

    rows: Vectors
    share: float


class SingleVectors:
    """Single vectors, unpacked when first needed; the most recent 512 capabilities stay unpacked.

    The nearest single example says more than the mean where there are many examples: with thirty
    for each of 77 near-duplicate intents the right one is first in 89 % of the requests instead of
    87 %; with eight it says less. It never counts where the examples have nothing in common: a
    claim that lists everybody's requests would be the nearest of all.

    Args:
        dimension: of the vectors.
    """

    def __init__(self, *, dimension: int) -> None:
        self._dimension = dimension
        self._recent: OrderedDict[str, Singles | None] = OrderedDict()

    def of(self, text_id: str, capability: Capability) -> Singles | None:
        """The single vectors of a capability; None where they are unknown or unsound."""
        if capability.parts is None:
            return None
        if text_id in self._recent:
            self._recent.move_to_end(text_id)
            return self._recent[text_id]
        made = self._recent[text_id] = self._unpacked(capability)
        if len(self._recent) > _UNPACKED:
            self._recent.popitem(last=False)
        return made

    def all_rows(self, capability: Capability) -> Vectors | None:
        """Every single vector, in the order of the texts; None where unknown or unsound."""
        if capability.parts is None:
            return None
        try:
            return unpack_parts(capability.parts, self._dimension)
        except ValueError:
            return None

    def _unpacked(self, capability: Capability) -> Singles | None:
        rows = self.all_rows(capability)
        spoken = 1 + len(capability.examples)
        if rows is None or len(rows) < spoken:
            return None
        return Singles(rows[: min(spoken, _MOST_SINGLES)], share_of_nearest(rows[:spoken]))


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


def union(records: Iterable[CatalogRecord]) -> frozenset[str]:
    """Attributes of any of some records."""
    return frozenset().union(*(attributes_of(record) for record in records))


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
