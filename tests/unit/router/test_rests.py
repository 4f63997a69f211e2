"""Places that turn out to be of no use are left alone, for ever longer."""

from router.rests import LEAST_REST_MS, MOST_REST_MS, Rests

PLACE, OTHER = ("a", "f"), ("b", "f")


def test_a_place_is_left_alone_as_long_as_its_node_asks_within_bounds() -> None:
    rests = Rests()
    assert rests.rest(PLACE, 0) == LEAST_REST_MS
    assert rests.rest(OTHER, 0, wanted_ms=10**9) == MOST_REST_MS
    assert rests.is_resting(PLACE, LEAST_REST_MS - 1)
    assert not rests.is_resting(PLACE, LEAST_REST_MS)
    assert rests.is_resting(OTHER, MOST_REST_MS - 1)


def test_the_pauses_double_while_it_goes_on_refusing() -> None:
    rests, now, pauses = Rests(), 0, []
    for _ in range(8):
        pauses.append(rests.rest(PLACE, now))
        now += pauses[-1] + 10
    assert pauses == [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]


def test_refusals_of_what_was_given_to_it_at_a_time_are_one() -> None:
    rests = Rests()
    assert [rests.rest(PLACE, now) for now in range(5)] == [LEAST_REST_MS] * 5


def test_a_place_that_takes_something_or_was_long_left_alone_begins_anew() -> None:
    rests = Rests()
    for now in (0, 200, 500):
        rests.rest(PLACE, now)
    rests.serve(PLACE)
    assert not rests.is_resting(PLACE, 501)
    assert rests.rest(PLACE, 600) == LEAST_REST_MS
    assert rests.rest(PLACE, 700) == 2 * LEAST_REST_MS
    assert rests.rest(PLACE, 701 + 2 * LEAST_REST_MS + MOST_REST_MS) == LEAST_REST_MS


def test_a_clock_that_is_set_back_ends_a_pause() -> None:
    rests = Rests()
    rests.rest(PLACE, 1_000_000)
    assert not rests.is_resting(PLACE, 0)
    rests.tidy(0)
    assert len(rests) == 0


def test_places_that_are_gone_are_forgotten_and_keep_no_others_from_resting() -> None:
    rests = Rests(most=3)
    for number in range(10):
        rests.rest((f"gone-{number}", "f"), 0)
    assert len(rests) == 3
    rests.rest(PLACE, 50)
    assert rests.is_resting(PLACE, 60)
    rests.tidy(2 * MOST_REST_MS + 20)
    assert len(rests) == 1
    rests.tidy(10 * MOST_REST_MS)
    assert len(rests) == 0
