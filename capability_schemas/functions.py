"""Declarations of functions, and how the input of a task meets the schema of a function."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Final, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, field_validator

from capability_schemas.capability import (
    CapabilityPolicy,
    Continues,
    Cost,
    Utterance,
    check_version,
)
from capability_schemas.errors import ConfigurationError, InvalidTask
from capability_schemas.ids import Identifier
from capability_schemas.task import ShortText
from capability_schemas.validation import Bounds, Undecided, first_problem, schema_problem
from capability_schemas.wire import DEFAULT_LIMIT_BYTES, WirePart

MAX_OUTPUT_BYTES: Final = DEFAULT_LIMIT_BYTES - 64 * 1024
"""Largest output a function may be allowed: with its event around it, it must pass as a message."""


def _json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        check_schema(schema)
    except ConfigurationError as exc:
        raise ValueError(exc.message) from exc
    return schema


JsonSchema = Annotated[dict[str, Any], AfterValidator(_json_schema)]
"""A JSON Schema, checked to be one."""


class FunctionLimits(WirePart):
    """What one run of a function may take; exceeding one ends the run with an error.

    Attributes:
        timeout_ms: Wall time; the deadline of the task holds besides.
        memory_bytes: Address space of an instance, and with cgroups the memory of it and all it
            started; unlimited when None.
        cpu_s: Processor time, seconds; unlimited when None.
        output_bytes: Encoded size of all chunks and of the result, each.
        open_files: File descriptors of an instance; the system's limit when None.
        file_bytes: Largest file an instance may write; unlimited when None.
        processes: Processes and threads of an instance, itself included; needs cgroups, unlimited
            when None.
        cpus: Processors an instance may use at a time; needs cgroups, unlimited when None.
        network: Whether an instance, and what it starts, may open network connections.
    """

    model_config = ConfigDict(extra="forbid")

    timeout_ms: Annotated[int, Field(ge=1, le=24 * 3_600_000)] | None = None
    memory_bytes: Annotated[int, Field(ge=1_000_000)] | None = None
    cpu_s: Annotated[int, Field(ge=1)] | None = None
    output_bytes: Annotated[int, Field(ge=1, le=MAX_OUTPUT_BYTES)] = 1024 * 1024
    open_files: Annotated[int, Field(ge=16)] | None = None
    file_bytes: Annotated[int, Field(ge=0)] | None = None
    processes: Annotated[int, Field(ge=1)] | None = None
    cpus: Annotated[float, Field(gt=0)] | None = None
    network: bool = False


class FunctionSpec(WirePart):
    """A function as its author declares it, in TOML or by decorator.

    Attributes:
        name: Function name, unique on the node.
        version: Semantic version.
        description: What it does, in words; what routing by meaning reads.
        examples: Utterances it should be chosen for.
        skills: Names of skills it offers.
        input_schema: JSON Schema (2020-12) of the input; anything goes when None.
        output_schema: JSON Schema of the output.
        runtime: Name of the runtime: ``python``, ``llama_cpp``, ``command``, ``wasm``, …
        entry: What to run: ``module:name`` or ``path/to/file.py:name`` for ``python``, a file for
            ``wasm``.
        model: For model runtimes: path of the model file, or its name in the model store.
        options: Settings of the runtime, checked by it.
        code: ``sha256:`` and the hex digest of the code behind ``entry``, put in by the loader, so
            that an edit makes another specification.
        concurrency: Tasks the node runs at a time; measurement may lower it.
        warm: Whether an instance starts with the node, and one is always kept.
        idle_s: Time without work after which an instance ends, seconds; None lets the node decide
            by the cost of a start and the rate of calls.
        limits: What one run may take.
        policy: Where the function may be used, as claimed.
        cost: Price of a call.
        modalities: Kinds of data it takes.
        continues: What becomes of an answer whose node is lost (`capability.Continues`); None
            leaves it to the runtime: ``prefix`` for language models, else ``restart``.
        idempotent: Whether running it twice does no more than running it once: a slow node may
            then be overtaken by another one.
    """

    model_config = ConfigDict(extra="forbid")

    name: Identifier
    version: Annotated[str, StringConstraints(max_length=64)] = "1.0.0"
    description: Utterance
    examples: Annotated[tuple[Utterance, ...], Field(max_length=256)] = ()
    skills: tuple[ShortText, ...] = ()
    input_schema: JsonSchema | None = None
    output_schema: JsonSchema | None = None
    runtime: ShortText = "python"
    entry: ShortText | None = None
    model: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    code: str | None = None
    concurrency: Annotated[int, Field(ge=1, le=256)] = 1
    warm: bool = False
    idle_s: Annotated[float, Field(ge=0, le=86_400)] | None = None
    limits: FunctionLimits = FunctionLimits()
    policy: CapabilityPolicy = CapabilityPolicy()
    cost: Cost = Cost()
    modalities: tuple[ShortText, ...] = ("text",)
    continues: Continues | None = None
    idempotent: bool = False

    _version = field_validator("version")(check_version)


_TYPES: Final[Mapping[str, frozenset[type]]] = {
    "string": frozenset({str}),
    "integer": frozenset({int}),
    "number": frozenset({int, float}),
    "boolean": frozenset({bool}),
    "array": frozenset({list}),
    "object": frozenset({dict}),
    "null": frozenset({type(None)}),
}
_REMARKS: Final = frozenset({"$schema", "$comment", "title", "description", "default", "examples"})
"""Keywords that say nothing about validity."""


_canonical: Final = json.JSONEncoder(sort_keys=True).encode
"""One encoder for all: making one takes longer than a schema."""


_SCHEMAS_REMEMBERED: Final = 4_096
_texts: Final[dict[int, tuple[Mapping[str, Any], str]]] = {}


def _text_of(schema: Mapping[str, Any]) -> str:
    """Return the canonical text of a schema, written once for each object that comes by.

    A router shares one object among equal schemas, and asks of the same ones again and again.
    """
    known = _texts.get(id(schema))
    if known is not None:  # the object is kept, so that nothing else can have its identity
        return known[1]
    text = _canonical(schema)
    if len(_texts) >= _SCHEMAS_REMEMBERED:
        _texts.clear()
    _texts[id(schema)] = schema, text
    return text


class _Plain(NamedTuple):
    """A schema that asks for nothing but properties of simple types."""

    properties: Mapping[str, frozenset[type]]
    required: frozenset[str]
    closed: bool

    def admits(self, value: Any) -> bool:
        """Tell whether a value is valid for certain; by exact types, as JSON decodes to them."""
        return (
            type(value) is dict
            and self.required <= value.keys()
            and not (self.closed and value.keys() - self.properties.keys())
            and all(
                type(value[name]) in self.properties[name]
                for name in value.keys() & self.properties.keys()
            )
        )


@lru_cache(maxsize=1024)
def _plain(schema: str) -> _Plain | None:
    """Return what a schema asks for when it is a plain one, as most are: those are checked at once.

    The validator takes fifty microseconds for them, and a router asks it for every candidate.
    """
    whole: Any = json.loads(schema)
    asks = whole.keys() - _REMARKS
    named, required = whole.get("properties", {}), whole.get("required", [])
    if (
        not asks <= {"type", "properties", "required", "additionalProperties"}
        or whole.get("type") != "object"
        or not isinstance(whole.get("additionalProperties", True), bool)
        or not (isinstance(named, dict) and isinstance(required, list))
    ):
        return None
    properties: dict[str, frozenset[type]] = {}
    for name, one in named.items():
        kind = one.get("type") if isinstance(one, dict) else None
        if not isinstance(kind, str) or kind not in _TYPES or one.keys() - _REMARKS != {"type"}:
            return None
        properties[name] = _TYPES[kind]
    closed = whole.get("additionalProperties", True) is False
    return _Plain(properties, frozenset(required), closed)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Check that ``schema`` is itself a JSON Schema of draft 2020-12.

    Raises:
        ConfigurationError: It is not; the message names the place.
    """
    try:
        problem = schema_problem(schema)
    except RecursionError as exc:
        raise ConfigurationError("not a JSON Schema: it is nested too deeply") from exc
    if problem is not None:
        raise ConfigurationError(
            f"not a JSON Schema at {problem.json_path}: {problem.message[:500]}"
        )


def effective_input(text: str | None, value: Any, schema: Mapping[str, Any] | None) -> Any:
    """Return what a function receives for a task: its ``input``, and its ``text`` where wanted.

    The words of a task become the property ``text`` of an object input, unless the input has one
    already or the schema has no place for it. Router (as a gate) and node (before the run) both
    use this rule, so that they agree.

    Args:
        text: Words of the task.
        value: ``input`` of the task; None when absent.
        schema: Input schema of the function, if any.
    """
    taken = {} if value is None else value
    wants_text = schema is None or "text" in schema.get("properties", {})
    if isinstance(taken, dict) and text is not None and wants_text and "text" not in taken:
        return {**taken, "text": text}
    return taken


def check_input(
    value: Any, schema: Mapping[str, Any] | None, *, bounds: Bounds | None = None
) -> None:
    """Check the input of a function against its schema.

    Args:
        value: As ``effective_input`` returns it.
        schema: JSON Schema (2020-12); None admits anything.
        bounds: For whoever did not write the schema: what cannot be decided within them passes, and
            is left to the node.

    Raises:
        InvalidTask: It does not fit; ``detail["field"]`` is the JSON path of the first problem.
    """
    if schema is None:
        return
    text = _text_of(schema)
    plain = _plain(text)
    if plain is not None and plain.admits(value):
        return
    from referencing.exceptions import Unresolvable  # noqa: PLC0415

    try:
        problem = first_problem(value, text, bounds=bounds)
    except Undecided:
        return
    except (Unresolvable, RecursionError) as exc:
        raise InvalidTask(f"input schema cannot be resolved: {exc}", field="input") from exc
    except re.error as exc:
        raise InvalidTask(f"input schema has a broken pattern: {exc}", field="input") from exc
    except ArithmeticError as exc:
        raise InvalidTask(f"input holds a number too large to check: {exc}", field="input") from exc
    if problem is not None:
        path = "input" + problem.json_path.removeprefix("$")
        raise InvalidTask(f"{path}: {problem.message[:500]}", field=path)
