"""Requests that a tool can serve: choose it, fill its arguments, and put its result into words.

A tool is shown to the model as one line, ``read_sensor(device, metric): Read a sensor``, with or
without the description. The same wish is served by tools of many names, with their parameters in
any order and under other names, so that the model has to read the list instead of knowing it by
heart.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from foam.models.training.frames import Phrasings, write
from foam.models.training.wishes import CITIES, CONFLICTS, WISHES

__all__ = [
    "NO_TOOL",
    "ToolCase",
    "answer_text",
    "call_text",
    "draw_case",
    "tool_list",
]


NO_TOOL: Final = "none"
"""The tool the model names when none of the list fits."""
_FAILURES: Final = (
    "device is offline|timeout|access denied|not found|no connection|out of range|busy|locked"
    "|unknown device|not allowed at night"
).split("|")


@dataclass(frozen=True, slots=True)
class ToolCase:
    """A request, the tools on offer, the right call and what follows from it.

    Attributes:
        tools: The list as the model sees it.
        request: The user's text.
        call: The right call as JSON text.
        name: Of the tool it calls.
        result: The tool's result as text; None when no tool fits.
        answer: The final sentence; None when no tool fits.
    """

    tools: str
    request: str
    call: str
    name: str
    result: str | None
    answer: str | None


def tool_list(tools: Mapping[str, Sequence[str]], about: Mapping[str, str] | None = None) -> str:
    """Write tools, name to parameter names, as the model reads them.

    Args:
        tools: In their order.
        about: Descriptions by name, where there are any.
    """
    lines = ["Tools:"]
    for name, parameters in tools.items():
        description = f": {about[name]}" if about and name in about else ""
        lines.append(f"{name}({', '.join(parameters)}){description}")
    return "\n".join(lines)


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """Write a call as the model does."""
    return json.dumps({"tool": name, "arguments": dict(arguments)})


def answer_text(sentence: str) -> str:
    """Write a final sentence as the model does while it has tools."""
    return json.dumps({"answer": sentence})


_OTHER: Final = Phrasings(
    seen=(
        "Tell me a joke.",
        "What is the capital of {c}?",
        "Write a poem about {w}.",
        "Who won the game?",
        "Play some music.",
        "Order a pizza.",
        "How old are you?",
        "What is 17 times 23?",
        "Translate {w} to French.",
        "Book a flight to {c}.",
    ),
    unseen=("Sing a song about {w}.", "Recommend a restaurant in {c}.", "Who wrote Hamlet?"),
)


def draw_case(rng: random.Random, *, unseen: bool) -> ToolCase:
    """Draw a request with one to five tools, of which at most one fits it.

    Args:
        rng: Source of every choice.
        unseen: Whether the request is worded, and in half the cases the fitting tool named, as
            training never saw it.
    """
    chosen = rng.randrange(len(WISHES))
    wish = WISHES[chosen]
    others = [n for n in range(len(WISHES)) if n not in {chosen, *CONFLICTS.get(chosen, ())}]
    fits = rng.random() > 0.12
    listed = [chosen] if fits else []
    for other in rng.sample(others, rng.randint(1, 3) + (not fits)):
        if not CONFLICTS.get(other, set()) & set(listed):
            listed.append(other)
    rng.shuffle(listed)
    tools: dict[str, list[str]] = {}
    about: dict[str, str] | None = {} if rng.random() < 0.3 else None
    name, order, renamed = NO_TOOL, [], {}
    for number in listed:
        offered = WISHES[number]
        label = offered.name(rng, unseen=unseen and number == chosen and rng.random() < 0.5)
        names = {p: rng.choice(shown) for p, shown in offered.parameters.items()}
        parameters = rng.sample(list(names), len(names))
        tools[label] = [names[p] for p in parameters]
        if about is not None:
            about[label] = rng.choice(offered.about.split("|"))
        if number == chosen:
            name, order, renamed = label, parameters, names
    if not fits and rng.random() < 0.3:
        request = _OTHER.draw(rng, unseen=unseen)
        slots = {"c": rng.choice(CITIES), "w": rng.choice(("rain", "pumps", "summer", "trains"))}
        return _refused(tool_list(tools, about), write(request, slots, rng))
    drawn = wish.draw(rng)
    request = write(wish.phrasings.draw(rng, unseen=unseen), drawn.slots, rng)
    if not fits:
        return _refused(tool_list(tools, about), request)
    call = call_text(name, {renamed[p]: drawn.arguments[p] for p in order})
    result, answer = drawn.result, drawn.answer
    if rng.random() < 0.12:
        failure = rng.choice(_FAILURES)
        result, answer = {"error": failure}, f"That did not work: {failure}."
    text = result if isinstance(result, str) else json.dumps(result)
    return ToolCase(tool_list(tools, about), request, call, name, text, answer)


def _refused(tools: str, request: str) -> ToolCase:
    return ToolCase(tools, request, call_text(NO_TOOL, {}), NO_TOOL, None, None)
