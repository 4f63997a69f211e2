from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from registry import search as search_module
from registry.encoders import Vectors
from registry.search import CapabilitySearch, Match, recalibrate
from registry.vectors import pack_vector, unpack_vector
from support.capabilities import make_record
from support.encoders import WordEncoder

ENCODER = WordEncoder()
PUMP: dict[str, Any] = {
    "function": "pump_check",
    "description": "checks a pump for leaks and unusual noise",
    "examples": ("is the pump leaking", "listen to the pump", "pump makes noise"),
}
TANK: dict[str, Any] = {
    "function": "tank_level",
    "description": "measures how full a tank is",
    "examples": ("how full is the tank", "tank level please", "is the tank empty"),
}


def stale(search: CapabilitySearch) -> bool:
    return search.needs_calibration


def ask(search: CapabilitySearch, text: str, k: int = 5) -> list[Match]:
    return search.search(text, ENCODER.encode([text])[0], k)


@pytest.fixture
def search() -> CapabilitySearch:
    made = CapabilitySearch(space=ENCODER.space)
    made.upsert(make_record(ENCODER, "edge-1", **PUMP))
    made.upsert(make_record(ENCODER, "edge-2", **TANK))
    return made


def test_an_empty_catalogue_finds_nothing() -> None:
    assert ask(CapabilitySearch(space=ENCODER.space), "anything") == []


def test_the_fitting_capability_comes_first(search: CapabilitySearch) -> None:
    best = ask(search, "is my pump leaking")[0]
    assert best.key == ("edge-1", "pump_check")
    assert best.lexical is not None
    assert best.score == pytest.approx(0.7 * best.dense + 0.3 * best.lexical)
    assert best.score > search.threshold
    assert ask(search, "unicorns dance tango")[0].score < search.threshold


def test_everybody_who_offers_it_is_named_with_one_score(search: CapabilitySearch) -> None:
    alone = ask(search, "pump leaking")[0].score
    for node in range(20):
        search.upsert(make_record(ENCODER, f"twin-{node:02}", **PUMP))
    found = ask(search, "pump leaking", k=2)
    offers = [match for match in found if match.key[1] == "pump_check"]
    assert len(offers) == 21
    assert {match.score for match in offers} == {alone}
    assert [match.key for match in offers] == sorted(match.key for match in offers)
    assert ("edge-2", "tank_level") in [match.key for match in found]
    assert len(search.calibration_texts()) == 6


def test_another_text_replaces_the_old_one(search: CapabilitySearch) -> None:
    changed = {**PUMP, "description": "bakes bread", "examples": ("bake a loaf of bread now",)}
    search.upsert(make_record(ENCODER, "edge-1", **changed, revision=2))
    assert ask(search, "bake bread")[0].key == ("edge-1", "pump_check")
    assert ask(search, "is the pump leaking")[0].score < 0.5
    assert len(search) == 2


def test_removing_one_offer_leaves_the_others(search: CapabilitySearch) -> None:
    search.upsert(make_record(ENCODER, "twin", **PUMP))
    assert search.remove(("edge-1", "pump_check"))
    assert not search.remove(("edge-1", "pump_check"))
    assert ask(search, "pump leaking")[0].key == ("twin", "pump_check")
    assert search.remove(("twin", "pump_check"))
    assert [match.key[1] for match in ask(search, "pump leaking")] == ["tank_level"]


def test_a_record_of_another_space_is_known_but_not_compared(search: CapabilitySearch) -> None:
    foreign = make_record(WordEncoder(revision="2"), "edge-3", **PUMP)
    assert not search.upsert(foreign)
    assert search.record(("edge-3", "pump_check")) == foreign
    assert ("edge-3", "pump_check") not in [match.key for match in ask(search, "pump")]
    bent = make_record(ENCODER, "edge-3", **PUMP).model_copy(update={"embedding": "junk"})
    assert not search.upsert(bent)


def test_a_searchable_record_that_turns_foreign_is_taken_out(search: CapabilitySearch) -> None:
    search.upsert(make_record(WordEncoder(revision="2"), "edge-1", **PUMP))
    assert [match.key[1] for match in ask(search, "pump leaking")] == ["tank_level"]


def test_a_bare_name_is_judged_by_its_meaning_alone() -> None:
    search = CapabilitySearch(space=ENCODER.space)
    search.upsert(make_record(ENCODER, function="pump", description="pump", examples=()))
    best = ask(search, "pump")[0]
    assert best.lexical is None
    assert best.score == pytest.approx(best.dense)


def test_k_counts_capabilities_and_none_means_nothing(search: CapabilitySearch) -> None:
    assert len(ask(search, "pump", k=1)) == 1
    assert ask(search, "pump", k=0) == []


def test_a_vector_of_another_shape_is_refused(search: CapabilitySearch) -> None:
    with pytest.raises(ValueError, match="a vector of"):
        search.search("pump", np.ones(3, dtype=np.float32), 1)


def test_ranking_is_the_same_once_the_graph_has_taken_over() -> None:
    few = CapabilitySearch(space=ENCODER.space)
    many = CapabilitySearch(space=ENCODER.space, exact_limit=100)
    for at in range(300):
        record = make_record(
            ENCODER,
            function=f"f{at}",
            description=f"does work number{at} with tool{at % 7} on machine{at % 11}",
            examples=(),
        )
        few.upsert(record)
        many.upsert(record)
    assert many._graph is not None
    assert not many._to_move
    for at in range(0, 300, 10):
        text = f"number{at} tool{at % 7}"
        assert ask(many, text, 1)[0].key == ask(few, text, 1)[0].key
    for at in range(300):
        many.remove(("edge-1", f"f{at}"))
    assert ask(many, "number1") == []


class TestCalibration:
    async def encode(self, texts: Sequence[str]) -> Vectors:
        return ENCODER.encode(texts)

    async def test_it_fits_to_the_examples_and_says_when_it_is_stale(
        self, search: CapabilitySearch
    ) -> None:
        assert stale(search)
        before = search.calibration
        assert before.held_out == 0
        fitted = await recalibrate(search, self.encode)
        assert fitted.held_out == 6
        assert search.threshold == fitted.threshold
        assert not stale(search)
        search.upsert(make_record(ENCODER, "edge-9", **PUMP))  # no new text
        assert not stale(search)
        search.remove(("edge-2", "tank_level"))
        assert stale(search)

    async def test_an_empty_catalogue_keeps_the_prior(self) -> None:
        search = CapabilitySearch(space=ENCODER.space)
        fitted = await recalibrate(search, self.encode)
        assert fitted.held_out == 0

    def test_the_sample_is_bounded_and_spread(self) -> None:
        search = CapabilitySearch(space=ENCODER.space)
        for at in range(100):
            examples = tuple(f"example {word} of {at}" for word in range(9))
            search.upsert(make_record(ENCODER, function=f"f{at}", examples=examples))
        texts = search.calibration_texts()
        assert len(texts) <= 256
        assert {text.split()[-1] for text in texts} == {str(at) for at in range(100)}


def test_packed_vectors_come_back() -> None:
    vector = ENCODER.encode(["pump"])[0]
    np.testing.assert_array_equal(unpack_vector(pack_vector(vector), 64), vector)
    with pytest.raises(ValueError, match="bytes"):
        unpack_vector(pack_vector(vector), 63)
    with pytest.raises(ValueError, match="base64"):
        unpack_vector("§", 64)


def test_without_the_graph_library_search_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_make_graph", lambda _dimension: None)
    search = CapabilitySearch(space=ENCODER.space, exact_limit=2)
    for at in range(5):
        search.upsert(make_record(ENCODER, function=f"f{at}", description=f"does work{at}"))
    assert ask(search, "work3")[0].key == ("edge-1", "f3")
