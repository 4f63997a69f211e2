"""Node files, Python files and modules; user code stays out of this process."""

import sys
from pathlib import Path
from textwrap import dedent

import pytest

from capability_schemas.errors import ConfigurationError
from node_agent.declaration.reader import load_declaration, read_declaration

WORKSHOP = Path(__file__).parents[3] / "data" / "functions" / "workshop.py"


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


def test_every_mistake_is_found_at_once_with_its_place(tmp_path):
    (tmp_path / "in.json").write_text('{"type": "objekt"}')
    path = write(
        tmp_path,
        """
        [defaults]
        colour = 1

        [[function]]
        name = "triage"
        description = "d"
        runtime = "x"
        limits = { memory = "5 B", cpus = 0, timout = "1 s" }

        [[function]]
        description = "d"
        runtime = "x"
        examples = ["a", 3]
        input_schema = "in.json"
        idle = "5 parsecs"
        policy = { zone = ["hall"] }
        """,
    )
    declaration = read_declaration(path)
    assert declaration.functions == ()
    assert [str(problem).removeprefix(str(path)) for problem in declaration.problems] == [
        ": [defaults]: colour: unknown; remove it",
        ':4: function "triage": limits.timout: unknown; did you mean timeout?',
        (
            ":10: function 2: idle: '5 parsecs' is no quantity: write text like \"30 s\" "
            "(ms, s, min, h), or idle_s and a number"
        ),
        ":10: function 2: policy.zone: unknown; did you mean zones?",
        (
            ':4: function "triage": limits.memory_bytes: '
            "Input should be greater than or equal to 1000000"
        ),
        ':4: function "triage": limits.cpus: Input should be greater than 0',
        ":10: function 2: name: is missing",
        ":10: function 2: examples[1]: Input should be a valid string",
        (
            ":10: function 2: input_schema: not a JSON Schema at $.type: "
            "'objekt' is not valid under any of the given schemas"
        ),
    ]
    with pytest.raises(ConfigurationError) as raised:
        load_declaration(path)
    assert len(raised.value.message.splitlines()) == raised.value.detail["problems"] == 9


def test_defaults_are_laid_under_what_functions_say(tmp_path):
    path = write(
        tmp_path,
        """
        [defaults]
        runtime = "llama_cpp"
        model = "small"
        options = { n_ctx = 512, max_tokens = 8 }
        limits = { memory = "1 GB", timeout = "2 min" }

        [[function]]
        name = "talk"
        description = "Talk."
        options = { max_tokens = 99 }
        limits = { timeout_ms = 5 }

        [[function]]
        name = "count"
        description = "Count."
        runtime = "python"
        entry = "shop:count"
        input_schema = {}
        """,
    )
    talk, count = load_declaration(path).functions
    assert (talk.runtime, talk.model) == ("llama_cpp", "small")
    assert talk.options == {"n_ctx": 512, "max_tokens": 99}
    assert (talk.limits.memory_bytes, talk.limits.timeout_ms) == (10**9, 5)
    assert (count.model, count.options) == (None, {})
    assert (count.limits.memory_bytes, count.limits.timeout_ms) == (10**9, 120_000)


def test_what_a_table_says_of_a_source_wins_over_the_code(tmp_path):
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "a.json").write_text('{"type": "object"}')
    (tmp_path / "code.py").write_text(
        "from node_agent.functions import function\n"
        "@function(limits={'memory': '2 GB', 'open_files': 20}, idle='1 min')\n"
        "def one(a: int) -> int:\n    'One.'\n    return a\n"
        "@function(input_schema='schemas/a.json')\n"
        "def two(**rest) -> int:\n    'Two.'\n    return 2\n"
    )
    path = write(
        tmp_path,
        """
        [defaults]
        version = "3.1.0"
        concurrency = 2

        [[function]]
        source = "code.py"

        [[function]]
        source = "code.py"
        name = "one"
        limits = { memory = "64 MiB" }
        """,
    )
    declaration = load_declaration(path)
    functions = {spec.name: spec for spec in declaration.functions}
    assert list(functions) == ["two", "one"]
    assert functions["one"].limits.memory_bytes == 64 * 1024**2
    assert functions["one"].limits.open_files == 20
    assert functions["one"].idle_s == 60
    assert functions["two"].input_schema == {"type": "object"}
    assert {(spec.version, spec.concurrency) for spec in functions.values()} == {("3.1.0", 2)}
    assert set(declaration.files) == {path, tmp_path / "code.py", tmp_path / "schemas" / "a.json"}


def test_a_name_that_a_source_does_not_have_is_said(tmp_path):
    (tmp_path / "code.py").write_text(
        "from node_agent.functions import function\n@function\ndef one():\n    'One.'\n"
    )
    path = write(tmp_path, '[[function]]\nsource = "code.py"\nname = "won"\n')
    with pytest.raises(ConfigurationError, match=r'"won": source: .* it has one$'):
        load_declaration(path)


def test_an_edit_of_the_code_or_of_what_it_imports_makes_another_specification(tmp_path):
    (tmp_path / "gears.py").write_text("ratio = 1\n")
    (tmp_path / "code.py").write_text("import gears\ndef f(): ...\n")
    path = write(
        tmp_path,
        '[[function]]\nname = "f"\ndescription = "d"\nentry = "code.py:f"\ninput_schema = {}\n',
    )
    seen = set()
    for name, text in (("gears.py", ""), ("gears.py", "ratio = 2\n"), ("code.py", "import gears")):
        (tmp_path / name).write_text((tmp_path / name).read_text() + text)
        (spec,) = load_declaration(path).functions
        seen.add(spec.code)
    assert len(seen) == 3
    (again,) = load_declaration(path).functions
    assert again.code in seen


def test_paths_are_those_of_the_file_and_names_stay_names(tmp_path):
    (tmp_path / "run").write_text("#!/bin/sh\n")
    path = write(
        tmp_path,
        """
        [defaults]
        description = "d"

        [[function]]
        name = "a"
        runtime = "command"
        options = { command = ["./run", "./stays"], folder = "work" }

        [[function]]
        name = "b"
        runtime = "command"
        options = { command = ["sort", "-n"] }

        [[function]]
        name = "c"
        runtime = "wasm"
        entry = "c.wasm"

        [[function]]
        name = "d"
        runtime = "openai"
        model = "org/model"

        [[mcp]]
        name = "files"
        command = "../serve"
        """,
    )
    declaration = load_declaration(path)
    a, b, c, d = declaration.functions
    assert a.options == {
        "command": [str(tmp_path / "run"), "./stays"],
        "folder": str(tmp_path / "work"),
    }
    assert a.code is not None
    assert b.options == {"command": ["sort", "-n"]}
    assert c.entry == str(tmp_path / "c.wasm")
    assert d.model == "org/model"
    assert declaration.mcp == {"files": {"name": "files", "command": str(tmp_path / "../serve")}}


def write(folder, text):
    path = folder / "node.toml"
    path.write_text(dedent(text).lstrip())
    return path


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[[function]\n", r"node\.toml:1: no TOML: "),
        ("x = 1\n\ny = [", r"node\.toml:3: no TOML: "),
        (b"\xff", "no UTF-8 text: byte 0"),
        ("[nodes]\n", "unknown table nodes; a node file has node, defaults"),
        ('[node]\nid = "a b"\n', r"\[node\]: id: 'a b' is no identifier"),
        ("function = 1", r"function: write tables, each under \[\[function\]\]"),
        ("[[defaults]]", r"defaults: write a table, \[defaults\]"),
        ("[[mcp]]", "mcp 1: name: is missing"),
        ('[defaults]\nname = "x"', r"\[defaults\]: name: belongs to one function"),
        ("", "no function is declared"),
        ('[[function]]\nname = "f"\nruntime = "llama_cpp"\n', "description: is missing"),
        ('[[function]]\nname = "f"\ndescription = "d"\nruntime = "x"\ncolour = 1\n', "colour"),
        ('[[function]]\nentry = "nowhere.py:f"\n', "function 1: .*nowhere.py does not exist"),
        ('[[function]]\nname = "f"\nversion = "1"\ndescription = "d"', "version: Invalid version"),
        ('[[function]]\nname = "f"\ninput_schema = "no.json"', "schema file .*no.json: No such"),
        ("[[function]]\nsource = 3", "source: write a Python file or a module"),
        (2 * '[[function]]\nname = "f"\ndescription = "d"\nruntime = "x"\n', "two functions have"),
    ],
)
def test_a_wrong_node_file_says_what_is_wrong(tmp_path, content, problem):
    path = tmp_path / "node.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
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


@pytest.mark.parametrize(("source", "kind"), [(".", "folder"), ("/dev/null", "no declaration")])
def test_what_can_be_no_declaration_is_told_what_can(source, kind):
    with pytest.raises(ConfigurationError, match=rf"is (a |){kind}: name a node file \(\.toml\)"):
        load_declaration(source)


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


def test_a_thorough_reading_imports_that_code_too_and_changes_nothing(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("def f(a):\n    'From the code.'\n")
    path = write(
        tmp_path,
        '[[function]]\nname = "f"\ndescription = "d"\nentry = "code.py:f"\ninput_schema = {}\n',
    )
    assert read_declaration(path, thorough=True).functions == read_declaration(path).functions
    code.write_text("import no_such_thing")
    assert read_declaration(path).problems == ()
    (problem,) = read_declaration(path, thorough=True).problems
    assert problem.line == 1
    assert "no_such_thing" in problem.message


def test_a_decorator_says_what_becomes_of_an_answer_whose_node_is_lost(tmp_path):
    (tmp_path / "plant.py").write_text(
        "from node_agent.functions import function\n\n"
        "@function(description='Say it again.', continues='skip', idempotent=True)\n"
        "def again(text: str) -> str:\n    return text\n\n"
        "@function(description='Say it once.', continues='none')\n"
        "def once(text: str) -> str:\n    return text\n\n"
        "@function(description='Say it.')\n"
        "def say(text: str) -> str:\n    return text\n"
    )
    found = {
        spec.name: (spec.continues, spec.idempotent)
        for spec in load_declaration(str(tmp_path / "plant.py")).functions
    }
    assert found == {"again": ("skip", True), "once": ("none", False), "say": (None, False)}
    file = tmp_path / "node.toml"
    file.write_text('[[function]]\nsource = "plant.py"\nname = "again"\ncontinues = "restart"\n')
    (spec,) = [one for one in load_declaration(str(file)).functions if one.name == "again"]
    assert spec.continues == "restart"
