"""Circuit breakers: who does not answer is left alone, and tried again."""

from router.breaker import Breakers
from router.settings import BreakerSettings

SETTINGS = BreakerSettings(losses=3, pause_ms=100, longest_pause_ms=350, probe_ms=50, limit=5)


def opened(at: int = 0) -> Breakers:
    breakers = Breakers(SETTINGS)
    for _ in range(3):
        breakers.learn("a", "echo", False, at)
    return breakers


def is_blocked(breakers: Breakers, now: int, node: str = "a", function: str = "echo") -> bool:
    return breakers.blocked(node, function, now) is not None


def test_it_opens_after_losses_in_a_row_and_says_so() -> None:
    breakers = Breakers(SETTINGS)
    for _ in range(2):
        breakers.learn("a", "echo", False, 0)
        assert not is_blocked(breakers, 0)
    breakers.learn("a", "echo", False, 0)
    assert breakers.blocked("a", "echo", 40) == (
        "3 invocations in a row were lost, next try in 60 ms"
    )


def test_an_answer_in_between_ends_the_row() -> None:
    breakers = Breakers(SETTINGS)
    for ok in (False, False, True, False, False):
        breakers.learn("a", "echo", ok, 0)
    assert not is_blocked(breakers, 0)


def test_it_is_for_one_function_on_one_node() -> None:
    breakers = opened()
    assert not is_blocked(breakers, 0, node="b")
    assert not is_blocked(breakers, 0, function="other")


def test_when_the_pause_is_over_one_probe_is_let_through_at_a_time() -> None:
    breakers = opened()
    assert is_blocked(breakers, 99)
    assert not is_blocked(breakers, 100)
    breakers.sent("a", "echo", 100)
    assert breakers.blocked("a", "echo", 120) == (
        "3 invocations in a row were lost, one is being tried"
    )
    assert not is_blocked(breakers, 150), "a probe that nobody answers must not block for ever"


def test_looking_does_not_take_the_probe() -> None:
    breakers = opened()
    for _ in range(3):
        assert not is_blocked(breakers, 100)


def test_a_lost_probe_doubles_the_pause_up_to_the_longest() -> None:
    breakers, now = opened(), 0
    for pause_ms in (100, 200, 350, 350):
        assert is_blocked(breakers, now + pause_ms - 1)
        now += pause_ms
        assert not is_blocked(breakers, now)
        breakers.sent("a", "echo", now)
        breakers.learn("a", "echo", False, now)


def test_an_answered_probe_closes_it() -> None:
    breakers = opened()
    breakers.sent("a", "echo", 100)
    breakers.learn("a", "echo", True, 110)
    assert not is_blocked(breakers, 110)
    assert len(breakers) == 0
    breakers.learn("a", "echo", False, 111)
    assert not is_blocked(breakers, 111), "the row begins anew"


def test_what_was_sent_before_it_opened_does_not_lengthen_the_pause() -> None:
    breakers = opened()
    for _ in range(50):
        breakers.learn("a", "echo", False, 10)
    assert not is_blocked(breakers, 100)


def test_sending_to_a_closed_one_changes_nothing() -> None:
    breakers = Breakers(SETTINGS)
    breakers.sent("a", "echo", 0)
    breakers.learn("a", "echo", False, 0)
    breakers.sent("a", "echo", 0)
    assert not is_blocked(breakers, 0)


def test_they_are_bounded() -> None:
    breakers = Breakers(SETTINGS)
    for place in range(20):
        for _ in range(3):
            breakers.learn(f"n{place}", "echo", False, 0)
    assert len(breakers) == 5
    assert is_blocked(breakers, 0, node="n19")
    assert not is_blocked(breakers, 0, node="n0")


def test_the_open_ones_are_described() -> None:
    breakers = opened()
    breakers.learn("b", "echo", False, 0)
    assert breakers.describe(30) == [
        {"node": "a", "function": "echo", "lost": 3, "pause_ms": 100, "open_for_ms": 70}
    ]


def test_a_clock_that_is_set_back_keeps_nothing_shut() -> None:
    breakers = opened(at=3_600_000)
    assert is_blocked(breakers, 3_600_050)
    assert not is_blocked(breakers, 50)
