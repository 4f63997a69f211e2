"""The pure parts of the engines, and how one is chosen."""

from typing import Any

import pytest

from node_agent.worker import engines
from node_agent.worker.base import InvocationError, Request
from node_agent.worker.engine_host import TokenStream, make_prompt
from node_agent.worker.engines.base import EngineOptions, StopScanner, fill_template


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_a_stop_text_ends_the_stream_and_no_part_of_it_shows(step):
    text = "the pump <is fine</end> and more"
    scanner = StopScanner(["</end>", "never"])
    shown = "".join(scanner.feed(text[at : at + step]) for at in range(0, len(text), step))
    assert shown == "the pump <is fine"
    assert scanner.stopped


def test_what_only_looked_like_a_stop_text_is_shown_in_the_end():
    scanner = StopScanner(["</end>"])
    assert scanner.feed("a </e") == "a "
    assert scanner.flush() == "</e"
    assert not scanner.stopped


def test_the_first_stop_text_of_several_counts():
    scanner = StopScanner(["zzz", "b"])
    assert scanner.feed("abzzz") == "a"


def test_templates_fill_known_names_and_leave_the_rest():
    template = 'Say {text} of {device}: {"json": {unknown}} {text.__class__}'
    assert (
        fill_template(template, {"text": "{device}", "device": 3})
        == 'Say {device} of 3: {"json": {unknown}} {text.__class__}'
    )


def request(**given):
    return Request(id="r", **{"input": {}, "text": None, **given})


def test_a_prompt_takes_text_input_system_and_template():
    prompt = make_prompt(
        request(
            input={"device": "pump-3"},
            text="is it well?",
            options={"system": "You know {device}.", "template": "{device}: {text}", "stop": "x"},
        )
    )
    assert [dict(message) for message in prompt.messages] == [
        {"role": "system", "content": "You know pump-3."},
        {"role": "user", "content": "pump-3: is it well?"},
    ]
    assert prompt.stop == ("x",)
    assert prompt.temperature == 0.0


def test_input_without_words_reaches_the_model_as_json():
    assert make_prompt(request(input={"a": 1})).messages[0]["content"] == '{"a": 1}'


def test_a_prompt_without_anything_to_say_is_refused():
    with pytest.raises(InvocationError) as raised:
        make_prompt(request())
    assert raised.value.code == "invalid_task"


def test_a_function_may_put_the_task_into_words(tmp_path):
    code = tmp_path / "phrase.py"
    code.write_text(
        'def ask(values):\n    return f\'{int(values["text"])} of {values["unit"]}?\'\n'
    )
    options = {"prepare": f"{code}:ask", "template": "> {text}"}
    prompt = make_prompt(request(input={"unit": "bar"}, text="7", options=options))
    assert prompt.messages[0]["content"] == "> 7 of bar?"
    with pytest.raises(InvocationError, match="invalid literal") as raised:
        make_prompt(request(input={"unit": "bar"}, text="seven", options=options))
    assert raised.value.code == "invalid_task"


def test_tokens_share_frames_but_the_first_goes_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("node_agent.worker.engine_host.time.monotonic", lambda: now[0])
    sent = []
    stream = TokenStream("r", lambda frame: sent.append(frame["d"]))
    for token, advance in (("a", 0.001), ("b", 0.001), ("c", 0.020), ("d", 0.001), ("e", 0)):
        stream.add(token)
        now[0] += advance
    stream.flush()
    assert sent == ["a", "bcd", "e"]
    assert stream.text == "abcde"


def test_auto_takes_the_first_engine_that_can_be_imported(monkeypatch):
    class Wheel:
        def __init__(self, options):
            self.options = options

    def load(name):
        if name.endswith("llama_cpp") and "xllama" not in name:
            raise ImportError("no compiler was at hand")
        return type("module", (), {"XllamaCppEngine": Wheel})

    monkeypatch.setattr("importlib.import_module", load)
    options = EngineOptions(model="m.gguf")
    engine: Any
    name, engine, passed_over = engines.load_engine("auto", options)
    assert (name, engine.options) == ("xllamacpp", options)
    assert passed_over == ["llama_cpp: no compiler was at hand"]
    with pytest.raises(InvocationError, match="no engine"):
        engines.load_engine("llama_cpp", options)
    with pytest.raises(InvocationError, match="use auto"):
        engines.load_engine("vllm", options)
