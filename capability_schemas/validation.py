"""The check of JSON against a schema that a stranger wrote: JSON Schema 2020-12, in bounded work.

A schema can ask for more work than anybody has: an expression that backtracks (`(a+)+$`), branches
that double at every reference, thousands of objects compared with each other. Whoever checks for
others sets `Bounds`; what goes beyond them is left undecided. The one door to jsonschema, loaded on
first use: an idle node with schema-free functions never pays for it.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

Expression = Callable[[str], Callable[[str], Any]]
"""Returns the search function of a regular expression; raises ``ValueError`` for a bad one."""

_BYTES_PER_STEP: Final = 256
"""So much of an input is written into the text of an error in about the time of one step."""

_canonical: Final = json.JSONEncoder(sort_keys=True).encode


class Undecided(Exception):  # noqa: N818  # no error: nobody is wrong
    """The check would take more work than its bounds allow."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much work a check may be.

    Attributes:
        expression: Compiles an expression to a search that takes time linear in the text.
        steps: Most keywords looked at, of five to ten microseconds each.
    """

    expression: Expression
    steps: int = 10_000


@dataclass(slots=True)
class _Meter:
    """What is left of the bounds of the check under way."""

    bounds: Bounds
    value: Any
    left: int
    steps_per_error: int = field(default=0)

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise Undecided

    def spend_error(self) -> None:
        """An error repeats what it is about, up to the whole input."""
        if not self.steps_per_error:
            self.steps_per_error = 1 + len(_canonical(self.value)) // _BYTES_PER_STEP
        self.spend(self.steps_per_error)


_METER: Final[ContextVar[_Meter | None]] = ContextVar("meter", default=None)


def first_problem(value: Any, schema: Any, *, bounds: Bounds | None = None) -> Any:
    """Return the problem of a value that says most, a ``ValidationError``; None when it fits.

    Args:
        value: Any JSON.
        schema: The schema as JSON text.
        bounds: How much work it may be; any amount when None.

    Raises:
        Undecided: It would be more.
        re.error: A pattern is no regular expression.
        referencing.exceptions.Unresolvable: A reference leads nowhere.
        RecursionError: A reference leads back to where it stands.
        ArithmeticError: A number is too large to calculate with.
    """
    from jsonschema.exceptions import best_match  # noqa: PLC0415

    validator = _validator(schema)
    meter = None if bounds is None else _Meter(bounds, value, bounds.steps)
    token = _METER.set(meter)
    try:
        return best_match(validator.iter_errors(value))
    finally:
        _METER.reset(token)


def schema_problem(schema: Any) -> Any:
    """Return what is wrong with a schema itself, a ``ValidationError``; None when nothing is.

    Raises:
        RecursionError: It is nested too deeply.
    """
    from jsonschema import Draft202012Validator  # noqa: PLC0415
    from jsonschema.exceptions import best_match  # noqa: PLC0415

    # With the checker of formats, or a pattern that is no regular expression would pass.
    judge = _validator_class()(
        Draft202012Validator.META_SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER
    )
    return best_match(judge.iter_errors(schema))


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    from referencing import Registry  # noqa: PLC0415

    # The empty registry keeps a hostile "$ref" from fetching anything over the network.
    return _validator_class()(json.loads(schema), registry=Registry())


@lru_cache(maxsize=1)
def _validator_class() -> Any:
    """Return jsonschema's validator with every keyword metered."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415
    from jsonschema.validators import extend  # noqa: PLC0415

    own = {**Draft202012Validator.VALIDATORS, "pattern": _pattern, "uniqueItems": _unique_items}
    for name in ("patternProperties", "additionalProperties"):
        own[name] = _unless_patterned(own[name])
    for name in ("unevaluatedItems", "unevaluatedProperties"):
        own[name] = _unless_bounded(own[name])
    metered = {name: _metered(check) for name, check in own.items()}
    made: Any = extend(Draft202012Validator, metered)  # type: ignore[no-untyped-call]
    # A "$schema" inside of the schema would have jsonschema go on with a class of its own.
    made.evolve = _evolve
    return made


def _evolve(validator: Any, **changes: Any) -> Any:
    for attribute in type(validator).__attrs_attrs__:
        if attribute.init and attribute.alias not in changes:
            changes[attribute.alias] = getattr(validator, attribute.name)
    return type(validator)(**changes)


def _metered(check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    def metered(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        meter = _METER.get()
        if meter is None:
            yield from check(validator, wanted, instance, schema) or ()
            return
        meter.spend(1)
        for error in check(validator, wanted, instance, schema) or ():
            meter.spend_error()
            yield error

    return metered


def _pattern(_: Any, expression: str, instance: Any, __: Any) -> Iterator[Any]:
    if not isinstance(instance, str):
        return
    meter = _METER.get()
    if meter is None:
        found = re.search(expression, instance)
    else:
        meter.spend(len(instance) // _BYTES_PER_STEP)
        try:
            found = meter.bounds.expression(expression)(instance)
        except ValueError as exc:  # look-around and the like, which no linear engine knows
            raise Undecided from exc
    if found is None:
        yield _error(f"{instance!r} does not match {expression!r}")


def _unique_items(_: Any, wanted: Any, instance: Any, __: Any) -> Iterator[Any]:
    """Compare by text, in one pass; jsonschema compares every item with every other one."""
    if not wanted or not isinstance(instance, list):
        return
    meter = _METER.get()
    if meter is not None:
        meter.spend(len(instance))
    if len({_canonical(_whole(item)) for item in instance}) < len(instance):
        yield _error(f"{instance!r} has non-unique elements")


def _whole(value: Any) -> Any:
    """Return a value with 1.0 made 1: to JSON Schema they are equal."""
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unless_patterned(check: Callable[..., Any]) -> Callable[..., Any]:
    """These search names with Python's own engine, which backtracks."""

    def guarded(validator: Any, wanted: Any, instance: Any, schema: Any) -> Any:
        if "patternProperties" in schema and _METER.get() is not None:
            raise Undecided
        return check(validator, wanted, instance, schema)

    return guarded


def _unless_bounded(check: Callable[..., Any]) -> Callable[..., Any]:
    """These walk the schema by themselves, past every meter."""

    def guarded(validator: Any, wanted: Any, instance: Any, schema: Any) -> Any:
        if _METER.get() is not None:
            raise Undecided
        return check(validator, wanted, instance, schema)

    return guarded


def _error(message: str) -> Any:
    from jsonschema.exceptions import ValidationError  # noqa: PLC0415

    return ValidationError(message)
