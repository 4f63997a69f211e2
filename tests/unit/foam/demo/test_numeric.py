import numpy as np
import pytest

from foam.demo.numeric import anomaly_score, band_energy, trend_forecast, vibration_spectrum
from foam.demo.record import RATE_HZ, SHAFT_HZ, bearing_frequencies, waveform

BEARING = bearing_frequencies(SHAFT_HZ, balls=9, ball_mm=7.94, pitch_mm=39.04)


def sine(hz, *, amplitude=1.0, seconds=1.0, rate_hz=4096.0):
    times = np.arange(int(seconds * rate_hz)) / rate_hz
    return [float(x) for x in amplitude * np.sin(2 * np.pi * hz * times)]


def test_velocity_of_a_pure_tone_is_acceleration_over_angular_frequency():
    answer = vibration_spectrum(sine(100.0, amplitude=2.0), rate_hz=4096.0, unit="m/s2")
    expected = 2.0 / np.sqrt(2) / (2 * np.pi * 100.0) * 1000
    assert answer["velocity_rms"] == pytest.approx(expected, rel=0.02)
    assert answer["peaks"][0]["hz"] == pytest.approx(100.0, abs=0.2)
    assert answer["acceleration_rms"] == pytest.approx(2.0 / np.sqrt(2), rel=0.01)


@pytest.mark.parametrize(("mm_s", "zone"), [(1.0, "A"), (2.0, "B"), (4.0, "C"), (9.0, "D")])
def test_zone_follows_the_velocity(mm_s, zone):
    samples, _ = waveform(np.random.default_rng(1), shaft_mm_s=mm_s)
    assert vibration_spectrum(samples, rate_hz=RATE_HZ, shaft_hz=SHAFT_HZ)["zone"] == zone


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("race", ["outer_race", "inner_race", "ball"])
def test_knocks_are_named_after_their_race(seed, race):
    rng = np.random.default_rng(seed)
    samples, _ = waveform(rng, shaft_mm_s=2.0, knock_hz=BEARING[race], knock_g=0.6)
    answer = vibration_spectrum(samples, rate_hz=RATE_HZ, shaft_hz=SHAFT_HZ, bearing=BEARING)
    assert answer["finding"] == f"bearing_{race}"
    assert answer["defect_hz"] == pytest.approx(BEARING[race], abs=1.5)


@pytest.mark.parametrize("seed", range(20))
def test_sound_machine_has_no_finding(seed):
    samples, _ = waveform(np.random.default_rng(seed), shaft_mm_s=1.0)
    answer = vibration_spectrum(samples, rate_hz=RATE_HZ, shaft_hz=SHAFT_HZ, bearing=BEARING)
    assert answer["finding"] == "normal"


def test_imbalance_is_a_dominant_line_at_shaft_speed():
    samples, planted = waveform(np.random.default_rng(3), shaft_mm_s=8.0)
    answer = vibration_spectrum(samples, rate_hz=RATE_HZ, shaft_hz=SHAFT_HZ, bearing=BEARING)
    assert answer["finding"] == "imbalance"
    assert answer["velocity_rms"] == pytest.approx(planted["velocity_rms"], rel=0.05)


def test_a_strong_line_away_from_the_shaft_is_no_imbalance():
    samples = sine(100.0, amplitude=8.0, rate_hz=RATE_HZ)
    answer = vibration_spectrum(samples, rate_hz=RATE_HZ, shaft_hz=SHAFT_HZ, unit="m/s2")
    assert answer["zone"] == "D"
    assert answer["finding"] == "normal"


def test_band_energy_adds_up_to_the_whole():
    rng = np.random.default_rng(4)
    samples = [float(x) for x in rng.normal(0, 1.0, 8192)]
    low = band_energy(samples, 8192.0, 0.0, 2000.0, unit="m/s2")
    high = band_energy(samples, 8192.0, 2004.0, 4096.0, unit="m/s2")
    assert low["share"] + high["share"] == pytest.approx(1.0, abs=0.01)
    assert low["rms"] ** 2 + high["rms"] ** 2 == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("low_hz", "high_hz"), [(200, 100), (-1, 100), (100, 5000)])
def test_impossible_band_is_refused(low_hz, high_hz):
    with pytest.raises(ValueError, match="must lie between"):
        band_energy(sine(50), 4096.0, low_hz, high_hz)


@pytest.mark.parametrize(
    ("samples", "unit", "message"),
    [
        ([0.0] * 10, "g", "256"),
        ([0.0] * 300, "mm", "unit"),
        ([float("nan")] * 300, "g", "finite"),
    ],
)
def test_unusable_recording_is_refused(samples, unit, message):
    with pytest.raises(ValueError, match=message):
        vibration_spectrum(samples, rate_hz=1000.0, unit=unit)


def test_anomaly_names_channel_and_direction():
    rng = np.random.default_rng(5)
    flow, current = rng.normal(100, 1, 200), rng.normal(20, 0.3, 200)
    flow[-10:] -= 30
    answer = anomaly_score({"flow": flow.tolist(), "current": current.tolist()})
    assert (answer["anomalous"], answer["channel"], answer["direction"]) == (True, "flow", "low")
    assert answer["expected"] == pytest.approx(100, abs=0.5)


def test_broken_correlation_is_an_anomaly_though_each_channel_is_usual():
    rng = np.random.default_rng(6)
    load = rng.normal(0, 1, 400)
    power, heat = 50 + 5 * load, 60 + 3 * load + rng.normal(0, 0.1, 400)
    power[-10:], heat[-10:] = 60.0, 54.0  # two sigma each, in opposite directions
    answer = anomaly_score({"power": power.tolist(), "heat": heat.tolist()})
    assert max(abs(z) for z in answer["deviations"].values()) < 4
    assert answer["distance"] > 4
    assert answer["anomalous"] is True


def test_outliers_in_the_past_do_not_hide_an_anomaly():
    rng = np.random.default_rng(7)
    values = rng.normal(10, 0.1, 200)
    values[20:40] = 500.0
    values[-10:] = 12.0
    assert anomaly_score({"level": values.tolist()})["anomalous"] is True


def test_quiet_machine_is_no_anomaly_and_constant_channels_are_allowed():
    rng = np.random.default_rng(8)
    answer = anomaly_score({"a": rng.normal(5, 1, 300).tolist(), "b": [3.0] * 300})
    assert answer["anomalous"] is False


def test_unequal_channels_are_refused():
    with pytest.raises(ValueError, match="equally long"):
        anomaly_score({"a": [1.0] * 100, "b": [1.0] * 99})


def test_forecast_finds_slope_and_time_to_the_limit_despite_outliers():
    rng = np.random.default_rng(9)
    values = 20 + 0.01 * np.arange(200) + rng.normal(0, 0.05, 200)
    values[50:60] += 40
    answer = trend_forecast(values.tolist(), step_s=60, horizon_s=3600, limit=25.0)
    assert answer["direction"] == "rising"
    assert answer["slope_per_hour"] == pytest.approx(0.6, rel=0.05)
    assert answer["seconds_to_limit"] == pytest.approx((25 - 21.99) / 0.6 * 3600, rel=0.06)
    assert answer["earliest_s"] <= answer["seconds_to_limit"] <= answer["latest_s"]
    assert answer["forecast_low"] < answer["forecast"] < answer["forecast_high"]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_steady_and_reaches_no_limit(seed):
    values = np.random.default_rng(seed).normal(50, 1, 120).tolist()
    answer = trend_forecast(values, step_s=60, horizon_s=3600, limit=80.0)
    assert answer["direction"] == "steady"
    assert answer["seconds_to_limit"] is None


def test_constant_readings_are_steady():
    assert trend_forecast([4.0] * 50, step_s=1, horizon_s=10)["direction"] == "steady"


def test_limit_behind_is_not_reached():
    values = [float(x) for x in range(50)]
    answer = trend_forecast(values, step_s=1, horizon_s=10, limit=10.0)
    assert answer["direction"] == "rising"
    assert answer["seconds_to_limit"] is None


def test_short_series_is_refused():
    with pytest.raises(ValueError, match="at least 10"):
        trend_forecast([1.0] * 5, step_s=1, horizon_s=1)
