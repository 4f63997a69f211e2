"""Reads what a node offers: a TOML node file, a Python file, or an importable module.

A node file::

    [node]
    id = "edge-llm"                     # optional

    [[function]]
    name = "triage"
    description = "Classify an alert as ok, warning or critical."
    examples = ["pump 3 reports 14 mm/s, how bad is it?"]
    runtime = "llama_cpp"
    model = "models/foam-tiny.gguf"     # relative to this file
    options = { max_tokens = 32 }

    [[function]]
    entry = "numbers.py:spectrum"       # what is not said here comes from the code

    [[function]]
    source = "numbers.py"               # every @function of it

Python code is imported by a child process (`node_agent.worker.describe`), never by the agent.
"""

import os
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import is_identifier
from capability_schemas.wire import first_problem
from node_agent.worker.frames import Frame, FrameError, FrameSocket

_PACKAGE_ROOT: Final = Path(__file__).resolve().parent.parent
_DESCRIBE_LIMIT_S: Final = 60.0
_DESCRIBED: Final = {"name", "description", "input_schema"}
"""What a table must say itself for its code not to be imported before the node starts."""

_STDERR_TAIL: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What a node offers.

    Attributes:
        node: The node's id, when the file names one.
        functions: Its functions, names unique.
    """

    node: str | None
    functions: tuple[FunctionSpec, ...]


def load_declaration(source: str | Path) -> Declaration:
    """Read a declaration; blocks while a child imports code, so call it before the loop runs.

    Args:
        source: Path of a ``.toml`` node file or a ``.py`` file, or a dotted module name.

    Raises:
        ConfigurationError: Nothing is there, it does not parse, the code does not import, a field
            is wrong, or two functions share a name.
    """
    text = str(source)
    path = Path(text)
    if text.endswith(".toml"):
        return _load_toml(path)
    if text.endswith(".py"):
        path = path.resolve()
        if not path.is_file():
            raise ConfigurationError(f"{path} does not exist")
        text = str(path)
    fields = describe_in_child(text)
    return _declaration(None, [_spec(one, text) for one in fields], text)


def describe_in_child(target: str) -> list[dict[str, Any]]:
    """Have a child process import a module and describe its functions.

    Args:
        target: ``module`` or ``file.py``, optionally with ``:name``.

    Raises:
        ConfigurationError: It could not be imported or described; the message says why.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(_DESCRIBE_LIMIT_S)
    command = [
        sys.executable,
        "-m",
        "node_agent.worker",
        str(theirs.fileno()),
        str(os.getpid()),
    ]
    child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        command,
        cwd=_PACKAGE_ROOT,
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    answer: Frame | None = None
    with ours, child:
        theirs.close()
        channel = FrameSocket(ours)
        try:
            channel.send({"t": "describe", "target": target, "folder": str(Path.cwd())})
            answer = channel.receive()
        except (FrameError, OSError) as exc:
            child.kill()
            raise ConfigurationError(f"{target} could not be described: {exc}") from exc
        _, errors = child.communicate()
    if answer is not None and answer["t"] == "described":
        return list(answer["functions"])
    tail = errors.decode(errors="replace")[-_STDERR_TAIL:].strip()
    why = answer["message"] if answer is not None else f"its process ended: {tail or 'silently'}"
    raise ConfigurationError(f"{target}: {why}", log=tail)


def _load_toml(path: Path) -> Declaration:
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except FileNotFoundError as exc:
        raise ConfigurationError(f"node file {path} does not exist") from exc
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"node file {path}: {exc}") from exc
    unknown = sorted(content.keys() - {"node", "function"})
    if unknown:
        raise ConfigurationError(f"node file {path}: unknown table {', '.join(unknown)}")
    node = content.get("node", {}).get("id")
    if node is not None and not is_identifier(node):
        raise ConfigurationError(f"node file {path}: node.id {node!r} is no identifier")
    specs: list[FunctionSpec] = []
    for number, table in enumerate(content.get("function", []), start=1):
        where = f"{path} function {table.get('name', number)!r}"
        specs += [_spec(fields, where) for fields in _toml_functions(table, path.resolve().parent)]
    return _declaration(node, specs, str(path))


def _toml_functions(table: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return the fields of the functions that one ``[[function]]`` table stands for."""
    fields = dict(table)
    source = fields.pop("source", None)
    if source is not None:
        return [{**one, **fields} for one in describe_in_child(_located(source, folder))]
    if isinstance(fields.get("model"), str):
        fields["model"] = str((folder / Path(fields["model"]).expanduser()).resolve())
    prepare = dict(fields.get("options") or {}).get("prepare")
    if isinstance(prepare, str):
        fields["options"] = {**fields["options"], "prepare": _located_entry(prepare, folder)}
    if isinstance(fields.get("entry"), str):
        fields["entry"] = _located_entry(fields["entry"], folder)
        if fields.get("runtime", "python") == "python" and not fields.keys() >= _DESCRIBED:
            return [{**describe_in_child(fields["entry"])[0], **fields}]
    return [fields]


def _located_entry(entry: str, folder: Path) -> str:
    where, colon, attribute = entry.rpartition(":")
    return f"{_located(where, folder)}{colon}{attribute}"


def _located(target: str, folder: Path) -> str:
    return str((folder / target).resolve()) if target.endswith(".py") else target


def _spec(fields: dict[str, Any], where: str) -> FunctionSpec:
    try:
        return FunctionSpec.model_validate(fields)
    except ValidationError as exc:
        field, problem = first_problem(exc)
        raise ConfigurationError(f"{where}: {field}: {problem}", field=field) from exc


def _declaration(node: str | None, specs: list[FunctionSpec], where: str) -> Declaration:
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(f"{where}: two functions are named {', '.join(twice)}")
    if not specs:
        raise ConfigurationError(f"{where}: no function is declared")
    return Declaration(node=node, functions=tuple(specs))
