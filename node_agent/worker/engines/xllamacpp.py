"""The xllamacpp engine, llama.cpp's server as a wheel for want of a compiler: its only door.

Faster than the other engine on tiny models, but without a way into the decoding of a prompt:
cancelling takes effect at the first token, and special tokens in the words of a user count as such.
"""

import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xllamacpp

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import Completion, EngineOptions, Prompt, overflow

_QUIET = 0


class XllamaCppEngine:
    """One GGUF model in xllamacpp; one thread at a time.

    Args:
        options: Model file and context.

    Raises:
        InvocationError: The file is missing or is not a model.
    """

    def __init__(self, options: EngineOptions) -> None:
        if not Path(options.model).is_file():
            raise InvocationError("internal", f"model {options.model}: no such file")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = options.model
        parameters.n_ctx = options.n_ctx
        parameters.n_batch = options.n_batch
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = options.n_threads
        parameters.cpuparams_batch.n_threads = options.n_threads
        parameters.warmup = False
        parameters.no_extra_bufts = True  # AMX kernels of some builds fault, see `llama_cpp`
        parameters.verbosity = _QUIET
        parameters.ui = False
        # It opens an HTTP port on the loopback interface that nobody asked for: lock it.
        parameters.api_keys = [secrets.token_urlsafe(24)]
        try:
            self._server = xllamacpp.Server(parameters)
        except (ValueError, RuntimeError, OSError) as exc:
            raise InvocationError("internal", f"model {options.model}: {exc}") from exc
        self._seed = options.seed
        self._model = options.model

    @property
    def info(self) -> dict[str, Any]:
        """Engine version and model name."""
        return {"engine_version": xllamacpp.__version__, "model_name": Path(self._model).stem}

    def generate(
        self, prompt: Prompt, on_text: Callable[[str], None], cancelled: threading.Event
    ) -> Completion:
        """Answer a prompt; see `base.Engine`."""
        if cancelled.is_set():
            return Completion(input_tokens=0, output_tokens=0, finish="cancelled")
        answer = _Answer(on_text, cancelled)
        self._server.handle_chat_completions(self._request(prompt), answer.take)
        return answer.completion()

    def close(self) -> None:
        """Free the model."""
        del self._server

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        request: dict[str, Any] = {
            "messages": [dict(message) for message in prompt.messages],
            "temperature": prompt.temperature,
            "seed": self._seed,
            "stream": True,
            "stream_options": {"include_usage": True},
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
        finish = "cancelled" if self._cancelled.is_set() else self._finish or "stop"
        return Completion(
            input_tokens=int(self._usage.get("prompt_tokens", 0)),
            output_tokens=int(self._usage.get("completion_tokens", 0)),
            finish=finish,
        )

    def _read(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self._error = event["error"]
            return
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices", ()):
            self._finish = choice.get("finish_reason") or self._finish
            text = choice.get("delta", {}).get("content")
            if text:
                self._on_text(text)
