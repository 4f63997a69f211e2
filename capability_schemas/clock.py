"""A wall clock that does not jump under what is running.

Deadlines, leases and the time an order was sent are instants that several processes compare, so
they are told by the wall clock; and a wall clock may be set, by an hour or by thirty years, while
a task runs. A process that followed at once would end its tasks, call its neighbours dead and have
its orders refused. So it counts on by a clock that nobody sets, and takes a step over only when
the new time has lasted.
"""

import time
from collections.abc import Callable
from typing import Final

STEP_MS: Final = 1_000
"""What differs by less is drift, and followed: NTP slews offsets below 128 ms and steps the others
(RFC 5905 section 11.3)."""

HOLD_MS: Final = 10 * 60_000
"""How long a new time has to last: longer than what is under way usually takes, and than orders
count (`capability_schemas.passport.CLOCK_SKEW_MS`)."""

_BOOT_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


def boot_ms() -> int:
    """Return milliseconds since the machine started, its suspensions included where that is known.

    A machine that was suspended was away: that is no step of its clock (``clock_gettime(2)``).
    """
    if _BOOT_CLOCK is not None:
        return time.clock_gettime_ns(_BOOT_CLOCK) // 1_000_000
    return time.monotonic_ns() // 1_000_000


class SteadyClock:
    """UTC milliseconds that follow the wall clock but for its steps.

    May be asked from any thread: what two of them work out at once is the same.

    Args:
        wall: The wall clock, UTC milliseconds.
        steady: A clock that nobody sets, milliseconds.
        hold_ms: How long a step has to last before it is taken over.
    """

    def __init__(
        self,
        *,
        wall: Callable[[], int],
        steady: Callable[[], int] = boot_ms,
        hold_ms: int = HOLD_MS,
    ) -> None:
        self._wall = wall
        self._steady = steady
        self._hold_ms = hold_ms
        self._offset_ms = wall() - steady()
        self._step: tuple[int, int] | None = None  # the new offset, and since when it is told

    def __call__(self) -> int:
        """Return the time."""
        steady = self._steady()
        told_ms, known_ms = self._wall() - steady, self._offset_ms
        step = self._step
        if abs(told_ms - known_ms) < STEP_MS:
            self._step = None
            self._offset_ms = told_ms
        elif step is None or abs(told_ms - step[0]) >= STEP_MS:
            self._step = told_ms, steady
        elif steady - step[1] >= self._hold_ms:
            self._step = None
            self._offset_ms = told_ms
        return steady + self._offset_ms
