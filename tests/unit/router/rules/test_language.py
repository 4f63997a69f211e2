"""The language of short texts, as devices and the people beside them write."""

import pytest

from router.rules.language import NAMES, LanguageGuess, check_language
from support.rule_books import fits


@pytest.fixture(scope="module")
def guess() -> LanguageGuess:
    return LanguageGuess()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what is the next train to town?", "en"),
        ("das Förderband steht schon wieder", "de"),
        ("il faut changer le filtre", "fr"),
        ("hay que cambiar el filtro", "es"),
        ("il nastro si è fermato di nuovo", "it"),
        ("het filter moet vervangen worden", "nl"),
        ("łożysko jest gorące", "pl"),
        ("подшипник горячий", "ru"),
        ("打开厨房的窗户", "zh"),
        ("台所の窓を開けて", "ja"),
        ("베어링이 뜨겁습니다", "ko"),
        ("12345", None),
        ("T=4.53;V=3", None),
        ('{"a": 1}', None),
        ("😀", None),
        ("ok", None),
    ],
)
def test_language_of_short_texts(guess: LanguageGuess, text: str, expected: str | None) -> None:
    assert guess.of(text) == expected


def test_what_is_unclear_among_all_may_be_clear_among_those_spoken(guess: LanguageGuess) -> None:
    assert guess.of("hello world") is None
    here = LanguageGuess(["de", "en"])
    assert here.of("hello world") == "en"
    assert here.of("подшипник горячий") == "ru", "another language stays another language"
    assert here.of("12345") is None


def test_every_code_is_known_to_the_model(guess: LanguageGuess) -> None:
    assert set(guess._identifier.labels) == {*NAMES, "zxx"}
    assert [check_language(code) for code in NAMES] == list(NAMES)


def test_rules_on_language() -> None:
    german = "Lager ist heiß, bitte kommen"
    assert fits('language = ["de", "nl"]', text=german)
    assert not fits('language = "en"', text=german)
    assert fits('not.language = "en"', text="T=4.53")
    assert not fits('language = "de"', function="echo")
