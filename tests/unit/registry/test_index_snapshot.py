import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from capability_schemas.errors import ConfigurationError
from registry.encoders import Vectors
from registry.index import CapabilityIndex, Neighbour, snapshot
from registry.index.hnsw import Graph
from support.executors import SteppedExecutor

D = 16
ZONE = [frozenset({"zone:a"})]


def vectors(count: int, seed: int = 0) -> Vectors:
    rows: Vectors = np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)
    units: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units


def filled(exact_limit: int = 60) -> CapabilityIndex:
    """Two shards, one with a graph that has graves, keys that are odd, and empty rows."""
    index = CapabilityIndex(dimension=D, space="words@1", exact_limit=exact_limit)
    for at, row in enumerate(vectors(200)):
        attributes = frozenset({f"zone:{'ab'[at % 2]}", "data:private"})
        index.upsert(f'k "{at}"\nü', row, attributes=attributes, domain="ab"[at % 5 == 0])
    for at in range(0, 60, 3):
        index.remove(f'k "{at}"\nü')
    return index


def answers(index: CapabilityIndex) -> list[list[Neighbour]]:
    asked = vectors(12, seed=3)
    return [index.search(row, 8) for row in asked] + [
        index.search(row, 8, demands=ZONE) for row in asked
    ]


def load(path: Path, **changed: object) -> CapabilityIndex:
    told: dict[str, object] = {"dimension": D, "space": "words@1", "exact_limit": 60}
    return CapabilityIndex.load(path, **(told | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("exact_limit", [60, 10_000], ids=["graphs", "compared"])
def test_what_was_saved_comes_back(tmp_path: Path, exact_limit: int) -> None:
    index = filled(exact_limit)
    index.save(tmp_path / "index").result()
    again = load(tmp_path / "index", exact_limit=exact_limit)
    assert again.approximate == index.approximate == (exact_limit == 60)
    assert len(again) == len(index)
    assert answers(again) == answers(index)


def test_what_came_back_lives_on(tmp_path: Path) -> None:
    index = filled()
    index.save(tmp_path).result()
    again = load(tmp_path)
    for each in (index, again):
        for at, row in enumerate(vectors(200, seed=1)):
            each.upsert(f"new{at}", row, domain="c")
        for at in range(61, 140):
            assert each.remove(f'k "{at}"\nü')
    for asked in vectors(10, seed=4):
        mine = [key for key, _ in again.search(asked, 10)]
        theirs = [key for key, _ in index.search(asked, 10)]
        assert len(set(mine) & set(theirs)) >= 9
    kept = {f"new{at}" for at in range(30)}
    assert again.retain(kept) == len(index) - 30
    assert {key for key, _ in again.search(vectors(1)[0], 99)} == kept


def test_the_breadth_of_search_survives_loading(tmp_path: Path) -> None:
    """hnswlib forgets it: the first answers after loading would be poor."""
    index = CapabilityIndex(dimension=D, space="words@1", exact_limit=60)
    rows = vectors(3_000)
    for at, row in enumerate(rows):
        index.upsert(f"k{at}", row)
    index.save(tmp_path).result()
    again = load(tmp_path)
    for asked in vectors(20, seed=7):
        assert again.search(asked, 10) == index.search(asked, 10)


def test_an_empty_index_can_be_saved(tmp_path: Path) -> None:
    CapabilityIndex(dimension=D, space="words@1").save(tmp_path).result()
    assert len(load(tmp_path)) == 0


def test_a_later_snapshot_replaces_the_earlier_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    index = filled()
    index.save(tmp_path).result()
    before = {path.name for path in tmp_path.iterdir()}
    index.upsert("late", vectors(1, seed=9)[0], domain="a")
    index.save(tmp_path).result()
    after = {path.name for path in tmp_path.iterdir()}
    assert before & after == {"manifest.json"}
    assert len(after) == len(before)
    assert "late" in load(tmp_path)


def test_it_holds_the_moment_of_saving_whatever_changes_meanwhile(tmp_path: Path) -> None:
    index = filled()
    worker = SteppedExecutor()
    owned = CapabilityIndex(dimension=D, space="words@1", exact_limit=60, background=worker)
    for at, row in enumerate(vectors(150)):
        owned.upsert(f"k{at}", row)
    while worker.step():
        owned.maintain()
    assert owned.approximate
    then = answers(owned)
    saving = owned.save(tmp_path)
    assert owned.save(tmp_path) is saving
    for at, row in enumerate(vectors(150, seed=2)):
        owned.upsert(f"k{(at * 7) % 200}", row)
        if at % 3 == 0:
            owned.remove(f"k{at}")
    live = answers(owned)
    while worker.step():
        pass
    saving.result()
    while owned.maintain():
        worker.step()
    assert answers(load(tmp_path)) == then
    for mine, theirs in zip(answers(owned), live, strict=True):
        assert len({key for key, _ in mine} & {key for key, _ in theirs}) >= len(mine) - 1
    assert len(index) != len(owned)


def test_it_is_written_beside_the_owner(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        index = CapabilityIndex(dimension=D, space="words@1", background=executor)
        for at, row in enumerate(vectors(500)):
            index.upsert(f"k{at}", row)
        saving = index.save(tmp_path)
        index.remove("k0")
        saving.result(timeout=20)
    assert len(load(tmp_path)) == 500
    assert len(index) == 499


class TestRefused:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        filled().save(tmp_path).result()
        return tmp_path

    def test_where_nothing_was_saved(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="no index snapshot"):
            load(tmp_path / "nowhere")

    def test_of_another_space(self, folder: Path) -> None:
        with pytest.raises(ConfigurationError, match="vector space 'words@1' with 16 dimensions"):
            load(folder, space="words@2")
        with pytest.raises(ConfigurationError, match="not 'words@1' with 384"):
            load(folder, dimension=384)

    def test_of_another_version(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
        with pytest.raises(ConfigurationError, match=r"version 2, not 'foam.index' version 1"):
            load(folder)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "foam.index", "version": 1}'])
    def test_without_a_manifest_to_rely_on(self, folder: Path, text: str) -> None:
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ConfigurationError, match="torn"):
            load(folder)

    @pytest.mark.parametrize("suffix", [".data", ".graph"])
    @pytest.mark.parametrize(
        "harm",
        [
            lambda raw: raw[:-1],
            lambda raw: b"",
            lambda raw: raw + b"x",
            lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:],
        ],
        ids=["cut", "emptied", "longer", "one bit"],
    )
    def test_of_which_a_file_was_harmed(
        self, folder: Path, suffix: str, harm: Callable[[bytes], bytes]
    ) -> None:
        for path in folder.glob(f"*{suffix}"):
            path.write_bytes(harm(path.read_bytes()))
        with pytest.raises(ConfigurationError, match="torn"):
            load(folder)

    def test_of_which_a_file_is_missing(self, folder: Path) -> None:
        next(folder.glob("*.graph")).unlink()
        with pytest.raises(ConfigurationError, match="torn"):
            load(folder)

    def test_that_names_files_elsewhere(self, folder: Path) -> None:
        raw = (folder / "manifest.json").read_text()
        name = json.loads(raw)["shards"][0]["data"]["name"]
        (folder / "manifest.json").write_text(raw.replace(name, "../../etc/passwd"))
        with pytest.raises(ConfigurationError, match="torn"):
            load(folder)


def test_a_snapshot_that_cannot_be_written_leaves_the_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = filled()
    index.save(tmp_path).result()
    before, files = answers(index), set(tmp_path.iterdir())

    def fail(*_: object) -> None:
        raise RuntimeError("cannot open file")

    monkeypatch.setattr(Graph, "save", fail)
    index.upsert("late", vectors(1, seed=9)[0], domain="a")
    with pytest.raises(ConfigurationError, match="cannot write the index snapshot"):
        index.save(tmp_path).result()
    assert answers(load(tmp_path)) == before
    assert set(tmp_path.iterdir()) == files
    index.upsert("later", vectors(1, seed=10)[0], domain="a")
    assert "later" in index


def test_a_crash_before_the_manifest_leaves_the_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = filled()
    index.save(tmp_path).result()
    before, files = answers(index), list(tmp_path.iterdir())

    class Crash(BaseException):
        """What no clean-up sees, like a loss of power."""

    def crash(*_: object, **__: object) -> None:
        raise Crash

    index.upsert("late", vectors(1, seed=9)[0], domain="a")
    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "Manifest", crash)
        with pytest.raises(Crash):
            index.save(tmp_path)
    assert answers(load(tmp_path)) == before
    filled().save(tmp_path).result()
    assert len(list(tmp_path.iterdir())) == len(files)
