"""One task as a ledger knows it, and what nodes report of it."""

from typing import Any

from capability_schemas.invocation import Report
from router.entry import Entry
from router.events import Reported


def journaled(node: str | None, *, deadline: int = 10_000, **known: Any) -> Entry:
    """Return an entry of a task that a node has, or nobody."""
    return Entry(
        client="c",
        task_id="t",
        task=b"{}",
        reply="foam/v1/local/reply/c/t",
        accepted_at=0,
        deadline=deadline,
        node=node,
        function=None if node is None else "f",
        version=None if node is None else "1.0.0",
        **known,
    )


def report(status: Any, node: str = "a", attempt: int = 1, **fields: Any) -> Reported:
    """Return the event of a node's report on that task."""
    return Reported(
        Report(task="t", client="c", attempt=attempt, node=node, status=status, **fields)
    )
