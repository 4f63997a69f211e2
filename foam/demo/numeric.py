"""Numeric functions of the demo plant: vibration, anomaly and trend, on real arrays.

They run on the node ``edge-numeric`` in child processes, take arrays from the task's ``input`` and
answer with plain JSON. Every answer says how it came about (thresholds, reference frequencies), so
that an operator can check it against the machine's own data.
"""

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import signal, stats

from node_agent.functions import function

__all__ = ["anomaly_score", "band_energy", "trend_forecast", "vibration_spectrum"]

Array = npt.NDArray[np.float64]

STANDARD_GRAVITY: Final = 9.80665
"""Metres per second squared in one g (CGPM 1901)."""

VELOCITY_BAND_HZ: Final = (10.0, 1000.0)
"""Band of the broad-band vibration velocity (ISO 20816-1, the usual range for machines above 600
rpm)."""

ZONE_LIMITS_MM_S: Final = (1.4, 2.8, 4.5)
"""Zone boundaries A/B, B/C, C/D, r.m.s. mm/s: medium machines (15 to 300 kW) on rigid supports, the
values of ISO 10816-3 table A.2 that ISO 20816-3 carries on. Guidance, not a certified
evaluation."""

ENVELOPE_SNR: Final = 6.0
"""A line of the envelope spectrum counts when it stands this many times above the median line."""

MIN_SAMPLES: Final = 256
MIN_VALUES: Final = 10
SIGNIFICANCE: Final = 0.01
"""Chance of a false trend, by Kendall's tau."""

MAD_TO_SIGMA: Final = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation (1 / 0.6745)."""


@function(
    description="Analyse a vibration recording (accelerometer samples): spectrum, overall "
    "velocity, bearing damage or imbalance.",
    examples=[
        "Is the bearing of this machine damaged? Here are the accelerometer samples",
        "Run a spectrum analysis on this vibration recording",
        "Which fault do you see in the vibration signal of the drive end?",
        "Why does the machine shake? The samples of its vibration are attached",
        "Envelope analysis of an acceleration waveform",
    ],
    skills=["numeric", "vibration"],
    warm=True,
)
def vibration_spectrum(
    samples: list[float],
    rate_hz: float,
    shaft_hz: float | None = None,
    bearing: dict[str, float] | None = None,
    unit: str = "g",
) -> dict[str, Any]:
    """Analyse one vibration recording: overall velocity, spectrum lines, bearing lines, a finding.

    Power spectral density by Welch's method (Hann window, half overlap, mean removed); velocity by
    dividing the acceleration density by (2 pi f)^2; bearing lines in the spectrum of the envelope
    of the resonance band, where the repeated knocks of a damaged race show (Randall and Antoni,
    "Rolling element bearing diagnostics: a tutorial", MSSP 25, 2011).

    Args:
        samples: Acceleration, at least 256 samples.
        rate_hz: Sampling rate, above 0.
        shaft_hz: Shaft speed in revolutions a second; the imbalance test needs it.
        bearing: Name to characteristic frequency in Hz, for example ``{"outer_race": 87.3}``.
        unit: ``g`` or ``m/s2``.

    Returns:
        ``finding`` (``normal``, ``imbalance``, ``bearing_<name>``), ``defect_hz``, ``velocity_rms``
        (mm/s), ``zone``, ``acceleration_rms`` (m/s2), ``kurtosis``, ``peaks`` (Hz and mm/s),
        ``bearing_lines``, ``explanation``.

    Raises:
        ValueError: Too few samples, a value that is not finite, or an unknown unit.
    """
    wave = _wave(samples, rate_hz, unit)
    frequencies, density = _density(wave, rate_hz)
    velocity = _velocity_density(frequencies, density)
    step_hz = float(frequencies[1] - frequencies[0])
    inside = _band(frequencies, *VELOCITY_BAND_HZ)
    velocity_rms = float(np.sqrt(np.sum(velocity[inside]) * step_hz))
    lines = _bearing_lines(wave, rate_hz, bearing or {})
    once_rms = 0.0
    if shaft_hz is not None:
        near = np.abs(frequencies - shaft_hz) <= 2.0 * step_hz
        once_rms = float(np.sqrt(np.sum(velocity[near & inside]) * step_hz))
    finding, defect_hz, explanation = _finding(velocity_rms, once_rms, shaft_hz, lines)
    return {
        "finding": finding,
        "defect_hz": defect_hz,
        "velocity_rms": round(velocity_rms, 3),
        "zone": _zone(velocity_rms),
        "acceleration_rms": round(float(np.std(wave)), 3),
        "kurtosis": round(float(stats.kurtosis(wave, fisher=False)), 2),
        "peaks": _peaks(frequencies, velocity, inside, step_hz),
        "bearing_lines": lines,
        "explanation": explanation,
    }


@function(
    description="Measure the vibration energy of samples inside one frequency band, from a low "
    "to a high frequency in Hz.",
    examples=[
        "How much energy is in the band between 500 and 1500 Hz?",
        "Band energy of these samples from 2 to 4 kHz",
        "What share of the vibration lies above 1000 Hz?",
        "Give me the r.m.s. of the high frequency band",
    ],
    skills=["numeric", "vibration"],
    warm=True,
)
def band_energy(
    samples: list[float], rate_hz: float, low_hz: float, high_hz: float, unit: str = "g"
) -> dict[str, float]:
    """Measure how much of a vibration lies in a frequency band.

    Args:
        samples: Acceleration, at least 256 samples.
        rate_hz: Sampling rate.
        low_hz: Lower edge, at least 0.
        high_hz: Upper edge, above ``low_hz`` and at most half the sampling rate.
        unit: ``g`` or ``m/s2``.

    Returns:
        ``rms`` of the band in m/s2, its ``share`` of the whole energy from 0 to 1, ``peak_hz``, the
        strongest frequency of the band, and ``low_hz``, ``high_hz``.

    Raises:
        ValueError: The recording or the band is unusable.
    """
    if not 0 <= low_hz < high_hz <= rate_hz / 2:
        raise ValueError(f"band {low_hz}..{high_hz} Hz must lie between 0 and {rate_hz / 2} Hz")
    frequencies, density = _density(_wave(samples, rate_hz, unit), rate_hz)
    step_hz = float(frequencies[1] - frequencies[0])
    inside = _band(frequencies, low_hz, high_hz)
    if not inside.any():
        raise ValueError(
            f"band {low_hz}..{high_hz} Hz is narrower than a spectral line ({step_hz} Hz)"
        )
    energy = float(np.sum(density[inside]) * step_hz)
    whole = float(np.sum(density) * step_hz)
    strongest = frequencies[inside][int(np.argmax(density[inside]))]
    return {
        "rms": round(math.sqrt(energy), 4),
        "share": round(energy / whole, 4) if whole > 0 else 0.0,
        "peak_hz": round(float(strongest), 2),
        "low_hz": low_hz,
        "high_hz": high_hz,
    }


@function(
    description="Score how unusual the latest sensor readings of a machine are compared with its "
    "own past: anomaly detection over several channels.",
    examples=[
        "Are these readings unusual?",
        "Detect anomalies in the last measurements of the chiller",
        "Does the machine behave differently from normal?",
        "Anomaly score for my sensor channels",
        "Which channel deviates most from its usual range?",
    ],
    skills=["numeric", "anomaly"],
    warm=True,
)
def anomaly_score(
    channels: dict[str, list[float]], recent: int = 10, threshold: float = 4.0
) -> dict[str, Any]:
    """Score how far the latest readings of a machine lie from its own past.

    Each channel is put on a robust scale (median and median absolute deviation of the past); the
    score is the larger of the greatest single deviation and the Mahalanobis distance per channel of
    the recent medians, with the past's correlation shrunk by a tenth towards none. Robust scales
    after Rousseeuw and Croux, "Alternatives to the median absolute deviation", JASA 88, 1993.

    Args:
        channels: Name to readings in order of time, equally long, at least ``recent`` + 20.
        recent: How many of the last readings are judged, at least 1.
        threshold: Score from which the state counts as anomalous.

    Returns:
        ``score``, ``anomalous``, ``channel`` (the one that deviates most), ``direction`` (``high``
        or ``low``), ``expected``, ``observed``, ``deviations`` (robust z of every channel),
        ``distance`` and ``explanation``.

    Raises:
        ValueError: Channels of unequal length, too few readings, or values that are not finite.
    """
    names = sorted(channels)
    lengths = {len(channels[name]) for name in names}
    if len(lengths) != 1 or recent < 1 or min(lengths) < recent + 20:
        raise ValueError(f"channels must be equally long, with at least {recent + 20} readings")
    table = _finite(np.array([channels[name] for name in names], dtype=np.float64))
    past, latest = table[:, :-recent], np.median(table[:, -recent:], axis=1)
    centre = np.median(past, axis=1)
    spread = MAD_TO_SIGMA * np.median(np.abs(past - centre[:, None]), axis=1)
    # A channel that never moved has no scale of its own: a thousandth of its size stands in.
    spread = np.maximum(spread, np.maximum(1e-3 * np.abs(centre), 1e-9))
    deviations = (latest - centre) / spread
    distance = _distance((past - centre[:, None]) / spread[:, None], deviations)
    worst = int(np.argmax(np.abs(deviations)))
    score = max(float(abs(deviations[worst])), distance)
    direction = "high" if deviations[worst] > 0 else "low"
    anomalous = score >= threshold
    verdict = f"{names[worst]} is {direction}" if anomalous else "within its usual range"
    return {
        "score": round(score, 2),
        "anomalous": anomalous,
        "channel": names[worst],
        "direction": direction,
        "expected": round(float(centre[worst]), 3),
        "observed": round(float(latest[worst]), 3),
        "deviations": {n: round(float(z), 2) for n, z in zip(names, deviations, strict=True)},
        "distance": round(distance, 2),
        "explanation": f"{verdict}: {names[worst]} {latest[worst]:.4g} against a median of "
        f"{centre[worst]:.4g} with a robust spread of {spread[worst]:.3g} "
        f"(score {score:.1f}, threshold {threshold:g})",
    }


@function(
    description="Forecast a series of readings: slope, expected value ahead with its interval, and "
    "the time until a limit is reached.",
    examples=[
        "When will the tank be empty? Extrapolate these levels",
        "Forecast the pressure for the next hour",
        "How long until this reading crosses its limit?",
        "Fit a trend line to these values and predict the next two hours",
        "At which rate does the temperature rise, and when is it too hot?",
    ],
    skills=["numeric", "forecast"],
    warm=True,
)
def trend_forecast(
    values: list[float], step_s: float, horizon_s: float, limit: float | None = None
) -> dict[str, Any]:
    """Fit a robust line to readings, look ahead, and say when a limit is reached.

    Slope by Theil and Sen with its 95 % interval (Sen, JASA 63, 1968), significance by Kendall's
    tau at 1 %, spread from the residuals' median absolute deviation. The interval of the forecast
    joins the slope's interval with twice that spread; serial correlation is not modelled.

    Args:
        values: Readings in order of time, equally spaced, at least 10.
        step_s: Time between readings, seconds, above 0.
        horizon_s: How far to look ahead of the last reading, seconds, at least 0.
        limit: Value whose crossing is wanted.

    Returns:
        ``direction`` (``rising``, ``falling``, ``steady``), ``slope_per_hour`` with ``slope_low``
        and ``slope_high``, ``now``, ``forecast`` with ``forecast_low`` and ``forecast_high``,
        ``seconds_to_limit`` (None when the line does not lead there), ``earliest_s``, ``latest_s``,
        ``explanation``.

    Raises:
        ValueError: Too few readings, or values out of range.
    """
    if len(values) < MIN_VALUES or step_s <= 0 or horizon_s < 0:
        raise ValueError("at least 10 values, step_s above 0 and horizon_s of 0 or more are needed")
    series = _finite(np.array(values, dtype=np.float64))
    times = np.arange(len(series)) * step_s
    slope, intercept, low, high = (float(x) for x in stats.theilslopes(series, times, alpha=0.95))
    residuals = series - (intercept + slope * times)
    spread = MAD_TO_SIGMA * float(np.median(np.abs(residuals - np.median(residuals))))
    # A constant series has no tau (nan): then there is no trend either.
    significant = float(stats.kendalltau(times, series).pvalue) < SIGNIFICANCE
    moved = abs(slope) * float(times[-1]) > spread
    direction = "steady"
    if significant and moved:
        direction = "rising" if slope > 0 else "falling"
    now = intercept + slope * float(times[-1])
    reach = None if limit is None else _reach(now, limit, slope, (low, high), direction)
    forecast = now + slope * horizon_s
    return {
        "direction": direction,
        "slope_per_hour": round(slope * 3600, 4),
        "slope_low": round(low * 3600, 4),
        "slope_high": round(high * 3600, 4),
        "now": round(now, 3),
        "forecast": round(forecast, 3),
        "forecast_low": round(now + low * horizon_s - 2 * spread, 3),
        "forecast_high": round(now + high * horizon_s + 2 * spread, 3),
        "seconds_to_limit": None if reach is None else reach[0],
        "earliest_s": None if reach is None else reach[1],
        "latest_s": None if reach is None else reach[2],
        "explanation": f"{direction}: {slope * 3600:+.3g} per hour (95 % between {low * 3600:+.3g} "
        f"and {high * 3600:+.3g}), spread {spread:.3g}",
    }


def _finite(values: Array) -> Array:
    if not np.isfinite(values).all():
        raise ValueError("every value must be a finite number")
    return values


def _wave(samples: list[float], rate_hz: float, unit: str) -> Array:
    scales = {"g": STANDARD_GRAVITY, "m/s2": 1.0}
    if unit not in scales:
        raise ValueError(f"unit {unit!r} is unknown; use one of {', '.join(scales)}")
    if len(samples) < MIN_SAMPLES or not rate_hz > 0:
        raise ValueError("at least 256 samples and a sampling rate above 0 are needed")
    return _finite(np.array(samples, dtype=np.float64)) * scales[unit]


def _density(wave: Array, rate_hz: float) -> tuple[Array, Array]:
    segment = min(len(wave), 2048)
    frequencies, density = signal.welch(
        wave, fs=rate_hz, window="hann", nperseg=segment, noverlap=segment // 2, detrend="constant"
    )
    return np.asarray(frequencies, dtype=np.float64), np.asarray(density, dtype=np.float64)


def _velocity_density(frequencies: Array, density: Array) -> Array:
    """Turn (m/s2)^2/Hz into (mm/s)^2/Hz; the mean has no velocity."""
    velocity = np.zeros_like(density)
    velocity[1:] = density[1:] * (1000.0 / (2 * np.pi * frequencies[1:])) ** 2
    return velocity


def _band(frequencies: Array, low_hz: float, high_hz: float) -> npt.NDArray[np.bool_]:
    return (frequencies >= low_hz) & (frequencies <= high_hz)


def _zone(velocity_rms: float) -> str:
    return "ABCD"[sum(velocity_rms > limit for limit in ZONE_LIMITS_MM_S)]


def _peaks(
    frequencies: Array, velocity: Array, inside: npt.NDArray[np.bool_], step_hz: float
) -> list[dict[str, float]]:
    """The three strongest lines: frequency, and r.m.s. velocity over the line's main lobe."""
    visible = np.where(inside, velocity, 0.0)
    found, _ = signal.find_peaks(visible)
    strongest = sorted(found, key=lambda i: -visible[i])[:3]
    return [
        {
            "hz": round(_summit(frequencies, visible, int(i)), 2),
            "mm_s": round(float(np.sqrt(np.sum(visible[max(i - 2, 0) : i + 3]) * step_hz)), 3),
        }
        for i in strongest
    ]


def _summit(frequencies: Array, power: Array, peak: int) -> float:
    """Frequency of a peak between lines: the parabola through the logarithms of three of them."""
    left, middle, right = (
        math.log(max(float(power[i]), 1e-30)) for i in (peak - 1, peak, peak + 1)
    )
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature if curvature < 0 else 0.0
    return float(frequencies[peak]) + shift * float(frequencies[1] - frequencies[0])


def _bearing_lines(
    wave: Array, rate_hz: float, bearing: dict[str, float]
) -> list[dict[str, float | str]]:
    """Lines of the envelope spectrum near the given bearing frequencies, strongest first."""
    low, high = rate_hz * 0.2, rate_hz * 0.45
    # Zero-phase band-pass: the knocks keep their place in time.
    sections = signal.butter(4, [low, high], btype="bandpass", fs=rate_hz, output="sos")
    ringing = signal.sosfiltfilt(sections, wave - np.mean(wave))
    envelope = np.abs(signal.hilbert(ringing))
    envelope = (envelope - np.mean(envelope)) * signal.windows.hann(len(envelope))
    power = np.abs(np.fft.rfft(envelope, n=4 * len(envelope))) ** 2
    frequencies: Array = np.fft.rfftfreq(4 * len(envelope), 1 / rate_hz).astype(np.float64)
    floor = float(np.median(power[_band(frequencies, 20.0, 500.0)]))
    lines: list[dict[str, float | str]] = []
    for name, expected_hz in bearing.items():
        # Slip of the rolling elements moves a line by up to two per cent.
        near = np.flatnonzero(np.abs(frequencies - expected_hz) <= max(0.02 * expected_hz, 2.0))
        if not near.size:
            continue
        peak = int(near[np.argmax(power[near])])
        ratio = math.sqrt(float(power[peak]) / floor) if floor > 0 else 0.0
        lines.append(
            {
                "name": name,
                "expected_hz": expected_hz,
                "hz": round(_summit(frequencies, power, peak), 2),
                "times_floor": round(ratio, 1),
            }
        )
    return sorted(lines, key=lambda line: -float(line["times_floor"]))


def _finding(
    velocity_rms: float,
    once_rms: float,
    shaft_hz: float | None,
    lines: list[dict[str, float | str]],
) -> tuple[str, float | None, str]:
    """Name the fault: a bearing line above its floor, else a dominant shaft line in zone C or D."""
    overall = f"{velocity_rms:.2f} mm/s r.m.s., zone {_zone(velocity_rms)}"
    if lines and float(lines[0]["times_floor"]) >= ENVELOPE_SNR:
        best = lines[0]
        text = (
            f"the envelope shows {best['hz']} Hz, {best['times_floor']} times above its floor, "
            f"where {best['name']} is expected at {best['expected_hz']} Hz; {overall}"
        )
        return f"bearing_{best['name']}", float(best["hz"]), text
    if (
        shaft_hz is not None
        and velocity_rms > ZONE_LIMITS_MM_S[1]
        and once_rms > 0.8 * velocity_rms
    ):
        text = f"{once_rms:.2f} mm/s of it at the shaft's {shaft_hz:g} Hz; {overall}"
        return "imbalance", shaft_hz, text
    return "normal", None, f"no bearing line and no dominant shaft line; {overall}"


def _distance(past: Array, deviations: Array) -> float:
    """Mahalanobis distance, scaled by the root of the number of channels."""
    clipped = np.clip(past, -4.0, 4.0)
    # A constant channel correlates with nothing: 0 over 0, made 0 below.
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.corrcoef(clipped)
    correlation = np.nan_to_num(np.atleast_2d(correlation), nan=0.0)
    np.fill_diagonal(correlation, 1.0)
    shrunk = 0.9 * correlation + 0.1 * np.eye(len(deviations))
    squared = float(deviations @ np.linalg.solve(shrunk, deviations))
    return math.sqrt(max(squared, 0.0) / len(deviations))


def _reach(
    now: float, limit: float, slope: float, interval: tuple[float, float], direction: str
) -> tuple[float, float, float | None] | None:
    """Seconds until the line meets the limit: by the slope, at the earliest, at the latest."""
    gap = limit - now
    if direction == "steady" or gap * slope <= 0:
        return None
    fast, slow = sorted(interval, key=abs, reverse=True)
    latest = round(gap / slow, 1) if slow * slope > 0 else None
    return round(gap / slope, 1), round(gap / fast, 1), latest
