"""The estimator of a sensible concurrency."""

from node_agent.admission.concurrency import ConcurrencyEstimator


def feed(estimator, level, run_ms, *, runs=10, now=0):
    for number in range(runs):
        estimator.ended(level=level, run_ms=run_ms + number % 2, now=now)


def test_what_gains_nothing_is_lowered():
    estimator = ConcurrencyEstimator(2)
    feed(estimator, 1, 100)
    assert estimator.limit == 2
    assert not estimator.measured
    feed(estimator, 2, 200)
    assert estimator.limit == 1
    assert estimator.measured


def test_what_gains_stays():
    estimator = ConcurrencyEstimator(4)
    for level, run_ms in ((1, 100), (2, 110), (4, 150)):
        feed(estimator, level, run_ms)
    assert estimator.limit == 4


def test_the_lowest_level_that_does_as_much_is_taken():
    estimator = ConcurrencyEstimator(4)
    for level, run_ms in ((1, 100), (2, 110), (4, 215)):
        feed(estimator, level, run_ms)
    assert estimator.limit == 2


def test_too_few_runs_or_too_much_noise_lower_nothing():
    estimator = ConcurrencyEstimator(2)
    feed(estimator, 1, 100)
    feed(estimator, 2, 200, runs=5)
    assert estimator.limit == 2
    noisy = ConcurrencyEstimator(2)
    for number in range(16):
        noisy.ended(level=1, run_ms=50 if number % 2 else 150, now=0)
        noisy.ended(level=2, run_ms=20 if number % 2 else 340, now=0)
    assert noisy.limit == 2


def test_a_lowered_limit_is_tried_again_after_a_while():
    estimator = ConcurrencyEstimator(2)
    feed(estimator, 1, 100)
    feed(estimator, 2, 200)
    feed(estimator, 1, 100, now=59_000)
    assert estimator.limit == 1
    estimator.ended(level=1, run_ms=100, now=60_000)
    assert estimator.limit == 2
    feed(estimator, 2, 105, now=61_000)
    assert estimator.limit == 2
