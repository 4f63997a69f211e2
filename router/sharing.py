"""Records of large catalogues, kept small: what is equal is kept once, vectors not at all. Pure."""

import gc
from collections.abc import Hashable
from typing import Any, Final, TypeVar

from capability_schemas.capability import CatalogRecord

_REMEMBERED: Final = 10_000
_SHARED: Final = ("policy", "resources", "cost", "space", "model", "skills", "modalities")
_SCHEMAS: Final = ("input_schema", "output_schema")
_VECTORS: Final = ("embedding", "parts")

_CHANGES: Final = 1_000

Equal = TypeVar("Equal")


class Sharing:
    """Makes light records; a hundred thousand take 0.3 GB instead of 1.2.

    Nodes of one site say the same of themselves, and nodes of one function have its schema each.
    What was decoded from JSON is never changed, so that one object may stand for all equal ones.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def lighten(self, record: CatalogRecord) -> CatalogRecord:
        """Return a record without its vectors, which shares with others what they have in common.

        Args:
            record: Admitted; stays as it is.
        """
        fields = dict(record.__dict__)
        for name in _VECTORS:
            fields[name] = None
        for name in _SHARED:
            value = fields[name]
            fields[name] = self._one((name, value), value)
        for name in _SCHEMAS:
            value = fields[name]
            if value is not None:  # by its text: to Python 1 and true are equal
                fields[name] = self._one((name, repr(value)), value)
        for name in ("version", "node", "registry"):
            fields[name] = self._one(fields[name], fields[name])
        named = frozenset(record.model_fields_set)
        return CatalogRecord.model_construct(self._one(named, set(named)), **fields)

    def _one(self, key: Hashable, value: Equal) -> Equal:
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        found: Equal = self._known.setdefault(key, value)
        return found


class CollectorRest:
    """Keeps the garbage collector from walking a large catalogue again and again.

    A full collection over a hundred thousand records stops the router for seconds. Records hold no
    cycles: they are freed when the last who holds them lets go, whether the collector looks at them
    or not. After each thousand changes what is alive is therefore taken out of its sight; what is
    garbage by then is collected first, which takes a few milliseconds, for there is little left to
    walk.
    """

    def __init__(self) -> None:
        self._changes = 0

    def changed(self) -> None:
        """Take note that a record came or went."""
        self._changes += 1
        if self._changes >= _CHANGES:
            self._changes = 0
            gc.collect()
            gc.freeze()
