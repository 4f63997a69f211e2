"""Papers that are renewed from the folder, without asking anybody, and shown at once."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.access.policy import Role
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.errors import AccessDenied
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import TrustState
from capability_schemas.wire import encode
from foam.mesh import Identity, MeshFolder
from foam.renewal import Renewal
from foam.settings import Settings
from foam.wiring.member import takes_unsigned

DAY_MS = 86_400_000


async def test_a_folder_that_holds_the_registrys_key_renews_by_itself(tmp_path: Path) -> None:
    folder = MeshFolder(tmp_path).prepare()
    folder.ensure("registry-1", Role.REGISTRY, site="local")
    identity = folder.ensure("router-1", Role.ROUTER, site="local")
    assert identity.renew_at is not None
    due = identity.renew_at
    shown: list[Identity] = []
    async with MemorySession(broker=MemoryBroker(), client_id="router-1") as session:
        renewal = Renewal(
            identity=identity,
            folder=folder.identity_path("router-1").parent,
            key=folder.signing_key(identity),
            session=session,
            topics=Topics(),
            home=folder,
            shown=shown.append,
            clock=lambda: due + 1,
        )
        await renewal.renew()
    (renewed,) = shown
    assert renewed.passport is not None
    assert renewed.passport.issued_at == due + 1
    assert renewed.renew_at == due + 1 + 20 * DAY_MS
    assert folder.identity("router-1") == renewed


def test_unsigned_requests_are_taken_at_a_plain_broker_of_this_machine_only() -> None:
    nobody_said = Settings()
    assert takes_unsigned(nobody_said, "mqtt://127.0.0.1:1883")
    assert takes_unsigned(nobody_said, "ws://localhost:8080/mqtt")
    assert not takes_unsigned(nobody_said, "mqtts://127.0.0.1:8883")
    assert not takes_unsigned(nobody_said, "mqtt://203.0.113.5:1883")
    cluster = "mqtt://127.0.0.1:1883,mqtt://127.0.0.1:1884"
    assert takes_unsigned(nobody_said, cluster)
    assert not takes_unsigned(nobody_said, f"{cluster},mqtt://203.0.113.5:1883")
    assert takes_unsigned(Settings(unsigned_admin="allow"), "mqtts://203.0.113.5:8883")
    assert not takes_unsigned(Settings(unsigned_admin="refuse"), "mqtt://127.0.0.1:1883")


# ---- a member that is none any more


async def _kept(
    tmp_path: Path,
    *,
    void_before: Callable[[int], int],
    forged: bool = False,
    wait_s: float = 0.2,
) -> asyncio.Task[None]:
    """Keep the papers of a router of which the registry says that it was thrown out."""
    folder = MeshFolder(tmp_path).prepare()
    registry = folder.ensure("registry-1", Role.REGISTRY, site="local")
    identity = folder.ensure("router-1", Role.ROUTER, site="local")
    assert identity.passport is not None
    void = void_before(identity.passport.issued_at)
    said = TrustState(
        member="router-1",
        state="revoked",
        at=void,
        void_before=void,
        reason="stolen",
        registry="registry-1",
    )
    key = SigningKey.generate() if forged else folder.signing_key(registry)
    broker, topics = MemoryBroker(), Topics()
    async with (
        MemorySession(broker=broker, client_id="registry-1") as theirs,
        MemorySession(broker=broker, client_id="router-1") as session,
    ):
        await session.wait_connected(30)
        renewal = Renewal(
            identity=identity,
            folder=folder.identity_path("router-1").parent,
            key=folder.signing_key(identity),
            session=session,
            topics=topics,
        )
        theirs.post(
            topics.build(TopicKind.TRUST, member="router-1"), encode(sign(said, key)), retain=True
        )
        await broker.settle()
        keeping = asyncio.create_task(renewal.keep())
        await asyncio.wait({keeping}, timeout=wait_s)
        keeping.cancel()
        await asyncio.wait({keeping}, timeout=30)
        return keeping


async def test_a_member_that_was_thrown_out_ends(tmp_path: Path) -> None:
    keeping = await _kept(tmp_path, void_before=lambda issued_at: issued_at + 1, wait_s=30)
    with pytest.raises(AccessDenied, match="router-1 was revoked: stolen; it has to enroll again"):
        keeping.result()


async def test_an_old_revocation_ends_nobody_who_was_let_in_since(tmp_path: Path) -> None:
    keeping = await _kept(tmp_path, void_before=lambda issued_at: issued_at)
    assert keeping.cancelled()


async def test_nobody_but_the_registry_ends_a_member(tmp_path: Path) -> None:
    keeping = await _kept(tmp_path, void_before=lambda issued_at: issued_at + 1, forged=True)
    assert keeping.cancelled()
