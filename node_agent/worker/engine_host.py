"""Runs prompts through a language-model engine, several at a time, on the main thread.

Tokens leave in frames: the first at once, later ones together with whatever came within
`COALESCE_S`, which keeps the cost of a frame below a hundredth of the cost of a token. A call with
tools streams nothing, since its answer is JSON for programs.
"""

import functools
import json
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from node_agent.worker.base import Emit, InvocationError, Request
from node_agent.worker.engines import load_engine
from node_agent.worker.engines.base import (
    Completion,
    Engine,
    EngineOptions,
    Job,
    Prompt,
    fill_template,
)
from node_agent.worker.engines.chat import check_messages, check_tools, read_answer, tool_schema
from node_agent.worker.python_host import load_entry

_prepared_by: Final[dict[str, str | None]] = {}
"""Digest of the code behind the entries that were imported."""

COALESCE_S: Final = 0.020
"""Tokens of this many seconds share a frame after the first one."""

_LOAD_OPTIONS: Final = ("model", "n_ctx", "n_threads", "n_batch", "parallel")
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens")


class TokenStream:
    """Gathers text and sends it in frames; used by the generating thread only.

    Args:
        request_id: Whose text it is.
        emit: Sends a frame.
        quiet: Only gather.
        shown: What others have been shown of the answer already.
    """

    def __init__(
        self, request_id: str, emit: Emit, *, quiet: bool = False, shown: str = ""
    ) -> None:
        self._id = request_id
        self._emit = emit
        self._quiet = quiet
        self._pending: list[str] = []
        self._parts: list[str] = [shown]
        self._sent_at = 0.0

    def add(self, text: str) -> None:
        """Take the next text; sends the first at once."""
        self._parts.append(text)
        if self._quiet:
            return
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

    Options: ``messages``, a conversation; or without them ``prepare`` (a function that makes the
    text; ``code`` is the digest of its files), ``system`` and ``template`` (``{text}`` and the
    names of input properties are filled in); ``tools`` and ``tools_template``; and the fields of
    `Prompt` of the same name.

    Raises:
        InvocationError: ``invalid_task``: there is nothing to say to the model, or ``prepare``
            refuses the input.
    """
    options = request.options
    if options.get("messages") is not None:
        messages = check_messages(options["messages"])
    else:
        messages = _messages(request)
    tools = check_tools(options["tools"]) if options.get("tools") else []
    stop = options.get("stop") or ()
    return Prompt(
        messages=messages,
        tools=tools,
        tools_template=options.get("tools_template"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        schema=tool_schema(tools) if tools else options.get("schema"),
        session=request.session,
        shown=request.shown or "",
        **{name: options[name] for name in _SAMPLING if name in options},
    )


def _messages(request: Request) -> list[dict[str, Any]]:
    options = request.options
    values = _values(request)
    if options.get("prepare"):
        values["text"] = _prepared(str(options["prepare"]), options.get("code"), values)
    content = fill_template(str(options.get("template") or "{text}"), values)
    if not content.strip():
        raise InvocationError("invalid_task", "there is no text for the model", field="text")
    messages = [{"role": "user", "content": content}]
    if options.get("system"):
        messages.insert(0, {"role": "system", "content": fill_template(options["system"], values)})
    return messages


def _values(request: Request) -> dict[str, Any]:
    values: dict[str, Any] = dict(request.input) if isinstance(request.input, dict) else {}
    if request.text is not None:
        values.setdefault("text", request.text)
    if "text" not in values:
        values["text"] = "" if request.input in (None, {}) else json.dumps(request.input)
    return values


@functools.lru_cache(maxsize=256)
def _preparer(entry: str, code: str | None) -> Any:
    """Import what prepares texts, anew for every ``code``: the model stays, its files change."""
    if _prepared_by.setdefault(entry, code) != code:
        _prepared_by[entry] = code
        _forget(load_entry(entry)[0])
    return load_entry(entry)[1]


def _forget(module: types.ModuleType) -> None:
    """Forget a module that was edited and its neighbours, so that they are read again."""
    folder = Path(str(module.__file__)).parent
    for name, one in list(sys.modules.items()):
        file = getattr(one, "__file__", None)
        if name != "__main__" and file is not None and Path(file).parent == folder:
            del sys.modules[name]


def _prepared(entry: str, code: str | None, values: dict[str, Any]) -> str:
    try:
        return str(_preparer(entry, code)(dict(values)))
    except ValueError as exc:
        raise InvocationError("invalid_task", str(exc), field="text") from exc
    except Exception as exc:
        traceback.print_exception(exc)
        why = f"prepare {entry} failed: {type(exc).__name__}: {exc}"
        raise InvocationError("execution_failed", why[:2000]) from exc


class EngineHost:
    """Host of one loaded model.

    Args:
        options: ``engine`` (``auto``), ``lora`` and the fields of `EngineOptions`.
        emit: Sends a frame.
        load: Loads an engine; see `load_engine`.
    """

    def __init__(
        self,
        *,
        options: dict[str, Any],
        emit: Emit,
        load: Callable[[str, EngineOptions], tuple[str, Engine, list[str]]] = load_engine,
    ) -> None:
        self._options = options
        self._emit = emit
        self._load = load
        self._known: dict[str, Request] = {}
        self._engine: Engine | None = None

    def load(self) -> dict[str, Any]:
        """Load the model; returns what the engine says about itself."""
        chosen = {name: self._options[name] for name in _LOAD_OPTIONS if name in self._options}
        lora = tuple((one["path"], one["scale"]) for one in self._options.get("lora") or ())
        name, self._engine, passed_over = self._load(
            str(self._options.get("engine", "auto")), EngineOptions(**chosen, lora=lora)
        )
        return {"engine": name, "passed_over": passed_over, **self._engine.info}

    def submit(self, request: Request) -> None:
        """Take an invocation."""
        if self._engine is None:
            return
        self._known[request.id] = request
        stream = TokenStream(
            request.id,
            self._emit,
            quiet=bool(request.options.get("tools")),
            shown=request.shown or "",
        )
        self._engine.submit(
            Job(
                prompt=functools.partial(make_prompt, request),
                on_text=stream.add,
                on_end=functools.partial(self._end, request, stream),
                cancelled=request.cancelled,
            )
        )

    def cancel(self, request_id: str) -> None:
        """End a waiting or running generation."""
        request = self._known.get(request_id)
        if request is not None:
            request.cancelled.set()

    def close(self) -> None:
        """End ``serve`` after what is running."""
        if self._engine is not None:
            self._engine.stop()

    def serve(self) -> None:
        """Answer prompts until ``close``."""
        if self._engine is not None:
            self._engine.run()

    def _end(self, request: Request, stream: TokenStream, how: Completion | Exception) -> None:
        self._known.pop(request.id, None)
        try:
            self._emit(_final(request, stream, how))
        except InvocationError as exc:
            self._fail(request, exc)
        except OSError:  # the agent is gone
            raise
        except Exception as exc:  # noqa: BLE001 - supervision boundary: one bad answer, not the model
            traceback.print_exception(exc)
            why = f"the model's answer cannot be used: {type(exc).__name__}: {exc}"
            self._fail(request, InvocationError("execution_failed", why[:2000]))

    def _fail(self, request: Request, error: InvocationError) -> None:
        self._emit(error.frame(request))


def _final(request: Request, stream: TokenStream, how: Completion | Exception) -> dict[str, Any]:
    """Return the last frame of a call.

    Raises:
        InvocationError: It did not go well.
    """
    if isinstance(how, InvocationError):
        raise how
    if isinstance(how, Exception):
        traceback.print_exception(how)
        message = f"the engine failed: {type(how).__name__}: {how}"[:2000]
        raise InvocationError("execution_failed", message, type=type(how).__name__)
    if how.finish == "cancelled":
        raise InvocationError("cancelled", "cancelled while it ran")
    stream.flush()
    output: Any = stream.text
    finish = how.finish
    if request.options.get("tools"):
        output = read_answer(_parsed(stream.text, finish), number=_calls_so_far(request))
        finish = "tool_calls" if output["tool_calls"] else finish
    elif request.options.get("parse"):
        output = _parsed(stream.text, finish)
    return {
        "t": "final",
        "id": request.id,
        "output": output,
        "usage": {
            "input_tokens": how.input_tokens,
            "output_tokens": how.output_tokens,
            "cached_tokens": how.cached_tokens,
        },
        "finish": finish,
        "confidence": how.confidence,
        "timing": {"prefill_ms": how.prefill_ms, "decode_ms": how.decode_ms},
    }


def _calls_so_far(request: Request) -> int:
    return sum(
        len(message.get("tool_calls") or ()) for message in request.options.get("messages") or ()
    )


def _parsed(text: str, finish: str) -> Any:
    """Read an answer that was asked to be JSON.

    Raises:
        InvocationError: ``execution_failed``: the model did not write JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        why = "its answer was cut off by max_tokens" if finish == "length" else str(exc)
        raise InvocationError("execution_failed", f"the model did not write JSON: {why}") from exc
