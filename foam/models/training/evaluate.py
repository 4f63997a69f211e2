"""Exact match of a GGUF file's answers, per task, as llama.cpp gives them.

Three sets: ``plain`` are held-out cases in one wording of their task, the first (of requests about
readings alone), ``combinations`` in all the wordings that training knows, ``wordings`` in wordings
that training never saw. An answer counts when it equals the right one letter by
letter.
"""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from foam.models.training.corpus import Corpus, Example
from foam.models.training.readings import READING_TASKS

__all__ = ["SETS", "Score", "evaluate", "open_model", "set_of"]

Which = Literal["plain", "combinations", "wordings"]
SETS: Final[tuple[Which, ...]] = ("plain", "combinations", "wordings")
_SEED: Final = 4242
_LONGEST: Final = 120
"""Most tokens of an answer; the longest right one has about 90."""


@dataclass(frozen=True, slots=True)
class Score:
    """How one task went.

    Attributes:
        task: Its name.
        which: The set.
        right: Answers equal to the right one.
        asked: Prompts.
        wrong: Examples that failed, with what the model said.
        tokens: Tokens it wrote.
        cpu_s: Processor time it took, prompts included, seconds.
    """

    task: str
    which: Which
    right: int
    asked: int
    wrong: tuple[tuple[Example, str], ...]
    tokens: int
    cpu_s: float

    @property
    def exact(self) -> float:
        """Part of the answers that are right, 0 to 1."""
        return self.right / self.asked


def set_of(task: str, which: Which, count: int) -> list[Example]:
    """Draw the prompts of a task in a set; the same each time, none twice, perhaps none."""
    if which == "plain" and task not in READING_TASKS:
        return []
    corpus = Corpus(random.Random(f"{_SEED} {task} {which}"))
    found: dict[tuple[tuple[str, str], ...], Example] = {}
    tries = 0
    while len(found) < count and tries < 100 * count:  # small talk has few wordings
        tries += 1
        if which == "wordings":
            drawn = corpus.draw(task, unseen=True)
        else:
            drawn = corpus.plain(task) if which == "plain" else corpus.held_out(task)
        found.setdefault(drawn.turns, drawn)
    return list(found.values())


def open_model(path: Path, *, context: int = 512, **options: Any) -> Any:
    """Load a GGUF file into llama-cpp-python, on one thread.

    Args:
        path: The file.
        context: Tokens of its context.
        options: Further arguments of ``llama_cpp.Llama``.

    Returns:
        A ``llama_cpp.Llama``.
    """
    import llama_cpp  # noqa: PLC0415 - compiled at set-up; generator and trainer work without

    native = llama_cpp.llama_cpp
    defaults = native.llama_model_default_params

    def careful() -> Any:
        made = defaults()
        made.use_extra_bufts = False  # ggml's AMX kernels fault in native builds of GCC 12
        return made

    native.llama_model_default_params = careful
    try:
        return llama_cpp.Llama(
            str(path), n_ctx=context, n_threads=1, n_threads_batch=1, verbose=False, **options
        )
    finally:
        native.llama_model_default_params = defaults


def evaluate(
    path: Path,
    tasks: Iterable[str],
    *,
    count: int = 100,
    which: Iterable[Which] = SETS,
    report: Callable[[Score], None] | None = None,
) -> list[Score]:
    """Ask a model the prompts of some tasks, greedily.

    Args:
        path: The GGUF file.
        tasks: Which tasks.
        count: Prompts of each task in each set.
        which: Which sets.
        report: Called with every score as it comes.
    """
    model = open_model(path)
    scores = []
    for task in tasks:
        for one in which:
            examples = set_of(task, one, count)
            if not examples:
                continue
            score = _ask(model, task, one, examples)
            if report is not None:
                report(score)
            scores.append(score)
    model.close()
    return scores


def _ask(model: Any, task: str, which: Which, examples: list[Example]) -> Score:
    wrong, tokens, started = [], 0, time.process_time()
    for example in examples:
        messages = [{"role": role, "content": text} for role, text in example.turns]
        answer = model.create_chat_completion(messages, temperature=0, max_tokens=_LONGEST)
        said = answer["choices"][0]["message"]["content"]
        tokens += answer["usage"]["completion_tokens"]
        if said != example.answer:
            wrong.append((example, said))
    return Score(
        task,
        which,
        len(examples) - len(wrong),
        len(examples),
        tuple(wrong),
        tokens,
        time.process_time() - started,
    )
