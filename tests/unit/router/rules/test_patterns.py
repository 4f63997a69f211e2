"""Names that patterns fit, and expressions that no text can hold up."""

import pytest

from router.rules.patterns import any_of, compile_expression, covers, disjoint


@pytest.mark.parametrize(
    ("patterns", "pattern", "expected"),
    [
        (["*"], "a*", True),
        (["a*"], "ab", True),
        (["a*"], "a*", True),
        (["a*"], "ab*", False),
        (["b", "a?"], "ab", True),
        (["b"], "a", False),
    ],
)
def test_covers_names_only_what_is_certain(
    patterns: list[str], pattern: str, expected: bool
) -> None:
    assert covers(patterns, pattern) is expected


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a", "b", True),
        ("a", "a", False),
        ("ab", "a*", False),
        ("b*", "ab", True),
        ("a*", "ab*", False),
        ("a*", "b*", True),
        ("*a", "*b", True),
        ("*a", "*ba", False),
        ("*[ab]", "*c", False),
        ("[ab]*", "c*", False),
        ("*", "x", False),
    ],
)
def test_disjoint_names_only_what_is_certain(one: str, other: str, expected: bool) -> None:
    assert disjoint(one, other) is expected
    assert disjoint(other, one) is expected


def test_expressions_that_backtracking_engines_choke_on_are_harmless() -> None:
    search = compile_expression(r"^(a+)+$")
    assert search("a" * 16_000 + "!") is None
    assert compile_expression(r"(.*a){20}")("a" * 16_000) is not None


def test_one_pass_tells_whether_any_expression_is_there() -> None:
    holds = any_of({r"(?i)leak", r"\d+ mm", "a|b"})
    assert holds("A LEAK")
    assert holds("14 mm")
    assert holds("xxb")
    assert not holds("A 4")
    assert not any_of(())("anything")
    assert any_of({rf"{n}(\pL{{5}}){{1}}x{{900}}" for n in range(250)})("too large: look closely")
