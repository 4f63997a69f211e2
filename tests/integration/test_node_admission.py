"""Admission and pool of a node agent with real child processes."""

import asyncio
import json

import pytest

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.functions import FunctionLimits, FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Control, Invocation
from capability_schemas.node import FunctionLoad, NodeLoad
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings

SOURCE = """
import asyncio, os, time

def nap(ms: int) -> int:
    time.sleep(ms / 1000)
    return os.getpid()

def hold(path: str) -> int:
    while not os.path.exists(path):
        time.sleep(0.01)
    return os.getpid()

async def held(path: str) -> int:
    while not os.path.exists(path):
        await asyncio.sleep(0.01)
    return os.getpid()
"""


class Mesh:
    """An agent and what it says, on a broker in memory."""

    def __init__(self, session, own, topics, eventually):
        self.session = session
        self.own = own
        self.topics = topics
        self.eventually = eventually
        self.reports = {}
        self.ends = {}

    async def on_report(self, message):
        report = json.loads(message.payload)
        self.reports.setdefault(report["task"], []).append(report)

    async def on_reply(self, message):
        event = json.loads(message.payload)
        if event["event"] in {"result", "error"}:
            self.ends[event["task"]] = event

    def invoke(self, task, function, value, *, left_ms=20_000, **fields):
        invocation = Invocation(
            task=task,
            client="c",
            router="r",
            function=function,
            version="1.0.0",
            input=value,
            deadline=now_ms() + left_ms,
            reply=f"{self.topics.root}/reply/c/{task}",
            sent_at=now_ms(),
            **fields,
        )
        self.session.post(self.topics.build(TopicKind.INVOKE, node="n"), encode(invocation))

    async def end_of(self, task):
        await self.eventually(lambda: task in self.ends)
        return self.ends[task]

    async def last_report(self, task):
        await self.eventually(
            lambda: any(one["status"] != "admitted" for one in self.reports.get(task, []))
        )
        return self.reports[task][-1]


@pytest.fixture
async def mesh(topics, eventually):
    broker = MemoryBroker()
    async with (
        MemorySession(broker=broker, client_id="r") as session,
        MemorySession(broker=broker, client_id="n") as own,
    ):
        await session.wait_connected(10)
        await own.wait_connected(10)
        made = Mesh(session, own, topics, eventually)
        await session.subscribe(topics.filter(TopicKind.REPORT, router="r"), made.on_report)
        await session.subscribe(f"{topics.root}/reply/#", made.on_reply)
        yield made


@pytest.fixture
def make_agent(mesh, topics, tmp_path):
    source = tmp_path / "functions.py"
    source.write_text(SOURCE)

    def make(*functions, **settings):
        return NodeAgent(
            session=mesh.own,
            topics=topics,
            settings=NodeSettings.model_validate({"node": "n", "cancel_grace_s": 0.2, **settings}),
            functions=[
                FunctionSpec(description="d", entry=f"{source}:{name}", name=name, **fields)
                for name, fields in functions
            ],
        )

    return make


async def test_an_idle_function_goes_to_zero_and_comes_back(mesh, make_agent):
    async with make_agent(("nap", {"idle_s": 0.1})) as agent:
        pids = []
        for task in ("t1", "t2"):
            mesh.invoke(task, "nap", {"ms": 1})
            pids.append((await mesh.end_of(task))["output"])
            await mesh.eventually(lambda: agent.load().functions["nap"].instances == 0)
    assert pids[0] != pids[1]


async def test_what_cannot_end_in_time_is_refused_with_the_prediction(mesh, make_agent):
    async with make_agent(("nap", {"warm": True})) as agent:
        await agent.wait_warm(20)
        for task in ("a", "b", "c"):
            mesh.invoke(task, "nap", {"ms": 400})
            await mesh.end_of(task)
        mesh.invoke("t2", "nap", {"ms": 400}, left_ms=200)
        report = await mesh.last_report("t2")
    assert (report["status"], report["code"]) == ("refused", "deadline_exceeded")
    assert "nap takes about 4" in report["reason"]
    assert "not begun" in report["reason"]


async def test_a_refusal_names_the_neighbour_with_room(mesh, make_agent, topics, tmp_path):
    agent = make_agent(("held", {}), queue_limit=0, peers=("n2", "n3"))
    async with agent:
        for node, running in (("n2", 1), ("n3", 0), ("stranger", 0)):
            load = NodeLoad(
                node=node,
                epoch=1,
                at=now_ms(),
                queue_limit=10,
                functions={"held": FunctionLoad(running=running, total_ms=100.0)},
            )
            topic = topics.build(TopicKind.NODE_LOAD, node=node)
            mesh.session.post(topic, encode(load))
        mesh.invoke("t1", "held", {"path": str(tmp_path / "go")})
        await mesh.eventually(lambda: "t1" in mesh.reports)
        mesh.invoke("t2", "held", {"path": str(tmp_path / "go")})
        report = await mesh.last_report("t2")
        (tmp_path / "go").touch()
        await mesh.end_of("t1")
    assert (report["status"], report["code"], report["peer"]) == ("refused", "overloaded", "n3")
    assert report["retry_after_ms"] >= 50


async def test_what_has_not_begun_is_given_back_when_the_router_asks_and_nothing_else(
    mesh, make_agent, topics, tmp_path
):
    gate = tmp_path / "gate"

    def ask_back(task):
        order = Control(verb="return", task=task, client="c", attempt=1, sender="r", node="n")
        mesh.session.post(topics.build(TopicKind.CONTROL, node="n"), encode(order))

    async with make_agent(("held", {})) as agent:
        for task in ("runs", "waits"):
            mesh.invoke(task, "held", str(gate))
            await mesh.eventually(lambda task=task: mesh.reports.get(task))
        await mesh.eventually(lambda: agent.load().running == 1 and agent.load().queued == 1)
        ask_back("waits")
        report = await mesh.last_report("waits")
        assert (report["status"], report["code"]) == ("refused", "overloaded")
        ask_back("runs")
        await mesh.eventually(lambda: len(mesh.reports["runs"]) == 2)
        assert [one["status"] for one in mesh.reports["runs"]] == ["admitted", "admitted"]
        assert agent.load().queued == 0
        gate.touch()
        await mesh.end_of("runs")
        assert agent.counters.given_back == 1
    assert "waits" not in mesh.ends


async def test_a_session_returns_to_its_process(mesh, make_agent, tmp_path):
    gate = {"path": str(tmp_path / "go")}
    async with make_agent(("hold", {"concurrency": 2})) as agent:
        mesh.invoke("a", "hold", gate, session="a")
        mesh.invoke("b", "hold", gate, session="b")
        await mesh.eventually(lambda: agent.load().functions["hold"].instances == 2)
        (tmp_path / "go").touch()
        first = {name: (await mesh.end_of(name))["output"] for name in "ab"}
        mesh.invoke("b2", "hold", gate, session="b")
        assert (await mesh.end_of("b2"))["output"] == first["b"]
        mesh.invoke("a2", "hold", gate, session="a")
        assert (await mesh.end_of("a2"))["output"] == first["a"]
    assert first["a"] != first["b"]


async def test_predictions_of_the_finish_are_judged(mesh, make_agent):
    async with make_agent(("nap", {"warm": True})) as agent:
        await agent.wait_warm(20)
        for number in range(4):
            mesh.invoke(f"t{number}", "nap", {"ms": 50})
            await mesh.end_of(f"t{number}")
        await mesh.eventually(lambda: agent.forecast.judged == 3)
        assert agent.forecast.median_error is not None


async def test_what_was_taken_before_a_replacement_ends_on_the_old_process(
    mesh, make_agent, tmp_path
):
    agent = make_agent(("held", {"concurrency": 1}))
    async with agent, asyncio.timeout(25):
        mesh.invoke("t1", "held", {"path": str(tmp_path / "go")})
        await mesh.eventually(lambda: agent.load().functions["held"].instances == 1)
        mesh.invoke("t2", "held", {"path": str(tmp_path / "go")})
        await mesh.eventually(lambda: "t2" in mesh.reports)
        edited = FunctionSpec(
            name="held",
            description="d",
            entry=f"{tmp_path / 'functions.py'}:held",
            limits=FunctionLimits(output_bytes=5000),
        )
        await agent.replace([edited])
        mesh.invoke("t3", "held", {"path": str(tmp_path / "go")})
        await mesh.eventually(lambda: agent.load().functions["held"].instances == 1)
        (tmp_path / "go").touch()
        pids = [(await mesh.end_of(task))["output"] for task in ("t1", "t2", "t3")]
    assert pids[0] == pids[1]
    assert pids[2] != pids[0]
