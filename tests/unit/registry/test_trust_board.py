"""The board says what is known while its registry leads, and nothing else."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.errors import Unavailable
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import TrustState, read_trust
from capability_schemas.wire import encode
from registry.leadership import Sole
from registry.trust import Description, Opinion, TrustBoard

OWN, OTHER = SigningKey.generate(), SigningKey.generate()
REGISTRIES = {"registry-1": OTHER.public, "registry-2": OWN.public}
T = Topics()


class Lead(Sole):
    """Leads when told to."""

    def __init__(self) -> None:
        self.leader = "registry-1"
        self.alone = False
        self.listeners: list[Callable[[bool], None]] = []
        self.turn()

    def on_change(self, listener: Callable[[bool], None]) -> None:
        self.listeners.append(listener)

    async def until(self) -> None:
        leads = asyncio.Event()
        self.listeners.append(lambda now: leads.set() if now else None)
        if not self.leads:
            await leads.wait()

    def check(self) -> None:
        if not self.leads:
            raise Unavailable(f"{self.leader} leads")

    def turn(self, *, term: int | None = None) -> None:
        self.leads, self.term = term is not None, term
        for listener in self.listeners:
            listener(self.leads)


class World:
    def __init__(self, stack):
        self.stack = stack
        self.broker = MemoryBroker()
        self.lead = Lead()
        self.voided = {"gone": 5_000}

    async def start(self):
        self.session = await self.session_of("registry-2")
        self.other = await self.session_of("registry-1")
        self.board = TrustBoard(
            session=self.session,
            topics=T,
            key=OWN,
            registry_id="registry-2",
            voided=lambda: self.voided,
            members=lambda: {"olga"},
            lead=self.lead,
            registries=lambda: REGISTRIES,
            clock=lambda: 9_000,
        )
        await self.stack.enter_async_context(self.board)
        self.board.describe("olga", Description(role="operator"))
        await self.broker.settle()

    async def session_of(self, name):
        session = MemorySession(broker=self.broker, client_id=name)
        await self.stack.enter_async_context(session)
        await session.wait_connected()
        return session

    def topic(self, member):
        return T.build(TopicKind.TRUST, member=member)

    async def other_says(self, member, **fields):
        state = TrustState.model_validate(
            {"member": member, "state": "trusted", "at": 1, "registry": "registry-1", **fields}
        )
        self.other.post(self.topic(member), encode(sign(state, OTHER)), retain=True)
        await self.broker.settle()

    def kept(self, member):
        found = self.broker.retained.get(self.topic(member))
        return read_trust(found.payload, member=member, registries=REGISTRIES) if found else None


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(stack)
        await world.start()
        yield world


async def test_a_follower_says_nothing(world):
    world.board.judge("olga", Opinion(trusted=False, reason="no evidence"))
    world.board.refresh()
    await world.broker.settle()
    assert not world.broker.published(T.filter(TopicKind.TRUST))


async def test_one_that_takes_over_says_all_anew_in_its_term(world):
    await world.other_says("olga", role="admin", term=6)
    world.lead.turn(term=7)
    await world.broker.settle()
    olga, gone = world.kept("olga"), world.kept("gone")
    assert (olga.role, olga.term, olga.registry) == ("operator", 7, "registry-2")
    assert (gone.state, gone.void_before, gone.term) == ("revoked", 5_000, 7)


async def test_it_mends_what_the_one_before_says_late(world):
    world.lead.turn(term=7)
    await world.broker.settle()
    await world.other_says("olga", role="admin", term=6)
    assert world.kept("olga").role == "operator"
    world.other.post(world.topic("gone"), b"", retain=True)
    await world.broker.settle()
    assert world.kept("gone").state == "revoked"


async def test_one_that_steps_down_says_nothing_again_on_its_next_connection(world):
    world.lead.turn(term=7)
    await world.broker.settle()
    world.lead.turn()
    await world.other_says("olga", role="admin", term=8)
    world.broker.drop("registry-2")
    await world.session.wait_connected()
    await world.broker.settle()
    assert world.kept("olga").registry == "registry-1"


async def test_what_nobody_says_any_more_goes_after_a_while(world, eventually, monkeypatch):
    monkeypatch.setattr("registry.trust._GHOSTS_AFTER_S", 0.0)
    await world.other_says("stranger", role="admin", term=6)
    await world.other_says("thief", state="revoked", void_before=4_000, term=6)
    world.lead.turn(term=7)
    await eventually(lambda: world.kept("stranger") is None)
    assert world.kept("thief").state == "revoked"  # a lost book brings nobody back
