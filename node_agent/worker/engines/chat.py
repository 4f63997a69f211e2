"""Conversations and tools: from the messages of the OpenAI API to a prompt, and back to calls.

A model that knows nothing of tools is told about them in words, and a grammar made from
`tool_schema` keeps its answer to one JSON object, whatever it knows:

* ``{"tool": NAME, "arguments": {…}}`` calls a tool,
* ``{"answer": "…"}`` says something, and so does ``{"tool": "none", …}``.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import fill_template

Message = dict[str, Any]

NO_TOOL: Final = "none"
"""Name of the tool that is none: what models trained to always name one say."""

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")

PLAIN_TOOLS: Final = """\
You can use these tools:
{tools}
Answer with one JSON object and nothing else. To use a tool: \
{"tool": "its name", "arguments": {its arguments}}. To answer: {"answer": "your words"}."""
"""How tools are stated to a model whose chat template has no place for them."""

ANSWER_FORM: Final = """\
Answer with one JSON object and nothing else. To use a tool: \
{"tool": "its name", "arguments": {its arguments}}. To answer: {"answer": "your words"}."""
"""Said besides, when the chat template states the tools itself."""

_SENTINEL: Final = "\ue000foam\ue000"
"""Stands for words of a message while a template is rendered; private-use characters."""


def check_messages(messages: Any) -> list[Message]:
    """Check a conversation that came with a call.

    Returns:
        The messages; ``content`` in parts (``[{"type": "text", "text"}]``) joined into a string.

    Raises:
        InvocationError: ``invalid_task``: it is not one; the message says where.
    """
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", "write a list of at least one message")
    return [_checked(f"messages[{at}]", message) for at, message in enumerate(messages)]


def _checked(where: str, message: Any) -> Message:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise _bad(where, f"write an object with a role: {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise _bad(f"{where}.content", "only parts of type text are understood")
        content = "".join(str(part) for part in parts)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _bad(f"{where}.tool_calls", "write a list of calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise _bad(f"{where}.content", "write a string")
    return {**message, "content": content}


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Check tools that came with a call; returns ``name``, ``description`` and ``parameters``.

    Raises:
        InvocationError: ``invalid_task``: they are not tools; the message says where.
    """
    if not isinstance(tools, list):
        raise _bad("tools", "write a list")
    found = []
    for at, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise _bad(f"tools[{at}]", 'write {"type": "function", "function": {"name": …}}')
        parameters = inner.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, dict) or not isinstance(
            parameters.get("properties", {}), dict
        ):
            raise _bad(f"tools[{at}].parameters", "write a JSON Schema of an object")
        found.append(
            {
                "name": inner["name"],
                "description": str(inner.get("description") or ""),
                "parameters": parameters,
            }
        )
    return found


def _bad(where: str, remedy: str) -> InvocationError:
    return InvocationError("invalid_task", f"{where}: {remedy}", field=where)


def state_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], template: str
) -> list[Message]:
    """Put tools into the words of a conversation.

    Args:
        messages: The conversation.
        tools: As `check_tools` returns them.
        template: ``{tools}`` stands for the tools as JSON, one a line; ``{signatures}`` for
            ``name(argument, …): description``, likewise; ``{names}`` for their names and commas.
            With ``{text}`` it becomes the last message of the user, whose words go there; without,
            it is a system message in front.
    """
    values = {
        "tools": "\n".join(json.dumps(dict(tool), ensure_ascii=False) for tool in tools),
        "signatures": "\n".join(_signature(tool) for tool in tools),
        "names": ", ".join(str(tool["name"]) for tool in tools),
    }
    made = [dict(message) for message in messages]
    if "{text}" not in template:
        return with_system(made, fill_template(template, values))
    for message in reversed(made):
        if message["role"] == "user":
            values["text"] = str(message["content"])
            message["content"] = fill_template(template, values)
            break
    return made


def _signature(tool: Mapping[str, Any]) -> str:
    arguments = ", ".join(tool["parameters"].get("properties", {}))
    description = f": {tool['description']}" if tool["description"] else ""
    return f"{tool['name']}({arguments}){description}"


def with_system(messages: Sequence[Mapping[str, Any]], text: str) -> list[Message]:
    """Return a conversation whose system message, a new one if need be, ends in ``text``."""
    first, *rest = messages
    if first["role"] in ("system", "developer"):
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *map(dict, rest)]
    return [{"role": "system", "content": text}, *map(dict, messages)]


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Put tool calls and their results into words, for templates that know neither.

    A call becomes what the model would have written, a result a message of the user.
    """
    made: list[Message] = []
    names: dict[str, str] = {}
    for message in messages:
        calls = message.get("tool_calls") or []
        if message["role"] == "tool":
            name = message.get("name") or names.get(str(message.get("tool_call_id")), "the tool")
            words = f"Result of {name}: {message['content']}"
            made.append({"role": "user", "content": words})
        elif calls:
            written = [_written(call) for call in calls]
            names |= {
                str(call.get("id")): one["tool"] for call, one in zip(calls, written, strict=True)
            }
            words = "\n".join(json.dumps(one, ensure_ascii=False) for one in written)
            made.append({"role": "assistant", "content": words})
        else:
            role = "system" if message["role"] == "developer" else message["role"]
            made.append({"role": role, "content": message["content"]})
    return made


def native_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return messages as templates with tools want them: arguments as objects, never as text."""
    made = []
    for message in messages:
        calls = [
            {**call, "function": {"name": one["tool"], "arguments": one["arguments"]}}
            for call in message.get("tool_calls") or []
            for one in (_written(call),)
        ]
        made.append({**message, "tool_calls": calls} if calls else dict(message))
    return made


def _written(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("function", call)
    arguments = inner.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {"text": arguments}
    return {"tool": str(inner.get("name")), "arguments": arguments}


def tool_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON Schema of an answer: a call of one of the tools, or words."""
    calls = [
        {
            "type": "object",
            "properties": {"tool": {"const": tool["name"]}, "arguments": tool["parameters"]},
            "required": ["tool", "arguments"],
            "additionalProperties": False,
        }
        for tool in [
            *tools,
            {"name": NO_TOOL, "parameters": {"type": "object", "maxProperties": 0}},
        ]
    ]
    words = {
        "type": "object",
        "properties": {"answer": {"type": "string"}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    return {"anyOf": [*calls, words]}


def read_answer(answer: Any, *, number: int) -> dict[str, Any]:
    """Turn a parsed answer into ``content`` and ``tool_calls``, see `runtimes.base.Request`.

    Args:
        answer: What the model wrote, within `tool_schema`.
        number: Calls in the conversation so far; the next one's id counts on.
    """
    if "answer" in answer or answer.get("tool") == NO_TOOL:
        return {"content": str(answer.get("answer", "")), "tool_calls": []}
    call = {
        "id": f"call_{number + 1}",
        "name": answer["tool"],
        "arguments": answer["arguments"],
    }
    return {"content": None, "tool_calls": [call]}


def harmless(value: Any, specials: Callable[[str], Collection[str]]) -> Any:
    """Return JSON in whose texts no special token of a model is spelled out.

    For what a template writes into a prompt besides the words of messages, which `guarded_ids`
    guards: a server of tools describes them, and a model names arguments, as they like. Such a
    token is spelled with a space after its first character.

    Args:
        value: A message, or a tool.
        specials: Returns the special tokens that are spelled out in a text.
    """
    if isinstance(value, dict):
        return {harmless(key, specials): harmless(one, specials) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [harmless(one, specials) for one in value]
    if not isinstance(value, str):
        return value
    text = value.replace(_SENTINEL, "")
    for token in specials(text):
        text = text.replace(token, f"{token[0]} {token[1:]}" if token[1:] else " ")
    return text


def guarded_ids(
    messages: Sequence[Mapping[str, Any]],
    render: Callable[[list[Message]], str],
    tokenize: Callable[[str, bool], list[int]],
) -> list[int]:
    """Tokenise a conversation so that words of a message never become special tokens.

    Nobody can then close the user's turn from inside it.

    Args:
        messages: The conversation.
        render: Puts it into the words of the chat template.
        tokenize: Text to ids; the flag tells whether spelled-out special tokens count as such.
    """
    words = [message["content"] for message in messages]
    if not any(text and tokenize(text, True) != tokenize(text, False) for text in words):
        return tokenize(render([dict(message) for message in messages]), True)
    marked = [
        {**message, "content": text and f"{_SENTINEL}{number}{_SENTINEL}"}
        for number, (message, text) in enumerate(zip(messages, words, strict=True))
    ]
    ids: list[int] = []
    for position, part in enumerate(render(marked).split(_SENTINEL)):
        inside = position % 2 == 1
        text = words[int(part)] if inside else part
        if text:
            ids += tokenize(text, not inside)
    return ids
