"""Search after any sequence of changes equals search over what is left, built afresh."""

from hypothesis import given, settings
from hypothesis import strategies as st

from registry.index import ExactIndex
from registry.index.hnsw import HnswIndex
from registry.lexical import LexicalIndex
from registry.search import CapabilitySearch
from support.capabilities import make_record
from support.encoders import WordEncoder

ENCODER = WordEncoder(dimension=16)
TEXTS = [
    "checks a pump for leaks and unusual noise at night",
    "measures how full a tank is and when it will be empty",
    "reads an alert and says how urgent it is for the crew",
    "pump",
]
CHANGES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)), max_size=25
)


@settings(max_examples=60, deadline=None)
@given(CHANGES)
def test_search_depends_on_what_is_there_not_on_how_it_came(
    changes: list[tuple[bool, int, int, int]],
) -> None:
    lived = CapabilitySearch(space=ENCODER.space)
    left = {}
    for add, node, function, text in changes:
        key = (f"n{node}", f"f{function}")
        if add:
            record = make_record(ENCODER, *key, description=TEXTS[text], examples=())
            lived.upsert(record)
            left[key] = record
        else:
            assert lived.remove(key) == (left.pop(key, None) is not None)
    fresh = CapabilitySearch(space=ENCODER.space)
    for key in sorted(left):
        fresh.upsert(left[key])
    asked = "is the pump leaking tonight"
    vector = ENCODER.encode([asked])[0]
    expected = fresh.search(asked, vector, 50)
    found = lived.search(asked, vector, 50)
    assert len(found) == len(left)
    assert [m.key for m in found] == [m.key for m in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert abs(mine.score - theirs.score) < 1e-6
    assert lived.threshold == fresh.threshold


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=8), st.text(max_size=40))
def test_coverage_is_bounded_for_any_text(parts: list[str], asked: str) -> None:
    index = LexicalIndex()
    index.upsert("a", [*parts, *TEXTS[:3]])
    for value in index.coverage(asked).values():
        assert 0.0 < value <= 2.5
    for part in parts:
        assert 0.0 <= index.coverage_without("a", part) <= 2.5


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10_000)), max_size=80), st.integers(1, 12)
)
def test_graph_and_exact_search_agree_on_small_indexes(
    changes: list[tuple[int, int]], k: int
) -> None:
    exact, graph = ExactIndex(dimension=16), HnswIndex(dimension=16)
    for key, seed in changes:
        if seed % 4 == 0:
            assert exact.remove(f"k{key}") == graph.remove(f"k{key}")
            continue
        vector = ENCODER.encode([f"word{seed}"])[0]
        exact.upsert(f"k{key}", vector)
        graph.upsert(f"k{key}", vector)
    asked = ENCODER.encode(["word1"])[0]
    mine, theirs = graph.search(asked, k), exact.search(asked, k)
    assert len(mine) == len(theirs) == min(k, len(exact))
    for one, other in zip(mine, theirs, strict=True):
        assert abs(one.similarity - other.similarity) < 1e-5
