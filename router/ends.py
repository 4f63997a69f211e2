"""How routers tell each other of ends: the event ``outcome``, which `router.peers` reads."""

from typing import Final

from broker.events import EventSource
from router.replies import Outcome

__all__ = ["OUTCOME", "tell_end"]

OUTCOME: Final = "outcome"
"""Kind of the event by which a router tells others how a task ended."""

_TOLD_BYTES: Final = 256 * 1024
"""Longest final event that is told; a longer one is not known to those who did not see it."""


def tell_end(events: EventSource, outcome: Outcome) -> None:
    """Tell the other routers how a task ended; not where the final event is too long.

    Args:
        events: Those of this router.
        outcome: How it ended.
    """
    if len(outcome.terminal) > _TOLD_BYTES:
        return
    client, task = outcome.key
    fields = {
        "client": client,
        "task": task,
        "reply": outcome.reply,
        "seq": outcome.seq,
        "attempt": outcome.attempt,
        "code": outcome.code,
        "at": outcome.ended_at,
        "terminal": outcome.terminal.decode(),
    }
    events.emit(OUTCOME, fields)
