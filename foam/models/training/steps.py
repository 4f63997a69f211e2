"""Compound requests: several wishes in one text, and the ordered list of steps they make."""

import json
import random
from typing import Final

from foam.models.training import words
from foam.models.training.frames import Phrasings, expand, fill, write

__all__ = ["draw_request"]

_CLAUSES: Final = (
    "[read|get|check|fetch] the {m} of {d}",
    "[convert|change] it [to|into] {u}",
    "send [it|the result|the report|the answer] to {p}",
    "turn on {d}",
    "turn off {d}",
    "[start|stop|restart|inspect|clean|reset|lock] {d}",
    "open {d} to {n} percent",
    "set {d} to {n}",
    "classify the [alert|alarm]",
    "summarise the readings",
    "extract the fields as JSON",
    "write a [short |]report",
    "wait {n} minutes",
    "[log|store] the [value|result]",
    "[tell|inform|call] {p}",
    "find {q} in the manual",
    "compare it with {d}",
    "plot the trend",
    "[book|plan] maintenance for {d}",
    "list the alarms at {s}",
    "measure the {m} again",
    "check the weather",
    "close the ticket",
    "count the alarms",
)
_BODIES: Final = {
    2: Phrasings(
        seen=(
            "{a}, then {b}",
            "{a} and then {b}",
            "{a} and {b}",
            "first {a}, then {b}",
            "{a}. Then {b}",
            "{a}; {b}",
            "{a}, after that {b}",
            "before you {b}, {a}",
            "after you {a}, {b}",
            "{a} before you {b}",
            "{b} after you {a}",
            "start with this: {a}; next {b}",
        ),
        unseen=(
            "{a}, and when that is done {b}",
            "begin: {a}. Afterwards {b}",
            "{a}, followed by: {b}",
        ),
    ),
    3: Phrasings(
        seen=(
            "{a}, then {b} and {c}",
            "{a}, {b} and {c}",
            "first {a}, then {b}, [finally|lastly] {c}",
            "{a}, then {b}, then {c}",
            "{a}. Then {b}. After that {c}",
            "{a}; {b}; {c}",
            "1. {a} 2. {b} 3. {c}",
            "{a} and {b}, and [finally|at the end] {c}",
            "after you {a}, {b} and then {c}",
            "before you {b}, {a}; [finally|then] {c}",
        ),
        unseen=(
            "to begin {a}, next {b}, and last {c}",
            "{a}, and when that is done {b} and {c}",
            "{a}. Next {b}. In the end {c}",
        ),
    ),
    4: Phrasings(
        seen=(
            "{a}, {b}, {c} and {d}",
            "first {a}, then {b}, then {c}, finally {d}",
            "{a}; {b}; {c}; {d}",
            "{a}. Then {b}. After that {c}. Finally {d}",
            "{a} and {b}, then {c} and {d}",
            "1. {a} 2. {b} 3. {c} 4. {d}",
        ),
        unseen=("to begin {a}, next {b}, then {c}, and last {d}", "{a}. Next {b}, {c} and {d}"),
    ),
}
_REQUEST: Final = Phrasings(
    seen=(
        "Split into steps: {r}.",
        "[Split|Break|Divide] [this|the request|this request] into steps: {r}.",
        "[List|Write|Name] the steps: {r}.",
        "What are the steps [of|in]: {r}?",
        "[Make a plan|Plan]: {r}.",
        "{r}. [List|Write] the steps.",
        "Steps as JSON: {r}.",
        "[Break|Split] [up|this up|down]: {r}.",
        "Turn [this|this request] into a list of steps: {r}.",
        "Which steps [are in|does] this [request|need]: {r}?",
        "In which order? {r}.",
        "Make a list of steps from: {r}.",
    ),
    unseen=(
        "Decompose this request: {r}.",
        "Give me the single steps of this task: {r}.",
        "I want this as ordered steps: {r}.",
        "{r} - what are the steps?",
    ),
)


def _clause(rng: random.Random) -> str:
    slots = {
        "d": words.device(rng),
        "m": words.metric(rng).name,
        "n": str(rng.randint(1, 19) * 5),
        "p": rng.choice(words.PEOPLE),
        "q": rng.choice(words.TOPICS),
        "s": words.site(rng),
        "u": rng.choice(("F", "kPa", "W", "mV", "mm", "JSON", "percent")),
    }
    return fill(expand(rng.choice(_CLAUSES), rng), slots)


def draw_request(rng: random.Random, *, unseen: bool) -> tuple[str, str]:
    """Draw a compound request and its steps, in the order in which they are to be done.

    Args:
        rng: Source of every choice.
        unseen: Whether it is worded as training never saw it.

    Returns:
        The text and a JSON list of strings.
    """
    count = rng.choice((2, 2, 2, 3, 3, 4))
    steps: list[str] = []
    while len(steps) < count:
        clause = _clause(rng)
        if clause not in steps:
            steps.append(clause)
    frame = _BODIES[count].draw(rng, unseen=unseen)
    body = fill(expand(frame, rng), dict(zip("abcd", steps, strict=False)))
    if rng.random() < 0.3:
        body = body[:1].upper() + body[1:]
    return write(_REQUEST.draw(rng, unseen=unseen), {"r": body}, rng), json.dumps(steps)
