"""Two nodes with one id, on every broker: the second is refused, and the first goes on."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from broker.session.base import Message
from broker.session.mqtt import MqttSession
from broker.tenure import Tenant, Tenure, TenureSettings
from capability_schemas.errors import Conflict
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Invocation
from capability_schemas.node import LOST, NodeLoad, NodeState
from capability_schemas.topics import TopicKind
from capability_schemas.wire import decode, encode
from foam.simulation.runtime import FUNCTIONS, RUNTIME, SimulatedRuntime
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings
from router.catalogue import Fleet
from support.broker_site import BrokerSite

NODE = "edge-1"
CONNECT_S = 30.0

pytestmark = pytest.mark.timeout(120)

KINDS = [
    pytest.param("embedded_site", marks=pytest.mark.broker, id="embedded"),
    pytest.param(
        "mosquitto_site", marks=[pytest.mark.broker, pytest.mark.external_broker], id="mosquitto"
    ),
    pytest.param("nats_site", marks=[pytest.mark.broker, pytest.mark.external_broker], id="nats"),
]


class Life:
    """A process of the node: session, tenure, agent."""

    def __init__(self, site: BrokerSite, *, place: str, alone_at: str | None = None) -> None:
        self.session = MqttSession(
            settings=site.settings(NODE, client_id=NODE),
            will=lambda: self.agent.last_will(),  # noqa: PLW0108  # it is made below
        )
        epoch = now_ms()
        self.agent = NodeAgent(
            session=self.session,
            topics=site.topics,
            settings=NodeSettings(node=NODE, load_interval_s=0.5),
            functions=FUNCTIONS,
            runtimes={RUNTIME: SimulatedRuntime()},
            epoch=epoch,
            place=place,
        )
        self.tenure = Tenure(
            session=self.session,
            topics=site.topics,
            tenant=Tenant(identity=NODE, epoch=epoch, place=place, alone_at=alone_at),
            show=self.agent.show_passport,
            give_up=self.agent.give_up,
            settings=TenureSettings(doubt_s=5.0),
        )
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        await self._stack.enter_async_context(self.session)
        await self.session.wait_connected(CONNECT_S)
        await self._stack.enter_async_context(self.tenure)
        await self._stack.enter_async_context(self.agent)

    async def stop(self) -> None:
        await self._stack.aclose()

    async def die(self) -> None:
        """End as a killed process does."""
        await self.session.abort()
        self.agent.give_up()
        await self.stop()


class Watch:
    """A router that sees states and events, and asks the node to do something."""

    def __init__(self, site: BrokerSite, session: MqttSession, admin: MqttSession) -> None:
        self.site = site
        self.session = session
        self.admin = admin
        self.fleet = Fleet()
        self.lost: list[str] = []
        self.states: list[dict[str, Any]] = []
        self.audits: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []

    async def start(self) -> None:
        topics = self.site.topics
        for name, kind in (
            (self._on_state, TopicKind.NODE_STATE),
            (self._on_report, TopicKind.REPORT),
            (self._on_load, TopicKind.NODE_LOAD),
        ):
            await self.session.subscribe(topics.filter(kind), name)
        await self.admin.subscribe(topics.filter(TopicKind.EVENT), self._on_event)

    async def _on_state(self, message: Message) -> None:
        if message.payload:
            self.states.append(json.loads(message.payload))
            self._note(self.fleet.hear_state(decode(NodeState, message.payload), now_ms()))

    async def _on_load(self, message: Message) -> None:
        self._note(self.fleet.hear_load(decode(NodeLoad, message.payload), now_ms()))

    def _note(self, lost: str | None) -> None:
        if lost is not None:
            self.lost.append(lost)

    async def _on_report(self, message: Message) -> None:
        self.reports.append(json.loads(message.payload))

    async def _on_event(self, message: Message) -> None:
        if message.topic.endswith("/audit"):
            self.audits.append(json.loads(message.payload)["data"])

    def actions(self) -> list[str]:
        return [audit["action"] for audit in self.audits]

    def is_there(self, epoch: int) -> bool:
        return bool(self.states) and (self.states[-1]["state"], self.states[-1]["epoch"]) == (
            "birth",
            epoch,
        )

    def invoke(self, task: str) -> None:
        order = Invocation(
            task=task,
            client="pump-1",
            router="router-1",
            function="look_up",
            version="1.0.0",
            input={"key": task, "pieces": 0, "ms": 1},
            deadline=now_ms() + 60_000,
            reply=f"{self.site.topics.root}/reply/pump-1/{task}",
            sent_at=now_ms(),
        )
        topic = self.site.topics.build(TopicKind.INVOKE, node=NODE)
        self.session.post(topic, encode(order))

    def done(self, task: str) -> bool:
        return any(
            report["task"] == task and report["status"] == "finished" for report in self.reports
        )


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest) -> BrokerSite:
    found: BrokerSite = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def watch(site: BrokerSite) -> AsyncIterator[Watch]:
    router = MqttSession(settings=site.settings("router-1"))
    admin = MqttSession(settings=site.settings("admin-1"))
    async with router, admin:
        await router.wait_connected(CONNECT_S)
        await admin.wait_connected(CONNECT_S)
        made = Watch(site, router, admin)
        await made.start()
        yield made


async def test_the_second_is_refused_and_the_first_goes_on(
    site: BrokerSite, watch: Watch, eventually: Any
) -> None:
    first = Life(site, place="press-gw, process 7")
    await first.start()
    await eventually(lambda: watch.is_there(first.agent.epoch), timeout_s=30)
    second = Life(site, place="lab, process 9")
    with pytest.raises(Conflict, match="press-gw, process 7"):
        await second.start()
    await second.stop()
    await eventually(lambda: watch.actions() == ["identity_refused"], timeout_s=30)
    assert watch.audits[0]["detail"]["refused"] == "lab, process 9"
    await eventually(lambda: watch.is_there(first.agent.epoch), timeout_s=30)
    await eventually(lambda: first.session.connected, timeout_s=30)
    watch.invoke("after")
    await eventually(lambda: watch.done("after"), timeout_s=30)
    births = [state for state in watch.states if state["state"] == "birth"]
    assert {state["epoch"] for state in births} == {first.agent.epoch}
    assert first.tenure.running
    await first.stop()


async def test_a_process_that_was_killed_is_followed_by_the_next(
    site: BrokerSite, watch: Watch, eventually: Any
) -> None:
    first = Life(site, place="[ab12] gw, process 7")
    await first.start()
    await eventually(lambda: watch.is_there(first.agent.epoch), timeout_s=30)
    await first.die()
    second = Life(site, place="other, process 8")  # of another machine: it has to wait and see
    await second.start()
    await eventually(lambda: watch.is_there(second.agent.epoch), timeout_s=30)
    await second.die()
    third = Life(site, place="[ab12] gw, process 9", alone_at="[ab12] ")
    await third.start()
    await eventually(lambda: watch.is_there(third.agent.epoch), timeout_s=30)
    assert watch.actions() == []
    assert watch.fleet.node(NODE).live
    await third.stop()


async def test_of_two_that_start_together_one_stays(
    site: BrokerSite, watch: Watch, eventually: Any
) -> None:
    lives = [Life(site, place=f"host {number}") for number in range(2)]
    ends = await asyncio.gather(*(life.start() for life in lives), return_exceptions=True)
    for end in ends:
        assert end is None or isinstance(end, Conflict), end
    # Where the broker let both look before one of them had said anything, the later one takes over.
    await eventually(lambda: sum(life.tenure.running for life in lives) == 1, timeout_s=60)
    (left,) = [life for life in lives if life.tenure.running]
    (gone,) = [life for life in lives if life is not left]
    with contextlib.suppress(Conflict):
        await gone.stop()
    await eventually(lambda: left.session.connected, timeout_s=30)
    await eventually(lambda: watch.is_there(left.agent.epoch), timeout_s=30)
    watch.invoke("together")
    await eventually(lambda: watch.done("together"), timeout_s=30)
    await left.stop()


async def test_a_will_that_comes_late_kills_nobody(
    site: BrokerSite, watch: Watch, eventually: Any
) -> None:
    life = Life(site, place="gw")
    await life.start()
    await eventually(lambda: watch.fleet.node(NODE).live, timeout_s=30)
    said = len(watch.states)
    watch.lost.clear()
    for epoch, since in ((life.agent.epoch - 1, 1), (life.agent.epoch + 1, None)):
        late = NodeState(
            node=NODE, state="offline", epoch=epoch, at=1, reason=LOST, since=since, place="other"
        )
        topic = site.topics.build(TopicKind.NODE_STATE, node=NODE)
        await life.session.publish(topic, encode(late), retain=True)
    # The node hears what is said of it, and puts it right: a router that starts later is not
    # misled either.
    await eventually(lambda: len(watch.states) >= said + 3, timeout_s=30)
    await eventually(lambda: watch.is_there(life.agent.epoch), timeout_s=30)
    assert watch.lost == []
    assert watch.fleet.node(NODE).live
    await life.stop()


async def test_a_will_that_the_broker_lost_is_made_up_for_by_heartbeats(
    site: BrokerSite, watch: Watch, eventually: Any
) -> None:
    life = Life(site, place="gw")
    await life.start()
    await eventually(lambda: watch.fleet.node(NODE).load is not None, timeout_s=30)
    said = len(watch.states)
    await life.session.rest()  # the broker throws the will away, as if it had lost it
    gone: list[str] = []

    def silenced() -> bool:
        gone.extend(watch.fleet.silenced(now_ms()))
        return bool(gone)

    await eventually(silenced, timeout_s=30)
    assert gone == [NODE]
    assert len(watch.states) == said
    life.session.wake()
    await eventually(lambda: watch.fleet.node(NODE).live, timeout_s=30)
    await eventually(lambda: len(watch.states) > said, timeout_s=30)  # its birth, again
    assert watch.is_there(life.agent.epoch)
    await life.stop()
