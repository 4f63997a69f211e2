"""An agent on a node of a real router: tools of its own node and of another one, end to end."""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from broker.access import AccessPolicy, Action, Role
from broker.rpc import ReplyInbox
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.errors import (
    DeadlineExceeded,
    ExecutionFailed,
    InvalidTask,
    NoCapableNode,
    Overloaded,
    TooLarge,
)
from capability_schemas.ids import now_ms
from capability_schemas.reply import Chunk, ErrorEvent, Result, Step
from capability_schemas.task import Task
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from node_agent.agent import NodeAgent
from node_agent.mesh_client import MeshClient
from node_agent.runtimes.base import Final, Piece, RuntimeContext
from node_agent.settings import NodeSettings
from registry.encoders import EncoderThread
from registry.search import CapabilitySearch
from router import Ledger, RouterService, RouterSettings, router_will
from support.calls import spec_of
from support.capabilities import make_record
from support.encoders import WordEncoder
from support.scripted_openai import Answer, ScriptedOpenAI

DATA = Path(__file__).parents[1] / "data"
WORKSHOP = DATA / "functions" / "workshop.py"
SERVER = DATA / "mcp" / "workshop_server.py"
ROLES = {"pump-7": Role.DEVICE, "router-1": Role.ROUTER, "registry-1": Role.REGISTRY}
ACTIONS = {"publish": Action.PUBLISH, "subscribe": Action.SUBSCRIBE}


def python(name, **fields):
    return spec_of("python", entry=f"{WORKSHOP}:{name}", **{"name": name, **fields})


class Mesh:
    """A broker with the real access table, a router, nodes, and a device that asks."""

    def __init__(self, stack, path, topics, eventually):
        self.stack = stack
        self.path = path
        self.topics = topics
        self.eventually = eventually
        policy = AccessPolicy(topics)
        self.broker = MemoryBroker(
            allows=lambda who, what, topic: policy.allows(
                ROLES.get(who, Role.NODE), who, ACTIONS[what], topic
            )
        )
        self.words = WordEncoder()

    async def session(self, name, **options):
        session = MemorySession(broker=self.broker, client_id=name, **options)
        return await self.stack.enter_async_context(session)

    async def start(self):
        ledger = await self.stack.enter_async_context(
            Ledger(path=self.path / "router.sqlite", limit_bytes=10**8)
        )
        encoder = await self.stack.enter_async_context(EncoderThread(encoder=self.words))
        will = router_will(self.topics, "router-1", epoch=1, at=1)
        session = MemorySession(broker=self.broker, client_id="router-1", will=will, clean=False)
        router = RouterService(
            session=session,
            topics=self.topics,
            search=CapabilitySearch(space=self.words.space),
            encoder=encoder,
            ledger=ledger,
            router_id="router-1",
            settings=RouterSettings(settle_ms=60, quiet_ms=10),
        )
        await router.listen()
        await self.stack.enter_async_context(session)
        await self.stack.enter_async_context(router)
        self.registry = await self.session("registry-1")
        device = await self.session("pump-7")
        self.inbox = await self.stack.enter_async_context(
            ReplyInbox(session=device, topics=self.topics, client="pump-7")
        )

    async def node(self, name, *functions, servers=None):
        session = await self.session(name)
        await session.wait_connected()
        client = MeshClient(session=session, topics=self.topics, node=name)
        await self.stack.enter_async_context(client)
        settings = NodeSettings(node=name, cancel_grace_s=0.5, drain_timeout_s=5.0)
        agent = NodeAgent(
            session=session,
            topics=self.topics,
            settings=settings,
            functions=functions,
            context=RuntimeContext(mesh=client, mcp_servers=servers or {}),
        )
        await self.stack.enter_async_context(agent)
        for spec in functions:
            record = make_record(
                self.words,
                name,
                spec.name,
                epoch=agent.epoch,
                description=spec.description,
                input_schema=spec.input_schema,
            )
            topic = self.topics.build(TopicKind.CATALOG, node=name, function=spec.name)
            self.registry.post(topic, encode(record), retain=True)
        await self.broker.settle()
        return client

    async def ask(self, **fields):
        """Send a task as the device; returns its events."""
        task = Task.model_validate({"id": "t1", "timeout_ms": 25_000, **fields})
        deadline = now_ms() + task.timeout_ms
        async with self.inbox.open(str(task.id), deadline=deadline) as stream:
            topic = self.topics.build(TopicKind.TASK, client="pump-7")
            self.inbox.session.post(topic, encode(task))
            return [event async for event in stream]


@pytest.fixture
async def mesh(tmp_path, topics, eventually):
    async with AsyncExitStack() as stack:
        made = Mesh(stack, tmp_path, topics, eventually)
        await made.start()
        yield made


def chat(server, **fields):
    options = {"base_url": server.base_url}
    return spec_of("openai", name="chat", model="scripted", options=options, **fields)


def helper(name="helper", **options):
    return spec_of("agent", name=name, options={"model": "chat", **options})


def told(body):
    return [message["content"] for message in body["messages"] if message["role"] == "tool"]


async def test_an_agent_uses_functions_of_its_node_and_of_another(mesh):
    answers = [
        Answer(tool_calls=[("add", {"a": 2, "b": 40}), ("words", {"text": "all is well"})]),
        Answer(text=["42, and ", "all is well."]),
    ]
    async with ScriptedOpenAI(answers) as server:
        await mesh.node("edge-2", python("words"))
        tools = ["add", {"use": "mesh:words@>=1", "description": "Say the words of a text."}]
        await mesh.node("edge-1", python("add"), chat(server), helper(tools=tools))
        events = await mesh.ask(function="helper", text="sum, and how is it?")
        assert sorted(told(server.bodies[1])) == ["42", "all is well "]
    result = events[-1]
    assert isinstance(result, Result)
    assert (result.output, result.node) == ("42, and all is well.", "edge-1")
    assert "".join(e.data for e in events if isinstance(e, Chunk)) == result.output
    steps = [(e.detail["tool"], e.state) for e in events if isinstance(e, Step)]
    assert sorted(steps) == [
        ("add", "finished"),
        ("add", "running"),
        ("words", "finished"),
        ("words", "running"),
    ]
    tasks = mesh.broker.published(mesh.topics.build(TopicKind.TASK, client="edge-1"))
    assert [json.loads(message.payload)["function"] for message in tasks] == ["words@>=1"]


async def test_a_task_in_words_finds_its_way(mesh):
    answers = [
        Answer(tool_calls=[("ask_mesh", {"text": "repeat these words please"})]),
        Answer(text="done"),
    ]
    async with ScriptedOpenAI(answers) as server:
        far = python("words", description="repeat these words please")
        await mesh.node("edge-2", far)
        await mesh.node("edge-1", chat(server), helper(tools=["mesh:*"]))
        events = await mesh.ask(function="helper", text="go")
        assert told(server.bodies[1]) == ["repeat these words please "]
    assert isinstance(events[-1], Result)


async def test_agents_of_two_nodes_that_call_each_other_end(mesh):
    """Neither node can see the circle: the time that every task has left ends it."""

    def again(body):
        return Answer(tool_calls=[(body["tools"][0]["function"]["name"], {"text": "you do it"})])

    async with ScriptedOpenAI(again) as server:
        await mesh.node("edge-1", chat(server), helper("ping", tools=["mesh:pong"]))
        await mesh.node("edge-2", chat(server), helper("pong", tools=["mesh:ping"]))
        events = await mesh.ask(function="ping", text="go", timeout_ms=3_000)
        asked = len(server.bodies)
    assert isinstance(events[-1], ErrorEvent)
    assert events[-1].code in ("deadline_exceeded", "execution_failed")
    assert asked < 20


async def test_a_cancelled_task_cancels_what_its_agent_asked_for(mesh, tmp_path):
    marker = tmp_path / "marker"
    answers = [Answer(tool_calls=[("polite", {"marker": str(marker)})])]
    async with ScriptedOpenAI(answers) as server:
        await mesh.node("edge-2", python("polite"))
        await mesh.node("edge-1", chat(server), helper(tools=["mesh:polite"]))
        asking = asyncio.create_task(mesh.ask(function="helper", text="wait"))
        await mesh.eventually(marker.exists)
        topic = mesh.topics.build(TopicKind.CANCEL, client="pump-7")
        mesh.inbox.session.post(topic, b'{"v": 1, "task": "t1"}')
        events = await asking
        assert isinstance(events[-1], ErrorEvent)
        assert events[-1].code == "cancelled"
        cancel = mesh.topics.build(TopicKind.CANCEL, client="edge-1")
        await mesh.eventually(lambda: mesh.broker.published(cancel))


async def test_a_tool_server_that_dies_is_started_again_for_the_next_task(mesh):
    command = {"command": sys.executable, "args": [str(SERVER), "stdio"]}
    functions = [
        spec_of("mcp", name=tool, options={"server": "shop", "tool": tool})
        for tool in ("manual", "vanish")
    ]
    await mesh.node("edge-1", *functions, servers={"shop": command})
    lost = await mesh.ask(function="vanish", id="t1")
    assert isinstance(lost[-1], ErrorEvent)
    assert lost[-1].code == "execution_failed"
    assert "MCP server shop failed vanish: it ended with status -9" in lost[-1].message
    found = await mesh.ask(function="manual", input={"topic": "gears"}, id="t2")
    assert isinstance(found[-1], Result)
    assert "12 Nm" in found[-1].output["result"]


async def test_tools_of_a_server_and_of_the_mesh_in_one_agent(mesh):
    command = {"command": sys.executable, "args": [str(SERVER), "stdio"]}
    answers = [
        Answer(tool_calls=[("shop_add", {"a": 1, "b": 2}), ("words", {"text": "well done"})]),
        Answer(text="3, well done"),
    ]
    async with ScriptedOpenAI(answers) as server:
        await mesh.node("edge-2", python("words"))
        tools = ["mcp:shop/add", "mesh:words"]
        functions = (chat(server), helper(tools=tools))
        await mesh.node("edge-1", *functions, servers={"shop": command})
        events = await mesh.ask(function="helper", text="go")
        assert told(server.bodies[1]) == ['{"result":3.0}', "well done "]
    assert isinstance(events[-1], Result)


async def collect(answers):
    return [item async for item in answers]


async def test_the_client_of_a_node_subscribes_at_its_first_ask_only(mesh):
    client = await mesh.node("edge-1", python("words"))
    assert client._inbox is None
    answers = await collect(
        client.ask({"function": "words", "input": {"text": "a b"}}, timeout_s=20)
    )
    assert "".join(item.data for item in answers if isinstance(item, Piece)) == "a b "
    assert answers[-1] == Final(output="a b ")
    assert client._inbox is not None


async def test_errors_of_a_task_come_back_as_they_are(mesh):
    client = await mesh.node("edge-1", python("fail"))
    with pytest.raises(NoCapableNode):
        await collect(client.ask({"function": "nowhere"}, timeout_s=5))
    with pytest.raises(ExecutionFailed, match="on purpose"):
        await collect(
            client.ask({"function": "fail", "input": {"reason": "on purpose"}}, timeout_s=20)
        )
    with pytest.raises(InvalidTask, match="functon"):
        await collect(client.ask({"functon": "x"}, timeout_s=5))
    with pytest.raises(TooLarge):
        await collect(client.ask({"text": "x" * 2_000_000}, timeout_s=5))


async def test_the_client_waits_no_longer_than_it_says_and_bounds_what_is_under_way(
    topics, eventually
):
    broker = MemoryBroker()  # nobody answers
    async with (
        MemorySession(broker=broker, client_id="edge-1") as session,
        MeshClient(session=session, topics=topics, node="edge-1", limit=1) as client,
    ):
        waiting = asyncio.create_task(collect(client.ask({"text": "hello"}, timeout_s=60)))
        topic = topics.build(TopicKind.TASK, client="edge-1")
        await eventually(lambda: broker.published(topic))
        with pytest.raises(Overloaded, match="has 1 tasks of its own under way"):
            await collect(client.ask({"text": "more"}, timeout_s=1))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await broker.settle()
        assert broker.published(topics.build(TopicKind.CANCEL, client="edge-1"))
        with pytest.raises(DeadlineExceeded):
            await collect(client.ask({"text": "again"}, timeout_s=0.05))
