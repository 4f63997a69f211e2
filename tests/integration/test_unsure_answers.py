"""A node asked for an answer that is sure enough: what it shows, and what it hands back."""

import asyncio
import json
from pathlib import Path

import pytest

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Control, Invocation
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings

FUNCTIONS = Path(__file__).parents[1] / "data" / "functions"
NODE = "edge-1"
EARLIER = {"node": "edge-0", "function": "judge", "version": "1.0.0", "confidence": 0.2}
UNSURE = {"accept": 0.6}


def python(name, module="sureness", **fields):
    entry = f"{FUNCTIONS}/{module}.py:{name}"
    return FunctionSpec.model_validate({"name": name, "description": name, "entry": entry} | fields)


class Node:
    """A node with its functions, and the router and the client of its invocations."""

    def __init__(self, agent, session, topics, eventually):
        self.agent = agent
        self.session = session
        self.topics = topics
        self.eventually = eventually
        self.events = []
        self.reports = []

    async def listen(self):
        async def on_event(message):
            self.events.append(json.loads(message.payload))

        async def on_report(message):
            self.reports.append(json.loads(message.payload))

        await self.session.subscribe(self.topics.root + "/reply/#", on_event)
        await self.session.subscribe(
            self.topics.filter(TopicKind.REPORT, router="router-1"), on_report
        )

    def invoke(self, function, value=None, *, cascade=UNSURE, left_ms=20_000, **fields):
        invocation = {
            "task": "t",
            "client": "pump-7",
            "router": "router-1",
            "function": function,
            "version": "1.0.0",
            "input": value or {},
            "deadline": now_ms() + left_ms,
            "reply": f"{self.topics.root}/reply/pump-7/t",
            "cascade": cascade,
            "sent_at": now_ms(),
            **fields,
        }
        topic = self.topics.build(TopicKind.INVOKE, node=NODE)
        self.session.post(topic, encode(Invocation.model_validate(invocation)))

    async def ended(self, times=1):
        """Wait until it has reported so many ends; returns the last one."""
        await self.eventually(
            lambda: sum(one["status"] != "admitted" for one in self.reports) >= times
        )
        return self.reports[-1]


@pytest.fixture
async def node(topics, eventually):
    broker = MemoryBroker()
    functions = [
        python("judge", cost={"money": 0.5}),
        python("aloud"),
        python("broken"),
        python("long_winded"),
        python("endless"),
        python("words", "workshop"),
    ]
    async with (
        MemorySession(broker=broker, client_id="router-1") as router,
        MemorySession(broker=broker, client_id=NODE) as session,
    ):
        await session.wait_connected()
        agent = NodeAgent(
            session=session,
            topics=topics,
            settings=NodeSettings(node=NODE, cancel_grace_s=1.0, drain_timeout_s=2.0),
            functions=functions,
        )
        async with agent:
            made = Node(agent, router, topics, eventually)
            await made.listen()
            yield made


async def test_an_answer_that_is_not_sure_enough_goes_to_the_router_alone(node):
    node.invoke("judge", {"text": "it"}, seq=3)
    report = await node.ended()
    assert report["status"] == "unsure"
    assert (report["output"], report["confidence"], report["seq"]) == ("judged it", 0.3, 3)
    assert report["usage"] == {"cost": 0.5}
    assert report["total_ms"] > 0
    assert node.events == []
    assert node.agent.counters.unsure == 1


async def test_an_invocation_delivered_twice_gives_the_same_answer_and_runs_once(node):
    node.invoke("judge", {"text": "it"})
    first = await node.ended()
    node.invoke("judge", {"text": "something else"})
    assert await node.ended(2) == first
    assert node.events == []
    assert (node.agent.counters.duplicates, node.agent.counters.unsure) == (1, 1)


@pytest.mark.parametrize("accept", [0.3, 0.0])
async def test_an_answer_that_is_sure_enough_goes_to_the_client_with_all_steps(node, accept):
    node.invoke("judge", {"text": "it"}, cascade={"accept": accept, "steps": [EARLIER]})
    assert (await node.ended())["status"] == "finished"
    (result,) = node.events
    earlier, own = result["cascade"]
    assert earlier == {**EARLIER, "cost": 0.0}
    assert (own["node"], own["confidence"], own["cost"]) == (NODE, 0.3, 0.5)
    assert own["total_ms"] == result["timing"]["total_ms"]
    assert (result["confidence"], result["seq"]) == (0.3, 0)


async def test_an_answer_without_confidence_counts_as_sure(node):
    node.invoke("words", {"text": "to be"}, cascade={"accept": 1.0})
    assert (await node.ended())["status"] == "finished"
    (result,) = node.events  # and no piece of it was shown before
    assert result["output"] == "to be "
    assert [step.get("confidence") for step in result["cascade"]] == [None]


async def test_an_answer_too_long_to_be_handed_back_goes_to_the_client(node):
    node.invoke("long_winded", {"times": 26_215})  # of ten bytes: more than 256 KiB with its quotes
    assert (await node.ended())["status"] == "finished"
    (result,) = node.events
    assert (result["confidence"], len(result["output"])) == (0.3, 262_150)
    assert [step["confidence"] for step in result["cascade"]] == [0.3]
    node.invoke("long_winded", {"times": 26_000}, task="shorter")
    assert (await node.ended(2))["status"] == "unsure"


async def test_pieces_are_shown_at_once_where_any_answer_will_do(node):
    node.invoke("aloud", {"sure": 0.1}, cascade={"accept": 0.0, "steps": [EARLIER]})
    await node.ended()
    assert [event["event"] for event in node.events] == ["chunk", "chunk", "result"]
    assert [event["seq"] for event in node.events] == [0, 1, 2]


async def test_pieces_are_held_back_where_they_may_be_replaced(node):
    node.invoke("aloud", {"sure": 0.1})
    assert (await node.ended())["output"] == "well, perhaps"
    assert node.events == []


async def test_outside_a_cascade_the_client_gets_whatever_comes(node):
    node.invoke("judge", {"text": "it"}, cascade=None)
    await node.ended()
    (result,) = node.events
    assert (result["output"], result["confidence"]) == ("judged it", 0.3)
    assert "cascade" not in result


@pytest.mark.parametrize(
    ("function", "value", "code"),
    [("broken", {}, "execution_failed"), ("judge", {"sorrow": 1}, "invalid_task")],
)
async def test_the_router_decides_what_a_failure_means(node, function, value, code):
    node.invoke(function, value, cascade={"accept": 0.0, "steps": [EARLIER]})
    report = await node.ended()
    assert (report["status"], report["code"]) == ("failed", code)
    assert node.events == []


@pytest.mark.parametrize(
    ("reason", "code"), [("client", "cancelled"), ("deadline", "deadline_exceeded")]
)
async def test_the_router_decides_what_a_stop_means(node, reason, code):
    node.invoke("endless")
    await node.eventually(lambda: node.agent.load().functions["endless"].running)
    control = Control(verb="cancel", task="t", client="pump-7", attempt=1, reason=reason)
    topic = node.topics.build(TopicKind.CONTROL, node=NODE)
    node.session.post(topic, encode(control))
    report = await node.ended()
    assert (report["status"], report["code"]) == ("failed", code)
    assert node.events == []


async def test_a_superseded_answer_is_not_handed_back(node):
    node.invoke("endless")
    await node.eventually(lambda: node.agent.load().functions["endless"].running)
    node.invoke("judge", {"text": "it"}, attempt=2)
    assert (await node.ended())["attempt"] == 2
    await node.eventually(lambda: node.agent.counters.dropped == 1)
    await asyncio.sleep(0)
    assert {report["attempt"] for report in node.reports if report["status"] != "admitted"} == {2}
