"""Runs prompts through a language-model engine, one at a time, on the main thread.

Two threads inside one model are an uncatchable abort in native code, hence the one thread. Tokens
leave in frames: the first at once, later ones together with whatever came within `COALESCE_S`,
which keeps the cost of a frame below a hundredth of the cost of a token.
"""

import functools
import json
import queue
import time
import traceback
from typing import Any, Final

from node_agent.worker.base import Emit, InvocationError, Request
from node_agent.worker.engines import load_engine
from node_agent.worker.engines.base import Engine, EngineOptions, Prompt, fill_template
from node_agent.worker.python_host import load_entry

COALESCE_S: Final = 0.020
"""Tokens of this many seconds share a frame after the first one."""

_LOAD_OPTIONS: Final = ("model", "n_ctx", "n_threads", "n_batch", "seed")


class TokenStream:
    """Gathers text and sends it in frames; used by the generating thread only."""

    def __init__(self, request_id: str, emit: Emit) -> None:
        self._id = request_id
        self._emit = emit
        self._pending: list[str] = []
        self._parts: list[str] = []
        self._sent_at = 0.0

    def add(self, text: str) -> None:
        """Take the next text; sends the first at once."""
        self._parts.append(text)
        self._pending.append(text)
        now = time.monotonic()
        if now - self._sent_at >= COALESCE_S:
            self._sent_at = now
            self.flush()

    def flush(self) -> None:
        """Send what is left."""
        if self._pending:
            self._emit({"t": "piece", "id": self._id, "d": "".join(self._pending)})
            self._pending.clear()

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self._parts)


def make_prompt(request: Request) -> Prompt:
    """Turn an invocation into chat messages and generation settings.

    Options: ``prepare`` (a function that makes the text), ``system`` and ``template`` (``{text}``
    and the names of input properties are filled in), ``max_tokens``, ``temperature``, ``stop``,
    ``schema``.

    Raises:
        InvocationError: ``invalid_task``: there is nothing to say to the model, or ``prepare``
            refuses the input.
    """
    options = request.options
    values = _values(request)
    if options.get("prepare"):
        values["text"] = _prepared(str(options["prepare"]), values)
    content = fill_template(str(options.get("template") or "{text}"), values)
    if not content.strip():
        raise InvocationError("invalid_task", "there is no text for the model", field="text")
    messages = [{"role": "user", "content": content}]
    if options.get("system"):
        messages.insert(0, {"role": "system", "content": fill_template(options["system"], values)})
    stop = options.get("stop") or ()
    return Prompt(
        messages=messages,
        max_tokens=options.get("max_tokens"),
        temperature=float(options.get("temperature", 0.0)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        schema=options.get("schema"),
    )


def _values(request: Request) -> dict[str, Any]:
    values: dict[str, Any] = dict(request.input) if isinstance(request.input, dict) else {}
    if request.text is not None:
        values.setdefault("text", request.text)
    if "text" not in values:
        values["text"] = "" if request.input in (None, {}) else json.dumps(request.input)
    return values


@functools.lru_cache(maxsize=256)
def _preparer(entry: str) -> Any:
    return load_entry(entry)[1]


def _prepared(entry: str, values: dict[str, Any]) -> str:
    try:
        return str(_preparer(entry)(dict(values)))
    except ValueError as exc:
        raise InvocationError("invalid_task", str(exc), field="text") from exc


class EngineHost:
    """Host of one loaded model.

    Args:
        options: ``engine`` (``auto``) and the fields of `EngineOptions`.
        emit: Sends a frame.
    """

    def __init__(self, *, options: dict[str, Any], emit: Emit) -> None:
        self._options = options
        self._emit = emit
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._known: dict[str, Request] = {}
        self._engine: Engine | None = None

    def load(self) -> dict[str, Any]:
        """Load the model; returns what the engine says about itself."""
        chosen = {name: self._options[name] for name in _LOAD_OPTIONS if name in self._options}
        name, self._engine, passed_over = load_engine(
            str(self._options.get("engine", "auto")), EngineOptions(**chosen)
        )
        return {"slots": 1, "engine": name, "passed_over": passed_over, **self._engine.info}

    def submit(self, request: Request) -> None:
        """Take an invocation; it waits its turn."""
        self._known[request.id] = request
        self._requests.put(request)

    def cancel(self, request_id: str) -> None:
        """End a waiting or running generation."""
        request = self._known.get(request_id)
        if request is not None:
            request.cancelled.set()

    def close(self) -> None:
        """End ``serve`` after what is running."""
        self._requests.put(None)

    def serve(self) -> None:
        """Answer prompts until ``close``."""
        while (request := self._requests.get()) is not None:
            try:
                self._answer(request)
            except BrokenPipeError:
                return
            except InvocationError as exc:
                self._fail(request, exc.code, exc.message, exc.detail)
            except Exception as exc:  # noqa: BLE001 - supervision boundary: one bad prompt, not the model
                traceback.print_exception(exc)
                message = f"the engine failed: {type(exc).__name__}: {exc}"[:2000]
                self._fail(request, "execution_failed", message, {"type": type(exc).__name__})
            finally:
                self._known.pop(request.id, None)

    def _answer(self, request: Request) -> None:
        if request.cancelled.is_set() or self._engine is None:
            raise InvocationError("cancelled", "cancelled before it ran")
        stream = TokenStream(request.id, self._emit)
        done = self._engine.generate(make_prompt(request), stream.add, request.cancelled)
        if done.finish == "cancelled":
            raise InvocationError("cancelled", "cancelled while it ran")
        stream.flush()
        usage = {"input_tokens": done.input_tokens, "output_tokens": done.output_tokens}
        output: Any = stream.text
        if request.options.get("parse"):
            output = _parsed(stream.text, done.finish)
        self._emit(
            {
                "t": "final",
                "id": request.id,
                "output": output,
                "usage": usage,
                "finish": done.finish,
            }
        )

    def _fail(self, request: Request, code: str, message: str, detail: dict[str, Any]) -> None:
        self._emit(
            {"t": "error", "id": request.id, "code": code, "message": message, "detail": detail}
        )


def _parsed(text: str, finish: str) -> Any:
    """Read an answer that was asked to be JSON.

    Raises:
        InvocationError: ``execution_failed``: the model did not write JSON.
    """
    try:
        return json.loads(text)
    except ValueError as exc:
        why = "its answer was cut off by max_tokens" if finish == "length" else str(exc)
        raise InvocationError("execution_failed", f"the model did not write JSON: {why}") from exc
