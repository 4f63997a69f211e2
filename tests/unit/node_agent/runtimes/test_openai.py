"""The openai runtime without a server: options, bodies, and answers put together."""

import json
from dataclasses import replace

import pytest

from capability_schemas.errors import ConfigurationError, ExecutionFailed, InvalidTask
from node_agent.runtimes.base import Request, RuntimeContext
from node_agent.runtimes.openai import OpenAIRuntime, is_inside, request_body
from node_agent.runtimes.openai_stream import ChatAnswer, EventStream, Garbage, vectors
from support.calls import request, spec_of

RUNTIME = OpenAIRuntime(RuntimeContext())
LOCAL = "http://127.0.0.1:11434/v1"
SCHEMA = {"type": "object"}


def talk(base_url=LOCAL, *, output_schema=None, external=False, model="tiny", **options):
    return spec_of(
        "openai",
        model=model,
        output_schema=output_schema,
        policy={"external": external},
        options={"base_url": base_url, **options},
    )


def body(spec, value=None, *, text=None, **more):
    options = {**RUNTIME.call_options(spec), **more}
    return request_body(Request(id="r", input=value or {}, text=text, options=options))


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("192.168.1.7", True),
        ("10.0.0.1", True),
        ("fe80::1", True),
        ("localhost", True),
        ("gpu-box", True),
        ("gpu.plant.internal", True),
        ("ollama.local", True),
        ("8.8.8.8", False),
        ("api.example.com", False),
        ("local.example.com", False),
    ],
)
def test_inside_is_what_its_name_says(host, inside):
    assert is_inside(host) is inside


def test_a_server_outside_needs_the_policy_to_say_so():
    with pytest.raises(ConfigurationError, match=r"api\.example\.com is outside .*external = true"):
        RUNTIME.check(talk("https://api.example.com/v1"))
    RUNTIME.check(talk("https://api.example.com/v1", external=True))


def key_file(folder, content="sk-1", mode=0o600):
    path = folder / "key"
    path.write_text(content)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("sk-1", 0o644, "can be read by others: chmod 600"),
        ("", 0o600, "must hold one key"),
        ("one\ntwo", 0o600, "must hold one key"),
    ],
)
def test_a_key_must_be_one_and_private(content, mode, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        RUNTIME.check(talk(api_key_file=key_file(tmp_path, content, mode)))


def test_a_key_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"api_key_file: .*gone: No such file"):
        RUNTIME.check(talk(api_key_file=str(tmp_path / "gone")))


def test_a_key_does_not_leave_the_site_in_the_clear(tmp_path):
    options = {"api_key_file": key_file(tmp_path), "external": True}
    RUNTIME.check(talk("https://api.example.com/v1", **options))
    with pytest.raises(ConfigurationError, match="use https"):
        RUNTIME.check(talk("http://api.example.com/v1", **options))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "127.0.0.1:11434"}, r"options\.base_url"),
        ({"base_url": "http://me:secret@127.0.0.1/v1"}, r"options\.base_url"),
        ({"model": ""}, "needs the name of a model"),
        ({"json_output": True}, "json_output needs an output_schema"),
        ({"max_tokens": 0}, r"options\.max_tokens"),
        ({"api_key": "sk-1"}, r"options\.api_key"),
        ({"extra": {"stream": False}}, "stream is set by the runtime"),
        ({"embeddings": True, "confidence": True}, "go without"),
    ],
)
def test_wrong_options_are_named(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        RUNTIME.check(talk(**fields))


def test_the_body_says_what_the_options_say():
    spec = talk(
        system="You know {site}.",
        template="{text}!",
        max_tokens=9,
        temperature=0.5,
        seed=3,
        stop=["END"],
        confidence=True,
        extra={"top_k": 4},
    )
    assert body(spec, {"site": "hall 3"}, text="well") == {
        "model": "tiny",
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["END"],
        "logprobs": True,
        "top_k": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "You know hall 3."},
            {"role": "user", "content": "well!"},
        ],
    }


def test_the_schema_is_asked_for_in_the_servers_own_way():
    asked = body(talk(output_schema=SCHEMA, json_output=True), text="x")["response_format"]
    assert asked == {
        "type": "json_schema",
        "json_schema": {"name": "subject", "schema": SCHEMA, "strict": True},
    }
    spec = talk(output_schema=SCHEMA, json_output=True, json_form="json_object")
    assert body(spec, text="x")["response_format"] == {"type": "json_object", "schema": SCHEMA}


def test_a_conversation_and_tools_go_as_they_are():
    messages = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    spec = talk(output_schema=SCHEMA, json_output=True)
    asked = body(spec, messages=messages, tools=tools)
    assert asked["messages"] == messages
    assert asked["tools"] == tools
    assert "response_format" not in asked


@pytest.mark.parametrize("text", [None, "", "  "])
def test_nothing_to_say_is_the_callers_fault(text):
    with pytest.raises(InvalidTask, match="no text"):
        body(talk(), text=text)


@pytest.mark.parametrize("texts", [[], "one", ["one", " "], ["one", 2]])
def test_texts_to_embed_are_checked(texts):
    with pytest.raises(InvalidTask, match=r"input\.texts"):
        body(talk(embeddings=True), {"texts": texts})


def events(*blocks):
    stream = EventStream()
    return [event for block in blocks for event in stream.feed(block)], stream


def test_events_are_cut_wherever_the_bytes_were():
    data = b': hi\r\nevent: x\r\ndata: {"a":\r\ndata: 1}\r\n\r\ndata:{"b":2}\n\ndata: [DONE]\n\n'
    whole, stream = events(data)
    assert whole == [{"a": 1}, {"b": 2}]
    assert stream.ended
    assert events(*(data[i : i + 1] for i in range(len(data))))[0] == whole


@pytest.mark.parametrize(
    "data",
    [b"<html>\n", b"data: {\n\n", b"data: []\n\n", b"\xff\xfe\n", b"x" * 5_000_000],
)
def test_what_is_no_event_stream_is_garbage(data):
    with pytest.raises(Garbage, match="the server sent"):
        events(data)


def chunk(delta=None, finish=None, **more):
    return {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish, **more}]}


def put_together(*chunks, tools=False, parse=False):
    answer = ChatAnswer(tools=tools, parse=parse)
    words = [answer.add(event) for event in chunks]
    return words, answer.final(prefill_ms=1, decode_ms=2)


def test_words_usage_and_confidence_come_together():
    words, final = put_together(
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "he"}, logprobs={"content": [{"token": "he", "logprob": -0.1}]}),
        chunk({"content": "llo"}, logprobs={"content": [{"token": "llo", "logprob": -0.5}]}),
        chunk(finish="stop"),
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}},
    )
    assert words == ["", "he", "llo", "", ""]
    assert final.output == "hello"
    assert final.finish == "stop"
    assert final.usage == {"input_tokens": 7, "output_tokens": 2, "cached_tokens": 0}
    assert final.confidence == pytest.approx(0.6065, abs=1e-4)
    assert final.timing == {"prefill_ms": 1, "decode_ms": 2}


def test_calls_of_tools_come_in_fragments():
    def part(index, **call):
        return chunk({"tool_calls": [{"index": index, **call}]})

    _, final = put_together(
        part(0, id="a", function={"name": "add", "arguments": ""}),
        part(1, id="b", function={"name": "say", "arguments": '{"x":'}),
        part(0, function={"arguments": '{"n": 1}'}),
        part(1, function={"arguments": "broken"}),
        part(2, function={"name": "now", "arguments": ""}),
        chunk(finish="tool_calls"),
        tools=True,
    )
    assert final.finish == "tool_calls"
    assert final.output == {
        "content": None,
        "tool_calls": [
            {"id": "a", "name": "add", "arguments": {"n": 1}},
            {"id": "b", "name": "say", "arguments": '{"x":broken'},
            {"id": "call_2", "name": "now", "arguments": {}},
        ],
    }


def test_an_answer_without_an_end_is_given_up_on():
    answer = ChatAnswer(tools=True, parse=False)
    part = {"tool_calls": [{"index": 0, "function": {"arguments": "x" * 4_000_000}}]}
    for _ in range(4):
        answer.add(chunk(part))
    with pytest.raises(Garbage, match="more than"):
        answer.add(chunk(part))


def test_with_tools_words_alone_keep_the_form():
    _, final = put_together(chunk({"content": "no"}), chunk(finish="stop"), tools=True)
    assert final.output == {"content": "no", "tool_calls": []}


def test_json_is_read_and_what_is_none_says_why():
    _, final = put_together(chunk({"content": '{"a": 1}'}, "stop"), parse=True)
    assert final.output == {"a": 1}
    with pytest.raises(ExecutionFailed, match="cut off by max_tokens"):
        put_together(chunk({"content": '{"a": '}, "length"), parse=True)


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [1]},
        {"choices": 5},
        {"choices": [{"delta": {"content": 5}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": "x"}]}}]},
        {"usage": {"prompt_tokens": "many"}},
    ],
)
def test_a_chunk_of_another_form_is_garbage(event):
    with pytest.raises(Garbage, match="no chat completion chunk"):
        put_together(event)


def test_an_error_in_the_stream_is_the_servers():
    with pytest.raises(ExecutionFailed, match="the server says: out of memory"):
        put_together({"error": {"message": "out of memory"}})


def test_vectors_come_in_the_order_of_the_texts():
    data = [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2]}]
    found, usage = vectors({"data": data, "usage": {"prompt_tokens": 5}}, 2)
    assert found == [[1.0, 2.0], [3.0, 4.0]]
    assert usage["input_tokens"] == 5


@pytest.mark.parametrize(
    "answer", [{}, [], {"data": [{"index": 0}]}, {"data": [{"index": 0, "embedding": ["x"]}]}]
)
def test_what_are_no_vectors_is_garbage(answer):
    with pytest.raises(Garbage, match="no embeddings"):
        vectors(answer, 1)
    with pytest.raises(Garbage, match="0 vectors for 2 texts"):
        vectors({"data": []}, 2)


def test_functions_of_one_model_and_server_share_instances():
    assert RUNTIME.group(talk(max_tokens=3)) == RUNTIME.group(talk(template="{x}"))
    assert RUNTIME.group(talk()) != RUNTIME.group(talk(model="other"))
    assert RUNTIME.group(talk()) != RUNTIME.group(talk("http://127.0.0.1:1/v1"))
    assert json.dumps(RUNTIME.call_options(talk()))


def test_an_event_in_endless_lines_is_given_up_on():
    stream = EventStream()
    line = b"data: " + b"x" * 500_000 + b"\n"
    for _ in range(8):
        assert not list(stream.feed(line))
    with pytest.raises(Garbage, match="an event of more than"):
        list(stream.feed(line))


def test_numbers_beyond_all_numbers_are_garbage():
    with pytest.raises(Garbage):
        ChatAnswer(tools=False, parse=False).add({"usage": {"prompt_tokens": float("inf")}})
    for number in (float("inf"), float("nan")):
        with pytest.raises(Garbage):
            vectors({"data": [{"index": 0, "embedding": [number]}]}, 1)
    answer = ChatAnswer(tools=False, parse=False)
    answer.add({"usage": {"prompt_tokens": -3}, "choices": [{"finish_reason": "stop"}]})
    assert answer.final(prefill_ms=0, decode_ms=0).usage["input_tokens"] == 0


def test_a_text_that_was_shown_is_the_beginning_of_the_answer() -> None:
    spec = spec_of("openai", model="m", options={"base_url": "http://127.0.0.1:1/v1"})
    runtime = OpenAIRuntime(RuntimeContext())
    asked = replace(request(runtime, spec, text="how hot?"), shown="It is ")
    assert request_body(asked)["messages"][-1]["role"] == "user"
    body = request_body(asked, go_on=True)
    assert body["messages"][-1] == {"role": "assistant", "content": "It is "}
    assert body["continue_final_message"] is True
    answer = ChatAnswer(tools=False, parse=False, shown="It is ")
    said = answer.add({"choices": [{"delta": {"content": "40 C"}, "finish_reason": "stop"}]})
    assert said == "40 C"
    assert answer.final(prefill_ms=1, decode_ms=1).output == "It is 40 C"
