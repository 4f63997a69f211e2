"""Whatever a rules file says, reading it ends in rules or in problems; what applies is certain."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from capability_schemas.task import Task
from router.rules import RuleBook
from router.rules.model import Condition, Rule, Target
from router.rules.patterns import Globs, covers, disjoint, is_literal
from router.rules.reading import Reading, read_rules

FIELDS = sorted(
    {
        "name", "any", "all", "none", "characters", "words", "bytes", "at_least", "at_most", "has",
        "equals", "zones", "grants", "local_only", "max_cost", "not",
        *Rule.model_fields, *Condition.model_fields, *Target.model_fields,
    }
)  # fmt: skip
SCALARS = st.one_of(
    st.sampled_from(["a", "leak*", "a-*", "de", "private", "best", "(", r"\d+", "", "a b"]),
    st.integers(-2, 12),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=12,
)
RULES = st.lists(
    st.dictionaries(st.sampled_from(sorted(Rule.model_fields)), VALUES, max_size=5), max_size=4
)
WORDS = st.lists(st.sampled_from(["leak", "oil", "spill", "pump"]), max_size=4).map(" ".join)
PATTERN = st.text("ab*?", min_size=1, max_size=4)
NAME = st.text("ab", min_size=1, max_size=5)


def toml(value: Any) -> str:
    """Write a value in TOML, inline."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{name}" = {toml(one)}' for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_without_a_crash(text: str) -> None:
    assert isinstance(read_rules(text, "x"), Reading)


@settings(max_examples=300, deadline=None)
@given(RULES, st.booleans())
def test_any_toml_is_read_without_a_crash_and_without_silence(
    rules: list[dict[str, Any]], tables: bool
) -> None:
    text = (
        "".join(
            "[[rule]]\n" + "".join(f"{name} = {toml(value)}\n" for name, value in rule.items())
            for rule in rules
        )
        if tables
        else f"rule = {toml(rules)}"
    )
    reading = read_rules(text, "x")
    assert reading.problems or len(reading.rules) == len(rules)
    assert all(str(problem) for problem in reading.problems)
    if not reading.problems:
        effect = RuleBook(reading).apply("a", Task(text="an oil leak"))
        json.dumps(effect.describe())


@st.composite
def books(draw: st.DrawFn) -> str:
    rules = []
    for number in range(draw(st.integers(1, 6))):
        when = [
            f"keywords = {draw(st.sampled_from(['leak', 'oil spill', 'pu*']))!r}",
            f"client = {draw(st.sampled_from(['a', 'b', 'a*', '*']))!r}",
            f"priority.at_least = {draw(st.integers(0, 9))}",
        ]
        chosen = draw(st.lists(st.sampled_from(when), unique=True, max_size=3))
        stop = "stop = true\n" if draw(st.booleans()) else ""
        table = f"[rule.when]\n{chr(10).join(chosen)}\n" if chosen else ""
        rules.append(f"[[rule]]\nname = 'r{number}'\nmin_confidence = 0.{number}\n{stop}{table}")
    return "".join(rules)


@settings(max_examples=200, deadline=None)
@given(books(), st.sampled_from(["a", "b", "ab"]), WORDS, st.integers(0, 9))
def test_rules_apply_as_if_each_were_asked_alone_until_one_stops(
    text: str, client: str, words: str, priority: int
) -> None:
    reading = read_rules(text, "x")
    if reading.problems:  # rules that are never reached
        assert all("is never reached" in problem.message for problem in reading.problems)
        return
    task = Task(text=f"x {words}", priority=priority)
    expected = []
    for rule in reading.rules:
        if RuleBook(Reading(rules=(rule,))).apply(client, task).matched:
            expected.append(rule.name)
            if rule.stop:
                break
    book = RuleBook(reading)
    effect = book.apply(client, task)
    assert list(effect.matched) == expected
    assert book.apply(client, task) is effect


@settings(max_examples=300, deadline=None)
@given(PATTERN, PATTERN, NAME)
def test_what_is_said_of_patterns_holds_for_every_name(one: str, other: str, name: str) -> None:
    first, second = Globs([one]).match(name), Globs([other]).match(name)
    if disjoint(one, other):
        assert not (first and second)
    if covers([other], one):
        assert second or not first
    if is_literal(one):
        assert first is (name == one)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["client", "function", "skill"]),
        st.lists(PATTERN, min_size=1, max_size=2),
        min_size=1,
    ),
    st.dictionaries(
        st.sampled_from(["client", "function", "skill"]),
        st.lists(PATTERN, min_size=1, max_size=2),
        min_size=1,
    ),
    NAME, NAME, NAME,
)  # fmt: skip
def test_a_condition_that_implies_another_never_holds_without_it(
    one: dict[str, Any], other: dict[str, Any], client: str, function: str, skill: str
) -> None:
    both = [
        Rule.model_validate({"name": name, "when": when, "stop": True})
        for name, when in (("a", one), ("b", other))
    ]
    if not both[0].implies(both[1]):
        return
    task = Task(function=function, skills=(skill,))
    holds = [bool(RuleBook(Reading(rules=(rule,))).apply(client, task).matched) for rule in both]
    assert holds[1] or not holds[0]
