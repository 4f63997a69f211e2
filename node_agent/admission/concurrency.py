"""How many runs at a time are worth it, from measured run times. Pure.

Throughput at ``k`` runs at a time is ``k / run_ms(k)`` (Little, Operations Research 1961). Where
``k`` at a time get no more done than fewer would, the fewer each end sooner. As conditions
change, a lowered limit is tried one higher from time to time.
"""

import math
import statistics
from collections import deque
from typing import Final

_WINDOW: Final = 32
_LEAST_RUNS: Final = 8
"""Runs a level needs before it counts."""

_GAIN: Final = 1.1
"""Throughput by which a higher level must beat a lower one."""

_PROBE_MS: Final = 60_000
"""How long a lowered limit holds before the next higher one is measured again."""


class ConcurrencyEstimator:
    """The sensible number of runs at a time of one kind of work.

    Args:
        most: The largest number allowed, at least 1.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = most
        self._lowered_at: int | None = None
        self._runs: dict[int, deque[float]] = {}

    @property
    def limit(self) -> int:
        """How many at a time, 1 to ``most``."""
        return self._limit

    @property
    def measured(self) -> bool:
        """Whether anything has been measured at more than one at a time."""
        return any(level > 1 and len(runs) >= _LEAST_RUNS for level, runs in self._runs.items())

    def ended(self, *, level: int, run_ms: float, now: int) -> None:
        """Take in a run.

        Args:
            level: How many ran meanwhile, itself included.
            run_ms: How long it took, milliseconds.
            now: UTC milliseconds.
        """
        self._runs.setdefault(level, deque(maxlen=_WINDOW)).append(max(run_ms, 1.0))
        if self._lowered_at is not None and now - self._lowered_at >= _PROBE_MS:
            self._limit = min(self._most, self._limit + 1)
            self._runs.pop(self._limit, None)  # measure it afresh
            self._lowered_at = now if self._limit < self._most else None
            return
        better = self._better()
        if better is not None:
            self._limit = better
            self._lowered_at = now

    def _better(self) -> int | None:
        """Return the lowest level that gets as much done as the limit; None: there is none."""
        if self._limit == 1 or len(self._runs.get(self._limit, ())) < _LEAST_RUNS:
            return None
        mean, error = _mean_of(self._runs[self._limit])
        at_best = self._limit / max(mean - error, 1e-9)
        for level in range(1, self._limit):
            runs = self._runs.get(level, ())
            if len(runs) < _LEAST_RUNS:
                continue
            mean, error = _mean_of(runs)
            # Only where it shows above the noise: by one standard error on each side.
            if at_best < _GAIN * level / (mean + error):
                return level
        return None


def _mean_of(runs: "deque[float] | tuple[()]") -> tuple[float, float]:
    """Return mean and standard error."""
    return statistics.fmean(runs), statistics.stdev(runs) / math.sqrt(len(runs))
