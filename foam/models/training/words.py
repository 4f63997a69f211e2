"""The small world of the demo model: machines, quantities, units, people, and what is done when.

Every list is a tuple, so that a seeded generator draws the same examples everywhere.
"""

import random
import string
from dataclasses import dataclass
from typing import Final

__all__ = [
    "ABOVE",
    "ACTIONS",
    "BELOW",
    "DAYS",
    "METRICS",
    "PEOPLE",
    "SITES",
    "TOPICS",
    "UNITS_IN_WORDS",
    "WORD_OF_STATE",
    "Metric",
    "device",
    "device_of",
    "metric",
    "number",
    "site",
]


@dataclass(frozen=True, slots=True)
class Metric:
    """A quantity that machines report.

    Attributes:
        name: As written in texts and answers.
        unit: Its one unit.
        low: Smallest plausible value.
        high: Largest plausible value.
        fine: Whether values come with one decimal now and then.
    """

    name: str
    unit: str
    low: int
    high: int
    fine: bool


METRICS: Final = (
    Metric("temperature", "C", -20, 120, fine=True),
    Metric("humidity", "%", 5, 99, fine=False),
    Metric("pressure", "bar", 1, 16, fine=True),
    Metric("vibration", "mm/s", 0, 30, fine=True),
    Metric("voltage", "V", 2, 480, fine=False),
    Metric("current", "A", 0, 90, fine=True),
    Metric("flow", "l/min", 1, 400, fine=False),
    Metric("battery level", "%", 1, 99, fine=False),
    Metric("noise", "dB", 25, 120, fine=False),
    Metric("co2", "ppm", 350, 3000, fine=False),
    Metric("speed", "rpm", 100, 5000, fine=False),
    Metric("power", "kW", 1, 250, fine=True),
    Metric("level", "cm", 1, 300, fine=False),
)

_KINDS: Final = (
    "pump boiler fan motor chiller conveyor tank valve freezer greenhouse turbine battery inverter "
    "camera gateway compressor router heater robot sensor silo press oven meter"
).split()
_MORE_KINDS: Final = (
    "mixer lathe crane mill dryer furnace kiln burner blower filter cooler gearbox spindle lift "
    "agitator extruder cutter saw grinder welder printer charger generator transformer relay panel "
    "line cell station unit probe gauge scale hopper feeder separator centrifuge reactor column "
    "exchanger condenser evaporator tower vent damper lamp door gate barrier tracker node hub "
    "drone rack bay loader stacker shuttle wrapper labeller palletiser winch hoist drill"
).split()
SITES: Final = (
    "north south east west plant-1 plant-2 plant-3 lab roof yard dock hall-a hall-b hall-c farm "
    "depot cellar harbour campus line-2 zone-4 site-9 mill tower quarry workshop"
).split()
PEOPLE: Final = (
    "the shift lead|the operator|maintenance|Anna|Ben|Carla|the control room|the night shift|Deniz"
    "|the foreman|Erik|the service team|logistics|Fatima|the plant manager|security|Georg|the lab"
).split("|")
DAYS: Final = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow 2026-03-14 2026-11-02 "
    "2027-01-20"
).split()
TOPICS: Final = (
    "bearing replacement|greasing|lockout|rotor balancing|filter cleaning|leak detection|oil change"
    "|belt tension|alignment|cold start|emergency stop|spare parts|calibration|seal inspection"
    "|cable routing|valve adjustment|safety shoes|noise protection|cooling water|winter operation"
).split("|")

UNITS_IN_WORDS: Final = {
    "C": ("°C", "degrees", "degrees Celsius", "deg C"),
    "%": ("percent", "pct"),
    "V": ("volts", "volt"),
    "A": ("amps", "amperes"),
    "dB": ("decibels",),
    "kW": ("kilowatts",),
    "cm": ("centimetres",),
    "l/min": ("litres per minute", "litres a minute"),
}
"""Other spellings of a unit that a reading may carry; answers use the unit itself."""

ACTIONS: Final = {
    ("temperature", "high"): "Reduce the load and check the cooling.",
    ("temperature", "low"): "Turn on the heating and check the insulation.",
    ("humidity", "high"): "Start the dehumidifier and increase ventilation.",
    ("humidity", "low"): "Start the humidifier.",
    ("pressure", "high"): "Open the relief valve and inspect the line.",
    ("pressure", "low"): "Check the line for leaks.",
    ("vibration", "high"): "Stop the machine and inspect the bearings.",
    ("vibration", "low"): "No action is needed.",
    ("voltage", "high"): "Disconnect the load and check the supply.",
    ("voltage", "low"): "Check the supply and the wiring.",
    ("current", "high"): "Reduce the load and check for a short circuit.",
    ("current", "low"): "Check that the device is switched on.",
    ("flow", "high"): "Throttle the valve.",
    ("flow", "low"): "Clean the filter and check the pump.",
    ("battery level", "high"): "Stop charging.",
    ("battery level", "low"): "Charge or replace the battery.",
    ("noise", "high"): "Inspect the machine for loose parts.",
    ("noise", "low"): "No action is needed.",
    ("co2", "high"): "Open the windows and increase ventilation.",
    ("co2", "low"): "No action is needed.",
    ("speed", "high"): "Lower the speed set point.",
    ("speed", "low"): "Check the drive and the belt.",
    ("power", "high"): "Shift the load to off-peak hours.",
    ("power", "low"): "Check that the device is switched on.",
    ("level", "high"): "Stop the inflow and open the drain.",
    ("level", "low"): "Refill the tank.",
}
"""The one remedy for each quantity that is too high or too low."""

ABOVE: Final = (
    "is too high|is above the limit|is far above normal|exceeds the limit|keeps climbing|is way up"
    "|keeps rising|is rising fast|went over the limit|is over the limit|has gone too high"
    "|is much too high|is higher than it should be|has jumped|is above its maximum"
).split("|")
BELOW: Final = (
    "is too low|is below the limit|is far below normal|dropped under the limit|keeps falling"
    "|is way down|keeps dropping|is falling fast|went under the limit|is under the limit"
    "|has gone too low|is much too low|is lower than it should be|has dropped"
    "|is below its minimum"
).split("|")

WORD_OF_STATE: Final = {
    ("temperature", "high"): (
        "{d} is [too|far too|much too|getting too] hot",
        "{d} [overheats|is overheating|runs hot]",
        "{d} gets hotter and hotter",
        "it is [too|far too] [hot|warm] in {d}",
        "{d} has reached {v} C and keeps climbing",
    ),
    ("temperature", "low"): (
        "{d} is [too|far too|much too] cold",
        "{d} is freezing",
        "{d} gets colder and colder",
    ),
    ("humidity", "high"): ("{d} is [too|far too] damp", "the air at {d} is too humid"),
    ("humidity", "low"): ("{d} is [too|far too] dry", "the air at {d} is too dry"),
    ("pressure", "high"): ("{d} is over-pressurised", "there is too much pressure in {d}"),
    ("pressure", "low"): ("{d} [loses|is losing|lost] pressure", "there is no pressure in {d}"),
    ("vibration", "high"): (
        "{d} vibrates [too much|heavily|strongly|badly]",
        "{d} is shaking [badly|heavily|too much|far too much]",
        "{d} [shakes|rattles] [badly|a lot]",
        "{d} is vibrating [heavily|badly|a lot]",
    ),
    ("vibration", "low"): ("{d} [hardly|barely] vibrates",),
    ("flow", "high"): ("{d} delivers too much flow", "too much flow through {d}"),
    ("flow", "low"): (
        "{d} delivers [too little|hardly any|almost no] flow",
        "[hardly any|too little|almost no] flow [through|at|from] {d}",
        "[only|just] {v} l/min of flow [through|at] {d}",
        "{d} [only delivers|delivers only] {v} l/min",
    ),
    ("battery level", "high"): ("the battery of {d} is overcharged",),
    ("battery level", "low"): (
        "the battery of {d} is [nearly|almost] empty",
        "the charge of {d} runs out",
        "{d} has hardly any battery left",
    ),
    ("noise", "high"): (
        "{d} is [too|far too|very] [loud|noisy]",
        "{d} makes [too much|a lot of] noise",
    ),
    ("noise", "low"): ("{d} is [very|unusually] quiet",),
    ("co2", "high"): (
        "the air at {d} is stuffy",
        "there is too much co2 at {d}",
        "the air at {d} has too much CO2",
        "the co2 at {d} keeps climbing",
    ),
    ("speed", "high"): ("{d} [spins|turns|runs] [too|far too] fast",),
    ("speed", "low"): ("{d} [spins|turns|runs] [too slowly|too slow]",),
    ("power", "high"): ("{d} uses too much power", "{d} draws too much power"),
    ("power", "low"): ("{d} uses hardly any power",),
    ("current", "high"): ("{d} draws too much current",),
    ("current", "low"): ("{d} draws hardly any current",),
    ("voltage", "high"): ("{d} gets too many volts", "there is overvoltage at {d}"),
    ("voltage", "low"): ("{d} gets too few volts", "there is undervoltage at {d}"),
    ("level", "high"): ("{d} is about to overflow", "{d} is overfull"),
    ("level", "low"): ("{d} [runs|is running] [empty|dry]", "the tank {d} is nearly empty"),
}
"""Plain words for a quantity out of its limits, as frames with a device and a value."""


def device(rng: random.Random) -> str:
    """Draw a machine name, ``pump-7``; one in six is a code such as ``tk-204``."""
    draw = rng.random()
    if draw < 0.16:
        letters = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 3)))
        return f"{letters}-{rng.randint(1, 999)}"
    kind = rng.choice(_KINDS if draw < 0.72 else _MORE_KINDS)
    return f"{kind}-{rng.randint(1, 99)}"


def device_of(kind: str, rng: random.Random) -> str:
    """Draw a machine of one kind."""
    return f"{kind}-{rng.randint(1, 99)}"


def site(rng: random.Random) -> str:
    """Draw a place."""
    return rng.choice(SITES)


def metric(rng: random.Random) -> Metric:
    """Draw a quantity."""
    return rng.choice(METRICS)


def number(quantity: Metric, rng: random.Random) -> str:
    """Draw a value of a quantity as it would be written: whole, or with one decimal."""
    drawn = rng.uniform(quantity.low, quantity.high)
    return f"{drawn:.1f}" if quantity.fine and rng.random() < 0.6 else str(round(drawn))
