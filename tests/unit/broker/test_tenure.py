"""Two processes with one identity: one stays, the other one says why it goes."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest

from broker.session.base import Will
from broker.session.memory import Action, MemoryBroker, MemorySession
from broker.tenure import Kind, Tenant, Tenure, TenureSettings
from capability_schemas.errors import Conflict
from capability_schemas.node import LOST, NodeState, RegistryState, RouterState
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode

NODE = "edge-1"
TOPIC = Topics().build(TopicKind.NODE_STATE, node=NODE)
TOPICS: dict[Kind, str] = {
    "node": TOPIC,
    "router": Topics().build(TopicKind.ROUTER_STATE, router=NODE),
    "registry": Topics().build(TopicKind.REGISTRY_STATE, registry=NODE),
}
MODELS: dict[Kind, type[NodeState | RouterState | RegistryState]] = {
    "node": NodeState,
    "router": RouterState,
    "registry": RegistryState,
}
QUICK = TenureSettings(look_s=0.05, doubt_s=0.3)


class PacedSession(MemorySession):
    """Waits before it connects again, as every session over a network does."""

    async def _pause(self, delay_s: float) -> None:
        await asyncio.sleep(0.1)


class Life:
    """A process that wants to be a node."""

    def __init__(
        self,
        broker: MemoryBroker,
        *,
        epoch: int,
        place: str = "",
        alone_at: str | None = None,
        will: bool = True,
        client_id: str = NODE,
        settings: TenureSettings = QUICK,
        kind: Kind = "node",
    ) -> None:
        self.kind = kind
        self.topic = TOPICS[kind]
        self.epoch = epoch
        self.place = place or f"host {epoch}"
        self.since: int | None = None
        self.muted = False
        self.connections = 0
        self.session = PacedSession(
            broker=broker, client_id=client_id, will=self._will if will else None
        )
        self.tenure = Tenure(
            session=self.session,
            topics=Topics(),
            tenant=Tenant(
                identity=NODE, kind=kind, epoch=epoch, place=self.place, alone_at=alone_at
            ),
            show=self.show,
            give_up=self.give_up,
            settings=settings,
        )

    def state(self, presence: Any = "birth", reason: str = "") -> bytes:
        said = {
            self.kind: NODE,
            "state": presence,
            "epoch": self.epoch,
            "at": self.connections,
            "reason": reason,
            "since": self.since,
            "place": self.place,
        }
        return encode(MODELS[self.kind].model_validate(said))

    def _will(self) -> Will:
        self.connections += 1
        return Will(self.topic, self.state("offline", LOST))

    def show(self) -> None:
        if not self.muted:
            self.session.announce(self.topic, self.state)

    def give_up(self) -> None:
        self.muted = True
        self.session.retract(self.topic)

    async def start(self, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(self.session)
        await self.session.wait_connected()
        await stack.enter_async_context(self.tenure)
        self.since = self.epoch
        self.show()


@pytest.fixture
async def stack() -> Any:
    async with AsyncExitStack() as made:
        yield made


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


def kept(broker: MemoryBroker) -> dict[str, Any]:
    told = [message.payload for message in broker.published(TOPIC)]
    return dict(json.loads(told[-1]))


def audits(broker: MemoryBroker) -> list[dict[str, Any]]:
    topic = Topics().build(TopicKind.EVENT, source=NODE, kind="audit")
    return [json.loads(message.payload)["data"] for message in broker.published(topic)]


async def test_an_identity_that_nobody_has_is_free(broker: MemoryBroker, stack: Any) -> None:
    life = Life(broker, epoch=1)
    await life.start(stack)
    assert life.tenure.running
    assert audits(broker) == []


async def test_the_second_is_refused_and_told_who_is_there(
    broker: MemoryBroker, stack: Any, eventually: Any
) -> None:
    first = Life(broker, epoch=1, place="press-gw, process 7")
    await first.start(stack)
    async with AsyncExitStack() as others:
        second = Life(broker, epoch=2)
        with pytest.raises(Conflict) as caught:
            await second.start(others)
    assert "press-gw, process 7" in caught.value.message
    assert "since 1970-01-01 00:00:00 UTC, epoch 1" in caught.value.message
    assert audits(broker)[0]["action"] == "identity_refused"
    assert audits(broker)[0]["detail"]["refused"] == "host 2"
    assert audits(broker)[0]["detail"]["holder"] == "press-gw, process 7"
    await eventually(lambda: first.session.connected)
    await eventually(lambda: kept(broker)["epoch"] == 1 and kept(broker)["state"] == "birth")
    assert first.tenure.running


@pytest.mark.parametrize("kind", ["router", "registry"])
async def test_routers_and_registries_keep_their_place_as_nodes_do(
    broker: MemoryBroker, stack: Any, kind: Kind, eventually: Any
) -> None:
    first = Life(broker, epoch=1, place="press-gw, process 7", kind=kind)
    await first.start(stack)
    async with AsyncExitStack() as others:
        second = Life(broker, epoch=2, kind=kind)
        with pytest.raises(Conflict, match="press-gw, process 7"):
            await second.start(others)
    assert audits(broker)[0]["action"] == "identity_refused"

    def last() -> dict[str, Any]:
        return dict(json.loads([m.payload for m in broker.published(first.topic)][-1]))

    await eventually(lambda: (last()["epoch"], last()["state"]) == (1, "birth"))
    assert first.tenure.running


@pytest.mark.parametrize("kind", ["router", "registry"])
async def test_what_others_of_a_kind_say_is_not_about_this_one(
    broker: MemoryBroker, stack: Any, kind: Kind
) -> None:
    async with MemorySession(broker=broker, client_id="another") as another:
        await another.wait_connected()
        word = {kind: "another", "state": "birth", "epoch": 9, "at": 9, "since": 9, "place": "x"}
        topic = TOPICS[kind].replace(NODE, "another")
        await another.publish(topic, encode(MODELS[kind].model_validate(word)), retain=True)
        life = Life(broker, epoch=1, kind=kind)
        await life.start(stack)
        await another.publish(topic, encode(MODELS[kind].model_validate(word)), retain=True)
        await broker.settle()
    assert life.tenure.running
    assert audits(broker) == []


async def test_one_that_came_after_a_crash_waits_and_is_let_in(
    broker: MemoryBroker, stack: Any
) -> None:
    first = Life(broker, epoch=1)
    await first.start(stack)
    await first.session.abort()
    second = Life(broker, epoch=2)
    await second.start(stack)
    assert second.tenure.running
    assert audits(broker) == []


@pytest.mark.parametrize("said", ["goodbye", "shared lock"])
async def test_nobody_waits_for_one_that_is_known_to_be_gone(
    broker: MemoryBroker, stack: Any, said: str
) -> None:
    first = Life(broker, epoch=1, place="[ab12] process 7")
    await first.start(stack)
    if said == "goodbye":
        await first.session.publish(TOPIC, first.state("offline", "stopped"), retain=True)
        await first.session.stop()
    else:
        await first.session.abort()
    patient = TenureSettings(look_s=0.05, doubt_s=3600)
    second = Life(broker, epoch=2, alone_at="[ab12] ", settings=patient)
    async with asyncio.timeout(20):
        await second.start(stack)


async def test_of_two_newcomers_the_one_that_started_first_stays(
    broker: MemoryBroker, eventually: Any
) -> None:
    lives = [Life(broker, epoch=epoch) for epoch in (2, 1)]
    ended: dict[int, BaseException | None] = {}

    async def live(one: Life) -> None:
        try:
            async with AsyncExitStack() as stack:
                await one.start(stack)
                ended[one.epoch] = None
                await asyncio.Event().wait()
        except Conflict as error:
            ended[one.epoch] = error

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        tasks = [group.create_task(live(one)) for one in lives]
        await eventually(lambda: len(ended) == 2)
        assert ended[1] is None
        assert isinstance(ended[2], Conflict)
        for task in tasks:
            task.cancel()


async def test_one_that_was_replaced_while_it_was_away_ends_without_a_word(
    broker: MemoryBroker, stack: Any, eventually: Any
) -> None:
    first = Life(broker, epoch=1)
    await first.start(stack)
    broker.hold(NODE)  # suspended, or cut off
    second = Life(broker, epoch=2, client_id="edge-1-b")
    await second.start(stack)
    said = len(audits(broker))
    broker.release(NODE)
    await eventually(lambda: first.tenure.crash is not None)
    with pytest.raises(Conflict, match="host 2"):
        await first.tenure.wait()
    assert first.muted
    assert audits(broker)[said]["action"] == "identity_taken"
    await eventually(lambda: kept(broker)["epoch"] == 2 and kept(broker)["state"] == "birth")
    assert second.tenure.running


async def test_what_an_earlier_process_says_is_put_right(
    broker: MemoryBroker, stack: Any, eventually: Any
) -> None:
    life = Life(broker, epoch=5)
    await life.start(stack)
    async with MemorySession(broker=broker, client_id="stray") as stray:
        await stray.wait_connected()
        earlier = NodeState(node=NODE, state="birth", epoch=4, at=1, since=1)
        await stray.publish(TOPIC, encode(earlier), retain=True)
        await eventually(lambda: kept(broker)["epoch"] == 5)
        await stray.publish(TOPIC, b"{", retain=True)
        await stray.publish(TOPIC, b"", retain=True)
    assert life.tenure.running


async def test_a_broker_that_does_not_let_it_look_is_believed(stack: Any) -> None:
    def allows(_: str, action: Action, topic: str) -> bool:
        return action == "publish" or topic != TOPIC

    life = Life(MemoryBroker(allows=allows), epoch=1)
    await life.start(stack)
    assert life.tenure.running
