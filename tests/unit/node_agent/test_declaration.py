"""Node files, Python files and modules; user code stays out of this process."""

import sys
from pathlib import Path

import pytest

from capability_schemas.errors import ConfigurationError
from node_agent.declaration import load_declaration

WORKSHOP = Path(__file__).parents[2] / "data" / "functions" / "workshop.py"


def test_a_python_file_declares_its_decorated_functions():
    declaration = load_declaration(WORKSHOP)
    assert declaration.node is None
    functions = {spec.name: spec for spec in declaration.functions}
    assert {"add", "words", "squares", "meet"} <= functions.keys()
    add = functions["add"]
    assert (add.version, add.skills, add.runtime) == ("1.2.0", ("arithmetic",), "python")
    assert add.description == "Add two numbers."
    assert add.input_schema is not None
    assert add.input_schema["properties"]["b"] == {"type": "number", "default": 2.0}
    assert add.output_schema == {"type": "number"}
    assert functions["greedy"].limits.memory_bytes == 1_000_000_000
    assert functions["meet"].concurrency == 4
    assert "workshop" not in sys.modules


def test_a_node_file_joins_models_entries_and_sources(tmp_path):
    (tmp_path / "model.gguf").touch()
    (tmp_path / "code.py").write_text(
        "from node_agent.functions import function\n"
        "@function\ndef one(a: int) -> int:\n    'One.'\n    return a\n"
        "@function\ndef two() -> int:\n    'Two.'\n    return 2\n"
    )
    (tmp_path / "more.py").write_text("def three(x: str):\n    'Three.'\n")
    (tmp_path / "node.toml").write_text(
        '[node]\nid = "edge-1"\n'
        '[[function]]\nsource = "code.py"\n'
        '[[function]]\nentry = "more.py:three"\nname = "renamed"\nversion = "3.0.0"\n'
        '[[function]]\nname = "llm"\ndescription = "Talk."\nruntime = "llama_cpp"\n'
        'model = "model.gguf"\nwarm = true\noptions = { max_tokens = 3 }\n'
    )
    declaration = load_declaration(tmp_path / "node.toml")
    assert declaration.node == "edge-1"
    functions = {spec.name: spec for spec in declaration.functions}
    assert list(functions) == ["one", "two", "renamed", "llm"]
    assert functions["renamed"].description == "Three."
    assert functions["renamed"].entry == f"{tmp_path / 'more.py'}:three"
    assert functions["llm"].model == str(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[[function]\n", "node.toml"),
        ("[nodes]\n", "unknown table nodes"),
        ('[node]\nid = "a b"\n', "identifier"),
        ("", "no function is declared"),
        ('[[function]]\nname = "f"\nruntime = "llama_cpp"\n', "description"),
        ('[[function]]\nname = "f"\ndescription = "d"\nruntime = "x"\ncolour = 1\n', "colour"),
        ('[[function]]\nentry = "nowhere.py:f"\n', "does not exist"),
        (2 * '[[function]]\nname = "f"\ndescription = "d"\nruntime = "x"\n', "two functions"),
    ],
)
def test_a_wrong_node_file_says_what_is_wrong(tmp_path, content, problem):
    path = tmp_path / "node.toml"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=problem):
        load_declaration(path)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import no_such_thing", "no_such_thing"),
        ("raise SystemExit(3)", "SystemExit"),
        ("import os\nos._exit(3)", "its process ended"),
        ("x = 1", "declares nothing"),
    ],
)
def test_code_that_does_not_import_is_a_configuration_error(tmp_path, code, problem):
    path = tmp_path / "code.py"
    path.write_text(code)
    with pytest.raises(ConfigurationError, match=problem):
        load_declaration(path)


@pytest.mark.parametrize("source", ["missing.toml", "missing.py", "no_such_module_at_all"])
def test_a_missing_source_is_a_configuration_error(source):
    with pytest.raises(ConfigurationError, match=r"missing|no_such_module"):
        load_declaration(source)


def test_a_table_that_says_everything_needs_no_look_at_the_code(tmp_path):
    (tmp_path / "code.py").write_text("raise SystemExit")
    (tmp_path / "node.toml").write_text(
        '[[function]]\nname = "f"\ndescription = "d"\nentry = "code.py:f"\n'
        'input_schema = { type = "object" }\n'
    )
    (spec,) = load_declaration(tmp_path / "node.toml").functions
    assert (spec.runtime, spec.entry) == ("python", f"{tmp_path / 'code.py'}:f")
