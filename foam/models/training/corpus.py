"""The training text of the demo model: seeded examples of its tasks, each with its right answer.

`Corpus.draw` gives one `Example`. Two things are kept from training and used to measure it:

* one in twenty prompts, chosen by a checksum of its text (`is_held_out`): new combinations of
  wordings that training knows;
* the ``unseen`` wordings of every task (`foam.models.training.frames.Phrasings`).
"""

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from foam.models.training.frames import fill, plain, write
from foam.models.training.readings import READING_TASKS
from foam.models.training.steps import draw_request
from foam.models.training.toolcalls import answer_text, draw_case
from foam.models.training.wordings import TALK

__all__ = ["TASKS", "WEIGHTS", "Corpus", "Example", "is_held_out"]

WEIGHTS: Final[Mapping[str, float]] = {
    "classify": 6.0,
    "extract": 3.0,
    "summarise": 3.0,
    "convert": 2.5,
    "advise": 3.0,
    "topic": 1.5,
    "trend": 2.0,
    "chat": 0.7,
    "tool": 2.5,
    "report": 2.0,
    "split": 3.0,
}
"""Share of each task among the examples, before dividing by the sum."""
TASKS: Final = tuple(WEIGHTS)
_HELD_OUT_PART: Final = 20


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation and the answer that ends it.

    Attributes:
        task: One of `TASKS`.
        turns: Role and text of every message before the answer; the last is the user's or a tool's.
        answer: What the assistant says next.
    """

    task: str
    turns: tuple[tuple[str, str], ...]
    answer: str


def is_held_out(example: Example) -> bool:
    """Tell whether training must not see this prompt, whoever draws it."""
    prompt = "\x00".join(f"{role}\x01{text}" for role, text in example.turns[:2])
    return zlib.crc32(prompt.encode()) % _HELD_OUT_PART == 0


class Corpus:
    """An endless stream of examples from one random source.

    Args:
        rng: Source of every choice; the same seed gives the same examples.
        weights: Share of each task; `WEIGHTS` by default. Tasks that it lacks keep their share.
        plain: Part of the requests about readings, 0 to 1, that training sees in the first wording
            of their task, unvaried: what is to be worked out is learnt sooner when the numbers
            stand where they always do.
    """

    def __init__(
        self,
        rng: random.Random,
        weights: Mapping[str, float] | None = None,
        *,
        plain: float = 0.0,
    ) -> None:
        self._rng = rng
        self._plain = plain
        self._weights = {**WEIGHTS, **(weights or {})}
        if unknown := sorted(set(self._weights) - set(WEIGHTS)):
            raise ValueError(f"no such task: {', '.join(unknown)}; there are {', '.join(TASKS)}")

    def draw(self, task: str | None = None, *, unseen: bool = False) -> Example:
        """Draw an example, held out or not.

        Args:
            task: One of `TASKS`; by weight when None.
            unseen: Whether to use wordings that training never sees.
        """
        rng = self._rng
        if task is None:
            task = rng.choices(list(self._weights), list(self._weights.values()))[0]
        if task in READING_TASKS:
            phrasings, draw = READING_TASKS[task]
            slots, answer = draw(rng, unseen=unseen)
            text = write(phrasings.draw(rng, unseen=unseen), slots, rng)
            return Example(task, (("user", text),), answer)
        if task == "chat":
            answer, phrasings = rng.choice(TALK)
            text = write(phrasings.draw(rng, unseen=unseen), {}, rng)
            return Example(task, (("user", text),), answer)
        if task == "split":
            text, answer = draw_request(rng, unseen=unseen)
            return Example(task, (("user", text),), answer)
        return self._tool(task, unseen=unseen)

    def training(self) -> Example:
        """Draw the next example that training may see."""
        while is_held_out(example := self._varied()):
            pass
        return example

    def _varied(self) -> Example:
        example = self.draw()
        if self._plain and example.task in READING_TASKS and self._rng.random() < self._plain:
            return self._in_first_wording(example.task)
        return example

    def held_out(self, task: str) -> Example:
        """Draw the next example of a task in a known wording that training never saw."""
        while not is_held_out(example := self.draw(task)):
            pass
        return example

    def plain(self, task: str) -> Example:
        """Draw the next held-out example of a task about readings in its first wording, unvaried.

        That leaves what a model makes of the case apart from how it takes wordings.

        Raises:
            KeyError: The task is not about readings.
        """
        while not is_held_out(example := self._in_first_wording(task)):
            pass
        return example

    def _in_first_wording(self, task: str) -> Example:
        phrasings, draw = READING_TASKS[task]
        slots, answer = draw(self._rng, unseen=False)
        return Example(task, (("user", fill(plain(phrasings.seen[0]), slots)),), answer)

    def _tool(self, task: str, *, unseen: bool) -> Example:
        case = draw_case(self._rng, unseen=unseen)
        turns = (("system", case.tools), ("user", case.request))
        if task == "tool":
            return Example(task, turns, case.call)
        while case.result is None or case.answer is None:
            case = draw_case(self._rng, unseen=unseen)
        # A chat template without tools gives results back as words of the user.
        told = ("tool", case.result)
        if self._rng.random() < 0.5:
            told = ("user", f"Result of {case.name}: {case.result}")
        asked = (("user", case.request), ("assistant", case.call), told)
        if self._rng.random() < 0.25:  # no tools on offer any more: plain words
            return Example(task, asked, case.answer)
        return Example(task, (("system", case.tools), *asked), answer_text(case.answer))
