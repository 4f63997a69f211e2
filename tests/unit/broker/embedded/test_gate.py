"""Admission and rights in the embedded broker."""

import asyncio
import functools
import threading

import pytest

from broker.access import AccessPolicy, Action, CredentialStore, Role
from broker.audit import Tally
from broker.embedded import hardened
from broker.embedded.gate import Admission, Gate
from broker.embedded.refusals import Refusals
from broker.embedded.store import BrokerStore
from broker.engine import EngineSettings
from broker.tls import PeerCertificate
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError
from capability_schemas.topics import Topics

DEADLINE_S = 60.0
TASK = "foam/v1/local/task/pump-7"


@pytest.fixture
def store(tmp_path):
    return CredentialStore(tmp_path / "credentials.json")


@pytest.fixture
def make_gate(store):
    made = []

    def make():
        made.append(Gate(credentials=store, policy=AccessPolicy(Topics())))
        return made[-1]

    yield make
    for gate in made:
        gate.close()


async def test_only_the_right_password_gets_in(store, make_gate):
    password = store.add("pump-7", Role.DEVICE)
    gate = make_gate()
    assert await gate.admit("pump-7", password, "any") is Admission.ACCEPTED
    for identity, given in (("pump-7", "x"), ("pump-8", password), (None, None), ("pump-7", None)):
        assert await gate.admit(identity, given, "any") is Admission.NOT_AUTHORIZED


async def test_a_newcomer_need_not_wait_for_a_reload(store, make_gate):
    store.add("pump-7", Role.DEVICE)
    gate = make_gate()
    assert not gate.may("pump-8", Action.PUBLISH, TASK.replace("7", "8"))
    late = CredentialStore(store.path)
    password = late.add("pump-8", Role.DEVICE)
    late.add("edge-1", Role.NODE, serial="ab")
    assert await gate.admit("pump-8", password, "x") is Admission.ACCEPTED
    assert gate.may("pump-8", Action.PUBLISH, TASK.replace("7", "8"))
    shown = PeerCertificate(identity="edge-1", serial="ab")
    assert await gate.admit("edge-1", None, "edge-1", certificate=shown) is Admission.ACCEPTED


async def test_who_was_removed_is_gone_from_the_reload_on(store, make_gate):
    password = store.add("pump-7", Role.DEVICE)
    gate = make_gate()
    CredentialStore(store.path).remove("pump-7")
    assert await gate.admit("pump-9", password, "x") is Admission.NOT_AUTHORIZED  # reads the file
    assert await gate.reload() == {"pump-7"}
    assert await gate.admit("pump-7", password, "x") is Admission.NOT_AUTHORIZED


async def test_a_newcomer_does_not_get_in_by_a_damaged_file(store, make_gate):
    password = store.add("pump-7", Role.DEVICE)
    gate = make_gate()
    store.path.write_text("{")
    assert await gate.admit("pump-8", "x", "x") is Admission.NOT_AUTHORIZED
    assert await gate.admit("pump-7", password, "x") is Admission.ACCEPTED


async def test_a_password_is_hashed_once(store, make_gate, monkeypatch):
    password = store.add("pump-7", Role.DEVICE)
    gate, hashed = make_gate(), []
    verify = store.verify

    def counting(identity, given):
        hashed.append(identity)
        return verify(identity, given)

    monkeypatch.setattr(store, "verify", counting)
    for _ in range(3):
        assert await gate.admit("pump-7", password, "any") is Admission.ACCEPTED
    assert hashed == ["pump-7"]
    assert await gate.admit("pump-7", "wrong", "any") is Admission.NOT_AUTHORIZED
    assert hashed == ["pump-7", "pump-7"]


async def test_components_have_their_client_id_to_themselves(store, make_gate):
    node, device = store.add("edge-1", Role.NODE), store.add("pump-7", Role.DEVICE)
    gate = make_gate()
    assert await gate.admit("edge-1", node, "edge-1") is Admission.ACCEPTED
    assert await gate.admit("edge-1", node, "edge-1-b") is Admission.IDENTIFIER_REJECTED
    assert await gate.admit("pump-7", device, "edge-1") is Admission.IDENTIFIER_REJECTED


async def test_a_reload_tells_whose_access_changed(store, make_gate):
    passwords = {name: store.add(name, Role.DEVICE) for name in ("pump-7", "pump-8", "pump-9")}
    gate = make_gate()
    assert gate.may("pump-7", Action.PUBLISH, TASK)
    store.remove("pump-7")
    store.update("pump-8", disabled=True)
    store.update("pump-9", public_key="a2V5")
    assert gate.may("pump-7", Action.PUBLISH, TASK)
    assert await gate.reload() == {"pump-7", "pump-8"}
    assert not gate.may("pump-7", Action.PUBLISH, TASK)
    assert await gate.admit("pump-8", passwords["pump-8"], "x") is Admission.NOT_AUTHORIZED
    assert await gate.admit("pump-9", passwords["pump-9"], "x") is Admission.ACCEPTED
    assert await gate.reload() == frozenset()


async def test_a_damaged_file_leaves_the_old_rules(store, make_gate):
    store.add("pump-7", Role.DEVICE)
    gate = make_gate()
    store.path.write_text("{")
    with pytest.raises(ConfigurationError):
        await gate.reload()
    assert gate.may("pump-7", Action.PUBLISH, TASK)


async def test_another_release_of_amqtt_is_refused(make_gate, monkeypatch, tmp_path):
    monkeypatch.setattr(hardened, "version", lambda _: "0.13.0")
    with pytest.raises(ConfigurationError, match=r"0\.13\.0"):
        hardened.HardenedBroker(
            settings=EngineSettings(data_dir=tmp_path),
            gate=make_gate(),
            refusals=Refusals(tally=Tally(lambda: 0), topics=Topics()),
            store=BrokerStore(tmp_path / "store"),
        )


EDGE = PeerCertificate("edge-1", "a1")


async def test_a_certificate_lets_its_member_in(store, make_gate):
    store.add("edge-1", Role.NODE, serial="a1")
    gate = make_gate()
    admit = functools.partial(gate.admit, certificate=EDGE)
    assert await admit("edge-1", None, "edge-1") is Admission.ACCEPTED
    assert await admit("edge-1", "whatever", "edge-1") is Admission.ACCEPTED
    assert await admit("edge-1", None, "edge-2") is Admission.IDENTIFIER_REJECTED
    assert await admit("edge-2", None, "edge-1") is Admission.NOT_AUTHORIZED
    assert await admit(None, None, "edge-1") is Admission.NOT_AUTHORIZED


async def test_a_certificate_that_does_not_count_spoils_a_right_password(store, make_gate):
    password = store.add("pump-7", Role.DEVICE)
    gate = make_gate()
    stolen = PeerCertificate("pump-7", "b2")
    assert await gate.admit("pump-7", password, "x") is Admission.ACCEPTED
    assert await gate.admit("pump-7", password, "x", certificate=stolen) is Admission.NOT_AUTHORIZED


async def test_renewal_keeps_connections_and_another_enrollment_ends_them(store, make_gate):
    store.add("edge-1", Role.NODE, serial="a1")
    gate = make_gate()
    store.update("edge-1", serials=("b2", "a1"))
    assert await gate.reload() == frozenset()
    assert await gate.admit("edge-1", None, "edge-1", certificate=EDGE) is Admission.ACCEPTED
    store.update("edge-1", serials=("c3", "b2"))
    assert await gate.reload() == frozenset()
    assert await gate.admit("edge-1", None, "edge-1", certificate=EDGE) is Admission.NOT_AUTHORIZED
    store.update("edge-1", serials=("d4",))
    assert await gate.reload() == {"edge-1"}


async def test_guessing_costs_the_guesser_alone(store, monkeypatch):
    now = [1_000_000]
    password = store.add("pump-7", Role.DEVICE)
    other = store.add("pump-8", Role.DEVICE)
    third = store.add("pump-9", Role.DEVICE)
    hashed = []
    verify = store.verify

    def counting(identity, given):
        hashed.append(identity)
        return verify(identity, given)

    monkeypatch.setattr(store, "verify", counting)
    gate = Gate(credentials=store, policy=AccessPolicy(Topics()), clock=lambda: now[0])
    try:
        assert await gate.admit("pump-8", other, "y", address="10.0.0.9") is Admission.ACCEPTED
        for number in range(1000):
            guess = f"guess-{number}"
            answer = await gate.admit("pump-7", guess, "x", address="10.0.0.9")
            assert answer is Admission.NOT_AUTHORIZED
        assert len(hashed) < 10  # the rest cost nothing
        # Its neighbour behind the same address, with a password not seen yet, is let in.
        assert await gate.admit("pump-9", third, "z", address="10.0.0.9") is Admission.ACCEPTED
        # Somebody else is let in, a known password too, and the guesser after its pause.
        assert await gate.admit("pump-7", password, "x", address="10.0.0.8") is Admission.ACCEPTED
        assert await gate.admit("pump-8", other, "y", address="10.0.0.9") is Admission.ACCEPTED
        now[0] += 61_000
        assert await gate.admit("pump-7", "wrong", "x", address="10.0.0.9") is not None
        assert hashed[-1] == "pump-7"
        before = len(hashed)
        assert (
            await gate.admit("pump-7", "wrong", "x", address="10.0.0.9") is Admission.NOT_AUTHORIZED
        )
        assert len(hashed) == before  # and the next pause is longer
    finally:
        gate.close()


async def test_guessers_of_one_network_count_as_one(store, make_gate, monkeypatch):
    store.add("pump-7", Role.DEVICE)
    hashed = []
    monkeypatch.setattr(store, "verify", lambda identity, _: hashed.append(identity))
    gate = make_gate()
    for number in range(50):
        await gate.admit("pump-7", "wrong", "x", address=f"2001:db8::{number}")
    assert len(hashed) < 10


async def test_a_flood_of_wrong_passwords_delays_the_flooder_alone(store, make_gate, monkeypatch):
    """What waits is bounded, known passwords do not wait, and other addresses have their turn."""
    known, late = store.add("pump-7", Role.DEVICE), store.add("pump-8", Role.DEVICE)
    gate, flooded, hashed = make_gate(), threading.Semaphore(0), []
    assert await gate.admit("pump-7", known, "a", address="10.0.0.8") is Admission.ACCEPTED
    verify = store.verify

    def slow(identity, given):
        assert flooded.acquire(timeout=DEADLINE_S)
        hashed.append(identity)
        return verify(identity, given) if identity == "pump-8" else None

    monkeypatch.setattr(store, "verify", slow)
    flood = [
        asyncio.create_task(gate.admit(f"guess-{number}", "wrong", "x", address="10.0.0.9"))
        for number in range(600)
    ]
    try:
        async with asyncio.timeout(DEADLINE_S):
            refused, _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
            assert {one.result() for one in refused} == {Admission.UNAVAILABLE}
            for address in ("10.0.0.8", "10.0.0.9"):
                answer = await gate.admit("pump-7", known, "a", address=address)
                assert answer is Admission.ACCEPTED
            newcomer = asyncio.create_task(gate.admit("pump-8", late, "b", address="10.0.0.7"))
            flooded.release(20)
            assert await newcomer is Admission.ACCEPTED
            assert hashed.index("pump-8") < 10
            flooded.release(600)
            answers = [await one for one in flood]
            assert answers.count(Admission.UNAVAILABLE) > 50
            assert set(answers) == {Admission.UNAVAILABLE, Admission.NOT_AUTHORIZED}
    finally:
        flooded.release(1000)


async def test_an_expired_login_is_refused(tmp_path):
    now = [1_000]
    store = CredentialStore(tmp_path / "credentials.json", clock=lambda: now[0])
    store.add("join-1", Role.ENROLLEE, password="p" * 32, expires_at=2_000)
    gate = Gate(credentials=store, policy=AccessPolicy(Topics()), clock=lambda: now[0])
    try:
        assert await gate.admit("join-1", "p" * 32, "x") is Admission.ACCEPTED
        now[0] = 2_000
        assert await gate.admit("join-1", "p" * 32, "x") is Admission.NOT_AUTHORIZED
    finally:
        gate.close()


async def test_a_node_of_a_tenant_may_not_listen_to_its_neighbours(store, make_gate):
    for name, tenant in (("of-acme", "acme"), ("of-all", "*"), ("of-none", None)):
        store.add(name, Role.NODE, attested=CapabilityPolicy(tenant=tenant))
    gate = make_gate()
    heard = {
        name
        for name in ("of-acme", "of-all", "of-none")
        if gate.may(name, Action.SUBSCRIBE, "foam/v1/local/node/other/load")
    }
    assert heard == {"of-all", "of-none"}
    store.update("of-none", attested=CapabilityPolicy(tenant="bolt"))
    await gate.reload()
    assert not gate.may("of-none", Action.RECEIVE, "foam/v1/local/node/other/load")
