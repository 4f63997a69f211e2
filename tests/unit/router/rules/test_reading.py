"""Everything that is wrong with a rules file is said at once, each thing at its place."""

import pytest

from capability_schemas.errors import ConfigurationError
from router.rules import RuleBook
from router.rules.model import LISTED, MOST_EXPRESSIONS, MOST_KEYWORDS, MOST_RULES
from support.rule_books import RULE, mistakes

HEAD = '[[rule]]\nname = "r"\nroute = "best"\n'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            'when = { language = "germn" }',
            "language: 'germn' is no language code; did you mean 'de'?",
        ),
        ('when = { language = "de-AT" }', "'de-AT' is no language code; did you mean 'de'?"),
        ('when = { language = "q" }', "'q' is no language code; use one of ar, bg,"),
        ("when = { keyword = 'x' }", "when.keyword: unknown; did you mean keywords?"),
        ("when = { not = { not = { priority = 1 } } }", "when.not.not: unknown; remove it"),
        (
            "when = { keywords = 'c++' }",
            "when.keywords: 'c++' holds '+', which is no part of a word",
        ),
        ("when = { keywords = ['a', '...'] }", "when.keywords[1]: '...' holds no word"),
        ("when = { keywords = 'a*b' }", "'a*b': a * stands in front of everything or behind it"),
        ("when = { keywords = '*' }", "'*' holds no word"),
        ("when = { keywords = { some = 'a' } }", "when.keywords.some: unknown; remove it"),
        (
            "when = { keywords = { any = 'a', none = ['A', 'b'] } }",
            "all that any asks for is under",
        ),
        ("when = { keywords = { all = 'a', none = 'a' } }", "'a' is under all and under none"),
        ("when = { keywords = 7 }", "when.keywords: "),
        ("when = { regex = '(?=a)' }", "no look-around or back references"),
        ("when = { regex = ['ok', 'a('] }", "when.regex[1]: is no regular expression of RE2"),
        (r"when = { regex = '\pL{9}' }", "instructions, at most"),
        ("when = { regex = 'x{1001}' }", "invalid repetition size"),
        ("when = { length = 5 }", "when.length: write a table"),
        ("when = { length = { letters = 5 } }", "when.length.letters: unknown; remove it"),
        ("when = { length = { words = { at_least = 3, at_most = 2 } } }", "at_least 3 is over 2"),
        ("when = { length = { words = { min = 3 } } }", "when.length.words.min: unknown"),
        ("when = { length = { bytes = -1 } }", "nothing is at most -1"),
        ("when = { length = { bytes = nan } }", "when.length.bytes"),
        ("when = { priority = 12 }", "no task has a priority of 12; 9 is first"),
        ("when = { priority = true }", "when.priority: write a table"),
        ("when = { client = 'hall 3' }", "'hall 3' fits nothing: ' ' is in no name"),
        ("when = { client = [] }", "when.client: is empty: remove it, or fill it"),
        ("when = { client = [1] }", "when.client[0]: write text"),
        (
            "when = { data = 'secret' }",
            "when.data: Input should be 'public', 'internal' or 'private'",
        ),
        ("when = { input = { equals = { a = [] } } }", "equals: a: write text, a number, true"),
        ("when = { input = { equals = 'a' } }", "when.input.equals: write a table"),
        ("when = { input = { equals = { a = inf } } }", "when.input.equals: a: write text, a"),
        ("when = { input = { equals = { a = 07:00:00 } } }", "when.input.equals: a: write text, a"),
        ("when = { input = { at_least = { a = 'x' } } }", "when.input.at_least: a: write a number"),
        ("when = { input = { at_least = { a = 2 }, at_most = { a = 1 } } }", "a at least 2 and at"),
        (
            "when = { client = 'a', not = { client = 'a*' } }",
            "`not` excludes all that the rest asks",
        ),
        ("when = {}", "when: says nothing: remove it, or fill it"),
        ("when = []", "when: is empty: remove it, or fill it"),
        ("when = 'always'", "when: write a table"),
        ("require = {}", "require: says nothing: remove it, or fill it"),
        ("require = { nodes = 'a' }", "require.nodes: unknown; did you mean node?"),
        ("require = [{ node = 'a' }, { node = 'ä' }]", "require[1].node: 'ä' fits nothing"),
        ("require = { external = 'no' }", "require.external: write true or false"),
        ("require = { node = 'a' }\nforbid = { node = 'a*' }", "the same rule forbids all of this"),
        (
            "prefer = { node = 'a' }\nbonus = 0.5",
            "bonus: Input should be less than or equal to 0.1",
        ),
        ("prefer = { node = 'a' }\nbonus = 0", "bonus: Input should be greater than 0"),
        ("prefer = { node = 'a' }\nbonus = nan", "bonus: "),
        ("bonus = 0.05", "bonus needs prefer"),
        ("min_confidence = 1.5", "min_confidence: Input should be less than or equal to 1"),
        ("min_confidence = true", "min_confidence: write a number"),
        ("stop = 'yes'", "stop: write true or false"),
        ("policy = { local_only = false }", "policy.local_only: a rule only narrows the policy"),
        ("policy = { max_price = 1 }", "policy.max_price: unknown"),
        ("policy = { zones = [] }", "policy.zones: is empty"),
        ("policy = {}", "policy: "),
        ("stopp = true", "stopp: unknown; did you mean stop?"),
        ("description = 5", "description: write text"),
    ],
)
def test_a_mistake_is_named_with_its_rule_field_and_line(line: str, expected: str) -> None:
    found = mistakes(f"# a comment\n{HEAD}{line}\n")
    assert len(found) == 1, found
    assert expected in found[0]
    at = "2" if expected.startswith(("bonus needs",)) else found[0].split(":")[0]
    assert at in ("2", "5", "6")
    assert 'rule "r": ' in found[0]


def test_lines_are_those_of_the_fields_however_they_are_written() -> None:
    assert mistakes("""
[[rule]]
name = "tables"   # when = { language = "x" }
description = "when = { language = 1 }"
route = "best"
[rule.when]
language = "xx-1"
not.client = "ä"
[rule.when.length.words]
least = 2

  [[ rule ]]
  name = "inline"
  route = "quick"
  when = [
    { client = "a" },
    { 'regex' = "(" },
  ]
""") == [
        "7: rule \"tables\": when.language: 'xx-1' is no language code; "
        + mistakes('languages = "xx-1"')[0].split("; ")[1],
        (
            "8: rule \"tables\": when.not.client: 'ä' fits nothing: 'ä' is in no name "
            "(A-Z a-z 0-9 _ -, and * ? [ ] in patterns)"
        ),
        '10: rule "tables": when.length.words.least: unknown; did you mean at_least?',
        "14: rule \"inline\": route: Input should be 'balanced', 'best', 'cheapest' or 'fastest'",
        '17: rule "inline": when[1].regex: is no regular expression of RE2: missing ): (',
    ]


def test_rules_written_as_one_list_have_no_lines_but_names() -> None:
    assert mistakes('rule = [{ name = "r", route = "quick" }]') == [
        " rule \"r\": route: Input should be 'balanced', 'best', 'cheapest' or 'fastest'"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[rule]\n", ["1: no TOML: Expected ']]' at the end of an array declaration"]),
        ('a = "\n\n', ["1: no TOML: Illegal character '\\n'"]),
        ("a = " + "[" * 100_000, [" no TOML: nested too deeply"]),
        ("[[rules]]\nname = 'r'", ["1: rules: unknown; did you mean rule?"]),
        ("rule = 5", [" rule 1: write tables, each under [[rule]]"]),
        ("[rule]\nname = 'r'\nroute = 'best'", []),
        (
            "languages = ['german']",
            ["1: languages: 'german' is no language code; did you mean 'de'?"],
        ),
        ("languages = []", ["1: languages: is empty: remove it, or fill it"]),
        ("[[rule]]\nroute = 'best'", ["1: rule 1: name: is missing"]),
        (
            "[[rule]]\nname = 'r'",
            [
                (
                    '1: rule "r": does nothing: say require, forbid, prefer,'
                    " min_confidence, route, policy or stop"
                )
            ],
        ),
        (
            "[[rule]]\nname = 'a b'\nstop = true",
            ['2: rule "a b": name: is no identifier: 1 to 64 of A-Z a-z 0-9 _ -'],
        ),
        ("", []),
        ("# nothing\n", []),
    ],
)
def test_files_that_are_no_rules(text: str, expected: list[str]) -> None:
    assert mistakes(text) == expected


def test_names_are_unique() -> None:
    assert mistakes(RULE + "[[rule]]\nname = 'only'\nwhen.client = 'a'\nroute = 'fastest'") == [
        '5: rule "only": name: another rule has this name (line 1)'
    ]


def test_every_mistake_is_said_at_once_in_one_error() -> None:
    text = "langages = 'de'\n" + HEAD + "when.client = 'ä'\nstop = 1\n" + HEAD
    with pytest.raises(ConfigurationError) as caught:
        RuleBook.parse(text, "house.toml")
    lines = caught.value.message.split("\n")
    assert [line.split(": ")[0] for line in lines] == [
        f"house.toml:{line}" for line in (1, 5, 6, 8)
    ]


def test_the_number_of_rules_keywords_and_expressions_is_bounded() -> None:
    rule = '[[rule]]\nname = "r{}"\nwhen = {{ {} }}\nroute = "best"\n'
    many = "".join(rule.format(n, f'client = "c{n}"') for n in range(MOST_RULES + 1))
    assert mistakes(many) == [f" {MOST_RULES + 1} rules, at most {MOST_RULES}"]
    words = [f"w{n}" for n in range(LISTED)]
    rules = MOST_KEYWORDS // LISTED
    full = "".join(rule.format(n, f'client = "c{n}", keywords = {words}') for n in range(rules))
    assert mistakes(full) == []
    over = full + rule.format("x", 'client = "x", keywords = "one-more"')
    assert mistakes(over) == [
        f" {MOST_KEYWORDS + 1} keywords in all rules, at most {MOST_KEYWORDS}"
    ]
    assert "at most 1000 items" in mistakes(rule.format(0, f"keywords = {[*words, 'x']}"))[0]
    patterns = [f"a{n}" for n in range(MOST_EXPRESSIONS + 1)]
    assert mistakes(rule.format(0, f"regex = {patterns}")) == [
        f" {MOST_EXPRESSIONS + 1} regular expressions in all rules, at most {MOST_EXPRESSIONS}"
    ]
