"""Which node is asked next, and what becomes of what routers were given."""

import asyncio
import contextlib
import json

import pytest

from broker import presence
from broker.presence import RouterPresence
from broker.rpc import ReplyInbox
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.errors import DeadlineExceeded, NodeLost
from capability_schemas.ids import now_ms
from capability_schemas.node import NodeState, RouterState
from capability_schemas.task import Task
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from foam.sdk import direct
from foam.sdk.direct import DirectRoad, RoutersAreBack
from support.capabilities import bare_record

CLIENT = "pump-7"


def answer(node, asked):
    node.say(asked, event="working")
    node.say(asked, event="chunk", seq=0, data="hi")
    node.say(asked, event="result", seq=1, output="hi", node=node.name)


def begin(node, asked):
    node.say(asked, event="chunk", seq=0, data="h")


def refuse(node, asked):
    node.refuse(asked, "overloaded")


def refuse_for_good(node, asked):
    node.refuse(asked, "invalid_task")


def send_back(node, asked):
    node.refuse(asked, "policy_denied", router="router-1")


def be_closed(node, asked):
    detail = {"refused": True}
    node.say(
        asked,
        event="error",
        seq=0,
        code="policy_denied",
        message="closed",
        retryable=True,
        detail=detail,
    )


def say_nothing(node, asked):
    pass


class Node:
    """A node that answers what clients ask it as told."""

    def __init__(self, site, name, behaviour):
        self.site = site
        self.name = name
        self.behaviour = behaviour
        self.asked = []
        self.cancelled = []
        self.resumed = []

    async def start(self, **fields):
        for kind, handler in (
            (TopicKind.DIRECT, self._on_task),
            (TopicKind.DIRECT_CANCEL, self._on_cancel),
            (TopicKind.DIRECT_RESUME, self._on_resume),
        ):
            await self.site.far.subscribe(self.site.topics.filter(kind, node=self.name), handler)
        record = bare_record(self.name, "echo", **fields)
        topic = self.site.topics.build(TopicKind.CATALOG, node=self.name, function="echo")
        self.site.far.post(topic, encode(record), retain=True)
        self.be("birth")

    def be(self, state):
        said = NodeState(node=self.name, state=state, epoch=10, at=1, since=1, load_interval_s=60)
        topic = self.site.topics.build(TopicKind.NODE_STATE, node=self.name)
        self.site.far.post(topic, encode(said), retain=True)

    def say(self, asked, **fields):
        topic = self.site.topics.build(
            TopicKind.REPLY, client=CLIENT, task=asked["id"], source=self.name
        )
        event = {"v": 1, "task": asked["id"], "at": 1, **fields}
        self.site.far.post(topic, json.dumps(event).encode())

    def refuse(self, asked, code, **detail):
        detail["refused"] = True
        self.say(asked, event="error", seq=0, code=code, message="no", detail=detail)

    async def _on_task(self, message):
        self.asked.append(json.loads(message.payload))
        self.behaviour(self, self.asked[-1])

    async def _on_cancel(self, message):
        self.cancelled.append(json.loads(message.payload)["task"])

    async def _on_resume(self, message):
        self.resumed.append(json.loads(message.payload))


class Site:
    """A client on its way past routers, and nodes."""

    def __init__(self, stack, broker, session, far, topics):
        self.stack = stack
        self.broker = broker
        self.session = session
        self.far = far
        self.topics = topics
        self.presence = RouterPresence(session=session, topics=topics)
        self.told = []

    async def open(self, patience_s=0.0):
        self.inbox = await self.stack.enter_async_context(
            ReplyInbox(session=self.session, topics=self.topics, client=CLIENT)
        )
        await self.presence.listen()
        self.road = DirectRoad(
            session=self.session,
            inbox=self.inbox,
            topics=self.topics,
            registries={},
            presence=self.presence,
            patience_s=patience_s,
            told=self.told.append,
        )

    def router(self, state="birth", **fields):
        said = RouterState(router="router-1", state=state, epoch=1, at=1, **fields)
        topic = self.topics.build(TopicKind.ROUTER_STATE, router="router-1")
        self.far.post(topic, encode(said), retain=True)

    async def node(self, name, behaviour=answer, **fields):
        made = Node(self, name, behaviour)
        await made.start(**fields)
        return made

    async def instead(self, *, timeout_ms=60_000, given_id=False, **fields):
        task = Task.model_validate(
            {"id": "t1", "function": "echo", "timeout_ms": timeout_ms, **fields}
        )
        return await self.road.instead(task, deadline=now_ms() + timeout_ms, given_id=given_id)

    async def after(self, *, timeout_ms=60_000, kept=False, **fields):
        task = Task.model_validate({"id": "t1", "function": "echo", **fields})
        deadline = now_ms() + timeout_ms
        return await self.road.after(task, deadline=deadline, since=0.0, kept=kept)

    def cancelled(self):
        topic = self.topics.build(TopicKind.CANCEL, client=CLIENT)
        return [json.loads(message.payload)["task"] for message in self.broker.published(topic)]


@pytest.fixture
async def site(topics, monkeypatch):
    monkeypatch.setattr(presence, "_SETTLING_S", 0.0)
    monkeypatch.setattr(direct, "_ANSWER_S", 0.05)
    monkeypatch.setattr(direct, "_LOOK_S", 0.05)
    broker = MemoryBroker()
    async with contextlib.AsyncExitStack() as stack:
        session = MemorySession(broker=broker, client_id=CLIENT)
        far = MemorySession(broker=broker, client_id="far")
        for one in (session, far):
            await stack.enter_async_context(one)
            await one.wait_connected()
        made = Site(stack, broker, session, far, topics)
        await made.open()
        made.router("offline")
        await broker.settle()
        yield made


async def read(stream):
    return [event.event async for event in stream]


async def test_a_node_is_asked_for_the_very_version_that_was_chosen(site):
    node = await site.node("edge-1")
    stream = await site.instead(function="echo@>=1", text="hi", priority=7)
    assert await read(stream) == ["working", "chunk", "result"]
    (asked,) = node.asked
    assert (asked["function"], asked["text"], asked["priority"]) == ("echo@1.0.0", "hi", 7)
    assert 0 < asked["timeout_ms"] <= 60_000
    assert (stream.direct.node, stream.direct.version) == ("edge-1", "1.0.0")
    assert "edge-1" in str(stream.direct)
    assert "fail-over" in str(stream.direct)


@pytest.mark.parametrize("behaviour", [refuse, say_nothing])
async def test_who_refuses_or_is_silent_is_passed_over(site, behaviour):
    first = await site.node("edge-1", behaviour)
    second = await site.node("edge-2")
    stream = await site.instead()
    assert await read(stream) == ["working", "chunk", "result"]
    assert stream.direct.node == "edge-2"
    assert len(first.asked) == (1 if behaviour is refuse else 2)
    assert first.cancelled == ([] if behaviour is refuse else ["t1"])
    # An id has one end: of the first one, which was refused or cancelled, that is it.
    assert [asked["id"] for asked in second.asked] == [stream.task]
    assert stream.task != "t1"


async def test_an_id_of_the_callers_stays_what_it_is(site):
    nodes = [await site.node(name, refuse) for name in ("edge-1", "edge-2")]
    stream = await site.instead(given_id=True)
    assert (await anext(stream)).code == "overloaded"
    assert [asked["id"] for node in nodes for asked in node.asked] == ["t1", "t1"]


async def test_a_silent_node_may_have_begun_what_may_run_only_once(site):
    node = await site.node("edge-1", say_nothing, continues="none")
    other = await site.node("edge-2", continues="none")
    with pytest.raises(NodeLost, match="does not answer"):
        await read(await site.instead())
    await site.broker.settle()
    assert node.cancelled == ["t1"]
    assert not other.asked


async def test_a_refusal_that_others_would_repeat_is_the_end(site):
    await site.node("edge-1", refuse_for_good)
    other = await site.node("edge-2")
    stream = await site.instead()
    event = await anext(stream)
    assert (event.event, event.code) == ("error", "invalid_task")
    assert not other.asked


async def test_the_last_refusal_is_the_answer(site):
    for name in ("edge-1", "edge-2"):
        await site.node(name, refuse)
    stream = await site.instead()
    assert (await anext(stream)).code == "overloaded"
    assert stream.direct.node == "edge-2"


async def test_a_node_that_hears_a_router_sends_the_task_back(site):
    await site.node("edge-1", send_back)
    with pytest.raises(RoutersAreBack):
        await read(await site.instead())
    assert "goes to the routers after all" in site.told[-1]


async def test_where_all_that_could_are_closed_the_task_waits_for_routers(site):
    await site.node("edge-1", be_closed)
    other = await site.node("edge-2")
    assert (await read(await site.instead()))[-1] == "result"
    other.behaviour = be_closed
    stream = await site.instead()
    with pytest.raises(RoutersAreBack):
        await read(stream)
    assert "goes to the routers after all" in site.told[-1]


async def test_words_of_others_do_not_count(site):
    node = await site.node("edge-1", begin)
    other = await site.node("edge-2", say_nothing)
    stream = await site.instead()
    assert (await anext(stream)).data == "h"
    other.say(node.asked[0], event="error", seq=1, code="internal", message="not yours")
    node.say(node.asked[0], event="result", seq=1, output="h", node="edge-1")
    assert await read(stream) == ["result"]


async def test_a_node_that_dies_takes_the_task_with_it(site):
    node = await site.node("edge-1", begin)
    other = await site.node("edge-2")
    stream = await site.instead()
    assert (await anext(stream)).data == "h"
    node.be("offline")
    with pytest.raises(NodeLost, match="edge-1, which was asked itself, is offline"):
        await anext(stream)
    assert not other.asked


async def test_what_is_missed_is_asked_of_the_node(site):
    node = await site.node("edge-1", begin)
    stream = await site.instead()
    assert (await anext(stream)).data == "h"
    node.say(node.asked[0], event="chunk", seq=2, data="y")
    reading = asyncio.ensure_future(anext(stream))
    async with asyncio.timeout(30):
        while not node.resumed:  # noqa: ASYNC110 - another session writes it
            await asyncio.sleep(0.01)
    assert node.resumed[0] == {"v": 1, "task": "t1", "from_seq": 1}
    node.say(node.asked[0], event="chunk", seq=1, data="e")
    assert (await reading).data == "e"


async def test_cancelling_reaches_the_node(site):
    node = await site.node("edge-1", begin)
    stream = await site.instead()
    await anext(stream)
    await stream.cancel()
    await site.broker.settle()
    assert node.cancelled == ["t1"]


async def test_what_was_cancelled_goes_to_nobody_else(site):
    node = await site.node("edge-1", say_nothing)
    other = await site.node("edge-2")
    stream = await site.instead()
    going = asyncio.ensure_future(anext(stream))
    await site.broker.settle()
    await stream.cancel()
    node.refuse({"id": "t1"}, "cancelled")
    assert (await going).code == "cancelled"
    assert not other.asked


async def test_the_deadline_holds(site):
    await site.node("edge-1", begin)
    stream = await site.instead(timeout_ms=200)
    assert (await anext(stream)).data == "h"
    with pytest.raises(DeadlineExceeded):
        await anext(stream)


# ---- whether to go that way


async def test_nobody_goes_past_a_router_that_lives_or_comes_in_time(site):
    await site.node("edge-1")
    site.road.patience_s = 30.0
    going = asyncio.ensure_future(site.instead())
    await site.broker.settle()
    assert not going.done()
    site.router()
    assert await going is None
    assert await site.instead() is None
    assert site.road.why is None


async def test_nobody_goes_past_rules(site):
    await site.node("edge-1")
    site.router("offline", direct=False)
    await site.broker.settle()
    assert await site.instead() is None
    assert "let nobody past it" in site.road.why


async def test_where_nobody_fits_the_task_waits_for_a_router(site):
    await site.node("edge-1")
    assert await site.instead(function="sing") is None
    assert "nobody offers" in site.road.why


async def test_what_routers_were_given_is_taken_back_first_and_done_under_another_id(site):
    node = await site.node("edge-1")
    stream = await site.after()
    assert site.cancelled() == ["t1"]
    assert not node.asked
    assert await read(stream) == ["working", "chunk", "result"]
    assert stream.task != "t1"
    assert [asked["id"] for asked in node.asked] == [stream.task]


async def test_what_may_run_once_stays_with_the_routers_that_were_given_it(site):
    node = await site.node("edge-1", continues="none")
    assert await site.after() is None
    assert site.cancelled() == []
    assert not node.asked
    assert "once" in site.road.why


async def test_what_routers_keep_is_given_to_no_node(site):
    node = await site.node("edge-1")
    assert await site.after(kept=True) is None
    assert site.cancelled() == []
    assert not node.asked


@pytest.mark.parametrize("kept", [True, False])
async def test_where_no_router_lives_its_time_is_over_when_it_is(site, kept):
    with pytest.raises(DeadlineExceeded, match="no router lives, and nobody took task t1 in time"):
        await site.after(timeout_ms=-1, kept=kept)
    assert await site.after(function="sing") is None
    with pytest.raises(DeadlineExceeded, match="nobody offers"):
        await site.after(timeout_ms=-1, kept=kept)
    site.router(heartbeat_s=60.0)  # which says so itself
    await site.broker.settle()
    assert await site.after(timeout_ms=-1, kept=kept) is None


async def test_nothing_is_taken_back_before_its_time(site):
    await site.node("edge-1")
    site.router(heartbeat_s=60.0)
    await site.broker.settle()
    assert await site.after() is None
    site.router("offline")
    await site.broker.settle()
    site.road.patience_s = 1e9
    assert await site.after() is None
    assert site.cancelled() == []
