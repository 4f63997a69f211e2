"""Forecasts of run times."""

from typing import Any

import pytest

from node_agent.admission.forecast import Forecast, Work, work_of
from node_agent.runtimes.base import Request

INFO = {"prefill_token_ms": 2.0, "token_ms": 10.0}


def work(size=100, **fields):
    return Work(input_bytes=size, **fields)


def run_ms(forecast: Forecast, now: int, **more: Any) -> float:
    """Return the prediction, which has to be one."""
    predicted = forecast.predict("f", work(), now=now, **more).run_ms
    assert predicted is not None
    return predicted


def test_what_never_ran_is_unknown():
    found = Forecast().predict("f", work(), now=0)
    assert (found.run_ms, found.least_ms, found.sure) == (None, 0.0, False)


def test_the_calibration_of_an_instance_gives_a_first_idea_that_refuses_little():
    found = Forecast().predict("f", work(400, max_tokens=5), info=INFO, now=0)
    assert found.run_ms == pytest.approx(100 * 2 + 5 * 10)
    assert found.least_ms == pytest.approx(100)
    assert not found.sure


def test_a_calibration_that_no_run_has_confirmed_refuses_nothing_for_long():
    forecast = Forecast()
    assert forecast.predict("f", work(400), info=INFO, now=0).least_ms > 0
    later = forecast.predict("f", work(400, max_tokens=5), info=INFO, now=60_001)
    assert later.run_ms == pytest.approx(250)
    assert (later.least_ms, later.sure) == (0.0, False)


def test_steady_runs_are_predicted_as_they_were():
    forecast = Forecast()
    for at in range(5):
        forecast.learn("f", work(), run_ms=200, now=at)
    found = forecast.predict("f", work(), now=10)
    assert found.run_ms == pytest.approx(200)
    assert found.least_ms == pytest.approx(200)
    assert found.sure


def test_run_times_that_grow_with_the_input_are_predicted_by_its_size():
    forecast = Forecast()
    for at, size in enumerate((100, 1000, 400, 2000, 700, 1500, 300, 1200)):
        forecast.learn("f", work(size), run_ms=20 + size / 2, now=at)
    assert forecast.predict("f", work(600), now=10).run_ms == pytest.approx(320, rel=0.05)
    assert forecast.predict("f", work(1800), now=10).run_ms == pytest.approx(920, rel=0.05)


def test_token_functions_are_predicted_from_tokens_and_the_cap_on_them():
    forecast = Forecast()
    for at in range(30):
        size = (400, 2400, 4000)[at % 3]
        tokens = size // 4
        forecast.learn(
            "f",
            work(size),
            run_ms=15 + 2 * tokens + 10 * 50,
            usage={"input_tokens": tokens + 20, "cached_tokens": 20, "output_tokens": 50},
            timing={"prefill_ms": 2.0 * tokens, "decode_ms": 500.0},
            now=at,
        )
    predict = forecast.predict
    assert predict("f", work(2400), now=40).run_ms == pytest.approx(1715, rel=0.02)
    assert predict("f", work(2400, max_tokens=10), now=40).run_ms == pytest.approx(1315, rel=0.02)


def test_tasks_of_one_kind_are_predicted_by_their_like():
    forecast = Forecast()
    kinds = {100: 500.0, 150: 20.0, 210: 240.0}
    for at in range(24):
        size = list(kinds)[at % 3] + at % 4
        forecast.learn("f", work(size), run_ms=kinds[size - at % 4], now=at)
    for size, run_ms in kinds.items():
        assert forecast.predict("f", work(size), now=30).run_ms == pytest.approx(run_ms, rel=0.05)


def test_the_least_goes_by_the_quickest_of_the_last_runs():
    forecast = Forecast()
    for at, run_ms in enumerate([100, 200, 60, 100, 150, 90]):
        forecast.learn("f", work(), run_ms=run_ms, now=at)
    found = forecast.predict("f", work(), now=10)
    assert found.run_ms is not None
    assert 0 < found.least_ms <= found.run_ms * 0.7


def test_one_outlier_does_not_take_over():
    forecast = Forecast()
    for at in range(10):
        forecast.learn("f", work(), run_ms=100, now=at)
    forecast.learn("f", work(), run_ms=100_000, now=11)
    found = forecast.predict("f", work(), now=12)
    assert found.run_ms is not None
    assert found.run_ms < 200


def test_two_runs_are_no_ground_to_refuse_a_third():
    forecast = Forecast()
    for at in range(3):
        found = forecast.predict("f", work(), now=at)
        assert (found.least_ms, found.sure) == (0.0, False)
        forecast.learn("f", work(), run_ms=5000, now=at)
    assert forecast.predict("f", work(), now=3).sure


def test_an_old_forecast_refuses_nothing():
    forecast = Forecast()
    forecast.learn("f", work(), run_ms=100, now=0)
    found = forecast.predict("f", work(), now=60_001)
    assert found.run_ms == 100
    assert (found.least_ms, found.sure) == (0.0, False)


def test_a_forgotten_function_is_unknown():
    forecast = Forecast()
    forecast.learn("f", work(), run_ms=100, now=0)
    forecast.forget("f")
    assert forecast.predict("f", work(), now=1).run_ms is None


def test_the_median_error_is_relative_and_over_the_last_predictions():
    forecast = Forecast()
    assert forecast.median_error is None
    for predicted in (100, 110, 150):
        forecast.judge(predicted_ms=predicted, actual_ms=100)
    assert forecast.median_error == pytest.approx(0.1)
    assert forecast.judged == 3


def test_the_work_of_a_call_is_what_it_reads_and_may_write():
    plain = work_of(Request(id="1", input={"text": "abcd"}, text="abcd"))
    assert plain.input_bytes == len('{"text":"abcd","input":{"text":"abcd"}}')
    assert plain.max_tokens is None
    messages = [{"role": "user", "content": "x" * 1000}]
    options = {"messages": messages, "max_tokens": 7}
    chat = work_of(Request(id="1", input={}, text=None, options=options))
    assert chat.input_bytes > 1000
    assert chat.max_tokens == 7


def cut(forecast, ran_ms, times, start=0):
    for at in range(start, start + times):
        predicted_ms = forecast.predict("f", work(), info=INFO, now=at).run_ms
        forecast.learn_cut("f", work(), ran_ms=ran_ms, predicted_ms=predicted_ms, now=at)


def test_a_function_that_was_only_ever_cut_takes_longer_than_that():
    forecast = Forecast()
    cut(forecast, 1000, times=3)
    found = forecast.predict("f", work(), now=3)
    assert found.run_ms == pytest.approx(1500)
    assert found.sure


def test_a_cut_that_was_to_be_expected_changes_nothing():
    forecast = Forecast()
    for at in range(10):
        forecast.learn("f", work(), run_ms=900, now=at)
    cut(forecast, 50, times=20, start=10)
    assert forecast.predict("f", work(), now=30).run_ms == pytest.approx(900)
    cut(forecast, 50, times=1, start=59_000)
    assert not forecast.predict("f", work(), now=61_000).sure  # nor does it keep it fresh


def test_repeated_cuts_raise_what_whole_runs_had_shown_but_one_does_not_take_over():
    forecast = Forecast()
    for at in range(10):
        forecast.learn("f", work(), run_ms=100, now=at)
    cut(forecast, 2000, times=1, start=10)
    assert run_ms(forecast, now=11) < 400
    cut(forecast, 2000, times=20, start=11)
    assert run_ms(forecast, now=31) >= 2000


def test_a_cut_run_makes_the_guess_by_tokens_count_for_less():
    """Its figures say nothing of one that never came to its end, however often."""
    forecast = Forecast()
    usage = {"input_tokens": 10, "output_tokens": 10}
    timing = {"prefill_ms": 10.0, "decode_ms": 90.0}
    for at in range(10):
        forecast.learn("f", work(), run_ms=100, now=at, usage=usage, timing=timing)
    cut(forecast, 2000, times=30, start=10)
    assert run_ms(forecast, now=40) >= 2000


def test_a_cut_below_the_calibration_leaves_that():
    forecast = Forecast()
    idea = run_ms(forecast, now=0, info=INFO)
    cut(forecast, idea / 4, times=3)
    assert forecast.predict("f", work(), info=INFO, now=3).run_ms == pytest.approx(idea)
