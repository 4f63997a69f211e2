"""Routing rules: what an operator wants of certain tasks, before nodes are compared.

A rules file holds rules in order. Each says when it applies (signals: keywords, expressions,
language, length, client, skill, class of data …) and what it does (require, forbid or prefer
capabilities, demand confidence, set the preference, narrow the policy). Every rule that applies
counts, in the order of the file, until one says ``stop``. The idea of deciding by cheap signals
and declared rules before any search is that of vLLM Semantic Router (arXiv 2603.04444).

::

    book = RuleBook.parse(text, "rules.toml")     # ConfigurationError names every mistake
    effect = book.apply(client, task)             # microseconds, pure
    effect.refusal(record), effect.bonus(record)  # asked by the selection for each candidate

`RuleFile` keeps the book of a file and takes up its edits; ``docs/rules.md`` is the user's page.
"""

from router.rules.book import RuleBook
from router.rules.effect import NO_RULES, RuleEffect
from router.rules.file import RuleFile

__all__ = ["NO_RULES", "RuleBook", "RuleEffect", "RuleFile"]
