"""Answers that the router holds: of a second node that was asked beside a slow one, and drafts.

Pure: no clock of its own, no I/O.
"""

from typing import Final

from capability_schemas.invocation import Report
from router import events as ev
from router.commons import Commons
from router.events import Action, Draft, Learn, Verdict
from router.turns import Turn, Turns
from router.verdicts import verdict_on_failure

_NO_ANSWER: Final = frozenset({"admitted", "finished", "running", "unknown"})


def lesson(turn: Turn | None, verdict: Verdict | None, now: int) -> list[Action]:
    """Say how an attempt went; nothing for one of an earlier process."""
    if turn is None or turn.choice is None or verdict is None:
        return []
    return [Learn(turn.choice, verdict, now - turn.since)]


class Keep:
    """What one task holds back, within what all of them may.

    Args:
        commons: What the tasks of a router share.
    """

    def __init__(self, commons: Commons) -> None:
        self._room = commons.drafts
        self._bytes = 0

    def keep(self, draft: Draft | None) -> Draft | None:
        """Keep a draft in place of the last one; return it if there is room for it."""
        size = 0 if draft is None else len(draft.output)
        if not self._room.swap(self._bytes, size):
            return None
        self._bytes = size
        return draft


class Rivalry:
    """A second node beside the one that holds the task (a hedge); its answer is held back.

    Only for functions that are declared idempotent, and only as long as nothing was shown.

    Args:
        turns: The attempts of the task.
        commons: What the tasks of a router share.
        keep: Where the answer is kept.
    """

    def __init__(self, turns: Turns, commons: Commons, keep: Keep) -> None:
        self._turns = turns
        self._commons = commons
        self._keep = keep

    @property
    def worth(self) -> bool:
        """Whether there is somebody to ask."""
        return self._turns.second() is not None

    def begin(self, now: int) -> list[Action]:
        """Ask a second node, if there is one and not too much is asked twice."""
        second = self._turns.second()
        if second is None or self._turns.rival is not None or not self._commons.hedges.take(now):
            return []
        turn = self._turns.hedge(second, now)
        return [ev.Invoke(second, turn.attempt, 0, hold=True, announced=True)]

    def owns(self, node: str, attempt: int | None) -> bool:
        """Tell whether a node's word on an attempt is that of the second node."""
        rival = self._turns.rival
        return rival is not None and rival.is_of(node, attempt)

    def hear(self, report: Report, now: int) -> list[Action]:
        """Take the word of the second node. With an answer the first one is asked to give up."""
        rival, holder = self._turns.rival, self._turns.current
        if rival is None or rival.choice is None or report.status in _NO_ANSWER:
            return []
        if report.status == "held" and holder is not None:
            rival.draft = self._keep.keep(Draft.of(rival.choice, report))
        if rival.draft is None or holder is None:
            self._turns.rival = None
            return lesson(rival, verdict_on_failure(report, stopped=False), now)
        return [
            *lesson(rival, "good", now),
            ev.CancelNode(holder.node, holder.attempt, "overtaken"),
        ]

    @property
    def answered(self) -> bool:
        """Whether the second node has answered."""
        return self._turns.rival is not None and self._turns.rival.draft is not None

    def gone(self, node: str, now: int) -> list[Action]:
        """Take the loss of a node: an answer that is here already stays."""
        rival = self._turns.rival
        if rival is None or rival.node != node or rival.draft is not None:
            return []
        self._turns.rival = None
        return lesson(rival, "lost", now)

    def uninvoked(self, attempt: int | None) -> bool:
        """Take it that an invocation could not be sent; tell whether it was the second one."""
        rival = self._turns.rival
        if rival is None or attempt != rival.attempt:
            return False
        self._turns.rival = None
        return True

    def drop(self) -> list[Action]:
        """Want its answer no more."""
        rival, self._turns.rival = self._turns.rival, None
        self._keep.keep(None)
        if rival is None:
            return []
        return [ev.CancelNode(rival.node, rival.attempt, "superseded")]
