"""The runtimes of language models with real children and the shipped model."""

import asyncio
import importlib.util
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from capability_schemas.errors import InvalidTask, TaskCancelled
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes.base import Final, InstanceFailed, Piece, Request, RuntimeContext
from node_agent.runtimes.catalogue import make_runtimes

pytestmark = pytest.mark.llm

MODEL = Path(__file__).parents[2] / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
QUESTIONS = [
    "Extract JSON: The humidity of greenhouse-7 is 48 %.",
    "What should I do? the vibration of pump-3 is too high.",
    "Trend of 20 24 29 35?",
    "What can you do?",
]
LIST = {
    "type": "array",
    "items": {"enum": ["ok", "warning", "critical"]},
    "minItems": 60,
    "maxItems": 60,
}
SEVERITY = "Classify the severity: fan-2 noise 96 dB, warning at 85, critical at 100."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read",
            "parameters": {
                "type": "object",
                "properties": {"device": {"enum": ["pump-3", "fan-1"]}},
                "required": ["device"],
                "additionalProperties": False,
            },
        },
    }
]


class Subject:
    def __init__(self, name):
        engine = "llama_cpp" if name == "embeddings" else name
        if importlib.util.find_spec(engine) is None:
            pytest.skip(f"{engine} is not installed")
        self.runtime = make_runtimes([name], RuntimeContext(cancel_grace_s=10))[name]
        self.name = name

    def spec(self, **given):
        return FunctionSpec(
            **{"name": "f", "description": "d", "runtime": self.name, "model": str(MODEL), **given}
        )

    @asynccontextmanager
    async def instance(self, **given):
        instance = await self.runtime.start(self.spec(**given), died=lambda _: None)
        try:
            yield instance
        finally:
            await instance.close(2.0)

    def request(self, text, number=0, *, session=None, value=None, spec=None, **options):
        options = {**self.runtime.call_options(spec or self.spec()), **options}
        return Request(
            id=f"r{number}", input=value or {}, text=text, options=options, session=session
        )


@pytest.fixture(params=["llama_cpp", "xllamacpp"])
def chat(request):
    return Subject(request.param)


async def answered(instance, request):
    async with aclosing(instance.invoke(request)) as answers:
        *pieces, final = [item async for item in answers]
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert isinstance(final, Final)
    return final


async def cancel_at_each_piece(instance, request):
    async with aclosing(instance.invoke(request)) as answers:
        async for _ in answers:
            instance.cancel(request.id)


async def test_calls_at_a_time_get_the_answers_of_calls_in_a_row(chat):
    async with chat.instance(concurrency=4) as instance:
        assert (instance.slots, instance.info["context_tokens"]) == (4, 512)
        alone = [
            (await answered(instance, chat.request(q, n))).output for n, q in enumerate(QUESTIONS)
        ]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(answered(instance, chat.request(q, n + 10)))
                for n, q in enumerate(QUESTIONS)
            ]
        assert [task.result().output for task in tasks] == alone
        assert instance.busy == 0


async def test_a_final_says_what_it_took_and_how_sure_it_is(chat):
    async with chat.instance() as instance:
        first = await answered(instance, chat.request(QUESTIONS[0], session="s"))
        again = await answered(instance, chat.request(QUESTIONS[0], 1, session="s"))
        assert first.output == again.output
        assert 0 < first.confidence <= 1
        assert first.usage["output_tokens"] > 5
        assert again.usage["cached_tokens"] == again.usage["input_tokens"] - 1
        assert set(first.timing) == {"prefill_ms", "decode_ms"}
        for fact in ("prefill_token_ms", "token_ms", "memory_bytes"):
            assert instance.info[fact] > 0


async def test_a_cancelled_call_frees_its_slot_and_spares_its_neighbour(chat):
    spec = chat.spec(output_schema=LIST, options={"json_output": True, "max_tokens": 400})
    async with chat.instance(concurrency=2, options={"n_ctx": 512}) as instance:

        async def neighbour():
            return await answered(instance, chat.request(SEVERITY, 1, spec=spec))

        async with asyncio.TaskGroup() as group:
            task = group.create_task(neighbour())
            request = chat.request(SEVERITY, 2, spec=spec)
            with pytest.raises(TaskCancelled):
                await cancel_at_each_piece(instance, request)
        assert len(task.result().output) == 60
        assert instance.busy == 0
        assert instance.alive


async def test_a_call_with_tools_ends_in_words_or_calls(chat):
    messages = [
        {"role": "user", "content": "read pump-3"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "function": {"name": "read", "arguments": '{"device": "fan-1"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "81 C"},
    ]
    async with chat.instance() as instance:
        request = chat.request(None, tools=TOOLS, messages=messages, max_tokens=400)
        async with aclosing(instance.invoke(request)) as answers:
            (final,) = [item async for item in answers]  # nothing is streamed
        assert set(final.output) == {"content", "tool_calls"}
        for call in final.output["tool_calls"]:
            assert call == {"id": "call_2", "name": "read", "arguments": call["arguments"]}
            assert call["arguments"]["device"] in ("pump-3", "fan-1")
        assert final.finish == ("tool_calls" if final.output["tool_calls"] else "stop")


async def test_what_does_not_fit_and_what_is_no_conversation_is_refused(chat):
    async with chat.instance() as instance:
        with pytest.raises(InvalidTask, match="context holds"):
            await answered(instance, chat.request("too long " * 2000))
        with pytest.raises(InvalidTask, match="messages"):
            await answered(instance, chat.request(None, 1, messages="hello"))
        assert (await answered(instance, chat.request(QUESTIONS[0], 2))).finish == "stop"


async def test_a_broken_model_fails_the_start_in_plain_words(chat, tmp_path):
    half = tmp_path / "half.gguf"
    half.write_bytes(MODEL.read_bytes()[:1_000_000])
    with pytest.raises(InstanceFailed, match=r"half\.gguf"):
        await chat.runtime.start(chat.spec(model=str(half)), died=lambda _: None)


async def test_texts_become_vectors():
    subject = Subject("embeddings")
    async with subject.instance(concurrency=3) as instance:
        assert instance.slots == 3
        texts = [f"sensor {number}" for number in range(20)]
        final = await answered(instance, subject.request(None, value={"texts": texts}))
        assert len(final.output) == 20
        assert {len(vector) for vector in final.output} == {instance.info["dimension"]}
        assert final.usage["input_tokens"] > 20
        one = await answered(instance, subject.request("sensor 3", 1))
        product = sum(a * b for a, b in zip(one.output[0], final.output[3], strict=True))
        assert product > 0.999
        with pytest.raises(InvalidTask, match="context holds"):
            await answered(instance, subject.request("too long " * 1000, 2))
