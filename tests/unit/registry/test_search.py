from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capability_schemas.capability import CapabilityPolicy
from registry.background import BACKGROUND
from registry.encoders import OnnxEncoder, Vectors
from registry.representation import share_of_nearest
from registry.search import CapabilitySearch, Match, recalibrate
from registry.vectors import capability_texts, pack_parts, pack_vector, unpack_vector
from support.capabilities import make_record
from support.encoders import WordEncoder, exported_folder
from support.plant_fleet import FUNCTIONS, IN_SCOPE

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


def background() -> dict[str, Vectors]:
    return dict(zip(BACKGROUND, ENCODER.encode(BACKGROUND), strict=True))


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
    handicap = 0.08 / 4  # of three examples
    assert best.score == pytest.approx(0.7 * (best.dense + handicap) + 0.3 * best.lexical)
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
    assert len({match.capability for match in offers}) == 1
    assert search.calibrate(background()).held_out == 6


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
    assert search.waiting(("edge-3", "pump_check")) == foreign
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
    assert many.index.approximate
    assert not few.index.approximate
    for at in range(0, 300, 10):
        text = f"number{at} tool{at % 7}"
        assert ask(many, text, 1)[0].key == ask(few, text, 1)[0].key
    for at in range(300):
        many.remove(("edge-1", f"f{at}"))
    assert ask(many, "number1") == []


def test_the_best_are_those_that_looking_at_all_would_find() -> None:
    search = CapabilitySearch(space=ENCODER.space)
    for at in range(300):
        description = f"does work number{at} with tool{at % 7} on machine{at % 11}"
        examples = (f"tool{at % 5} please", "work") if at % 3 else ()
        search.upsert(
            make_record(ENCODER, function=f"f{at}", description=description, examples=examples)
        )
    for at in range(0, 300, 15):
        text = f"which tool{at % 7} does machine{at % 11} number{at} work with"
        best = [match.score for match in ask(search, text, 300)[:5]]
        assert [match.score for match in ask(search, text, 5)] == pytest.approx(best, abs=0.02)
        assert ask(search, text, 5)[0].key == ask(search, text, 300)[0].key


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
        parted = search.calibration_texts()
        assert parted == list(BACKGROUND)  # the records bring the vectors of their examples
        assert search.calibrate(background()).held_out == 200


def test_packed_vectors_come_back() -> None:
    vector = ENCODER.encode(["pump"])[0]
    np.testing.assert_array_equal(unpack_vector(pack_vector(vector), 64), vector)
    with pytest.raises(ValueError, match="bytes"):
        unpack_vector(pack_vector(vector), 63)
    with pytest.raises(ValueError, match="base64"):
        unpack_vector("§", 64)


class TestDemands:
    def test_only_what_meets_every_demand_is_found(self) -> None:
        search = CapabilitySearch(space=ENCODER.space)
        for zone, function in (("hall", PUMP), ("lab", {**PUMP, "function": "pump_test"})):
            policy = CapabilityPolicy(zones=(zone,), external=zone == "lab")
            record = make_record(ENCODER, **function, skills=(f"pumps.{zone}",))
            search.upsert(record.model_copy(update={"policy": policy}))
        asked = ENCODER.encode(["is the pump leaking"])[0]

        def found(*demands: str) -> list[str]:
            sets = [frozenset(demand.split("|")) for demand in demands]
            matches = search.search("is the pump leaking", asked, 5, demands=sets)
            return sorted(match.key[1] for match in matches)

        assert found() == found("zone:hall|zone:lab") == ["pump_check", "pump_test"]
        assert found("zone:hall") == found("local") == found("skill:pumps.hall") == ["pump_check"]
        assert found("data:private", "zone:lab") == ["pump_test"]
        assert found("zone:lab", "local") == found("grant:root") == []

    def test_the_attributes_of_twins_are_taken_together_until_one_leaves(self) -> None:
        search = CapabilitySearch(space=ENCODER.space)
        for node in ("hall", "lab"):
            policy = CapabilityPolicy(zones=(node,))
            record = make_record(ENCODER, node, **PUMP)
            search.upsert(record.model_copy(update={"policy": policy}))
        asked = ENCODER.encode(["is the pump leaking"])[0]
        demands = [frozenset({"zone:lab"})]
        assert len(search.search("pump", asked, 1, demands=demands)) == 2
        search.remove(("lab", "pump_check"))
        assert search.search("pump", asked, 1, demands=demands) == []
        assert len(search.search("pump", asked, 1)) == 1


class TestVectorsMadeHere:
    FOREIGN = make_record(WordEncoder(revision="2"), "edge-3", **PUMP)

    def rows(self) -> Vectors:
        return ENCODER.encode(
            capability_texts(PUMP["function"], PUMP["description"], PUMP["examples"])
        )

    def test_a_record_of_another_space_is_found_by_them(self) -> None:
        search = CapabilitySearch(space=ENCODER.space)
        assert not search.upsert(self.FOREIGN)
        assert search.unembedded() == [("edge-3", "pump_check")]
        assert search.upsert(self.FOREIGN, parts=self.rows())
        assert search.unembedded() == []
        assert ask(search, "pump leaking")[0].key == ("edge-3", "pump_check")

    def test_they_serve_a_renewal_and_a_twin_but_no_other_words(self) -> None:
        search = CapabilitySearch(space=ENCODER.space)
        search.upsert(self.FOREIGN, parts=self.rows())
        assert search.upsert(self.FOREIGN.model_copy(update={"revision": 2}))
        assert search.upsert(self.FOREIGN.model_copy(update={"node": "twin"}))
        other = self.FOREIGN.model_copy(update={"description": "bakes bread", "revision": 3})
        assert not search.upsert(other)
        assert search.unembedded() == [("edge-3", "pump_check")]
        assert [match.key[0] for match in ask(search, "pump leaking")] == ["twin"]
        search.remove(("edge-3", "pump_check"))
        assert search.unembedded() == []

    @pytest.mark.parametrize("bend", [lambda rows: rows[1:], lambda rows: rows * 2])
    def test_vectors_that_do_not_fit_are_refused(self, bend: Callable[[Vectors], Vectors]) -> None:
        search = CapabilitySearch(space=ENCODER.space)
        with pytest.raises(ValueError, match=r"parts of|length"):
            search.upsert(self.FOREIGN, parts=bend(self.rows()))
        assert len(search) == 0


class TestSingleVectors:
    def test_a_record_without_them_is_found_and_calibrated_all_the_same(self) -> None:
        plain = CapabilitySearch(space=ENCODER.space)
        for node, function in (("edge-1", PUMP), ("edge-2", TANK)):
            record = make_record(ENCODER, node, **function)
            plain.upsert(record.model_copy(update={"parts": None}))
        assert ask(plain, "is my pump leaking")[0].key == ("edge-1", "pump_check")
        texts = plain.calibration_texts()
        assert {*PUMP["examples"], *TANK["examples"]} < set(texts)
        vectors = dict(zip(texts, ENCODER.encode(texts), strict=True))
        assert plain.calibrate(vectors).held_out == 6

    @pytest.mark.parametrize("parts", ["", "§", "AAAA", pack_parts(np.ones((1, 64), np.float32))])
    def test_unsound_ones_are_left_aside(self, parts: str) -> None:
        search = CapabilitySearch(space=ENCODER.space)
        record = make_record(ENCODER, **PUMP).model_copy(update={"parts": parts})
        assert search.upsert(record)
        assert ask(search, "pump leaking")[0].key == ("edge-1", "pump_check")

    def test_many_examples_let_the_nearest_one_count(self) -> None:
        words = [f"tell{at} pump leak noise check" for at in range(30)]
        rows = ENCODER.encode(words)
        assert share_of_nearest(rows[:6]) == 0.0
        assert share_of_nearest(rows) == pytest.approx(0.3)
        assert share_of_nearest(ENCODER.encode([f"word{at}" for at in range(30)])) == 0.0


def test_the_background_lowers_no_rank(search: CapabilitySearch) -> None:
    before = ask(search, "is my pump leaking")
    search.calibrate(background())
    after = ask(search, "is my pump leaking")
    assert [match.key for match in after] == [match.key for match in before]
    moved = [new.score - old.score for new, old in zip(after, before, strict=True)]
    assert moved[0] != 0.0


def test_a_catalogue_may_change_while_it_is_calibrated(search: CapabilitySearch) -> None:
    steps = search.calibrating(background())
    next(steps)
    for node, function in (("edge-1", "pump_check"), ("edge-2", "tank_level")):
        search.remove((node, function))
    for _ in steps:
        pass
    assert search.calibration.held_out <= 1
    assert search.needs_calibration


def test_a_restored_index_serves_the_same_records(tmp_path: Path) -> None:
    before = CapabilitySearch(space=ENCODER.space)
    records = [make_record(ENCODER, "edge-1", **PUMP), make_record(ENCODER, "edge-2", **TANK)]
    for record in records:
        before.upsert(record)
    before.snapshot(tmp_path / "index").result(timeout=30)
    after = CapabilitySearch(space=ENCODER.space)
    after.restore(tmp_path / "index")
    assert ask(after, "pump leaking") == []
    after.upsert(records[0])
    assert after.forget_unclaimed() == 1
    before.remove(("edge-2", "tank_level"))
    assert ask(after, "pump leaking") == ask(before, "pump leaking")


@pytest.mark.parametrize("examples", [1, 8])
def test_a_claim_to_everything_takes_no_work_from_the_honest(examples: int) -> None:
    """Its description names every function and its examples are those of all, at times over."""
    encoder = OnnxEncoder(exported_folder())
    alone, stuffed = (CapabilitySearch(space=encoder.space) for _ in range(2))
    for one in FUNCTIONS:
        fields: dict[str, Any] = {"description": one.description, "examples": one.examples}
        record = make_record(encoder, function=one.name, **fields)
        alone.upsert(record)
        stuffed.upsert(record)
    copied = [example for one in FUNCTIONS for example in one.examples] * examples
    everything = "; ".join(f"{one.name}: {one.description}" for one in FUNCTIONS)
    claim: dict[str, Any] = {"description": everything[:2000], "examples": tuple(copied[:256])}
    stuffed.upsert(make_record(encoder, function="do_everything", **claim))
    found = [
        [search.search(text, encoder.encode([text])[0], 1)[0].key[1] for text, _ in IN_SCOPE]
        for search in (alone, stuffed)
    ]
    right = [sum(a == b for a, (_, b) in zip(each, IN_SCOPE, strict=True)) for each in found]
    assert right[0] >= 24
    assert right[1] >= right[0] - 1
    assert found[1].count("do_everything") <= 2
