"""Cascades over a real broker with real nodes, as a device sees them that knows MQTT only."""

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from broker.session.mqtt import MqttSession
from capability_schemas.capability import CapabilityPolicy, Cost, Resources
from capability_schemas.errors import InvalidTask
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from foam.sdk.client import MeshClient
from mqtt_probe import Probe
from node_agent.agent import NodeAgent
from node_agent.announcer import offline_will
from node_agent.settings import NodeSettings
from registry.encoders import EncoderThread
from registry.search import CapabilitySearch
from router import Ledger, RouterService, RouterSettings
from support.capabilities import make_record
from support.encoders import WordEncoder

pytestmark = pytest.mark.broker

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
SURENESS = ROOT / "tests" / "data" / "functions" / "sureness.py"
SMALL, LARGE = 1_000_000, 8_000_000
DEVICE = "pump-1"


class Mesh:
    """A router, two nodes and a device on one broker."""

    def __init__(self, stack, site, path, eventually):
        self.stack = stack
        self.site = site
        self.topics = site.topics
        self.path = path
        self.eventually = eventually
        self.words = WordEncoder()
        self.agents = {}
        self.sessions = {}
        self.catalogue = []
        self.learnt = []

    async def session(self, identity):
        session = MqttSession(settings=self.site.settings(identity))
        await self.stack.enter_async_context(session)
        await session.wait_connected(15)
        return session

    async def start(self):
        self.registry = await self.session("registry-1")
        self.stack.push_async_callback(self.clean)
        self.ledger = Ledger(path=self.path / "router.sqlite")
        await self.stack.enter_async_context(self.ledger)
        encoder = await self.stack.enter_async_context(EncoderThread(encoder=self.words))
        self.router = RouterService(
            session=await self.session("router-1"),
            topics=self.topics,
            search=CapabilitySearch(space=self.words.space),
            encoder=encoder,
            ledger=self.ledger,
            router_id="router-1",
            settings=RouterSettings(
                settle_ms=500, report_timeout_ms=20_000, calibration_delay_s=3_600
            ),
        )
        learn = self.router.routing.learn

        def note(node, function, verdict, now, *, took_ms=None):
            assert took_ms >= 0
            self.learnt.append((node, verdict))
            learn(node, function, verdict, now, took_ms=took_ms)

        self.router.routing.learn = note  # type: ignore[method-assign]  # a spy
        await self.stack.enter_async_context(self.router)
        self.device = await Probe.open(
            self.site.port, DEVICE, username=DEVICE, password=self.site.passwords[DEVICE]
        )
        self.stack.push_async_callback(self.device.disconnect)
        await self.device.subscribe(self.topics.filter(TopicKind.REPLY, client=DEVICE))

    async def clean(self):
        """Leave nothing retained on a broker that others use."""
        for topic in self.catalogue:
            await self.registry.publish(topic, b"", retain=True)

    async def node(self, name, entry, memory_bytes, *, first_ms=None, cost=0.0, **policy):
        """Start a node whose function ``think`` is a function of the module, or the model."""
        model = {"runtime": "llama_cpp", "model": str(MODEL)} if entry == "model" else {}
        spec = FunctionSpec.model_validate(
            {
                "name": "think",
                "description": "think about a text",
                "cost": {"money": cost},
                **(model or {"entry": f"{SURENESS}:{entry}"}),
            }
        )
        self.sessions[name] = session = await self.session(name)
        agent = NodeAgent(
            session=session,
            topics=self.topics,
            settings=NodeSettings(node=name, cancel_grace_s=1.0, drain_timeout_s=1.0),
            functions=[spec],
        )
        self.agents[name] = await self.stack.enter_async_context(agent)
        record = make_record(
            self.words,
            name,
            spec.name,
            epoch=agent.epoch,
            description=spec.description,
            resources=Resources(memory_bytes=memory_bytes, first_ms=first_ms),
            cost=Cost(money=cost),
            policy=CapabilityPolicy(**policy),
        )
        topic = self.topics.build(TopicKind.CATALOG, node=name, function=spec.name)
        self.catalogue.append(topic)
        await self.registry.publish(topic, encode(record), retain=True)
        await self.eventually(
            lambda: (
                (name, "think") in self.router.fleet.records and self.router.fleet.node(name).live
            )
        )

    async def ask(self, **fields):
        """Send a task as the device and return all its events, some time after the last."""
        task = {"id": "t", "function": "think", "min_confidence": 0.6, "timeout_ms": 60_000}
        topic = self.topics.build(TopicKind.TASK, client=DEVICE)
        await self.device.publish(topic, json.dumps({**task, "text": "it", **fields}).encode())
        await self.eventually(lambda: self.events()[-1:] and is_final(self.events()[-1]))
        await self.eventually(lambda: len(self.router.dispatcher) == 0)
        await self.device.ping()
        return self.events()

    def events(self):
        return [json.loads(message.payload) for message in self.device.got]

    async def decision(self):
        """Return what the ledger keeps on the cascade of the task."""
        kept = await self.ledger.explanation("t")
        assert kept is not None
        _, explanation = kept
        assert explanation is not None
        assert explanation["chosen"] == explanation["cascade"]["asked"][0] == ["edge-1", "think"]
        return explanation["cascade"]


def is_final(event):
    return event["event"] in ("result", "error")


def told(events):
    """Return the kinds of events, after checking what a client relies on."""
    finals = [event for event in events if is_final(event)]
    assert len(finals) == 1
    numbered = [event["seq"] for event in events if "seq" in event]
    assert sorted(numbered) == list(range(len(numbered)))
    assert finals[0]["seq"] == max(numbered)
    return [event["event"] for event in events if event["event"] != "working"]


@pytest.fixture
async def mesh(embedded_site, tmp_path, eventually):
    async with AsyncExitStack() as stack:
        made = Mesh(stack, embedded_site, tmp_path, eventually)
        await made.start()
        yield made


async def test_an_unsure_answer_goes_one_step_up(mesh):
    await mesh.node("edge-1", "judge", SMALL, cost=0.002)
    await mesh.node("edge-2", "aloud", LARGE, cost=0.01)
    events = await mesh.ask()
    assert told(events) == ["accepted", "routed", "routed", "chunk", "chunk", "result"]
    small, large = (event for event in events if event["event"] == "routed")
    assert (small["node"], large["node"], large["attempt"]) == ("edge-1", "edge-2", 2)
    assert small["reason"].startswith("step 1 of at most 2: ")
    assert large["reason"] == "step 2 of at most 2: confidence 0.30 below 0.60; spent 0.002"
    result = events[-1]
    assert (result["output"], result["node"], result["confidence"]) == (
        "well, perhaps",
        "edge-2",
        0.9,
    )
    steps = [(step["node"], step["confidence"], step["cost"]) for step in result["cascade"]]
    assert steps == [("edge-1", 0.3, 0.002), ("edge-2", 0.9, 0.01)]
    assert result["usage"]["cost"] == 0.01
    assert mesh.agents["edge-1"].counters.unsure == 1
    assert (mesh.router.stats.escalated, mesh.router.stats.rerouted) == (1, 0)
    assert mesh.learnt == [("edge-1", "unsure"), ("edge-2", "good")]


async def test_a_sure_answer_stays_where_it_was_given(mesh):
    await mesh.node("edge-1", "judge", SMALL)
    await mesh.node("edge-2", "aloud", LARGE)
    events = await mesh.ask(input={"sure": 0.7})
    assert told(events) == ["accepted", "routed", "result"]
    result = events[-1]
    assert (result["output"], result["seq"]) == ("judged it", 0)
    assert [step["confidence"] for step in result["cascade"]] == [0.7]
    assert mesh.agents["edge-2"].counters.finished == 0


async def test_private_data_do_not_leave_for_a_surer_answer(mesh):
    await mesh.node("edge-1", "judge", SMALL)
    await mesh.node("edge-2", "aloud", LARGE, external=True)
    events = await mesh.ask(policy={"data": "private"})
    assert told(events) == ["accepted", "routed", "result"]
    assert (events[-1]["node"], events[-1]["confidence"]) == ("edge-1", 0.3)
    (veto,) = (await mesh.decision())["vetoed"]
    assert (veto["node"], veto["why"].partition(":")[0]) == ("edge-2", "privacy")
    assert mesh.agents["edge-2"].counters.finished == 0


async def test_the_same_data_leave_when_they_are_public(mesh):
    await mesh.node("edge-1", "judge", SMALL)
    await mesh.node("edge-2", "aloud", LARGE, external=True)
    events = await mesh.ask(policy={"data": "public"})
    assert (events[-1]["node"], events[-1]["output"]) == ("edge-2", "well, perhaps")


@pytest.mark.parametrize(
    ("changes", "told_why"),
    [
        ({"policy": CapabilityPolicy(external=True)}, "outside the site by now"),
        ({"policy": CapabilityPolicy(data=("public",))}, "not cleared for internal data"),
        ({"cost": Cost(money=0.9)}, "costs 0.9 by now"),
        ({"version": "2.0.0"}, "no longer offers"),
    ],
)
async def test_what_has_changed_since_the_choice_counts_at_the_next_step(mesh, changes, told_why):
    await mesh.node("edge-1", "judge", SMALL)
    await mesh.node("edge-2", "aloud", LARGE)
    select, objection = mesh.router.routing.select, mesh.router.routing.objection
    objections = []

    def select_and_change(*args, **options):
        selection = select(*args, **options)
        records = mesh.router.fleet.records
        records["edge-2", "think"] = records["edge-2", "think"].model_copy(update=changes)
        return selection

    def noted(*args):
        objections.append(objection(*args))
        return objections[-1]

    mesh.router.routing.select, mesh.router.routing.objection = select_and_change, noted
    events = await mesh.ask(policy={"data": "internal"})
    assert told(events) == ["accepted", "routed", "result"]
    assert (events[-1]["node"], events[-1]["confidence"]) == ("edge-1", 0.3)
    (error,) = objections
    assert told_why in error.message
    assert mesh.agents["edge-2"].counters.finished == 0


@pytest.mark.parametrize(
    ("first_ms", "cost", "policy", "veto"),
    [(60_000.0, 0.2, {}, "time"), (None, 0.2, {"max_cost": 0.3}, "budget")],
)
async def test_no_step_is_taken_that_time_or_budget_does_not_allow(
    mesh, first_ms, cost, policy, veto
):
    await mesh.node("edge-1", "judge", SMALL, first_ms=first_ms, cost=cost)
    await mesh.node("edge-2", "aloud", LARGE, first_ms=first_ms, cost=cost)
    events = await mesh.ask(timeout_ms=100_000, policy=policy)
    assert told(events) == ["accepted", "routed", "result"]
    assert (events[-1]["node"], events[-1]["confidence"]) == ("edge-1", 0.3)
    (vetoed,) = (await mesh.decision())["vetoed"]
    assert vetoed["why"].partition(":")[0] == veto


@pytest.mark.parametrize("small", ["judge", "long_winded"])
async def test_when_the_next_step_fails_the_first_answer_counts(mesh, small):
    await mesh.node("edge-1", small, SMALL)
    await mesh.node("edge-2", "broken", LARGE)
    events = await mesh.ask()
    assert told(events) == ["accepted", "routed", "routed", "result"]
    result = events[-1]
    assert (result["node"], result["function"], result["confidence"]) == ("edge-1", "think", 0.3)
    assert result["output"] in ("judged it", "so to say " * 10_000)
    assert [step["node"] for step in result["cascade"]] == ["edge-1"]
    assert mesh.device.got[-1].topic.endswith("/router-1")
    assert mesh.agents["edge-2"].counters.failed == 1
    assert mesh.learnt == [("edge-1", "unsure"), ("edge-2", "failed")]
    # The draft is the outcome of the task for whoever asks again.
    await mesh.device.publish(
        mesh.topics.build(TopicKind.TASK, client=DEVICE), b'{"id": "t", "text": "again"}'
    )
    await mesh.eventually(lambda: len(mesh.device.got) > len(events))
    assert mesh.events()[-1] == result


async def test_when_the_next_node_is_lost_the_first_answer_counts(mesh):
    await mesh.node("edge-1", "judge", SMALL)
    await mesh.node("edge-2", "endless", LARGE)

    async def lose():
        await mesh.eventually(lambda: mesh.router.fleet.node("edge-2").assigned)
        will = offline_will(
            topics=mesh.topics, node="edge-2", epoch=mesh.agents["edge-2"].epoch, at=now_ms()
        )
        await mesh.sessions["edge-2"].publish(will.topic, will.payload, retain=True)

    mesh.router.spawn(lose(), name="lose")
    events = await mesh.ask()
    # The last one is the fence: what the lost node may say yet is of a lower attempt.
    assert told(events) == ["accepted", "routed", "routed", "routed", "result"]
    assert (events[-1]["node"], events[-1]["attempt"]) == ("edge-1", 3)
    assert mesh.learnt == [("edge-1", "unsure"), ("edge-2", "lost")]
    await mesh.eventually(lambda: mesh.agents["edge-2"].counters.dropped == 1)


async def test_when_time_runs_out_the_first_answer_counts(mesh):
    await mesh.node("edge-1", "judge", SMALL)
    await mesh.node("edge-2", "endless", LARGE)
    events = await mesh.ask(timeout_ms=8_000)
    assert told(events)[-1] == "result"
    assert (events[-1]["node"], events[-1]["output"]) == ("edge-1", "judged it")


async def test_a_client_that_cancels_gets_no_draft(mesh):
    await mesh.node("edge-1", "judge", SMALL)
    await mesh.node("edge-2", "endless", LARGE)

    async def cancel():
        await mesh.eventually(lambda: mesh.router.fleet.node("edge-2").assigned)
        topic = mesh.topics.build(TopicKind.CANCEL, client=DEVICE)
        await mesh.device.publish(topic, b'{"task": "t"}')

    mesh.router.spawn(cancel(), name="cancel")
    events = await mesh.ask()
    told(events)
    assert (events[-1]["event"], events[-1]["code"]) == ("error", "cancelled")


async def test_the_client_library_tells_the_steps(mesh):
    await mesh.node("edge-1", "judge", SMALL, cost=0.002)
    await mesh.node("edge-2", "aloud", LARGE, cost=0.01)
    secret = mesh.site.passwords["pump-2"]
    async with MeshClient(mesh.site.url, username="pump-2", password=secret) as client:
        handle = await client.submit(
            "it", function="think", min_confidence=0.6, prefer="cheapest", weights={"cost": 1.0}
        )
        assert [text async for text in handle.text()] == ["well, ", "perhaps"]
        result = await handle.result()
        assert [step.node for step in result.cascade or ()] == ["edge-1", "edge-2"]
        assert handle.routed is not None
        assert handle.routed.reason.startswith("step 2 of at most 2")
        value: Any
        for field, value in (
            ("prefer", "dearest"),
            ("weights", {"cost": 2}),
            ("weights", {"x": 1}),
        ):
            with pytest.raises(InvalidTask, match=field):
                await client.submit("it", **{field: value})


@pytest.mark.llm
async def test_a_small_model_tells_how_sure_it_is(mesh):
    await mesh.node("edge-1", "model", SMALL)
    await mesh.node("edge-2", "judge", LARGE)
    events = await mesh.ask(text="What should I do? pump-3 flow keeps falling.", min_confidence=1.0)
    assert told(events) == ["accepted", "routed", "routed", "result"]
    first, second = events[-1]["cascade"]
    assert (first["node"], second["node"]) == ("edge-1", "edge-2")
    assert 0 < first["confidence"] < 1
