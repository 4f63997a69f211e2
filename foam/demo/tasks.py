"""What the devices of the plant ask during the shift, and what the right answers are.

Texts are filled with what was recorded at that minute. A truth follows from the planted fault or
from a rule of the plant, written down here and nowhere else; it is never taken from an answer of
the mesh.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["ACTIONS", "PlannedTask", "plan_tasks"]

Line = dict[str, Any]
Series = Mapping[tuple[str, str], Sequence[float]]

ACTIONS: Final = {
    ("vibration", "high"): "Stop the machine and inspect the bearings.",
    ("temperature", "high"): "Reduce the load and check the cooling.",
    ("flow", "low"): "Clean the filter and check the pump.",
    ("co2", "high"): "Open the windows and increase ventilation.",
}
"""The plant's own rules: what is done when a quantity leaves its limits."""

NOISE_G: Final = 0.02
GRAVITY: Final = 9.80665
BAND_HZ: Final = (1800.0, 3800.0)
MOTOR_LIMIT_C: Final = 120.0


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A ``task`` line and its ``truth`` line."""

    task: Line
    truth: Line


class _Plan:
    """Collects tasks."""

    def __init__(self, series: Series) -> None:
        self._series = series
        self._planned: list[PlannedTask] = []

    def numbered(self) -> list[PlannedTask]:
        """Return the tasks in the order of their time, with ids that count per device."""
        counts: dict[str, int] = {}
        for planned in sorted(self._planned, key=lambda planned: int(planned.task["at_s"])):
            device = planned.task["device"]
            counts[device] = counts.get(device, 0) + 1
            planned.task["id"] = planned.truth["task"] = f"{device}-{counts[device]}"
        return sorted(self._planned, key=lambda planned: int(planned.task["at_s"]))

    def at(self, machine: str, metric: str, at_s: int) -> float:
        """Reading of a channel at a second of the shift."""
        return self._series[machine, metric][at_s // 60]

    def whole(self, machine: str, metric: str, at_s: int) -> int:
        """The same, as a display without decimals shows it."""
        return round(self.at(machine, metric, at_s))

    def add(
        self,
        device: str,
        at_s: int,
        text: str,
        place: tuple[str, str],
        checks: Iterable[Line],
        *,
        why: str,
        data: Line | None = None,
        plain: bool = False,
    ) -> None:
        """Plan a task.

        Args:
            device: Who asks.
            at_s: When, seconds of the shift.
            text: In which words.
            place: Node and function that should answer.
            checks: Conditions on the output.
            why: Where the truth comes from.
            data: ``input``; ``{"$waveform": name}`` and ``{"$series": [machine, metric, from_s,
                to_s]}`` stand for recorded data, which the device fills in.
            plain: Published as bare text, as a device without JSON would.
        """
        task: Line = {"kind": "task", "id": "", "device": device, "at_s": at_s, "text": text}
        if data is not None:
            task["input"] = data
        if plain:
            task["plain"] = True
        truth: Line = {
            "kind": "truth",
            "task": "",
            "node": place[0],
            "function": place[1],
            "why": why,
            "checks": list(checks),
        }
        self._planned.append(PlannedTask(task, truth))


def plan_tasks(
    series: Series,
    waveforms: Mapping[str, Line],
    faults: Sequence[Line],
    bearing: Mapping[str, float],
) -> list[PlannedTask]:
    """Write the script of the shift.

    Args:
        series: Channel to readings, one a minute.
        waveforms: Vibration recordings by name, with what was ``planted``.
        faults: What was planted.
        bearing: Characteristic frequencies of the plant's bearings, Hz.

    Returns:
        Tasks in the order of their time.
    """
    plan = _Plan(series)
    _vibration(plan, waveforms, bearing)
    _windows(plan, {fault["machine"]: fault for fault in faults})
    _advice(plan)
    _severity(plan)
    _language(plan)
    _manual(plan)
    return plan.numbered()


def _equals(value: Any, path: str = "") -> Line:
    return {"path": path, "equals": value}


def _near(path: str, value: float, within: float) -> Line:
    return {"path": path, "near": round(value, 4), "within": round(within, 4)}


def _vibration(plan: _Plan, waveforms: Mapping[str, Line], bearing: Mapping[str, float]) -> None:
    place = ("edge-numeric", "vibration_spectrum")
    asks = (
        (
            "pump-7-early",
            "Analyse the vibration recording of my drive end: is the bearing sound?",
            "normal",
        ),
        (
            "pump-7-noon",
            "Which fault shows in the spectrum of this vibration recording?",
            "bearing_outer_race",
        ),
        (
            "pump-7-late",
            "Check this accelerometer recording for a damaged bearing",
            "bearing_outer_race",
        ),
        (
            "fan-2-late",
            "What makes me shake? Please analyse the spectrum of my vibration samples",
            "imbalance",
        ),
        ("compressor-1", "Routine spectrum analysis of the vibration samples, please", "normal"),
    )
    for name, text, fault in asks:
        wave = waveforms[name]
        speed = wave["planted"]["velocity_rms"]
        checks = [_equals(fault, "finding"), _near("velocity_rms", speed, 0.08 * speed + 0.05)]
        if fault != "normal":
            hz = bearing["outer_race"] if fault.startswith("bearing") else wave["shaft_hz"]
            checks.append(_near("defect_hz", hz, 1.5))
        data = {
            "samples": {"$waveform": name},
            "rate_hz": wave["rate_hz"],
            "shaft_hz": wave["shaft_hz"],
            "bearing": dict(bearing),
        }
        plan.add(
            wave["machine"], wave["at_s"], text, place, checks, why=f"planted: {fault}", data=data
        )
    low_hz, high_hz = BAND_HZ
    for name, text in (
        ("pump-7-early", "How much vibration energy lies between 1800 and 3800 Hz?"),
        ("pump-7-late", "Measure the energy of the bearing band from 1800 to 3800 Hz again"),
    ):
        wave = waveforms[name]
        noise = NOISE_G * GRAVITY * math.sqrt((high_hz - low_hz) / (wave["rate_hz"] / 2))
        rms = math.hypot(wave["planted"]["knock_rms"], noise)
        data = {"samples": {"$waveform": name}, "rate_hz": wave["rate_hz"]}
        data |= {"low_hz": low_hz, "high_hz": high_hz}
        plan.add(
            "pump-7",
            wave["at_s"] + 300,
            text,
            ("edge-numeric", "band_energy"),
            [_near("rms", rms, 0.12 * rms)],
            why="planted knocks and noise in the band",
            data=data,
        )


def _windows(plan: _Plan, faults: Mapping[str, Line]) -> None:
    """Whole windows of slow channels: is it odd, where does it lead?"""
    for machine, at_s, metrics, text, odd in (
        (
            "pump-9",
            27_600,
            ("flow", "pressure", "current"),
            "Do my latest readings deviate from normal?",
            "flow",
        ),
        (
            "compressor-1",
            25_200,
            ("pressure", "temperature", "current"),
            "Is anything unusual in my readings compared with the last hours?",
            None,
        ),
        (
            "sensor-5",
            24_000,
            ("co2", "temperature"),
            "Score how abnormal these sensor readings are",
            "co2",
        ),
    ):
        channels = {m: {"$series": [machine, m, at_s - 10_800, at_s]} for m in metrics}
        checks = [_equals(odd is not None, "anomalous")]
        if odd is not None:
            checks += [
                _equals(odd, "channel"),
                _equals("low" if odd == "flow" else "high", "direction"),
            ]
        why = f"planted: {faults[machine]['fault']}" if odd else "nothing was planted"
        plan.add(
            machine,
            at_s,
            text,
            ("edge-numeric", "anomaly_score"),
            checks,
            why=why,
            data={"channels": channels},
        )
    slope = float(faults["motor-4"]["slope_per_hour"])
    start_s, at_s = int(faults["motor-4"]["onset_s"]), 21_600
    now = 61.0 + slope * (at_s - start_s) / 3600
    left_s = (MOTOR_LIMIT_C - now) / slope * 3600
    place = ("edge-numeric", "trend_forecast")
    plan.add(
        "motor-4",
        at_s,
        "Forecast my temperature: when will the winding reach 120 degrees?",
        place,
        [
            _equals("rising", "direction"),
            _near("slope_per_hour", slope, 0.08 * slope),
            _near("seconds_to_limit", left_s, 0.1 * left_s),
        ],
        why=f"planted: {slope} C per hour from 61 C",
        data={
            "values": {"$series": ["motor-4", "temperature", start_s, at_s]},
            "step_s": 60,
            "horizon_s": 7200,
            "limit": MOTOR_LIMIT_C,
        },
    )
    plan.add(
        "boiler-3",
        18_000,
        "Extrapolate these readings two hours ahead: where is the trend going?",
        place,
        [_equals("steady", "direction"), _near("forecast", 62.0, 1.0)],
        why="nothing was planted: 62 C all along",
        data={
            "values": {"$series": ["boiler-3", "temperature", 7200, 18_000]},
            "step_s": 60,
            "horizon_s": 7200,
        },
    )


def _advice(plan: _Plan) -> None:
    place = ("edge-llm", "advise")
    hot = plan.whole("motor-4", "temperature", 28_000)
    flow = plan.whole("pump-9", "flow", 28_300)
    air = plan.whole("sensor-5", "co2", 27_000)
    for device, at_s, text, rule in (
        (
            "pump-7",
            28_200,
            "the pump in hall 7 vibrates at 14 mm/s, what now?",
            ("vibration", "high"),
        ),
        (
            "motor-4",
            28_000,
            f"motor-4 has reached {hot} C and keeps climbing, what should we do?",
            ("temperature", "high"),
        ),
        (
            "pump-9",
            28_300,
            f"only {flow} l/min of flow through pump-9, what do you advise?",
            ("flow", "low"),
        ),
        (
            "sensor-5",
            27_000,
            f"the air at sensor-5 has {air} ppm of CO2, what should I do?",
            ("co2", "high"),
        ),
        (
            "fan-2",
            14_400,
            "fan-2 is shaking far too much, what action do you suggest?",
            ("vibration", "high"),
        ),
    ):
        plan.add(
            device,
            at_s,
            text,
            place,
            [_equals(ACTIONS[rule])],
            why=f"rule of the plant: {rule[0]} too {rule[1]}",
            plain=True,
        )


def _severity(plan: _Plan) -> None:
    place = ("edge-llm", "triage")
    for device, at_s, metric, unit, warning, critical, form in (
        (
            "motor-4",
            28_500,
            "temperature",
            "C",
            75,
            90,
            "How severe is this alert: {r}, warning at {w}, critical at {c}?",
        ),
        (
            "boiler-3",
            16_000,
            "temperature",
            "C",
            80,
            95,
            "Grade this alarm: {r}, we warn at {w} and trip at {c}",
        ),
        (
            "compressor-1",
            12_000,
            "pressure",
            "bar",
            9,
            12,
            "Classify this alert: {r}, warning at {w}, critical at {c}",
        ),
        (
            "sensor-5",
            28_600,
            "co2",
            "ppm",
            1000,
            1500,
            "How serious is {r} when the warning is {w} and critical is {c}?",
        ),
    ):
        value = plan.whole(device, metric, at_s)
        right = "ok" if value < warning else "warning" if value < critical else "critical"
        text = form.format(r=f"{device} {metric} {value} {unit}", w=warning, c=critical)
        plan.add(
            device,
            at_s,
            text,
            place,
            [_equals(right)],
            why=f"{value} against {warning} and {critical}",
            plain=True,
        )


def _language(plan: _Plan) -> None:
    for device, at_s, metric, unit, form in (
        (
            "compressor-1",
            20_400,
            "pressure",
            "bar",
            "Turn this reading into JSON: compressor-1 reports pressure {v} bar",
        ),
        (
            "motor-4",
            24_600,
            "temperature",
            "C",
            "Record this reading as JSON: The temperature of motor-4 is {v} C.",
        ),
        (
            "pump-9",
            27_900,
            "flow",
            "l/min",
            "Extract the fields as JSON: pump-9 reports flow {v} l/min",
        ),
    ):
        # A flow meter shows whole litres.
        value = (
            plan.whole(device, metric, at_s)
            if metric == "flow"
            else round(plan.at(device, metric, at_s), 1)
        )
        right = {"device": device, "metric": metric, "value": value, "unit": unit}
        text = form.format(v=value)
        plan.add(
            device, at_s, text, ("edge-llm", "extract"), [_equals(right)], why="the reading itself"
        )
    at_s = 26_400
    flows = {name: plan.whole(name, "flow", at_s) for name in ("pump-9", "pump-7")}
    temperatures = {
        n: plan.whole(n, "temperature", at_s) for n in ("motor-4", "boiler-3", "compressor-1")
    }
    parts = [f"{value} C on {name}" for name, value in temperatures.items()]
    listed = "; ".join(f"{name} temperature {value} C" for name, value in temperatures.items())
    plan.add(
        "panel-1",
        at_s,
        f"Summarise the readings of this hour in one sentence: {listed}",
        ("edge-llm", "summarise"),
        [_equals(f"The temperature is {parts[0]}, {parts[1]} and {parts[2]}.")],
        why="the readings themselves",
    )
    recent = [plan.whole("motor-4", "temperature", 14_400 + 2400 * k) for k in range(5)]
    plan.add(
        "panel-1",
        24_000,
        f"In a word, do these numbers rise, fall or stay: {' '.join(map(str, recent))}?",
        ("edge-llm", "trend_word"),
        [_equals("rising")],
        why="planted: overheating",
    )
    plan.add(
        "panel-1",
        1200,
        f"Which MQTT topic carries the flow of pump-9 at plant-1? It shows {flows['pump-7']}",
        ("edge-llm", "name_topic"),
        [_equals("plant-1/pump-9/flow")],
        why="naming rule site/device/metric",
    )
    plan.add(
        "panel-1",
        300,
        "Hello, what can you do for us?",
        ("edge-llm", "chat"),
        [{"path": "", "contains": "classify alerts"}],
        why="what the model says of itself",
        plain=True,
    )


def _manual(plan: _Plan) -> None:
    for at_s, question, section in (
        (3000, "How do I lock out a machine before maintenance work?", "1.1"),
        (9000, "How often and with what do I grease the bearings?", "3.4"),
        (15_000, "Which steps are needed to balance the rotor of a fan?", "4.1"),
        (21_000, "How do I replace a rolling bearing?", "3.3"),
        (27_200, "Steps for cleaning the suction filter of a pump?", "2.4"),
        (28_400, "Maintenance procedure for finding leaks of compressed air?", "6.3"),
    ):
        plan.add(
            "panel-1",
            at_s,
            question,
            ("edge-manual", "maintenance_manual"),
            [_equals(True, "found"), _equals(section, "section")],
            why=f"section {section} of the manual",
            plain=True,
        )
