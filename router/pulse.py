"""When somebody who sends heartbeats counts as gone: sooner on a good line than on a bad one. Pure.

A sender names the longest time between two of its heartbeats. What counts here is how much later
than that they arrive: after Jacobson ("Congestion avoidance and control", SIGCOMM 1988) a smoothed
mean and deviation of the lateness, and patience for the mean and four deviations on top of the
heartbeats that may be missed. (An accrual detector, Hayashibara et al. 2004, fits a distribution to
the intervals themselves; here heartbeats also come early, whenever something has changed.)
"""

from dataclasses import dataclass
from typing import Final

_GAIN: Final = 1 / 8
_DEVIATIONS: Final = 4.0
_MOST: Final = 4.0
"""Longest patience, in units of the shortest."""


@dataclass(slots=True)
class Pulse:
    """The heartbeats of one sender.

    Attributes:
        interval_s: Longest time between two heartbeats, as the sender says, seconds.
        missed: So many missed in a row, on a line that is never late, mean that it is gone.
        seen_at: When it was last heard of, UTC milliseconds; 0: never.
        late_ms: Smoothed lateness.
        deviation_ms: Its smoothed mean deviation.
    """

    interval_s: float = 5.0
    missed: int = 3
    seen_at: int = 0
    late_ms: float = 0.0
    deviation_ms: float = 0.0

    @property
    def patience_ms(self) -> float:
        """Silence that says nothing yet, milliseconds."""
        least = 1000 * self.interval_s * self.missed
        margin = self.late_ms + _DEVIATIONS * self.deviation_ms
        return min(least + margin, _MOST * least)

    def beat(self, now: int, *, interval_s: float | None = None) -> None:
        """Take a heartbeat.

        Args:
            now: Time of receipt, UTC milliseconds.
            interval_s: What the sender says of its interval now; None leaves it.
        """
        if self.seen_at and now >= self.seen_at:
            late = max(0.0, now - self.seen_at - 1000 * self.interval_s)
            late = min(late, self.patience_ms)  # it was away: no property of the line
            self.deviation_ms += _GAIN * (abs(late - self.late_ms) - self.deviation_ms)
            self.late_ms += _GAIN * (late - self.late_ms)
        self.seen_at = now
        if interval_s is not None:
            self.interval_s = interval_s

    def restart(self, now: int) -> None:
        """Count silence from now on: it was the listener who heard nobody."""
        self.seen_at = now

    def is_overdue(self, now: int) -> bool:
        """Tell whether the sender has been silent for longer than it may."""
        return now - self.seen_at > self.patience_ms
