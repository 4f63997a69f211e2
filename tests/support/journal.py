"""Tasks as a ledger knows them."""

from typing import Any

from router.entry import Entry


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
