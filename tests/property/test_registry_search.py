"""Search after any sequence of changes equals search over what is left, built afresh."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.lexical import K1, B, LexicalIndex
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


def covered(documents: dict[str, list[str]], asked: list[str]) -> dict[str, float]:
    """BM25 as the formula says it, document by document."""
    known = {key: Counter(words) for key, words in documents.items() if len(words) >= 8}
    if not known or not asked:
        return {}
    average = sum(words.total() for words in known.values()) / len(known)
    found, total = dict.fromkeys(known, 0.0), 0.0
    for word in asked:
        holders = sum(word in words for words in known.values())
        weight = math.log(1.0 + (len(known) - holders + 0.5) / (holders + 0.5))
        total += weight
        for key, words in known.items():
            norm = 1.0 - B + B * words.total() / average
            found[key] += weight * words[word] * (K1 + 1.0) / (words[word] + K1 * norm)
    return {key: score / total for key, score in found.items() if score > 0.0}


WORDS = st.lists(st.sampled_from(["pump", "tank", "belt", "door", "lamp"]), max_size=14)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.none() | WORDS), max_size=20), WORDS)
def test_coverage_is_the_formula_whatever_came_and_went(
    changes: list[tuple[int, list[str] | None]], asked: list[str]
) -> None:
    index, left = LexicalIndex(), dict[str, list[str]]()
    for number, words in changes:
        if words is None:
            index.remove(f"d{number}")
            left.pop(f"d{number}", None)
        else:
            index.upsert(f"d{number}", words)
            left[f"d{number}"] = words
    assert index.coverage(" ".join(asked)) == pytest.approx(covered(left, asked))
