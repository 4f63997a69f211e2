"""What a router believes of the catalogue: what a registry signed, and nothing else."""

import json
from typing import Any

import pytest

from broker.events import EventSource
from broker.security import SecurityAlarm
from broker.session.base import Message
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.signing import SigningKey, sign, verify
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import TrustState
from capability_schemas.wire import encode
from registry.search import CapabilitySearch
from router.catalogue import Fleet
from router.meaning import Meaning
from router.news import FleetNews, Frames
from router.people import People
from router.statistics import RouterStats
from support.capabilities import bare_record
from support.encoders import WordEncoder
from support.members import REGISTRY_KEY, make_book

NOW = 1_790_000_000_000
T = Topics()
KEY = ("edge-1", "echo")


class Upkeep:
    """Counts how often the picture changed."""

    def __init__(self):
        self.changes = 0

    def heard(self):
        pass

    def catalogue_changed(self):
        self.changes += 1


class Router:
    """News of a catalogue, from a broker that may say anything."""

    def __init__(self, broker, session, book):
        self.broker = broker
        self.stats = RouterStats()
        self.standing: list[tuple[str, bool]] = []
        self.fleet = Fleet()
        upkeep: Any = Upkeep()
        self.upkeep = upkeep
        events = EventSource(
            session=session, topics=T, source="router-1", component="router", clock=lambda: NOW
        )
        self.alarm = SecurityAlarm(events=events, own="router-1", clock=lambda: NOW)
        words: Any = WordEncoder()
        self.news = FleetNews(
            frames=Frames(T, self.stats),
            fleet=self.fleet,
            meaning=Meaning(search=CapabilitySearch(space=words.space), encoder=words),
            upkeep=upkeep,
            gone=lambda node, reason: None,
            people=People(topics=T, book=book),
            standing=lambda *told: self.standing.append(told),
            book=book,
            alarm=self.alarm,
            clock=lambda: NOW,
        )

    async def hear(self, record, key=None):
        await self.hear_bytes(encode(sign(record, key) if key is not None else record))

    async def hear_bytes(self, payload):
        topic = T.build(TopicKind.CATALOG, node=KEY[0], function=KEY[1])
        await self.news.on_catalog(Message(topic, payload, retain=True))

    def told(self):
        topic = T.build(TopicKind.EVENT, source="router-1", kind="audit")
        return [json.loads(message.payload)["data"] for message in self.broker.published(topic)]


@pytest.fixture
async def make_router():
    broker = MemoryBroker()
    async with MemorySession(broker=broker, client_id="router-1") as session:
        await session.wait_connected()
        yield lambda book: Router(broker, session, book)


@pytest.fixture
def router(make_router):
    return make_router(make_book(lambda: NOW))


def policy(*grants):
    return CapabilityPolicy(zones=("hall-3",), grants=grants)


async def test_a_record_that_the_registry_signed_is_kept(router):
    await router.hear(bare_record(policy=policy()), REGISTRY_KEY)
    assert router.fleet.records[KEY].policy == policy()
    assert not router.alarm.refused
    assert not router.stats.dropped


async def test_records_of_nobody_give_no_rights(router):
    wanted = bare_record(policy=policy("actuate"))
    genuine = json.loads(encode(sign(bare_record(policy=policy()), REGISTRY_KEY)))
    bent = genuine | {"policy": json.loads(encode(wanted))["policy"]}
    await router.hear(wanted)
    await router.hear(wanted.model_copy(update={"signature": "AAAA"}))
    await router.hear(wanted, SigningKey.generate())
    await router.hear(wanted.model_copy(update={"registry": "registry-2"}), REGISTRY_KEY)
    await router.hear_bytes(json.dumps(bent).encode())
    assert not router.fleet.records
    assert router.alarm.refused == {"record": 5}
    assert router.stats.dropped == {"signature": 5}
    told = router.told()
    assert [one["action"] for one in told] == ["signature_refused"] * 5
    assert {one["detail"]["what"] for one in told} == {"record edge-1/echo"}
    assert "registry-2, which is no registry here" in told[3]["detail"]["reason"]


async def test_a_forged_record_does_not_replace_the_genuine_one(router):
    genuine = bare_record(policy=policy())
    await router.hear(genuine, REGISTRY_KEY)
    await router.hear(bare_record(revision=9, policy=policy("actuate")), SigningKey.generate())
    assert router.fleet.records[KEY].policy == policy()
    await router.hear(bare_record(revision=2, policy=policy("camera")), REGISTRY_KEY)
    assert router.fleet.records[KEY].policy == policy("camera")


async def test_what_is_known_to_the_byte_is_not_checked_again(router, monkeypatch):
    checked = []

    def counting(payload, key):
        checked.append(payload)
        verify(payload, key)

    monkeypatch.setattr("router.news.verify", counting)
    first, second = bare_record(), bare_record(revision=2)
    for _ in range(3):
        await router.hear(first, REGISTRY_KEY)
    await router.hear(second, REGISTRY_KEY)
    assert len(checked) == 2
    assert router.upkeep.changes == 2
    await router.hear(first, REGISTRY_KEY)  # an older one is checked, and does not count
    assert router.fleet.records[KEY].revision == 2
    await router.hear_bytes(b"")
    assert not router.fleet.records
    await router.hear(second, REGISTRY_KEY)  # withdrawn and back again
    assert router.fleet.records[KEY].revision == 2
    assert len(checked) == 4


async def test_a_router_that_knows_no_registry_takes_the_brokers_word(make_router):
    router = make_router(None)
    await router.hear(bare_record())
    assert KEY in router.fleet.records


async def test_what_the_registry_says_of_a_member_is_passed_on(router):
    said = TrustState(member="router-2", state="revoked", at=NOW, registry="registry-1")
    topic = T.build(TopicKind.TRUST, member="router-2")
    forged = Message(topic, encode(sign(said, SigningKey.generate())), retain=True)
    await router.news.on_trust(forged)
    assert router.standing == [("router-2", False)]
    await router.news.on_trust(Message(topic, encode(sign(said, REGISTRY_KEY)), retain=True))
    assert router.standing[-1] == ("router-2", True)
