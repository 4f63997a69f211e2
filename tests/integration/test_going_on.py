"""Engines that go on with an answer which another node has begun: as if nothing had happened."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capability_schemas.errors import ExecutionFailed
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes.base import Final, Runtime, RuntimeContext
from node_agent.runtimes.catalogue import make_runtimes
from support.calls import collect, request, running, spec_of
from support.openai_server import MODEL, openai_server
from support.scripted_openai import Answer, ScriptedOpenAI

QUESTION = "What should I do? the vibration of pump-3 is too high."
LIST = {"type": "array", "items": {"enum": [0, 1]}, "minItems": 40, "maxItems": 40}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "greedy": (QUESTION, {}, {"temperature": 0.0}),
    "seeded": ("What can you do?", {}, {"temperature": 0.9, "seed": 7}),
    "a form": ("which pumps run?", {"output_schema": LIST}, {"temperature": 0.0}),
}


def the_runtime(name: str) -> Runtime:
    if name != "openai" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return make_runtimes([name], RuntimeContext(cancel_grace_s=10))[name]


def the_spec(name, kind, url):
    _, fields, options = KINDS[kind]
    options = {"max_tokens": 300, "json_output": "output_schema" in fields, **options}
    if name == "openai":
        options |= {"base_url": url, "json_form": "json_object"}
        return spec_of(name, model="foam-tiny", options=options, continues="prefix", **fields)
    return spec_of(name, model=str(MODEL), options=options, **fields)


async def said(runtime: Runtime, spec: FunctionSpec, text: str, *shown: str) -> list[Final | str]:
    """Return what is shown of an answer in one piece, and its end, for each beginning."""
    found: list[Final | str] = []
    async with running(runtime, spec) as instance:
        for number, begun in enumerate(shown):
            asked = request(runtime, spec, text=text, request_id=f"r{number}")
            *pieces, final = await collect(instance, replace(asked, shown=begun or None))
            found += ["".join(piece.data for piece in pieces), final]
    return found


@pytest.fixture(scope="module")
def server() -> Any:
    with openai_server() as running_server:
        yield running_server


@pytest.mark.llm
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama_cpp", "xllamacpp", "openai"])
async def test_an_answer_goes_on_at_every_place_as_it_would_have(
    name: str, kind: str, server: Any, tmp_path: Path
) -> None:
    runtime, text = the_runtime(name), KINDS[kind][0]
    spec = the_spec(name, kind, server.base_url)
    whole, end = await said(runtime, spec, text, "")
    assert isinstance(whole, str)
    assert isinstance(end, Final)
    assert len(whole) > 30
    cuts = sorted({1, 2, 7, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)})
    found = await said(runtime, spec, text, *(whole[:cut] for cut in cuts))
    for cut, rest, final in zip(cuts, found[::2], found[1::2], strict=True):
        assert rest == whole[cut:], cut
        assert isinstance(final, Final)
        assert final.output == end.output
        assert final.finish == end.finish


@pytest.mark.llm
@pytest.mark.parametrize("name", ["llama_cpp", "xllamacpp"])
async def test_the_next_turn_finds_the_prompt_where_the_answer_was_gone_on_with(name: str) -> None:
    runtime, spec = the_runtime(name), the_spec(name, "greedy", "")
    whole, _ = await said(runtime, spec, QUESTION, "")
    async with running(runtime, spec) as instance:
        asked = replace(request(runtime, spec, text=QUESTION), session="s")
        *_, begun = await collect(instance, replace(asked, shown=str(whole)[:9]))
        *_, again = await collect(instance, replace(asked, id="r2"))
    assert begun.usage["cached_tokens"] < begun.usage["input_tokens"] - 1
    assert again.usage["cached_tokens"] == again.usage["input_tokens"] - 1


def talk(server, **fields):
    options = {"base_url": server.base_url, **fields}
    return spec_of("openai", model="scripted", options=options, continues="prefix")


def scripted(*, closing: int | None, answer: str) -> Any:
    """Answer as a server whose prompts grow by so many tokens with a message that it closes."""

    def respond(body: dict[str, Any]) -> Answer:
        if body.get("stream"):
            return Answer(text=[answer])
        assert body["max_tokens"] == 1
        if closing is None:
            return Answer(raw=b'{"choices": []}')
        said_by_model = [one["content"] for one in body["messages"] if one["role"] == "assistant"]
        tokens = 5 + sum(closing + len(one.split()) for one in said_by_model)
        return Answer(text="x", usage={"prompt_tokens": tokens, "completion_tokens": 1})

    return respond


async def test_a_server_that_goes_on_is_given_the_beginning() -> None:
    async with ScriptedOpenAI(scripted(closing=0, answer="40 C")) as server:
        rest, final = await said(the_runtime("openai"), talk(server), "how hot?", "It is ")
        assert (rest, final.output) == ("40 C", "It is 40 C")  # type: ignore[union-attr]
        (asked,) = [body for body in server.bodies if body.get("stream")]
        assert asked["messages"][-1] == {"role": "assistant", "content": "It is "}


async def test_whether_it_does_is_found_out_once() -> None:
    async with ScriptedOpenAI(scripted(closing=2, answer="It is 40 C")) as server:
        shown = ("It is ", "It is 40", "It is 40 C")
        found = await said(the_runtime("openai"), talk(server), "how hot?", *shown)
        assert found[::2] == ["40 C", " C", ""]
        assert {final.output for final in found[1::2]} == {"It is 40 C"}  # type: ignore[union-attr]
        assert [bool(body.get("stream")) for body in server.bodies] == [*[False] * 3, *[True] * 3]
        assert all(len(body["messages"]) == 1 for body in server.bodies if body.get("stream"))


async def test_one_that_does_not_count_is_believed() -> None:
    async with ScriptedOpenAI(scripted(closing=None, answer="40 C")) as server:
        rest, _ = await said(the_runtime("openai"), talk(server), "how hot?", "It is ")
        assert rest == "40 C"


async def test_one_that_takes_no_such_message_begins_anew() -> None:
    def refuse(body: dict[str, Any]) -> Answer:
        if body["messages"][-1]["role"] == "assistant":
            return Answer(status=400, message="the last message must be of the user")
        return Answer(text="It is 40 C", usage={"prompt_tokens": 5, "completion_tokens": 4})

    async with ScriptedOpenAI(refuse) as server:
        rest, _ = await said(the_runtime("openai"), talk(server), "how hot?", "It is ")
        assert rest == "40 C"


@pytest.mark.parametrize("answer", ["It was 40 C", "It"])
async def test_another_answer_than_the_one_shown_is_an_error(answer: str) -> None:
    async with ScriptedOpenAI(scripted(closing=5, answer=answer)) as server:
        with pytest.raises(ExecutionFailed, match="temperature = 0"):
            await said(the_runtime("openai"), talk(server), "how hot?", "It is ")


async def test_a_conversation_is_never_gone_on_with_but_given_again() -> None:
    async with ScriptedOpenAI(scripted(closing=0, answer="It is 40 C")) as server:
        runtime, spec = the_runtime("openai"), talk(server)
        messages = [{"role": "user", "content": "how hot?"}]
        async with running(runtime, spec) as instance:
            asked = request(runtime, spec, text="", messages=messages)
            *pieces, final = await collect(instance, replace(asked, shown="It is "))
        assert [piece.data for piece in pieces] == ["40 C"]
        assert final.output == "It is 40 C"
        assert json.dumps(server.bodies[0]["messages"]) == json.dumps(messages)
