"""Codec: frozen message models to bytes and back, with a size limit before anything is parsed."""

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from capability_schemas.errors import MalformedPayload, TooLarge

DEFAULT_LIMIT_BYTES = 4 * 1024 * 1024
"""Largest inbound message of the mesh itself, bytes; tasks have their own, smaller limit."""


MAX_DEPTH: Final = 128
"""How deep arrays and objects may stand in each other; deeper ones could not be encoded again."""

MAX_COUNT: Final = 2**53 - 1
"""Largest number that every JSON reader knows exactly (RFC 8259 section 6)."""

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]

Instant = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
"""UTC milliseconds by a clock that may be wrong."""

Attempt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
"""Number of an attempt, from 1."""


class WirePart(BaseModel):
    """Base of everything inside a message: immutable, tolerant of fields it does not know.

    Ignoring unknown fields is what lets a newer peer talk to an older one (PROTOCOL section 3).
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class WireModel(WirePart):
    """Base of every message: a versioned ``WirePart``."""

    null_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields for which null is a value of its own and stays on the wire."""

    v: Literal[1] = 1


Model = TypeVar("Model", bound=BaseModel)


def encode(model: BaseModel) -> bytes:
    """Return the compact UTF-8 JSON of a message.

    Fields that are None are left out, but for those in which null is a value (``null_fields``).
    Null inside a field's own JSON is always kept.
    """
    nulls = model.null_fields if isinstance(model, WireModel) else frozenset()
    if any(getattr(model, name) is None for name in nulls):
        fields = model.model_dump(mode="json", exclude_none=True)
        missing = dict.fromkeys(sorted(nulls - fields.keys()))
        return json.dumps(fields | missing, separators=(",", ":"), ensure_ascii=False).encode()
    return model.model_dump_json(exclude_none=True).encode()


_IN_JSON_TERMS: Final = {
    "extra_forbidden": "unknown field; remove it or check its spelling",
    "missing": "is missing",
    "tuple_type": "Input should be an array",
    "model_type": "Input should be an object",
    "dict_type": "Input should be an object",
}
"""Problems whose text at pydantic speaks of Python types."""


def problems(error: ValidationError) -> list[tuple[tuple[int | str, ...], str]]:
    """Return the path and the text of every problem pydantic found."""
    return [
        (
            one["loc"],
            _IN_JSON_TERMS.get(one["type"], one["msg"]).removeprefix("Value error, "),
        )
        for one in error.errors(include_url=False, include_context=False)
    ]


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Return the path and the text of the first problem pydantic found.

    Returns:
        ``(field, problem)``; the field is a dotted path, empty for the message as a whole.
    """
    path, problem = problems(error)[0]
    return ".".join(str(part) for part in path), problem


def refuse_constant(name: str) -> Any:
    """Refuse ``NaN`` and ``Infinity``, which RFC 8259 section 6 does not allow in JSON."""
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """Return a number of JSON, refusing one that a double cannot hold (``1e999``)."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _is_nested_beyond(value: Any, depth: int) -> bool:
    """Tell whether arrays and objects stand more than ``depth`` deep in each other."""
    level = [value]
    for _ in range(depth + 1):
        level = [inner for outer in level for inner in _members(outer)]
        if not level:
            return False
    return True


def parse_json(payload: bytes) -> Any:
    """Parse strict JSON, nested at most ``MAX_DEPTH`` deep, without numbers that overflow.

    Raises:
        MalformedPayload: It is not UTF-8, not JSON, or goes beyond these limits.
    """
    try:
        value = json.loads(
            payload.decode("utf-8"), parse_constant=refuse_constant, parse_float=_finite
        )
    except UnicodeDecodeError as exc:
        raise MalformedPayload(f"payload is not UTF-8 at byte {exc.start}") from exc
    except RecursionError as exc:
        raise MalformedPayload("payload is JSON nested too deeply") from exc
    except ValueError as exc:
        raise MalformedPayload(f"payload is not JSON: {exc}") from exc
    if payload.count(b"[") + payload.count(b"{") > MAX_DEPTH and _is_nested_beyond(
        value, MAX_DEPTH
    ):
        raise MalformedPayload(f"payload is JSON nested more than {MAX_DEPTH} deep")
    return value


def decode(
    model: type[Model] | TypeAdapter[Model],
    payload: bytes,
    *,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
) -> Model:
    """Turn a payload into the message its topic announces.

    Args:
        model: Message class, or an adapter for a union of classes.
        payload: Raw bytes as received.
        limit_bytes: Largest payload to look at.

    Raises:
        TooLarge: The payload is longer than ``limit_bytes``.
        MalformedPayload: Not UTF-8, not JSON, or a field is missing or of the wrong type; the
            message names the field.
    """
    if len(payload) > limit_bytes:
        raise TooLarge("message", size_bytes=len(payload), limit_bytes=limit_bytes)
    adapter: Any = model if isinstance(model, TypeAdapter) else None
    try:
        if adapter is not None:
            decoded: Model = adapter.validate_json(payload)
            return decoded
        return model.model_validate_json(payload)  # type: ignore[union-attr]  # adapter is None
    except ValidationError as exc:
        field, problem = first_problem(exc)
        where = f"{field}: " if field else ""
        raise MalformedPayload(f"{where}{problem}", field=field) from exc
