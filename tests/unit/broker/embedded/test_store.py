"""What the embedded broker still knows after it was killed, whatever happened to its file."""

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from broker.embedded.store import BrokerStore, Found, StoredMessage
from capability_schemas.errors import ConfigurationError

WILL = StoredMessage(topic="node/a/state", payload=b"offline", qos=1, username="a")


def message(topic: str, payload: bytes, qos: int = 1) -> StoredMessage:
    return StoredMessage(topic=topic, payload=payload, qos=qos)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "retained.store"


def opened(path: Path) -> tuple[BrokerStore, Found]:
    store = BrokerStore(path)
    return store, store.open()


def again(path: Path) -> Found:
    """What a broker finds after the one before was killed: nobody closed anything."""
    store, found = opened(path)
    store.close()
    return found


def payloads(found: Found) -> dict[str, bytes]:
    return {kept.topic: kept.payload for kept in found.retained}


def test_a_new_one_is_empty_and_for_its_owner_only(path: Path) -> None:
    store, found = opened(path)
    assert found == Found()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store.close()
    store.close()


def test_what_was_kept_last_is_there_without_any_closing(path: Path) -> None:
    store, _ = opened(path)
    for one in (message("a", b"1"), message("b", b"x" * 100_000, 0), message("a", b"2\n\0")):
        store.keep(one)
    found = again(path)
    assert {one.topic: one for one in found.retained} == {
        "a": message("a", b"2\n\0"),
        "b": message("b", b"x" * 100_000, 0),
    }
    store.close()


def test_what_was_cleared_is_gone(path: Path) -> None:
    store, _ = opened(path)
    store.keep(message("a", b"1"))
    store.keep(message("a", b""))
    store.keep(message("never", b""))
    assert again(path).retained == []
    store.close()


def test_wills_wait_until_they_are_settled(path: Path) -> None:
    store, _ = opened(path)
    store.expect("a", WILL)
    store.expect("b", WILL)
    store.settle("b")
    store.settle("never there")
    found = again(path)
    assert found.wills == {"a": WILL}
    assert found.retained == []
    store.close()


def test_the_file_does_not_grow_with_what_was_replaced(path: Path) -> None:
    store, _ = opened(path)
    for number in range(3000):
        store.keep(message("a", b"%04d" % number * 300))
    assert path.stat().st_size < 2 * 1024 * 1024
    assert payloads(again(path)) == {"a": b"2999" * 300}
    store.close()


def filled(path: Path) -> int:
    """Write three messages; return where the second begins."""
    store, _ = opened(path)
    store.keep(message("a", b"1" * 50))
    first = path.stat().st_size
    store.keep(message("b", b"2" * 50))
    store.keep(message("c", b"3" * 50))
    store.close()
    return first


@pytest.mark.parametrize("cut", [1, 10, 50, 70])
def test_half_a_record_at_the_end_is_passed_over(path: Path, cut: int) -> None:
    filled(path)
    os.truncate(path, path.stat().st_size - cut)
    found = again(path)
    assert set(payloads(found)) == {"a", "b"}
    assert found.aside is None
    assert set(payloads(again(path))) == {"a", "b"}


@pytest.mark.parametrize("offset", [0, 3, 5, 9, 11, 14, 40])
def test_damage_is_set_aside_and_what_was_read_before_counts(path: Path, offset: int) -> None:
    at = filled(path) + offset
    data = bytearray(path.read_bytes())
    data[at] ^= 0x5A
    path.write_bytes(data)
    found = again(path)
    assert payloads(found) == {"a": b"1" * 50}
    assert found.aside is not None
    assert found.aside.read_bytes() == data
    after = again(path)
    assert payloads(after) == {"a": b"1" * 50}
    assert after.aside is None


@pytest.mark.parametrize(
    "content",
    [b"FOAM broker store 9\n", b"{}", bytes(range(256)) * 9],
    ids=["newer", "other", "bytes"],
)
def test_what_is_no_store_is_set_aside(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found = again(path)
    assert found.retained == []
    assert found.aside is not None


@pytest.mark.parametrize("content", [b"", b"FOAM bro"], ids=["empty", "begun"])
def test_a_file_of_a_broker_that_died_at_once_is_a_new_one(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert again(path) == Found()


def test_only_the_last_damaged_ones_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        monkeypatch.setattr(time, "strftime", lambda *_, number=number: f"T{number}")
        path.write_bytes(b"damaged")
        again(path)
    names = sorted(one.name for one in path.parent.glob("*.damaged-*"))
    assert names == [f"{path.name}.damaged-T3", f"{path.name}.damaged-T4"]


def test_a_full_disk_costs_nothing_once_there_is_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = opened(path)
    store.keep(message("a", b"1"))
    os.close(store.unsynced() or -1)
    write = os.write

    def full(file: int, data: memoryview) -> int:
        if len(data) > 5:
            return write(file, data[:5])  # some of it fits
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        store.keep(message("b", b"2"))
        store.keep(message("a", b""))
        assert store.unsynced() is None
    assert payloads(again(path)) == {"a": b"1"}  # as it was: no half record
    assert store.unsynced() is None  # written anew, and synced with it
    assert payloads(again(path)) == {"b": b"2"}
    store.close()


def test_what_the_disk_may_not_hold_is_told_once(path: Path) -> None:
    store, _ = opened(path)
    assert store.unsynced() is None
    store.keep(message("a", b"1"))
    file = store.unsynced()
    assert file is not None
    os.close(file)
    assert store.unsynced() is None
    store.close()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used"):
        BrokerStore(tmp_path / "missing" / "retained.store").open()
