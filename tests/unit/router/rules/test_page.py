"""The user's page (docs/rules.md) names what there is, and its examples are right."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from capability_schemas.task import Task
from router.rules import RuleBook
from router.rules.language import NAMES
from router.rules.model import (
    LISTED,
    LOOKED_AT,
    MOST_EXPRESSIONS,
    MOST_KEYWORDS,
    MOST_RULES,
    Condition,
    InputSignal,
    KeywordSignal,
    LengthSignal,
    Narrowing,
    Rule,
    Span,
    Target,
)

PAGE = (Path(__file__).resolve().parents[4] / "docs" / "rules.md").read_text("utf-8")
EXAMPLE = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1]  # type: ignore[index]  # it is there


def section(title: str) -> str:
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, f"no section {title}"
    return found[1]


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("A rule", Rule),
        ("Signals: `when`", Condition),
        ("`keywords`", KeywordSignal),
        ("`length`", LengthSignal),
        ("Ranges", Span),
        ("`input`", InputSignal),
        ("Targets: `require`, `forbid`, `prefer`", Target),
        ("`policy`", Narrowing),
    ],
)
def test_each_table_has_a_row_for_every_field(title: str, model: type[BaseModel]) -> None:
    rows = re.findall(r"^\| `(\w+)` \|", section(title), re.MULTILINE)
    assert rows == [field.alias or name for name, field in model.model_fields.items()]


def test_limits_are_those_in_force() -> None:
    assert (
        f"At most {MOST_RULES:,} rules, {MOST_KEYWORDS:,} keywords and {MOST_EXPRESSIONS} regular "
        f"expressions; {LISTED:,} values in a list."
    ) in section("The file")
    assert f"the first {LOOKED_AT:,} characters" in section("`language`")
    assert f"among {len(NAMES)} languages" in section("`language`")


def test_the_example_is_a_rules_file_that_does_what_its_comments_say() -> None:
    book = RuleBook.parse(EXAMPLE)
    names = [rule["name"] for rule in tomllib.loads(EXAMPLE)["rule"]]
    assert [rule["name"] for rule in book.describe()] == names

    def matched(client: str = "press-1", **task: object) -> tuple[str, ...]:
        return book.apply(client, Task.model_validate({"text": "hello", **task})).matched

    assert matched(policy={"data": "private"}) == ("private-stays-here",)
    assert matched("bench-2", text="an oil spill") == ("benches",)
    assert matched(text="Verdacht auf Ölleckage am Getriebe der Presse") == ("leaks", "german")
    assert matched("archive-1") == ("bulk",)
    assert matched("archive-1", skills=["urgent"]) == ()
    assert matched(text="word " * 300, priority=4) == ("bulk",)
    assert matched(input={"sensor": {"celsius": 97.5}}) == ("overheated",)


def test_the_message_shown_is_the_one_given() -> None:
    shown = re.search(r"```text\nrules\.toml:6: (.*)\n```", PAGE)
    assert shown is not None
    text = '[[rule]]\nname = "german"\nroute = "best"\n\n[rule.when]\nlanguage = "germn"'
    with pytest.raises(Exception, match=re.escape(f"rules.toml:6: {shown[1]}")):
        RuleBook.parse(text)
