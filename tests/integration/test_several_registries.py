"""Two or three registries over one broker in memory: one writes, and the next one goes on."""

import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.admin import AdminRequest
from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import ErrorCode
from capability_schemas.node import RegistryState
from capability_schemas.passport import PassportBook
from capability_schemas.reply import ErrorEvent, Result, decode_reply
from capability_schemas.signing import SigningKey, sign, verify
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode
from registry.admission import Identity
from registry.encoders import EncoderThread
from registry.leadership import Leadership, registry_will
from registry.service import RegistryService
from registry.settings import RegistrySettings
from registry.store import SqliteStore
from support.capabilities import make_claim, signed
from support.encoders import WordEncoder

NODE_KEY = SigningKey.generate()
NAMES = ("registry-1", "registry-2", "registry-3")
KEYS = {name: SigningKey.generate() for name in NAMES}
SETTINGS = RegistrySettings(grace_s=2, sweep_interval_s=0.01, retry_first_s=0.01, retry_cap_s=0.05)
LEASE_MS = 400
MADE_ANEW = {"registry", "term", "admitted_at", "signature"}
Eventually = Callable[..., Any]


class One:
    """A registry with its place among the others."""

    def __init__(self, stack: AsyncExitStack, lead: Leadership, service: RegistryService) -> None:
        self.stack = stack
        self.lead = lead
        self.service = service


class World:
    """A broker in memory, a node that claims, and registries that come and go."""

    def __init__(self, folder: Path, topics: Topics) -> None:
        self.broker = MemoryBroker()
        self.topics = topics
        self.folder = folder
        self.known: dict[str, Identity] = {"edge-1": Identity(NODE_KEY.public)}
        self.node = MemorySession(broker=self.broker, client_id="edge-1")
        self.running: dict[str, One] = {}
        self.epochs = 1_000

    async def start(self, name: str, *others: str) -> One:
        """Start a registry that knows of others."""
        self.epochs += 1
        epoch = self.epochs
        stack = AsyncExitStack()
        session = await stack.enter_async_context(
            MemorySession(
                broker=self.broker,
                client_id=name,
                will=lambda: registry_will(self.topics, name, epoch=epoch, at=1),
            )
        )
        await session.wait_connected(5)
        book = PassportBook(
            site=self.topics.site, registries={one: KEYS[one].public for one in NAMES}
        )
        lead = Leadership(
            session=session,
            topics=self.topics,
            registry_id=name,
            epoch=epoch,
            lease_ms=LEASE_MS,
            others=lambda: others,
            book=book,
        )
        store = await stack.enter_async_context(SqliteStore(path=self.folder / f"{name}.sqlite"))
        encoder = await stack.enter_async_context(
            EncoderThread(encoder=WordEncoder(), cache_texts=0)
        )
        service = RegistryService(
            session=session,
            topics=self.topics,
            store=store,
            encoder=encoder,
            key=KEYS[name],
            identities=self.known.get,
            registry_id=name,
            settings=SETTINGS,
            book=book,
            lead=lead,
        )
        await stack.enter_async_context(lead)
        await stack.enter_async_context(service)
        self.running[name] = One(stack, lead, service)
        return self.running[name]

    async def start_all(self, eventually: Eventually, *names: str) -> None:
        for name in names:
            await self.start(name, *(other for other in names if other != name))
        await eventually(lambda: self.leader() == names[0])

    def leader(self) -> str | None:
        """Return who leads; that there are two is an error at any time."""
        found = [name for name, one in self.running.items() if one.lead.leads]
        assert len(found) <= 1, found
        return found[0] if found else None

    async def kill(self, name: str) -> None:
        """Cut a registry off at once and for good: what it had not sent is never heard."""
        self.broker.hold(name)
        one = self.running.pop(name)
        await one.stack.aclose()
        self.broker.release(name)

    async def stop(self, name: str) -> None:
        await self.running.pop(name).stack.aclose()

    def claim(self, function: str, **more: Any) -> None:
        payload = signed(make_claim(function=function, **more), NODE_KEY)
        self.send(payload, function)

    def send(self, payload: bytes, function: str, node: str = "edge-1") -> None:
        topic = self.topics.build(TopicKind.CAPABILITY, node=node, function=function)
        self.node.post(topic, payload, retain=True)

    def topic(self, function: str) -> str:
        return self.topics.build(TopicKind.CATALOG, node="edge-1", function=function)

    def record(self, function: str) -> CatalogRecord | None:
        kept = self.broker.retained.get(self.topic(function))
        return decode(CatalogRecord, kept.payload) if kept and kept.payload else None

    def catalogue(self) -> dict[str, dict[str, Any]]:
        """Return what routers read, without who wrote it and when."""
        found = {}
        for message in self.broker.retained.values():
            if message.payload and message.topic.startswith(self.topics.root + "/catalog/"):
                record = decode(CatalogRecord, message.payload)
                verify(record, KEYS[record.registry].public)
                found[record.function] = record.model_dump(exclude=MADE_ANEW)
        return found

    def admitted_by(self) -> dict[str, set[str]]:
        """Return who said of each function that it had admitted it."""
        said: dict[str, set[str]] = defaultdict(set)
        for name in NAMES:
            topic = self.topics.build(TopicKind.EVENT, source=name, kind="capability_admitted")
            for message in self.broker.published(topic):
                said[json.loads(message.payload)["data"]["function"]].add(name)
        return said

    def reasons(self, name: str) -> list[str]:
        topic = self.topics.build(TopicKind.EVENT, source=name, kind="claim_refused")
        return [json.loads(m.payload)["data"]["reason"] for m in self.broker.published(topic)]


@pytest.fixture
async def world(tmp_path: Path, topics: Topics) -> AsyncIterator[World]:
    made = World(tmp_path, topics)
    async with made.node:
        await made.node.wait_connected(5)
        yield made
        for name in tuple(made.running):
            await made.stop(name)


async def ask(world: World, target: str, verb: str, **args: Any) -> Result | ErrorEvent:
    """Give an order as an administrator."""
    heard: list[Result | ErrorEvent] = []

    async def on_reply(message: Any) -> None:
        event = decode_reply(message.payload)
        assert isinstance(event, Result | ErrorEvent)
        heard.append(event)

    async with MemorySession(broker=world.broker, client_id="admin-1") as admin:
        await admin.wait_connected(5)
        await admin.subscribe(f"{world.topics.root}/reply/admin-1/#", on_reply)
        topic = world.topics.build(TopicKind.ADMIN, target=target, client="admin-1")
        admin.post(topic, encode(AdminRequest(id="q1", verb=verb, args=args)))
        await world.broker.settle()
    assert len(heard) == 1
    return heard[0]


async def test_the_first_one_leads_at_once_where_no_other_is_known(
    world: World, eventually: Eventually
) -> None:
    await world.start("registry-1")
    await eventually(lambda: world.leader() == "registry-1")
    world.claim("echo")
    await eventually(lambda: world.record("echo"))
    record = world.record("echo")
    assert record is not None
    assert record.term == world.running["registry-1"].lead.term


async def test_a_leader_killed_while_it_admits_loses_no_claim_and_none_is_admitted_twice(
    world: World, eventually: Eventually, tmp_path: Path, topics: Topics
) -> None:
    await world.start_all(eventually, "registry-1", "registry-2")
    names = [f"f{number}" for number in range(60)]
    for name in names[:40]:
        world.claim(name, description=f"what {name} does")
    await eventually(lambda: world.running["registry-1"].service.counts["admitted"] >= 10)
    await world.kill("registry-1")
    for name in names[40:]:
        world.claim(name, description=f"what {name} does")
    await eventually(lambda: world.leader() == "registry-2")
    await eventually(lambda: set(world.catalogue()) == set(names))
    said = world.admitted_by()
    assert set(said) == set(names)
    assert all(len(by) == 1 for by in said.values()), said
    assert {name for by in said.values() for name in by} == {"registry-1", "registry-2"}

    (tmp_path / "alone").mkdir()
    single = World(tmp_path / "alone", topics)
    async with single.node:
        await single.node.wait_connected(5)
        for name in names:
            single.claim(name, description=f"what {name} does")
        await single.start("registry-3")
        await eventually(lambda: set(single.catalogue()) == set(names))
        assert single.catalogue() == world.catalogue()
        await single.stop("registry-3")


async def test_a_follower_has_it_all_when_its_turn_comes(
    world: World, eventually: Eventually
) -> None:
    await world.start_all(eventually, "registry-1", "registry-2")
    world.claim("kept")
    world.claim("dropped")
    follower = world.running["registry-2"].service
    await eventually(lambda: follower.counts["copied"] == 2)
    before = world.record("kept")
    world.send(b"", "dropped")
    await eventually(lambda: world.record("dropped") is None)
    await world.kill("registry-1")
    await eventually(lambda: world.leader() == "registry-2")
    await world.broker.settle()
    assert set(world.catalogue()) == {"kept"}
    assert world.record("kept") == before  # routers need read nothing anew
    history = await ask(world, "registry-2", "history", node="edge-1")
    assert isinstance(history, Result)
    changes = {(line["function"], line["change"]) for line in history.output}
    assert changes == {("kept", "admitted"), ("dropped", "admitted"), ("dropped", "withdrawn")}


async def test_what_happens_while_nobody_leads_is_done_by_the_next(
    world: World, eventually: Eventually
) -> None:
    await world.start_all(eventually, "registry-1", "registry-2")
    world.claim("dropped")
    await eventually(lambda: world.running["registry-2"].service.counts["copied"] == 1)
    await world.kill("registry-1")
    assert world.leader() is None
    world.send(b"", "dropped")
    world.claim("new")
    world.send(signed(make_claim(function="forged"), SigningKey.generate()), "forged")
    await world.broker.settle()
    assert not world.reasons("registry-2")
    await eventually(lambda: set(world.catalogue()) == {"new"})
    await eventually(lambda: world.reasons("registry-2") == ["signature"])


async def test_one_that_was_cut_off_writes_nothing_and_follows_when_it_is_back(
    world: World, eventually: Eventually
) -> None:
    await world.start_all(eventually, "registry-1", "registry-2")
    first = world.running["registry-1"]
    world.claim("echo")
    await eventually(lambda: world.running["registry-2"].service.counts["copied"] == 1)
    world.broker.hold("registry-1")
    await eventually(lambda: not first.lead.leads)
    await eventually(lambda: world.leader() == "registry-2")
    world.claim("later")
    await eventually(lambda: world.record("later"))
    world.broker.release("registry-1")
    await eventually(lambda: first.lead.leader == "registry-2")
    await eventually(lambda: first.service.counts["copied"] >= 1)
    assert world.leader() == "registry-2"
    assert world.admitted_by()["later"] == {"registry-2"}
    await world.kill("registry-2")
    await eventually(lambda: world.leader() == "registry-1")
    world.claim("last")
    await eventually(lambda: set(world.catalogue()) == {"echo", "later", "last"})


@pytest.mark.parametrize("late", ["record", "withdrawal", "ghost"])
async def test_late_words_of_an_earlier_leader_are_mended(
    world: World, eventually: Eventually, late: str
) -> None:
    await world.start_all(eventually, "registry-1", "registry-2")
    world.claim("echo", description="what it does now")
    await eventually(lambda: world.running["registry-2"].service.counts["copied"] == 1)
    old = world.record("echo")
    assert old is not None
    await world.kill("registry-1")
    await eventually(lambda: world.leader() == "registry-2")
    world.claim("echo", revision=2, description="what it does then")
    await eventually(lambda: getattr(world.record("echo"), "revision", 0) == 2)
    new = world.record("echo")
    function = "gone" if late == "ghost" else "echo"
    payload = (
        b""
        if late == "withdrawal"
        else encode(sign(old.model_copy(update={"function": function}), KEYS["registry-1"]))
    )
    async with MemorySession(broker=world.broker, client_id="registry-1") as session:
        await session.wait_connected(5)
        session.post(world.topic(function), payload, retain=True)
        await world.broker.settle()
    await eventually(lambda: world.running["registry-2"].service.counts["mended"] == 1)
    await eventually(lambda: world.record("echo") == new)
    await eventually(lambda: world.record("gone") is None)


async def test_one_after_another_is_restarted(world: World, eventually: Eventually) -> None:
    await world.start_all(eventually, *NAMES)
    world.claim("f0")
    await eventually(lambda: world.record("f0"))
    terms: list[int] = []
    for number, name in enumerate(NAMES, start=1):
        await world.stop(name)
        world.claim(f"f{number}")
        await eventually(lambda number=number: world.record(f"f{number}"))
        record = world.record(f"f{number}")
        assert record is not None
        terms.append(record.term or 0)
        await world.start(name, *(other for other in NAMES if other != name))
    await eventually(lambda: world.leader() is not None)
    assert set(world.catalogue()) == {"f0", "f1", "f2", "f3"}
    assert terms == sorted(terms)


async def test_only_the_leader_takes_orders_that_change_something(
    world: World, eventually: Eventually
) -> None:
    await world.start_all(eventually, "registry-1", "registry-2")
    refused = await ask(world, "registry-2", "forget", node="edge-1", function="echo")
    assert isinstance(refused, ErrorEvent)
    assert "registry-1 leads" in refused.message
    assert refused.retryable
    assert refused.code is not ErrorCode.UNAUTHORIZED
    shown = await ask(world, "registry-2", "stats")
    assert isinstance(shown, Result)
    done = await ask(world, "registry-1", "forget", node="edge-1", function="echo")
    assert isinstance(done, Result)


async def test_a_goodbye_hands_over_at_once(world: World, eventually: Eventually) -> None:
    await world.start_all(eventually, "registry-1", "registry-2")
    said: list[RegistryState] = []

    async def on_state(message: Any) -> None:
        said.append(decode(RegistryState, message.payload))

    async with MemorySession(broker=world.broker, client_id="watcher") as watcher:
        await watcher.wait_connected(5)
        await watcher.subscribe(world.topics.filter(TopicKind.REGISTRY_STATE), on_state)
        await world.stop("registry-1")
        await eventually(lambda: world.leader() == "registry-2")
        await world.broker.settle()
    goodbye = [state for state in said if state.registry == "registry-1"][-1]
    assert (goodbye.state, goodbye.leads) == ("offline", False)
    assert goodbye.beat is not None  # no last will


async def test_a_stranger_does_not_depose_the_leader(world: World, eventually: Eventually) -> None:
    await world.start_all(eventually, "registry-1")
    lead = world.running["registry-1"].lead
    term = lead.term or 0
    async with MemorySession(broker=world.broker, client_id="registry-9") as stranger:
        await stranger.wait_connected(5)
        state = RegistryState(
            registry="registry-9", state="birth", epoch=1, at=1, leads=True, term=term + 5, beat=1
        )
        topic = world.topics.build(TopicKind.REGISTRY_STATE, registry="registry-9")
        stranger.post(topic, encode(state))
        await world.broker.settle()
    assert lead.leads
    assert lead.term == term


async def test_where_no_registry_hears_itself_it_leads_and_says_so(
    world: World, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.leadership._UNHEARD_S", 0.0)
    world.broker.allows = lambda _, action, topic: (
        not (action == "publish" and topic.endswith("/state"))
    )
    await world.start("registry-1")
    await eventually(lambda: world.leader() == "registry-1")
    world.claim("echo")
    await eventually(lambda: world.record("echo"))
    with contextlib.suppress(TimeoutError):
        await world.broker.settle()
