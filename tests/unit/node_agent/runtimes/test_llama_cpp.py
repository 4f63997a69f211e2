"""What the runtimes of language models make of a specification."""

import importlib.util
from pathlib import Path
from typing import cast

import pytest

from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionLimits, FunctionSpec
from node_agent.runtimes import llama_cpp as module
from node_agent.runtimes.base import LocalFunctions, RuntimeContext
from node_agent.runtimes.catalogue import make_runtimes
from node_agent.runtimes.embeddings import EmbeddingsRuntime
from node_agent.runtimes.llama_cpp import LlamaCppRuntime
from node_agent.runtimes.xllamacpp import XllamaCppRuntime

MODEL = Path(__file__).parents[4] / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
RUNTIMES = [LlamaCppRuntime, XllamaCppRuntime, EmbeddingsRuntime]


def spec(name="f", **given):
    return FunctionSpec(
        **{"name": name, "description": "d", "runtime": "llama_cpp", "model": str(MODEL), **given}
    )


class Local:
    def __init__(self, *specs):
        self._specs = {one.name: one for one in specs}

    def specs(self):
        return self._specs


class Started:
    """Stands for the child; keeps what it was started with."""

    made: list["Started"] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, *, load, **_):
        self.load = load
        self.info = {}
        Started.made.append(self)

    async def start(self):
        pass


@pytest.fixture
def started(monkeypatch):
    Started.made.clear()
    monkeypatch.setattr(module, "ChildInstance", Started)
    return Started.made


def test_the_catalogue_knows_all_three():
    names = {"llama_cpp", "xllamacpp", "embeddings"}
    made = make_runtimes(names, RuntimeContext())
    assert {runtime.name for runtime in made.values()} == names
    assert [made[name].chats for name in ("llama_cpp", "xllamacpp", "embeddings")] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("runtime_class", RUNTIMES)
def test_models_that_are_none_are_refused(runtime_class, tmp_path):
    runtime = runtime_class(RuntimeContext())
    runtime.check(spec())
    with pytest.raises(ConfigurationError, match="needs a model"):
        runtime.check(spec(model=None))
    with pytest.raises(ConfigurationError, match=r"gone\.gguf does not exist"):
        runtime.check(spec(model="gone.gguf"))
    text = tmp_path / "text.gguf"
    text.write_text("no model at all")
    with pytest.raises(ConfigurationError, match=r"function f: .*text\.gguf"):
        runtime.check(spec(model=str(text)))
    half = tmp_path / "half.gguf"
    half.write_bytes(MODEL.read_bytes()[:100_000])
    with pytest.raises(ConfigurationError, match=r"function f: .*half\.gguf"):
        runtime.check(spec(model=str(half)))


@pytest.mark.parametrize("runtime_class", RUNTIMES)
def test_a_model_may_be_a_name_in_the_store(runtime_class):
    def path(name):
        if name != "tiny":
            raise ConfigurationError(f"no model {name}: foam model pull {name}")
        return MODEL

    runtime = runtime_class(RuntimeContext(model_path=path))
    runtime.check(spec(model="tiny"))
    assert runtime.group(spec(model="tiny")) == runtime_class(RuntimeContext()).group(spec())
    with pytest.raises(ConfigurationError, match="function f: no model big: foam model pull big"):
        runtime.check(spec(model="big"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_ctxx": 3}, "options.n_ctxx"),
        ({"temperature": -1}, "options.temperature"),
        ({"top_p": 0}, "options.top_p"),
        ({"parallel": 0}, "options.parallel"),
        ({"lora": [{"scale": 1}]}, r"options.lora"),
        ({"lora": "gone.gguf"}, "gone.gguf does not exist"),
        ({"json_output": True}, "output_schema"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(ConfigurationError, match=words):
        LlamaCppRuntime(RuntimeContext()).check(spec(options=options))


def test_unknown_options_of_embeddings_and_another_engine_are_refused():
    with pytest.raises(ConfigurationError, match=r"options\.temperature"):
        EmbeddingsRuntime(RuntimeContext()).check(spec(options={"temperature": 1}))
    with pytest.raises(ConfigurationError, match="a runtime of its own"):
        XllamaCppRuntime(RuntimeContext()).check(spec(options={"engine": "llama_cpp"}))


def test_what_travels_with_a_call_separates_no_instances():
    runtime = LlamaCppRuntime(RuntimeContext())
    plain = spec(options={"n_ctx": 256})
    calls = {"temperature": 1.0, "seed": 4, "stop": ["x"], "template": "{text}?", "max_tokens": 9}
    group = runtime.group(plain)
    assert runtime.group(spec(options={"n_ctx": 256, **calls})) == group
    assert runtime.group(spec(options={"n_ctx": 256, "parallel": 4}, concurrency=7)) == group
    assert runtime.group(spec(options={"n_ctx": 512})) != group
    assert runtime.group(spec(options={"n_ctx": 256, "lora": str(MODEL)})) != group
    limits = FunctionLimits(memory_bytes=10**9)
    assert runtime.group(spec(options={"n_ctx": 256}, limits=limits)) != group
    sent = runtime.call_options(spec(options=calls))
    assert (sent["seed"], sent["temperature"], sent["top_k"]) == (4, 1.0, 40)
    assert "n_ctx" not in sent
    assert "parallel" not in sent


async def test_an_instance_has_a_slot_for_each_call_at_a_time(started):
    await LlamaCppRuntime(RuntimeContext()).start(spec(concurrency=5), died=print)
    await LlamaCppRuntime(RuntimeContext()).start(
        spec(concurrency=5, options={"parallel": 2}), died=print
    )
    assert [one.load["options"]["parallel"] for one in started] == [5, 2]


async def test_functions_that_share_an_instance_share_the_largest_number_of_slots(started):
    local = Local(
        spec("one"),
        spec("many", concurrency=6),
        spec("other_context", concurrency=9, options={"n_ctx": 128}),
        spec("other_runtime", concurrency=9, runtime="python", model=None),
    )
    runtime = LlamaCppRuntime(RuntimeContext(local=cast("LocalFunctions", local)))
    await runtime.start(local.specs()["one"], died=print)
    assert started[0].load["options"]["parallel"] == 6


@pytest.mark.parametrize(
    ("runtime_class", "installed", "network"),
    [
        (LlamaCppRuntime, True, False),
        (LlamaCppRuntime, False, True),
        (XllamaCppRuntime, True, True),
    ],
)
async def test_only_the_engine_that_is_a_server_gets_the_network(
    started, monkeypatch, runtime_class, installed, network
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: installed or None)
    await runtime_class(RuntimeContext()).start(spec(), died=print)
    assert started[0].load["limits"]["network"] is network


def test_a_claim_names_model_weights_and_engine():
    info = {
        "model_name": "tiny",
        "file_type": "15",
        "engine": "llama_cpp",
        "engine_version": "0.3",
    }
    model = LlamaCppRuntime(RuntimeContext()).model(spec(), info)
    assert model is not None
    assert (model.name, model.quantisation, model.engine) == ("tiny", "q4_k_m", "llama_cpp 0.3")
    unknown = LlamaCppRuntime(RuntimeContext()).model(spec(), {})
    assert unknown is not None
    assert (unknown.name, unknown.quantisation) == (MODEL.stem, None)
