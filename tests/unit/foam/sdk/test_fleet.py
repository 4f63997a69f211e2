"""Whom a client would ask, as far as it can tell by itself."""

import pytest

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.errors import InvalidTask, NoCapableNode, PolicyDenied
from capability_schemas.node import FunctionLoad, NodeLoad, NodeState
from capability_schemas.signing import SigningKey, sign
from capability_schemas.task import Task
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from foam.sdk.fleet import FleetView
from support.capabilities import bare_record
from support.members import REGISTRY_KEY

NOW = 1_790_000_000_000
PUMPS = {"description": "diagnoses vibrating pumps", "examples": ("the pump shakes and hums",)}
TIDES = {"description": "tells when the tide is high", "examples": ("high water at the quay",)}


class Site:
    """A view, and a registry and nodes that fill it."""

    def __init__(self, broker, session, far, topics):
        self.broker = broker
        self.session = session
        self.far = far
        self.topics = topics
        self.registries = {}
        self.now = NOW

    def view(self):
        return FleetView(
            session=self.session,
            topics=self.topics,
            client="pump-7",
            registries=self.registries,
            clock=lambda: self.now,
        )

    async def opened(self):
        view = self.view()
        await view.open(30.0)
        return view

    def admit(self, node, function, *, key=REGISTRY_KEY, **fields):
        record = sign(bare_record(node, function, **fields), key)
        topic = self.topics.build(TopicKind.CATALOG, node=node, function=function)
        self.far.post(topic, encode(record), retain=True)

    def be(self, node, state="birth", epoch=10):
        said = NodeState(
            node=node, state=state, epoch=epoch, at=NOW, since=NOW, load_interval_s=5.0
        )
        topic = self.topics.build(TopicKind.NODE_STATE, node=node)
        self.far.post(topic, encode(said), retain=True)

    def load(self, node, **functions):
        said = NodeLoad(
            node=node,
            epoch=10,
            at=NOW,
            functions={name: FunctionLoad(**fields) for name, fields in functions.items()},
        )
        self.far.post(self.topics.build(TopicKind.NODE_LOAD, node=node), encode(said))

    def offer(self, node, function, **fields):
        self.admit(node, function, **fields)
        self.be(node)


@pytest.fixture
async def site(topics):
    broker = MemoryBroker()
    async with (
        MemorySession(broker=broker, client_id="pump-7") as session,
        MemorySession(broker=broker, client_id="far") as far,
    ):
        await session.wait_connected()
        await far.wait_connected()
        yield Site(broker, session, far, topics)


def choose(view, *, steady=False, task_id="t1", **fields):
    task = Task.model_validate({"id": task_id, **fields})
    return [record.node for record in view.choose(task, deadline=NOW + 60_000, steady=steady)]


async def test_by_name_and_version(site):
    site.offer("edge-1", "echo", version="1.0.0")
    site.offer("edge-2", "echo", version="2.1.0")
    view = await site.opened()
    assert choose(view, function="echo") == ["edge-1", "edge-2"]
    assert choose(view, function="echo@>=2") == ["edge-2"]
    with pytest.raises(NoCapableNode):
        choose(view, function="echo@>=3")
    with pytest.raises(NoCapableNode):
        choose(view, function="sing")
    with pytest.raises(InvalidTask):
        choose(view, function="no name")


async def test_who_is_done_first_is_asked_first(site):
    for node in ("edge-1", "edge-2", "edge-3"):
        site.offer(node, "echo")
    view = await site.opened()
    site.load("edge-1", echo={"total_ms": 900.0})
    site.load("edge-3", echo={"total_ms": 20.0})
    await site.broker.settle()
    assert choose(view, function="echo") == ["edge-3", "edge-1", "edge-2"]


async def test_the_same_id_finds_the_same_node_whatever_the_load(site):
    for node in ("edge-1", "edge-2", "edge-3"):
        site.offer(node, "echo")
    view = await site.opened()
    before = {
        name: choose(view, steady=True, task_id=name, function="echo")[0]
        for name in (f"job-{number}" for number in range(20))
    }
    assert len(set(before.values())) == 3
    site.load("edge-3", echo={"total_ms": 20.0})
    await site.broker.settle()
    for name, node in before.items():
        assert choose(view, steady=True, task_id=name, function="echo")[0] == node


async def test_only_who_lives_and_may(site):
    site.offer("edge-1", "echo", policy={"zones": ("hall-1",)})
    site.offer("edge-2", "echo", policy={"zones": ("hall-2",)})
    site.offer("edge-3", "echo", policy={"zones": ("hall-2",), "tenant": "acme"})
    view = await site.opened()
    assert choose(view, function="echo", policy={"zones": ["hall-2"]}) == ["edge-2"]
    with pytest.raises(PolicyDenied):
        choose(view, function="echo", policy={"zones": ["hall-9"]})
    site.be("edge-2", "offline")
    await site.broker.settle()
    assert view.gone("edge-2") == "is offline"
    assert view.gone("edge-1") is None
    with pytest.raises(NoCapableNode, match="away"):
        choose(view, function="echo", policy={"zones": ["hall-2"]})
    site.now += 60_000
    assert view.gone("edge-1") == "is silent"


async def test_by_words_where_they_leave_no_doubt(site):
    site.offer("edge-1", "diagnose", **PUMPS)
    site.offer("edge-2", "diagnose", **PUMPS)
    site.offer("edge-3", "tides", **TIDES)
    view = await site.opened()
    assert choose(view, text="the pump shakes") == ["edge-1", "edge-2"]
    assert choose(view, text="high water at the quay?") == ["edge-3"]
    with pytest.raises(NoCapableNode, match="nobody offers this"):
        choose(view, text="write me a poem about the sea")


async def test_two_functions_that_the_words_do_not_tell_apart_are_no_guess(site):
    site.offer("edge-1", "diagnose", **PUMPS)
    site.offer("edge-2", "inspect", **{**PUMPS, "description": "diagnoses pumps that vibrate"})
    view = await site.opened()
    with pytest.raises(NoCapableNode, match="name the function"):
        choose(view, text="the pump shakes and hums")


async def test_a_function_that_is_withdrawn_or_described_anew_is_found_as_it_is(site):
    site.offer("edge-1", "diagnose", **PUMPS)
    site.offer("edge-2", "tides", **TIDES)
    view = await site.opened()
    site.admit(
        "edge-2",
        "tides",
        revision=2,
        description="counts the ships that lie at the quay",
        examples=("how many ships",),
    )
    site.far.post(
        site.topics.build(TopicKind.CATALOG, node="edge-1", function="diagnose"), b"", retain=True
    )
    await site.broker.settle()
    assert choose(view, text="how many ships") == ["edge-2"]
    for text in ("the pump shakes and hums", "high water at the quay"):
        with pytest.raises(NoCapableNode):
            choose(view, text=text)


async def test_records_that_no_registry_signed_count_for_nothing(site):
    site.registries = {"registry-1": REGISTRY_KEY.public}
    site.offer("edge-1", "echo")
    site.offer("edge-2", "echo", key=SigningKey.generate())
    site.offer("edge-3", "echo", registry="registry-9")
    view = await site.opened()
    assert choose(view, function="echo") == ["edge-1"]


async def test_rubbish_changes_nothing(site):
    site.offer("edge-1", "echo")
    view = await site.opened()
    for kind, levels in (
        (TopicKind.CATALOG, {"node": "edge-1", "function": "echo"}),
        (TopicKind.NODE_STATE, {"node": "edge-1"}),
        (TopicKind.NODE_LOAD, {"node": "edge-1"}),
    ):
        site.far.post(site.topics.build(kind, **levels), b"{")
    await site.broker.settle()
    assert choose(view, function="echo") == ["edge-1"]


async def test_a_client_of_a_tenant_is_told_that_it_may_not(topics):
    catalogue = topics.filter(TopicKind.CATALOG)
    broker = MemoryBroker(allows=lambda _, __, what: what != catalogue)
    async with MemorySession(broker=broker, client_id="pump-7") as session:
        await session.wait_connected()
        view = Site(broker, session, session, topics).view()
        for _ in range(2):
            with pytest.raises(PolicyDenied, match="may not ask nodes itself"):
                await view.open(30.0)
