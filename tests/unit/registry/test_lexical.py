import random

import pytest

from registry import lexical
from registry.lexical import LexicalIndex, Tokenizer, squash

PUMP = ["pump_check", "Checks a pump for leaks and noise", "is the pump leaking", "pump check"]
TANK = ["tank_level", "Measures how full a tank is", "how full is tank four", "level of the tank"]


@pytest.fixture
def index() -> LexicalIndex:
    made = LexicalIndex()
    made.upsert("pump", PUMP)
    made.upsert("tank", TANK)
    return made


def test_words_are_stemmed_and_names_split() -> None:
    assert Tokenizer()("tankLevel pump_checks LEAKING") == [
        "tank",
        "level",
        "pump",
        "check",
        "leak",
    ]


def test_the_document_with_the_words_covers_most(index: LexicalIndex) -> None:
    covered = index.coverage("pumps that leak")
    assert covered["pump"] > covered.get("tank", 0.0)


def test_words_nobody_has_lower_the_coverage(index: LexicalIndex) -> None:
    short = index.coverage("pump leaks")["pump"]
    diluted = index.coverage("pump leaks while unicorns dance tango tonight")["pump"]
    assert 0.0 < diluted < short


def test_a_longer_request_of_the_same_kind_does_not_score_by_its_length(
    index: LexicalIndex,
) -> None:
    once = index.coverage("pump leaks")["pump"]
    assert index.coverage("pump leaks pump leaks pump leaks")["pump"] == pytest.approx(once)


@pytest.mark.parametrize("text", ["", "?!", "xyzzy"])
def test_no_shared_word_covers_nothing(index: LexicalIndex, text: str) -> None:
    assert index.coverage(text) == {}


def test_a_bare_name_is_left_out() -> None:
    index = LexicalIndex()
    index.upsert("bare", ["pump_check", "pump"])
    assert "bare" not in index
    assert index.coverage("pump") == {}


def test_replacing_and_removing_leave_nothing_behind(index: LexicalIndex) -> None:
    before = index.coverage("pump leaks")
    index.upsert("extra", TANK)
    index.upsert("extra", PUMP)
    index.remove("extra")
    index.remove("extra")
    assert index.coverage("pump leaks") == pytest.approx(before)
    for key in ("pump", "tank"):
        index.remove(key)
    assert len(index) == 0
    assert index.coverage("pump") == {}


def test_leaving_a_part_out_equals_a_document_without_it(index: LexicalIndex) -> None:
    part = "is the pump leaking"
    left_out = index.coverage_without("pump", part)
    assert 0.0 < left_out < index.coverage(part)["pump"]
    assert index.coverage_without("pump", "") == 0.0
    assert index.coverage_without("unknown", part) == 0.0


def test_squash_halves_at_half() -> None:
    assert squash(0.5, 0.5) == 0.5
    assert squash(0.0, 0.5) == 0.0
    assert squash(1e9, 0.5) < 1.0


def test_common_words_count_for_what_is_looked_at_anyway(
    index: LexicalIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = index.coverage("pump is tank")
    monkeypatch.setattr(lexical, "COMMON", 1)  # "is" stands in both documents
    assert index.coverage("pump is tank") == pytest.approx(exact)
    assert index.coverage("is") == {}
    assert index.coverage("is", among=["pump", "unknown"]).keys() == {"pump"}


def many(count: int = 300) -> dict[str, list[str]]:
    rng = random.Random(4)
    words = [f"word{at}" for at in range(60)]
    return {
        f"d{at:03}": [" ".join(rng.choices(words, k=12)), f"thing{at % 40} of maker{at}"]
        for at in range(count)
    }


def test_where_many_share_a_word_the_best_are_brought_in() -> None:
    index = LexicalIndex()
    documents = many()
    for key, texts in documents.items():
        index.upsert(key, texts)
    asked = "word1 word2 word3 thing7 maker47"
    everyone = index.coverage(asked, limit=1_000)
    assert len(everyone) > 100
    best = sorted(everyone, key=lambda key: (-everyone[key], key))
    few = index.coverage(asked, ["d001", "d002", "unknown"], limit=20)
    assert 20 <= len(few) <= 22
    assert best[0] == "d047"
    assert len(set(best[:5]) & few.keys()) >= 4
    assert {key: everyone[key] for key in few} == pytest.approx(few)


def test_neither_the_order_of_coming_nor_what_has_gone_matters() -> None:
    documents = many()
    straight, crooked = LexicalIndex(), LexicalIndex()
    for key, texts in documents.items():
        straight.upsert(key, texts)
    rng = random.Random(9)
    for key in rng.sample(sorted(documents), 200):
        crooked.upsert(key, [" ".join(rng.choices(["word1", "gone", "thing7", "maker3"], k=20))])
    for key in rng.sample(sorted(documents), 300):
        crooked.upsert(key, documents[key])
    crooked.upsert("passing", ["word1 word2 word3 thing7 maker47 and several others"])
    crooked.remove("passing")
    for asked in ("word1 word2 word3", "thing7 word9 maker47 unheard", "thing7", "gone"):
        mine, theirs = crooked.coverage(asked, limit=20), straight.coverage(asked, limit=20)
        assert mine == pytest.approx(theirs)


def test_words_that_nobody_has_any_more_leave_their_place_to_others() -> None:
    index = LexicalIndex()
    for turn in range(5):
        index.upsert("only", [f"turn{turn} word{at}" for at in range(2_000)])
        assert index.coverage(f"turn{turn}").keys() == {"only"}
        assert index.coverage(f"turn{turn - 1}") == {}
    index.remove("only")
    assert index.coverage("word7") == {}
