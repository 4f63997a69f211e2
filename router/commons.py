"""What the tasks of one router have in common: patience, memory, and how often more is tried.

Pure: no clock of its own, no I/O.
"""

from dataclasses import dataclass, field
from typing import Final

from router.patience import ReportPatience
from router.settings import RouterSettings

_RETRIES_SAVED_S: Final = 10
"""A budget saves up what this many seconds give it, and as much again from tasks."""


class Room:
    """What something may take for all tasks of a router together: drafts, or shown chunks.

    Args:
        limit_bytes: Most bytes.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0

    def swap(self, before: int, after: int) -> bool:
        """Give up some bytes for others; tell whether there is room, else nothing has changed."""
        if after > before and self.held_bytes - before + after > self._limit_bytes:
            return False
        self.held_bytes += after - before
        return True


class Budget:
    """How often something may be done beside the tasks themselves: a share of them, and a minimum.

    A token bucket. In an outage everything is tried again, which would double the load of what is
    left; a share of the tasks does not (the retry budget of Finagle, and of the SRE book, chapter
    "Handling overload").

    Args:
        share: Times for each task, 0 to 1.
        least_per_s: Times a second, whatever the tasks.
        saved: Most times saved up.
    """

    def __init__(self, *, share: float, least_per_s: float = 0.0, saved: float = 100.0) -> None:
        self._share = share
        self._least_per_ms = least_per_s / 1000
        self._saved = saved
        self._left = min(saved, least_per_s * _RETRIES_SAVED_S)
        self._at: int | None = None
        self.taken = 0
        self.refused = 0

    def earn(self) -> None:
        """Count a task."""
        self._left = min(self._saved, self._left + self._share)

    def take(self, now: int) -> bool:
        """Do it once, if it may be done.

        Args:
            now: UTC milliseconds.
        """
        passed_ms = max(0, now - (now if self._at is None else self._at))
        self._left = min(self._saved, self._left + passed_ms * self._least_per_ms)
        self._at = now
        if self._left < 1:
            self.refused += 1
            return False
        self._left -= 1
        self.taken += 1
        return True


@dataclass(slots=True)
class Line:
    """The connection to the broker.

    Attributes:
        up: Whether it is there: without it no answer can come.
    """

    up: bool = True


@dataclass(frozen=True, slots=True)
class Commons:
    """What the machines of one router share.

    Attributes:
        patience: How long a node may leave an invocation unanswered.
        drafts: What answers may take that are held back.
        shown: What chunks may take that were shown.
        retries: How often a task may be given to another node after one that had begun with it.
        hedges: How often a second node may be asked beside one that takes long.
        line: The connection to the broker.
    """

    patience: ReportPatience
    drafts: Room
    shown: Room
    retries: Budget
    hedges: Budget
    line: Line = field(default_factory=Line)

    @classmethod
    def of(cls, settings: RouterSettings) -> "Commons":
        """Return those of a router with these settings."""
        return cls(
            patience=ReportPatience(base_ms=settings.report_timeout_ms),
            drafts=Room(settings.draft_bytes),
            shown=Room(settings.all_shown_bytes),
            retries=Budget(share=settings.retry_share, least_per_s=settings.retries_per_s),
            hedges=Budget(share=settings.hedge_share),
        )
