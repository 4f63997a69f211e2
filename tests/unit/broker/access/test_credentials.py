"""The credentials file: private, atomic, and without a single password in it."""

import json
import multiprocessing
import stat
import threading

import pytest

from broker.access.credentials import CredentialStore, VerifiedCache
from broker.access.policy import Role
from capability_schemas.errors import ConfigurationError, Conflict, NotFound, ProtocolError


@pytest.fixture
def store(tmp_path):
    return CredentialStore(tmp_path / "credentials.json", clock=lambda: 1_700_000_000_000)


def test_the_password_given_once_is_the_one_that_verifies(store):
    password = store.add("pump-7", Role.DEVICE)
    found = store.verify("pump-7", password)
    assert found is not None
    assert (found.role, found.created_at) == (Role.DEVICE, 1_700_000_000_000)
    assert store.verify("pump-7", password + "x") is None
    assert store.verify("pump-7", "") is None
    assert store.verify("pump-8", password) is None


def test_the_file_is_private_and_holds_no_password(store):
    password = store.add("pump-7", Role.DEVICE, public_key="a2V5")
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert password not in store.path.read_text()
    assert json.loads(store.path.read_text())["identities"]["pump-7"]["public_key"] == "a2V5"


def test_passwords_differ(store):
    assert store.add("a", Role.DEVICE) != store.add("b", Role.DEVICE)


def test_a_disabled_identity_is_known_and_refused(store):
    password = store.add("pump-7", Role.DEVICE)
    store.update("pump-7", disabled=True)
    assert store.identities()["pump-7"].disabled
    assert store.verify("pump-7", password) is None
    store.update("pump-7", disabled=False, public_key="a2V5")
    found = store.verify("pump-7", password)
    assert found is not None
    assert found.public_key == "a2V5"


def test_a_removed_identity_is_gone(store):
    password = store.add("pump-7", Role.DEVICE)
    store.remove("pump-7")
    assert store.verify("pump-7", password) is None
    assert not store.identities()


def test_mistakes_are_named(store):
    store.add("pump-7", Role.DEVICE)
    with pytest.raises(Conflict, match="pump-7"):
        store.add("pump-7", Role.NODE)
    with pytest.raises(NotFound):
        store.remove("pump-8")
    with pytest.raises(NotFound):
        store.update("pump-8", disabled=True)
    with pytest.raises(ProtocolError):
        store.add("pump/8", Role.DEVICE)


def test_another_process_sees_a_change_when_it_looks(store):
    other = CredentialStore(store.path)
    password = store.add("pump-7", Role.DEVICE)
    assert not other.identities()
    assert other.refresh()
    assert not other.refresh()
    assert other.verify("pump-7", password) is not None


def test_two_stores_do_not_undo_each_other(store):
    other = CredentialStore(store.path)
    store.add("a", Role.DEVICE)
    other.add("b", Role.DEVICE)
    store.add("c", Role.DEVICE)
    assert set(CredentialStore(store.path).identities()) == {"a", "b", "c"}


def test_a_change_is_made_to_what_the_file_says_not_to_what_is_held(store, monkeypatch):
    other = CredentialStore(store.path)
    store.add("a", Role.DEVICE)
    monkeypatch.setattr(other, "refresh", lambda: False)  # another thread has put the old back
    other.add("b", Role.DEVICE)
    assert set(CredentialStore(store.path).identities()) == {"a", "b"}


def test_a_slow_thread_does_not_put_the_old_back(store, monkeypatch):
    reader = CredentialStore(store.path)
    held: list[object] = []
    store.add("a", Role.DEVICE)
    quick = threading.Thread(target=reader.refresh)
    read = reader._read

    def read_slowly():
        found = read()
        if not held:
            held.append(found)
            store.add("b", Role.DEVICE)
            quick.start()
            quick.join(1)  # it waits for this very read, unless nothing holds it back
        return found

    monkeypatch.setattr(reader, "_read", read_slowly)
    reader.refresh()
    quick.join(60)
    assert set(reader.identities()) == {"a", "b"}


def _add_some(path, prefix):
    store = CredentialStore(path)
    for number in range(4):
        store.add(f"{prefix}{number}", Role.DEVICE)


def test_two_processes_do_not_undo_each_other(store):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add_some, args=(store.path, p)) for p in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    store.refresh()
    assert len(store.identities()) == 8


@pytest.mark.parametrize("content", ["", "{", '{"v": 2}', '{"v": 1, "identities": {"a/b": {}}}'])
def test_a_damaged_file_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "credentials.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"credentials\.json"):
        CredentialStore(path)


def test_a_file_that_vanishes_leaves_nobody(store):
    store.add("pump-7", Role.DEVICE)
    store.path.unlink()
    assert store.refresh()
    assert not store.identities()


def test_the_cache_knows_a_password_until_the_verifier_changes(store):
    password = store.add("pump-7", Role.DEVICE)
    credential = store.identities()["pump-7"]
    cache = VerifiedCache(limit=1)
    assert not cache.knows("pump-7", credential, password)
    cache.remember("pump-7", credential, password)
    assert cache.knows("pump-7", credential, password)
    assert not cache.knows("pump-7", credential, "other")
    assert not cache.knows("pump-7", credential.model_copy(update={"argon2": "x"}), password)
    cache.remember("pump-8", credential, password)
    assert not cache.knows("pump-7", credential, password)


def test_a_member_with_a_certificate_has_no_password_to_guess(store):
    assert store.add("edge-1", Role.NODE, serial="a1") == ""
    assert store.identities()["edge-1"].serials == ("a1",)
    for guess in ("", "a1", "edge-1"):
        assert store.verify("edge-1", guess) is None
    store.update("edge-1", serials=("b2", "a1"))
    assert store.identities()["edge-1"].serials == ("b2", "a1")


def test_a_given_password_ends_with_its_time(tmp_path):
    now = [1_000]
    store = CredentialStore(tmp_path / "credentials.json", clock=lambda: now[0])
    assert store.add("join-1", Role.ENROLLEE, password="given-to-it", expires_at=2_000) == (
        "given-to-it"
    )
    assert store.verify("join-1", "given-to-it") is not None
    now[0] = 2_000
    assert store.verify("join-1", "given-to-it") is None
