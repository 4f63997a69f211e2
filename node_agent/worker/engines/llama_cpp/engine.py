"""The engine: a backend, measured, under a scheduler."""

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from node_agent.worker.engines.base import Completion, EngineOptions, Job, Prompt
from node_agent.worker.engines.llama_cpp.backend import LlamaBackend
from node_agent.worker.engines.llama_cpp.weights import VERSION, NativeModel
from node_agent.worker.engines.memory import resident_bytes
from node_agent.worker.engines.scheduler import Scheduler

_COPY_BYTES_S: Final = 2e9
"""Copying keys and values in memory, bytes a second: a careful guess."""

_PROBE_S: Final = 0.06
"""Size of the piece that calibration decodes, as time of so many single tokens, seconds."""

_SLOW_S: Final = 0.15
"""A first decode slower than this is the only one that calibration waits for, seconds."""


class LlamaCppEngine:
    """One GGUF model in llama-cpp-python; see `base.Engine`.

    Args:
        options: Model file, context, adapters.

    Raises:
        InvocationError: The file is missing or is not a model, or does not fit into memory.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._model = NativeModel(options.model)
        self._backend = LlamaBackend(self._model, options)
        self._parallel = options.parallel
        self._prefill_s, self._token_s, worth_batching = self._calibrated(options.parallel)
        self._scheduler = Scheduler(
            self._backend,
            sequences=options.parallel,
            prefill_token_s=self._prefill_s,
            copy_s=self._model.cache_bytes(self._backend.n_ctx) / _COPY_BYTES_S,
            worth_batching=worth_batching,
        )

    @property
    def info(self) -> dict[str, Any]:
        """Slots, engine version, context length, model name, weight format, speed, memory."""
        return {
            "slots": self._parallel,
            "engine_version": VERSION,
            "context_tokens": self._backend.n_ctx,
            "model_name": self._model.metadata("general.name"),
            "file_type": self._model.metadata("general.file_type"),
            "prefill_token_ms": round(self._prefill_s * 1000, 4),
            "token_ms": round(self._token_s * 1000, 4),
            "memory_bytes": resident_bytes(),
        }

    @property
    def scheduler(self) -> Scheduler:
        """What runs the answers."""
        return self._scheduler

    def submit(self, job: Job) -> None:
        """Take a prompt."""
        self._scheduler.submit(job)

    def run(self) -> None:
        """Work until ``stop``."""
        self._scheduler.run()

    def stop(self) -> None:
        """Make ``run`` return."""
        self._scheduler.stop()

    def generate(
        self, prompt: Prompt, on_text: Callable[[str], None], cancelled: threading.Event
    ) -> Completion:
        """Answer one prompt on the calling thread; see `base.Engine`."""
        ends: list[Completion | Exception] = []
        self.submit(
            Job(prompt=lambda: prompt, on_text=on_text, on_end=ends.append, cancelled=cancelled)
        )
        while not ends:
            self._scheduler.step()
        if isinstance(ends[0], Exception):
            raise ends[0]
        return ends[0]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids the model sees for a prompt."""
        return self._backend.encode(prompt)

    def close(self) -> None:
        """Free the model."""
        self._backend.close()
        self._model.close()

    def _calibrated(self, parallel: int) -> tuple[float, float, int]:
        """Measure the time of a prompt token and of a generated token, seconds.

        The first decode also brings the weights into memory. A model so slow that it alone takes
        `_SLOW_S` is not measured any closer, which keeps this below about 0.3 seconds.

        Returns:
            Both times, and how many answers are the fewest worth decoding together.
        """

        def timed(count: int, *numbers: int, clock: Callable[[], float] = time.monotonic) -> float:
            ids = [(7 + at) % self._model.n_vocab for at in range(count)] * len(numbers)
            places = list(range(count)) * len(numbers)
            sequences = [number for number in numbers for _ in range(count)]
            started = clock()
            self._backend.decode(ids, places, sequences, list(range(count - 1, len(ids), count)))
            taken = clock() - started
            for number in numbers:
                self._backend.cut(number, 0)
            return taken

        token_s = timed(1, 0)
        if token_s > _SLOW_S:
            return token_s, token_s, 2
        token_s = min(timed(1, 0), timed(1, 0))
        piece = max(4, min(32, int(_PROBE_S / token_s)))
        piece = min(piece, self._backend.n_batch, self._backend.n_ctx)
        timed(piece, 0)  # the first one reserves memory
        prefill_s = min(timed(piece, 0), timed(piece, 0)) / piece
        # Processor time here: what else the machine does must not decide it.
        tries = max(1, min(5, int(_PROBE_S / 20 / token_s)))
        worth = 2
        while worth <= parallel and token_s * worth < _SLOW_S / 4:
            numbers = range(worth)
            together, alone = [], []
            for _ in range(tries):
                together.append(timed(1, *numbers, clock=time.process_time))
                alone.append(sum(timed(1, one, clock=time.process_time) for one in numbers))
            if min(together) < min(alone):
                break
            worth += 1
        return prefill_s, token_s, worth
