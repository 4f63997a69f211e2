"""The contract of an engine, and the pure parts that every engine shares."""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from node_agent.worker.base import InvocationError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a model is loaded; one instance serves every function with equal options.

    Attributes:
        model: Path of the GGUF file.
        n_ctx: Context length of one call, tokens; the model's own when 0.
        n_threads: Threads of one decode; 1 is the fastest on a shared machine.
        n_batch: Most tokens decoded at a time.
        parallel: Calls at a time.
        lora: Adapters, ``(path, scale)`` each.
    """

    model: str
    n_ctx: int = 0
    n_threads: int = 1
    n_batch: int = 512
    parallel: int = 1
    lora: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What an engine shall answer.

    Attributes:
        messages: Chat messages in the format of the OpenAI API, put into words by the model's own
            template.
        tools: Tools the model may call, in the same format.
        tools_template: How the prompt states them, see `chat.state_tools`; None: as the model's
            template does, or a plain instruction.
        max_tokens: Most tokens to generate; the rest of the context when None.
        temperature: 0 (greedy) and up.
        top_k: Only the k likeliest tokens; 0: all. Like the next three without effect on greedy.
        top_p: Only the likeliest tokens that together have this probability.
        min_p: Only tokens at least this likely, as a share of the likeliest one's probability.
        seed: Of the random choice; the same seed makes the same text.
        stop: Texts that end the answer and are not part of it.
        schema: JSON Schema the answer must follow, or None.
        session: Affinity key: a prompt of the same session likely begins like the one before.
        shown: The beginning of the answer, as text that somebody has been shown already: the answer
            goes on behind it, and only what follows is handed out.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tools_template: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    session: str | None = None
    shown: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How an answer ended.

    Attributes:
        input_tokens: Tokens of the formatted prompt.
        output_tokens: Tokens generated, the end token included.
        finish: ``stop``, ``length`` or ``cancelled``.
        cached_tokens: Tokens of the prompt that were still in memory from an earlier call.
        confidence: Probability of the least certain token, 0 to 1, by the model's own distribution
            (temperature 1, before a grammar); None when there is no token.
        prefill_ms: From the start to the first token, milliseconds.
        decode_ms: From the first token to the end, milliseconds.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    finish: str
    cached_tokens: int = 0
    confidence: float | None = None
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


@dataclass(slots=True, kw_only=True)
class Job:
    """A prompt on its way through an engine; the callbacks come from the engine's thread.

    Attributes:
        prompt: Makes the prompt; may raise ``InvocationError``.
        on_text: Takes each piece of text, never half a character.
        on_end: Called exactly once, last: how it ended, or why it failed.
        cancelled: Ends it soon after it is set.
    """

    prompt: Callable[[], Prompt]
    on_text: Callable[[str], None]
    on_end: Callable[[Completion | Exception], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine(Protocol):
    """One loaded model that answers several prompts at a time."""

    @property
    def info(self) -> dict[str, Any]:
        """Facts to advertise: ``slots``, engine version, context length, model name, speed."""
        ...

    def submit(self, job: Job) -> None:
        """Take a prompt; any thread may call it, and it returns at once."""
        ...

    def run(self) -> None:
        """Work on the calling thread until ``stop``, and then end what is under way."""
        ...

    def stop(self) -> None:
        """Make ``run`` return; any thread may call it."""
        ...

    def generate(
        self, prompt: Prompt, on_text: Callable[[str], None], cancelled: threading.Event
    ) -> Completion:
        """Answer one prompt on the calling thread, without ``run``.

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
