"""What operators may order of enrollment, and what the registry notices by itself."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from broker.access.credentials import CredentialStore
from broker.access.orders import Requester
from broker.access.policy import Role
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.errors import AccessDenied, NotFound, Unavailable
from capability_schemas.signing import SigningKey
from capability_schemas.topics import Topics
from registry.enrollment import EnrollmentDesk, EnrollmentService
from registry.store.audit import AuditLog

KEY = SigningKey.generate()
OLGA = Requester("olga", Role.OPERATOR)
ANNA = Requester("anna", Role.ADMIN)


class World:
    """A desk, its service, and the file of credentials as a command on the machine sees it."""

    def __init__(self, stack, folder):
        self.now = 1_790_000_000_000
        self.elsewhere = CredentialStore(folder / "credentials.json")
        self.desk = EnrollmentDesk(
            path=folder / "enrollment.json",
            site="local",
            registry_id="registry-1",
            key=KEY,
            credentials=CredentialStore(folder / "credentials.json"),
            authority=None,
            brokers=lambda: ["mqtt://broker.test"],
            clock=lambda: self.now,
        )
        self.trail = stack.enter_context(AuditLog(folder / "audit.sqlite", key=KEY))
        self.voided = []

    async def start(self, stack):
        session = MemorySession(broker=MemoryBroker(), client_id="registry-1")
        self.service = EnrollmentService(
            session=await stack.enter_async_context(session),
            topics=Topics(),
            desk=self.desk,
            trail=self.trail,
            emit=lambda _kind, _data: None,
            registry_id="registry-1",
            changed=lambda: self.voided.append(dict(self.desk.revoked)),
        )
        await stack.enter_async_context(self.service)

    def removed(self):
        return [entry.subject for entry in self.trail.latest(action="enrollment_removed")]

    async def order(self, verb, asker, **args):
        return await self.service.verbs[verb](args, asker)


@pytest.fixture
async def world(tmp_path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(stack, tmp_path)
        await world.start(stack)
        yield world


@pytest.mark.parametrize("later_ms", [0, 2_000])
async def test_an_operator_takes_no_token_of_an_administrator_back(world, later_ms):
    token = world.desk.create_token(role=Role.ADMIN, ttl_ms=1_000, by="anna", approve=True)
    world.now += later_ms
    with pytest.raises(AccessDenied, match="may not revoke a token for role admin"):
        await world.order("token_revoke", OLGA, token=token.id)
    with pytest.raises(NotFound):
        await world.order("token_revoke", OLGA, token="t-unknown")
    await world.order("token_revoke", ANNA, token=token.id)


async def test_an_operator_throws_out_nobody_that_was_made_a_moment_ago(world):
    world.elsewhere.add("boss", Role.ADMIN)
    with pytest.raises(AccessDenied, match="may not throw out members of role admin"):
        await world.order("revoke", OLGA, id="boss")
    with pytest.raises(NotFound, match="nobody"):
        await world.order("revoke", OLGA, id="nobody")
    world.elsewhere.add("pump-7", Role.DEVICE)
    await world.order("revoke", OLGA, id="pump-7")
    world.elsewhere.refresh()
    assert set(world.elsewhere.identities()) == {"boss"}


async def test_one_removed_on_this_machine_is_voided_told_and_written_down(
    world, eventually, monkeypatch
):
    monkeypatch.setattr("registry.enrollment.service._AGAIN_S", 0.01)
    for name in ("edge-1", "edge-2", "edge-3"):
        world.elsewhere.add(name, Role.NODE)
    world.service.follow_members()
    await eventually(lambda: world.desk._book.members)
    write, tries = world.trail.write, []

    def fail_once(*args, **more):
        tries.append(1)
        if len(tries) == 1:
            raise Unavailable("the disk is full")
        return write(*args, **more)

    monkeypatch.setattr(world.trail, "write", fail_once)
    world.elsewhere.remove("edge-1")
    world.elsewhere.remove("edge-2")
    world.service.follow_members()
    await eventually(lambda: len(world.removed()) == 2)
    assert set(world.removed()) == {"edge-1", "edge-2"}
    assert world.voided[0] == {"edge-1": world.now, "edge-2": world.now}
