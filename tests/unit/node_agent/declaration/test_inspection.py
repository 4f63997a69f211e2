"""What a check finds beyond what reading finds."""

from pathlib import Path
from textwrap import dedent

import pytest

import foam.models
from capability_schemas.errors import NotFound, Unavailable
from node_agent.declaration.inspection import DeclaredFunctions, inspect_declaration
from node_agent.declaration.reader import read_declaration
from node_agent.runtimes.base import Request, RuntimeContext

MODEL = Path(foam.models.__file__).parent / "foam-tiny-2.6m-q8_0.gguf"


@pytest.fixture
def found(tmp_path):
    def inspect(content, **machine):
        path = tmp_path / "node.toml"
        path.write_text(dedent(content).lstrip())
        declaration = read_declaration(path, thorough=True)
        assert declaration.problems == ()
        problems = inspect_declaration(
            declaration, source=str(path), context=RuntimeContext(), **machine
        )
        return [
            (problem.line, problem.field, problem.warning, problem.message) for problem in problems
        ]

    return inspect


def test_every_function_is_held_against_its_runtime(found, tmp_path):
    (tmp_path / "code.py").write_text("def f(): ...\n")
    (tmp_path / "odd.py").write_text("import no_such_thing\n")
    problems = found(
        """
        [defaults]
        description = "Do a thing that is worth words."
        examples = ["one", "two", "three"]

        [[function]]
        name = "a"
        runtime = "abacus"

        [[function]]
        name = "b"
        runtime = "python"
        entry = "code.py:f"
        options = { speed = 3 }

        [[function]]
        name = "c"
        runtime = "llama_cpp"
        model = "missing.gguf"
        options = { prepare = "odd.py:words" }
        """
    )
    assert [(line, field, warning) for line, field, warning, _ in problems] == [
        (5, "runtime", False),
        (9, "", False),
        (15, "", False),
        (15, "options.prepare", False),
    ]
    unknown, options, model, prepare = (message for *_, message in problems)
    assert "'abacus' is unknown" in unknown
    assert "llama_cpp" in unknown
    assert options.endswith("speed")
    assert str(tmp_path / "missing.gguf") in model
    assert "no_such_thing" in prepare


def test_words_that_routing_has_too_few_of_are_warned_of(found, tmp_path):
    (tmp_path / "code.py").write_text("def f(): ...\n")
    description, examples = found(
        """
        [[function]]
        name = "a"
        description = "Thing."
        examples = ["do it"]
        entry = "code.py:f"
        """
    )
    assert description[:3] == (1, "description", True)
    assert examples[:3] == (1, "examples", True)
    assert examples[3].startswith("1 given; fewer than 3 route poorly")


LARGE = f"""
    [defaults]
    description = "Do a thing that is worth words."
    examples = ["one", "two", "three"]
    model = "{MODEL}"

    [[function]]
    name = "write"
    runtime = "llama_cpp"

    [[function]]
    name = "ask"
    runtime = "openai"
    options = {{ base_url = "http://127.0.0.1:1/v1" }}

    [[function]]
    name = "odd"
    runtime = "abacus"
    """


def test_a_model_larger_than_the_machine_is_warned_of_with_the_figures(found):
    large, unknown = found(LARGE, total=lambda: 1_500_000)
    assert large[1:3] == ("model", True)
    assert f"{MODEL} is 3 MB, this machine has 2 MB of memory" in large[3]
    for total in (None, 10**12):
        assert found(LARGE, total=lambda total=total: total) == [unknown]


AGENT = """
    [defaults]
    description = "Do a thing that is worth words."
    examples = ["one", "two", "three"]

    [[function]]
    name = "think"
    runtime = "openai"
    model = "any"
    options = { base_url = "http://127.0.0.1:1/v1" }

    [[function]]
    name = "work"
    runtime = "agent"
    options = { model = "MODEL", tools = ["mcp:files/read"] }

    [[mcp]]
    name = "SERVER"
    command = "./serve"
    folder = "."
    """


def test_what_an_agent_names_is_looked_for_among_the_declared(found, tmp_path):
    (tmp_path / "serve").write_text("#!/bin/sh\n")
    (tmp_path / "serve").chmod(0o755)
    assert found(AGENT.replace("MODEL", "think").replace("SERVER", "files")) == []
    ((line, *_, no_model),) = found(AGENT.replace("MODEL", "dream").replace("SERVER", "files"))
    assert line == 11
    assert "dream" in no_model
    ((*_, no_server),) = found(AGENT.replace("MODEL", "think").replace("SERVER", "other"))
    assert "files" in no_server
    broken = AGENT.replace("MODEL", "think").replace("SERVER", "files").replace('"./serve"', "3")
    (server, agent) = found(broken)
    assert server == (None, "", False, "command: Input should be a valid string")
    assert agent[0] == 11


def test_nothing_runs_in_a_check():
    declared = DeclaredFunctions([], RuntimeContext())
    with pytest.raises(NotFound, match="no function f"):
        declared.runtime("f")
    with pytest.raises(Unavailable, match="only being checked"):
        declared.invoke("f", Request(id="r", input=None, text=None))


def test_every_wrong_option_is_told_at_once(found):
    (problem,) = found(
        """
        [[function]]
        name = "a"
        description = "Do a thing that is worth words."
        examples = ["one", "two", "three"]
        runtime = "command"
        options = { command = [], colour = 1, output = "xml" }
        """
    )
    message = problem[-1]
    assert [part.partition(": ")[0] for part in message.split("; options")] == [
        "options.command",
        ".output",
        ".colour",
    ]


def test_what_is_wrong_with_another_function_is_not_told_of_an_agent(found):
    problems = found(
        """
        [defaults]
        description = "Do a thing that is worth words."
        examples = ["one", "two", "three"]

        [[function]]
        name = "odd"
        runtime = "abacus"

        [[function]]
        name = "helper"
        runtime = "agent"
        options = { model = "nobody" }
        """
    )
    (line, field, *_), agent = problems
    assert (line, field) == (5, "runtime")
    assert agent[-1] == ("options.model: this node has no function nobody; those that chat: none")


def test_a_file_that_is_no_webassembly_module_is_found(found, tmp_path):
    heads = {"junk": b"\x7fELF", "component": b"\0asm\x0d\0\x01\0", "module": b"\0asm\x01\0\0\0"}
    tables = ""
    for name, head in heads.items():
        (tmp_path / f"{name}.wasm").write_bytes(head)
        tables += f'[[function]]\nname = "{name}"\nentry = "{name}.wasm"\n'
    problems = found(
        '[defaults]\ndescription = "Do a thing that is worth words."\n'
        'examples = ["one", "two", "three"]\nruntime = "wasm"\n' + tables
    )
    junk, component = (problem[-1] for problem in problems)
    assert junk.endswith("junk.wasm is no WebAssembly file: it begins with b'\\x7fELF'")
    assert "component.wasm is no module of version 1" in component
    assert "wasm32-wasip1" in component
