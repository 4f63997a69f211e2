"""Which runtimes there are, and what is said of those that cannot run."""

import importlib.util

import pytest

from capability_schemas.errors import ConfigurationError
from node_agent.runtimes.base import RuntimeContext
from node_agent.runtimes.catalogue import make_runtimes, runtime_names, runtime_states
from support.plugin import installed_plugin

CONTEXT = RuntimeContext()


@pytest.fixture
def without(monkeypatch):
    """Make libraries look as if they were not installed."""
    real = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in names else real(name)
        )

    return hide


def states():
    return {state.name: state for state in runtime_states()}


def test_built_in_runtimes_are_made_once_each():
    made = make_runtimes(["python", "command", "python"], CONTEXT)
    assert list(made) == ["python", "command"]
    assert all(runtime.name == name for name, runtime in made.items())


def test_every_built_in_runtime_has_the_name_it_is_asked_for():
    for state in runtime_states():
        if not state.problem:
            assert make_runtimes([state.name], CONTEXT)[state.name].name == state.name


def test_an_unknown_runtime_names_those_that_can_run_here(without):
    without("wasmtime")
    with pytest.raises(ConfigurationError) as raised:
        make_runtimes(["docker"], CONTEXT)
    assert "'docker' is unknown" in raised.value.message
    assert "command" in raised.value.message
    assert "wasm," not in raised.value.message
    assert "foam.runtimes" in raised.value.message


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("wasm", "wasmtime", "wasm"), ("openai", "httpx2", "node"), ("xllamacpp", "xllamacpp", "llm")],
)
def test_a_runtime_without_its_library_says_what_to_install(name, library, extra, without):
    without(library)
    with pytest.raises(
        ConfigurationError, match=f"{library} is not installed: pip install .*{extra}"
    ):
        make_runtimes([name], CONTEXT)
    assert library in states()[name].problem
    assert extra in states()[name].remedy
    assert states()["python"].problem == ""


def test_one_of_two_libraries_is_enough(without):
    without("xllamacpp")
    assert states()["llama_cpp"].problem == ""
    without("xllamacpp", "llama_cpp")
    assert "llama_cpp or xllamacpp is not installed" in states()["llama_cpp"].problem


def test_another_distribution_brings_one(tmp_path):
    assert "echo" not in runtime_names()
    with installed_plugin(tmp_path):
        assert "echo" in runtime_names()
        assert states()["echo"].origin == "foam-echo 1.0.0"
        assert make_runtimes(["echo"], CONTEXT)["echo"].name == "echo"
    assert "echo" not in runtime_names()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import not_there", "cannot be loaded: No module named 'not_there'"),
        ("EchoRuntime = 5", "makes no runtime"),
        ("", "has no attribute 'EchoRuntime'"),
    ],
)
def test_a_broken_one_is_named_and_hurts_no_other(code, message, tmp_path):
    with installed_plugin(tmp_path):
        (tmp_path / "foam_echo.py").write_text(code)
        with pytest.raises(ConfigurationError, match=message):
            make_runtimes(["echo"], CONTEXT)
        assert message in states()["echo"].problem
        assert make_runtimes(["python"], CONTEXT)


def test_a_built_in_one_is_not_replaced(tmp_path):
    with installed_plugin(tmp_path):
        points = tmp_path / "foam_echo-1.0.0.dist-info" / "entry_points.txt"
        points.write_text("[foam.runtimes]\npython = foam_echo:EchoRuntime\n")
        assert make_runtimes(["python"], CONTEXT)["python"].name == "python"
        assert states()["python"].origin == "built in"
