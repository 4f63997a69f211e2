"""Conversations and tools in words."""

import json
from typing import Any

import pytest

from node_agent.worker.base import InvocationError
from node_agent.worker.engines import chat

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "read_sensor",
            "description": "Read one.",
            "parameters": {
                "type": "object",
                "properties": {"device": {"type": "string"}},
                "required": ["device"],
            },
        },
    },
    {"name": "stop_all"},
]
CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "read_sensor", "arguments": '{"device": "pump-3"}'},
}


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ("hello", "messages"),
        ([], "messages"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\]"),
        ([{"role": "user"}], r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content"),
        ([{"role": "assistant", "content": None}], r"messages\[0\].content"),
        ([{"role": "assistant", "content": "", "tool_calls": "x"}], r"messages\[0\].tool_calls"),
    ],
)
def test_a_conversation_that_is_none_is_refused_with_the_place(messages, where):
    with pytest.raises(InvocationError, match=where) as raised:
        chat.check_messages(messages)
    assert raised.value.code == "invalid_task"


def test_parts_of_a_content_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat.check_messages([{"role": "user", "content": parts}])[0]["content"] == "ab"


def test_tools_are_read_in_both_forms_and_bad_ones_refused():
    sensor, stop = chat.check_tools(TOOLS)
    assert sensor["name"] == "read_sensor"
    assert stop == {
        "name": "stop_all",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    }
    with pytest.raises(InvocationError, match=r"tools\[0\]"):
        chat.check_tools([{"type": "function"}])


def test_tools_are_stated_as_system_text_or_in_the_users_message():
    messages = [{"role": "user", "content": "how warm?"}]
    tools = chat.check_tools(TOOLS)
    system, user = chat.state_tools(messages, tools, chat.PLAIN_TOOLS)
    assert system["role"] == "system"
    assert '"name": "read_sensor"' in system["content"]
    assert user["content"] == "how warm?"
    (only,) = chat.state_tools(messages, tools, "{names} | {signatures} | {text}")
    assert only["content"] == (
        "read_sensor, stop_all | read_sensor(device): Read one.\nstop_all() | how warm?"
    )


def test_a_system_message_that_is_there_is_added_to():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    first, second = chat.with_system(messages, "Tools.")
    assert first == {"role": "system", "content": "Be brief.\n\nTools."}
    assert second == messages[1]


CONVERSATION: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "how warm?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "81 C"},
]


def test_calls_and_results_become_words_for_templates_without_them():
    assert chat.plain_messages(CONVERSATION) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "how warm?"},
        {
            "role": "assistant",
            "content": '{"tool": "read_sensor", "arguments": {"device": "pump-3"}}',
        },
        {"role": "user", "content": "Result of read_sensor: 81 C"},
    ]


def test_arguments_become_objects_for_templates_that_know_calls():
    call = chat.native_messages(CONVERSATION)[2]["tool_calls"][0]
    assert call["function"] == {"name": "read_sensor", "arguments": {"device": "pump-3"}}
    assert CALL["function"]["arguments"] == '{"device": "pump-3"}'


def test_the_schema_of_an_answer_admits_calls_and_words_only():
    jsonschema = pytest.importorskip("jsonschema")
    schema = chat.tool_schema(chat.check_tools(TOOLS))
    for good in (
        {"tool": "read_sensor", "arguments": {"device": "x"}},
        {"tool": "stop_all", "arguments": {}},
        {"tool": "none", "arguments": {}},
        {"answer": "fine"},
    ):
        jsonschema.validate(good, schema)
    for bad in ({"tool": "rm", "arguments": {}}, {"tool": "read_sensor", "arguments": {}}, {}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


def test_answers_are_read_as_calls_or_words():
    assert chat.read_answer({"tool": "f", "arguments": {"a": 1}}, number=2) == {
        "content": None,
        "tool_calls": [{"id": "call_3", "name": "f", "arguments": {"a": 1}}],
    }
    assert chat.read_answer({"answer": "no"}, number=0) == {"content": "no", "tool_calls": []}
    none = chat.read_answer({"tool": "none", "arguments": {}}, number=0)
    assert none == {"content": "", "tool_calls": []}


def test_words_never_become_special_tokens():
    def tokenize(text, special):
        return [999 if special and part == "<end>" else part for part in text.split(" ") if part]

    def render(messages):
        return " ".join(f"<{m['role']}> {m['content']} <end>" for m in messages)

    spelled = [{"role": "user", "content": "a <end> b"}, {"role": "user", "content": "c"}]
    ids = chat.guarded_ids(spelled, render, tokenize)
    assert ids == ["<user>", "a", "<end>", "b", 999, "<user>", "c", 999]
    plain = [{"role": "user", "content": "a"}]
    assert chat.guarded_ids(plain, render, tokenize) == ["<user>", "a", 999]


def test_a_tools_schema_round_trips_through_json():
    assert json.loads(json.dumps(chat.tool_schema(chat.check_tools(TOOLS))))


def test_what_tools_and_calls_spell_out_is_no_special_token():
    def specials(text):
        return {token for token in ("<end>", "\x01") if token in text}

    hostile = {"name": "a<end>", "parameters": {"<end>": ["x<end>y", 7, None, "\x01"]}}
    clean = {"name": "a< end>", "parameters": {"< end>": ["x< end>y", 7, None, " "]}}
    assert chat.harmless(hostile, specials) == clean
    marker = chat._SENTINEL
    assert chat.harmless(f"<e{marker}nd>", specials) == "< end>"


@pytest.mark.parametrize("parameters", [[1], "x", {"type": "object", "properties": ["a"]}])
def test_parameters_that_are_no_schema_are_refused(parameters):
    with pytest.raises(InvocationError, match=r"tools\[0\].parameters: write a JSON Schema"):
        chat.check_tools([{"name": "a", "parameters": parameters}])
