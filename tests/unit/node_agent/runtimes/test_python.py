"""The python runtime: kinds of functions, bad functions, limits."""

import asyncio
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from capability_schemas.errors import ExecutionFailed, Overloaded
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes.base import Final, InstanceDied, Piece, Request, RuntimeContext
from node_agent.runtimes.plumbing import LogTap
from node_agent.runtimes.python import PythonRuntime

WORKSHOP = Path(__file__).parents[3] / "data" / "functions" / "workshop.py"
SURENESS = WORKSHOP.with_name("sureness.py")


@asynccontextmanager
async def running(name, *, module=WORKSHOP, grace_s=5.0, **fields):
    runtime = PythonRuntime(RuntimeContext(cancel_grace_s=grace_s))
    spec = FunctionSpec(name=name, description="d", entry=f"{module}:{name}", **fields)
    instance = await runtime.start(spec, died=lambda _: None)
    try:
        yield instance
    finally:
        await instance.close(1.0)


async def call(instance, value=None, text=None, request_id="r"):
    request = Request(id=request_id, input=value or {}, text=text, left_ms=10_000)
    async with aclosing(instance.invoke(request)) as answers:
        return [item async for item in answers]


@pytest.mark.parametrize(
    ("name", "value", "text", "pieces", "output"),
    [
        ("add", {"a": 1}, None, [], 3.0),
        ("words", {}, "to be", ["to ", "be "], "to be "),
        ("squares", {"n": 3}, None, [0, 1, 4], {"sum": 5}),
        ("ticks", {"n": 2}, None, ["0 ", "1 "], "0 1 "),
        ("describe", {"reading": {"device": "p", "value": 2}}, None, [], "p=2 in time: True"),
    ],
)
async def test_every_kind_of_function_runs(name, value, text, pieces, output):
    async with running(name) as instance:
        answers = await call(instance, value, text)
    assert answers == [*map(Piece, pieces), Final(output=output)]


@pytest.mark.parametrize(
    ("name", "value", "pieces", "output"),
    [
        ("judge", {"text": "it"}, [], "judged it"),
        ("aloud", {}, ["well, ", "perhaps"], "well, perhaps"),
        ("aloud_async", {}, ["well, ", "perhaps"], "well, perhaps"),
    ],
)
async def test_a_function_may_say_how_sure_it_is(name, value, pieces, output):
    async with running(name, module=SURENESS) as instance:
        answers = await call(instance, {**value, "sure": 0.25})
    assert answers == [*map(Piece, pieces), Final(output=output, confidence=0.25)]


@pytest.mark.parametrize(
    ("name", "said"), [("chatter", "more after its Answer"), ("boast", "use 0 to 1")]
)
async def test_an_answer_that_is_none_fails_its_call_only(name, said):
    async with running(name, module=SURENESS) as instance:
        with pytest.raises(ExecutionFailed, match=said):
            await call(instance)
        assert instance.alive


async def test_async_functions_share_one_process(tmp_path):
    async with running("meet", concurrency=3) as instance:
        assert instance.slots == 3
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            calls = [
                group.create_task(
                    call(
                        instance,
                        {"name": name, "folder": str(tmp_path), "parties": 3},
                        request_id=name,
                    )
                )
                for name in ("a", "b", "c")
            ]
    assert all(done.result()[-1].output == ["a", "b", "c"] for done in calls)


async def test_an_exception_is_an_error_without_a_traceback():
    async with running("fail") as instance:
        with pytest.raises(ExecutionFailed) as raised:
            await call(instance, {"reason": "no oil"})
        assert raised.value.message == "ValueError: no oil"
        assert raised.value.detail == {"type": "ValueError"}
        assert instance.alive


@pytest.mark.parametrize(("name", "said"), [("leave", "SystemExit"), ("unprintable", "not JSON")])
async def test_exit_and_output_that_is_no_json_end_the_call_only(name, said):
    async with running(name) as instance:
        with pytest.raises(ExecutionFailed, match=said):
            await call(instance)
        assert instance.alive


async def test_a_death_in_the_middle_comes_after_what_was_said():
    async with running("vanish") as instance:
        request = Request(id="r", input={"after": 2}, text=None)
        got: list[str] = []
        with pytest.raises(InstanceDied, match="SIGKILL"):
            await _gather(instance, request, got)
        assert got == ["0 ", "1 "]


async def test_prints_go_to_the_log_and_never_into_the_frames(caplog):
    caplog.set_level("INFO")
    async with running("shout") as instance:
        assert (await call(instance, text="hello"))[-1].output == "done"
    lines = [record for record in caplog.messages if "instance.output'" in record]
    assert 0 < len(lines) <= 400
    assert any("instance.output_dropped" in record for record in caplog.messages)


async def test_a_cancelled_function_that_does_not_end_is_killed(tmp_path, eventually):
    marker = tmp_path / "pid"
    async with running("stubborn", grace_s=0.05) as instance:
        request = Request(id="r", input={"marker": str(marker)}, text=None)
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            answer = group.create_task(_swallow(instance, request))
            await eventually(marker.exists)
            answer.cancel()
            await instance.settled("r")
        assert instance.killed
        assert not instance.alive


async def test_a_function_that_heeds_the_cancel_keeps_its_process(tmp_path, eventually):
    marker = tmp_path / "pid"
    async with running("polite") as instance:
        request = Request(id="r", input={"marker": str(marker)}, text=None)
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            answer = group.create_task(_swallow(instance, request))
            await eventually(marker.exists)
            answer.cancel()
            await instance.settled("r")
        assert instance.alive


async def _gather(instance, request, got):
    async with aclosing(instance.invoke(request)) as answers:
        async for item in answers:
            got += [item.data]


async def _swallow(instance, request):
    async with aclosing(instance.invoke(request)) as answers:
        async for _ in answers:
            pass


async def test_what_a_function_started_does_not_outlive_it(tmp_path, eventually):
    marker = tmp_path / "pid"
    async with running("parent") as instance:
        await call(instance, {"marker": str(marker)})
    orphan = int(marker.read_text())
    await eventually(lambda: not _lives(orphan))


def _lives(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


async def test_the_memory_limit_ends_the_call_and_not_the_node():
    limits = {"memory_bytes": 500_000_000}
    async with running("greedy", limits=limits) as instance:
        assert (await call(instance, {"megabytes": 10}))[-1].output == 10_000_000
        with pytest.raises(ExecutionFailed, match="MemoryError"):
            await call(instance, {"megabytes": 2000})


async def test_a_slow_reader_holds_up_a_fast_generator():
    async with running("flood") as instance:
        request = Request(id="r", input={"size": 100_000}, text=None)
        async with aclosing(instance.invoke(request)) as answers:
            await anext(answers)
            for _ in range(100):
                await asyncio.sleep(0)
            waiting = len(instance._calls["r"].frames)
            assert waiting <= 300
        async with asyncio.timeout(10):
            await instance.settled("r")


@asynccontextmanager
async def one_unread(size):
    """An instance with a call whose reader took one piece, and the child waits for it."""
    async with running("torrent", concurrency=2) as instance:
        unread = Request(id="unread", input={"size": size}, text=None, left_ms=60_000)
        async with aclosing(instance.invoke(unread)) as answers:
            await anext(answers)
            while len(instance._calls["unread"].frames) < 256:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.01)
            yield instance, answers


async def test_an_answer_that_nobody_reads_holds_up_no_other_call():
    async with one_unread(size=1) as (instance, _):
        assert [item.data for item in (await call(instance, {"size": 3, "n": 2}))[:-1]] == [
            "xxx"
        ] * 2
        assert instance.busy == 1


async def test_a_cancelled_call_ends_though_nobody_reads_its_answer():
    async with one_unread(size=1) as (instance, _):
        instance.cancel("unread")
        await instance.settled("unread")
        assert instance.alive


async def test_an_answer_that_nobody_reads_fails_before_it_fills_the_memory():
    async with one_unread(size=100_000) as (instance, answers):
        another = asyncio.create_task(call(instance, {"size": 1, "n": 1_000_000}))
        await instance.settled("unread")
        with pytest.raises(Overloaded, match="not read"):
            await anext(answers)
        another.cancel()
        assert instance.alive
    await asyncio.wait([another])


async def test_an_instance_ends_when_its_agent_is_gone(eventually):
    async with running("add") as instance:
        pid = instance.pid
        instance._protocol.close()
        await eventually(lambda: not _lives(pid))


class Lines:
    def __init__(self):
        self.lines = []
        self.dropped = 0

    def info(self, _event, *, line, **_):
        self.lines.append(line)

    def warning(self, _event, *, lines, **_):
        self.dropped += lines


def test_a_log_tap_joins_cuts_and_counts():
    log: Any = Lines()
    tap = LogTap(log, stream="stdout", line_limit=10, window_limit=3)
    tap.feed(b"one\ntw", now_s=0.0)
    tap.feed(b"o\n" + b"x" * 30 + b"\n\n", now_s=0.1)
    tap.feed(b"four\nfive\n", now_s=0.2)
    tap.feed(b"six", now_s=1.0)
    tap.end(now_s=1.0)
    assert log.lines == ["one", "two", "x" * 10, "six"]
    assert log.dropped == 2
    assert list(tap.tail) == ["two", "x" * 10, "four", "five", "six"]
