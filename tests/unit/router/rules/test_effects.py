"""What rules that apply make of a task."""

from typing import Any

import pytest

from capability_schemas.task import Task, TaskPolicy
from router.rules import NO_RULES, RuleBook
from support.rule_books import applied, record

EXTERNAL = {"policy": {"external": True, "zones": ("cloud",)}}


@pytest.mark.parametrize(
    ("target", "fields", "expected"),
    [
        ('function = "ec*"', {}, True),
        ('function = "ec"', {}, False),
        ('node = ["edge-2", "edge-1"]', {}, True),
        ('node = "lab-*"', {}, False),
        ('skill = "vis*"', {"skills": ("audio", "vision")}, True),
        ('skill = "vision"', {}, False),
        ('zone = "hall-*"', {"policy": {"zones": ("office", "hall-3")}}, True),
        ('zone = "hall-*"', {}, False),
        ('model = "qwen*"', {"model": {"name": "qwen2.5"}}, True),
        ('model = "*"', {}, False),
        ("external = true", EXTERNAL, True),
        ("external = false", EXTERNAL, False),
        ('external = true, zone = "cloud"', EXTERNAL, True),
        ('external = true, zone = "hall"', EXTERNAL, False),
    ],
)
def test_targets(target: str, fields: dict[str, Any], expected: bool) -> None:
    one = record(**fields)
    require = applied(f'[[rule]]\nname = "r"\nrequire = {{ {target} }}')
    forbid = applied(f'[[rule]]\nname = "r"\nforbid = {{ {target} }}')
    prefer = applied(f'[[rule]]\nname = "r"\nprefer = {{ {target} }}')
    assert (require.refusal(one) is None) is expected
    assert (forbid.refusal(one) is not None) is expected
    assert prefer.bonus(one) == (0.05 if expected else 0.0)
    assert require.bonus(one) == 0.0
    assert prefer.refusal(one) is None


def test_of_several_targets_one_is_enough() -> None:
    effect = applied('[[rule]]\nname = "r"\nrequire = [{ node = "a" }, { zone = "z" }]')
    assert effect.refusal(record("a")) is None
    assert effect.refusal(record("b", policy={"zones": ("z",)})) is None
    assert effect.refusal(record("b")) == 'rule r requires node "a"; or zone "z"'


def test_a_refusal_names_every_rule_that_excludes() -> None:
    effect = applied("""
        [[rule]]
        name = "here"
        require = { external = false, zone = ["hall-1", "hall-2"] }
        [[rule]]
        name = "not-there"
        forbid = { node = "lab-*" }
    """)
    assert effect.refusal(record("lab-1")) == (
        'rule here requires zone "hall-1" or "hall-2", external false; '
        'rule not-there forbids node "lab-*"'
    )


def test_bonuses_add_up_to_a_bound() -> None:
    rule = '[[rule]]\nname = "{}"\nprefer = {{ node = "{}" }}\nbonus = {}\n'
    effect = applied(
        rule.format("a", "e*", 0.03) + rule.format("b", "edge-1", 0.04) + rule.format("c", "x", 0.1)
    )
    assert effect.bonus(record("edge-1")) == pytest.approx(0.07)
    assert effect.bonus(record("edge-2")) == pytest.approx(0.03)
    high = applied(rule.format("a", "*", 0.08) + rule.format("b", "*", 0.08))
    assert high.bonus(record()) == 0.1


def test_scalars_combine_strictly_and_the_last_route_counts() -> None:
    effect = applied("""
        [[rule]]
        name = "general"
        route = "cheapest"
        min_confidence = 0.8
        policy = { zones = ["a", "b"], data = "internal", max_cost = 2.0, grants = "g" }
        [[rule]]
        name = "special"
        when = { client = "device-*" }
        route = "best"
        min_confidence = 0.6
        policy.zones = ["b", "c"]
        policy.data = "private"
        policy.max_cost = 3.0
        policy.local_only = true
        policy.grants = "h"
    """)
    assert effect.matched == ("general", "special")
    assert (effect.prefer, effect.min_confidence) == ("best", 0.8)
    assert effect.policy == TaskPolicy(
        zones=("b",), data="private", max_cost=2.0, local_only=True, grants=("g", "h")
    )


def test_stop_ends_the_rules_but_counts_itself() -> None:
    rules = """
        [[rule]]
        name = "first"
        route = "best"
        [[rule]]
        name = "halt"
        when = { keywords = "stop" }
        min_confidence = 0.5
        stop = true
        [[rule]]
        name = "last"
        forbid = { node = "*" }
    """
    stopped = applied(rules, text="stop it")
    assert stopped.matched == ("first", "halt")
    assert stopped.min_confidence == 0.5
    assert stopped.refusal(record()) is None
    assert applied(rules).matched == ("first", "last")


def test_what_the_search_can_be_told() -> None:
    effect = applied("""
        [[rule]]
        name = "exact"
        require = { zone = ["a", "b"], skill = "vision", external = false, node = "n" }
        [[rule]]
        name = "patterns"
        require = { zone = ["a*", "b"] }
        [[rule]]
        name = "several"
        require = [{ zone = "a" }, { zone = "b" }]
    """)
    assert effect.demands == (
        frozenset({"zone:a", "zone:b"}),
        frozenset({"skill:vision"}),
        frozenset({"local"}),
    )


def test_rules_that_clash_only_on_a_task_refuse_it_and_are_named() -> None:
    rules = """
        [[rule]]
        name = "hot"
        when = { keywords = "hot" }
        require = { external = true }
        [[rule]]
        name = "secret"
        when = { data = "private" }
        require = { external = false }
    """
    effect = applied(rules, text="hot", policy={"data": "private"})
    assert effect.conflict is not None
    assert "hot" in effect.conflict
    assert "secret" in effect.conflict
    assert effect.refusal(record()) == effect.conflict
    assert applied(rules, text="hot").conflict is None


def test_zones_that_leave_nothing_are_a_clash_too() -> None:
    rules = "".join(
        f'[[rule]]\nname = "{name}"\nwhen = {{ keywords = "{name}" }}\npolicy.zones = {zones}\n'
        for name, zones in [("one", ["a", "b"]), ("two", ["b", "c"]), ("three", ["a", "c"])]
    )
    assert applied(rules, text="one two").conflict is None
    clash = applied(rules, text="one two three").conflict
    assert clash == (
        "rules one, two, three contradict each other on this task: together they leave no zone"
    )


def test_without_a_match_nothing_changes() -> None:
    effect = applied('[[rule]]\nname = "r"\nwhen = { client = "x" }\nforbid = { node = "*" }')
    assert effect is NO_RULES
    assert effect.refusal(record()) is None
    assert effect.bonus(record()) == 0.0
    assert effect.demands == ()
    assert effect.describe() == {"matched": []}
    assert RuleBook().apply("c", Task(text="x")) is NO_RULES


def test_the_effect_is_told_as_json() -> None:
    effect = applied("""
        [[rule]]
        name = "r"
        require = { zone = "a" }
        prefer = { node = "n" }
        min_confidence = 0.7
        route = "fastest"
        policy = { local_only = true }
    """)
    assert effect.describe() == {
        "matched": ["r"],
        "require": [{"rule": "r", "target": 'zone "a"'}],
        "prefer": [{"rule": "r", "target": 'node "n"', "bonus": 0.05}],
        "min_confidence": 0.7,
        "route": "fastest",
        "policy": {"local_only": True},
    }


def test_a_book_tells_its_rules_as_they_are_written() -> None:
    book = RuleBook.parse('# a\n[[rule]]\nname = "r"\nwhen = { client = "x" }\nroute = "best"\n')
    assert book.describe() == [{"line": 2, "name": "r", "when": {"client": "x"}, "route": "best"}]
    assert len(book) == 1


def test_what_was_worked_out_last_is_kept_whatever_clients_have_sent() -> None:
    names = [
        f"[[rule]]\nname = 'r{one}'\nwhen = {{ keywords = 'k{one}' }}\nroute = 'best'\n"
        for one in range(12)
    ]
    book = RuleBook.parse("".join(names))
    for number in range(2_000):
        words = [f"k{one}" for one in range(12) if number >> one & 1]
        text = " ".join(["say", *words])
        effect = book.apply("pump-7", Task(text=text))
        assert list(effect.matched) == [f"r{word[1:]}" for word in words]
        assert book.apply("pump-7", Task(text=text)) is effect


def test_the_reason_stays_short_however_many_rules_and_patterns_there_are() -> None:
    nodes = ", ".join(f'"node-{number}"' for number in range(900))
    rules = [f'[[rule]]\nname = "r{one}"\nrequire = {{ node = [{nodes}] }}\n' for one in range(9)]
    reason = RuleBook.parse("".join(rules)).apply("pump-7", Task(text="say")).refusal(record())
    assert reason is not None
    assert reason.startswith("rule r0 requires node")
    assert reason.endswith("further rules exclude it too")
    assert len(reason) < 4_000
