import pytest

from registry.calibration import (
    DEFAULT_HALF,
    HIGHEST,
    LOWEST,
    PRIOR_BARE,
    PRIOR_WITH_EXAMPLES,
    fit_half,
    fit_threshold,
    prior_threshold,
)


def test_prior_rises_with_examples() -> None:
    assert prior_threshold([0, 0]) == PRIOR_BARE
    assert prior_threshold([3, 8]) == pytest.approx(PRIOR_WITH_EXAMPLES)
    assert PRIOR_BARE < prior_threshold([0, 3]) < PRIOR_WITH_EXAMPLES
    assert prior_threshold([]) == PRIOR_WITH_EXAMPLES


def test_without_examples_the_prior_stands() -> None:
    assert fit_threshold([], 0.3) == 0.3


def test_few_examples_move_it_little_and_many_decide() -> None:
    few = fit_threshold([0.3] * 5, 0.37)
    many = fit_threshold([0.3] * 5_000, 0.37)
    assert 0.36 < few < 0.37
    assert many == pytest.approx(0.3, abs=0.002)


def test_it_keeps_ninety_five_of_a_hundred() -> None:
    tops = [0.30 + 0.1 * at / 10_000 for at in range(10_000)]
    threshold = fit_threshold(tops, 0.30)
    assert sum(top >= threshold for top in tops) / len(tops) == pytest.approx(0.95, abs=0.01)


def test_it_stays_in_its_range() -> None:
    assert fit_threshold([0.99] * 10_000, 0.37) == HIGHEST
    assert fit_threshold([0.0] * 10_000, 0.37) == LOWEST


def test_half_is_the_median_of_what_says_something() -> None:
    assert fit_half([0.0, 0.4, 0.5, 0.6]) == pytest.approx(0.5)
    assert fit_half([]) == fit_half([0.0]) == DEFAULT_HALF
    assert fit_half([9.0]) == 1.0
