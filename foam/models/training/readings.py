"""Requests about readings: severity, extraction, summary, conversion, advice, topic, trend, talk.

Each ``*_slots`` function draws one case and computes its right answer; the phrasing is drawn apart
from it, by `foam.models.training.corpus`.
"""

import json
import random
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from typing import Final

from foam.models.training import wordings, words
from foam.models.training.frames import Phrasings, expand, fill
from foam.models.training.words import Metric

__all__ = ["CONVERSIONS", "READING_TASKS", "converted", "severity_of", "trend_of"]

Case = tuple[dict[str, str], str]

CONVERSIONS: Final = (
    ("kW", "W", 3),
    ("V", "mV", 3),
    ("A", "mA", 3),
    ("s", "ms", 3),
    ("bar", "kPa", 2),
    ("m", "cm", 2),
    ("m", "mm", 3),
    ("km", "m", 3),
    ("kg", "g", 3),
    ("l", "ml", 3),
    ("cm", "mm", 1),
    ("GB", "MB", 3),
)
"""Unit, smaller unit, power of ten between them."""


def severity_of(value: Decimal, warning: Decimal, critical: Decimal) -> str:
    """Name the severity of a value: a limit that is reached counts."""
    return "critical" if value >= critical else "warning" if value >= warning else "ok"


def converted(value: str, unit: str, wanted: str) -> str:
    """Convert a written value, exactly, as it would be written.

    Args:
        value: Decimal number.
        unit: Its unit, from `CONVERSIONS`, or ``C`` or ``F``.
        wanted: The unit to convert to.

    Raises:
        KeyError: There is no such conversion.
    """
    if (unit, wanted) == ("C", "F"):
        result = Decimal(value) * 9 / 5 + 32
    elif (unit, wanted) == ("F", "C"):
        result = (Decimal(value) - 32) * 5 / 9
    else:
        powers = {(a, b): power for a, b, power in CONVERSIONS}
        result = Decimal(value) * 10 ** powers[unit, wanted]
    return f"{result.normalize():f}"


def trend_of(values: list[int]) -> str:
    """Name the trend of values that move by 2 or more each step, or stay within 1 of one."""
    steps = [after - before for before, after in pairwise(values)]
    if all(step >= 2 for step in steps):
        return "rising"
    return "falling" if all(step <= -2 for step in steps) else "stable"


def _severity(rng: random.Random, *, unseen: bool) -> Case:
    quantity = rng.choice([q for q in words.METRICS if q.name != "battery level"])
    low, span = max(quantity.low, 1), quantity.high - quantity.low
    scale = 10 if quantity.fine and rng.random() < 0.25 else 1  # limits with one decimal
    warning = rng.randint(int((low + span * 0.2) * scale), int((low + span * 0.7) * scale))
    critical = warning + rng.randint(max(1, int(span * scale * 0.04)), int(span * scale * 0.25) + 1)
    if rng.random() < 0.45:  # near a limit, where it matters
        near = max(2, int(span * scale * 0.03))
        value = rng.choice((warning, critical)) + rng.randint(-near, near - 1)
    else:
        right = rng.choice(("ok", "warning", "critical"))
        ranges = {
            "ok": (low * scale, max(low * scale, warning - 1)),
            "warning": (warning, critical - 1),
            "critical": (critical, critical + int(span * scale * 0.4)),
        }
        value = rng.randint(*ranges[right])
    written = [Decimal(n) / scale for n in (max(value, 0), warning, critical)]
    if scale == 1 and quantity.fine and rng.random() < 0.25:
        written[0] += Decimal(rng.randint(0, 9)) / 10
    texts = [f"{n.normalize():f}" for n in written]
    slots = {"d": words.device(rng), "m": quantity.name, "u": quantity.unit}
    slots |= dict(zip("vwc", texts, strict=True))
    return slots, severity_of(*(Decimal(text) for text in texts))


def _extract(rng: random.Random, *, unseen: bool) -> Case:
    quantity, name = words.metric(rng), words.device(rng)
    value, unit = words.number(quantity, rng), quantity.unit
    spelled = rng.choice(words.UNITS_IN_WORDS[unit]) if unit in words.UNITS_IN_WORDS else unit
    time = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    slots = {"d": name, "m": quantity.name, "v": value, "s": words.site(rng), "t": time}
    slots["u"] = spelled if rng.random() < 0.25 else unit
    reading = wordings.READING.draw(rng, unseen=unseen and rng.random() < 0.5)
    record = {"device": name, "metric": quantity.name, "value": json.loads(value), "unit": unit}
    return {"r": fill(expand(reading, rng), slots)}, json.dumps(record)


def _summarise(rng: random.Random, *, unseen: bool) -> Case:
    quantity, count = words.metric(rng), rng.choice((2, 3, 3, 3, 3, 4))
    names: list[str] = []
    while len(names) < count:
        drawn = words.device(rng)
        if drawn not in names:
            names.append(drawn)
    low = max(quantity.low, 1)
    values = [str(v) for v in rng.sample(range(low, quantity.high + 1), count)]
    form, between = rng.choice(("{d} {m} {v} {u}", "{d}: {m} {v} {u}")), rng.choice(("; ", ", "))
    listed = between.join(
        fill(form, {"d": d, "m": quantity.name, "v": v, "u": quantity.unit})
        for d, v in zip(names, values, strict=True)
    )
    parts = [f"{v} {quantity.unit} on {d}" for d, v in zip(names, values, strict=True)]
    return {"l": listed}, f"The {quantity.name} is {', '.join(parts[:-1])} and {parts[-1]}."


def _convert(rng: random.Random, *, unseen: bool) -> Case:
    if rng.random() < 0.2:
        unit, wanted, value = "C", "F", str(rng.randrange(-40, 125, 5))
        if rng.random() < 0.3:
            unit, wanted, value = "F", "C", converted(value, "C", "F")
    else:
        unit, wanted, _ = rng.choice(CONVERSIONS)
        drawn = rng.randint(1, 999)
        value = f"{drawn // 10}.{drawn % 10}" if rng.random() < 0.4 else str(drawn)
    answer = f"{converted(value, unit, wanted)} {wanted}"
    return {"x": value, "a": unit, "b": wanted}, answer


def _value_beyond(quantity: Metric, state: str, rng: random.Random) -> str:
    span = quantity.high - quantity.low
    if state == "high":
        return str(rng.randint(int(quantity.low + span * 0.5), quantity.high))
    return str(rng.randint(max(quantity.low, 0), int(quantity.low + span * 0.3)))


def _advise(rng: random.Random, *, unseen: bool) -> Case:
    quantity, state = words.metric(rng), rng.choice(("high", "low"))
    kind = rng.choice(("pump", "fan", "motor", "tank", "boiler", "press", "oven", "sensor"))
    name = words.device_of(kind, rng) if rng.random() < 0.3 else words.device(rng)
    spoken = name.replace("-", " ") if rng.random() < 0.1 else f"the {kind}"
    slots = {"d": spoken if rng.random() < 0.15 else name, "m": quantity.name, "u": quantity.unit}
    slots |= {"k": kind, "s": words.site(rng), "v": _value_beyond(quantity, state, rng)}
    slots["x"] = rng.choice(words.ABOVE if state == "high" else words.BELOW)
    plain = words.WORD_OF_STATE.get((quantity.name, state), ())
    if plain and rng.random() < 0.5:
        problem = fill(expand(rng.choice(plain), rng), slots)
        if rng.random() < 0.25:
            problem += f" ({slots['v']} {quantity.unit})"
    else:
        frame = wordings.PROBLEM.draw(rng, unseen=unseen and rng.random() < 0.5)
        problem = fill(expand(frame, rng), slots)
    return {"p": problem}, words.ACTIONS[quantity.name, state]


def _topic(rng: random.Random, *, unseen: bool) -> Case:
    name, place, quantity = words.device(rng), words.site(rng), words.metric(rng).name
    return {"m": quantity, "d": name, "s": place}, f"{place}/{name}/{quantity.replace(' ', '-')}"


def _trend(rng: random.Random, *, unseen: bool) -> Case:
    kind, values = rng.choice(("rising", "falling", "stable")), [rng.randint(10, 99)]
    first, count = values[0], rng.randint(4, 7)
    while len(values) < count:
        step = rng.randint(2, 9)
        steps = {"rising": values[-1] + step, "falling": values[-1] - step}
        values.append(steps.get(kind, first + rng.choice((-1, 0, 1)) * (len(values) % 2)))
    lift = 10 * max(0, -min(values) // 10 + 1)
    values = [value + lift for value in values]
    return {"n": rng.choice((" ", ", ", " ")).join(map(str, values))}, trend_of(values)


READING_TASKS: Final[dict[str, tuple[Phrasings, Callable[..., Case]]]] = {
    "classify": (wordings.SEVERITY, _severity),
    "extract": (wordings.EXTRACT, _extract),
    "summarise": (wordings.SUMMARISE, _summarise),
    "convert": (wordings.CONVERT, _convert),
    "advise": (wordings.ADVISE, _advise),
    "topic": (wordings.TOPIC, _topic),
    "trend": (wordings.TREND, _trend),
}
"""Task to its phrasings and the function that draws a case: slots and the right answer."""
