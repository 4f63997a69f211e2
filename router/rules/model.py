"""What a rules file says: signals, actions, and the limits of both.

Wherever a list may stand a single value may stand too, and a list means "any of these".
"""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from capability_schemas.ids import Identifier
from capability_schemas.task import DataClass, Preference, Share, ShortText, TaskPolicy
from router.rules.language import check_language
from router.rules.patterns import compile_expression, covers
from router.rules.words import needle_of

MOST_RULES: Final = 1_000
MOST_KEYWORDS: Final = 5_000
"""Keywords of all rules together."""

MOST_EXPRESSIONS: Final = 256
"""Regular expressions of all rules together."""

LISTED: Final = 1_000
"""Longest list."""

LOOKED_AT: Final = 1_048_576
"""Characters of a text that keywords and expressions are looked for in: those of the largest task
by default, or a rule could be evaded by padding. That many take a tenth of a second."""

MOST_BONUS: Final = 0.1
"""Of all rules together: it decides between near equals, never against the meaning."""

_NAME_SIGNS: Final = frozenset(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-*?[]!"
)


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def _keyword(value: str) -> str:
    needle_of(value)
    return value


def _expression(value: str) -> str:
    compile_expression(value)
    return value


def _of_identifiers(value: str) -> str:
    wrong = sorted(set(value) - _NAME_SIGNS)
    if wrong:
        raise ValueError(
            f"{value!r} fits nothing: {''.join(wrong)!r} is in no name (A-Z a-z 0-9 _ -, and * ? "
            "[ ] in patterns)"
        )
    return value


_Any = [BeforeValidator(_listed), Field(min_length=1, max_length=LISTED)]
Keywords = Annotated[
    tuple[
        Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(_keyword)],
        ...,
    ],
    *_Any,
]
Expressions = Annotated[
    tuple[
        Annotated[
            str, StringConstraints(min_length=1, max_length=512), AfterValidator(_expression)
        ],
        ...,
    ],
    *_Any,
]
Languages = Annotated[tuple[Annotated[str, AfterValidator(check_language)], ...], *_Any]
Names = Annotated[tuple[Annotated[ShortText, AfterValidator(_of_identifiers)], ...], *_Any]
Texts = Annotated[tuple[ShortText, ...], *_Any]
DataClasses = Annotated[tuple[DataClass, ...], *_Any]
_T = TypeVar("_T", bound=BaseModel)
Bound = Annotated[float, Field(strict=True)]


def _says_something(table: _T) -> _T:
    if not table.model_fields_set:
        raise ValueError("says nothing: remove it, or fill it")
    return table


class Table(BaseModel):
    """Base of the tables of a rules file: nothing unknown, nothing empty."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    _filled = model_validator(mode="after")(_says_something)


class Span(Table):
    """A range of numbers, both ends included; a plain number means exactly that.

    Attributes:
        at_least: Lowest value.
        at_most: Highest value.
    """

    at_least: Bound | None = None
    at_most: Bound | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"at_least": value, "at_most": value} if is_number else value

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"can never match: at_least {self.low:g} is over {self.high:g}")
        if self.high < 0:
            raise ValueError(f"can never match: nothing is at most {self.high:g}")
        return self

    @property
    def low(self) -> float:
        """Lowest value, or minus infinity."""
        return -math.inf if self.at_least is None else self.at_least

    @property
    def high(self) -> float:
        """Highest value, or infinity."""
        return math.inf if self.at_most is None else self.at_most

    def holds(self, value: float) -> bool:
        """Tell whether a number lies in it."""
        return self.low <= value <= self.high


def _a_priority(span: Span) -> Span:
    if span.low > 9:  # noqa: PLR2004  # the highest priority a task may have
        raise ValueError(f"can never match: no task has a priority of {span.low:g}; 9 is first")
    return span


class KeywordSignal(Table):
    """Words and phrases of the text, whole words only, blind to case.

    A phrase is several words in a row. ``leak*`` also fits words that begin so, ``*pumpe`` words
    that end so. In scripts without spaces a keyword is looked for anywhere.

    Attributes:
        any: At least one of these is there.
        all: Each of these is there.
        none: Not one of these is there.
    """

    any: Keywords | None = None
    all: Keywords | None = None
    none: Keywords | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"any": value} if isinstance(value, str | list | tuple) else value

    @model_validator(mode="after")
    def _can_match(self) -> Self:
        barred = {needle_of(one) for one in self.none or ()}
        for one in self.all or ():
            if needle_of(one) in barred:
                raise ValueError(f"can never match: {one!r} is under all and under none")
        if self.any is not None and {needle_of(one) for one in self.any} <= barred:
            raise ValueError("can never match: all that any asks for is under none")
        return self

    def words(self) -> Iterable[str]:
        """Return every keyword, as written."""
        return (*(self.any or ()), *(self.all or ()), *(self.none or ()))


class LengthSignal(Table):
    """How long the task is.

    Attributes:
        characters: Characters of the text.
        words: Words of the text, as separated by spaces.
        bytes: Bytes of the text and of the input as JSON, in UTF-8.
    """

    characters: Span | None = None
    words: Span | None = None
    bytes: Span | None = None


Scalar = str | bool | int | float


def _flat(value: object, path: str = "") -> dict[str, Any]:
    """Return a nested table as one level of dotted paths."""
    if not isinstance(value, Mapping):
        raise ValueError('write a table, as in { "alarm.level" = "critical" }')  # noqa: TRY004
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            flat.update(_flat(inner, f"{path}{name}."))
        else:
            flat[path + name] = inner
    return flat


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | bool | int) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _scalars(value: dict[str, Any]) -> dict[str, tuple[Scalar, ...]]:
    listed = {}
    for path, inner in value.items():
        items = tuple(inner) if isinstance(inner, list | tuple) else (inner,)
        if not items or not all(_is_scalar(one) for one in items):
            raise ValueError(f"{path}: write text, a number, true or false, or a list of them")
        listed[path] = items
    return listed


def _numbers(value: dict[str, Any]) -> dict[str, Any]:
    for path, one in value.items():
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise ValueError(f"{path}: write a number")  # noqa: TRY004
    return value


_Paths = Field(min_length=1, max_length=LISTED)
Expected = Annotated[dict[str, Any], _Paths, BeforeValidator(_flat), AfterValidator(_scalars)]
Bounds = Annotated[dict[str, float], _Paths, BeforeValidator(_numbers), BeforeValidator(_flat)]


class InputSignal(Table):
    """Fields of the input, by dotted path; all that is said must hold.

    Attributes:
        has: These are there, and not null.
        equals: Each has this value, or one of these.
        at_least: Each is a number, and no lower.
        at_most: Each is a number, and no higher.
    """

    has: Annotated[tuple[ShortText, ...], *_Any] | None = None
    equals: Expected | None = None
    at_least: Bounds | None = None
    at_most: Bounds | None = None

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        highest = self.at_most or {}
        for path, low in (self.at_least or {}).items():
            if low > highest.get(path, math.inf):
                raise ValueError(
                    f"can never match: {path} at least {low:g} and at most {highest[path]:g}"
                )
        return self


class Signals(Table):
    """The signals; those that are said must all hold.

    Attributes:
        keywords: Words and phrases of the text; a list means any of them.
        regex: Regular expressions (RE2) one of which is found in the text.
        language: Languages of the text, ISO 639-1.
        length: How long the task is.
        client: Patterns for the client that sent it.
        function: Patterns for the function that is asked for by name.
        skill: Patterns for the skills the task asks for.
        data: Classes of the data in the task.
        priority: Priority of the task, 0 to 9.
        input: Fields of the input.
    """

    keywords: KeywordSignal | None = None
    regex: Expressions | None = None
    language: Languages | None = None
    length: LengthSignal | None = None
    client: Names | None = None
    function: Names | None = None
    skill: Texts | None = None
    data: DataClasses | None = None
    priority: Annotated[Span, AfterValidator(_a_priority)] | None = None
    input: InputSignal | None = None

    def implies(self, other: "Signals") -> bool:
        """Tell whether every task that these signals fit certainly fits the other ones."""
        asked = other.model_fields_set
        return asked <= self.model_fields_set and all(
            _narrower(name, getattr(self, name), getattr(other, name)) for name in asked
        )


def _narrower(name: str, one: Any, other: Any) -> bool:
    if one == other:
        return True
    if name in ("client", "function", "skill"):
        return all(covers(other, pattern) for pattern in one)
    if name == "excluded":
        return all(signals in one for signals in other)
    return name in ("data", "language", "regex") and set(one) <= set(other)


class Condition(Signals):
    """When a rule applies.

    Attributes:
        excluded: ``not``: signals; where any of these tables fits, the condition does not.
    """

    excluded: Annotated[tuple[Signals, ...], *_Any] | None = Field(default=None, alias="not")

    @model_validator(mode="after")
    def _can_match(self) -> Self:
        if any(self.implies(one) for one in self.excluded or ()):
            raise ValueError("can never match: `not` excludes all that the rest asks for")
        return self

    def signals(self) -> Iterable[Signals]:
        """Return the signals asked for, and those excluded."""
        return (self, *(self.excluded or ()))


class Target(Table):
    """Which capabilities an action is about; what is said must all hold.

    Attributes:
        function: Patterns for the name of the function.
        node: Patterns for the node.
        skill: Patterns for skills it offers.
        zone: Patterns for zones the node is attested.
        model: Patterns for the name of the model behind it.
        external: Whether it hands tasks to a service outside the site.
    """

    function: Names | None = None
    node: Names | None = None
    skill: Texts | None = None
    zone: Texts | None = None
    model: Texts | None = None
    external: Annotated[bool, Field(strict=True)] | None = None


Targets = Annotated[tuple[Target, ...], *_Any]


def _only_narrows(value: bool) -> bool:
    if not value:
        raise ValueError("a rule only narrows the policy: remove it, or write true")
    return value


class Narrowing(TaskPolicy):
    """Demands added to the policy of the task; it only ever gets narrower.

    Attributes:
        zones: Zones the node may stand in.
        data: Class of the data in the task.
        max_cost: Largest price of a call.
        local_only: Whether the task must not leave the site; only true makes sense.
        grants: Rights the node must hold.
    """

    zones: Texts | None = None
    local_only: Annotated[bool, Field(strict=True), AfterValidator(_only_narrows)] = False
    grants: Annotated[tuple[ShortText, ...], *_Any] = ()

    _filled = model_validator(mode="after")(_says_something)


class Rule(Table):
    """One rule: when it applies, and what it does.

    Attributes:
        name: What it goes by in explanations; unique.
        description: What it is for.
        when: Conditions one of which must hold; always when not said.
        require: The capability must be one of these.
        forbid: The capability must be none of these.
        prefer: These get a bonus.
        bonus: How much, over 0 to 0.1; 0.05 when not said.
        min_confidence: Least confidence of an answer, 0 to 1; below it a stronger node is asked.
        route: What decides between candidates of like meaning, where the task does not say.
        policy: Demands added to the policy of the task.
        stop: Whether the rules after this one are passed over when it applies.
    """

    name: Identifier
    description: Annotated[str, StringConstraints(max_length=500)] = ""
    when: Annotated[tuple[Condition, ...], *_Any] | None = None
    require: Targets | None = None
    forbid: Targets | None = None
    prefer: Targets | None = None
    bonus: Annotated[float, Field(gt=0, le=MOST_BONUS, strict=True)] = 0.05
    min_confidence: Share | None = None
    route: Preference | None = None
    policy: Narrowing | None = None
    stop: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        said = self.model_fields_set
        if not said & {"require", "forbid", "prefer", "min_confidence", "route", "policy", "stop"}:
            raise ValueError(
                "does nothing: say require, forbid, prefer, min_confidence, route, policy or stop"
            )
        if "bonus" in said and self.prefer is None:
            raise ValueError("bonus needs prefer")
        return self

    def implies(self, other: "Rule") -> bool:
        """Tell whether the other rule certainly fits whatever this one fits."""
        if other.when is None:
            return True
        return self.when is not None and all(
            any(mine.implies(its) for its in other.when) for mine in self.when
        )
