"""Rewrites natural device texts into the phrasings in which the shipped language model is surest.

The model has 2.6 million parameters. It takes many wordings rightly, but not all, and answers what
it does not understand as well (``foam/models/README.md``). Each function here is named by the
declaration of one language function (``prepare`` in ``plant/edge-llm.toml``), runs on the node just
before the prompt is made, and only puts the task into words: the answer is the model's own. A text
in which nothing usable is found is refused, for a guess of a small model is worse than a clear
error.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

__all__ = [
    "advice",
    "conversion",
    "extraction",
    "severity",
    "small_talk",
    "summary",
    "topic",
    "trend",
]

MACHINES: Final = (
    "pump",
    "boiler",
    "fan",
    "motor",
    "chiller",
    "conveyor",
    "tank",
    "valve",
    "freezer",
    "greenhouse",
    "turbine",
    "battery",
    "inverter",
    "camera",
    "gateway",
    "compressor",
    "router",
    "heater",
    "robot",
    "sensor",
    "silo",
    "press",
    "oven",
    "meter",
)

MIN_TREND: Final = 4
"""Shortest list of numbers the model was trained to judge."""

METRICS: Final = {
    "battery level": r"battery level|state of charge|charge level",
    "temperature": r"temperature|hot|hotter|heat|heats|heating|overheat\w*|cold|colder|warm|warmer",
    "humidity": r"humidity|humid|damp|moisture",
    "pressure": r"pressure",
    "vibration": r"vibrat\w+|shak\w+",
    "voltage": r"voltage",
    "current": r"current",
    "flow": r"flow|flows|throughput",
    "noise": r"noise|noisy|loud|louder",
    "co2": r"co2|carbon dioxide|stuffy",
    "speed": r"speed|rpm",
    "power": r"power",
    "level": r"level",
}
"""Words for each quantity the model knows, in the order in which they are tried."""

UNITS: Final = {
    "mm/s": "vibration",
    "l/min": "flow",
    "ppm": "co2",
    "rpm": "speed",
    "bar": "pressure",
    "kW": "power",
    "dB": "noise",
    "cm": "level",
    "%": "humidity",
    "C": "temperature",
    "V": "voltage",
    "A": "current",
}

NORMAL: Final = {
    "temperature": (5.0, 80.0),
    "humidity": (30.0, 65.0),
    "pressure": (2.0, 10.0),
    "vibration": (0.0, 7.1),
    "voltage": (200.0, 250.0),
    "current": (1.0, 60.0),
    "flow": (40.0, 300.0),
    "battery level": (20.0, 95.0),
    "noise": (0.0, 85.0),
    "co2": (0.0, 1000.0),
    "speed": (300.0, 3600.0),
    "power": (2.0, 200.0),
    "level": (30.0, 250.0),
}
"""Alarm limits of the plant, low and high: they decide "too high" when the text has only a
number."""

_HIGH: Final = re.compile(
    r"\b(too (high|much|hot|fast|loud|strong)|above|over|exceed\w*|climb\w*|ris(es|ing|en)|rose"
    r"|hotter|hot|overheat\w*|loud\w*|stuffy|increas\w*|grow\w*|jumped)\b",
    re.IGNORECASE,
)
_LOW: Final = re.compile(
    r"\b(too (low|little|cold|slow|weak|dry)|below|under|drop\w*|fall\w*|fell|sink\w*|hardly"
    r"|colder|cold|decreas\w*|less|weak\w*|lost|losing|empty)\b",
    re.IGNORECASE,
)
_UNIT: Final = r"mm/s|l/min|ppm|rpm|bar|kW|dB|cm|%|°?C\b|V\b|A\b|degrees"
_VALUE: Final = re.compile(rf"(?<![\w.-])(-?\d+(?:\.\d+)?)\s*({_UNIT})", re.IGNORECASE)
_NUMBER: Final = re.compile(r"-?\d+(?:\.\d+)?")
_MACHINE: Final = re.compile(
    rf"\b({'|'.join(MACHINES)})[\s-]*(?:(?:in|at|of)\s+(?:the\s+)?(?:hall|line|room|bay)\s+)?(\d{{1,2}})\b",
    re.IGNORECASE,
)
_WRAPPING: Final = re.compile(
    r"^.{0,80}?\b(json|summari[sz]e|summary|sum up|readings|record|fields)\b[^:]{0,60}:\s*",
    re.IGNORECASE | re.DOTALL,
)
_TRAILING: Final = re.compile(r"[\s,;.-]*\b(as|to|into|in) json( please)?[\s.!?]*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text says about a measurement.

    Attributes:
        device: Machine and number, ``pump-7``; ``machine-1`` when the text names none.
        metric: One of `METRICS`.
        value: The number as written, or None.
        unit: Its unit as the model writes it, or None.
    """

    device: str
    metric: str
    value: str | None
    unit: str | None


def read(text: str) -> Reading:
    """Find machine, quantity, value and unit in a text.

    Raises:
        ValueError: The text names no quantity that the model knows.
    """
    value = _VALUE.search(text)
    unit = _unit(value.group(2)) if value else None
    # A unit says what was measured more surely than a word: "hot" may describe anything.
    by_unit = UNITS.get(unit) if unit else None
    by_word = next(
        (m for m, words in METRICS.items() if re.search(rf"\b({words})\b", text, re.IGNORECASE)),
        None,
    )
    metric = by_word if by_unit == "humidity" or by_unit is None else by_unit
    if metric is None:
        known = ", ".join(METRICS)
        raise ValueError(f"the text names no quantity this model knows; it knows {known}")
    machine = _MACHINE.search(text)
    device = f"{machine.group(1).lower()}-{int(machine.group(2))}" if machine else "sensor-1"
    return Reading(device=device, metric=metric, value=value.group(1) if value else None, unit=unit)


def advice(values: dict[str, Any]) -> str:
    """Ask what to do about a quantity that is too high or too low.

    The direction comes from the plant's limits when the text has a number, else from its words.

    Raises:
        ValueError: Neither number nor words say what is wrong.
    """
    text = str(values["text"])
    reading = read(text)
    state = _state(text, reading)
    return f"What should I do? the {reading.metric} of {reading.device} is too {state}."


def severity(values: dict[str, Any]) -> str:
    """Ask how severe a value is, given a warning and a critical limit.

    Raises:
        ValueError: The text lacks the value or one of the two limits.
    """
    text = str(values["text"])
    reading = read(text)
    if reading.value is None:
        raise ValueError("severity needs a value with its unit, such as 14 mm/s")
    rest = _MACHINE.sub(" ", text.replace(reading.value, " ", 1))
    limits = _limits(rest)
    return (
        f"Classify the severity: {reading.device} {reading.metric} {reading.value} {reading.unit}, "
        f"warning at {limits[0]}, critical at {limits[1]}."
    )


def extraction(values: dict[str, Any]) -> str:
    """Ask for a reading as JSON; the sentence itself stays as it is."""
    return "Extract JSON: " + _without_request(str(values["text"]))


def summary(values: dict[str, Any]) -> str:
    """Ask for one sentence on three readings; the list itself stays as it is."""
    listed = _without_request(str(values["text"])).rstrip(".")
    return f"Summarise: {listed}."


def trend(values: dict[str, Any]) -> str:
    """Ask whether a short list of whole numbers rises, falls or stays.

    Raises:
        ValueError: There are fewer than four numbers.
    """
    numbers = _NUMBER.findall(_MACHINE.sub(" ", str(values["text"])))
    if len(numbers) < MIN_TREND:
        raise ValueError("a trend needs at least four numbers")
    return f"Trend of {' '.join(numbers[:6])}?"


def conversion(values: dict[str, Any]) -> str:
    """Ask to convert a value to another unit.

    Raises:
        ValueError: The text does not name a value, its unit and the wanted unit.
    """
    text = str(values["text"])
    found = re.search(r"(-?\d+(?:\.\d+)?)\s*(kW|mV|V|mA|A|ms|s|bar|km|cm|mm|m|kg|l|GB|C)\b", text)
    wanted = [
        unit
        for unit in re.findall(
            r"\b(?:in|into|to|many)\s+(W|mV|mA|ms|kPa|cm|mm|m|g|ml|MB|F)\b", text
        )
        if found is None or unit != found.group(2)
    ]
    if found is None or not wanted:
        raise ValueError("write for example: convert 5.2 bar to kPa")
    return f"Convert {found.group(1)} {found.group(2)} to {wanted[0]}."


def topic(values: dict[str, Any]) -> str:
    """Ask for the MQTT topic of a quantity of a device at a site.

    Raises:
        ValueError: The text does not name the quantity or the site.
    """
    text = str(values["text"])
    reading = read(text)
    site = re.search(
        r"\b(?:at|site|in)\s+(?:the\s+)?([a-z]+(?:-[a-z0-9]+)?)\b", text, re.IGNORECASE
    )
    if site is None:
        raise ValueError("name the site, such as: at plant-1")
    name = reading.metric.replace(" ", "-")
    return f"MQTT topic for {name} of {reading.device} at {site.group(1).lower()}?"


def small_talk(values: dict[str, Any]) -> str:
    """Put a question about the model itself in the model's own words.

    Raises:
        ValueError: It is none of the few things the model can say about itself.
    """
    text = str(values["text"])
    for pattern, question in _TALK:
        if re.search(pattern, text, re.IGNORECASE):
            return question
    raise ValueError("this model talks only about itself: who it is, what it can do, where it runs")


_TALK: Final = (
    (r"what (can|do) you|your (abilities|skills)|help me with|able to", "What can you do?"),
    (r"where (do|are) you|which (machine|device)", "Where do you run?"),
    (r"online|internet|cloud", "Are you online?"),
    (r"mqtt", "What is MQTT?"),
    (r"who are you|what are you|your name|introduce", "Who are you?"),
    (r"thank", "Thanks"),
    (r"\b(hello|hi|hey|good (morning|evening))\b", "Hello"),
)


def _unit(written: str) -> str:
    if written.lower() in ("°c", "c", "degrees"):
        return "C"
    return next((unit for unit in UNITS if unit.lower() == written.lower()), written)


def _state(text: str, reading: Reading) -> str:
    low, high = NORMAL[reading.metric]
    if reading.value is not None and not low <= float(reading.value) <= high:
        return "high" if float(reading.value) > high else "low"
    is_high, is_low = _HIGH.search(text) is not None, _LOW.search(text) is not None
    if is_high == is_low:
        raise ValueError(
            f"the text does not say what is wrong with the {reading.metric}: "
            f"between {low:g} and {high:g} is normal here"
        )
    return "high" if is_high else "low"


def _limits(text: str) -> tuple[str, str]:
    warning, critical = _named_limit("warn", text), _named_limit("critical|trip", text)
    if warning is not None and critical is not None:
        return warning, critical
    numbers = _NUMBER.findall(text)
    try:
        first, second = sorted(numbers[-2:], key=float)
    except ValueError as exc:
        raise ValueError("severity needs two limits: the warning and the critical one") from exc
    return first, second


def _named_limit(words: str, text: str) -> str | None:
    found = re.search(rf"\b(?:{words})\w*\D{{0,12}}(\d+(?:\.\d+)?)", text, re.IGNORECASE)
    return found.group(1) if found else None


def _without_request(text: str) -> str:
    bare = _TRAILING.sub("", _WRAPPING.sub("", text.strip(), count=1))
    if not _NUMBER.search(bare):
        raise ValueError(
            "there is no reading in the text: write for example pump-7 reports flow 31 l/min"
        )
    return bare
