from collections.abc import Callable

import numpy as np
import pytest

from registry.encoders import Vectors
from registry.index import ExactIndex, VectorIndex
from registry.index.hnsw import HnswIndex

D = 16
Make = Callable[[], VectorIndex]


def vectors(count: int, seed: int = 0) -> Vectors:
    rows: Vectors = np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)
    units: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units


def axis(at: int) -> Vectors:
    row: Vectors = np.eye(D, dtype=np.float32)[at]
    return row


def keys(index: VectorIndex, vector: Vectors, k: int) -> list[str]:
    return [neighbour.key for neighbour in index.search(vector, k)]


@pytest.fixture(params=[ExactIndex, HnswIndex])
def index(request: pytest.FixtureRequest) -> VectorIndex:
    made: VectorIndex = request.param(dimension=D)
    return made


class TestEveryIndex:
    def test_an_empty_index_finds_nothing(self, index: VectorIndex) -> None:
        assert index.search(axis(0), 5) == []
        assert len(index) == 0

    @pytest.mark.parametrize("k", [0, -1])
    def test_nothing_is_found_when_nothing_is_asked_for(self, index: VectorIndex, k: int) -> None:
        index.upsert("a", axis(0))
        assert index.search(axis(0), k) == []

    @pytest.mark.parametrize("count", [3, 200])
    def test_more_than_there_are_gives_all(self, index: VectorIndex, count: int) -> None:
        for at, vector in enumerate(vectors(count)):
            index.upsert(f"k{at:04}", vector)
        assert len(index.search(axis(0), 10 * count)) == count

    def test_neighbours_come_nearest_first_with_their_cosine(self, index: VectorIndex) -> None:
        for at, vector in enumerate(vectors(100)):
            index.upsert(f"k{at:04}", vector)
        asked = vectors(1, seed=9)[0]
        found = index.search(asked, 10)
        expected = sorted((-float(v @ asked), f"k{at:04}") for at, v in enumerate(vectors(100)))
        assert [neighbour.key for neighbour in found] == [key for _, key in expected[:10]]
        for neighbour, (negative, _) in zip(found, expected, strict=False):
            assert neighbour.similarity == pytest.approx(-negative, abs=1e-5)

    def test_equal_neighbours_come_in_the_order_of_their_keys(self, index: VectorIndex) -> None:
        for key in ("c", "a", "d", "b"):
            index.upsert(key, axis(0))
        assert keys(index, axis(0), 4) == ["a", "b", "c", "d"]

    def test_a_second_vector_of_a_key_replaces_the_first(self, index: VectorIndex) -> None:
        index.upsert("a", axis(0))
        index.upsert("b", axis(1))
        index.upsert("a", axis(2))
        assert len(index) == 2
        assert keys(index, axis(2), 1) == ["a"]
        assert index.search(axis(0), 2)[0].similarity == pytest.approx(0.0, abs=1e-6)

    def test_a_removed_key_is_found_no_more_and_may_come_back(self, index: VectorIndex) -> None:
        for at in range(4):
            index.upsert(f"k{at}", axis(at))
        assert index.remove("k1")
        assert not index.remove("k1")
        assert not index.remove("never there")
        assert "k1" not in index
        assert "k1" not in keys(index, axis(1), 4)
        index.upsert("k1", axis(5))
        assert keys(index, axis(5), 1) == ["k1"]
        assert len(index) == 4

    def test_removing_all_leaves_an_empty_index_that_works(self, index: VectorIndex) -> None:
        for at in range(150):
            index.upsert(f"k{at}", vectors(150)[at])
        for at in range(150):
            assert index.remove(f"k{at}")
        assert index.search(axis(0), 3) == []
        index.upsert("new", axis(0))
        assert keys(index, axis(0), 3) == ["new"]

    def test_it_grows_past_its_first_capacity(self, index: VectorIndex) -> None:
        rows = vectors(1_500)
        for at, row in enumerate(rows):
            index.upsert(f"k{at}", row)
        assert len(index) == 1_500
        hits = sum(keys(index, rows[at], 1) == [f"k{at}"] for at in range(0, 1_500, 50))
        assert hits >= 29

    def test_only_unit_vectors_of_the_dimension_are_taken(self, index: VectorIndex) -> None:
        bad = [
            np.zeros(D, dtype=np.float32),
            np.ones(D, dtype=np.float32),
            axis(0)[:-1],
            np.full(D, np.nan, dtype=np.float32),
            np.eye(D, dtype=np.float32)[:1],
        ]
        index.upsert("a", axis(0))
        for vector in bad:
            with pytest.raises(ValueError, match="a vector of"):
                index.upsert("b", vector)
            with pytest.raises(ValueError, match="a vector of"):
                index.search(vector, 1)
        assert len(index) == 1

    def test_the_callers_array_is_copied(self, index: VectorIndex) -> None:
        mine = axis(0).copy()
        index.upsert("a", mine)
        mine[:] = axis(1)
        assert index.search(axis(0), 1)[0].similarity == pytest.approx(1.0, abs=1e-6)

    def test_it_stays_right_through_many_changes(self, index: VectorIndex) -> None:
        rng = np.random.default_rng(3)
        truth: dict[str, np.ndarray] = {}
        for step, row in enumerate(vectors(1_200, seed=4)):
            key = f"k{rng.integers(150)}"
            if rng.random() < 0.35:
                assert index.remove(key) == (truth.pop(key, None) is not None)
            else:
                index.upsert(key, row)
                truth[key] = row
            if step % 100 == 99:
                asked = vectors(1, seed=step)[0]
                best = sorted(truth, key=lambda key: -float(truth[key] @ asked))[:5]
                assert len(set(keys(index, asked, 5)) & set(best)) >= 4
        assert len(index) == len(truth)


class TestHnswIndex:
    def test_updates_bury_labels_until_a_fresh_graph_takes_over(self) -> None:
        index = HnswIndex(dimension=D)
        rows = vectors(400)
        for round_number in range(3):
            for at in range(100):
                index.upsert(f"k{at}", rows[100 * round_number + at])
        assert index.rebuilds >= 1
        assert index.tombstones < 64 + 0.2 * 164
        assert keys(index, rows[200 + 17], 1) == ["k17"]

    def test_recall_against_exact_search(self) -> None:
        rows = vectors(3_000)
        graph, exact = HnswIndex(dimension=D), ExactIndex(dimension=D)
        for at, row in enumerate(rows):
            graph.upsert(f"k{at}", row)
            exact.upsert(f"k{at}", row)
        for at in range(600):
            graph.remove(f"k{at}")
            exact.remove(f"k{at}")
        found = wanted = 0
        for asked in vectors(50, seed=8):
            best = set(keys(exact, asked, 10))
            found += len(best & set(keys(graph, asked, 10)))
            wanted += len(best)
        assert found / wanted >= 0.95
