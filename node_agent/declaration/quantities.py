"""Sizes and times as people write them: ``"512 MB"``, ``"1.5 GiB"``, ``"30 s"``, ``"5 min"``.

A field of a specification carries its unit in its name: ``memory_bytes``, ``timeout_ms``,
``idle_s``. In a declaration the name without the unit takes text with one: ``memory = "512 MB"``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

_BYTES: Final = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("k", "M", "G", "T"), start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)},
}
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
_TEXT: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")
_ENDINGS: Final[Mapping[str, tuple[Mapping[str, float], float]]] = {
    "_bytes": (_BYTES, 1.0),
    "_ms": (_SECONDS, 1000.0),
    "_s": (_SECONDS, 1.0),
}
"""Ending of a field -> units it may be written in, and how many of the field's unit one makes."""


def spellings(fields: Iterable[str]) -> set[str]:
    """Return the names that fields go by in a declaration: with their unit, and without."""
    return {name for field in fields for name in (field, _without_unit(field)[0])}


def units_spelt_out(
    table: Mapping[str, Any], fields: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Replace quantities with a unit by the fields that carry the unit in their name.

    Args:
        table: As written.
        fields: Names of the fields that the table may have.

    Returns:
        The table in the terms of its fields, and what is wrong with it, by the name as written.
    """
    spelt = dict(table)
    problems: dict[str, str] = {}
    for field in fields:
        written, ending = _without_unit(field)
        if ending is None or written not in spelt:
            continue
        value = spelt.pop(written)
        if field in spelt:
            problems[written] = f"is said twice: {written} and {field}"
            continue
        units, scale = _ENDINGS[ending]
        found = _TEXT.fullmatch(value) if isinstance(value, str) else None
        if found is None or found[2] not in units:
            example = "512 MB" if units is _BYTES else "30 s"
            problems[written] = (
                f'{value!r} is no quantity: write text like "{example}" '
                f"({', '.join(units)}), or {field} and a number"
            )
            continue
        amount = float(found[1]) * units[found[2]] * scale
        spelt[field] = round(amount) if amount == round(amount) else amount
    return spelt, problems


def _without_unit(field: str) -> tuple[str, str | None]:
    ending = next((one for one in _ENDINGS if field.endswith(one)), None)
    return (field, None) if ending is None else (field.removesuffix(ending), ending)
