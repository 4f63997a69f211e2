"""One contract over every runtime, one of another distribution included."""

import asyncio
import importlib.util
import os
import signal
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from capability_schemas.errors import (
    ConfigurationError,
    ExecutionFailed,
    FoamError,
    InvalidTask,
    TaskCancelled,
)
from capability_schemas.functions import MAX_OUTPUT_BYTES, FunctionSpec
from node_agent.runtimes.base import (
    Final,
    InstanceDied,
    InstanceFailed,
    Piece,
    Request,
    RuntimeContext,
)
from node_agent.runtimes.catalogue import make_runtimes, runtime_names
from support.openai_server import MODEL, openai_server
from support.plugin import installed_plugin
from tcp_proxy import TcpProxy

FUNCTIONS = Path(__file__).parents[1] / "data" / "functions"
WORKSHOP = FUNCTIONS / "workshop.py"


@dataclass(frozen=True)
class Call:
    """What to send, and with which options of the function besides its own."""

    input: Any = field(default_factory=dict)
    text: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Subject:
    """A runtime, and calls that every runtime can answer; None where it has no such call."""

    def __init__(self, runtime, spec, *, answer, endless, wrong, failing, gone, kill=None):
        self.runtime = runtime
        self.spec = spec
        self.answer = answer
        self.endless = endless
        self.wrong = wrong
        self.failing = failing
        self.gone = spec.model_copy(update=gone)
        self.kill = kill or (lambda instance: os.kill(instance.pid, signal.SIGKILL))
        self.died = []

    def request(self, call, request_id="r1"):
        options = {**self.spec.options, **call.options}
        spec = self.spec.model_copy(update={"options": options})
        return Request(
            id=request_id,
            input=call.input,
            text=call.text,
            left_ms=20_000,
            options=self.runtime.call_options(spec),
        )

    @asynccontextmanager
    async def instance(self):
        instance = await self.runtime.start(self.spec, died=self.died.append)
        try:
            yield instance
        finally:
            await instance.close(1.0)


def spec_of(runtime, **fields):
    limits = {"output_bytes": MAX_OUTPUT_BYTES}
    made = {"name": "subject", "description": "d", "runtime": runtime, "limits": limits, **fields}
    return FunctionSpec.model_validate(made)


def the_runtime(name):
    return make_runtimes([name], RuntimeContext(cancel_grace_s=5))[name]


async def _python(stack, request):
    return Subject(
        the_runtime("python"),
        spec_of("python", entry=f"{WORKSHOP}:ticks", concurrency=3),
        answer=Call({"n": 5}),
        endless=Call({"n": 10_000_000}),
        wrong=Call({"m": 1}),
        failing=Call({"n": "five"}),
        gone={"entry": "gone.py:f"},
    )


async def _command(stack, request):
    return Subject(
        the_runtime("command"),
        spec_of("command", options={"command": ["sh", f"{FUNCTIONS}/program.sh"]}, concurrency=3),
        answer=Call({"pump": 3}),
        endless=Call({"be": "endless"}),
        wrong=Call({"please": "refuse"}),
        failing=Call({"please": "fail"}),
        gone={"options": {"command": ["/gone/program"]}},
    )


async def _wasm(stack, request):
    return Subject(
        the_runtime("wasm"),
        spec_of("wasm", entry=f"{FUNCTIONS}/program.wat", concurrency=3),
        answer=Call(1),
        endless=Call(2),
        failing=Call(3),
        wrong=Call(4),
        gone={"entry": "gone.wasm"},
    )


ENDLESS_SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 200}
"""Forced upon an answer it fills the whole context."""


def _model_calls(**forced):
    return {
        "answer": Call(text="Extract JSON: The humidity of greenhouse-7 is 48 %."),
        "endless": Call(text="Tell me something about pumps.", options=forced),
        "failing": Call(text="Tell me more.", options={**forced, "max_tokens": 3}),
    }


async def _model(stack, request):
    name = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return Subject(
        the_runtime(name),
        spec_of(name, model=str(MODEL), output_schema=ENDLESS_SCHEMA, options={"max_tokens": None}),
        **_model_calls(json_output=True),
        wrong=Call(text="too long " * 2000),
        gone={"model": "gone.gguf"},
    )


async def _embeddings(stack, request):
    return Subject(
        the_runtime("embeddings"),
        spec_of("embeddings", model=str(MODEL)),
        answer=Call(text="The pump is loud."),
        endless=None,
        wrong=Call(text="too long " * 2000),
        failing=None,
        gone={"model": "gone.gguf"},
    )


async def _openai(stack, request):
    server = request.getfixturevalue("llama_server")
    port = urlsplit(server.base_url).port
    proxy = await stack.enter_async_context(TcpProxy(host="127.0.0.1", port=port))
    return Subject(
        the_runtime("openai"),
        spec_of(
            "openai",
            model=server.model,
            output_schema=ENDLESS_SCHEMA,
            options={"base_url": f"http://127.0.0.1:{proxy.port}/v1"},
        ),
        **_model_calls(json_output=True, json_form="json_object"),
        wrong=Call(text=" "),
        gone={"options": {"base_url": "http://gone.invalid/v1"}},
        kill=lambda _: proxy.refuse(),
    )


async def _plugin(stack, request):
    stack.enter_context(installed_plugin(request.getfixturevalue("tmp_path")))
    return Subject(
        the_runtime("echo"),
        spec_of("echo", concurrency=3),
        answer=Call(text="how loud is it"),
        endless=Call(text="and so on", options={"times": 10_000_000}),
        wrong=Call(text=""),
        failing=Call(text="\a"),
        gone={"options": {"gone": 1}},
        kill=lambda instance: instance.lost("the plug was pulled"),
    )


MAKE = {
    "python": _python,
    "command": _command,
    "wasm": _wasm,
    "llama_cpp": _model,
    "xllamacpp": _model,
    "embeddings": _embeddings,
    "openai": _openai,
    "echo": _plugin,
}
MODELS = ("llama_cpp", "xllamacpp", "embeddings", "openai")


@pytest.fixture(scope="session")
def llama_server():
    with openai_server() as server:
        yield server


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.llm if name in MODELS else ()) for name in MAKE]
)
async def subject(request):
    async with AsyncExitStack() as stack:
        yield await MAKE[request.param](stack, request)


@pytest.fixture
def endless(subject):
    """A subject with a call that takes far longer than the test looks at it."""
    if subject.endless is None:
        pytest.skip(f"no call of {subject.spec.runtime} takes long")
    return subject


async def collect(instance, request):
    async with aclosing(instance.invoke(request)) as answers:
        return [item async for item in answers]


async def cancel_at_each_piece(instance, request):
    async with aclosing(instance.invoke(request)) as answers:
        async for _ in answers:
            instance.cancel(request.id)


async def kill_at_first_piece(subject, instance, request):
    async with aclosing(instance.invoke(request)) as answers:
        await anext(answers)
        subject.kill(instance)
        async for _ in answers:
            pass


def test_every_runtime_there_is_has_its_subject():
    assert set(runtime_names()) <= MAKE.keys() | NEED_A_MESH


NEED_A_MESH = {"agent", "mcp"}
"""They call other functions, tools and servers: what they do is tested with those."""


class TestRuntime:
    async def test_a_call_gives_pieces_and_then_exactly_one_final(self, subject):
        subject.runtime.check(subject.spec)
        async with subject.instance() as instance:
            *pieces, final = await collect(instance, subject.request(subject.answer))
            assert all(isinstance(piece, Piece) for piece in pieces)
            assert isinstance(final, Final)
            assert final.output
            if isinstance(final.output, str):
                assert final.output == "".join(piece.data for piece in pieces)
            assert instance.busy == 0

    async def test_it_says_how_much_it_takes_and_who_it_is(self, subject):
        async with subject.instance() as instance:
            assert instance.info["slots"] == instance.slots >= 1
            assert instance.alive
            assert not instance.killed
            assert instance.busy == 0
            assert subject.runtime.name == subject.spec.runtime

    async def test_an_instance_serves_one_call_after_another_with_the_same_answer(self, subject):
        async with subject.instance() as instance:
            first = await collect(instance, subject.request(subject.answer, "a"))
            second = await collect(instance, subject.request(subject.answer, "b"))
            assert first[-1].output == second[-1].output
            assert instance.alive

    async def test_a_call_that_cannot_be_answered_is_an_error_and_no_crash(self, subject):
        async with subject.instance() as instance:
            with pytest.raises(InvalidTask) as raised:
                await collect(instance, subject.request(subject.wrong, "a"))
            assert not raised.value.remote
            again = await collect(instance, subject.request(subject.answer))
            assert isinstance(again[-1], Final)

    async def test_a_failure_is_the_calls_own(self, subject):
        if subject.failing is None:
            pytest.skip(f"{subject.spec.runtime} fails on nothing that it accepts")
        async with subject.instance() as instance:
            with pytest.raises(ExecutionFailed) as raised:
                await collect(instance, subject.request(subject.failing, "a"))
            assert raised.value.message
            again = await collect(instance, subject.request(subject.answer))
            assert isinstance(again[-1], Final)
            assert subject.died == []

    async def test_as_many_calls_run_at_a_time_as_it_says(self, endless):
        async with endless.instance() as instance, AsyncExitStack() as stack:
            ids = [f"r{number}" for number in range(instance.slots)]
            for request_id in ids:
                answers = instance.invoke(endless.request(endless.endless, request_id))
                await stack.enter_async_context(aclosing(answers))
                assert isinstance(await anext(answers), Piece)
            assert instance.busy == instance.slots
            for request_id in ids:
                instance.cancel(request_id)
            async with asyncio.timeout(15):
                for request_id in ids:
                    await instance.settled(request_id)
            assert instance.alive
            assert instance.busy == 0

    async def test_an_answer_that_nobody_reads_holds_up_no_other(self, endless):
        async with endless.instance() as instance:
            if instance.slots == 1:
                pytest.skip("it takes one call at a time")
            unread = endless.request(endless.endless, "unread")
            async with aclosing(instance.invoke(unread)) as answers:
                assert isinstance(await anext(answers), Piece)
                for number in range(5):
                    read = await collect(instance, endless.request(endless.answer, f"r{number}"))
                    assert isinstance(read[-1], Final)
                instance.cancel("unread")
                async with asyncio.timeout(15):
                    await instance.settled("unread")
            assert instance.alive

    async def test_closing_the_answer_early_cancels_the_call_and_keeps_the_instance(self, endless):
        async with endless.instance() as instance:
            request = endless.request(endless.endless)
            async with aclosing(instance.invoke(request)) as answers:
                assert isinstance(await anext(answers), Piece)
            async with asyncio.timeout(10):
                await instance.settled(request.id)
            assert instance.alive
            assert instance.busy == 0
            again = await collect(instance, endless.request(endless.answer, "again"))
            assert isinstance(again[-1], Final)

    async def test_a_call_cancelled_by_id_ends_as_cancelled(self, endless):
        async with endless.instance() as instance:
            with pytest.raises(TaskCancelled):
                await cancel_at_each_piece(instance, endless.request(endless.endless))
            assert instance.alive
            instance.cancel("nobody")
            await instance.settled("nobody")

    async def test_an_instance_that_dies_is_reported_once_and_takes_no_more(self, endless):
        async with endless.instance() as instance:
            if endless.spec.runtime == "echo":
                endless.kill(instance)
            else:
                with pytest.raises(InstanceDied) as raised:
                    await kill_at_first_piece(endless, instance, endless.request(endless.endless))
                assert raised.value.status == (-signal.SIGKILL if instance.pid else None)
                assert raised.value.retryable
            assert not instance.alive
            assert not instance.killed
            assert endless.died == [instance]
            with pytest.raises(InstanceDied):
                await collect(instance, endless.request(endless.answer))
        assert endless.died == [instance]

    async def test_closing_ends_it_and_tells_once(self, subject):
        async with subject.instance() as instance:
            pid = instance.pid
            await instance.close(2.0)
            await instance.close(2.0)
            if pid:
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)
            assert subject.died == [instance]
            assert instance.killed
            assert not instance.alive

    async def test_closing_ends_the_calls_under_way(self, endless):
        async with endless.instance() as instance:
            request = endless.request(endless.endless)
            async with aclosing(instance.invoke(request)) as answers:
                await anext(answers)
                await instance.close(0)
                with pytest.raises(InstanceDied):
                    async for _ in answers:
                        pass
            assert instance.busy == 0

    async def test_a_process_is_a_group_of_its_own(self, subject):
        async with subject.instance() as instance:
            if instance.pid == 0:
                pytest.skip("it has no process")
            assert os.getpgid(instance.pid) == instance.pid
            assert os.getsid(instance.pid) == instance.pid

    async def test_what_differs_in_words_only_may_share_instances_what_runs_differently_not(
        self, subject
    ):
        group = subject.runtime.group
        assert group(subject.spec) == group(subject.spec.model_copy())
        if subject.spec.runtime != "echo":
            assert group(subject.spec) != group(subject.gone)
        assert subject.runtime.call_options(subject.spec) == subject.runtime.call_options(
            subject.spec.model_copy()
        )

    async def test_a_specification_of_something_that_is_not_there_is_refused(self, subject):
        if subject.spec.runtime == "openai":  # nobody asks a server before it is needed
            with pytest.raises(InstanceFailed, match="gone"):
                await subject.runtime.start(subject.gone, died=subject.died.append)
            return
        with pytest.raises(ConfigurationError, match=r"gone|times"):
            subject.runtime.check(subject.gone)
        if subject.spec.runtime == "echo":
            return
        with pytest.raises(InstanceFailed, match="gone") as raised:
            await subject.runtime.start(subject.gone, died=subject.died.append)
        assert isinstance(raised.value, FoamError)
        assert subject.died == [] or not subject.died[0].alive
