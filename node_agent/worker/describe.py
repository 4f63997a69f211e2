"""Finds the functions a module declares and derives their schemas; runs in a child process only.

Importing a user's module runs the user's code, so the agent never does it. Schemas come from
pydantic: each parameter becomes a property, the return annotation the output.
"""

import collections.abc
import inspect
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Final

from node_agent.functions import DECLARATION_ATTRIBUTE, Answer, FunctionDeclaration
from node_agent.worker.base import InvocationError
from node_agent.worker.python_host import find_function, import_target

_STREAMS: Final = (
    collections.abc.Generator,
    collections.abc.Iterator,
    collections.abc.Iterable,
    collections.abc.AsyncGenerator,
    collections.abc.AsyncIterator,
    collections.abc.AsyncIterable,
)
_RETURN_ARGUMENT: Final = 2
"""Position of the return type in ``Generator[Yield, Send, Return]``."""


def describe(
    where: str, names: Sequence[str], *, everything: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Describe functions of a module, ready for a specification.

    Args:
        where: ``module`` or ``file.py``; imported once.
        names: Functions to describe, decorated or not.
        everything: Also describe every function that is decorated.

    Returns:
        Fields by attribute of the module, and what is wrong by attribute of those that cannot be
        described.

    Raises:
        InvocationError: There is no such module, or nothing is declared there.
    """
    module = import_target(where)
    wanted = dict.fromkeys(names)
    if everything:
        declared = [
            name
            for name, value in vars(module).items()
            if isinstance(getattr(value, DECLARATION_ATTRIBUTE, None), FunctionDeclaration)
            and value.__module__ == module.__name__
        ]
        if not declared:
            raise InvocationError("internal", "declares nothing: put @function on a function")
        wanted |= dict.fromkeys(declared)
    fields: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    for name in wanted:
        try:
            fields[name] = _fields(where, name, find_function(module, where, name))
        except InvocationError as exc:
            problems[name] = exc.message
        except (NameError, TypeError) as exc:  # an annotation that names nothing
            problems[name] = f"no schema from its signature, give input_schema: {exc}"
    return fields, problems


def _fields(where: str, attribute: str, target: Any) -> dict[str, Any]:
    """Return what a function says about itself; what it does not say is left to the defaults."""
    fields: dict[str, Any] = {
        "name": attribute.rpartition(".")[2],
        "description": " ".join((inspect.getdoc(target) or "").split()) or None,
    }
    declaration = getattr(target, DECLARATION_ATTRIBUTE, None)
    schemas: dict[str, Any] = {"input_schema": None, "output_schema": None}
    if isinstance(declaration, FunctionDeclaration):
        fields |= {
            "name": declaration.name,
            "version": declaration.version,
            "description": declaration.description or None,
            "examples": list(declaration.examples) or None,
            "skills": list(declaration.skills) or None,
            "concurrency": declaration.concurrency,
            "continues": declaration.continues,
            "idempotent": declaration.idempotent,
            **declaration.extra,
        }
        if declaration.timeout_s is not None:
            limits = dict(fields.get("limits") or {})
            if "timeout" not in limits:
                limits.setdefault("timeout_ms", max(1, round(declaration.timeout_s * 1000)))
            fields["limits"] = limits
        schemas = {
            "input_schema": declaration.input_schema,
            "output_schema": declaration.output_schema,
        }
    fields["input_schema"] = schemas["input_schema"] or input_schema(target)
    fields["output_schema"] = schemas["output_schema"] or output_schema(target)
    fields["entry"] = f"{where}:{attribute}"
    fields["runtime"] = "python"
    return {name: value for name, value in fields.items() if value is not None}


def input_schema(target: Any) -> dict[str, Any]:
    """Derive the JSON Schema of a function's keyword arguments.

    Raises:
        InvocationError: A parameter cannot be passed by name, or its type has no schema.
    """
    import pydantic  # noqa: PLC0415 - costs 60 ms, and few need it

    hints = typing.get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {}
    extra: typing.Literal["allow", "forbid"] = "forbid"
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise InvocationError(
                "internal", f"{target.__name__}: parameter {name} cannot be passed by name"
            )
        elif name != "context":
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (hints.get(name, Any), default)
    try:
        model = pydantic.create_model(
            "Input",
            __config__=pydantic.ConfigDict(extra=extra, protected_namespaces=()),
            **fields,
        )
        schema = model.model_json_schema()
    except pydantic.PydanticUserError as exc:
        raise InvocationError(
            "internal",
            f"{target.__name__}: no schema from its signature, give input_schema: {exc.message}",
        ) from exc
    return dict(_untitled(schema))


def output_schema(target: Any) -> dict[str, Any] | None:
    """Derive the JSON Schema of what a function returns; None when it does not say.

    For a generator that is its return value, else the joined text or the list of what it yields.
    """
    import pydantic  # noqa: PLC0415 - costs 60 ms, and few need it

    annotation = typing.get_type_hints(target, include_extras=True).get("return")
    if annotation is None or annotation is Any:
        return None
    if typing.get_origin(annotation) in _STREAMS:
        arguments = typing.get_args(annotation)
        returned = arguments[_RETURN_ARGUMENT] if len(arguments) > _RETURN_ARGUMENT else type(None)
        if returned in (Any, object):
            return None
        if returned is not type(None):
            annotation = returned
        else:
            pieces = _union(kind for kind in _members(arguments[0]) if not _is_answer(kind))
            annotation = str if pieces is str else list[pieces]  # type: ignore[valid-type]
    annotation = _union(
        (typing.get_args(kind) or (Any,))[0] if _is_answer(kind) else kind
        for kind in _members(annotation)
    )
    if annotation is Any:
        return None
    try:
        return dict(_untitled(pydantic.TypeAdapter(annotation).json_schema(mode="serialization")))
    except pydantic.PydanticUserError:
        return None  # an array or another type of a library: the output is still turned into JSON


def _is_answer(annotation: Any) -> bool:
    return annotation is Answer or typing.get_origin(annotation) is Answer


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the one type there is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _union(kinds: Iterable[Any]) -> Any:
    """Return the union of types; of none, anything."""
    found = tuple(kinds)
    return typing.Union[found] if found and Any not in found else Any  # noqa: UP007 - of a tuple


def _untitled(schema: Any) -> Any:
    """Drop the titles pydantic makes of names: they say nothing and cost bytes in every claim."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _untitled(value) for name, value in item.items()}
        if key in ("properties", "$defs") and isinstance(item, dict)
        else _untitled(item)
        for key, item in schema.items()
        if not (key == "title" and isinstance(item, str))
    }
