"""One contract over every runtime: python, llama_cpp, and xllamacpp behind the latter."""

import asyncio
import importlib.util
import os
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from capability_schemas.errors import ConfigurationError, FoamError, InvalidTask, TaskCancelled
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes.base import (
    Final,
    InstanceDied,
    InstanceFailed,
    Piece,
    Request,
    RuntimeContext,
)
from node_agent.runtimes.llama_cpp import LlamaCppRuntime
from node_agent.runtimes.python import PythonRuntime

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
WORKSHOP = ROOT / "tests" / "data" / "functions" / "workshop.py"


class Subject:
    """A runtime, and calls that every runtime can answer."""

    def __init__(self, runtime, spec, *, stream, endless, wrong):
        self.runtime = runtime
        self.spec = spec
        self.stream = stream
        self.endless = endless
        self.wrong = wrong
        self.died = []

    def endless_request(self):
        """Return a call that takes far longer than the test looks at it."""
        if self.spec.runtime != "python":
            options = {**self.spec.options, "json_output": True}
            self.spec = self.spec.model_copy(update={"options": options})
        return self.request(self.endless)

    def request(self, call, request_id="r1"):
        value, text = call
        options = self.runtime.call_options(self.spec)
        return Request(id=request_id, input=value, text=text, left_ms=20_000, options=options)

    @asynccontextmanager
    async def instance(self):
        instance = await self.runtime.start(self.spec, died=self.died.append)
        try:
            yield instance
        finally:
            await instance.close(1.0)


def _python_subject():
    return Subject(
        PythonRuntime(RuntimeContext(cancel_grace_s=5)),
        FunctionSpec(name="ticks", description="d", entry=f"{WORKSHOP}:ticks"),
        stream=({"n": 5}, None),
        endless=({"n": 10_000_000}, None),
        wrong=({"m": 1}, None),
    )


def _model_subject(engine):
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    # Forced upon the endless call: the answer fills the whole context.
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 200}
    return Subject(
        LlamaCppRuntime(RuntimeContext(cancel_grace_s=5)),
        FunctionSpec(
            name="talk",
            description="d",
            runtime="llama_cpp",
            model=str(MODEL),
            output_schema=schema,
            options={"engine": engine, "max_tokens": None},
        ),
        stream=({}, "Extract JSON: The humidity of greenhouse-7 is 48 %."),
        endless=({}, "Tell me something about pumps."),
        wrong=({}, "too long " * 2000),
    )


@pytest.fixture(
    params=[
        "python",
        pytest.param("llama_cpp", marks=pytest.mark.llm),
        pytest.param("xllamacpp", marks=pytest.mark.llm),
    ]
)
def subject(request):
    return _python_subject() if request.param == "python" else _model_subject(request.param)


async def cancel_at_each_piece(instance, request):
    async with aclosing(instance.invoke(request)) as answers:
        async for _ in answers:
            instance.cancel(request.id)


async def kill_at_first_piece(instance, request):
    async with aclosing(instance.invoke(request)) as answers:
        await anext(answers)
        os.kill(instance.pid, 9)
        async for _ in answers:
            pass


async def collect(instance, request):
    async with aclosing(instance.invoke(request)) as answers:
        return [item async for item in answers]


async def test_a_call_gives_pieces_and_then_exactly_one_final(subject):
    subject.runtime.check(subject.spec)
    async with subject.instance() as instance:
        *pieces, final = await collect(instance, subject.request(subject.stream))
        assert pieces
        assert all(isinstance(piece, Piece) for piece in pieces)
        assert isinstance(final, Final)
        assert final.output == "".join(piece.data for piece in pieces)
        assert instance.busy == 0


async def test_an_instance_serves_one_call_after_another_with_the_same_answer(subject):
    async with subject.instance() as instance:
        first = await collect(instance, subject.request(subject.stream, "a"))
        second = await collect(instance, subject.request(subject.stream, "b"))
        assert first[-1] == second[-1]
        assert instance.alive


async def test_a_call_that_cannot_be_answered_is_an_error_and_no_crash(subject):
    async with subject.instance() as instance:
        with pytest.raises(InvalidTask) as raised:
            await collect(instance, subject.request(subject.wrong, "a"))
        assert not raised.value.remote
        assert isinstance((await collect(instance, subject.request(subject.stream)))[-1], Final)


async def test_closing_the_answer_early_cancels_the_call_and_keeps_the_instance(subject):
    async with subject.instance() as instance:
        request = subject.endless_request()
        async with aclosing(instance.invoke(request)) as answers:
            assert isinstance(await anext(answers), Piece)
        async with asyncio.timeout(10):
            await instance.settled(request.id)
        assert instance.alive
        assert instance.busy == 0


async def test_a_call_cancelled_by_id_ends_as_cancelled(subject):
    async with subject.instance() as instance:
        request = subject.endless_request()
        with pytest.raises(TaskCancelled):
            await cancel_at_each_piece(instance, request)
        assert instance.alive


async def test_a_killed_instance_is_reported_and_calls_end(subject):
    async with subject.instance() as instance:
        request = subject.endless_request()
        with pytest.raises(InstanceDied) as raised:
            await kill_at_first_piece(instance, request)
        assert raised.value.status == -9
        assert raised.value.retryable
        assert not instance.alive
        assert not instance.killed
        assert subject.died == [instance]
        with pytest.raises(InstanceDied):
            await collect(instance, subject.request(subject.stream))


async def test_closing_ends_the_process_and_tells_once(subject):
    async with subject.instance() as instance:
        pid = instance.pid
        await instance.close(2.0)
        await instance.close(2.0)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert subject.died == [instance]
        assert instance.killed


async def test_an_instance_is_a_process_group_of_its_own(subject):
    async with subject.instance() as instance:
        assert os.getpgid(instance.pid) == instance.pid
        assert os.getsid(instance.pid) == instance.pid


async def test_a_specification_of_something_that_is_not_there_is_refused(subject):
    broken = subject.spec.model_copy(update={"entry": "gone.py:f", "model": "gone.gguf"})
    with pytest.raises(ConfigurationError, match="gone"):
        subject.runtime.check(broken)
    with pytest.raises(InstanceFailed, match="gone") as raised:
        await subject.runtime.start(broken, died=subject.died.append)
    assert isinstance(raised.value, FoamError)
