"""Papers that are renewed from the folder, without asking anybody, and shown at once."""

from pathlib import Path

from broker.access.policy import Role
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.topics import Topics
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
