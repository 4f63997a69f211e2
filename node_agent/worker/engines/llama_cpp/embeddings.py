"""Embeddings of texts by a GGUF model, through llama.cpp's pooling."""

import ctypes
import math
from typing import Any, Final

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import overflow
from node_agent.worker.engines.llama_cpp.weights import (
    Batch,
    NativeModel,
    context_parameters,
    native,
)

POOLINGS: Final = {"auto": -1, "mean": 1, "cls": 2, "last": 3}
"""``enum llama_pooling_type`` of llama.h; ``auto`` is the model's own, or mean if it has none."""

_NO_POOLING: Final = 0
_RANKING: Final = 4
_TEXTS: Final = 16
"""Most texts in one decode."""

_LONGEST_DEFAULT: Final = 2048
"""Context when none is asked for, unless the model's own is shorter, tokens."""


class EmbeddingModel:
    """A GGUF model that turns texts into vectors; one thread at a time.

    Args:
        model: The file.
        n_ctx: Longest text, and most tokens of one decode; 0: up to 2048 as the model allows.
        n_threads: Threads.
        pooling: A key of `POOLINGS`.
        normalise: Scale vectors to length 1.

    Raises:
        InvocationError: The file is missing, is no model, or ranks instead of embedding.
    """

    def __init__(
        self,
        *,
        model: str,
        n_ctx: int = 0,
        n_threads: int = 1,
        pooling: str = "auto",
        normalise: bool = True,
    ) -> None:
        self._model = NativeModel(model)
        trained = native.llama_model_n_ctx_train(self._model.handle)
        self.n_ctx = n_ctx or min(trained, _LONGEST_DEFAULT)
        self._n_threads = n_threads
        self._normalise = normalise
        self._context = self._make_context(POOLINGS[pooling])
        kind = native.llama_pooling_type(self._context)
        if kind == _NO_POOLING:
            native.llama_free(self._context)
            self._context = self._make_context(POOLINGS["mean"])
        elif kind == _RANKING:
            raise InvocationError(
                "internal", f"model {model} ranks texts, it does not embed them: take another one"
            )
        self._memory = native.llama_get_memory(self._context)
        self.dimension = native.llama_model_n_embd(self._model.handle)
        self._batch = Batch(self.n_ctx, _TEXTS)

    @property
    def info(self) -> dict[str, Any]:
        """Context, dimension, model name and weight format."""
        return {
            "context_tokens": self.n_ctx,
            "dimension": self.dimension,
            "model_name": self._model.metadata("general.name"),
            "file_type": self._model.metadata("general.file_type"),
        }

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Turn texts into token ids, with the marks the model wants around them.

        Raises:
            InvocationError: ``invalid_task``: a text is empty or longer than the context.
        """
        found = [self._model.tokenize(text, special=False, marks=True) for text in texts]
        for number, (text, ids) in enumerate(zip(texts, found, strict=True)):
            if not ids or not text.strip():
                raise InvocationError(
                    "invalid_task", f"text {number} is empty", field=f"texts[{number}]"
                )
            if len(ids) > self.n_ctx:
                raise overflow(len(ids), self.n_ctx)
        return found

    def embed(self, items: list[list[int]]) -> list[list[float]]:
        """Embed up to one decode's worth of texts, see `groups`.

        Args:
            items: Token ids of each text.

        Returns:
            One vector of ``dimension`` numbers each, rounded to 6 digits.
        """
        if self._memory:
            native.llama_memory_clear(self._memory, False)
        tokens = [token for ids in items for token in ids]
        places = [place for ids in items for place in range(len(ids))]
        numbers = [number for number, ids in enumerate(items) for _ in ids]
        raw = self._batch.fill(tokens, places, numbers, list(range(len(tokens))))
        code = native.llama_decode(self._context, raw)
        if code != 0:
            raise InvocationError("execution_failed", f"llama.cpp could not embed (code {code})")
        return [self._vector(number) for number in range(len(items))]

    def groups(self, items: list[list[int]]) -> list[list[list[int]]]:
        """Cut texts into groups that fit into one decode each, in order."""
        made: list[list[list[int]]] = []
        room = 0
        for ids in items:
            if not made or len(ids) > room or len(made[-1]) == _TEXTS:
                made.append([])
                room = self.n_ctx
            made[-1].append(ids)
            room -= len(ids)
        return made

    def close(self) -> None:
        """Free the model."""
        native.llama_free(self._context)
        self._model.close()

    def _vector(self, number: int) -> list[float]:
        found = native.llama_get_embeddings_seq(self._context, number)
        kind = ctypes.c_float * self.dimension
        vector = list(kind.from_address(ctypes.addressof(found.contents)))
        length = math.sqrt(math.fsum(value * value for value in vector)) if self._normalise else 1.0
        return [round(value / (length or 1.0), 6) for value in vector]

    def _make_context(self, pooling: int) -> Any:
        parameters = context_parameters(
            n_ctx=self.n_ctx, n_batch=self.n_ctx, n_threads=self._n_threads, sequences=_TEXTS
        )
        parameters.kv_unified = True  # a text may take the whole context, or a sixteenth of it
        parameters.embeddings = True
        parameters.pooling_type = pooling
        return self._model.context(parameters)
