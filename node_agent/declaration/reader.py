"""Reads what a node offers: a TOML node file, a Python file, or an importable module.

A node file::

    [node]
    id = "edge-llm"                     # optional

    [defaults]                          # for every function that does not say otherwise
    limits = { memory = "1 GB", timeout = "30 s" }

    [[function]]
    name = "triage"
    description = "Classify an alert as ok, warning or critical."
    examples = ["pump 3 reports 14 mm/s, how bad is it?"]
    runtime = "llama_cpp"
    model = "models/foam-tiny.gguf"     # or a name in the model store
    options = { max_tokens = 32 }
    input_schema = "schemas/alert.json" # or the schema itself

    [[function]]
    entry = "numbers.py:spectrum"       # what is not said here comes from the code

    [[function]]
    source = "numbers.py"               # every @function of it that no other table names

    [[function]]
    source = "numbers.py"
    name = "trend"                      # this one, and what is said here wins over the code
    idle = "10 min"

    [[mcp]]                             # a tool server, for functions that are agents
    name = "files"
    command = "./serve-files"

What is said of a function is laid over what its code says, and that over the defaults: tables
(``limits``, ``options``, ``policy``, ``cost``) field by field, all else as a whole. ``model`` and
``options`` of the defaults are for functions of their ``runtime`` only. Paths are relative to the
file that names them; sizes and times are numbers in the unit of the field (``memory_bytes``), or
text with a unit under the name without (`quantities`).

Python code is imported by a child process (`introspection`), never by the agent. All mistakes are
found at once, each with its place.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import is_identifier
from capability_schemas.problem import Problem, field_problems, refusal
from node_agent.declaration.introspection import Introspector
from node_agent.declaration.layers import code_files, laid_over, located, settle, with_defaults
from node_agent.declaration.sources import SourceFiles, Stamp, module_file

_TABLES: Final = ("node", "defaults", "function", "mcp")
_DESCRIBED: Final = {"name", "description", "input_schema"}
"""What a table must say itself for its code not to be imported before the node starts."""

_OWN: Final = {"name", "source", "entry"}
_SYNTAX_PLACE: Final = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_HEADER: Final = re.compile(r"^\s*\[\[\s*function\s*\]\]", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What a node offers.

    Attributes:
        node: The node's id, when the file names one.
        head: The table ``[node]``, as written.
        functions: Its functions, names unique.
        mcp: Servers of tools by name, as written.
        files: The files it was made of, each as it was before it was read.
        problems: What is wrong with it; what is wrong is left out of the rest.
        lines: Line of the file where a function is declared, by name.
    """

    node: str | None = None
    head: Mapping[str, Any] = field(default_factory=dict)
    functions: tuple[FunctionSpec, ...] = ()
    mcp: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[Path, Stamp | None] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    lines: Mapping[str, int | None] = field(default_factory=dict)


def load_declaration(source: str | Path) -> Declaration:
    """Read a declaration that must be right; blocks while children import code.

    Args:
        source: Path of a ``.toml`` node file or a ``.py`` file, or a dotted module name.

    Raises:
        ConfigurationError: Nothing is there, it does not parse, the code does not import, a field
            is wrong, or two functions share a name; the message has a line for each.
    """
    declaration = read_declaration(source)
    error = refusal(declaration.problems)
    if error is not None:
        raise error
    return declaration


def read_declaration(
    source: str | Path, introspector: Introspector | None = None, *, thorough: bool = False
) -> Declaration:
    """Read a declaration with all its mistakes; blocks while children import code.

    Args:
        source: As for `load_declaration`.
        introspector: Imports the code; one of its own when None.
        thorough: Import also the code of functions whose tables say everything.
    """
    reader = _Reader(str(source), introspector or Introspector(), thorough=thorough)
    if str(source).endswith(".toml"):
        reader.read_toml(Path(source))
    else:
        reader.read_code()
    return reader.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A function on its way: what its table says, and where the rest comes from."""

    what: str = ""
    line: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    code: str | None = None
    """Module or file that says the rest; None when the table says everything."""

    attribute: str | None = None
    """The one function of it; None for those that are decorated."""

    complete: bool = False
    """Whether the table says everything, so that code is only looked at."""


class _Reader:
    """One reading: collects functions, problems and files."""

    def __init__(self, source: str, introspector: Introspector, *, thorough: bool) -> None:
        self._source = source
        self._thorough = thorough
        self._introspector = introspector
        self._files = SourceFiles()
        self._problems: list[Problem] = []
        self._specs: dict[str, FunctionSpec] = {}
        self._lines: dict[str, int | None] = {}
        self._defaults: dict[str, Any] = {}
        self._node: str | None = None
        self._head: dict[str, Any] = {}
        self._mcp: dict[str, Mapping[str, Any]] = {}

    def result(self) -> Declaration:
        if not self._specs and not self._problems:
            self._say("no function is declared")
        return Declaration(
            node=self._node,
            head=self._head,
            functions=tuple(self._specs.values()),
            mcp=self._mcp,
            files=self._files.stamps,
            problems=tuple(self._problems),
            lines=self._lines,
        )

    def read_code(self) -> None:
        """Read a Python file or a module: every decorated function of it."""
        code = self._source
        if not code.endswith(".py") and not all(part.isidentifier() for part in code.split(".")):
            kind = "a folder" if Path(code).is_dir() else "no declaration"
            return self._say(
                f"is {kind}: name a node file (.toml), a Python file (.py) or a module"
            )
        return self._finish(
            [_Draft(code=str(Path(code).resolve()) if code.endswith(".py") else code)]
        )

    def read_toml(self, path: Path) -> None:
        """Read a node file."""
        try:
            text = self._files.note(path).read_bytes().decode()
        except FileNotFoundError:
            return self._say("node file does not exist")
        except OSError as exc:
            return self._say(f"node file cannot be read: {exc.strerror or exc}")
        except UnicodeDecodeError as exc:
            wrong = exc.object[exc.start]
            return self._say(f"node file is no UTF-8 text: byte {exc.start} is {wrong}")
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as exc:
            place = _SYNTAX_PLACE.search(str(exc))
            line = int(place[1]) if place and place[1] else text.rstrip().count("\n") + 1
            return self._say(f"no TOML: {_SYNTAX_PLACE.sub('', str(exc))}", line=line)
        return self._read_tables(content, path.resolve().parent, text)

    def _read_tables(self, content: dict[str, Any], folder: Path, text: str) -> None:
        for name in sorted(content.keys() - set(_TABLES)):
            self._say(f"unknown table {name}; a node file has {', '.join(_TABLES)}")
        self._head = self._table(content, "node")
        self._node = self._head.get("id")
        if self._node is not None and not is_identifier(self._node):
            self._say(f"{self._node!r} is no identifier: use A-Z a-z 0-9 _ -", "[node]", "id")
            self._node = None
        defaults = self._table(content, "defaults")
        for name in sorted(defaults.keys() & _OWN):
            self._say("belongs to one function, not to the defaults", "[defaults]", name)
        kept = {name: value for name, value in defaults.items() if name not in _OWN}
        self._defaults = self._settled(kept, folder, "[defaults]")
        for number, table in enumerate(self._tables(content, "mcp"), start=1):
            self._add_server(table, number, folder)
        tables = self._tables(content, "function")
        lines: list[int | None] = [
            text.count("\n", 0, header.end()) + 1 for header in _HEADER.finditer(text)
        ]
        if len(lines) != len(tables):  # written in another way: then no line beats a wrong one
            lines = [None] * len(tables)
        self._finish(
            [
                self._draft(table, folder, number, line)
                for number, (table, line) in enumerate(zip(tables, lines, strict=True), start=1)
            ]
        )

    def _table(self, content: dict[str, Any], name: str) -> dict[str, Any]:
        table = content.get(name, {})
        if isinstance(table, dict):
            return table
        self._say(f"write a table, [{name}]", name)
        return {}

    def _tables(self, content: dict[str, Any], name: str) -> list[dict[str, Any]]:
        tables = content.get(name, [])
        if isinstance(tables, list) and all(isinstance(table, dict) for table in tables):
            return tables
        self._say(f"write tables, each under [[{name}]]", name)
        return []

    def _add_server(self, table: dict[str, Any], number: int, folder: Path) -> None:
        name = table.get("name")
        what = f'mcp "{name}"' if isinstance(name, str) else f"mcp {number}"
        if not isinstance(name, str) or not is_identifier(name):
            self._say("is missing, or no identifier: use A-Z a-z 0-9 _ -", what, "name")
        elif name in self._mcp:
            self._say("two servers have this name", what)
        else:
            self._mcp[name] = located(table, folder)

    def _draft(self, table: dict[str, Any], folder: Path, number: int, line: int | None) -> _Draft:
        """Read one ``[[function]]`` table."""
        name, source = table.get("name"), table.get("source")
        what = f'function "{name}"' if isinstance(name, str) else f"function {number}"
        said = {key: value for key, value in table.items() if key != "source"}
        fields = self._settled(said, folder, what, line)
        code = attribute = None
        complete = source is None and fields.keys() >= _DESCRIBED
        if isinstance(source, str):
            code = str((folder / source).resolve()) if source.endswith(".py") else source
        elif source is not None:
            self._say("write a Python file or a module", what, "source", line)
        elif with_defaults(self._defaults, fields).get("runtime", "python") == "python":
            entry = fields.get("entry")
            if isinstance(entry, str) and ":" in entry and (self._thorough or not complete):
                code, _, attribute = entry.rpartition(":")
        return _Draft(
            what=what,
            line=line,
            fields=fields,
            code=code,
            attribute=attribute,
            complete=complete,
        )

    def _finish(self, drafts: list[_Draft]) -> None:
        """Ask code what the tables leave open, and check every function."""
        wanted: dict[str, list[_Draft]] = {}
        for draft in drafts:
            if draft.code is not None:
                wanted.setdefault(draft.code, []).append(draft)
        found = {code: self._describe(code, about) for code, about in wanted.items()}
        for draft in drafts:
            if draft.code is None:
                self._add(draft, {})
                continue
            others = [other for other in wanted[draft.code] if other is not draft]
            for said in self._chosen(draft, found[draft.code], others):
                self._add(draft, {} if draft.complete else said)

    def _chosen(
        self, draft: _Draft, found: dict[str, dict[str, Any]] | None, others: list[_Draft]
    ) -> list[dict[str, Any]]:
        """Return what code says of the functions a draft stands for.

        Args:
            draft: The draft.
            found: What its code says, by attribute; None when that is not to be had.
            others: The other drafts of the same code; what they stand for is not ours.
        """
        if found is None:
            return []
        if draft.attribute is not None:
            return [found[draft.attribute]] if draft.attribute in found else []
        name = draft.fields.get("name")
        if name is None:
            names = {other.fields.get("name") for other in others if other.attribute is None}
            attributes = {other.attribute for other in others}
            return [
                said
                for attribute, said in found.items()
                if said["name"] not in names and attribute not in attributes
            ]
        chosen = [said for said in found.values() if said["name"] == name]
        if not chosen:
            there = ", ".join(str(said["name"]) for said in found.values()) or "none"
            message = f"{draft.code} declares no function of this name; it has {there}"
            self._say(message, draft.what, "source", draft.line)
        return chosen

    def _describe(self, code: str, drafts: list[_Draft]) -> dict[str, dict[str, Any]] | None:
        """Return what code says of its functions, by attribute; None when it does not import."""
        file = Path(code) if code.endswith(".py") else module_file(code)
        if file is not None:
            self._files.code_digest([file])  # noted also when it cannot be imported
        names = [draft.attribute for draft in drafts if draft.attribute is not None]
        first = drafts[0]
        try:
            report = self._introspector.describe(code, names, everything=len(names) < len(drafts))
        except ConfigurationError as exc:
            self._say(exc.message, first.what, line=first.line)
            return None
        for attribute, message in report.problems.items():
            about = next((one for one in drafts if one.attribute == attribute), first)
            self._say(message, about.what or f'function "{attribute}"', line=about.line)
        folder = Path.cwd() if file is None else file.parent
        return {
            attribute: self._settled(said, folder, f'function "{attribute}" of {code}')
            for attribute, said in report.functions.items()
        }

    def _add(self, draft: _Draft, said: dict[str, Any]) -> None:
        """Add a function: its table laid over what its code says, and that over the defaults."""
        fields = with_defaults(self._defaults, laid_over(said, draft.fields))
        name = fields.get("name")
        what = f'function "{name}"' if isinstance(name, str) else draft.what
        fields["code"] = self._files.code_digest(code_files(fields))
        try:
            spec = FunctionSpec.model_validate(fields)
        except ValidationError as exc:
            for path, problem in field_problems(exc):
                self._say(problem, what, path, draft.line)
            return
        if spec.name in self._specs:
            self._say("two functions have this name", what, line=draft.line)
        self._specs[spec.name] = spec
        self._lines[spec.name] = draft.line

    def _settled(
        self, table: Mapping[str, Any], folder: Path, what: str, line: int | None = None
    ) -> dict[str, Any]:
        settled, wrong = settle(table, folder, self._files)
        for path, message in wrong:
            self._say(message, what, path, line)
        return settled

    def _say(self, message: str, what: str = "", path: str = "", line: int | None = None) -> None:
        self._problems.append(
            Problem(file=self._source, line=line, what=what, field=path, message=message)
        )
