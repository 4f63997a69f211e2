"""When silence means that somebody is gone."""

from hypothesis import given
from hypothesis import strategies as st

from router.pulse import Pulse


def beaten(gaps_ms: list[int]) -> tuple[Pulse, int]:
    pulse, now = Pulse(interval_s=1.0, missed=3), 1_000
    pulse.beat(now)
    for gap in gaps_ms:
        now += gap
        pulse.beat(now)
    return pulse, now


def test_on_a_good_line_so_many_heartbeats_may_be_missed() -> None:
    pulse, now = beaten([1_000] * 20)
    assert not pulse.is_overdue(now + 3_000)
    assert pulse.is_overdue(now + 3_001)


def test_heartbeats_that_come_early_make_nobody_impatient() -> None:
    pulse, now = beaten([20] * 500)
    assert not pulse.is_overdue(now + 3_000)


def test_on_a_line_that_is_often_late_patience_grows_and_shrinks_again() -> None:
    pulse, now = beaten([1_000, 3_500] * 20)
    assert not pulse.is_overdue(now + 6_000)
    for _ in range(100):
        now += 1_000
        pulse.beat(now)
    assert pulse.is_overdue(now + 3_100)


@given(st.lists(st.integers(0, 10**9), max_size=50))
def test_patience_is_bounded(gaps: list[int]) -> None:
    pulse, _ = beaten(gaps)
    assert 3_000 <= pulse.patience_ms <= 12_000


def test_a_sender_names_another_interval_at_any_time() -> None:
    pulse, now = beaten([1_000])
    pulse.beat(now + 1_000, interval_s=10.0)
    assert not pulse.is_overdue(now + 30_000)


def test_silence_while_the_listener_was_away_does_not_count() -> None:
    pulse, now = beaten([1_000])
    pulse.restart(now + 60_000)
    assert not pulse.is_overdue(now + 62_000)
