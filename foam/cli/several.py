"""What several routers answered, as one answer: each has tasks of its own."""

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["summed_stats", "told_best", "waiting_of_all"]

Answers = Mapping[str, Mapping[str, Any]]
"""Answers by router, one at least."""

_COMMON: Final = ("nodes", "asleep", "functions", "uptime_ms", "threshold")
"""What routers have in common: it is not summed up; the largest counts."""

_OWN: Final = ("router", "ledger", "route_ms")
"""What makes no sense in a sum; it stands with each router."""

_SHOWN: Final = 50


def summed_stats(answers: Answers) -> dict[str, Any]:
    """Sum the counters of routers up; those of each stand under ``routers``.

    Args:
        answers: What each answered to ``stats``. A single one is given back as it is.
    """
    if len(answers) == 1:
        return dict(next(iter(answers.values())))
    total: dict[str, Any] = {}
    for answer in answers.values():
        for name, value in answer.items():
            if name in _COMMON:
                total[name] = max(value, total.get(name, value))
            elif isinstance(value, Mapping) and name not in _OWN:
                total[name] = _add(total.get(name, {}), value)
            elif name not in _OWN:
                total[name] = total.get(name, 0) + value
    return {**total, "routers": dict(answers)}


def waiting_of_all(answers: Answers) -> dict[str, Any]:
    """Put the waiting rooms of routers together.

    Args:
        answers: What each answered to ``waiting``.

    Returns:
        As of one router: its rows by function, most tasks first; the longest 50.
    """
    rows: dict[str, dict[str, Any]] = {}
    for answer in answers.values():
        for row in answer["functions"]:
            seen = rows.setdefault(row["function"], {"function": row["function"]})
            seen["longest_ms"] = max(row["longest_ms"], seen.get("longest_ms", 0))
            for name in ("waiting", "leave_per_s"):
                seen[name] = seen.get(name, 0) + row[name]
            for name in ("priorities", "clients"):
                seen[name] = _add(seen.get(name, {}), row[name])
    counted = ("waiting", "limit", "bytes", "limit_bytes")
    listed = sorted(rows.values(), key=lambda row: (-row["waiting"], row["function"]))
    sums = {name: sum(answer[name] for answer in answers.values()) for name in counted}
    return {**sums, "functions": listed[:_SHOWN]}


def told_best(answers: Answers) -> dict[str, Any]:
    """Choose the router that had a task: the others know of it by hearsay, or from before.

    Args:
        answers: What each that knows the task told of it.
    """

    def worth(answer: Mapping[str, Any]) -> tuple[int, bool, bool]:
        known = answer.get("node") is not None or answer.get("explanation") is not None
        # Attempts count up over take-overs, so the latest word has the highest.
        return answer.get("attempt") or 0, answer.get("phase") == "ended", known

    router, best = max(answers.items(), key=lambda pair: worth(pair[1]))
    return {**best, "router": router}


def _add(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in (*one, *other)}
