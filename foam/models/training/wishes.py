"""What users want of tools: wishes, the tools that serve them, and draws of their values."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from foam.models.training import words
from foam.models.training.frames import Phrasings

__all__ = ["CITIES", "CONFLICTS", "WISHES", "Drawn", "Wish"]

Arguments = dict[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One wish with its values.

    Attributes:
        slots: Texts for the request's frame.
        arguments: The value of each parameter, by the parameter's own name in `Wish.parameters`.
        result: What the tool gives back.
        answer: That result in words.
    """

    slots: Mapping[str, str]
    arguments: Arguments
    result: Any
    answer: str


@dataclass(frozen=True, slots=True)
class Wish:
    """Something a user wants and a tool can do.

    Attributes:
        names: Tool names that serve it; the last fifth is kept for evaluation.
        about: Descriptions of such a tool, between bars.
        parameters: Parameter to the names it may go by in a tool list.
        phrasings: How a user asks.
        draw: Draws values, a result and the sentence for it.
    """

    names: tuple[str, ...]
    about: str
    parameters: Mapping[str, tuple[str, ...]]
    phrasings: Phrasings
    draw: Callable[[random.Random], Drawn]

    def name(self, rng: random.Random, *, unseen: bool) -> str:
        """Draw a tool name from the part that training may use, or from the other."""
        kept = max(1, len(self.names) // 5)
        return rng.choice(self.names[-kept:] if unseen else self.names[:-kept])


def _names(verbs: str, nouns: str) -> tuple[str, ...]:
    made = [f"{verb}_{noun}" for verb, noun in product(verbs.split(), nouns.split())]
    random.Random(len(made)).shuffle(made)
    return tuple(made)


CITIES: Final = (
    "Berlin Paris Oslo Rome Madrid Vienna Prague Lisbon Dublin Athens Zurich Hamburg Lyon Milan "
    "Porto Turin Bergen Graz Ghent Leeds"
).split()
_DEVICE: Final = ("device", "machine", "device_id", "unit", "asset")
_METRIC: Final = ("metric", "quantity", "channel", "signal")


def _read(rng: random.Random) -> Drawn:
    quantity, name = words.metric(rng), words.device(rng)
    text = words.number(quantity, rng)
    value, unit = json.loads(text), quantity.unit
    results: tuple[Any, ...] = (
        {"value": value, "unit": unit},
        {"device": name, "metric": quantity.name, "value": value, "unit": unit},
        f"{text} {unit}",
    )
    return Drawn(
        {"d": name, "m": quantity.name},
        {"device": name, "metric": quantity.name},
        rng.choice(results),
        f"The {quantity.name} of {name} is {text} {unit}.",
    )


def _history(rng: random.Random) -> Drawn:
    quantity, name, hours = words.metric(rng), words.device(rng), rng.randint(2, 72)
    low, high = sorted(rng.sample(range(max(1, quantity.low), quantity.high), 2))
    return Drawn(
        {"d": name, "m": quantity.name, "h": str(hours)},
        {"device": name, "metric": quantity.name, "hours": hours},
        {"min": low, "max": high},
        f"In {hours} hours the {quantity.name} of {name} was between {low} and {high}.",
    )


def _state(state: str) -> Callable[[random.Random], Drawn]:
    def draw(rng: random.Random) -> Drawn:
        name = words.device(rng)
        result = rng.choice(({"ok": True}, {"state": state}, "done", {"status": "ok"}))
        return Drawn({"d": name}, {"device": name}, result, f"{name} is {state} now.")

    return draw


def _switch(state: str) -> Callable[[random.Random], Drawn]:
    def draw(rng: random.Random) -> Drawn:
        drawn = _state(state)(rng)
        arguments = {**drawn.arguments, "state": state}
        return Drawn(drawn.slots, arguments, drawn.result, drawn.answer)

    return draw


def _set(rng: random.Random) -> Drawn:
    quantity, name = words.metric(rng), words.device(rng)
    while name.startswith("valve"):  # a valve is moved by its own tool
        name = words.device(rng)
    value = rng.randint(max(1, quantity.low), quantity.high)
    result = rng.choice(({"ok": True}, {"value": value}, "done"))
    return Drawn(
        {"d": name, "v": str(value), "u": quantity.unit},
        {"device": name, "value": value},
        result,
        f"{name} is set to {value}.",
    )


def _valve(rng: random.Random) -> Drawn:
    name, percent = words.device_of("valve", rng), rng.randint(0, 20) * 5
    result = rng.choice(({"ok": True}, {"percent": percent}, "done"))
    return Drawn(
        {"d": name, "p": str(percent)},
        {"valve": name, "percent": percent},
        result,
        f"{name} is at {percent} percent.",
    )


def _message(rng: random.Random) -> Drawn:
    to, name = rng.choice(words.PEOPLE), words.device(rng)
    states = "down|back|ready|running again|out of order|being repaired|too hot|leaking|blocked"
    said = rng.choice((f"{name} is {rng.choice(states.split('|'))}", f"{name} needs service"))
    result = rng.choice(({"ok": True}, {"sent": True}, "sent"))
    return Drawn({"p": to, "t": said}, {"to": to, "text": said}, result, f"I told {to}: {said}.")


def _service(rng: random.Random) -> Drawn:
    name, day, ticket = words.device(rng), rng.choice(words.DAYS), rng.randint(100, 9999)
    on = day if day in {"today", "tomorrow"} else f"on {day}"
    return Drawn(
        {"d": name, "on": on},
        {"device": name, "day": day},
        {"ticket": ticket},
        f"Service of {name} is booked, ticket {ticket}.",
    )


def _manual(rng: random.Random) -> Drawn:
    query, section = rng.choice(words.TOPICS), f"{rng.randint(1, 9)}.{rng.randint(1, 9)}"
    result = rng.choice(({"section": section}, {"section": section, "title": query.capitalize()}))
    return Drawn({"q": query}, {"query": query}, result, f"See section {section} of the manual.")


def _alarms(rng: random.Random) -> Drawn:
    place, count = words.site(rng), rng.randint(2, 40)
    result = rng.choice(({"count": count}, {"site": place, "alarms": count}, str(count)))
    return Drawn({"s": place}, {"site": place}, result, f"There are {count} alarms at {place}.")


def _weather(rng: random.Random) -> Drawn:
    place, degrees = rng.choice(CITIES), rng.randint(-15, 38)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy"))
    result = {"temperature": degrees, "sky": sky}
    return Drawn({"c": place}, {"city": place}, result, f"It is {degrees} C and {sky} in {place}.")


_ON: Final = Phrasings(
    seen=(
        "[Turn|Switch|Power] on {d}.",
        "[Turn|Switch|Power] {d} on.",
        "Start {d}[ up|].",
        "Get {d} running.",
        "{d} [should|must] [run|be on|start].",
        "{d} on!",
        "Can you [start|turn on|switch on] {d}?",
        "I want {d} to [run|start].",
    ),
    unseen=("Bring {d} up, we need it running.", "Would you start {d} for me?", "Let {d} run."),
)
_OFF: Final = Phrasings(
    seen=(
        "[Turn|Switch|Power] off {d}.",
        "[Turn|Switch|Power] {d} off.",
        "Stop {d}.",
        "Shut [down {d}|{d} down].",
        "{d} [should|must] [stop|be off].",
        "{d} off!",
        "Can you [stop|turn off|switch off|shut down] {d}?",
        "I want {d} to [stop|be off].",
    ),
    unseen=("Take {d} down, we do not need it.", "Would you stop {d} for me?", "Put {d} off."),
)
WISHES: Final = (
    Wish(
        _names(
            "read get query fetch check", "sensor value reading metric measurement current_value"
        ),
        "Read a value of a machine|Current reading of a sensor|Get a metric now"
        "|Live value of a machine|Ask a machine for a reading|Read a sensor",
        {"device": _DEVICE, "metric": _METRIC},
        Phrasings(
            seen=(
                "What is the {m} of {d}[ right now| now| at the moment|]?",
                "Read the {m} of {d}.",
                "Tell me the [current |]{m} [of|on] {d}.",
                "{d} {m}?",
                "[Give|Show] me the [latest|current] {m} of {d}.",
                "I need the {m} [from|of] {d}.",
                "Which {m} does {d} [show|have]?",
                "How high is the {m} [of|on|at] {d}?",
                "Get the {m} [of|from] {d}[ for me|].",
            ),
            unseen=(
                "Could you check what {m} {d} has?",
                "Look up the present {m} reading of {d}.",
                "What does {d} report for {m}?",
            ),
        ),
        _read,
    ),
    Wish(
        _names("get read list show load", "history log past_values series record"),
        "Past values of a metric|History of a machine|Values of the last hours"
        "|Read the log of a sensor",
        {"device": _DEVICE, "metric": _METRIC, "hours": ("hours", "last_hours", "window_hours")},
        Phrasings(
            seen=(
                "Show the {m} of {d} over the last {h} hours.",
                "How was the {m} of {d} in the [last|past] {h} hours?",
                "{m} of {d}, last {h} hours.",
                "Give me {h} hours of {m} [from|of] {d}.",
                "[History|Log] of {m} on {d} for {h} hours.",
                "What did the {m} of {d} do in the last {h} hours?",
            ),
            unseen=(
                "I want to see {h} hours back: {m} on {d}.",
                "During the past {h} hours, what {m} did {d} have?",
            ),
        ),
        _history,
    ),
    Wish(
        _names("turn_on switch_on start power_on enable", "device machine unit asset"),
        "Start a machine|Switch a machine on|Turn on a device",
        {"device": _DEVICE},
        _ON,
        _state("on"),
    ),
    Wish(
        _names("turn_off switch_off stop power_off disable shut_down", "device machine unit asset"),
        "Stop a machine|Switch a machine off|Shut down a device",
        {"device": _DEVICE},
        _OFF,
        _state("off"),
    ),
    Wish(
        _names("switch set toggle", "power state device_state on_off run_state"),
        "Switch a machine on or off|Turn a device on or off|Set the run state",
        {"device": _DEVICE, "state": ("state", "power", "to")},
        _ON,
        _switch("on"),
    ),
    Wish(
        _names("switch set toggle", "power state device_state on_off run_state"),
        "Switch a machine on or off|Turn a device on or off|Set the run state",
        {"device": _DEVICE, "state": ("state", "power", "to")},
        _OFF,
        _switch("off"),
    ),
    Wish(
        _names("set write change adjust", "point value setpoint target setting"),
        "Change a set point|Set the target of a machine|Write a setting|Set a value",
        {"device": _DEVICE, "value": ("value", "target", "setpoint", "level")},
        Phrasings(
            seen=(
                "Set {d} to {v}[ {u}|].",
                "Change [the set point of |]{d} to {v}[ {u}|].",
                "Adjust {d} to {v}[ {u}|].",
                "{d} should be at {v}[ {u}|].",
                "New set point for {d}: {v}[ {u}|].",
                "[Put|Bring] {d} to {v}[ {u}|].",
                "Make {d} run at {v}[ {u}|].",
            ),
            unseen=("I would like {d} at {v} {u}.", "Let {d} go to {v}.", "Use {v} for {d}."),
        ),
        _set,
    ),
    Wish(
        _names("set move open position drive", "valve valve_position flap throttle"),
        "Move a valve|Open or close a valve|Set how far a valve is open",
        {"valve": ("valve", "valve_id", "name"), "percent": ("percent", "position", "opening")},
        Phrasings(
            seen=(
                "Open {d} to {p} [percent|%].",
                "Set {d} to {p} [percent|%].",
                "Move {d} to {p} [percent|%].",
                "{d} to {p} [percent|%].",
                "[Put|Drive] {d} [to|at] {p} [percent|%].",
            ),
            unseen=("Let {d} be {p} percent open.", "I want {d} at {p} % opening."),
        ),
        _valve,
    ),
    Wish(
        _names("send post write push", "message note alert notification sms"),
        "Send a message to a person|Tell a person something|Write to the staff",
        {"to": ("to", "recipient", "person"), "text": ("text", "message", "body")},
        Phrasings(
            seen=(
                "Tell {p} that {t}.",
                "Let {p} know that {t}.",
                "Send {p} the message: {t}.",
                "Inform {p} that {t}.",
                "Notify {p}: {t}.",
                "Write to {p} that {t}.",
                "Message {p}: {t}.",
            ),
            unseen=("{p} should know that {t}.", "Give {p} a note saying {t}."),
        ),
        _message,
    ),
    Wish(
        _names("book plan schedule create order", "service maintenance ticket work_order repair"),
        "Book maintenance|Plan service of a machine|Create a work order",
        {"device": _DEVICE, "day": ("day", "date", "when")},
        Phrasings(
            seen=(
                "[Book|Plan|Schedule] [maintenance|service] for {d} {on}.",
                "[Book|Plan|Schedule] {d} for [maintenance|service] {on}.",
                "{d} needs [maintenance|service|repair] {on}.",
                "Open a ticket for {d} {on}.",
                "Have {d} [serviced|repaired] {on}.",
                "Create a work order for {d} {on}.",
            ),
            unseen=("Someone must service {d} {on}.", "Arrange a repair of {d} {on}."),
        ),
        _service,
    ),
    Wish(
        _names("search find look_up query ask", "manual handbook docs section guide"),
        "Search the manual|Find a section of the handbook|Look up instructions",
        {"query": ("query", "topic", "question", "search")},
        Phrasings(
            seen=(
                "What does the manual say about {q}?",
                "Find {q} in the manual.",
                "Where in the manual is {q}?",
                "Look up {q}[ in the handbook|].",
                "I need the instructions for {q}.",
                "Search the [manual|handbook] for {q}.",
                "How does {q} work?",
            ),
            unseen=("Which section explains {q}?", "Show me the instructions on {q}."),
        ),
        _manual,
    ),
    Wish(
        _names("list count get show", "alarms alerts active_alarms open_alerts warnings"),
        "Active alarms of a place|List alerts at a site|Count open alarms",
        {"site": ("site", "place", "area", "location")},
        Phrasings(
            seen=(
                "Which [alarms|alerts] are active at {s}?",
                "How many [alarms|alerts] [are there|do we have] at {s}?",
                "[List|Show] the [alarms|alerts] [at|of|in] {s}.",
                "Any [alarms|alerts] at {s}?",
                "[Alarms|Alerts] at {s}?",
                "Are there [open |]alarms at {s}?",
            ),
            unseen=("Does {s} have open alarms?", "Tell me how many alerts {s} has."),
        ),
        _alarms,
    ),
    Wish(
        ("get_weather", "weather", "forecast", "read_weather", "weather_report", "local_weather"),
        "Weather of a city|How the weather is|Weather forecast",
        {"city": ("city", "place", "town")},
        Phrasings(
            seen=(
                "[What is|How is] the weather in {c}?",
                "Weather in {c}?",
                "Tell me the weather in {c}.",
                "Is it [warm|cold|raining] in {c}?",
                "Weather for {c}.",
            ),
            unseen=("What is it like outside in {c}?", "How does the sky look in {c}?"),
        ),
        _weather,
    ),
)
CONFLICTS: Final = {2: {4, 5}, 3: {4, 5}, 4: {2, 3, 5}, 5: {2, 3, 4}}
"""Wishes whose tools would serve the same request; they never share a list."""
