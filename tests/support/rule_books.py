"""Rules for tests: books from a few lines, and records that targets are held against."""

from typing import Any

from capability_schemas.capability import CatalogRecord
from capability_schemas.task import Task
from router.rules import RuleBook, RuleEffect
from router.rules.reading import read_rules
from support.capabilities import make_claim

RULE = '[[rule]]\nname = "only"\nroute = "best"\n'


def applied(toml: str, client: str = "device-1", /, **task: Any) -> RuleEffect:
    """Apply rules to a task; one that says nothing else says ``hello``."""
    fields = task if "function" in task or "text" in task else {"text": "hello", **task}
    return RuleBook.parse(toml).apply(client, Task.model_validate(fields))


def fits(when: str, client: str = "device-1", /, **task: Any) -> bool:
    """Tell whether a rule with this ``when`` (the fields of the table) applies to a task."""
    return applied(f"{RULE}[rule.when]\n{when}\n", client, **task).matched == ("only",)


def mistakes(text: str) -> list[str]:
    """Return all that is wrong with rules, without the name of the file."""
    return [str(problem).removeprefix("rules:") for problem in read_rules(text, "rules").problems]


def record(node: str = "edge-1", function: str = "echo", **more: Any) -> CatalogRecord:
    """Return an admitted record without vectors."""
    fields = make_claim(node, function, **more).model_dump()
    return CatalogRecord(**fields, registry="registry-1", admitted_at=1, claim_digest="sha256:0")
