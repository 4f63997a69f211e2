"""Code that prepares texts for a model is edited while the model stays loaded."""

import sys

import pytest

from node_agent.worker.base import Request
from node_agent.worker.engine_host import make_prompt


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Prepare with a module that imports its neighbour, and return what the model is told."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    (tmp_path / "shop_words.py").write_text(
        "import shop_parts\ndef ask(values): return shop_parts.word + values['text']\n"
    )

    def say(word, code, *, write=True):
        if write:
            (tmp_path / "shop_parts.py").write_text(f"word = {word!r}\n")
        options = {"prepare": "shop_words:ask", "code": code}
        prompt = make_prompt(Request(id="r", input={"text": "?"}, text=None, options=options))
        return prompt.messages[0]["content"]

    yield say
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_an_edit_counts_from_the_next_call_on_even_in_a_neighbour(words):
    assert words("how", "sha256:1") == "how?"
    assert words("where", "sha256:2") == "where?"


def test_calls_from_before_an_edit_end_on_the_old_code(words):
    assert words("when", "sha256:3") == "when?"
    assert words("why", "sha256:4") == "why?"
    assert words("", "sha256:3", write=False) == "when?"
