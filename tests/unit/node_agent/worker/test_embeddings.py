"""Texts to vectors, by the shipped model."""

import math
from pathlib import Path
from typing import Any

import pytest

from node_agent.worker.base import InvocationError, Request

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from node_agent.worker.embedding_host import EmbeddingHost, texts_of
from node_agent.worker.engines.llama_cpp import EmbeddingModel

pytestmark = pytest.mark.llm

MODEL = Path(__file__).parents[4] / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"


@pytest.fixture(scope="module")
def model():
    made = EmbeddingModel(model=str(MODEL))
    yield made
    made.close()


def embed(model, *texts):
    groups = model.groups(model.tokens(list(texts)))
    return [vector for group in groups for vector in model.embed(group)]


def cosine(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))


def test_vectors_have_length_one_and_nearness_means_likeness(model):
    hot, warm, other = embed(model, "pump-3 is too hot", "pump-4 is too hot", "Hello! Who are you?")
    assert len(hot) == model.dimension
    assert math.isclose(cosine(hot, hot), 1.0, abs_tol=1e-3)
    assert cosine(hot, warm) > cosine(hot, other)


def test_company_in_a_decode_does_not_change_a_vector(model):
    texts = [f"sensor {number} of hall {number % 7}" for number in range(40)]
    together = embed(model, *texts)
    assert len(together) == 40
    for at in (0, 17, 39):
        assert cosine(together[at], embed(model, texts[at])[0]) > 0.999


def test_texts_are_cut_into_decodes_that_fit(model):
    items = model.tokens(["word " * 150] * 3 + ["x"] * 20)
    groups = model.groups(items)
    assert [ids for group in groups for ids in group] == items
    assert all(sum(map(len, group)) <= model.n_ctx and len(group) <= 16 for group in groups)
    assert len(groups) < 6


def test_texts_too_long_or_empty_are_refused(model):
    with pytest.raises(InvocationError, match="context holds 512"):
        model.tokens(["fine", "too long " * 1000])
    with pytest.raises(InvocationError, match="text 1 is empty"):
        model.tokens(["fine", " "])


def test_without_normalising_the_length_is_the_models_own():
    raw = EmbeddingModel(model=str(MODEL), normalise=False, pooling="last")
    (vector,) = embed(raw, "pump-3")
    raw.close()
    assert not math.isclose(cosine(vector, vector), 1.0, abs_tol=0.1)


def request(value, text=None):
    return Request(id="r", input=value, text=text)


def test_a_call_names_its_texts_in_one_of_three_ways():
    assert texts_of(request({"texts": ["a", "b"]})) == ["a", "b"]
    assert texts_of(request({"text": "a"})) == ["a"]
    assert texts_of(request({}, "words")) == ["words"]
    wrong: tuple[dict[str, Any], ...] = ({"texts": "a"}, {"texts": [1]}, {"texts": []}, {})
    for bad in wrong:
        with pytest.raises(InvocationError) as raised:
            texts_of(request(bad))
        assert raised.value.code == "invalid_task"


def test_the_host_answers_refuses_cancels_and_ends():
    frames: list[dict[str, Any]] = []
    host = EmbeddingHost(options={"model": str(MODEL), "slots": 4}, emit=frames.append)
    info = host.load()
    assert (info["slots"], info["context_tokens"]) == (4, 512)
    host.submit(request({"texts": ["a b", "c"]}))
    host.submit(Request(id="bad", input={"texts": []}, text=None))
    host.submit(Request(id="gone", input={"text": "a"}, text=None))
    host.cancel("gone")
    host.close()
    host.serve()
    good, bad, gone = frames
    assert good["t"] == "final"
    assert len(good["output"]) == 2
    assert good["usage"]["output_tokens"] == 0
    assert good["usage"]["input_tokens"] >= 4
    assert (bad["id"], bad["code"]) == ("bad", "invalid_task")
    assert (gone["id"], gone["code"]) == ("gone", "cancelled")
