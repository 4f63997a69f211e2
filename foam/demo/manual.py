"""Answers from the maintenance manual: the passage that lies nearest to the question.

Runs on the node ``edge-manual``. Nothing is generated: the answer is quoted word for word, with its
section and score, and a question that the manual does not cover is answered with ``found: false``.
"""

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from foam.settings import load_settings
from registry.encoders import Encoder, Vectors, default_folder, load_encoder

__all__ = ["DEFAULT_MANUAL", "Manual", "Passage", "answer", "read_manual"]

DEFAULT_MANUAL: Final = Path(__file__).resolve().parent / "data" / "manual.md"

MIN_SCORE: Final = 0.30
"""Cosine below which nothing is quoted: the demo's questions score above 0.5, unrelated ones below
0.25."""

_HEADING: Final = re.compile(r"^## (\d+\.\d+) (.+)$", re.MULTILINE)
_SENTENCE_END: Final = re.compile(r"(?<=[.:;!?]) ")


@dataclass(frozen=True, slots=True)
class Passage:
    """One paragraph of the manual.

    Attributes:
        section: Number of its section, ``2.4``.
        title: Title of its section.
        text: The paragraph.
    """

    section: str
    title: str
    text: str


def read_manual(path: Path = DEFAULT_MANUAL) -> list[Passage]:
    """Split a manual into its paragraphs.

    Args:
        path: Markdown file with headings ``## 2.4 Title``.

    Raises:
        ValueError: The file has no such section.
    """
    parts = _HEADING.split(path.read_text(encoding="utf-8"))[1:]
    passages = [
        Passage(section=number, title=title.strip(), text=" ".join(paragraph.split()))
        for number, title, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        for paragraph in body.strip().split("\n\n")
        if paragraph.strip()
    ]
    if not passages:
        raise ValueError(f"{path} has no sections")
    return passages


class Manual:
    """A manual with the vectors of its passages.

    Args:
        passages: Its paragraphs.
        encoder: Turns text into unit vectors; used from one thread.
    """

    def __init__(self, *, passages: Sequence[Passage], encoder: Encoder) -> None:
        self._passages = passages
        self._encoder = encoder
        self._vectors: Vectors = encoder.encode([f"{p.title}. {p.text}" for p in passages])

    def search(self, question: str, count: int = 3) -> list[tuple[float, Passage]]:
        """Return the nearest passages of different sections, best first.

        Args:
            question: What is asked.
            count: How many at most.

        Returns:
            Pairs of cosine (-1 to 1) and passage.
        """
        scores = self._vectors @ self._encoder.encode([question])[0]
        best: dict[str, tuple[float, Passage]] = {}
        for place in np.argsort(-scores):
            passage = self._passages[int(place)]
            best.setdefault(passage.section, (float(scores[place]), passage))
        return list(best.values())[:count]

    def section(self, number: str) -> str:
        """Return the whole text of a section."""
        return " ".join(p.text for p in self._passages if p.section == number)


@cache
def _manual() -> Manual:
    """The manual of this process; its vectors take about half a second."""
    settings = load_settings()
    folder = settings.encoder or default_folder()
    return Manual(passages=read_manual(), encoder=load_encoder(settings.encoder_backend, folder))


def answer(text: str) -> Generator[str, None, dict[str, Any]]:
    """Quote the section of the manual that answers a question.

    Args:
        text: The question.

    Yields:
        The section, sentence by sentence.

    Returns:
        ``found``, ``section``, ``title``, ``score``, ``passage`` (the nearest paragraph), ``quote``
        (the whole section) and ``also`` (titles of the next nearest sections).
    """
    manual = _manual()
    (score, best), *others = manual.search(text)
    if score < MIN_SCORE:
        yield "The manual has nothing on this."
        return {"found": False, "score": round(score, 3), "nearest": best.title}
    quote = manual.section(best.section)
    for sentence in _SENTENCE_END.split(quote):
        yield sentence + " "
    return _found(score, best, quote, others)


def _found(
    score: float, best: Passage, quote: str, others: Sequence[tuple[float, Passage]]
) -> dict[str, Any]:
    return {
        "found": True,
        "section": best.section,
        "title": best.title,
        "score": round(score, 3),
        "passage": best.text,
        "quote": quote,
        "also": [f"{passage.section} {passage.title}" for _, passage in others],
    }
