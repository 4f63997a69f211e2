"""The rooms keep their doors, and every module can be imported alone."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("broker", "capability_schemas", "foam", "node_agent", "registry", "router")
# Compiled at set-up, or shipped as wheels for some machines only: FOAM runs without them, so only
# their door modules may need them.
OPTIONAL = {
    "hnswlib": "registry.index.hnsw",
    "llama_cpp": "node_agent.worker.engines.llama_cpp",
    "mcp": "node_agent.worker.mcp_session",
    "wasmtime": "node_agent.worker.wasm_host",
    "xllamacpp": "node_agent.worker.engines.xllamacpp",
}

_IMPORT_ALL = """
import importlib, sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # None: as if it were not installed
for name in sys.stdin.read().split():
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


def module_names() -> list[str]:
    """Name every module of the distribution, but the programs (`__main__`)."""
    names = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] != "__main__":
                names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def test_import_rules_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def failing_imports(names: list[str], *, without: list[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _IMPORT_ALL, *without],
        cwd=ROOT,
        input="\n".join(names),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_every_module_imports_without_warnings_or_optional_libraries() -> None:
    names = [name for name in module_names() if not name.startswith(tuple(OPTIONAL.values()))]
    assert failing_imports(names, without=list(OPTIONAL)) == []


@pytest.mark.parametrize("library", OPTIONAL)
def test_door_of_an_optional_library_imports_with_it(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed on this machine")
    assert failing_imports([OPTIONAL[library]], without=[]) == []


@pytest.mark.parametrize("library", ["numpy", "scipy", "torch", "onnxruntime", "typer"])
def test_node_agent_starts_without(library: str) -> None:
    program = f"import sys, node_agent.agent; sys.exit({library!r} in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr.decode() or f"the agent imports {library}"
