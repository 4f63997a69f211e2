import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import hnswlib
import numpy as np
import pytest

from registry.encoders import Vectors
from registry.index import CapabilityIndex, capability
from registry.index.hnsw import Graph
from registry.index.rows import BLOCK, VectorRows
from support.executors import SteppedExecutor

D = 16


def vectors(count: int, seed: int = 0) -> Vectors:
    rows: Vectors = np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)
    units: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units


def axis(at: int) -> Vectors:
    row: Vectors = np.eye(D, dtype=np.float32)[at]
    return row


def keys(index: CapabilityIndex, vector: Vectors, k: int, *demands: set[str]) -> list[str]:
    asked = [frozenset(demand) for demand in demands]
    return [neighbour.key for neighbour in index.search(vector, k, demands=asked)]


def by_graph(index: CapabilityIndex) -> bool:
    return index.approximate


def fill(index: CapabilityIndex, rows: Vectors, first: int = 0) -> None:
    for at, row in enumerate(rows):
        index.upsert(f"k{first + at:04}", row)


def nearest(truth: dict[str, Vectors], vector: Vectors, k: int) -> list[str]:
    return sorted(truth, key=lambda key: (-float(truth[key] @ vector), key))[:k]


@pytest.fixture(params=[10_000, 20], ids=["compared", "graph"])
def index(request: pytest.FixtureRequest) -> CapabilityIndex:
    return CapabilityIndex(dimension=D, exact_limit=request.param)


class TestEveryIndex:
    def test_an_empty_index_finds_nothing(self, index: CapabilityIndex) -> None:
        assert index.search(axis(0), 5) == []
        assert index.search(axis(0), 5, demands=[frozenset({"zone:a"})]) == []
        assert len(index) == 0
        assert not index.maintain()

    @pytest.mark.parametrize("k", [0, -1])
    def test_nothing_is_found_when_nothing_is_asked_for(
        self, index: CapabilityIndex, k: int
    ) -> None:
        fill(index, vectors(40))
        index.upsert("elsewhere", axis(0), domain="other")
        assert index.search(axis(0), k) == []

    @pytest.mark.parametrize("count", [3, 200])
    def test_more_than_there_are_gives_all(self, index: CapabilityIndex, count: int) -> None:
        fill(index, vectors(count))
        assert len(index.search(axis(0), 10 * count)) == count

    def test_neighbours_come_nearest_first_with_their_cosine(self, index: CapabilityIndex) -> None:
        rows = vectors(100)
        fill(index, rows)
        asked = vectors(1, seed=9)[0]
        truth = {f"k{at:04}": row for at, row in enumerate(rows)}
        found = index.search(asked, 10)
        assert [neighbour.key for neighbour in found] == nearest(truth, asked, 10)
        for key, similarity in found:
            assert similarity == pytest.approx(float(truth[key] @ asked), abs=1e-5)

    def test_equal_neighbours_come_in_the_order_of_their_keys(self, index: CapabilityIndex) -> None:
        for key in ("c", "a", "d", "b"):
            index.upsert(key, axis(0))
        assert keys(index, axis(0), 3) == ["a", "b", "c"]

    def test_the_same_vector_for_everybody_is_no_trouble(self, index: CapabilityIndex) -> None:
        fill(index, np.tile(axis(0), (300, 1)))
        assert len(keys(index, axis(0), 64)) == 64
        for at in range(290):
            index.remove(f"k{at:04}")
        assert len(keys(index, axis(0), 64)) == 10

    def test_a_second_vector_of_a_key_replaces_the_first(self, index: CapabilityIndex) -> None:
        index.upsert("a", axis(0))
        index.upsert("b", axis(1))
        index.upsert("a", axis(2))
        assert len(index) == 2
        assert keys(index, axis(2), 1) == ["a"]
        assert index.search(axis(0), 2)[0].similarity == pytest.approx(0.0, abs=1e-6)

    def test_every_vector_may_be_replaced_again_and_again(self, index: CapabilityIndex) -> None:
        for turn in range(8):
            rows = vectors(200, seed=turn)
            fill(index, rows)
            assert len(index) == 200
            hits = sum(keys(index, rows[at], 1) == [f"k{at:04}"] for at in range(0, 200, 10))
            assert hits >= 19

    def test_a_removed_key_is_found_no_more_and_may_come_back(self, index: CapabilityIndex) -> None:
        fill(index, vectors(60))
        index.upsert("gone", axis(1))
        assert index.remove("gone")
        assert not index.remove("gone")
        assert not index.remove("never there")
        assert "gone" not in index
        assert "gone" not in keys(index, axis(1), 61)
        index.upsert("gone", axis(5))
        assert keys(index, axis(5), 1) == ["gone"]
        assert len(index) == 61

    def test_a_storm_of_removals_leaves_an_index_that_works(self, index: CapabilityIndex) -> None:
        rows = vectors(600)
        fill(index, rows)
        for at in range(597):
            assert index.remove(f"k{at:04}")
        assert sorted(keys(index, rows[599], 50)) == ["k0597", "k0598", "k0599"]
        assert index.retain(set()) == 3
        assert index.search(axis(0), 3) == []
        index.upsert("new", axis(0))
        assert keys(index, axis(0), 3) == ["new"]

    def test_it_grows_past_every_capacity(self, index: CapabilityIndex) -> None:
        rows = vectors(1_500)
        fill(index, rows)
        assert len(index) == 1_500
        hits = sum(keys(index, rows[at], 1) == [f"k{at:04}"] for at in range(0, 1_500, 50))
        assert hits >= 29

    def test_only_unit_vectors_of_the_dimension_are_taken(self, index: CapabilityIndex) -> None:
        bad = [
            np.zeros(D, dtype=np.float32),
            np.ones(D, dtype=np.float32),
            axis(0)[:-1],
            np.full(D, np.nan, dtype=np.float32),
            np.full(D, np.inf, dtype=np.float32),
            np.eye(D, dtype=np.float32)[:1],
        ]
        index.upsert("a", axis(0))
        for vector in bad:
            with pytest.raises(ValueError, match="a vector of"):
                index.upsert("b", vector)
            with pytest.raises(ValueError, match="a vector of"):
                index.upsert("a", vector)
            with pytest.raises(ValueError, match="a vector of"):
                index.search(vector, 1)
            with pytest.raises(ValueError, match="a vector of"):
                index.similarities(["a"], vector)
        assert len(index) == 1
        np.testing.assert_array_equal(index.vector("a"), axis(0))

    def test_the_callers_array_is_copied_both_ways(self, index: CapabilityIndex) -> None:
        mine = axis(0).copy()
        index.upsert("a", mine)
        mine[:] = axis(1)
        index.vector("a")[:] = axis(2)
        assert index.search(axis(0), 1)[0].similarity == pytest.approx(1.0, abs=1e-6)

    def test_named_keys_are_compared_exactly(self, index: CapabilityIndex) -> None:
        rows = vectors(80)
        fill(index, rows)
        found = index.similarities(["k0070", "k0001"], axis(3))
        np.testing.assert_allclose(found, rows[[70, 1]] @ axis(3), atol=1e-6)
        with pytest.raises(KeyError):
            index.similarities(["k0001", "unknown"], axis(3))
        with pytest.raises(KeyError):
            index.vector("unknown")

    def test_it_stays_right_through_many_changes(self, index: CapabilityIndex) -> None:
        rng = np.random.default_rng(3)
        truth: dict[str, Vectors] = {}
        for step, row in enumerate(vectors(1_200, seed=4)):
            key = f"k{rng.integers(150)}"
            if rng.random() < 0.35:
                assert index.remove(key) == (truth.pop(key, None) is not None)
            else:
                index.upsert(key, row)
                truth[key] = row
            if step % 100 == 99:
                asked = vectors(1, seed=step)[0]
                assert len(set(keys(index, asked, 5)) & set(nearest(truth, asked, 5))) >= 4
        assert len(index) == len(truth)


class TestDemands:
    @pytest.mark.parametrize("demand", ["rare", "half", "most", "all", "none"])
    def test_only_those_that_meet_them_are_found(self, index: CapabilityIndex, demand: str) -> None:
        rows = vectors(900)
        told = {
            at: frozenset(
                {"all"}
                | ({"rare"} if at % 300 == 7 else set())
                | ({"half"} if at % 2 else set())
                | ({"most"} if at % 50 else set())
            )
            for at in range(900)
        }
        for at, row in enumerate(rows):
            index.upsert(f"k{at:04}", row, attributes=told[at])
        for asked in vectors(10, seed=5):
            able = {f"k{at:04}": rows[at] for at in told if demand in told[at]}
            best = nearest(able, asked, 10)
            found = keys(index, asked, 10, {demand})
            assert len(found) == len(best)
            assert len(set(found) & set(best)) >= len(best) - 1

    def test_they_are_a_conjunction_of_alternatives(self, index: CapabilityIndex) -> None:
        index.upsert("a", axis(0), attributes=frozenset({"zone:x", "data:private"}))
        index.upsert("b", axis(0), attributes=frozenset({"zone:y", "data:private"}))
        index.upsert("c", axis(0), attributes=frozenset({"zone:y"}))
        assert keys(index, axis(0), 9, {"zone:x", "zone:y"}, {"data:private"}) == ["a", "b"]
        assert keys(index, axis(0), 9, {"zone:y"}) == ["b", "c"]
        assert keys(index, axis(0), 9, {"zone:z"}) == []
        assert keys(index, axis(0), 9, set()) == []
        assert index.admits("c", [frozenset({"zone:y", "zone:x"})])
        assert not index.admits("c", [frozenset({"zone:y"}), frozenset({"data:private"})])
        assert not index.admits("unknown", [])

    def test_attributes_may_change_while_the_vector_stays(self, index: CapabilityIndex) -> None:
        rows = vectors(60)
        fill(index, rows)
        assert keys(index, rows[3], 5, {"zone:x"}) == []
        index.upsert("k0003", rows[3], attributes=frozenset({"zone:x"}), domain="x")
        assert keys(index, rows[3], 5, {"zone:x"}) == ["k0003"]
        index.upsert("k0003", rows[3])
        assert keys(index, rows[3], 5, {"zone:x"}) == []
        assert len(index) == 60

    def test_a_set_of_attributes_for_each_key_is_kept_in_order(
        self, index: CapabilityIndex
    ) -> None:
        rows = vectors(200)
        for turn in range(3):  # numbers of sets are used again in every turn
            for at, row in enumerate(rows):
                index.upsert(f"k{at}", row, attributes=frozenset({f"skill:{turn}-{at}"}))
                assert keys(index, row, 2, {f"skill:{turn}-{at}"}) == [f"k{at}"]
                assert keys(index, row, 2, {f"skill:{turn - 1}-{at}"}) == []


class TestShards:
    def test_domains_answer_together(self, index: CapabilityIndex) -> None:
        rows = vectors(400)
        for at, row in enumerate(rows):
            index.upsert(f"k{at:04}", row, domain=f"zone{at % 20}")
        truth = {f"k{at:04}": row for at, row in enumerate(rows)}
        for asked in vectors(10, seed=6):
            best = nearest(truth, asked, 10)
            assert len(set(keys(index, asked, 10)) & set(best)) >= 9

    def test_the_nearest_may_all_lie_in_one_domain(self, index: CapabilityIndex) -> None:
        near = axis(0) + 0.2 * vectors(100)
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        truth = {}
        for domain in ("a", "b", "c", "d"):
            rows = near if domain == "c" else vectors(100, seed=ord(domain))
            for at, row in enumerate(rows):
                truth[f"{domain}{at}"] = row
                index.upsert(f"{domain}{at}", row, domain=domain)
        found, best = keys(index, axis(0), 60), nearest(truth, axis(0), 60)
        assert len(set(found) & set(best)) >= 58

    def test_a_key_that_moves_is_in_one_place_only(self, index: CapabilityIndex) -> None:
        fill(index, vectors(50))
        for domain in ("a", "b", "", "a"):
            index.upsert("mover", axis(0), domain=domain)
            assert keys(index, axis(0), 60).count("mover") == 1
            assert len(index) == 51

    def test_a_demand_that_one_domain_meets_asks_that_one_only(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = CapabilityIndex(dimension=D, exact_limit=20)
        for at, row in enumerate(vectors(200)):
            zone = "ab"[at % 2]
            index.upsert(f"{zone}{at}", row, attributes=frozenset({f"zone:{zone}"}), domain=zone)
        asked: list[int] = []
        search = Graph.search

        def counted(graph: Graph, vector: Vectors, k: int, *, thorough: bool) -> object:
            asked.append(k)
            return search(graph, vector, k, thorough=thorough)

        monkeypatch.setattr(Graph, "search", counted)
        assert {key[0] for key in keys(index, axis(0), 4, {"zone:a"})} == {"a"}
        assert asked == [4]

    def test_many_small_domains_compare_no_more_than_one_would(self) -> None:
        index = CapabilityIndex(dimension=D, exact_limit=8_000)
        for domain in range(4):
            for at, row in enumerate(vectors(2_100, seed=domain)):
                index.upsert(f"{domain}-{at}", row, domain=str(domain))
        assert by_graph(index)  # 2,100 are below the limit, a quarter of it they are not


class TestGraphs:
    def test_a_graph_takes_over_above_the_limit_and_leaves_when_few_stay(self) -> None:
        index = CapabilityIndex(dimension=D, exact_limit=100)
        fill(index, vectors(100))
        assert not by_graph(index)
        fill(index, vectors(1, seed=1), first=100)
        assert by_graph(index)
        for at in range(52):
            index.remove(f"k{at:04}")
        assert not by_graph(index)
        assert len(keys(index, axis(0), 100)) == 49

    def test_graves_bring_a_fresh_graph(self) -> None:
        index = CapabilityIndex(dimension=D, exact_limit=100)
        rows = vectors(400)
        fill(index, rows)
        built = index.rebuilds
        for at in range(100):
            index.remove(f"k{at:04}")
        assert index.rebuilds == built + 1
        assert keys(index, rows[250], 1) == ["k0250"]

    def test_the_same_key_again_costs_no_grave(self) -> None:
        index = CapabilityIndex(dimension=D, exact_limit=100)
        rows = vectors(200)
        fill(index, rows)
        built = index.rebuilds
        for _ in range(10):
            fill(index, rows)
        assert index.rebuilds == built

    def test_recall_against_comparing_all(self) -> None:
        rows = vectors(3_000)
        graph = CapabilityIndex(dimension=D, exact_limit=100)
        exact = CapabilityIndex(dimension=D)
        for index in (graph, exact):
            fill(index, rows)
            for at in range(500):
                index.remove(f"k{at:04}")
        assert graph.approximate
        assert not exact.approximate
        asked = vectors(50, seed=8)
        found = sum(len(set(keys(exact, v, 10)) & set(keys(graph, v, 10))) for v in asked)
        assert found / 500 >= 0.99

    def test_graves_that_hide_the_living_do_not_hide_them_from_us(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = CapabilityIndex(dimension=D, exact_limit=20)
        rows = vectors(200)
        fill(index, rows)
        monkeypatch.setattr(Graph, "search", lambda *_, **__: None)
        assert keys(index, rows[9], 1) == ["k0009"]

    def test_without_the_library_all_are_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(capability, "graph_class", lambda: None)
        index = CapabilityIndex(dimension=D, exact_limit=20)
        rows = vectors(3_000)
        fill(index, rows)
        for at in range(2_900):
            index.remove(f"k{at:04}")
        assert not by_graph(index)
        assert keys(index, rows[2_950], 1) == ["k2950"]


class TestLibrary:
    """The hazards of hnswlib, each met at its door."""

    def graph(self, count: int, capacity: int = 10) -> Graph:
        made = Graph(dimension=D, capacity=capacity)
        made.add(vectors(count), np.arange(count))
        return made

    def test_an_empty_graph_answers(self) -> None:
        found = Graph(dimension=D, capacity=0).search(axis(0), 5)
        assert found is not None
        assert len(found[0]) == 0

    def test_asking_for_more_than_live_gives_the_living(self) -> None:
        graph = self.graph(8)
        graph.bury(3)
        graph.bury(3)
        found = graph.search(axis(0), 50)
        assert found is not None
        assert sorted(found[0].tolist()) == [0, 1, 2, 4, 5, 6, 7]

    def test_adding_beyond_the_capacity_adds_all_or_grows(self) -> None:
        graph = self.graph(5, capacity=3)
        graph.add(vectors(40, seed=1), np.arange(5, 45))
        assert len(graph) == 45
        found = graph.search(vectors(40, seed=1)[39], 1)
        assert found is not None
        assert found[0].tolist() == [44]

    def test_all_buried_is_empty(self) -> None:
        graph = self.graph(4)
        for label in range(4):
            graph.bury(label)
        found = graph.search(axis(0), 2)
        assert found is not None
        assert len(found[0]) == 0

    def test_a_hidden_answer_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Failing:
            def __getattr__(self, name: str) -> Callable[..., object]:
                def act(*_: object, **__: object) -> object:
                    if name == "knn_query":
                        raise RuntimeError("Cannot return the results in a contiguous 2D array")
                    return 5

                return act

        monkeypatch.setattr(hnswlib, "Index", lambda **_: Failing())
        assert Graph(dimension=D, capacity=5).search(axis(0), 2) is None


class TestBackground:
    def test_until_a_graph_is_ready_all_are_compared(self) -> None:
        worker = SteppedExecutor()
        index = CapabilityIndex(dimension=D, exact_limit=50, background=worker)
        rows = vectors(80)
        fill(index, rows)
        assert index.building
        assert not by_graph(index)
        assert keys(index, rows[79], 1) == ["k0079"]
        worker.step()
        index.maintain()
        assert by_graph(index)
        assert not index.building

    def test_what_changes_during_a_build_is_right_before_and_after(self) -> None:
        worker = SteppedExecutor()
        index = CapabilityIndex(dimension=D, exact_limit=50, background=worker)
        rows, other = vectors(60), vectors(60, seed=1)
        fill(index, rows)
        index.remove("k0010")
        index.upsert("k0011", other[11])
        index.remove("k0012")
        index.upsert("k0012", other[12])
        for _ in range(2):
            assert keys(index, other[11], 1) == ["k0011"]
            assert keys(index, other[12], 1) == ["k0012"]
            assert "k0010" not in keys(index, rows[10], 60)
            assert len(keys(index, axis(0), 99)) == 59
            worker.step()
            while index.maintain():
                pass
        assert by_graph(index)

    def test_a_worker_is_sent_again_after_much_that_came_meanwhile(self) -> None:
        worker = SteppedExecutor()
        index = CapabilityIndex(dimension=D, exact_limit=50, background=worker)
        rows = vectors(2_000)
        fill(index, rows)
        assert len(worker.waiting) == 1
        worker.step()
        assert not index.maintain()
        assert index.building  # 1,949 more were added to the same graph
        while worker.step():
            index.maintain()
        assert by_graph(index)
        assert index.rebuilds >= 1
        hits = sum(keys(index, rows[at], 1) == [f"k{at:04}"] for at in range(0, 2_000, 50))
        assert hits >= 39

    def test_a_build_that_fails_leaves_comparing_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise MemoryError("no room")

        monkeypatch.setattr(Graph, "add", fail)
        index = CapabilityIndex(dimension=D, exact_limit=50)
        rows = vectors(200)
        fill(index, rows)
        assert not by_graph(index)
        assert keys(index, rows[150], 1) == ["k0150"]

    def test_no_room_for_a_graph_leaves_comparing_all(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(**_: object) -> None:
            raise RuntimeError("Not enough memory")

        monkeypatch.setattr(hnswlib, "Index", fail)
        index = CapabilityIndex(dimension=D, exact_limit=50)
        rows = vectors(200)
        fill(index, rows)
        assert not by_graph(index)
        assert keys(index, rows[150], 1) == ["k0150"]

    def test_a_build_nobody_needs_any_more_is_stopped(self) -> None:
        worker = SteppedExecutor()
        index = CapabilityIndex(dimension=D, exact_limit=50, background=worker)
        fill(index, vectors(60))
        for at in range(40):
            index.remove(f"k{at:04}")
        while worker.step():
            index.maintain()
        assert not index.building
        assert not by_graph(index)
        assert len(keys(index, axis(0), 99)) == 20

    def test_after_the_executor_is_shut_down_it_still_serves(self) -> None:
        executor = ThreadPoolExecutor(1)
        index = CapabilityIndex(dimension=D, exact_limit=50, background=executor)
        fill(index, vectors(30))
        index.close()
        executor.shutdown()
        rows = vectors(60, seed=2)
        fill(index, rows, first=100)
        assert keys(index, rows[59], 1) == ["k0159"]

    def test_a_real_thread_builds_while_the_owner_changes_and_asks(self) -> None:
        rng = np.random.default_rng(5)
        truth: dict[str, Vectors] = {}
        with ThreadPoolExecutor(1) as executor:
            index = CapabilityIndex(dimension=D, exact_limit=200, background=executor)
            for step, row in enumerate(vectors(6_000, seed=11)):
                key = f"k{rng.integers(1_500)}"
                if rng.random() < 0.2:
                    assert index.remove(key) == (truth.pop(key, None) is not None)
                else:
                    index.upsert(key, row)
                    truth[key] = row
                if step % 50 == 49:
                    found = index.search(row, 5)
                    assert {key for key, _ in found} <= truth.keys()
                    for found_key, similarity in found:
                        expected = float(truth[found_key] @ row)
                        assert similarity == pytest.approx(expected, abs=1e-5)
            while index.maintain() or index.building:
                time.sleep(0.001)
        assert index.rebuilds >= 1
        for asked in vectors(20, seed=12):
            assert len(set(keys(index, asked, 5)) & set(nearest(truth, asked, 5))) >= 4


def test_rows_in_several_blocks_are_read_and_written_in_one() -> None:
    rows = VectorRows(2)
    chosen = np.array([3, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
    rows.fill(chosen, np.arange(8, dtype=np.float32).reshape(4, 2))
    np.testing.assert_array_equal(rows.gather(chosen), [[0, 1], [2, 3], [4, 5], [6, 7]])
    np.testing.assert_array_equal(rows.gather(chosen[2:]), [[4, 5], [6, 7]])
    assert rows.gather(chosen[:0]).shape == (0, 2)
    asked = np.array([1.0, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(rows.similarities(asked, chosen), [0, 2, 4, 6])
