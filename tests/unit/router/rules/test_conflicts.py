"""Rules that contradict each other, or never come to anything, are found when they are read."""

import pytest

from support.rule_books import mistakes

A = "client = 'a'"


def rules(*bodies: str) -> str:
    return "".join(f"[[rule]]\nname = '{'xyz'[n]}'\n{body}\n" for n, body in enumerate(bodies))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("require.node = 'n1'", "forbid.node = 'n*'", "forbid: can never be met: .* requires all"),
        ("forbid.node = 'n*'", "require.node = 'n1'", "require: can never be met: .* forbids all"),
        ("forbid = [{node = 'a'}, {node = 'b'}]", "require.node = ['a', 'b']", None),
        ("forbid = {node = ['a', 'b']}", "require.node = ['a', 'b']", "forbids all of this"),
        ("forbid = {node = 'a', zone = 'z'}", "require.node = 'a'", None),
        ("forbid.zone = 'z'", "require = {node = 'a', zone = 'z'}", "forbids all of this"),
        ("forbid.node = '*'", "require.zone = 'z'", None),
        ("forbid.external = true", "require.external = true", "forbids all of this"),
        ("require.external = false", "require.external = true", "nothing is both"),
        ("require.node = 'a'", "require.node = 'b'", "nothing is both"),
        ("require.node = 'a-*'", "require.node = 'b-*'", "nothing is both"),
        ("require.node = '*-a'", "require.node = '*-b'", "nothing is both"),
        ("require.node = 'a*'", "require.node = '*b'", None),
        ("require.node = ['a', 'b']", "require.node = ['b', 'c']", None),
        ("require.model = 'q*'", "require.model = 'llama'", "nothing is both"),
        ("require.zone = 'a'", "require.zone = 'b'", None),
        ("require.skill = 'a'", "require.skill = 'b'", None),
        ("policy.zones = 'a'", "policy.zones = ['b', 'c']", "allows only other zones"),
        ("policy.zones = ['a', 'b']", "policy.zones = 'b'", None),
        ("policy.local_only = true", "require.external = true", "require: .* keeps tasks on the"),
        ("require.external = true", "policy.local_only = true", "policy.local_only: .* leaves the"),
        ("prefer.node = 'a'", "forbid.node = 'a'", None),
        ("route = 'best'", "route = 'cheapest'", 'leaves rule "x" .* says best for the same'),
        ("route = 'best'", "route = 'best'", None),
    ],
)
@pytest.mark.parametrize(
    ("one", "other", "together"),
    [("", "", True), (A, A, True), (A, "", True), (A, "client = 'b'", False)],
)
def test_actions_that_cannot_both_be_met(
    first: str, second: str, expected: str | None, one: str, other: str, together: bool
) -> None:
    text = rules(
        first + (f"\nwhen = {{ {one} }}" if one else ""),
        second + (f"\nwhen = {{ {other} }}" if other else ""),
    )
    found = mistakes(text)
    if expected is None or not together:
        assert found == []
        return
    assert len(found) == 1
    assert 'rule "y": ' in found[0]
    for part in expected.split(" .* "):
        assert part in found[0]


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ("client = 'a1'", "client = 'a*'"),
        ("client = 'a1', data = 'private'", "client = ['b', 'a?']"),
        ("data = 'private'", "data = ['private', 'internal']"),
        ("keywords = 'leak', priority = 3", "keywords = 'leak'"),
        ("regex = 'a'", "regex = ['b', 'a']"),
        ("client = 'a', not = [{ priority = 1 }, { priority = 2 }]", "not.priority = 1"),
    ],
)
def test_a_condition_that_is_within_another_one_counts_as_together(narrow: str, wide: str) -> None:
    stop = rules(f"when = {{ {wide} }}\nstop = true", f"when = {{ {narrow} }}\nroute = 'best'")
    assert mistakes(stop) == [
        '7: rule "y": when: is never reached: rule "x" (line 1) stops before it'
    ]
    assert (
        mistakes(
            rules(f"when = {{ {narrow} }}\nstop = true", f"when = {{ {wide} }}\nroute = 'best'")
        )
        == []
    )


def test_of_several_conditions_each_must_be_within() -> None:
    stop = "when = { client = 'a*' }\nstop = true"
    assert mistakes(rules(stop, "when = [{client = 'a1'}, {client = 'b'}]\nroute = 'best'")) == []
    found = mistakes(rules(stop, "when = [{client = 'a1'}, {client = 'a2'}]\nroute = 'best'"))
    assert "is never reached" in found[0]


def test_nothing_comes_after_a_rule_that_always_stops() -> None:
    found = mistakes(rules("stop = true", "route = 'best'", "when.client = 'a'\nroute = 'best'"))
    assert [line.split(": ")[1:3] for line in found] == [['rule "y"', "when"], ['rule "z"', "when"]]


def test_a_rule_that_stops_before_another_keeps_them_apart() -> None:
    general = "require.external = true"
    special = "when.data = 'private'\nrequire.external = false\nstop = true"
    assert mistakes(rules(special, general)) == []
    assert "nothing is both" in mistakes(rules(general, special))[0]


def test_a_later_route_for_fewer_tasks_is_no_mistake() -> None:
    assert mistakes(rules("route = 'cheapest'", "when.client = 'a'\nroute = 'best'")) == []
    found = mistakes(rules("when.client = 'a'\nroute = 'best'", "route = 'cheapest'"))
    assert 'leaves rule "x" (line 1) without effect' in found[0]


def test_a_flood_of_contradictions_is_cut_short() -> None:
    text = "".join(f"[[rule]]\nname = 'r{n}'\nrequire.node = 'n{n}'\n" for n in range(200))
    assert len(mistakes(text)) == 50
