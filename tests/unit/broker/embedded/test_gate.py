"""Admission and rights in the embedded broker."""

import pytest

from broker.access import AccessPolicy, Action, CredentialStore, Role
from broker.embedded import hardened
from broker.embedded.gate import Admission, Gate
from broker.engine import EngineSettings
from capability_schemas.errors import ConfigurationError
from capability_schemas.topics import Topics

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
        hardened.HardenedBroker(settings=EngineSettings(data_dir=tmp_path), gate=make_gate())
