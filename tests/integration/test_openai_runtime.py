"""Servers of the OpenAI API as functions, and everything they may do wrong."""

import asyncio
import json
import logging
import socket
from contextlib import aclosing, suppress

import pytest

from capability_schemas.errors import (
    ConfigurationError,
    ExecutionFailed,
    InvalidTask,
    Overloaded,
    TaskCancelled,
)
from node_agent.runtimes.base import (
    Final,
    Instance,
    InstanceDied,
    InstanceFailed,
    Piece,
    RuntimeContext,
)
from node_agent.runtimes.openai import OpenAIRuntime
from node_agent.runtimes.openai_stream import Garbage
from support.calls import answer_of, collect, request, running, spec_of
from support.scripted_openai import Answer, ScriptedOpenAI

RUNTIME = OpenAIRuntime(RuntimeContext())
OK = Answer(text=["fi", "ne"])


def talk(server, *, concurrency=1, output_schema=None, **options):
    url = server if isinstance(server, str) else server.base_url
    return spec_of(
        "openai",
        model="scripted",
        concurrency=concurrency,
        output_schema=output_schema,
        options={"base_url": url, **options},
    )


async def failure_of(*answers, kind, died=0, **options):
    """Return how a call fails, after which the instance must still answer unless it died."""
    ends: list[Instance] = []
    async with ScriptedOpenAI(answers=[*answers, OK]) as server:
        spec = talk(server, **options)
        async with running(RUNTIME, spec, ends) as instance:
            with pytest.raises(kind) as raised:
                await collect(instance, request(RUNTIME, spec, text="well?"))
            assert len(ends) == died
            assert instance.alive is not bool(died)
            if not died:
                again = await collect(instance, request(RUNTIME, spec, text="and now?"))
                assert again[-1].output == "fine"
        assert len(ends) == 1
        return raised.value


async def test_an_answer_comes_in_pieces_with_its_usage():
    async with ScriptedOpenAI(answers=[Answer(text=["a", "b"], logprobs=[-0.1, -2.0])]) as server:
        *pieces, final = await answer_of(RUNTIME, talk(server, confidence=True), text="well?")
    assert pieces == [Piece("a"), Piece("b")]
    assert final.output == "ab"
    assert final.finish == "stop"
    assert final.usage == {"input_tokens": 7, "output_tokens": 3, "cached_tokens": 0}
    assert final.confidence == pytest.approx(0.1353, abs=1e-4)
    assert final.timing["prefill_ms"] > 0
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "well?"}]


async def test_tools_are_called():
    calls = [("read_sensor", {"id": "pump-3"}), ("now", {})]
    tools = [{"type": "function", "function": {"name": "read_sensor"}}]
    async with ScriptedOpenAI(answers=[Answer(tool_calls=calls)]) as server:
        *pieces, final = await answer_of(RUNTIME, talk(server), text="how is it?", tools=tools)
    assert pieces == []
    assert final.finish == "tool_calls"
    assert final.output == {
        "content": None,
        "tool_calls": [
            {"id": "call_0", "name": "read_sensor", "arguments": {"id": "pump-3"}},
            {"id": "call_1", "name": "now", "arguments": {}},
        ],
    }
    assert server.bodies[0]["tools"] == tools


async def test_json_is_asked_for_and_read():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    async with ScriptedOpenAI(answers=[Answer(text='{"n": 3}')]) as server:
        spec = talk(server, output_schema=schema, json_output=True)
        final = (await answer_of(RUNTIME, spec, text="how many?"))[-1]
    assert final.output == {"n": 3}
    assert server.bodies[0]["response_format"]["json_schema"]["schema"] == schema


async def test_texts_become_vectors():
    script = [Answer(embeddings=[[1.0, 2.0]]), Answer(embeddings=[[1.0], [2.0]])]
    async with ScriptedOpenAI(answers=script) as server:
        spec = talk(server, embeddings=True)
        async with running(RUNTIME, spec) as instance:
            one = await collect(instance, request(RUNTIME, spec, text="pump"))
            two = await collect(instance, request(RUNTIME, spec, {"texts": ["a", "b"]}))
    assert [item.output for item in one + two] == [[[1.0, 2.0]], [[1.0], [2.0]]]
    assert server.bodies[0] == {"model": "scripted", "input": ["pump"]}


async def test_a_key_goes_to_the_server_and_nowhere_else(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "key"
    path.write_text("sk-very-secret\n")
    path.chmod(0o600)
    async with ScriptedOpenAI(
        answers=[OK, Answer(status=401, message="bad sk-very-secret")]
    ) as server:
        spec = talk(server, api_key_file=str(path))
        async with running(RUNTIME, spec) as instance:
            await collect(instance, request(RUNTIME, spec, text="hi"))
            with pytest.raises(ExecutionFailed) as raised:
                await collect(instance, request(RUNTIME, spec, text="hi"))
            shown = f"{instance!r} {instance.info} {RUNTIME.group(spec)} {raised.value.detail}"
    assert server.requests[0][1]["authorization"] == "Bearer sk-very-secret"
    assert "secret" not in shown + str(raised.value) + caplog.text


async def test_a_key_that_is_gone_keeps_it_from_starting(tmp_path):
    async with ScriptedOpenAI(answers=[]) as server:
        spec = talk(server, api_key_file=str(tmp_path / "gone"))
        with pytest.raises(ConfigurationError, match="gone"):
            RUNTIME.check(spec)
        with pytest.raises(InstanceFailed, match="gone"):
            await RUNTIME.start(spec, died=lambda _: None)


async def test_a_server_that_is_not_there_is_named():
    with socket.socket() as taken:  # bound and not listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        ends: list[Instance] = []
        with pytest.raises(InstanceFailed, match=f"answers at {url}.*is it running") as raised:
            await RUNTIME.start(talk(url), died=ends.append)
        assert raised.value.retryable
        assert ends == []


async def test_a_list_of_models_without_end_is_not_read_to_its_end():
    sent = 0

    async def list_on(reader, writer):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{"data": [')
        block = b'{"id": "m"}, ' * 5000
        with suppress(ConnectionError):
            while True:
                writer.write(block)
                await writer.drain()
                sent += len(block)
        writer.close()

    server = await asyncio.start_server(list_on, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with running(RUNTIME, talk(url, connect_s=60)) as instance:
            assert instance.info["models"] == []
    assert 4 * 1024 * 1024 < sent < 64 * 1024 * 1024


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (Answer(status=400, message="too long for me"), InvalidTask, "400: too long for me"),
        (Answer(status=422, message="odd"), InvalidTask, "422: odd"),
        (Answer(status=404, message="no such model"), ExecutionFailed, "404: no such model"),
        (Answer(status=500, message="ouch"), ExecutionFailed, "500: ouch"),
        (Answer(raw=b"<html>hello</html>\n"), Garbage, "no event stream"),
        (Answer(raw=b"data: {oops\n\n"), Garbage, "not JSON"),
        (Answer(raw=b"\x00\xff\x00\xff" * 1000 + b"\n"), Garbage, "no event stream"),
        (Answer(raw=b'data: {"choices": [4]}\n\n'), Garbage, "no chat completion chunk"),
        (Answer(raw=b'data: {"error": {"message": "oom"}}\n\n'), ExecutionFailed, "says: oom"),
        (Answer(raw=b""), Garbage, "without saying why"),
    ],
)
async def test_what_a_server_does_wrong_is_told(answer, kind, message):
    error = await failure_of(answer, kind=kind)
    assert message in error.message
    assert error.retryable is (kind is not InvalidTask and answer.status != 404)


@pytest.mark.parametrize(
    ("status", "headers", "after_ms"),
    [
        (429, {"Retry-After": "2.5"}, 2500),
        (429, {"Retry-After": "Fri, 01 Jan 2027 00:00:00 GMT"}, 1000),
        (503, {}, 1000),
    ],
)
async def test_a_busy_server_says_when_to_come_back(status, headers, after_ms):
    answer = Answer(status=status, message="busy", headers=headers)
    error = await failure_of(answer, kind=Overloaded)
    assert error.retry_after_ms == after_ms
    assert "busy" in error.message


@pytest.mark.parametrize(
    ("answer", "limits", "message"),
    [
        (Answer(hang_first=True), {"first_s": 0.2}, "said nothing for 0.2 s"),
        (Answer(text=["a"], then="hang"), {"between_s": 0.2}, "said nothing for 0.2 s"),
    ],
)
async def test_a_server_that_hangs_is_given_up_on(answer, limits, message):
    error = await failure_of(answer, kind=InstanceDied, **limits)
    assert message in error.message
    assert error.retryable


async def test_a_whole_answer_without_its_last_word_counts():
    said = {"choices": [{"delta": {"content": "fine"}, "finish_reason": "stop"}]}
    raw = f"data: {json.dumps(said)}\n\n".encode()
    async with ScriptedOpenAI(answers=[Answer(raw=raw, then="hang")]) as server:
        spec = talk(server, between_s=0.2)
        async with running(RUNTIME, spec) as instance:
            found = await collect(instance, request(RUNTIME, spec, text="well?"))
    assert found[-1].output == "fine"


async def test_a_server_that_dies_in_the_middle_ends_the_instance():
    error = await failure_of(Answer(text=["a"], then="die"), kind=InstanceDied, died=1)
    assert error.retryable


async def test_a_new_instance_works_once_the_server_is_back():
    async with ScriptedOpenAI(answers=[Answer(text=["a"], then="die"), OK]) as server:
        spec = talk(server)
        async with running(RUNTIME, spec) as instance:
            with pytest.raises(InstanceDied):
                await collect(instance, request(RUNTIME, spec, text="well?"))
        assert (await answer_of(RUNTIME, spec, text="again"))[-1].output == "fine"


async def test_a_cancelled_call_closes_its_connection(eventually):
    async with ScriptedOpenAI(answers=[Answer(text=["a"], then="hang"), OK]) as server:
        spec = talk(server)
        async with running(RUNTIME, spec) as instance:
            answers = instance.invoke(request(RUNTIME, spec, text="well?"))
            async with aclosing(answers):
                assert await anext(answers) == Piece("a")
                instance.cancel("r1")
                with pytest.raises(TaskCancelled):
                    await anext(answers)
            await eventually(lambda: server.hung_up == 1)
            assert instance.busy == 0
            assert (await collect(instance, request(RUNTIME, spec, text="x")))[-1].output == "fine"


async def test_one_connection_serves_one_call_after_another():
    async with ScriptedOpenAI(answers=[OK, OK, Answer(status=400), OK]) as server:
        spec = talk(server)
        async with running(RUNTIME, spec) as instance:
            for _ in range(2):
                await collect(instance, request(RUNTIME, spec, text="well?"))
            with pytest.raises(InvalidTask):
                await collect(instance, request(RUNTIME, spec, text="well?"))
            await collect(instance, request(RUNTIME, spec, text="well?"))
        assert server.accepted == 1


async def test_calls_share_an_instance_side_by_side():
    meeting = asyncio.Event()
    waiting = []

    def answer(body):
        waiting.append(body["messages"][0]["content"])
        if len(waiting) == 3:
            meeting.set()
        return Answer(text=["a"], then="hang")

    async with ScriptedOpenAI(answers=answer) as server:
        spec = talk(server, concurrency=3)
        async with running(RUNTIME, spec) as instance, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    collect(instance, request(RUNTIME, spec, text=name, request_id=name))
                )
                for name in ("a", "b", "c")
            ]
            async with asyncio.timeout(15):
                await meeting.wait()
            assert instance.busy == instance.slots == 3
            for task in tasks:
                task.cancel()
        assert sorted(waiting) == ["a", "b", "c"]


async def test_a_slow_reader_holds_the_server_back_and_loses_nothing():
    words = [f"{number} " for number in range(1000)]
    async with ScriptedOpenAI(answers=[Answer(text=words)]) as server:
        spec = talk(server)
        async with running(RUNTIME, spec) as instance:
            answers = instance.invoke(request(RUNTIME, spec, text="count"))
            got = []
            async with aclosing(answers):
                async for item in answers:
                    got.append(item)
                    await asyncio.sleep(0)
    assert isinstance(got[-1], Final)
    assert got[-1].output == "".join(words)
