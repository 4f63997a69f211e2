"""The contract of an engine, and the pure parts that every engine shares."""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from node_agent.worker.base import InvocationError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a model is loaded; one instance serves every function with equal options.

    Attributes:
        model: Path of the GGUF file.
        n_ctx: Context length, tokens; the model's own when 0.
        n_threads: Threads of one decode; 1 is the fastest on a shared machine.
        n_batch: Prompt tokens decoded at a time.
        seed: Sampling seed; without effect at temperature 0.
    """

    model: str
    n_ctx: int = 0
    n_threads: int = 1
    n_batch: int = 512
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What an engine shall answer.

    Attributes:
        messages: Chat messages, ``{"role", "content"}``, formatted by the model's own template.
        max_tokens: Most tokens to generate; the rest of the context when None.
        temperature: 0 (greedy) and up.
        stop: Texts that end the answer and are not part of it.
        schema: JSON Schema the answer must follow, or None.
    """

    messages: Sequence[Mapping[str, str]]
    max_tokens: int | None = None
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How an answer ended.

    Attributes:
        input_tokens: Tokens of the formatted prompt.
        output_tokens: Tokens generated, the end token included.
        finish: ``stop``, ``length`` or ``cancelled``.
    """

    input_tokens: int
    output_tokens: int
    finish: str


class Engine(Protocol):
    """One loaded model, used by one thread at a time (two are fatal in native code)."""

    @property
    def info(self) -> dict[str, Any]:
        """Facts to advertise: engine version, context length, model name."""
        ...

    def generate(
        self, prompt: Prompt, on_text: Callable[[str], None], cancelled: threading.Event
    ) -> Completion:
        """Answer a prompt, handing out text token by token.

        Args:
            prompt: What to answer.
            on_text: Called with each piece of text, never with half a character.
            cancelled: Ends the generation soon after it is set, prompt decoding included where the
                engine can.

        Raises:
            InvocationError: ``invalid_task``: the prompt does not fit the context.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def overflow(tokens: int, n_ctx: int) -> InvocationError:
    """Return the error for a prompt that leaves no room for an answer."""
    return InvocationError(
        "invalid_task",
        f"the prompt has {tokens} tokens and the model's context holds {n_ctx}: shorten the text",
        tokens=tokens,
        context=n_ctx,
    )


class StopScanner:
    """Ends a stream of text at the first stop text, and never shows a part of one.

    Args:
        stops: The stop texts; without any, text passes straight through.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Add text; returns what may be shown now, and sets ``stopped`` at a stop text."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        seen = self._held + text
        ends = [at for at in (seen.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return seen[: min(ends)]
        keep = max((self._overlap(seen, stop) for stop in self._stops), default=0)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def flush(self) -> str:
        """Return what was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(seen: str, stop: str) -> int:
        longest = min(len(seen), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if seen.endswith(stop[:n])), 0)


_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


def fill_template(template: str, values: Mapping[str, Any]) -> str:
    """Put values into ``{name}`` places of a prompt template.

    Not ``str.format``, which would let a template reach into attributes; other braces (JSON in a
    prompt) stay as they are, and so do names without a value.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        return str(values[name]) if name in values else match.group(0)

    return _PLACEHOLDER.sub(value, template)
