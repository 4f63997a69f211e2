"""Labelled requests: capabilities, tasks and out-of-scope texts, as JSON lines in a folder.

::

    capabilities.jsonl  {"id", "name", "description", "examples": [...]}
    tasks.jsonl         {"id", "text", "gold": ["capability id", ...]}
    oos.jsonl           {"id", "text"}      requests that nobody there serves; may be absent

Of a capability only ``id`` is needed; ``examples``, ``skills`` (or ``tags``) and ``input_schema``
(or ``parameters``) may be absent. Fields that are not named here are passed over.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from capability_schemas.errors import ConfigurationError

_LONGEST_TEXT: Final = 2_000
_MOST_EXAMPLES: Final = 256
_MOST_SKILLS: Final = 128
_LONGEST_SKILL: Final = 256
_LONGEST_NAME: Final = 64
_NOT_IN_A_NAME: Final = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class LabelledCapability:
    """What a node would offer.

    Attributes:
        id: As the data names it.
        function: Its name as a function: an identifier, of no other capability of the set.
        description: What it does; its name in words where the data says nothing.
        examples: Utterances it should be chosen for.
        skills: Names of its skills.
        input_schema: JSON Schema of its input: names and descriptions of its parameters. None is
            demanded, because the words of a task are all that is routed by.
    """

    id: str
    function: str
    description: str
    examples: tuple[str, ...] = ()
    skills: tuple[str, ...] = ()
    input_schema: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class LabelledTask:
    """A request.

    Attributes:
        id: As the data names it, or its line.
        text: The request.
        gold: Ids of the capabilities that serve it, any of which will do; empty out of scope.
    """

    id: str
    text: str
    gold: frozenset[str]


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """What a folder holds.

    Attributes:
        name: Of the folder.
        capabilities: In the order of the file.
        tasks: In the order of the file.
        outside: Out-of-scope requests; None when the folder has none.
        cut: Texts and examples that were more than a claim may hold, and were cut.
    """

    name: str
    capabilities: tuple[LabelledCapability, ...]
    tasks: tuple[LabelledTask, ...]
    outside: tuple[LabelledTask, ...] | None
    cut: int = 0

    def without_examples(self) -> "LabelledSet":
        """Return it as if no capability advertised utterances."""
        return replace(self, capabilities=tuple(replace(c, examples=()) for c in self.capabilities))

    def sampled(self, limit: int, seed: int) -> "LabelledSet":
        """Return it with ``limit`` random tasks and as many out-of-scope texts at most.

        Args:
            limit: At least 1.
            seed: The same one draws the same.
        """
        draw = random.Random(seed)  # noqa: S311 - a sample, not a secret

        def some(tasks: tuple[LabelledTask, ...]) -> tuple[LabelledTask, ...]:
            kept = sorted(draw.sample(range(len(tasks)), min(limit, len(tasks))))
            return tuple(tasks[at] for at in kept)

        outside = None if self.outside is None else some(self.outside)
        return replace(self, tasks=some(self.tasks), outside=outside)


class _Line:
    """One object of a file, and where it stands, for messages."""

    def __init__(self, path: Path, number: int, fields: dict[str, Any]) -> None:
        self._where = f"{path}, line {number}"
        self.number = number
        self.fields = fields

    def wrong(self, field: str, problem: str) -> ConfigurationError:
        return ConfigurationError(f"{self._where}: {field}: {problem}")

    def text(self, field: str, *, default: str | None = None) -> str:
        value = self.fields.get(field)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.wrong(field, "is missing")
        if not isinstance(value, str):
            raise self.wrong(field, f"is a string, not {_kind(value)}")
        if not value.strip() and default is None:
            raise self.wrong(field, "is empty")
        return value.strip() or (default or "")

    def name(self, field: str, *, default: str | None = None) -> str:
        """Return an id; some data number theirs."""
        value = self.fields.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(field, default=default)

    def texts(self, *names: str) -> tuple[str, ...]:
        """Return the list of strings under the first of some names that is there."""
        field = next((name for name in names if self.fields.get(name) is not None), None)
        if field is None:
            return ()
        value = self.fields[field]
        if not isinstance(value, list):
            raise self.wrong(field, f"is a list of strings, not {_kind(value)}")
        for place, one in enumerate(value):
            if not isinstance(one, str):
                raise self.wrong(f"{field}[{place}]", f"is a string, not {_kind(one)}")
        return tuple(dict.fromkeys(one.strip() for one in value if one.strip()))


def read_labelled(folder: Path) -> LabelledSet:
    """Read a folder of labelled requests.

    Args:
        folder: Holds ``capabilities.jsonl``, ``tasks.jsonl`` and maybe ``oos.jsonl``.

    Raises:
        ConfigurationError: A file is missing or empty, or a line is wrong; the message names file,
            line and field.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is no folder: it should hold capabilities.jsonl")
    offered, cut = _capabilities(folder / "capabilities.jsonl")
    known = frozenset(one.id for one in offered)
    asked = folder / "tasks.jsonl"
    tasks = _tasks(asked, lambda line: _gold(line, known))
    if not tasks:
        raise ConfigurationError(f"{asked} is empty: nothing can be measured")
    beyond = folder / "oos.jsonl"
    outside = _tasks(beyond, lambda _: frozenset()) if beyond.exists() else ()
    return LabelledSet(folder.resolve().name, offered, tasks, outside or None, cut)


def function_names(names: list[str]) -> list[str]:
    """Turn names of any kind into names of functions, each into another one.

    Args:
        names: In order; equal ones are allowed.

    Returns:
        Identifiers in the same order: what an identifier may not hold became ``_``; of those that
        became equal, all but the first carry a number.
    """
    taken: set[str] = set()
    made = []
    for name in names:
        plain = _NOT_IN_A_NAME.sub("_", name).strip("_")[:_LONGEST_NAME] or "function"
        unique, number = plain, 1
        while unique in taken:
            number += 1
            ending = f"_{number}"
            unique = plain[: _LONGEST_NAME - len(ending)] + ending
        taken.add(unique)
        made.append(unique)
    return made


def _lines(path: Path) -> Iterator[_Line]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as exc:
        raise ConfigurationError(f"{path} is missing") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path} is not UTF-8: {exc.reason} at byte {exc.start}") from exc
    for number, written in enumerate(content.split("\n"), start=1):
        if not written.strip():
            continue
        try:
            value = json.loads(written)
        except (ValueError, RecursionError) as exc:
            raise ConfigurationError(f"{path}, line {number}: not JSON: {exc}") from exc
        if not isinstance(value, dict):
            raise ConfigurationError(f"{path}, line {number}: an object is needed")
        yield _Line(path, number, value)


def _capabilities(path: Path) -> tuple[tuple[LabelledCapability, ...], int]:
    lines = list(_lines(path))
    if not lines:
        raise ConfigurationError(f"{path} is empty: nothing can be measured")
    ids = [line.name("id") for line in lines]
    first: dict[str, int] = {}
    for line, id_ in zip(lines, ids, strict=True):
        if id_ in first:
            raise line.wrong("id", f"{id_!r} stands in line {first[id_]} already")
        first[id_] = line.number
    names = [line.name("name", default=id_) for line, id_ in zip(lines, ids, strict=True)]
    made, cut = [], 0
    for line, id_, name, function in zip(lines, ids, names, function_names(names), strict=True):
        said = line.text("description", default=name)
        examples, skills = line.texts("examples"), line.texts("skills", "tags")
        one = LabelledCapability(
            id=id_,
            function=function,
            description=said[:_LONGEST_TEXT],
            examples=tuple(example[:_LONGEST_TEXT] for example in examples[:_MOST_EXAMPLES]),
            skills=tuple(skill[:_LONGEST_SKILL] for skill in skills[:_MOST_SKILLS]),
            input_schema=_schema(line),
        )
        made.append(one)
        cut += (one.description, one.examples, one.skills) != (said, examples, skills)
    return tuple(made), cut


def _schema(line: _Line) -> dict[str, Any] | None:
    """Read the parameters of a function as far as they say in words what it takes.

    Signatures come as a JSON Schema, in dialects of it, or as a list or a mapping of parameters.
    """
    field = next((f for f in ("input_schema", "parameters") if line.fields.get(f)), None)
    if field is None:
        return None
    given = line.fields[field]
    if isinstance(given, Mapping):
        inside = given.get("properties")
        given = (
            inside
            if isinstance(inside, Mapping)
            else {}
            if isinstance(given.get("type"), str)
            else given
        )
    elif isinstance(given, list):
        given = {
            one if isinstance(one, str) else str(one.get("name", "")): one
            for one in given
            if isinstance(one, str | Mapping)
        }
    else:
        raise line.wrong(field, f"is an object or a list, not {_kind(given)}")
    properties = {
        str(name): {"description": said.strip()}
        if isinstance(said := one.get("description") if isinstance(one, Mapping) else None, str)
        else {}
        for name, one in given.items()
        if name
    }
    return {"type": "object", "properties": properties} if properties else None


def _tasks(path: Path, gold_of: Callable[[_Line], frozenset[str]]) -> tuple[LabelledTask, ...]:
    return tuple(
        LabelledTask(line.name("id", default=f"line {line.number}"), line.text("text"), gold)
        for line in _lines(path)
        for gold in (gold_of(line),)
    )


def _gold(line: _Line, known: frozenset[str]) -> frozenset[str]:
    given = line.fields.get("gold")
    wanted = given if isinstance(given, list) else [given]
    for one in wanted:
        if not isinstance(one, str | int):
            raise line.wrong("gold", "is a list of ids of capabilities.jsonl")
        if str(one) not in known:
            raise line.wrong("gold", f"{one!r} is no id of capabilities.jsonl")
    if not wanted:
        raise line.wrong("gold", "is empty: a request that nobody serves belongs in oos.jsonl")
    return frozenset(map(str, wanted))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
