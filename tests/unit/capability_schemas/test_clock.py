"""A clock that is set under what is running."""

import pytest

from capability_schemas.clock import HOLD_MS, STEP_MS, SteadyClock, boot_ms
from capability_schemas.ids import now_ms, wall_ms

HOUR_MS = 3_600_000
START = 1_700_000_000_000


class Times:
    """A wall clock that somebody sets, and one that nobody sets."""

    def __init__(self) -> None:
        self.steady = 5_000
        self.set_by = 0
        self.clock = SteadyClock(wall=self.wall, steady=lambda: self.steady)

    def wall(self) -> int:
        return START + self.steady + self.set_by

    def true(self) -> int:
        return START + self.steady

    def pass_(self, ms: int) -> int:
        """Let time pass, in steps as a process looks at its clock."""
        for _ in range(10):
            self.steady += ms // 10
            self.clock()
        return self.clock()


@pytest.mark.parametrize("step_ms", [HOUR_MS, -HOUR_MS, 10**12], ids=["ahead", "back", "far"])
def test_a_step_is_taken_over_when_it_has_lasted(step_ms: int) -> None:
    times = Times()
    assert times.clock() == times.true()
    times.set_by = step_ms
    assert times.pass_(HOLD_MS // 2) == times.true()
    assert times.pass_(HOLD_MS) == times.true() + step_ms
    assert times.pass_(HOUR_MS) == times.true() + step_ms


def test_a_step_that_is_put_right_leaves_no_trace() -> None:
    times = Times()
    times.set_by = HOUR_MS
    times.pass_(HOLD_MS // 2)
    times.set_by = 0
    assert times.pass_(10) == times.true()
    times.set_by = HOUR_MS
    assert times.pass_(HOLD_MS // 2) == times.true()


def test_a_second_step_starts_the_wait_anew() -> None:
    times = Times()
    times.set_by = HOUR_MS
    times.pass_(HOLD_MS // 2)
    times.set_by = 2 * HOUR_MS
    assert times.pass_(HOLD_MS * 3 // 4) == times.true()
    assert times.pass_(HOLD_MS) == times.true() + 2 * HOUR_MS


def test_drift_is_followed_at_once() -> None:
    times = Times()
    for _ in range(100):
        times.set_by += STEP_MS // 2
        assert times.clock() == times.wall()


def test_the_clock_of_the_mesh_tells_the_time() -> None:
    assert abs(now_ms() - wall_ms()) < STEP_MS
    assert boot_ms() > 0
