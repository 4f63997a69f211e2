"""The trail holds what components tell: once, in order, with the gaps, and from nobody else."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from broker.access.orders import Requester
from broker.access.policy import Role
from broker.audit import AuditVoice
from broker.events import EventSource
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.admin import AdminRequest
from capability_schemas.errors import AccessDenied, NotFound, Unavailable
from capability_schemas.passport import Passport
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind, Topics
from registry.auditor import Auditor
from registry.leadership import Sole
from registry.store.audit import AuditLog, verify_trail

KEY = SigningKey.generate()
T = Topics()
ROLES = {
    "router-1": Role.ROUTER,
    "edge-1": Role.NODE,
    "anna": Role.ADMIN,
    "olga": Role.OPERATOR,
    "pump-7": Role.DEVICE,
    "registry-2": Role.REGISTRY,
}


class World:
    """A broker in memory, an auditor, and whoever tells it something."""

    def __init__(self, stack, path):
        self.stack = stack
        self.path = path / "audit.sqlite"
        self.broker = MemoryBroker()
        self.trail = stack.enter_context(AuditLog(self.path, key=KEY))
        self.life = AsyncExitStack()

    async def start(self):
        self.life = AsyncExitStack()
        session = self.session = await self.life.enter_async_context(
            MemorySession(broker=self.broker, client_id="registry-1")
        )
        events = self.events(session, "registry-1")
        self.auditor = Auditor(
            session=session,
            topics=T,
            trail=self.trail,
            emit=events.emit,
            role_of=ROLES.get,
            registry_id="registry-1",
        )
        await self.life.enter_async_context(self.auditor)
        await self.broker.settle()

    async def stop(self):
        await self.life.aclose()

    def events(self, session, source):
        return EventSource(
            session=session, topics=T, source=source, component="x", clock=lambda: 1_000
        )

    async def voice(self, source, epoch=7):
        session = MemorySession(broker=self.broker, client_id=f"{source}-session")
        await self.stack.enter_async_context(session)
        return AuditVoice(emit=self.events(session, source).emit, epoch=epoch, clock=lambda: 1_000)

    def entries(self, action=None):
        return [e for e in reversed(self.trail.latest(5_000)) if action in {None, e.action}]


@pytest.fixture
async def world(tmp_path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(stack, tmp_path)
        await world.start()
        yield world
        await world.stop()


async def test_what_a_router_tells_is_chained_with_its_author(world, eventually):
    voice = await world.voice("router-1")
    voice.write("order", actor="anna", subject="drain", detail={"args": {"node": "edge-1"}})
    await eventually(world.entries)
    (entry,) = world.entries()
    assert (entry.action, entry.actor, entry.subject) == ("order", "anna", "drain")
    assert entry.detail == {
        "args": {"node": "edge-1"},
        "told": {"by": "router-1", "epoch": 7, "number": 1},
    }
    own = T.build(TopicKind.EVENT, source="registry-1", kind="audit")
    await eventually(lambda: world.broker.published(own))
    said = json.loads(world.broker.published(own)[0].payload)["data"]
    assert said["hash"] == verify_trail(world.path, KEY.public).head


@pytest.mark.parametrize("source", ["pump-7", "anna", "nobody", "registry-1"])
async def test_nobody_else_writes_into_it(world, eventually, source):
    (await world.voice(source)).write("order", actor="anna")
    (await world.voice("router-1")).write("order", actor="otto")
    await eventually(world.entries)
    assert [entry.actor for entry in world.entries()] == ["otto"]


async def test_the_broker_tells_under_a_name_that_no_member_has(world, eventually, monkeypatch):
    (await world.voice("broker")).write("publish_refused", actor="pump-7")
    await eventually(world.entries)
    monkeypatch.setitem(ROLES, "broker", Role.DEVICE)
    (await world.voice("broker", epoch=8)).write("made_up", actor="pump-7")
    (await world.voice("router-1")).write("order", actor="otto")
    await eventually(lambda: world.entries("order"))
    assert [entry.action for entry in world.entries()] == ["publish_refused", "order"]


async def test_what_is_missing_shows_and_what_comes_twice_counts_once(world, eventually):
    topic = T.build(TopicKind.EVENT, source="router-1", kind="audit")
    voice = await world.voice("router-1")
    voice.write("order", actor="a")
    await eventually(world.entries)
    first = world.broker.published(topic)[0]
    session = await world.stack.enter_async_context(
        MemorySession(broker=world.broker, client_id="again")
    )
    session.post(topic, first.payload)
    voice._number = 4  # three were lost on the way
    voice.write("order", actor="b")
    await eventually(lambda: len(world.entries("order")) == 2)
    assert [entry.action for entry in world.entries()] == ["order", "events_missing", "order"]
    (gap,) = world.entries("events_missing")
    assert (gap.subject, gap.detail) == ("router-1", {"count": 3, "after": 1})


async def test_a_restarted_registry_sees_what_was_told_while_it_was_away(world, eventually):
    voice = await world.voice("router-1")
    voice.write("order", actor="a")
    await eventually(world.entries)
    await world.stop()
    voice.write("order", actor="unheard")
    await world.start()
    voice.write("order", actor="b")
    await eventually(lambda: len(world.entries("order")) == 2)
    assert world.entries("events_unheard")[0].detail == {"count": 1, "after": 1}
    (await world.voice("router-1", epoch=9)).write("order", actor="c")
    await eventually(lambda: len(world.entries("order")) == 3)
    assert len(world.entries("events_unheard")) == 1  # a new life counts from one again
    assert not world.entries("events_missing")


async def test_what_a_registry_did_not_hear_for_it_was_cut_off_is_no_gap_of_the_teller(
    world, eventually
):
    voice = await world.voice("router-1")
    voice.write("order", actor="a")
    await eventually(lambda: len(world.entries("order")) == 1)
    before = world.session.stats.connects
    world.broker.drop(world.session.client_id)
    await eventually(lambda: world.session.connected and world.session.stats.connects > before)
    voice._number = 4  # three of them meanwhile
    voice.write("order", actor="b")
    await eventually(lambda: len(world.entries("order")) == 2)
    (gap,) = world.entries("events_unheard")
    assert (gap.subject, gap.detail) == ("router-1", {"count": 3, "after": 1})
    voice._number = 8  # it hears again, and these it was not told
    voice.write("order", actor="c")
    await eventually(lambda: len(world.entries("order")) == 3)
    (gap,) = world.entries("events_missing")
    assert (gap.subject, gap.detail) == ("router-1", {"count": 3, "after": 5})


async def test_a_component_that_tells_too_much_is_cut_short_and_that_is_written(world, eventually):
    voice = await world.voice("edge-1")
    for number in range(600):
        voice.write("signature_refused", actor=f"x-{number}")
    (await world.voice("router-1")).write("order", actor="otto")
    await eventually(lambda: world.entries("order") and world.entries("events_lost"))
    await world.broker.settle()
    assert 200 <= len(world.entries("signature_refused")) < 600
    await eventually(
        lambda: (
            sum(entry.detail["count"] for entry in world.entries("events_lost"))
            + len(world.entries("signature_refused"))
            == 600
        )
    )


def _event(data):
    return f'{{"id": "1", "source": "s", "type": "t", "time": "x", "data": {data}}}'.encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"no json",
        b"[]",
        b"[" * 100_000,
        b'{"id": "1", "source": "s", "type": "t", "time": "x", "data": {"action": "A B"}}',
        b'{"id": "1", "source": "s", "type": "t", "time": "x", "data": {}}',
        json.dumps(
            {
                "id": "1",
                "source": "s",
                "type": "t",
                "time": "x",
                "data": {"action": "order", "detail": {"x": "y" * 20_000}},
            }
        ).encode(),
        _event('{"action": "order", "detail": {"x": NaN}}'),
        _event('{"action": "order", "detail": {"x": [1e999]}}'),
        _event('{"action": "order", "detail": {"x": "\\ud800"}}'),
        _event('{"action": "order", "detail": {"\\udfff": 1}}'),
        _event('{"action": "order", "subject": "\\ud800"}'),
    ],
)
async def test_what_is_no_entry_is_counted_not_chained(world, eventually, payload):
    session = await world.stack.enter_async_context(
        MemorySession(broker=world.broker, client_id="odd")
    )
    session.post(T.build(TopicKind.EVENT, source="router-1", kind="audit"), payload)
    (await world.voice("router-1")).write("order", actor="otto")
    await eventually(world.entries)
    world.auditor.voice.tell()
    await eventually(lambda: world.entries("event_refused"))
    assert [entry.action for entry in world.entries()] == ["order", "event_refused"]


async def test_a_full_disk_loses_nothing_that_finds_room_later(world, eventually, monkeypatch):
    tries = []
    write = world.trail.write_all

    def fail_twice(notes):
        tries.append(len(notes))
        if len(tries) < 3:
            raise Unavailable("the disk is full")
        return write(notes)

    monkeypatch.setattr(world.trail, "write_all", fail_twice)
    monkeypatch.setattr("registry.auditor._RETRY_S", 0.01)
    (await world.voice("router-1")).write("order", actor="otto")
    await eventually(world.entries)
    assert [entry.actor for entry in world.entries()] == ["otto"]
    assert len(tries) >= 3


async def test_an_order_that_cannot_be_chained_stops_nothing(world, eventually):
    anna = Requester("anna", Role.ADMIN)
    poison = AdminRequest(id="1", verb="forget", args={"node": "x"})
    world.auditor.note_order(anna, poison.model_copy(update={"args": {"node": float("nan")}}))
    world.auditor.note_order(anna, AdminRequest(id="2", verb="forget", args={"node": "edge-9"}))
    await eventually(lambda: len(world.entries("order")) == 2)
    first, second = world.entries("order")
    assert (first.actor, set(first.detail)) == ("anna", {"unwritable"})
    assert second.detail["args"] == {"node": "edge-9"}
    assert verify_trail(world.path, KEY.public).problem == ""


async def test_orders_at_the_registry_are_written_with_role_and_arguments(world, eventually):
    olga = Requester("olga", Role.OPERATOR)
    note = world.auditor.note_order
    note(olga, AdminRequest(id="1", verb="nodes"))
    note(olga, AdminRequest(id="2", verb="approve", args={"id": "edge-9"}))
    note(olga, AdminRequest(id="3", verb="forget", args={"node": "edge-9"}))
    note(olga, AdminRequest(id="4", verb="approve", args={"id": "x"}), error=NotFound("nobody"))
    for _ in range(2):
        note(olga, AdminRequest(id="5", verb="forget"), error=AccessDenied("no"))
    world.auditor.voice.tell()
    await eventually(lambda: world.entries("order_refused"))
    assert [(e.action, e.subject) for e in world.entries()] == [
        ("order", "forget"),  # who was let in enrollment writes down itself
        ("order_failed", "approve"),
        ("order_refused", "forget"),
    ]
    assert world.entries("order")[0].detail == {"role": "operator", "args": {"node": "edge-9"}}
    assert world.entries("order_refused")[0].detail["count"] == 2


def passport(identity, role, registry="registry-1"):
    return Passport(
        identity=identity,
        role=role,
        site="local",
        public_key=KEY.public,
        issued_at=1,
        expires_at=2,
        registry=registry,
    )


async def test_the_credentials_say_who_asks(world):
    def role(*asked):
        return world.auditor.requester(*asked).role

    assert role("anna", None) is Role.ADMIN
    assert role("olga", None) is Role.OPERATOR
    assert role("pump-7", None) is Role.DEVICE
    assert role("stranger", None) is Role.OPERATOR
    assert role("stranger", passport("anna", "admin")) is Role.ADMIN
    assert role("olga", passport("olga", "admin")) is Role.OPERATOR  # it was made one since
    assert role("abroad", passport("abroad", "admin", registry="registry-2")) is Role.ADMIN
    with pytest.raises(AccessDenied, match="boss is no member any more"):
        role("boss", passport("boss", "admin"))  # it was one when this passport was made
    assert world.auditor.requester("alias", passport("anna", "admin")).name == "anna"


async def test_what_another_registry_did_itself_is_chained_and_what_it_was_told_is_not(
    world, eventually
):
    session = MemorySession(broker=world.broker, client_id="registry-2-session")
    await world.stack.enter_async_context(session)
    emit = world.events(session, "registry-2").emit

    def tell(number, **detail):
        entry = {"number": number, "actor": "anna", "action": "granted", "subject": "edge-7"}
        emit("audit", {**entry, "detail": detail, "at": 1, "hash": "0"})

    tell(40, why="token")
    tell(41, told={"by": "router-1", "epoch": 1, "number": 1})
    tell(41, told={"by": "router-1", "epoch": 1, "number": 1})
    tell(42, why="again")
    tell(42, why="again")
    tell(45, why="after a gap")
    await eventually(lambda: len(world.entries("granted")) == 3)
    assert [e.detail["told"]["number"] for e in world.entries("granted")] == [40, 42, 45]
    (missing,) = world.entries("events_missing")
    assert (missing.subject, missing.detail["count"]) == ("registry-2", 2)


async def test_who_leads_is_written_down(world, eventually):
    lead = Sole()
    world.auditor.note_lead(lead, True)
    world.auditor.note_lead(lead, False)
    await eventually(lambda: len(world.entries()) == 2)
    assert [e.action for e in world.entries()] == ["registry_leads", "registry_follows"]


async def test_one_that_was_removed_is_refused_whichever_registry_made_its_passport(tmp_path):
    auditor = Auditor(
        session=MemorySession(broker=MemoryBroker(), client_id="registry-2"),
        topics=T,
        trail=AuditLog(tmp_path / "audit.sqlite", key=KEY),
        emit=lambda *_: None,
        role_of=ROLES.get,
        registry_id="registry-2",
        registries=lambda: ["registry-1", "registry-2"],
    )
    passport = Passport(
        identity="gone",
        role="admin",
        site="local",
        public_key=KEY.public,
        issued_at=1,
        expires_at=2,
        registry="registry-1",
    )
    with pytest.raises(AccessDenied, match="no member any more"):
        auditor.requester("gone", passport)
