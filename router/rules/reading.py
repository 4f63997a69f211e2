"""From the text of a rules file to rules, with every mistake at its place."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter, ValidationError

from capability_schemas.problem import Problem, unknown
from capability_schemas.wire import problems
from router.rules.conflicts import find_conflicts
from router.rules.model import (
    MOST_EXPRESSIONS,
    MOST_KEYWORDS,
    MOST_RULES,
    Condition,
    InputSignal,
    KeywordSignal,
    Languages,
    LengthSignal,
    Narrowing,
    Rule,
    Signals,
    Span,
    Target,
)

_TABLES: Final = ("languages", "rule")
_HEADER: Final = re.compile(r"^\s*\[\[\s*rule\s*\]\]", re.MULTILINE)
_ASIDE: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL
)
_SYNTAX_PLACE: Final = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_LANGUAGES: Final[TypeAdapter[tuple[str, ...]]] = TypeAdapter(Languages)
_MODELS: Final[dict[str, type[BaseModel]]] = {
    "": Rule,
    "when": Condition,
    "not": Signals,
    "keywords": KeywordSignal,
    "length": LengthSignal,
    "input": InputSignal,
    "require": Target,
    "forbid": Target,
    "prefer": Target,
    "policy": Narrowing,
    "characters": Span,
    "words": Span,
    "bytes": Span,
    "priority": Span,
}
"""What a table may hold, by what the table is called."""

_IN_FILE_TERMS: Final = {
    "Input should be an object": "write a table",
    "Input should be a valid string": "write text",
    "Input should be a valid boolean": "write true or false",
    "Input should be a valid number": "write a number",
    "Value should have at least 1 item": "is empty: remove it, or fill it",
    "Dictionary should have at least 1 item": "is empty: remove it, or fill it",
    "String should have at least 1 character": "is empty",
    "String should match pattern": "is no identifier: 1 to 64 of A-Z a-z 0-9 _ -",
}
"""Beginnings of what pydantic says, and how it is said of a file."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read.

    Attributes:
        rules: The rules in order; those with mistakes of their own are left out.
        tables: Each as it is written, with its line where that is known.
        languages: Languages of the site.
        problems: All that is wrong.
    """

    rules: tuple[Rule, ...] = ()
    tables: tuple[Mapping[str, Any], ...] = ()
    languages: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def read_rules(text: str, source: str) -> Reading:
    """Read rules with all their mistakes.

    Args:
        text: TOML.
        source: What the file is called in messages.
    """
    try:
        content = tomllib.loads(text)
    except RecursionError:
        return Reading(problems=(Problem(file=source, message="no TOML: nested too deeply"),))
    except ValueError as exc:
        place = _SYNTAX_PLACE.search(str(exc))
        line = int(place[1]) if place and place[1] else text.rstrip().count("\n") + 1
        message = f"no TOML: {_SYNTAX_PLACE.sub('', str(exc))}"
        return Reading(problems=(Problem(file=source, line=line, message=message),))
    return _Reader(content, text, source).read()


class _Reader:
    """One reading: collects rules and problems."""

    def __init__(self, content: Mapping[str, Any], text: str, source: str) -> None:
        self._content = content
        self._source = source
        self._problems: list[Problem] = []
        tables = content.get("rule", [])
        self._tables: list[Any] = tables if isinstance(tables, list) else [tables]
        self._places = _Places(text, len(self._tables))

    def read(self) -> Reading:
        for name in sorted(self._content.keys() - set(_TABLES)):
            line = self._places.of(None, [name])
            self._say(unknown(name, _TABLES), field=name, line=line)
        languages = self._languages()
        read: dict[int, Rule] = {}
        if len(self._tables) > MOST_RULES:
            self._say(f"{len(self._tables)} rules, at most {MOST_RULES}")
        for place, table in enumerate(self._tables[:MOST_RULES]):
            rule = self._rule(place, table)
            if rule is not None:
                read[place] = rule
        self._check_names()
        self._check_sizes(read)
        self._check_together(read)
        return Reading(
            rules=tuple(read.values()),
            tables=tuple(self._table(place) for place in read),
            languages=languages,
            problems=tuple(sorted(self._problems, key=lambda problem: problem.line or 0)),
        )

    def _languages(self) -> tuple[str, ...]:
        if "languages" not in self._content:
            return ()
        try:
            return _LANGUAGES.validate_python(self._content["languages"])
        except ValidationError as exc:
            for _, message in problems(exc):
                line = self._places.of(None, ["languages"])
                self._say(_told(message), field="languages", line=line)
            return ()

    def _rule(self, place: int, table: Any) -> Rule | None:
        if not isinstance(table, dict):
            self._say("write tables, each under [[rule]]", what=f"rule {place + 1}")
            return None
        try:
            return Rule.model_validate(table)
        except ValidationError as exc:
            found: dict[tuple[str | int, ...], str] = {}
            for path, message in problems(exc):
                known = _known(path) if message.startswith("unknown field") else None
                told = _told(message) if known is None else unknown(str(path[-1]), known)
                found.setdefault(_as_written(table, path), told)
            for written, told in found.items():
                self._tell(place, written, told)
            return None

    def _table(self, place: int) -> Mapping[str, Any]:
        line = self._places.of(place)
        return {**({} if line is None else {"line": line}), **self._tables[place]}

    def _check_names(self) -> None:
        first: dict[Any, int] = {}
        for place, table in enumerate(self._tables[:MOST_RULES]):
            name = table.get("name") if isinstance(table, dict) else None
            if isinstance(name, str) and first.setdefault(name, place) != place:
                before = self._places.of(first[name])
                where = f" (line {before})" if before else ""
                self._tell(place, ["name"], f"another rule has this name{where}")

    def _check_sizes(self, read: Mapping[int, Rule]) -> None:
        signals = [
            one for rule in read.values() for when in rule.when or () for one in when.signals()
        ]
        keywords = sum(len(list(one.keywords.words())) for one in signals if one.keywords)
        expressions = sum(len(one.regex or ()) for one in signals)
        for count, most, what in (
            (keywords, MOST_KEYWORDS, "keywords"),
            (expressions, MOST_EXPRESSIONS, "regular expressions"),
        ):
            if count > most:
                self._say(f"{count} {what} in all rules, at most {most}")

    def _check_together(self, read: Mapping[int, Rule]) -> None:
        places = list(read)
        for conflict in find_conflicts(
            list(read.values()), lambda number: self._name(places[number])
        ):
            self._tell(places[conflict.place], conflict.field.split("."), conflict.message)

    def _name(self, place: int) -> str:
        line = self._places.of(place)
        name = f'rule "{self._tables[place]["name"]}"'
        return name if line is None else f"{name} (line {line})"

    def _tell(self, place: int, path: Sequence[str | int], message: str) -> None:
        table = self._tables[place]
        name = table.get("name") if isinstance(table, dict) else None
        self._say(
            message,
            what=f'rule "{name}"' if isinstance(name, str) else f"rule {place + 1}",
            field="".join(
                f"[{part}]" if isinstance(part, int) else f".{part}" for part in path
            ).removeprefix("."),
            line=self._places.of(place, [part for part in path if isinstance(part, str)]),
        )

    def _say(
        self, message: str, *, what: str = "", field: str = "", line: int | None = None
    ) -> None:
        self._problems.append(
            Problem(file=self._source, line=line, what=what, field=field, message=message)
        )


def _told(message: str) -> str:
    beginnings = (words for said, words in _IN_FILE_TERMS.items() if message.startswith(said))
    return next(beginnings, message)


def _as_written(table: Any, path: Sequence[str | int]) -> tuple[str | int, ...]:
    """Return the path of a mistake in the file: a single value stands for a list or table there."""
    written: list[str | int] = []
    for part in path:
        if isinstance(part, int):
            if not isinstance(table, list):
                continue
            table = table[part] if part < len(table) else None
        elif isinstance(table, dict):
            table = table.get(part)
        else:
            continue
        written.append(part)
    return tuple(written)


def _known(path: Sequence[str | int]) -> Sequence[str]:
    """Return what the table may hold in which an unknown field stands."""
    named = [part for part in path[:-1] if isinstance(part, str)]
    model = _MODELS.get(named[-1] if named else "")
    fields = model.model_fields.items() if model else ()
    return [field.alias or name for name, field in fields]


def _blank(aside: re.Match[str]) -> str:
    """Blank out a comment or a text, but not a quoted key; lines stay as they are."""
    written = aside[0]
    is_key = written[0] != "#" and re.match(r"\s*[=.]", aside.string[aside.end() :][:80])
    return written if is_key else re.sub(r"[^\n]", " ", written)


class _Places:
    """Lines of a file where rules and their fields stand.

    ``tomllib`` does not tell; so the text is searched for the names in order, from the header of
    the rule on. Where the file is written in another way than with headers, there is no line.
    """

    def __init__(self, text: str, rules: int) -> None:
        self._text = text = _ASIDE.sub(_blank, text)
        starts = [header.end() for header in _HEADER.finditer(text)]
        self._spans = list(pairwise([*starts, len(text)])) if len(starts) == rules else []

    def of(self, rule: int | None, path: Sequence[str] = ()) -> int | None:
        """Return the line of a rule, or of a field of it, as far as that is found.

        Args:
            rule: Which one; None for a field of the file itself.
            path: Names from the rule on.
        """
        if rule is not None and not self._spans:
            return None
        start, end = (0, len(self._text)) if rule is None else self._spans[rule]
        at = start
        for part in path:
            name = re.escape(part)
            found = re.compile(
                rf"(?:^|[\s{{,.\[])[\"']?{name}[\"']?\s*(?=[=.\]])", re.MULTILINE
            ).search(self._text, at, end)
            if found is None:
                break
            at = found.end()
        return None if rule is None and at == start else self._text.count("\n", 0, at) + 1
