"""The store's names, leases and budget, without a network."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from capability_schemas.errors import ConfigurationError, Conflict, NotFound
from node_agent.models import ModelStore, StoredModel
from node_agent.models.store import Origin, source_key

ROOT = Path(__file__).resolve().parents[4]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_ms = 1_800_000_000_000

    def __call__(self) -> int:
        self.now_ms += 1000
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[ModelStore]:
    with ModelStore(tmp_path / "models", budget_bytes=1000, clock=clock) as made:
        yield made


def put(store: ModelStore, name: str, data: bytes, *, pinned: bool = False) -> StoredModel:
    store.sweep()  # makes the folders
    file = store.partials / f"{name}.partial"
    file.write_bytes(data)
    origin = Origin(
        name=name, reference=name, source=source_key(name), any_format=True, pinned=pinned
    )
    return store.adopt(file, hashlib.sha256(data).hexdigest(), origin)


def names(store: ModelStore) -> list[str]:
    return [model.record.name for model in store.list()]


def test_a_path_that_exists_is_returned_as_it_is(store: ModelStore, tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(b"x")
    assert store.resolve(str(path)) == path
    assert store.digest(path) is None
    assert not store.folder.exists()


def test_what_is_not_there_says_how_to_get_it(store: ModelStore) -> None:
    with pytest.raises(ConfigurationError, match="the store is empty; get it with `foam model pul"):
        store.resolve("qwen")
    put(store, "tiny", b"1")
    with pytest.raises(ConfigurationError, match=r"stored are tiny; .*pull hf:owner/repo:Q4_0"):
        store.resolve("hf:owner/repo:Q4_0")
    with pytest.raises(ConfigurationError):
        store.resolve("x" * 5000)


def test_digests_may_be_shortened_while_one_model_fits(store: ModelStore) -> None:
    made = put(store, "one", b"1")
    assert store.resolve(made.record.digest[:6]) == made.path
    assert store.resolve(f"sha256:{made.record.digest}") == made.path
    twin = made.record.digest[:10] + "0" * 54
    (made.path.parent / twin).write_bytes(b"2")
    record = made.record.model_copy(update={"name": "two", "digest": twin})
    (store.folder / "names" / "two.json").write_text(record.model_dump_json())
    with pytest.raises(ConfigurationError, match="fits one, two: give more digits"):
        store.resolve(made.record.digest[:6])


def test_what_was_used_longest_ago_is_evicted_first(store: ModelStore) -> None:
    for name in ("a", "b", "c"):
        put(store, name, name.encode() * 300)
    store.resolve("a")
    store.close()
    put(store, "d", b"d" * 400)
    assert sorted(names(store)) == ["a", "c", "d"]
    assert names(store)[0] == "d"


def test_models_in_use_and_pinned_ones_stay(store: ModelStore) -> None:
    put(store, "pinned", b"p" * 300, pinned=True)
    put(store, "used", b"u" * 300)
    put(store, "idle", b"i" * 300)
    store.resolve("used")
    with pytest.raises(
        ConfigurationError, match=r"needs 700 bytes, the disk budget of .* is 1000: 600"
    ):
        put(store, "big", b"b" * 700)
    assert sorted(names(store)) == ["idle", "pinned", "used"]  # nothing evicted in vain
    put(store, "fits", b"f" * 400)
    assert sorted(names(store)) == ["fits", "pinned", "used"]
    store.pin("pinned", pinned=False)
    store.close()
    put(store, "more", b"m" * 900)
    assert names(store) == ["more"]


def test_a_model_that_another_process_uses_is_kept_until_it_dies(store: ModelStore) -> None:
    put(store, "shared", b"s" * 600)
    program = (
        "import sys; from pathlib import Path; from node_agent.models import ModelStore\n"
        "store = ModelStore(Path(sys.argv[1])); store.resolve('shared')\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(store.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert store.show("shared").in_use
        with pytest.raises(ConfigurationError, match="in use or pinned"):
            put(store, "new", b"n" * 600)
        with pytest.raises(Conflict, match="in use"):
            store.remove("shared")
        holder.kill()
        holder.wait(20)
    assert not store.show("shared").in_use
    put(store, "new", b"n" * 600)
    assert names(store) == ["new"]


def test_removing_by_name_keeps_a_file_that_has_another_name(store: ModelStore) -> None:
    made = put(store, "one", b"1")
    put(store, "two", b"1")
    store.remove("one")
    assert made.path.is_file()
    store.resolve("two")
    with pytest.raises(Conflict):
        store.remove("two")
    assert store.remove("two", force=True).record.digest == made.record.digest
    assert not made.path.exists()
    with pytest.raises(NotFound, match="there is no model two"):
        store.remove("two")


def test_a_file_that_shrank_or_vanished_is_not_handed_out(store: ModelStore) -> None:
    made = put(store, "one", b"12345")
    made.path.chmod(0o644)
    made.path.write_bytes(b"12")
    with pytest.raises(ConfigurationError, match=r"is damaged: .* has 2 bytes instead of 5"):
        store.resolve("one")
    made.path.unlink()
    with pytest.raises(ConfigurationError, match=r"cannot be read.*pull it again"):
        store.resolve("one")
    assert store.list()[0].used_at_ms == 0


def test_old_partials_and_nameless_files_are_swept(store: ModelStore, clock: Clock) -> None:
    made = put(store, "one", b"1")
    old, fresh = store.partials / "old.partial", store.partials / "fresh.partial"
    for path in (old, fresh, old.with_suffix(".json")):
        path.write_text("{}")
    week_ago = clock.now_ms / 1000 - 8 * 86_400
    os.utime(old, (week_ago, week_ago))
    os.utime(fresh, (clock.now_ms / 1000, clock.now_ms / 1000))
    stray = made.path.with_name("f" * 64)
    stray.write_bytes(b"stray")
    store.sweep()
    assert sorted(path.name for path in store.partials.iterdir()) == ["fresh.partial"]
    assert not stray.exists()
    assert made.path.exists()


def test_a_damaged_record_hides_one_model_only(store: ModelStore) -> None:
    put(store, "one", b"1")
    (store.folder / "names" / "two.json").write_text("{half")
    assert names(store) == ["one"]


@pytest.mark.parametrize(
    "change", [{"digest": "../../outside"}, {"name": "../one"}, {"name": "another"}]
)
def test_a_record_that_points_elsewhere_is_damaged(
    store: ModelStore, change: dict[str, str]
) -> None:
    put(store, "one", b"1")
    record = put(store, "two", b"2").record.model_dump() | change
    (store.folder / "names" / "two.json").write_text(json.dumps(record))
    assert names(store) == ["one"]


def test_more_than_the_disk_holds_is_refused(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models")
    with pytest.raises(ConfigurationError, match=f"needs {1 << 60} more bytes on the disk"):
        store.make_room(1 << 60)


def test_a_node_that_uses_the_store_loads_no_http_library() -> None:
    program = "import sys, node_agent.models; sys.exit('httpx2' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode
        == 0
    )
