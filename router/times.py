"""When something is due in the life of one task. Pure."""

from dataclasses import dataclass


@dataclass(slots=True)
class Times:
    """What a task waits for, UTC milliseconds each; None: not for that.

    Attributes:
        closing: The node's grace after a cancellation is over.
        report: An invocation is unanswered, or an announcement has not come back.
        finish: A final event that was reported has not come.
        settle: A restored task has listened long enough.
        quiet: A node that had begun has said nothing for too long.
        hedge: A second node may be asked.
        look: It is time to look again for somebody who goes on.
    """

    closing: int | None = None
    report: int | None = None
    finish: int | None = None
    settle: int | None = None
    quiet: int | None = None
    hedge: int | None = None
    look: int | None = None

    def stop(self) -> None:
        """Wait for nothing of a node any more."""
        self.report = self.finish = self.quiet = self.hedge = self.look = None

    def earliest(self, *, closing: bool, ends_at: int) -> int | None:
        """Return what is due first.

        Args:
            closing: Whether the task is being ended: then it waits for nothing else.
            ends_at: When its time is over.
        """
        times = [self.closing, self.report, self.finish, self.settle]
        if not closing and self.settle is None:
            times += [ends_at, self.quiet, self.hedge, self.look]
        return min((time for time in times if time is not None), default=None)


def is_due(time: int | None, now: int) -> bool:
    """Tell whether a time has come."""
    return time is not None and now >= time
