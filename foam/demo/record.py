"""Makes the recording that the simulated devices replay: one shift of a small plant, with faults.

Run ``python -m foam.demo.record`` to write ``foam/demo/data/plant.jsonl.gz`` again; equal seeds
give equal files. The file holds one JSON object a line: ``shift``, ``machine``, ``fault`` (what was
planted, and when), ``series`` (one reading a minute), ``waveform`` (vibration, sampled fast),
``task`` (what a device asks, and when) and ``truth`` (what the right answer is, and where it should
come from).

The truth is written from the planted causes and from the plant's rules (`ACTIONS`, the limits),
never from what a function of the mesh answered. The vibration of a damaged outer race is a train of
decaying knocks at the ball-pass frequency, after McFadden and Smith, "Model for the vibration
produced by a single point defect in a rolling element bearing", Journal of Sound and Vibration 96,
1984.
"""

import argparse
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from foam.demo.recording import DEFAULT_RECORDING
from foam.demo.tasks import plan_tasks

__all__ = ["Plant", "bearing_frequencies", "main", "make_plant", "waveform", "write_recording"]

SEED: Final = 20_260_1
SHIFT_S: Final = 8 * 3600
STEP_S: Final = 60
RATE_HZ: Final = 8192
SAMPLES: Final = 4096
SHAFT_HZ: Final = 24.8
RESONANCE_HZ: Final = 2800.0
NOISE_G: Final = 0.02
GRAVITY: Final = 9.80665

Array = npt.NDArray[np.float64]
Line = dict[str, Any]


def bearing_frequencies(
    shaft_hz: float, *, balls: int, ball_mm: float, pitch_mm: float, angle_deg: float = 0.0
) -> dict[str, float]:
    """Characteristic frequencies of a rolling bearing whose outer race stands still.

    Args:
        shaft_hz: Shaft speed.
        balls: Rolling elements.
        ball_mm: Diameter of one.
        pitch_mm: Pitch diameter.
        angle_deg: Contact angle.

    Returns:
        ``outer_race``, ``inner_race``, ``ball`` in Hz.
    """
    ratio = ball_mm / pitch_mm * math.cos(math.radians(angle_deg))
    return {
        "outer_race": round(balls / 2 * shaft_hz * (1 - ratio), 2),
        "inner_race": round(balls / 2 * shaft_hz * (1 + ratio), 2),
        "ball": round(pitch_mm / (2 * ball_mm) * shaft_hz * (1 - ratio**2), 2),
    }


@dataclass(frozen=True)
class Plant:
    """Everything that was recorded and planted.

    Attributes:
        machines: ``machine`` lines.
        faults: ``fault`` lines.
        series: ``(machine, metric)`` to readings, one a minute.
        units: Metric to unit.
        waveforms: Name to ``waveform`` line.
        bearing: Characteristic frequencies of the plant's bearings, Hz.
    """

    machines: Sequence[Line]
    faults: Sequence[Line]
    series: dict[tuple[str, str], list[float]]
    units: dict[str, str]
    waveforms: dict[str, Line]
    bearing: dict[str, float]


def waveform(
    rng: np.random.Generator,
    *,
    shaft_mm_s: float,
    knock_hz: float | None = None,
    knock_g: float = 0.0,
) -> tuple[list[float], dict[str, float]]:
    """Synthesise a vibration recording of `SAMPLES` samples.

    Args:
        rng: Source of noise and phases.
        shaft_mm_s: Velocity at shaft frequency, r.m.s. mm/s.
        knock_hz: Rate of the knocks of a damaged race; None for a sound bearing.
        knock_g: Height of a knock.

    Returns:
        Samples in g, rounded to a thousandth, and what was planted: ``velocity_rms`` (mm/s) of the
        shaft line and ``knock_rms`` (m/s2).
    """
    times = np.arange(SAMPLES) / RATE_HZ
    peak_g = shaft_mm_s * math.sqrt(2) * 2 * math.pi * SHAFT_HZ / 1000 / GRAVITY
    wave = peak_g * np.sin(2 * np.pi * SHAFT_HZ * times + rng.uniform(0, 2 * np.pi))
    wave += rng.normal(0, NOISE_G, SAMPLES)
    knocks = np.zeros(SAMPLES)
    if knock_hz is not None:
        at = rng.uniform(0, 1 / knock_hz)
        while at < times[-1]:
            after = times[times >= at] - at
            ring = np.exp(-after / 0.0012) * np.sin(2 * np.pi * RESONANCE_HZ * after)
            knocks[SAMPLES - len(after) :] += knock_g * rng.uniform(0.9, 1.1) * ring
            at += 1 / knock_hz * rng.normal(1.0, 0.005)  # the rolling elements slip a little
    planted = {
        "velocity_rms": shaft_mm_s,
        "knock_rms": float(np.sqrt(np.mean(knocks**2))) * GRAVITY,
    }
    return [round(float(x), 3) for x in wave + knocks], planted


def make_plant(seed: int = SEED) -> Plant:
    """Simulate the shift.

    Args:
        seed: Equal seeds give equal plants.
    """
    rng = np.random.default_rng(seed)
    bearing = bearing_frequencies(SHAFT_HZ, balls=9, ball_mm=7.94, pitch_mm=39.04)
    waveforms, faults = _vibrations(rng, bearing)
    series = _series(rng)
    machines = [
        {"kind": "machine", "machine": name, "what": what}
        for name, what in (
            ("pump-7", "cooling water pump, hall 7"),
            ("fan-2", "exhaust fan, roof"),
            ("motor-4", "conveyor motor, hall 4"),
            ("pump-9", "process water pump with suction filter, hall 9"),
            ("sensor-5", "air quality sensor, meeting room"),
            ("compressor-1", "compressed air, plant room"),
            ("boiler-3", "hot water, plant room"),
        )
    ]
    units = {
        "temperature": "C",
        "vibration": "mm/s",
        "flow": "l/min",
        "co2": "ppm",
        "pressure": "bar",
        "current": "A",
    }
    return Plant(machines, faults, series, units, waveforms, bearing)


def _vibrations(
    rng: np.random.Generator, bearing: dict[str, float]
) -> tuple[dict[str, Line], list[Line]]:
    """Recordings of the drive ends: a race that wears, a rotor out of balance, a sound machine."""
    outer = bearing["outer_race"]
    wanted: tuple[tuple[str, str, int, float, float | None, float], ...] = (
        ("pump-7-early", "pump-7", 600, 1.1, None, 0.0),
        ("pump-7-noon", "pump-7", 5 * 3600, 4.0, outer, 0.7),
        ("pump-7-late", "pump-7", 7 * 3600 + 2400, 13.6, outer, 2.2),
        ("fan-2-late", "fan-2", 6 * 3600, 9.2, None, 0.0),
        ("compressor-1", "compressor-1", 4 * 3600, 0.9, None, 0.0),
    )
    waveforms: dict[str, Line] = {}
    for name, machine, at_s, shaft_mm_s, knock_hz, knock_g in wanted:
        samples, planted = waveform(rng, shaft_mm_s=shaft_mm_s, knock_hz=knock_hz, knock_g=knock_g)
        waveforms[name] = {
            "kind": "waveform",
            "name": name,
            "machine": machine,
            "at_s": at_s,
            "rate_hz": RATE_HZ,
            "shaft_hz": SHAFT_HZ,
            "unit": "g",
            "planted": {key: round(value, 4) for key, value in planted.items()},
            "samples": samples,
        }
    faults: list[Line] = [
        {
            "machine": "pump-7",
            "fault": "bearing_outer_race",
            "onset_s": 2 * 3600,
            "defect_hz": outer,
        },
        {"machine": "fan-2", "fault": "imbalance", "onset_s": 3600, "defect_hz": SHAFT_HZ},
        {"machine": "motor-4", "fault": "overheating", "onset_s": 10_800, "slope_per_hour": 8.4},
        {"machine": "pump-9", "fault": "blocked_filter", "onset_s": 25_200},
        {"machine": "sensor-5", "fault": "high_co2", "onset_s": 21_600},
    ]
    return waveforms, [{"kind": "fault", **fault} for fault in faults]


def _series(rng: np.random.Generator) -> dict[tuple[str, str], list[float]]:
    """Slow channels, one reading a minute; each fault sets in where its ``fault`` line says."""
    minutes = np.arange(SHIFT_S // STEP_S, dtype=np.float64)

    def around(level: float, spread: float) -> Array:
        return level + rng.normal(0, spread, len(minutes))

    def after(onset_s: int, per_hour: float) -> Array:
        return np.maximum(minutes - onset_s / 60, 0.0) / 60 * per_hour

    def step(onset_s: int, change: float, rise_min: float) -> Array:
        grown = 1 - np.exp(-np.maximum(minutes - onset_s / 60, 0.0) / rise_min)
        return change * grown

    made = {
        ("pump-7", "vibration"): around(1.1, 0.05) + after(7200, 2.1),
        ("pump-7", "flow"): around(121.0, 1.5),
        ("fan-2", "vibration"): around(1.6, 0.08) + step(3600, 7.6, 40.0),
        ("motor-4", "temperature"): around(61.0, 0.4) + after(10_800, 8.4),
        ("motor-4", "current"): around(31.0, 0.5) + after(10_800, 0.6),
        ("pump-9", "flow"): around(118.0, 1.5) - step(25_200, 100.0, 8.0),
        ("pump-9", "pressure"): around(5.2, 0.05) + step(25_200, 0.6, 8.0),
        ("pump-9", "current"): around(18.0, 0.25),
        ("sensor-5", "co2"): around(640.0, 8.0) + step(21_600, 1480.0, 15.0),
        ("sensor-5", "temperature"): around(22.0, 0.15),
        ("compressor-1", "pressure"): around(6.8, 0.05),
        ("compressor-1", "temperature"): around(58.0, 0.5),
        ("compressor-1", "current"): around(42.0, 0.6),
        ("boiler-3", "temperature"): around(62.0, 0.3),
        ("boiler-3", "pressure"): around(2.4, 0.02),
    }
    return {key: [round(float(x), 2) for x in values] for key, values in made.items()}


def write_recording(plant: Plant, path: Path, *, seed: int = SEED) -> int:
    """Write the recording; equal plants give equal bytes.

    Args:
        plant: What to write.
        path: ``.jsonl.gz`` file; replaced when it exists.
        seed: Named in the first line.

    Returns:
        Size of the file in bytes.
    """
    shift = {"kind": "shift", "v": 1, "seed": seed, "seconds": SHIFT_S, "starts": "06:00"}
    lines: list[Line] = [shift, *plant.machines, *plant.faults]
    lines += [
        {
            "kind": "series",
            "machine": machine,
            "metric": metric,
            "unit": plant.units[metric],
            "step_s": STEP_S,
            "values": values,
        }
        for (machine, metric), values in plant.series.items()
    ]
    lines += plant.waveforms.values()
    for planned in plan_tasks(plant.series, plant.waveforms, plant.faults, plant.bearing):
        lines += [planned.task, planned.truth]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    # No file name and no time in the header, so that the bytes depend on the content alone.
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    return path.stat().st_size


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the recording of the demo."""
    parser = argparse.ArgumentParser(description="Make the recording of the demo plant.")
    parser.add_argument("--out", type=Path, default=DEFAULT_RECORDING)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    write_recording(make_plant(options.seed), options.out, seed=options.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
