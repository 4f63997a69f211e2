"""What one place says of a function, brought into the terms of a specification.

A declaration is made of layers (defaults, code, table). Each is settled by itself, for its paths
are relative to the file it stands in, and then laid over the one below.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from capability_schemas.capability import CapabilityPolicy, Cost
from capability_schemas.errors import MalformedPayload
from capability_schemas.functions import FunctionLimits, FunctionSpec
from capability_schemas.problem import unknown
from capability_schemas.wire import parse_json
from node_agent.declaration.quantities import spellings, units_spelt_out
from node_agent.declaration.sources import SourceFiles, module_file

_FUNCTION_FIELDS: Final = FunctionSpec.model_fields.keys() - {"code"}
_PARTS: Final[Mapping[str, type[BaseModel]]] = {
    "limits": FunctionLimits,
    "policy": CapabilityPolicy,
    "cost": Cost,
}
_MERGED: Final = {*_PARTS, "options"}
_FILE_ENTRIES: Final = (".wasm", ".wat")
_SCHEMAS: Final = ("input_schema", "output_schema")
_PLACES: Final = {"api_key_file", "folder", "folders", "headers_file", "lora"}
"""What holds nothing but paths: of keys, where a command runs, what a program may read, adapters.
"""

_HUB_SLASHES: Final = 2
_PATH_STARTS: Final = ("./", "../", "/", "~/")

Wrong = list[tuple[str, str]]
"""Path of a field, and what is wrong with it."""


def settle(
    table: Mapping[str, Any], folder: Path, files: SourceFiles
) -> tuple[dict[str, Any], Wrong]:
    """Bring one layer into the terms of a specification.

    Quantities lose their units, schemas are read from their files, paths become absolute, unknown
    fields are left out.

    Args:
        table: As written.
        folder: Folder of the file it was written in.
        files: Takes note of the files read.

    Returns:
        The layer, and what is wrong with it.
    """
    settled, wrong = _known(table, _FUNCTION_FIELDS, "")
    for part, model in _PARTS.items():
        if isinstance(settled.get(part), dict):
            settled[part], more = _known(settled[part], model.model_fields, f"{part}.")
            wrong += more
    for name in _SCHEMAS:
        if isinstance(settled.get(name), str):
            try:
                settled[name] = _read_schema(_path(settled[name], folder), files)
            except ValueError as exc:
                wrong.append((name, str(exc)))
                del settled[name]
    return located(settled, folder), wrong


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a layer over another: limits, options, policy and cost are joined field by field."""
    joined = {**below, **above}
    for name in _MERGED & below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            joined[name] = _joined(below[name], above[name])
    return joined


def with_defaults(defaults: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a function over the defaults; model and options of another runtime are not for it."""
    runtime = defaults.get("runtime")
    if runtime is not None and fields.get("runtime", runtime) != runtime:
        defaults = {k: v for k, v in defaults.items() if k not in {"model", "options"}}
    return laid_over(defaults, fields)


def located(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Make the paths in a table absolute: of code, models, commands and their like.

    Args:
        table: Of a function or of a tool server.
        folder: Folder that relative ones start from.
    """
    made = dict(table)
    if isinstance(made.get("entry"), str):
        made["entry"] = _located_code(made["entry"], folder)
    if isinstance(made.get("model"), str):
        made["model"] = _located_model(made["model"], folder)
    if isinstance(made.get("options"), dict):
        made["options"] = located(made["options"], folder)
    if isinstance(made.get("prepare"), str):
        made["prepare"] = _located_code(made["prepare"], folder)
    for name in _PLACES & made.keys():
        made[name] = _located_places(made[name], folder)
    return made | _located_command(made, folder)


def code_files(fields: Mapping[str, Any]) -> list[Path]:
    """Return the files with the code that a function runs; they may be missing."""
    options = fields.get("options")
    options = options if isinstance(options, dict) else {}
    found = []
    for entry in (fields.get("entry"), options.get("prepare")):
        if not isinstance(entry, str):
            continue
        where = entry.rpartition(":")[0] or entry
        if where.startswith("/"):
            found.append(Path(where))
        elif (file := module_file(where)) is not None:
            found.append(file)
    command = options.get("command")
    program = command[0] if isinstance(command, list) and command else command
    if isinstance(program, str) and program.startswith("/"):
        found.append(Path(program))
    return found


def _known(
    table: Mapping[str, Any], fields: Iterable[str], prefix: str
) -> tuple[dict[str, Any], Wrong]:
    spelt, problems = units_spelt_out(table, fields)
    wrong = [(prefix + name, problem) for name, problem in problems.items()]
    for name in [name for name in spelt if name not in fields]:
        wrong.append((prefix + name, unknown(name, spellings(fields))))
        del spelt[name]
    return spelt, wrong


def _read_schema(path: Path, files: SourceFiles) -> Any:
    try:
        return parse_json(files.note(path).read_bytes())
    except OSError as exc:
        raise ValueError(f"schema file {path}: {exc.strerror or exc}") from exc
    except MalformedPayload as exc:
        raise ValueError(f"schema file {path}: {exc.message}") from exc


def _joined(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    joined = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            joined[name] = _joined(below[name], above[name])
    return joined


def _path(text: str, folder: Path) -> Path:
    return (folder / Path(text).expanduser()).resolve()


def _located_code(entry: str, folder: Path) -> str:
    """Place ``file.py:name``, or a file by itself; ``module:name`` stays."""
    where, colon, attribute = entry.rpartition(":")
    if colon and where.endswith(".py"):
        return f"{_path(where, folder)}:{attribute}"
    if entry.startswith(_PATH_STARTS) or entry.endswith(_FILE_ENTRIES):
        return str(_path(entry, folder))
    return entry


def _located_model(model: str, folder: Path) -> str:
    """Place a path; a name in the model store, at a hub or at a server stays.

    ``owner/repository/file.gguf`` is of a hub unless there is such a file.
    """
    if "://" in model:
        return model
    is_path = model.startswith(_PATH_STARTS) or (
        model.endswith(".gguf") and model.count("/") < _HUB_SLASHES
    )
    if is_path or ("/" in model and (folder / model).exists()):
        return str(_path(model, folder))
    return model


def _located_places(value: Any, folder: Path) -> Any:
    """Place every path in an option that holds nothing else, whatever its form."""
    if isinstance(value, str):
        return str(_path(value, folder))
    if isinstance(value, list):
        return [_located_places(one, folder) for one in value]
    if isinstance(value, dict):
        return {name: _located_places(one, folder) for name, one in value.items()}
    return value


def _located_command(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Place the program of a command where it is written as a path; others are found by PATH."""
    command = table.get("command")
    if isinstance(command, str) and command.startswith(_PATH_STARTS):
        return {"command": _program(command, folder)}
    if isinstance(command, list) and command and str(command[0]).startswith(_PATH_STARTS):
        return {"command": [_program(str(command[0]), folder), *command[1:]]}
    return {}


def _program(text: str, folder: Path) -> str:
    # Links stay links: what a program does may depend on the name it is called by.
    return str((folder / Path(text).expanduser()).absolute())
