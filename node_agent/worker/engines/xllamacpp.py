"""The xllamacpp engine, llama.cpp's server as a wheel for want of a compiler: its only door.

It batches, keeps prefixes and schedules by itself; a thread of ours waits for each answer. A cancel
takes effect with the next token or the next piece of the prompt, whose size is therefore chosen by
the measured speed. Special tokens spelled out in the words of a user count as such. An answer that
was begun elsewhere is generated again from its beginning, and compared with what was shown of it.
"""

import dataclasses
import json
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import xllamacpp

from capability_schemas.errors import ConfigurationError
from node_agent.models.gguf import read_gguf
from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import Completion, EngineOptions, Job, Prompt, overflow
from node_agent.worker.engines.chat import PLAIN_TOOLS, plain_messages, state_tools
from node_agent.worker.engines.memory import check_fits, resident_bytes
from node_agent.worker.engines.repetition import Echo
from node_agent.worker.engines.scheduler import LEAST_PIECE, PIECE_S

_QUIET: Final = 0
_PROBE: Final = "0 1 2 3 4 5 6 7 8 9 " * 3


class XllamaCppEngine:
    """One GGUF model in xllamacpp; see `base.Engine`.

    Args:
        options: Model file, context, adapters.

    Raises:
        InvocationError: The file is missing or is not a model.
    """

    def __init__(self, options: EngineOptions) -> None:
        path = Path(options.model)
        if not path.is_file():
            raise InvocationError("internal", f"model {options.model}: no such file")
        check_fits(options.model, weights_bytes=path.stat().st_size)
        try:
            head = read_gguf(path)
        except ConfigurationError as exc:
            raise InvocationError("internal", f"model {exc.message}") from exc
        # The server would divide a context of 0, the model's own, among its slots.
        self._options = options = dataclasses.replace(
            options, n_ctx=options.n_ctx or head.context_length or 0
        )
        self._head = head
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._server = _load(options, options.n_batch)
        self._speed = self._calibrated()
        piece = int(PIECE_S * 1000 / max(self._speed.get("prefill_token_ms", 0.0), 1e-6))
        if piece < options.n_batch:
            del self._server  # two at a time might not fit
            self._server = _load(options, max(LEAST_PIECE, piece))

    @property
    def info(self) -> dict[str, Any]:
        """Slots, engine version, model name, weight format, context length, speed and memory."""
        return {
            "slots": self._options.parallel,
            "engine_version": xllamacpp.__version__,
            "model_name": self._head.name or Path(self._options.model).stem,
            "file_type": self._head.metadata.get("general.file_type"),
            "context_tokens": self._options.n_ctx,
            **self._speed,
            "memory_bytes": resident_bytes(),
        }

    def submit(self, job: Job) -> None:
        """Take a prompt."""
        self._jobs.put(job)

    def run(self) -> None:
        """Answer on as many threads as there are slots, until ``stop``."""
        threads = [
            threading.Thread(target=self._work, name=f"slot-{number}")
            for number in range(self._options.parallel)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """Make ``run`` return."""
        for _ in range(self._options.parallel):
            self._jobs.put(None)

    def generate(
        self, prompt: Prompt, on_text: Callable[[str], None], cancelled: threading.Event
    ) -> Completion:
        """Answer one prompt on the calling thread; see `base.Engine`."""
        if cancelled.is_set():
            return Completion(finish="cancelled")
        echo = Echo(prompt.shown)

        def hand_out(text: str) -> None:
            if fresh := echo.fresh(text):
                on_text(fresh)

        answer = _Answer(hand_out if prompt.shown else on_text, cancelled)
        self._server.handle_chat_completions(_request(prompt), answer.take)
        return answer.completion()

    def close(self) -> None:
        """Free the model."""
        del self._server

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                end: Completion | Exception = self.generate(
                    job.prompt(), job.on_text, job.cancelled
                )
            except Exception as exc:  # noqa: BLE001 - supervision boundary: `prepare` is user code
                end = exc
            try:
                job.on_end(end)
            except OSError:  # the agent is gone, and the process about to end
                return

    def _calibrated(self) -> dict[str, float]:
        prompt = Prompt(messages=[{"role": "user", "content": _PROBE}], max_tokens=4)
        answer = _Answer(lambda _text: None, threading.Event())
        self._server.handle_chat_completions(_request(prompt), answer.take)
        times = answer.times
        return {
            f"{name}_ms": round(float(times[key]), 4)
            for name, key in (
                ("prefill_token", "prompt_per_token_ms"),
                ("token", "predicted_per_token_ms"),
            )
            if times.get(key)
        }


def _load(options: EngineOptions, n_batch: int) -> Any:
    try:
        return xllamacpp.Server(_parameters(options, n_batch))
    except (ValueError, RuntimeError, OSError) as exc:
        raise InvocationError("internal", f"model {options.model}: {exc}") from exc


def _parameters(options: EngineOptions, n_batch: int) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = options.model
    parameters.n_ctx = options.n_ctx * options.parallel
    parameters.n_batch = n_batch
    parameters.n_parallel = options.parallel
    parameters.kv_unified = False
    parameters.cpuparams.n_threads = options.n_threads
    parameters.cpuparams_batch.n_threads = options.n_threads
    parameters.warmup = False
    parameters.no_extra_bufts = True  # AMX kernels of some builds fault, see `llama_cpp`
    parameters.verbosity = _QUIET
    parameters.ui = False
    # It opens an HTTP port on the loopback interface that nobody asked for: lock it.
    parameters.api_keys = [secrets.token_urlsafe(24)]
    if options.lora:
        parameters.lora_adapters = [_adapter(path, scale) for path, scale in options.lora]
    return parameters


def _adapter(path: str, scale: float) -> Any:
    if not Path(path).is_file():
        raise InvocationError("internal", f"lora {path}: no such file")
    made = xllamacpp.CommonAdapterLoraInfo()
    made.path, made.scale = path, scale
    return made


def _request(prompt: Prompt) -> dict[str, Any]:
    messages = plain_messages(prompt.messages)
    if prompt.tools:
        messages = state_tools(messages, prompt.tools, prompt.tools_template or PLAIN_TOOLS)
    request: dict[str, Any] = {
        "messages": messages,
        "temperature": prompt.temperature,
        "top_k": prompt.top_k,
        "top_p": prompt.top_p,
        "min_p": prompt.min_p,
        "seed": prompt.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,  # an event for each piece of the prompt: a chance to cancel
        "logprobs": True,
        "top_logprobs": 1,
        "cache_prompt": True,
    }
    if prompt.max_tokens is not None:
        request["max_tokens"] = prompt.max_tokens
    if prompt.stop:
        request["stop"] = list(prompt.stop)
    if prompt.schema is not None:
        request["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "output", "schema": dict(prompt.schema)},
        }
    return request


class _Answer:
    """Collects the events of one streamed completion."""

    def __init__(self, on_text: Callable[[str], None], cancelled: threading.Event) -> None:
        self._on_text = on_text
        self._cancelled = cancelled
        self._finish: str | None = None
        self._usage: dict[str, Any] = {}
        self._error: dict[str, Any] | None = None
        self._raised: BaseException | None = None
        self._lowest: float | None = None
        self._started = time.monotonic()
        self._first_at = 0.0
        self.times: dict[str, Any] = {}

    def take(self, event: Any) -> bool:
        """Handle one event; returning True ends the generation."""
        if self._cancelled.is_set():
            return True
        try:
            self._read(json.loads(event) if isinstance(event, str | bytes) else event)
        except BaseException as exc:  # noqa: BLE001 - native code cannot carry it; raised again below
            self._raised = exc
        return self._raised is not None

    def completion(self) -> Completion:
        """Return how it ended.

        Raises:
            InvocationError: The engine refused or failed.
        """
        if self._raised is not None:
            raise self._raised
        if self._error is not None:
            if self._error.get("type") == "exceed_context_size_error":
                raise overflow(int(self._error["n_prompt_tokens"]), int(self._error["n_ctx"]))
            raise InvocationError(
                "execution_failed", f"the engine refused: {self._error['message']}"
            )
        ended = time.monotonic()
        first_at = self._first_at or ended
        cached = (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Completion(
            input_tokens=int(self._usage.get("prompt_tokens", 0)),
            output_tokens=int(self._usage.get("completion_tokens", 0)),
            finish="cancelled" if self._cancelled.is_set() else self._finish or "stop",
            cached_tokens=int(cached),
            confidence=None if self._lowest is None else math.exp(self._lowest),
            prefill_ms=round((first_at - self._started) * 1000, 3),
            decode_ms=round((ended - first_at) * 1000, 3),
        )

    def _read(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self._error = event["error"]
            return
        self._usage = event.get("usage") or self._usage
        self.times = event.get("timings") or self.times
        for choice in event.get("choices", ()):
            self._finish = choice.get("finish_reason") or self._finish
            for token in (choice.get("logprobs") or {}).get("content") or ():
                self._lowest = min(self._lowest or 0.0, float(token["logprob"]))
            text = choice.get("delta", {}).get("content")
            if text:
                self._first_at = self._first_at or time.monotonic()
                self._on_text(text)
