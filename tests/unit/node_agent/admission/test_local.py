"""Functions called from inside their node."""

import asyncio
import contextlib

import pytest

from capability_schemas.errors import (
    DeadlineExceeded,
    ExecutionFailed,
    InvalidTask,
    NotFound,
    Overloaded,
    PolicyDenied,
    TooLarge,
)
from capability_schemas.functions import FunctionSpec
from capability_schemas.task import TaskPolicy
from node_agent.admission.calls import CALLER, Caller, CallGraph
from node_agent.admission.control import Admission
from node_agent.admission.forecast import Work
from node_agent.admission.local import NodeFunctions
from node_agent.admission.queue import AdmissionQueue, Entry
from node_agent.pool.pool import InstancePool
from node_agent.runtimes.base import Final, InstanceDied, Piece, Request

pytestmark = pytest.mark.usefixtures("_quiet_logs")


class Instance:
    """Runs what the test says, in the loop."""

    pid = 0
    alive = True
    killed = False

    def __init__(self, runtime, slots):
        self.slots = slots
        self.busy = 0
        self.info = {"slots": slots}
        self._runtime = runtime

    async def invoke(self, request):
        self._runtime.requests.append(request)
        self.busy += 1
        try:
            async with contextlib.aclosing(self._runtime.work(request)) as answers:
                async for answer in answers:
                    yield answer
        finally:
            self.busy -= 1

    async def settled(self, _request_id):
        pass

    async def close(self, _grace_s):
        pass


class Runtime:
    name = "fake"

    def __init__(self):
        self.requests = []
        self.work = self.echo

    async def echo(self, request):
        yield Piece("a piece")
        yield Final(output=request.input)

    def group(self, spec):
        return spec.name

    def call_options(self, _spec):
        return {"template": "{text}"}

    async def start(self, spec, *, died):
        return Instance(self, spec.concurrency)


def make_runtime():
    return Runtime()


class Node:
    def __init__(self, *functions):
        clock = asyncio.get_running_loop().time
        self.runtime = make_runtime()
        self.queue = AdmissionQueue(limit=1)
        self.pool = InstancePool(runtimes={"fake": self.runtime}, resident=lambda _pid: None)
        self.admission = admission = Admission(
            queue=self.queue, pool=self.pool, clock=lambda: round(clock() * 1000)
        )
        self.local = NodeFunctions(
            admission=admission,
            queue=self.queue,
            pool=self.pool,
            runtimes={"fake": self.runtime},
            clock=lambda: round(clock() * 1000),
        )
        admission.configure({one.name: one for one in functions}, edited=set())

    async def ask(self, name, value=None, **fields):
        request = Request(id="r", input=value, **{"text": None, **fields})
        return [answer async for answer in self.local.invoke(name, request)]


def spec(name, **fields):
    return FunctionSpec(name=name, description="d", runtime="fake", **fields)


WORDY = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
}


@pytest.fixture
async def node():
    made = Node(
        spec("echo", input_schema=WORDY),
        spec("small", limits={"output_bytes": 5}),
        spec("brief", limits={"timeout_ms": 500}),
        spec("outer"),
        spec("other"),
        spec("pair", concurrency=2),
        spec("outside", policy={"external": True}),
    )
    async with made.pool:
        yield made


async def test_a_call_yields_pieces_and_a_final(node):
    answers = await node.ask("echo", text="hello")
    assert answers == [Piece("a piece"), Final(output={"text": "hello"})]
    (request,) = node.runtime.requests
    assert request.options == {"template": "{text}"}
    assert request.input == {"text": "hello"}
    assert (node.queue.running, node.queue.waiting) == (0, 0)


async def test_options_of_the_call_add_to_those_of_the_function(node):
    messages = [{"role": "user", "content": "x"}]
    await node.ask("echo", options={"messages": messages})  # in place of the input
    assert node.runtime.requests[0].options == {"template": "{text}", "messages": messages}


async def test_what_must_stay_here_is_not_handed_outside(node):
    with pytest.raises(PolicyDenied, match="outside"):
        await node.ask("outside", text="x", policy=TaskPolicy(local_only=True))
    await node.ask("outside", text="x", policy=TaskPolicy(data="private"))
    assert len(node.runtime.requests) == 1


async def test_an_unknown_function_and_a_wrong_input_are_named(node):
    with pytest.raises(NotFound, match="'nope'; it has brief, echo, other, outer, outside, pair"):
        await node.ask("nope")
    with pytest.raises(InvalidTask, match="text"):
        await node.ask("echo", {"text": 5})
    assert node.runtime.requests == []


async def test_an_output_too_large_ends_the_call(node):
    with pytest.raises(TooLarge):
        await node.ask("small", "short")
    assert node.queue.running == 0


async def test_a_call_ends_with_its_time(node):
    async def hang(_request):
        await asyncio.Event().wait()
        yield Final(output=None)

    node.runtime.work = hang
    with pytest.raises(DeadlineExceeded, match="brief did not end"):
        await node.ask("brief")
    with pytest.raises(DeadlineExceeded):
        await node.ask("outer", left_ms=20)
    assert node.queue.running == 0
    forecast = node.admission.forecast
    assert forecast.predict("brief", Work(input_bytes=10), now=0).run_ms >= 1


async def test_a_call_without_a_final_is_a_failure(node):
    async def cut(_request):
        yield Piece("x")

    node.runtime.work = cut
    with pytest.raises(InstanceDied):
        await node.ask("outer")
    assert node.queue.running == 0


async def test_calls_wait_for_their_turn_and_beyond_the_limit_are_refused(node, eventually):
    gate = asyncio.Event()

    async def wait(request):
        await gate.wait()
        yield Final(output=request.input)

    node.runtime.work = wait
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(node.ask("outer", 1))
        await eventually(lambda: node.queue.running == 1)
        second = tasks.create_task(node.ask("outer", 2))
        await eventually(lambda: node.queue.waiting == 1)
        with pytest.raises(Overloaded):
            await node.ask("outer", 3)
        gate.set()
    assert [task.result()[-1].output for task in (first, second)] == [1, 2]


async def test_closing_the_iterator_cancels_the_call(node):
    ended = asyncio.Event()

    async def stream(_request):
        try:
            while True:
                yield Piece("x")
        finally:
            ended.set()

    node.runtime.work = stream
    request = Request(id="r", input=None, text=None)
    async with contextlib.aclosing(node.local.invoke("outer", request)) as answers:
        assert await anext(answers) == Piece("x")
    assert ended.is_set()
    assert node.queue.running == 0


async def test_a_waiting_call_that_is_cancelled_leaves_the_queue(node, eventually):
    gate = asyncio.Event()

    async def wait(_request):
        await gate.wait()
        yield Final(output=None)

    node.runtime.work = wait
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(node.ask("outer"))
        await eventually(lambda: node.queue.running == 1)
        waiting = tasks.create_task(node.ask("outer"))
        await eventually(lambda: node.queue.waiting == 1)
        waiting.cancel()
        await eventually(lambda: node.queue.waiting == 0)
        gate.set()
    assert (node.queue.running, node.queue.waiting) == (0, 0)


def calling(node, plan):
    """Have functions call others: ``plan`` maps a function's input to the call it makes."""

    async def work(request):
        step = plan.get(request.input)
        if step is not None:
            yield (await node.ask(*step))[-1]
        else:
            yield Final(output=CALLER.get())

    return work


async def test_a_nested_call_inherits_what_its_caller_may(node):
    node.runtime.work = calling(node, {1: ("pair", 2)})
    final = (await node.ask("outer", 1, left_ms=5000, session="s"))[-1]
    outer, inner = node.runtime.requests
    assert inner.session == outer.session == "s"
    assert inner.left_ms <= 5000
    assert final.output.depth == 1
    assert CALLER.get() is None


async def test_a_function_that_needs_its_own_place_is_refused_not_left_waiting(node):
    node.runtime.work = calling(node, {1: ("outer", 2)})
    with pytest.raises(ExecutionFailed, match="waits for it"):
        await node.ask("outer", 1)
    assert (node.queue.running, node.queue.waiting) == (0, 0)


async def test_with_room_a_function_may_call_itself(node):
    node.runtime.work = calling(node, {1: ("pair", 2)})
    assert (await node.ask("pair", 1))[-1].output.depth == 1


async def test_going_round_in_circles_is_refused(node):
    node.runtime.work = calling(node, {1: ("other", 2), 2: ("outer", 3)})
    with pytest.raises(ExecutionFailed, match="outer is not called"):
        await node.ask("outer", 1)


class TestCallGraph:
    @pytest.fixture
    def queue(self):
        made = AdmissionQueue(limit=10)
        made.configure({"a": {"a": 1}, "b": {"b": 1}, "c": {"c": 2}})
        return made

    def run(self, queue, key, group):
        entry = Entry(key=key, group=group, function=group, deadline=10**6)
        queue.offer(entry, now=0)
        queue.take(now=0)
        return Caller(key=key, deadline=10**6, priority=5)

    def test_two_that_wait_for_each_other_are_found(self, queue):
        graph = CallGraph(queue)
        one, two = self.run(queue, "1", "a"), self.run(queue, "2", "b")
        graph.begin("1>b", caller=one, group="b", function="b")
        with pytest.raises(ExecutionFailed):
            graph.begin("2>a", caller=two, group="a", function="a")
        graph.begin("2>c", caller=two, group="c", function="c")

    def test_all_holders_of_a_group_that_want_another_place_in_it_are_found(self, queue):
        graph = CallGraph(queue)
        one, two = self.run(queue, "1", "c"), self.run(queue, "2", "c")
        graph.begin("1>c", caller=one, group="c", function="c")
        with pytest.raises(ExecutionFailed):
            graph.begin("2>c", caller=two, group="c", function="c")
        graph.end("1>c")
        graph.begin("2>c", caller=two, group="c", function="c")

    def test_calls_are_not_nested_without_end(self, queue):
        graph = CallGraph(queue)
        deep = Caller(key="x", deadline=1, priority=5, depth=8)
        with pytest.raises(ExecutionFailed, match="deeper than 8"):
            graph.begin("y", caller=deep, group="a", function="a")
