"""Which routers live, as a member hears it."""

import pytest

from broker import presence
from broker.presence import RouterPresence
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.node import LOST, RouterState
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode


class Site:
    """A presence, and somebody who says what routers say."""

    def __init__(self, broker, session, far, topics):
        self.broker = broker
        self.session = session
        self.far = far
        self.topics = topics
        self.presence = RouterPresence(session=session, topics=topics)

    def say(self, router="router-1", state="birth", *, retain=True, **fields):
        said = RouterState(router=router, state=state, **{"epoch": 1, "at": 1, **fields})
        topic = self.topics.build(TopicKind.ROUTER_STATE, router=router)
        self.far.post(topic, encode(said), retain=retain)

    async def hear(self, *args, **fields):
        self.say(*args, **fields)
        await self.broker.settle()


@pytest.fixture
async def site(topics, monkeypatch):
    monkeypatch.setattr(presence, "_SETTLING_S", 0.0)
    broker = MemoryBroker()
    async with (
        MemorySession(broker=broker, client_id="pump-7") as session,
        MemorySession(broker=broker, client_id="router-1") as far,
    ):
        await session.wait_connected()
        await far.wait_connected()
        yield Site(broker, session, far, topics)


async def test_a_birth_counts_until_it_is_taken_back(site):
    assert await site.presence.listen()
    assert site.presence.absent
    assert not site.presence.bereft  # of what it never had
    await site.hear()
    assert not site.presence.absent
    assert site.presence.present() == "router-1"
    await site.hear(state="draining", at=2)
    assert site.presence.absent
    assert site.presence.bereft


async def test_the_will_of_an_earlier_start_says_nothing(site):
    await site.presence.listen()
    await site.hear(epoch=5)
    await site.hear(state="offline", epoch=4)
    assert site.presence.present() == "router-1"
    await site.hear(state="offline", epoch=5)
    assert site.presence.present() is None


async def test_the_will_of_one_that_was_refused_its_place_says_nothing(site):
    """It has a later epoch than the router that stays, and must not hide it for ever."""
    await site.presence.listen()
    await site.hear(epoch=5, since=5)
    await site.hear(state="offline", epoch=9, at=9, reason=LOST)
    assert site.presence.present() == "router-1"


async def test_who_hears_that_will_first_hears_the_router_all_the_same(site):
    await site.presence.listen()
    await site.hear(state="offline", epoch=9, at=9, reason=LOST)
    assert site.presence.bereft
    await site.hear(epoch=5, at=10, since=5)
    assert site.presence.present() == "router-1"


async def test_missed_heartbeats_end_it_and_the_kept_birth_does_not_revive_it(site, eventually):
    site.say(heartbeat_s=0.05)
    await site.presence.listen()
    await site.broker.settle()
    assert site.presence.present() == "router-1"
    await eventually(lambda: site.presence.bereft)
    again = await site.session.subscribe(
        site.topics.filter(TopicKind.ROUTER_STATE), site.presence._on_state, qos=0
    )
    await site.broker.settle()
    assert site.presence.bereft
    await site.session.unsubscribe(again)
    await site.hear(heartbeat_s=60.0, at=2, retain=False)
    assert site.presence.present() == "router-1"


async def test_a_member_that_was_cut_off_does_not_blame_the_routers(site, eventually, monkeypatch):
    monkeypatch.setattr(presence, "_SETTLING_S", 60.0)
    await site.presence.listen()
    await site.hear(heartbeat_s=0.05)
    await eventually(lambda: site.presence.bereft)
    site.broker.down()
    await eventually(lambda: not site.session.connected)
    assert not site.presence.absent
    assert not site.presence.bereft
    site.broker.up()
    await site.session.wait_connected()
    assert not site.presence.absent  # it has just begun to listen again


async def test_an_emptied_topic_forgets_a_router(site):
    await site.presence.listen()
    await site.hear()
    site.far.post(site.topics.build(TopicKind.ROUTER_STATE, router="router-1"), b"", retain=True)
    await site.broker.settle()
    assert not site.presence.bereft


async def test_what_a_router_forbade_holds_after_it(site):
    await site.presence.listen()
    await site.hear(direct=True)
    assert not site.presence.forbids
    await site.hear(direct=False, at=2)
    await site.hear(state="offline", direct=True, at=1)  # made before the rules were
    assert site.presence.forbids == "router-1"
    await site.hear(state="offline", direct=True, epoch=2)
    assert site.presence.forbids is None


async def test_waiting_ends_with_the_first_birth(site):
    await site.presence.listen()
    assert not await site.presence.wait_live(0.01)
    site.say()
    assert await site.presence.wait_live(30.0)
    site.say("router-2")
    await site.broker.settle()
    assert await site.presence.live(preferred="router-2") == ["router-2", "router-1"]


async def test_who_may_not_listen_knows_nothing(topics):
    states = topics.filter(TopicKind.ROUTER_STATE)
    broker = MemoryBroker(allows=lambda _, __, what: what != states)
    async with MemorySession(broker=broker, client_id="pump-7") as session:
        await session.wait_connected()
        found = RouterPresence(session=session, topics=topics)
        assert not await found.listen()
        assert not found.absent
        assert await found.live() == []
