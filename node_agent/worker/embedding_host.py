"""Embeds texts in an instance: one call after another, many texts in one decode."""

import queue
import time
import traceback
from typing import TYPE_CHECKING, Any

from node_agent.worker.base import Emit, InvocationError, Request
from node_agent.worker.engines.memory import resident_bytes

if TYPE_CHECKING:
    from node_agent.worker.engines.llama_cpp import EmbeddingModel


class EmbeddingHost:
    """Host of one embedding model.

    Args:
        options: ``slots`` (calls that may wait here at a time) and the arguments of
            `EmbeddingModel`.
        emit: Sends a frame.
    """

    def __init__(self, *, options: dict[str, Any], emit: Emit) -> None:
        self._options = dict(options)
        self._slots = int(self._options.pop("slots", 1))
        self._emit = emit
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._known: dict[str, Request] = {}
        self._model: EmbeddingModel | None = None

    def load(self) -> dict[str, Any]:
        """Load the model; returns what it says about itself."""
        from node_agent.worker.engines.llama_cpp import EmbeddingModel  # noqa: PLC0415 - the door of an optional library

        self._model = EmbeddingModel(**self._options)
        return {
            "slots": self._slots,
            "engine": "llama_cpp",
            **self._model.info,
            "memory_bytes": resident_bytes(),
        }

    def submit(self, request: Request) -> None:
        """Take an invocation; it waits its turn."""
        self._known[request.id] = request
        self._requests.put(request)

    def cancel(self, request_id: str) -> None:
        """End a call before its next decode."""
        request = self._known.get(request_id)
        if request is not None:
            request.cancelled.set()

    def close(self) -> None:
        """End ``serve`` after what waits."""
        self._requests.put(None)

    def serve(self) -> None:
        """Embed until ``close``."""
        while (request := self._requests.get()) is not None:
            try:
                self._emit({"t": "final", "id": request.id, **self._answer(request)})
            except InvocationError as exc:
                self._fail(request, exc)
            except OSError:  # the agent is gone
                return
            except Exception as exc:  # noqa: BLE001 - supervision boundary: one bad call, not the model
                traceback.print_exception(exc)
                self._fail(request, InvocationError("execution_failed", f"it failed: {exc}"[:2000]))
            finally:
                self._known.pop(request.id, None)

    def _answer(self, request: Request) -> dict[str, Any]:
        model = self._model
        if model is None:
            raise InvocationError("internal", "there is no model")
        started = time.monotonic()
        items = model.tokens(texts_of(request))
        vectors: list[list[float]] = []
        for group in model.groups(items):
            if request.cancelled.is_set():
                raise InvocationError("cancelled", "cancelled while it ran")
            vectors += model.embed(group)
        return {
            "output": vectors,
            "usage": {"input_tokens": sum(map(len, items)), "output_tokens": 0},
            "timing": {"prefill_ms": round((time.monotonic() - started) * 1000, 3)},
        }

    def _fail(self, request: Request, error: InvocationError) -> None:
        self._emit(error.frame(request))


def texts_of(request: Request) -> list[str]:
    """Return the texts of a call: ``texts`` of its input, or ``text``, or the words of the task.

    Raises:
        InvocationError: ``invalid_task``: there are none, or they are no texts.
    """
    given = request.input if isinstance(request.input, dict) else {"texts": request.input}
    texts = given.get("texts")
    if texts is None:
        text = given.get("text", request.text)
        texts = [] if text is None else [text]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvocationError("invalid_task", "texts: write a list of strings", field="texts")
    if not texts:
        raise InvocationError("invalid_task", "there is no text to embed", field="text")
    return texts
