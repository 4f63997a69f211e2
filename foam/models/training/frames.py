"""Phrasings: sentences with choices and slots, and the ways people write the same sentence.

A frame is text with ``[a|b|]`` for a choice and ``{name}`` for a slot: ``Turn [on|off] {device}.``
`Phrasings` keeps the frames of one kind of request in two lists. Training draws from ``seen``
alone; ``unseen`` is kept for evaluation, so that a model is measured on wordings it never met.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["Phrasings", "expand", "fill", "plain", "write"]

_CHOICE: Final = re.compile(r"\[([^\[\]]*)\]")
_SLOT: Final = re.compile(r"(\{\w+\})")
_OPENERS: Final = (
    "Please ",
    "please ",
    "Hi, ",
    "Hello, ",
    "Hey, ",
    "Could you help: ",
    "Quick question: ",
    "Operator here: ",
    "For the log: ",
    "Next: ",
    "OK, ",
)
_CLOSERS: Final = (" Thanks.", " thanks", " Thank you.", ", please", " please")


@dataclass(frozen=True, slots=True)
class Phrasings:
    """The frames of one kind of request.

    Attributes:
        seen: Frames that training may use.
        unseen: Frames for evaluation only.
    """

    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    def draw(self, rng: random.Random, *, unseen: bool) -> str:
        """Draw a frame from one of the two lists."""
        return rng.choice(self.unseen if unseen else self.seen)


def expand(frame: str, rng: random.Random) -> str:
    """Decide every ``[a|b]`` of a frame; slots stay."""
    return _CHOICE.sub(lambda found: rng.choice(found.group(1).split("|")), frame)


def plain(frame: str) -> str:
    """Decide every ``[a|b]`` of a frame for the first; slots stay."""
    return _CHOICE.sub(lambda found: found.group(1).split("|")[0], frame)


def fill(frame: str, slots: Mapping[str, str]) -> str:
    """Put values into the slots of an expanded frame.

    Raises:
        KeyError: A slot of the frame has no value.
    """
    return _SLOT.sub(lambda found: slots[found.group(1)[1:-1]], frame)


def write(frame: str, slots: Mapping[str, str], rng: random.Random) -> str:
    """Expand and fill a frame, and vary case, politeness and punctuation.

    Only the words of the frame change: values are copied into answers letter by letter, so the
    slots keep their case.
    """
    text = expand(frame, rng)
    case = rng.random()
    if case < 0.2:
        text = _recase(text, str.lower)
    elif case < 0.22:
        text = _recase(text, str.upper)
    if rng.random() < 0.25:
        text = text.rstrip(".?!")
    elif rng.random() < 0.05:
        text = text.rstrip(".?!") + rng.choice(("!", "??", " ?", " .", "..."))
    if rng.random() < 0.12:
        text = rng.choice(_OPENERS) + text[:1].lower() + text[1:]
    if rng.random() < 0.08:
        text += rng.choice(_CLOSERS)
    return fill(text, slots)


def _recase(text: str, change: Callable[[str], str]) -> str:
    return "".join(part if _SLOT.fullmatch(part) else change(part) for part in _SLOT.split(text))
