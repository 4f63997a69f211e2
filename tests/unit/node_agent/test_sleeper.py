"""A node that sleeps: what it says, what it holds, and that it comes back."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Invocation
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from foam.simulation.runtime import FUNCTIONS, RUNTIME, SimulatedRuntime
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings, Sleep

NODE = "edge-1"
ASLEEP_S = 1.0


class World:
    """A node that sleeps, a router that asks it, and what the broker got."""

    def __init__(self, broker: MemoryBroker, topics: Topics, router: MemorySession) -> None:
        self.broker = broker
        self.topics = topics
        self.router = router

    def node(self, **cycle: Any) -> tuple[MemorySession, NodeAgent]:
        agents: list[NodeAgent] = []
        session = MemorySession(
            broker=self.broker,
            client_id=NODE,
            will=lambda: agents[0].last_will() if agents else None,
        )
        settings = NodeSettings(
            node=NODE,
            drain_timeout_s=0.1,
            sleep=Sleep(**({"awake_s": 0.1, "asleep_s": ASLEEP_S, "linger_s": 0.1} | cycle)),
        )
        agents.append(
            NodeAgent(
                session=session,
                topics=self.topics,
                settings=settings,
                functions=FUNCTIONS,
                runtimes={RUNTIME: SimulatedRuntime()},
                place="in a test",
            )
        )
        return session, agents[0]

    def states(self) -> list[dict[str, Any]]:
        topic = self.topics.build(TopicKind.NODE_STATE, node=NODE)
        sent = self.broker.published(topic)
        return [json.loads(message.payload) for message in sent if message.payload]

    def presence(self) -> list[str]:
        """Return what the node said of itself, repetitions left out."""
        told = [state["state"] for state in self.states()]
        return [one for number, one in enumerate(told) if number == 0 or told[number - 1] != one]

    def is_away(self) -> bool:
        """Tell whether it has said that it sleeps, and gone."""
        return self.presence()[-1:] == ["sleeping"] and NODE not in self.broker.clients()

    def claims(self) -> list[dict[str, Any]]:
        topic = self.topics.build(TopicKind.CAPABILITY, node=NODE, function="recite")
        sent = self.broker.published(topic)
        return [json.loads(message.payload) for message in sent if message.payload]

    def reports(self) -> list[str]:
        topic = self.topics.build(TopicKind.REPORT, router="router-1", node=NODE)
        return [json.loads(message.payload)["status"] for message in self.broker.published(topic)]

    def invoke(self, task: str = "t1", *, ms: int = 1) -> None:
        order = Invocation(
            task=task,
            client="pump-7",
            router="router-1",
            function="recite",
            version="1.0.0",
            input={"key": task, "pieces": 3, "ms": ms},
            deadline=now_ms() + 60_000,
            reply=f"{self.topics.root}/reply/pump-7/{task}",
            sent_at=now_ms(),
        )
        self.router.post(self.topics.build(TopicKind.INVOKE, node=NODE), encode(order))


@pytest.fixture
async def world(topics: Topics) -> AsyncIterator[World]:
    broker = MemoryBroker()
    async with MemorySession(broker=broker, client_id="router-1") as router:
        await router.wait_connected()
        yield World(broker, topics, router)


async def test_an_idle_node_says_when_it_is_back_goes_and_is_back(
    world: World, eventually: Any
) -> None:
    session, agent = world.node()
    async with session, agent:
        await eventually(lambda: "birth" in world.presence())
        await eventually(world.is_away)
        asleep = world.states()[-1]
        assert asleep["state"] == "sleeping"
        assert asleep["wake_at"] - asleep["at"] == ASLEEP_S * 1000
        assert (asleep["epoch"], asleep["place"]) == (agent.epoch, "in a test")
        assert asleep["since"] is not None
        await eventually(lambda: NODE in world.broker.clients())
        await eventually(lambda: world.presence()[:3] == ["birth", "sleeping", "birth"])
        world.invoke()
        await eventually(lambda: "finished" in world.reports())
    assert "offline" in world.presence()[-1]  # said by itself: nobody published a will
    assert world.states()[-1]["reason"] == "stopped"
    assert all(state["reason"] != "connection lost" for state in world.states())


async def test_its_claims_are_leased_until_it_is_back(world: World, eventually: Any) -> None:
    session, agent = world.node(asleep_s=900)
    async with session, agent:
        await eventually(lambda: "birth" in world.presence())
        await eventually(world.is_away)
        lease_ms = world.claims()[-1]["expires_at"] - world.states()[-1]["wake_at"]
        assert lease_ms >= 100_000
        assert world.claims()[-1]["revision"] > world.claims()[0]["revision"]


async def test_a_node_that_is_left_in_its_sleep_comes_back_to_say_goodbye(
    world: World, eventually: Any
) -> None:
    session, agent = world.node(asleep_s=900)
    async with session, agent:
        await eventually(lambda: "birth" in world.presence())
        await eventually(world.is_away)
    assert world.presence()[-1] == "offline"
    withdrawn = world.broker.published(
        world.topics.build(TopicKind.CAPABILITY, node=NODE, function="recite")
    )
    assert withdrawn[-1].payload == b""


async def test_work_keeps_it_awake(world: World, eventually: Any) -> None:
    session, agent = world.node(asleep_s=900)
    async with session, agent:
        await eventually(lambda: "birth" in world.presence())
        for number in range(5):
            world.invoke(f"t{number}", ms=60)
            await eventually(lambda number=number: world.reports().count("finished") > number)
            assert "sleeping" not in world.presence()
        world.invoke("long", ms=400)  # longer than it stays awake with nothing to do
        await eventually(lambda: world.reports().count("finished") == 6)
        await eventually(world.is_away)


async def test_at_the_limit_it_hands_its_work_back_before_it_goes(
    world: World, eventually: Any
) -> None:
    session, agent = world.node(asleep_s=900, awake_limit_s=2)  # time to be given the work
    async with session, agent:
        await eventually(lambda: "birth" in world.presence())
        world.invoke(ms=60_000)
        await eventually(world.is_away)
    assert world.presence()[:3] == ["birth", "draining", "sleeping"]
    assert "failed" in world.reports()
    assert agent.counters.failed == 1


async def test_what_comes_while_it_goes_is_turned_away(world: World, eventually: Any) -> None:
    session, agent = world.node(asleep_s=900, linger_s=10)
    async with session, agent:
        await eventually(lambda: "birth" in world.presence())
        await eventually(lambda: "sleeping" in world.presence())
        world.invoke()
        await eventually(lambda: world.reports() == ["refused"])


async def test_a_node_that_was_told_to_drain_does_not_sleep(world: World, eventually: Any) -> None:
    session, agent = world.node()
    async with session, agent:
        await eventually(lambda: "birth" in world.presence())
        assert await agent.drain()
        await eventually(lambda: world.presence()[-1:] == ["draining"])
        agent.undrain()
        await eventually(lambda: "sleeping" in world.presence())
    assert world.presence()[:4] == ["birth", "draining", "birth", "sleeping"]
