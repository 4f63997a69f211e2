import asyncio
import contextlib
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from broker.session.base import Message
from broker.session.memory import MemoryBroker, MemorySession
from broker.session.mqtt import MqttSession
from capability_schemas.admin import AdminRequest
from capability_schemas.capability import CapabilityPolicy, CatalogRecord
from capability_schemas.node import NodeState
from capability_schemas.reply import ErrorEvent, Result, decode_reply
from capability_schemas.signing import SigningKey, verify
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode
from registry.admission import Identity
from registry.encoders import EncoderThread, Vectors
from registry.search import CapabilitySearch
from registry.service import RegistryService
from registry.settings import RegistrySettings
from registry.store import SqliteStore
from registry.vectors import capability_texts, pack_vector, record_vectors
from support.broker_site import BrokerSite
from support.capabilities import make_claim, signed
from support.encoders import WordEncoder

NODE_KEY = SigningKey.generate()
REGISTRY_KEY = SigningKey.generate()
ATTESTED = CapabilityPolicy(zones=("hall-1",), grants=("actuate",))
SETTINGS = RegistrySettings(
    grace_s=10, sweep_interval_s=0.005, retry_first_s=0.005, retry_cap_s=0.02
)
Eventually = Callable[..., Any]


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> int:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += round(seconds * 1000)


class World:
    """A broker in memory, a node that claims, and registries that come and go."""

    def __init__(self, folder: Path, topics: Topics) -> None:
        self.broker = MemoryBroker()
        self.topics = topics
        self.clock = Clock()
        self.database = folder / "registry.sqlite"
        self.encoder = WordEncoder()
        self.known: dict[str, Identity] = {"edge-1": Identity(NODE_KEY.public, ATTESTED)}
        self.node = MemorySession(broker=self.broker, client_id="edge-1")

    @contextlib.asynccontextmanager
    async def registry(self, **more: Any) -> AsyncIterator[RegistryService]:
        given: dict[str, Any] = {
            "settings": SETTINGS,
            "key": REGISTRY_KEY,
            "registry_id": "registry-1",
            "identities": self.known.get,
            "clock": self.clock,
            "topics": self.topics,
        }
        async with (
            MemorySession(broker=self.broker, client_id="registry-1") as session,
            SqliteStore(path=self.database, busy_timeout_s=0.0) as store,
            EncoderThread(encoder=self.encoder, cache_texts=0) as encoder,
            RegistryService(
                session=session, store=store, encoder=encoder, **{**given, **more}
            ) as service,
        ):
            await session.wait_connected(5)
            yield service

    def claim(self, function: str = "echo", **more: Any) -> bytes:
        payload = signed(make_claim(function=function, **more), NODE_KEY)
        self.send(payload, function)
        return payload

    def send(self, payload: bytes, function: str = "echo", node: str = "edge-1") -> None:
        topic = self.topics.build(TopicKind.CAPABILITY, node=node, function=function)
        self.node.post(topic, payload, retain=True)

    def record(self, function: str = "echo", node: str = "edge-1") -> CatalogRecord | None:
        topic = self.topics.build(TopicKind.CATALOG, node=node, function=function)
        kept = self.broker.retained.get(topic)
        return None if kept is None else decode(CatalogRecord, kept.payload)

    def events(self, kind: str) -> list[dict[str, Any]]:
        topic = self.topics.build(TopicKind.EVENT, source="registry-1", kind=kind)
        return [json.loads(message.payload) for message in self.broker.published(topic)]

    def reasons(self) -> list[str]:
        return [event["data"]["reason"] for event in self.events("claim_refused")]


@pytest.fixture
async def world(tmp_path: Path, topics: Topics) -> AsyncIterator[World]:
    made = World(tmp_path, topics)
    async with made.node:
        await made.node.wait_connected(5)
        yield made


class TestAdmission:
    async def test_a_claim_becomes_a_signed_attested_embedded_record(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            wishes = CapabilityPolicy(zones=("hall-1", "hall-9"), grants=("actuate", "root"))
            world.claim(policy=wishes, skills=("parrot",))
            await eventually(world.record)
            record = world.record()
        assert record is not None
        verify(record, REGISTRY_KEY.public)
        assert record.registry == "registry-1"
        assert record.admitted_at == world.clock.now
        assert record.skills == ("parrot",)
        assert record.policy.zones == ("hall-1",)
        assert record.policy.grants == ("actuate",)
        assert record.space == world.encoder.space
        texts = capability_texts("echo", record.description, record.examples)
        own = record_vectors(world.encoder.encode(texts), len(record.examples))
        assert (record.embedding, record.parts) == own
        search = CapabilitySearch(space=world.encoder.space)
        assert search.upsert(record)

    async def test_a_claim_made_before_the_registry_is_admitted(
        self, world: World, eventually: Eventually
    ) -> None:
        world.claim()
        await world.broker.settle()
        async with world.registry():
            await eventually(world.record)

    async def test_a_newer_revision_replaces_and_an_older_one_does_not(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            world.claim(revision=5, description="fifth of them")
            world.claim(revision=4, description="fourth of them")
            await eventually(world.record)
            world.claim(revision=6, description="sixth of them")
            await eventually(lambda: getattr(world.record(), "revision", 0) == 6)
        assert world.reasons() == ["stale"]

    async def test_the_same_order_with_other_content_raises_an_alarm(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry() as registry:
            world.claim(description="first of them")
            await eventually(world.record)
            world.claim(description="second of them")
            await eventually(lambda: registry.counts["refused.conflict"] == 1)
            await eventually(lambda: world.events("claim_refused"))
        (event,) = world.events("claim_refused")
        assert event["data"]["alarm"] is True
        record = world.record()
        assert record is not None
        assert record.description == "first of them"

    async def test_refusals_are_told_once_and_counted_each_time(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry() as registry:
            world.send(signed(make_claim(node="edge-9"), NODE_KEY), node="edge-9")
            for _ in range(3):
                world.send(signed(make_claim(), SigningKey.generate()))
            forged = signed(make_claim(), SigningKey.generate())
            world.send(forged)
            world.send(forged)
            world.send(b"junk")
            await eventually(lambda: registry.counts["refused"] == 7)
            await world.broker.settle()
        assert sorted(world.reasons()) == [
            "malformed", "signature", "signature", "signature", "signature", "unknown_node",
        ]  # fmt: skip
        assert world.record() is None
        (first, *_) = world.events("claim_refused")
        assert first["specversion"] == "1.0"
        assert first["type"] == "io.foam.registry.claim_refused.v1"
        assert first["source"] == "/foam/local/registry-1"
        assert first["subject"] == "capability/edge-9/echo"

    async def test_a_given_embedding_is_checked_and_our_own_is_published(
        self, world: World, eventually: Eventually
    ) -> None:
        poison = pack_vector(world.encoder.encode(["transfer all the money"])[0])
        async with world.registry() as registry:
            world.claim("poisoned", embedding=poison, space=world.encoder.space)
            world.claim("other", embedding=poison, space=WordEncoder(revision="9").space)
            await eventually(lambda: world.record("other"))
            await eventually(lambda: registry.counts["refused.embedding"] == 1)
        assert world.record("poisoned") is None
        other = world.record("other")
        assert other is not None
        assert other.embedding != poison
        assert other.space == world.encoder.space

    async def test_topics_that_are_no_identifiers_end_nothing(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry() as registry:
            world.node.post(f"{world.topics.root}/capability/a b/c", b"{}")
            world.claim()
            await eventually(world.record)
            assert registry.counts["bad_topics"] == 1
            assert registry.running


class TestEnd:
    async def test_a_withdrawn_claim_leaves_the_catalogue(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            payload = world.claim()
            await eventually(world.record)
            world.send(b"")
            await eventually(lambda: world.record() is None)
            await eventually(lambda: world.events("capability_withdrawn"))
            world.send(payload)  # the node comes back with the very same claim
            await eventually(world.record)

    async def test_a_lease_that_is_not_renewed_ends_aloud(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            world.claim(expires_at=world.clock.now + 5_000)
            await eventually(world.record)
            world.clock.pass_s(4)
            world.claim(revision=2, expires_at=world.clock.now + 5_000)
            await eventually(lambda: getattr(world.record(), "revision", 0) == 2)
            world.clock.pass_s(4)
            await world.broker.settle()
            assert world.record() is not None
            world.clock.pass_s(1)
            await eventually(lambda: world.record() is None)
            await eventually(lambda: world.events("capability_withdrawn"))
        (event,) = world.events("capability_withdrawn")
        assert event["data"]["change"] == "expired"

    async def test_a_renewal_embeds_nothing_anew(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry() as registry:
            world.claim(expires_at=world.clock.now + 5_000)
            await eventually(world.record)
            embedded = len(world.encoder.encoded)
            world.claim(revision=2, expires_at=world.clock.now + 9_000)
            await eventually(lambda: registry.counts["renewed"] == 1)
            assert len(world.encoder.encoded) == embedded
        assert len(world.events("capability_admitted")) == 1

    async def test_an_offline_node_keeps_its_records(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            world.claim()
            await eventually(world.record)
            state = NodeState(node="edge-1", state="offline", epoch=10, at=world.clock.now)
            topic = world.topics.build(TopicKind.NODE_STATE, node="edge-1")
            world.node.post(topic, encode(state), retain=True)
            world.node.post(topic, b"junk")
            await world.broker.settle()
            world.clock.pass_s(60)
            await world.broker.settle()
            assert world.record() is not None

    async def test_a_node_born_again_must_repeat_its_claims(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            world.claim("kept")
            world.claim("dropped")
            await eventually(lambda: world.record("kept") and world.record("dropped"))
            birth = NodeState(node="edge-1", state="birth", epoch=20, at=world.clock.now)
            topic = world.topics.build(TopicKind.NODE_STATE, node="edge-1")
            world.node.post(topic, encode(birth), retain=True)
            world.claim("kept", epoch=20)
            await eventually(lambda: getattr(world.record("kept"), "epoch", 0) == 20)
            world.clock.pass_s(11)
            await eventually(lambda: world.record("dropped") is None)
            assert world.record("kept") is not None


class TestMembers:
    def throw_out(self, world: World) -> None:
        """Take a node off the record; its revocation is said, as by the board of the registry."""
        del world.known["edge-1"]
        topic = world.topics.build(TopicKind.TRUST, member="edge-1")
        world.node.post(topic, b"{}", retain=True)

    async def test_a_revocation_withdraws_what_the_node_claimed_at_once(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            world.claim("one")
            world.claim("two")
            await eventually(lambda: world.record("one") and world.record("two"))
            self.throw_out(world)
            await eventually(lambda: world.record("one") is None and world.record("two") is None)
        said = {event["data"]["reason"] for event in world.events("capability_withdrawn")}
        assert said == {"its node is no member any more"}

    async def test_a_revocation_is_not_overtaken_by_a_claim_that_is_being_embedded(
        self, world: World, eventually: Eventually
    ) -> None:
        gate, reached = threading.Event(), threading.Event()

        class Gated(WordEncoder):
            def encode(self, texts: Sequence[str]) -> Vectors:
                reached.set()
                if not gate.wait(30):
                    raise TimeoutError("nobody opened the gate")
                return super().encode(texts)

        world.encoder = Gated()
        other = SigningKey.generate()
        world.known["edge-2"] = Identity(other.public)
        try:
            async with world.registry() as registry:
                world.claim()
                await eventually(reached.is_set)
                self.throw_out(world)
                await eventually(lambda: ("edge-1", "echo") not in registry._pending)
                gate.set()
                claim = signed(make_claim(node="edge-2"), other)
                world.send(claim, node="edge-2")
                await eventually(lambda: world.record(node="edge-2"))  # it is after the other
                assert world.record() is None
                assert world.events("capability_admitted")[0]["data"]["node"] == "edge-2"
        finally:
            gate.set()

    async def test_a_registry_that_starts_withdraws_what_is_of_no_member(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            world.claim()
            await eventually(world.record)
        del world.known["edge-1"]
        async with world.registry():
            await eventually(lambda: world.record() is None)

    async def test_who_is_let_in_again_claims_again(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            claim = world.claim()
            await eventually(world.record)
            identity = world.known["edge-1"]
            self.throw_out(world)
            await eventually(lambda: world.record() is None)
            world.known["edge-1"] = identity
            world.send(claim)
            await eventually(world.record)


class TestRestart:
    async def test_the_catalogue_comes_back_without_embedding(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            world.claim()
            await eventually(world.record)
        before = world.record()
        world.broker.retained.pop(
            world.topics.build(TopicKind.CATALOG, node="edge-1", function="echo")
        )
        embedded = len(world.encoder.encoded)
        async with world.registry() as registry:
            await eventually(lambda: world.record() == before)
            await eventually(lambda: registry.counts["unchanged"] == 1)
            world.clock.pass_s(60)
            await world.broker.settle()
            assert world.record() == before
        assert len(world.encoder.encoded) == embedded

    async def test_what_was_withdrawn_meanwhile_and_ghosts_are_cleared(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            world.claim("kept")
            world.claim("dropped")
            await eventually(lambda: world.record("kept") and world.record("dropped"))
        kept = world.record("kept")
        assert kept is not None
        world.send(b"", "dropped")
        ghost = world.topics.build(TopicKind.CATALOG, node="gone", function="ghost")
        world.node.post(ghost, encode(kept), retain=True)
        await world.broker.settle()
        async with world.registry() as registry:
            await eventually(lambda: registry.counts["unchanged"] == 1)
            await world.broker.settle()
            assert world.record("dropped") is not None  # within the grace
            world.clock.pass_s(11)
            await eventually(lambda: world.record("dropped") is None)
            await eventually(lambda: ghost not in world.broker.retained)
            assert world.record("kept") == kept

    async def test_old_orders_are_remembered(self, world: World, eventually: Eventually) -> None:
        async with world.registry():
            world.claim(revision=7)
            await eventually(world.record)
            world.send(b"")
            await eventually(lambda: world.record() is None)
            await eventually(lambda: world.events("capability_withdrawn"))
        async with world.registry() as registry:
            world.claim(revision=6)
            await eventually(lambda: registry.counts["refused.stale"] == 1)
        assert world.record() is None

    async def test_another_encoder_means_another_space(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            world.claim()
            await eventually(world.record)
        world.encoder = WordEncoder(revision="2")
        async with world.registry():
            await eventually(lambda: getattr(world.record(), "space", None) == world.encoder.space)

    async def test_another_key_signs_anew(self, world: World, eventually: Eventually) -> None:
        async with world.registry():
            world.claim()
            await eventually(world.record)
        before, key = world.record(), SigningKey.generate()
        async with world.registry(key=key):
            await eventually(lambda: world.record() != before)
        record = world.record()
        assert record is not None
        verify(record, key.public)

    async def test_a_broker_that_lost_everything_is_told_again(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry():
            world.claim()
            await eventually(world.record)
            world.broker.down()
            world.broker.retained.clear()
            world.broker.up()
            await eventually(world.record)
            world.clock.pass_s(11)  # the node, too, has to claim again; this one does not
            await eventually(lambda: world.record() is None)


class TestTrouble:
    async def test_a_locked_store_delays_admission_and_nothing_else(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry() as registry:
            other = sqlite3.connect(world.database, isolation_level=None)
            try:
                other.execute("BEGIN EXCLUSIVE")
                world.claim()
                await eventually(lambda: registry.counts["retried"] >= 3)
                assert world.record() is None
                other.execute("ROLLBACK")
            finally:
                other.close()
            await eventually(world.record)
            assert registry.running

    async def test_a_withdrawal_does_not_wait_for_the_encoder(
        self, world: World, eventually: Eventually
    ) -> None:
        gate = threading.Event()
        gate.set()

        class Gated(WordEncoder):
            def encode(self, texts: Sequence[str]) -> Vectors:
                if not gate.wait(10):
                    raise TimeoutError("nobody opened the gate")
                return super().encode(texts)

        world.encoder = Gated()
        try:
            async with world.registry():
                world.claim("first")
                await eventually(lambda: world.record("first"))
                gate.clear()
                for at in range(20):
                    world.claim(f"f{at}", description=f"does work {at}")
                world.send(b"", "first")
                world.send(b"", "f0")
                await eventually(lambda: world.record("first") is None)
                gate.set()
                await eventually(lambda: all(world.record(f"f{at}") for at in range(1, 20)))
                await world.broker.settle()
                assert world.record("f0") is None
        finally:
            gate.set()

    async def test_too_many_waiting_claims_are_refused(
        self, world: World, eventually: Eventually
    ) -> None:
        settings = SETTINGS.model_copy(update={"pending_limit": 1})
        async with world.registry(settings=settings) as registry:
            lock = sqlite3.connect(world.database, isolation_level=None)
            try:
                lock.execute("BEGIN EXCLUSIVE")
                world.claim("one")
                world.claim("two")
                await eventually(lambda: registry.counts["refused.overloaded"] == 1)
                lock.execute("ROLLBACK")
            finally:
                lock.close()
            await eventually(lambda: world.record("one"))
        assert world.record("two") is None

    async def test_a_text_the_encoder_chokes_on_does_not_stop_the_others(
        self, world: World, eventually: Eventually
    ) -> None:
        class Picky(WordEncoder):
            def encode(self, texts: Sequence[str]) -> Vectors:
                if any("poison" in text for text in texts):
                    raise ValueError("cannot encode this")
                return super().encode(texts)

        world.encoder = Picky()
        async with world.registry() as registry:
            world.claim("bad", description="poison pill for the encoder")
            world.claim("good")
            await eventually(lambda: world.record("good"))
            assert registry.counts["failed"] == 1
            assert registry.running


class TestAdmin:
    async def ask(
        self, world: World, verb: str, eventually: Eventually, **args: Any
    ) -> Result | ErrorEvent:
        got: list[Message] = []

        async def take(message: Message) -> None:
            got.append(message)

        topics = world.topics
        async with MemorySession(broker=world.broker, client_id="admin-1") as admin:
            await admin.wait_connected(5)
            await admin.subscribe(topics.filter(TopicKind.REPLY, client="admin-1"), take)
            topic = topics.build(TopicKind.ADMIN, target="registry-1", client="admin-1")
            admin.post(topic, encode(AdminRequest(id="q-1", verb=verb, args=args)))
            await eventually(lambda: got)
        assert topics.parse(got[0].topic).levels == {
            "client": "admin-1", "task": "q-1", "source": "registry-1",
        }  # fmt: skip
        event = decode_reply(got[0].payload)
        assert isinstance(event, Result | ErrorEvent)
        return event

    async def test_claims_history_and_stats(self, world: World, eventually: Eventually) -> None:
        async with world.registry():
            world.claim()
            await eventually(world.record)
            world.send(b"")
            await eventually(lambda: world.record() is None)
            world.claim(revision=2)
            await eventually(world.record)
            claims = await self.ask(world, "claims", eventually)
            history = await self.ask(world, "history", eventually, node="edge-1", function="echo")
            nobody = await self.ask(world, "claims", eventually, node="edge-9")
            stats = await self.ask(world, "stats", eventually)
        assert isinstance(claims, Result)
        assert [entry["revision"] for entry in claims.output] == [2]
        assert isinstance(history, Result)
        changes = [entry["change"] for entry in history.output]
        assert changes == ["admitted", "withdrawn", "admitted"]
        assert isinstance(nobody, Result)
        assert nobody.output == []
        assert isinstance(stats, Result)
        assert stats.output["records"] == 1

    async def test_forget_admits_a_node_whose_clock_was_set_back(
        self, world: World, eventually: Eventually
    ) -> None:
        async with world.registry() as registry:
            world.claim(epoch=50)
            await eventually(world.record)
            early = await self.ask(world, "forget", eventually, node="edge-1", function="echo")
            assert isinstance(early, ErrorEvent)
            world.send(b"")
            await eventually(lambda: world.record() is None)
            world.claim(epoch=3)
            await eventually(lambda: registry.counts["refused.stale"] == 1)
            late = await self.ask(world, "forget", eventually, node="edge-1", function="echo")
            assert isinstance(late, Result)
            world.claim(epoch=3)
            await eventually(world.record)

    @pytest.mark.parametrize(
        ("verb", "args"),
        [("dance", {}), ("history", {}), ("history", {"node": 7}), ("forget", {"node": "edge-1"})],
    )
    async def test_bad_requests_are_answered(
        self, world: World, eventually: Eventually, verb: str, args: dict[str, Any]
    ) -> None:
        async with world.registry():
            event = await self.ask(world, verb, eventually, **args)
        assert isinstance(event, ErrorEvent)
        assert event.code == "invalid_task"


@pytest.mark.broker
async def test_under_the_rights_of_a_real_broker(
    embedded_site: BrokerSite, tmp_path: Path, eventually: Eventually
) -> None:
    topics = embedded_site.topics
    seen: dict[str, bytes] = {}

    async def note(message: Message) -> None:
        seen[message.topic] = message.payload

    claim_topic = topics.build(TopicKind.CAPABILITY, node="edge-1", function="echo")
    catalog_topic = topics.build(TopicKind.CATALOG, node="edge-1", function="echo")
    async with (
        MqttSession(settings=embedded_site.settings("registry-1")) as session,
        MqttSession(settings=embedded_site.settings("edge-1")) as node,
        MqttSession(settings=embedded_site.settings("watcher-1")) as watcher,
        SqliteStore(path=tmp_path / "registry.sqlite") as store,
        EncoderThread(encoder=WordEncoder()) as encoder,
    ):
        async with asyncio.timeout(20):
            for each in (session, node, watcher):
                await each.wait_connected(15)
            await watcher.subscribe(topics.filter(TopicKind.CATALOG), note)
            async with RegistryService(
                session=session,
                topics=topics,
                store=store,
                encoder=encoder,
                key=REGISTRY_KEY,
                identities=lambda _node: NODE_KEY.public,
                registry_id="registry-1",
                settings=SETTINGS,
            ):
                await node.publish(claim_topic, signed(make_claim(), NODE_KEY), retain=True)
                await eventually(lambda: seen.get(catalog_topic))
                verify(seen[catalog_topic], REGISTRY_KEY.public)
                await node.publish(claim_topic, b"", retain=True)
                await eventually(lambda: seen.get(catalog_topic) == b"")
