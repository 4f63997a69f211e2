import pytest

from registry.calibration import (
    DEFAULT_HALF,
    HIGHEST,
    IN_SCOPE_KEPT,
    LOWEST,
    Calibration,
    HeldOut,
    fit,
    fit_half,
    fit_threshold,
    prior,
)
from registry.encoders import OnnxEncoder
from registry.search import CapabilitySearch
from support.capabilities import make_record
from support.encoders import exported_folder
from support.plant_fleet import FUNCTIONS, IN_SCOPE, OUT_OF_SCOPE


def threshold(exampled: float, *background: float) -> float:
    return prior(exampled, background).threshold


def test_the_prior_rises_with_examples() -> None:
    assert LOWEST < threshold(0.0) < threshold(0.5) < threshold(1.0) < HIGHEST


def test_the_prior_rises_with_what_any_request_scores() -> None:
    plant, mall = [0.02] * 50, [0.5] * 50
    assert threshold(0.0, *plant) < threshold(0.0) < threshold(0.0, *mall)
    assert threshold(1.0, *[1.0] * 9) == HIGHEST


def test_without_examples_the_prior_stands() -> None:
    assert fit_threshold([], 0.3) == 0.3
    assert fit([], [], 0.0, half=0.4) == Calibration(threshold(0.0), 0.4)


def test_few_examples_move_it_little_and_many_decide() -> None:
    assert 0.30 < fit_threshold([0.5] * 5, 0.30) < 0.31
    assert fit_threshold([0.5] * 10_000, 0.30) == pytest.approx(0.5, abs=0.003)


def test_examples_that_score_low_bring_it_down_sooner_than_others_raise_it() -> None:
    low, high = fit_threshold([0.2] * 20, 0.3), fit_threshold([0.4] * 20, 0.3)
    assert 0.3 - low > 3 * (high - 0.3) > 0.0


def test_one_odd_example_does_not_undo_it() -> None:
    assert fit_threshold([0.0], 0.3) > 0.25


def test_it_keeps_what_it_says_of_many_examples() -> None:
    tops = [0.30 + 0.1 * at / 10_000 for at in range(10_000)]
    fitted = fit_threshold(tops, 0.30)
    kept = sum(top >= fitted for top in tops) / len(tops)
    assert kept == pytest.approx(IN_SCOPE_KEPT, abs=0.01)


def test_it_stays_in_its_range() -> None:
    assert fit_threshold([0.99] * 10_000, 0.37) == HIGHEST
    assert fit_threshold([0.0] * 10_000, 0.37) == LOWEST


def test_half_is_the_median_of_what_says_something() -> None:
    assert fit_half([0.0, 0.4, 0.5, 0.6]) == pytest.approx(0.5)
    assert fit_half([]) == fit_half([0.0]) == DEFAULT_HALF
    assert fit_half([9.0]) == 1.0


@pytest.mark.encoder
@pytest.mark.parametrize(("size", "examples"), [(10, 4), (10, 2), (10, 0), (4, 4), (4, 0)])
def test_a_small_fleet_serves_paraphrases_and_refuses_strangers(size: int, examples: int) -> None:
    encoder = OnnxEncoder(exported_folder())
    search = CapabilitySearch(space=encoder.space)
    for function in FUNCTIONS[:size]:
        said = function._replace(examples=function.examples[:examples])._asdict()
        search.upsert(make_record(encoder, "edge-1", said.pop("name"), **said))
    texts = search.calibration_texts()
    search.calibrate(dict(zip(texts, encoder.encode(texts), strict=True)))

    def taken(text: str) -> bool:
        (vector,) = encoder.encode([text])
        return search.search(text, vector, 1)[0].score >= search.threshold

    served = {function.name for function in FUNCTIONS[:size]}
    kept = [taken(text) for text, name in IN_SCOPE if name in served]
    assert sum(kept) / len(kept) >= 0.88
    assert sum(map(taken, OUT_OF_SCOPE)) / len(OUT_OF_SCOPE) <= 0.2


class TestProbability:
    def test_it_grows_with_score_and_margin(self) -> None:
        fitted = prior(1.0)
        chances = [fitted.probability(score, 0.1) for score in (0.0, 0.3, 0.6, 1.0)]
        assert chances == sorted(chances)
        assert fitted.probability(0.5, 0.01) < 0.5 < fitted.probability(0.5, 0.3)

    def test_it_stays_a_probability(self) -> None:
        for score in (-1e9, 0.0, 1e9):
            for margin in (-1e9, 0.0, 1e9):
                assert 0.0 <= prior(0.0).probability(score, margin) <= 1.0

    def test_a_fleet_whose_examples_are_mixed_up_is_less_sure(self) -> None:
        clear = [HeldOut(0.6, 0.05, right=True)] * 60
        muddled = [HeldOut(0.6, 0.05, right=at % 2 == 0) for at in range(60)]
        sure = fit(clear, [], 1.0, half=0.5).probability(0.6, 0.05)
        unsure = fit(muddled, [], 1.0, half=0.5).probability(0.6, 0.05)
        assert unsure == pytest.approx(0.5, abs=0.1)
        assert sure > 0.8

    def test_a_few_held_out_examples_say_little(self) -> None:
        without = fit([], [], 1.0, half=0.5)
        one = fit([HeldOut(0.6, 0.05, right=False)], [], 1.0, half=0.5)
        assert one.bias == pytest.approx(without.bias, abs=0.25)
