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
