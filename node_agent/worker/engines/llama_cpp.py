"""The llama-cpp-python engine: its only door.

Three traps, each with its remedy below: processors with AMX crash in "extra" weight buffers of
native builds (`without_extra_buffers`); chat templates without a beginning-of-sequence token give
a prompt the model was never trained on (`_prompt_ids`); a native abort callback that Python has
collected hangs the process (`_abortable`).
"""

import codecs
import contextlib
import ctypes
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import llama_cpp
from llama_cpp import llama_chat_format, llama_grammar
from llama_cpp import llama_cpp as native

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import Completion, EngineOptions, Prompt, StopScanner, overflow

_ABORTABLE_TOKENS: Final = 48
"""Shortest prompt, tokens, whose decoding can be aborted: the callback runs once per graph node."""

_PIECE_BYTES: Final = 1024
"""Room for the text of one token, bytes; vocabularies stay below 256."""

_SENTINEL: Final = "\ue000foam\ue000"
"""Stands for the user's words while a template is rendered; private-use characters."""


@contextlib.contextmanager
def without_extra_buffers() -> Iterator[None]:
    """Load models without AMX and repacked weight buffers.

    GCC 12 drops the tile configuration of ggml's AMX kernels, which then fault; `Llama` offers no
    argument for the switch, so the default parameters are changed while it loads.
    """
    original = native.llama_model_default_params

    def parameters() -> Any:
        made = original()
        made.use_extra_bufts = False
        return made

    native.llama_model_default_params = parameters
    try:
        yield
    finally:
        native.llama_model_default_params = original


class LlamaCppEngine:
    """One GGUF model in llama-cpp-python; one thread at a time.

    Args:
        options: Model file and context.

    Raises:
        InvocationError: The file is missing or is not a model.
    """

    def __init__(self, options: EngineOptions) -> None:
        try:
            with without_extra_buffers():
                self._llm = llama_cpp.Llama(
                    model_path=options.model,
                    n_ctx=options.n_ctx,
                    n_threads=options.n_threads,
                    n_threads_batch=options.n_threads,
                    n_batch=options.n_batch,
                    seed=options.seed,
                    verbose=False,
                )
        except (ValueError, RuntimeError, OSError) as exc:
            raise InvocationError("internal", f"model {options.model}: {exc}") from exc
        self._bos = self._llm.token_bos()
        self._vocab = self._llm._model.vocab  # noqa: SLF001 - the native handle has no public name
        self._ends = {self._llm.token_eos()}
        self._pieces: dict[int, bytes] = {}
        self._piece_buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        self._grammars: dict[str, Any] = {}
        self._template = self._llm.metadata.get("tokenizer.chat_template")
        self._formatter = self._make_formatter()

    @property
    def info(self) -> dict[str, Any]:
        """Engine version, context length, model name and weight format."""
        metadata = self._llm.metadata
        return {
            "engine_version": llama_cpp.__version__,
            "context_tokens": self._llm.n_ctx(),
            "model_name": metadata.get("general.name"),
            "file_type": metadata.get("general.file_type"),
        }

    def generate(
        self, prompt: Prompt, on_text: Callable[[str], None], cancelled: threading.Event
    ) -> Completion:
        """Answer a prompt; see `base.Engine`."""
        ids = self.prompt_ids(prompt)
        room = self._llm.n_ctx() - len(ids)
        if room <= 0:
            raise overflow(len(ids), self._llm.n_ctx())
        limit = room if prompt.max_tokens is None else min(prompt.max_tokens, room)
        tokens = self._llm.generate(
            ids,
            temp=prompt.temperature,
            grammar=self._grammar(prompt),
        )
        try:
            finish, generated = self._stream(tokens, ids, limit, prompt, on_text, cancelled)
        finally:
            tokens.close()
        return Completion(input_tokens=len(ids), output_tokens=generated, finish=finish)

    def close(self) -> None:
        """Free the model."""
        self._llm.close()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids the model sees for a prompt.

        The template of the GGUF is rendered as it stands; a missing beginning-of-sequence token is
        added where the model wants one. Special tokens spelled out in the words of the user stay
        ordinary text, so that nobody can close the user's turn from inside it.
        """
        contents = [message["content"] for message in prompt.messages]
        if any(self._spells_special(content) for content in contents):
            ids = self._guarded_ids(prompt)
        else:
            text = self._render([dict(message) for message in prompt.messages])
            ids = self._llm.tokenize(text.encode(), add_bos=False, special=True)
        if (
            ids[:1] != [self._bos]
            and self._bos >= 0
            and native.llama_vocab_get_add_bos(self._vocab)
        ):
            ids = [self._bos, *ids]
        return ids

    def _stream(
        self,
        tokens: Iterator[int],
        ids: list[int],
        limit: int,
        prompt: Prompt,
        on_text: Callable[[str], None],
        cancelled: threading.Event,
    ) -> tuple[str, int]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        scanner = StopScanner(prompt.stop)
        finish, count = "length", 0
        token = self._first(tokens, ids, cancelled)
        while token is not None:
            count += 1
            if cancelled.is_set():
                return "cancelled", count
            if token in self._ends or native.llama_vocab_is_eog(self._vocab, token):
                finish = "stop"
                break
            text = scanner.feed(decoder.decode(self._piece(token)))
            if text:
                on_text(text)
            if scanner.stopped:
                return "stop", count
            if count >= limit:
                break
            token = next(tokens, None)
        if token is None:
            return "cancelled", count
        rest = scanner.feed(decoder.decode(b"", final=True)) + scanner.flush()
        if rest:
            on_text(rest)
        return finish, count

    def _first(
        self, tokens: Iterator[int], ids: list[int], cancelled: threading.Event
    ) -> int | None:
        """Decode the prompt and return the first token; None when cancelled on the way."""
        if cancelled.is_set():
            return None
        if len(ids) < _ABORTABLE_TOKENS:
            return next(tokens)
        try:
            with self._abortable(cancelled):
                return next(tokens)
        except RuntimeError:
            if not cancelled.is_set():
                raise
            self._llm.reset()  # type: ignore[no-untyped-call]  # half a prompt is left
            return None

    @contextlib.contextmanager
    def _abortable(self, cancelled: threading.Event) -> Iterator[None]:
        context = self._llm._ctx.ctx  # noqa: SLF001 - the native handle has no public name
        callback = llama_cpp.ggml_abort_callback(lambda _data: cancelled.is_set())
        native.llama_set_abort_callback(context, callback, None)
        try:
            yield
        finally:
            # Cleared while `callback` is still referenced: native code calling a collected one
            # hangs.
            native.llama_set_abort_callback(context, llama_cpp.ggml_abort_callback(0), None)
            del callback

    def _piece(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            size = native.llama_token_to_piece(
                self._vocab, token, self._piece_buffer, len(self._piece_buffer), 0, False
            )
            piece = self._pieces[token] = self._piece_buffer.raw[: max(size, 0)]
        return piece

    def _grammar(self, prompt: Prompt) -> Any:
        if prompt.schema is None:
            return None
        # The order of the properties is the order in which the model writes them: never sort it.
        key = json.dumps(prompt.schema)
        if key not in self._grammars:
            try:
                made = llama_grammar.LlamaGrammar.from_json_schema(key, verbose=False)
            except (ValueError, KeyError, TypeError) as exc:
                raise InvocationError(
                    "execution_failed", f"the output schema makes no grammar: {exc}"
                ) from exc
            self._grammars[key] = made
        return self._grammars[key]

    def _make_formatter(self) -> Any:
        if not self._template:
            return None
        text = self._llm._model.token_get_text  # noqa: SLF001 - no public name
        eos = self._llm.token_eos()
        return llama_chat_format.Jinja2ChatFormatter(
            template=self._template,
            eos_token=text(eos) if eos >= 0 else "",
            bos_token=text(self._bos) if self._bos >= 0 else "",
        )

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self._formatter is None:  # a base model: it continues text
            return "\n\n".join(message["content"] for message in messages)
        try:
            return str(self._formatter(messages=messages).prompt)
        except ValueError as exc:  # what templates raise, for example for a system message
            raise InvocationError("execution_failed", f"the chat template refuses: {exc}") from exc

    def _spells_special(self, content: str) -> bool:
        data = content.encode()
        tokenize = self._llm.tokenize
        return bool(
            tokenize(data, add_bos=False, special=True)
            != tokenize(data, add_bos=False, special=False)
        )

    def _guarded_ids(self, prompt: Prompt) -> list[int]:
        marked = [
            {**message, "content": f"{_SENTINEL}{number}{_SENTINEL}"}
            for number, message in enumerate(prompt.messages)
        ]
        rendered = self._render(marked)
        ids: list[int] = []
        for position, part in enumerate(rendered.split(_SENTINEL)):
            words = position % 2 == 1
            text = prompt.messages[int(part)]["content"] if words else part
            if text:
                ids += self._llm.tokenize(text.encode(), add_bos=False, special=not words)
        return ids
