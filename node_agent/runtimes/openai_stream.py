"""Answers of the OpenAI API put together from their pieces; pure, no I/O.

Source: the streaming format of ``/v1/chat/completions`` (OpenAI API reference, chat completion
chunk object) in server-sent events (WHATWG HTML, section 9.2).
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from capability_schemas.errors import ExecutionFailed, FoamError
from node_agent.runtimes.base import Final as FinalAnswer

_EVENT_LIMIT_BYTES: Final = 4 * 1024 * 1024
_ANSWER_LIMIT: Final = 16 * 1024 * 1024
"""Most characters of an answer; a function has its own, smaller limit, which is looked at later."""

_END: Final = "[DONE]"


class Garbage(ExecutionFailed):
    """What a server sent is not what the API says."""

    default_retryable = True


class EventStream:
    """Cuts the bytes of an event stream into the data of its events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._size = 0
        self.ended = False
        """Whether the server has said ``[DONE]``."""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield the events that are complete now, read as JSON objects.

        Raises:
            Garbage: The bytes are no event stream, or an event is no JSON object.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _EVENT_LIMIT_BYTES:
            raise Garbage(f"the server sent a line of more than {_EVENT_LIMIT_BYTES} bytes")
        for line in lines:
            text = line.rstrip(b"\r").decode("utf-8", errors="replace")
            if text:
                self._field(text)
            elif self._data:
                event, self._data, self._size = "\n".join(self._data), [], 0
                if event == _END:
                    self.ended = True
                else:
                    yield _object(event)

    def _field(self, line: str) -> None:
        name, colon, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
            self._size += len(value) + 1
            if self._size > _EVENT_LIMIT_BYTES:
                raise Garbage(f"the server sent an event of more than {_EVENT_LIMIT_BYTES} bytes")
        elif not colon or name not in ("", "event", "id", "retry"):
            raise Garbage(f"the server sent no event stream but {line[:80]!r}")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise Garbage(f"the server sent an event that is not JSON: {text[:80]!r}") from exc
    if not isinstance(value, dict):
        raise Garbage(f"the server sent an event that is no object: {text[:80]!r}")
    return value


class ChatAnswer:
    """Puts one answer together from its chunks.

    Args:
        tools: Whether the call offered tools, which gives the output their form.
        parse: Whether the words are JSON, the output what they mean.
        shown: The beginning of the words, which another node has shown.
    """

    def __init__(self, *, tools: bool, parse: bool, shown: str = "") -> None:
        self._tools = tools
        self._parse = parse
        self._text: list[str] = [shown]
        self._calls: dict[int, dict[str, str]] = {}
        self._logprob = math.inf
        self._usage: dict[str, int] = {}
        self._size = 0
        self.finish = ""
        """Why it ended; empty while it goes on."""

    def add(self, event: Mapping[str, Any]) -> str:
        """Take a chunk; returns its words.

        Raises:
            FoamError: The server reports an error in it.
            Garbage: It is not of the API's form.
        """
        if event.get("error"):
            raise server_error(event)
        try:
            if event.get("usage"):
                self._usage = _usage(event["usage"])
            return "".join(self._choice(choice) for choice in event.get("choices") or ())
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as exc:
            raise Garbage(f"the server sent no chat completion chunk: {str(event)[:80]}") from exc

    def _choice(self, choice: Mapping[str, Any]) -> str:
        self.finish = choice.get("finish_reason") or self.finish
        for token in (choice.get("logprobs") or {}).get("content") or ():
            self._logprob = min(self._logprob, float(token["logprob"]))
        delta = choice.get("delta") or {}
        for part in delta.get("tool_calls") or ():
            call = self._calls.setdefault(
                int(part.get("index", len(self._calls))), {"id": "", "name": "", "arguments": ""}
            )
            call["id"] = part.get("id") or call["id"]
            inner = part.get("function") or {}
            call["name"] += inner.get("name") or ""
            call["arguments"] += inner.get("arguments") or ""
            self._grow(len(inner.get("name") or "") + len(inner.get("arguments") or ""))
        text = delta.get("content") or ""
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        self._text.append(text)
        self._grow(len(text))
        return text

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > _ANSWER_LIMIT:
            raise Garbage(f"the server sent an answer of more than {_ANSWER_LIMIT} characters")

    def final(self, *, prefill_ms: float, decode_ms: float) -> FinalAnswer:
        """Return the end of the answer.

        Args:
            prefill_ms: Time to the first chunk with words, milliseconds.
            decode_ms: Time from there, milliseconds.

        Raises:
            FoamError: The words should be JSON and are not.
        """
        text = "".join(self._text)
        output: Any = text
        if self._tools:
            calls = [self._calls[index] for index in sorted(self._calls)]
            output = {
                "content": text or None,
                "tool_calls": [
                    {**call, "id": call["id"] or f"call_{number}", "arguments": _arguments(call)}
                    for number, call in enumerate(calls)
                ],
            }
        elif self._parse:
            output = _parsed(text, self.finish)
        return FinalAnswer(
            output=output,
            usage=self._usage,
            finish="tool_calls" if self._calls else self.finish,
            confidence=None if self._logprob == math.inf else min(1.0, math.exp(self._logprob)),
            timing={"prefill_ms": prefill_ms, "decode_ms": decode_ms},
        )


def _arguments(call: Mapping[str, str]) -> Any:
    """Return the arguments of a call as an object; as the model's text when they are none."""
    try:
        return json.loads(call["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call["arguments"]


def _parsed(text: str, finish: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        why = "its answer was cut off by max_tokens" if finish == "length" else str(exc)
        raise ExecutionFailed(f"the model did not write JSON: {why}") from exc


def _usage(usage: Mapping[str, Any]) -> dict[str, int]:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": max(0, int(usage.get("prompt_tokens") or 0)),
        "output_tokens": max(0, int(usage.get("completion_tokens") or 0)),
        "cached_tokens": max(0, int(cached)),
    }


def vectors(body: Any, count: int) -> tuple[list[list[float]], dict[str, int]]:
    """Read an answer of ``/v1/embeddings``.

    Args:
        body: The answer.
        count: How many texts were sent.

    Returns:
        One vector for each text, in their order, and the usage.

    Raises:
        Garbage: It is not of the API's form, or of another number of texts.
    """
    try:
        data = sorted(body["data"], key=lambda one: int(one["index"]))
        found = [[float(number) for number in one["embedding"]] for one in data]
        usage = _usage(body.get("usage") or {})
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as exc:
        raise Garbage(f"the server sent no embeddings: {str(body)[:80]}") from exc
    if not all(map(math.isfinite, itertools.chain.from_iterable(found))):
        raise Garbage("the server sent vectors with numbers that are not finite")
    if len(found) != count:
        raise Garbage(f"the server sent {len(found)} vectors for {count} texts")
    return found, usage


def server_error(body: Any) -> FoamError:
    """Return the error that a server reports in a body or an event."""
    return ExecutionFailed(f"the server says: {error_text(body)}", retryable=True)


def error_text(body: Any) -> str:
    """Return the words of an error body; servers write it in several forms."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)[:500]
