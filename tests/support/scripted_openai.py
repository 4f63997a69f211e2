"""A server of the OpenAI API whose answers a test writes beforehand, its misbehaviour included.

::

    async with ScriptedOpenAI(answers=[Answer(text="yes"), Answer(status=500)]) as server:
        ...                                        # server.base_url: http://127.0.0.1:PORT/v1
        assert server.bodies[0]["messages"][-1]["content"] == "well?"

An answer may also be a function of the request's body (a dictionary) that returns an `Answer`;
``answers`` may be one such function, asked for every request.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

_READ_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server does with one request.

    Attributes:
        text: The words; several strings are streamed as that many pieces.
        tool_calls: ``(name, arguments)`` pairs; arguments are a mapping, or text sent as it is.
            When streamed, the arguments of a call come in two fragments.
        logprobs: Log probability of the token behind each piece of text, where asked for.
        finish: Why it ended; derived when None.
        usage: ``prompt_tokens``, ``completion_tokens``, ``cached_tokens``.
        embeddings: One vector for each text of ``/v1/embeddings``.
        status: HTTP status; anything but 200 answers with ``message``.
        message: Text of the error.
        headers: Further response headers.
        raw: The body in place of everything above, as it is; its type is ``text/event-stream``.
        then: ``end`` properly; ``hang`` (say nothing more until the client goes); or ``die`` (cut
            the connection), after the text so far.
        hang_first: Say nothing at all, no response header either, until the client goes.
    """

    text: str | Sequence[str] = ()
    tool_calls: Sequence[tuple[str, Mapping[str, Any] | str]] = ()
    logprobs: Sequence[float] = ()
    finish: str | None = None
    usage: Mapping[str, int] = field(
        default_factory=lambda: {"prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 0}
    )
    embeddings: Sequence[Sequence[float]] = ()
    status: int = 200
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    then: Literal["end", "hang", "die"] = "end"
    hang_first: bool = False


Scripted = Answer | Callable[[dict[str, Any]], Answer]


class ScriptedOpenAI:
    """The server: an ``async with``; requests are answered in the order of ``answers``.

    A request beyond the script is answered with status 500 and says so.

    Args:
        answers: The script.
        port: Where to listen; 0 takes a free one.

    Attributes:
        requests: ``(path, headers in lower case, body)`` of every request so far.
        hung_up: Requests whose client went away while the server hung.
        accepted: Connections so far.
        open: Connections that are open now.
    """

    def __init__(
        self,
        answers: Sequence[Scripted] | Callable[[dict[str, Any]], Answer],
        *,
        port: int = 0,
    ) -> None:
        self._answers = answers if callable(answers) else list(answers)
        self._port = port
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.hung_up = 0
        self.accepted = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    @property
    def base_url(self) -> str:
        """Address with the version prefix, as clients take it."""
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """Bodies of the requests so far."""
        return [body for _, _, body in self.requests]

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        try:
            while await self._turn(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _turn(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request_line, *lines = head.strip().split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(data) if data else {}
        path = request_line.split()[1]
        if path.endswith("/models"):
            await _send_json(writer, 200, {"object": "list", "data": [{"id": "scripted"}]}, {})
            return True
        number = len(self.requests)
        self.requests.append((path, headers, body))
        answer = self._answer(number, body)
        if answer.hang_first:
            await self._hang(reader)
            return False
        if answer.status != 200:
            error = {"error": {"message": answer.message, "type": "scripted", "code": None}}
            await _send_json(writer, answer.status, error, answer.headers)
            return True
        if path.endswith("/embeddings"):
            await _send_json(writer, 200, _embeddings(answer), answer.headers)
            return True
        if not body.get("stream"):
            said = json.loads(answer.raw) if answer.raw else _completion(answer, body)
            await _send_json(writer, 200, said, answer.headers)
            return True
        return await self._stream(reader, writer, answer, body)

    def _answer(self, number: int, body: dict[str, Any]) -> Answer:
        if callable(self._answers):
            return self._answers(body)
        if number >= len(self._answers):
            return Answer(status=500, message=f"the script has no answer {number + 1}")
        answer = self._answers[number]
        return answer(body) if callable(answer) else answer

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answer: Answer,
        body: dict[str, Any],
    ) -> bool:
        extra = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            + extra.encode()
            + b"\r\n"
        )
        if answer.raw:
            await _send_chunk(writer, answer.raw)
        elif answer.raw is None:
            for event in _events(answer, body):
                await _send_chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
        if answer.then == "hang":
            await self._hang(reader)
            return False
        if answer.then == "die":
            return False
        if answer.raw is None:
            await _send_chunk(writer, b"data: [DONE]\n\n")
        await _send_chunk(writer, b"")
        return True

    async def _hang(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(_READ_BYTES):
                pass
        self.hung_up += 1


async def _send_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()


async def _send_json(
    writer: asyncio.StreamWriter, status: int, value: Any, headers: Mapping[str, str]
) -> None:
    data = json.dumps(value).encode()
    lines = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
    head = (
        f"HTTP/1.1 {status} Scripted\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n{lines}\r\n"
    )
    writer.write(head.encode() + data)
    await writer.drain()


def _pieces(answer: Answer) -> list[str]:
    return [answer.text] if isinstance(answer.text, str) else list(answer.text)


def _finish(answer: Answer) -> str:
    return answer.finish or ("tool_calls" if answer.tool_calls else "stop")


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, completion = answer.usage["prompt_tokens"], answer.usage["completion_tokens"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answer.usage.get("cached_tokens", 0)},
    }


def _arguments(arguments: Mapping[str, Any] | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _tool_calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": name, "arguments": _arguments(arguments)},
        }
        for number, (name, arguments) in enumerate(answer.tool_calls)
    ]


def _frame(kind: str, body: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": kind,
        "created": 0,
        "model": body.get("model", "scripted"),
        "choices": choices,
    }


def _logprobs(answer: Answer, body: dict[str, Any], piece: int, text: str) -> dict[str, Any]:
    if not body.get("logprobs") or piece >= len(answer.logprobs):
        return {}
    return {"logprobs": {"content": [{"token": text, "logprob": answer.logprobs[piece]}]}}


def _events(answer: Answer, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the chunks of a streamed answer, in the shapes that real servers send."""

    def event(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": None, **more}
        return _frame("chat.completion.chunk", body, [choice])

    events = [event({"role": "assistant", "content": None if answer.tool_calls else ""})]
    for number, piece in enumerate(_pieces(answer)):
        events.append(event({"content": piece}, **_logprobs(answer, body, number, piece)))
    for index, call in enumerate(_tool_calls(answer)):
        text = call["function"]["arguments"]
        half = len(text) // 2
        first = {**call, "index": index, "function": {**call["function"], "arguments": text[:half]}}
        events.append(event({"tool_calls": [first]}))
        rest = {"index": index, "function": {"arguments": text[half:]}}
        events.append(event({"tool_calls": [rest]}))
    if answer.then != "end":
        return events
    events.append(event({}, finish_reason=_finish(answer)))
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append({**_frame("chat.completion.chunk", body, []), "usage": _usage(answer)})
    return events


def _completion(answer: Answer, body: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(_pieces(answer)) or None}
    if answer.tool_calls:
        message["tool_calls"] = _tool_calls(answer)
    choice = {"index": 0, "message": message, "finish_reason": _finish(answer)}
    return {**_frame("chat.completion", body, [choice]), "usage": _usage(answer)}


def _embeddings(answer: Answer) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": list(vector)}
        for index, vector in enumerate(answer.embeddings)
    ]
    return {"object": "list", "model": "scripted", "data": data, "usage": _usage(answer)}
