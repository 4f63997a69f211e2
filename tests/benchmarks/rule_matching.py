"""What routing rules cost a task, and their file a reload."""

import time
from collections.abc import Callable
from typing import Any

from capability_schemas.task import Task
from router.rules import RuleBook

SIGNALS = {
    "keywords": 'keywords = ["leak{n}", "hot bearing {n}"]',
    "clients": 'client = "press-{n}"',
    "client patterns": 'client = "hall{n}-*"',
    "expressions": "regex = 'E{n}-[0-9]+'",
    "lengths": "length.words.at_least = {n}00",
}
SERIES = (("all kinds", 100), ("all kinds", 1_000), *((kind, 200) for kind in SIGNALS))
"""What the rules ask for, and how many there are."""

TEXT = "pump 3 in hall 2 reports 14 mm/s and the bearing is hot, how bad is it?"
LONG_CHARACTERS = 16_384


def rules(kind: str, count: int) -> str:
    asked = list(SIGNALS.values()) if kind == "all kinds" else [SIGNALS[kind]]
    return "".join(
        f'[[rule]]\nname = "r{n}"\nprefer.node = "n{n}"\n'
        f"when = {{ {asked[n % len(asked)].format(n=n + 1)} }}\n"
        for n in range(count)
    )


def microseconds(once: Callable[[], object], times: int) -> float:
    """Return the least mean time of several rounds: what others run on the machine is noise."""
    best = float("inf")
    for _ in range(100):
        start = time.perf_counter()
        for _ in range(times):
            once()
        best = min(best, (time.perf_counter() - start) / times)
    return round(best * 1e6, 1)


def measure() -> list[dict[str, Any]]:
    """Measure every kind of rules, and one rule on the language."""
    short = Task(text=TEXT)
    long = Task(text=(TEXT + " ") * (LONG_CHARACTERS // len(TEXT) + 1))
    rows = []
    texts = [(kind, count, rules(kind, count)) for kind, count in SERIES]
    language = '[[rule]]\nname = "r"\nroute = "best"\nwhen.language = "de"\n'
    for kind, count, text in [*texts, ("language", 1, language)]:
        RuleBook.parse(text)  # loads what only the first book needs
        start = time.perf_counter()
        book = RuleBook.parse(text)
        rows.append(
            {
                "rules ask for": kind,
                "rules": count,
                "read ms": round((time.perf_counter() - start) * 1e3, 1),
                f"text of {len(TEXT)} us": microseconds(lambda: book.apply("dev", short), 20),  # noqa: B023  # called at once
                f"text of {LONG_CHARACTERS} us": microseconds(lambda: book.apply("dev", long), 2),  # noqa: B023  # called at once
            }
        )
    return rows
