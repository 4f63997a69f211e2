"""When a rule applies."""

from typing import Any

import pytest

from router.rules.model import LOOKED_AT
from support.rule_books import RULE, applied, fits


@pytest.mark.parametrize(
    ("keywords", "text", "expected"),
    [
        ('"leak"', "there is a LEAK, help", True),
        ('"leak"', "it leaks", False),
        ('"leak"', "bleak", False),
        ('"leak*"', "it leaks", True),
        ('"leak*"', "bleak", False),
        ('"*pumpe"', "die Kreiselpumpe ist heiß", True),
        ('"*pumpe"', "Pumpenraum", False),
        ('"*pump*"', "die Kreiselpumpen", True),
        ('"oil spill"', "an Oil-spill!", True),
        ('"oil spill"', "a spill of oil", False),
        ('"oil spill"', "boil spill", False),
        ('"oil spill*"', "oil spills here", True),
        ('"hot hot"', "hot hot", True),
        ('"mm/s"', "14 mm/s", True),
        ('"STRASSE"', "in der Straße", True),
        ('"\uff2b\uff49\uff11"', "Ki1 meldet", True),
        ('"漏れ"', "油が漏れています", True),
        ('"关灯"', "请关灯。", True),
        ('"关灯"', "开灯", False),
        ('["a", "leak"]', "leak", True),
        ('{ all = ["leak", "oil"] }', "oil leak", True),
        ('{ all = ["leak", "oil"] }', "leak", False),
        ('{ none = "test" }', "leak", True),
        ('{ none = "test" }', "a test leak", False),
        ('{ any = ["leak", "spill"], none = "test" }', "a spill", True),
        ('{ any = "leak", all = "oil" }', "a leak", False),
    ],
)
def test_keywords(keywords: str, text: str, expected: bool) -> None:
    assert fits(f"keywords = {keywords}", text=text) is expected


@pytest.mark.parametrize(
    ("when", "task", "expected"),
    [
        (r"regex = '\d+ mm/s'", {"text": "14 mm/s"}, True),
        (r"regex = '\d+ mm/s'", {"text": "14 cm"}, False),
        (r"regex = ['(?i)ALARM', 'x{3}']", {"text": "alarm"}, True),
        (r"regex = 'ALARM'", {"text": "alarm"}, False),
        (r"regex = '.*'", {"function": "echo", "input": "alarm"}, False),
        ('keywords = { none = "x" }', {"function": "echo"}, True),
        ("length.characters.at_least = 5", {"text": "hello"}, True),
        ("length.characters.at_least = 6", {"text": "hello"}, False),
        ("length.characters.at_most = 4", {"text": "hello"}, False),
        ("length.characters = 5", {"text": "hello"}, True),
        ("length.words = { at_least = 2, at_most = 3 }", {"text": "one  two"}, True),
        ("length.words = 2", {"text": "one two three"}, False),
        ("length.bytes = 2", {"text": "é"}, True),
        ("length.bytes = 9", {"text": "é", "input": [1, 2]}, False),
        ("length.bytes = 8", {"text": "é", "input": [1, 2]}, True),
        ("length.characters = 0", {"function": "echo"}, True),
        ('function = "echo"', {"function": "echo@>=1.2"}, True),
        ('function = "ec*"', {"function": "echo"}, True),
        ('function = "*"', {"text": "echo"}, False),
        ('not.function = "*"', {"text": "echo"}, True),
        ('skill = "vis*"', {"skills": ["audio", "vision"]}, True),
        ('skill = "vision"', {"skills": ["audio"]}, False),
        ('data = ["private", "internal"]', {"policy": {"data": "private"}}, True),
        ('data = "private"', {"policy": {"data": "public"}}, False),
        ('data = "private"', {}, False),
        ("priority = 9", {"priority": 9}, True),
        ("priority.at_most = 4", {}, False),
        ('input.has = "a.b"', {"input": {"a": {"b": 0}}}, True),
        ('input.has = "a.b"', {"input": {"a": {"b": None}}}, False),
        ('input.has = "a.b"', {"input": {"a": [1]}}, False),
        ('input.has = "a"', {"input": "a"}, False),
        ('input.equals = { "a.b" = "x" }', {"input": {"a": {"b": "x"}}}, True),
        ('input.equals = { a.b = ["y", "x"] }', {"input": {"a": {"b": "x"}}}, True),
        ("input.equals = { a = 1 }", {"input": {"a": True}}, False),
        ("input.equals = { a = true }", {"input": {"a": True}}, True),
        ("input.equals = { a = 1 }", {"input": {"a": 1.0}}, True),
        ("input.equals = { a = 1, b = 2 }", {"input": {"a": 1, "b": 3}}, False),
        ("input.at_least = { a = 90 }", {"input": {"a": 90}}, True),
        ("input.at_least = { a = 90 }", {"input": {"a": 89.9}}, False),
        ("input.at_least = { a = 0 }", {"input": {"a": True}}, False),
        ("input.at_most = { a = 90 }", {"input": {"a": "1"}}, False),
        ("input.at_most = { a = 90 }", {"input": {"a": -1}}, True),
    ],
)
def test_other_signals(when: str, task: dict[str, Any], expected: bool) -> None:
    assert fits(when, **task) is expected


@pytest.mark.parametrize(
    ("pattern", "client", "expected"),
    [
        ('"hall3-*"', "hall3-7", True),
        ('"hall3-*"', "hall4-7", False),
        ('["a", "b?"]', "b1", True),
        ('"[ab]1"', "b1", True),
        ('"HALL"', "hall", False),
    ],
)
def test_clients(pattern: str, client: str, expected: bool) -> None:
    assert fits(f"client = {pattern}", client) is expected


def test_a_table_needs_all_its_signals_and_of_several_tables_one() -> None:
    both = 'client = "a*"\nkeywords = "leak"'
    assert fits(both, "a1", text="leak")
    assert not fits(both, "b1", text="leak")
    assert not fits(both, "a1", text="hello")
    either = f'{RULE}[[rule.when]]\nclient = "a*"\n[[rule.when]]\nkeywords = "leak"'
    assert applied(either, "a1").matched
    assert applied(either, "b1", text="leak").matched
    assert not applied(either, "b1").matched


def test_not_excludes_tasks_that_one_of_its_tables_fits() -> None:
    one = 'keywords = "leak"\nnot = { client = "lab-*", priority = 0 }'
    assert fits(one, "lab-1", text="leak")
    assert not fits(one, "lab-1", text="leak", priority=0)
    several = 'not = [{ client = "lab-*" }, { priority = 0 }]'
    assert fits(several)
    assert not fits(several, "lab-1")
    assert not fits(several, priority=0)


def test_a_rule_without_when_always_applies() -> None:
    assert applied(RULE, function="echo").matched == ("only",)


def test_padding_hides_nothing() -> None:
    text = "a " * 500_000 + "end"
    assert fits('keywords = "end"', text=text)
    assert fits('regex = "end"', text=text)
    assert not fits('keywords = "end"', text="a " * (LOOKED_AT // 2) + "end")
    assert fits("length.characters.at_least = 1_000_001", text=text)


def test_rules_that_hinge_on_something_keep_their_order() -> None:
    rules = "".join(
        f'[[rule]]\nname = "{name}"\nwhen = {{ {when} }}\nroute = "best"\n'
        for name, when in [
            ("client", 'client = "c"'),
            ("keyword", 'keywords = "leak"'),
            ("other", 'keywords = "spill"'),
            ("length", "length.words = 1"),
            ("skill", 'skill = "s"'),
            ("function", 'function = "f"'),
            ("all", 'keywords = { all = ["leak"] }'),
        ]
    )
    effect = applied(rules, "c", text="leak", skills=["s"], function="f@1")
    assert effect.matched == ("client", "keyword", "length", "skill", "function", "all")
