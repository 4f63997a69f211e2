"""How long a node may leave an invocation unanswered, learnt from how long answers take.

A second on top of the smoothed round trip and four times its deviation, as TCP sets its
retransmission timer (RFC 6298 section 2): in a burst all answers come late, the router's own
queues included, and taking work from nodes that have it would only add to the burst. A round trip
that timed out doubles the wait (section 5.5); the next answer ends that.
"""

from typing import Final

_ALPHA: Final = 1 / 8
_BETA: Final = 1 / 4
_DEVIATIONS: Final = 4
_MOST_MS: Final = 15_000
_MOST_DOUBLINGS: Final = 4


class ReportPatience:
    """Smoothed time between an invocation and the first sign of its node.

    Args:
        base_ms: Patience on top of the round trip, milliseconds.
    """

    def __init__(self, *, base_ms: int) -> None:
        self._base_ms = base_ms
        self._smoothed_ms = 0.0
        self._deviation_ms = 0.0
        self._doublings = 0

    @property
    def timeout_ms(self) -> int:
        """How long to wait now, milliseconds; at most 15 s, but never below the base."""
        round_trip_ms = self._smoothed_ms + _DEVIATIONS * self._deviation_ms
        wait_ms = (self._base_ms + round_trip_ms) * 2**self._doublings
        return max(self._base_ms, int(min(_MOST_MS, wait_ms)))

    def answered(self, after_ms: float) -> None:
        """Learn from an answer.

        Args:
            after_ms: Time since the invocation, milliseconds.
        """
        error_ms = abs(after_ms - self._smoothed_ms)
        self._deviation_ms += _BETA * (error_ms - self._deviation_ms)
        self._smoothed_ms += _ALPHA * (after_ms - self._smoothed_ms)
        self._doublings = 0

    def missed(self) -> None:
        """Learn that an answer did not come in time."""
        self._doublings = min(_MOST_DOUBLINGS, self._doublings + 1)
