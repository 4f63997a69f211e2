"""A client of one OpenAI-compatible server, as an instance; a door to httpx2."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import httpx2
import structlog
from pydantic import SecretStr

from capability_schemas.errors import ExecutionFailed, FoamError, InvalidTask, Overloaded
from node_agent.runtimes import base
from node_agent.runtimes.inloop import InLoopInstance, Put
from node_agent.runtimes.openai import GO_ON, can_go_on, request_body
from node_agent.runtimes.openai_stream import (
    ChatAnswer,
    EventStream,
    Garbage,
    error_text,
    server_error,
    vectors,
)

_TRAILER_S: Final = 0.1
_ERROR_LIMIT_BYTES: Final = 64 * 1024
_LIST_LIMIT_BYTES: Final = 4 * 1024 * 1024
_BODY_LIMIT_BYTES: Final = 64 * 1024 * 1024
_RETRY_LIMIT_MS: Final = 3_600_000
_KEPT_OPEN_S: Final = 4.0
"""How long an idle connection is kept, seconds: less than common servers keep it (uvicorn: 5)."""

_SAID: Final = "a a a a"
"""Words that most tokenizers cut alike, at the beginning of a message and further on."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a server is and how long it may take; see `openai.OpenAIOptions`."""

    base_url: str
    api_key: SecretStr | None
    model: str
    connect_s: float
    first_s: float
    between_s: float


class OpenAIInstance(InLoopInstance):
    """A client.

    It dies when its server cannot be reached or cuts an answer short: the next one, started on
    demand, looks whether the server is back.

    An answer that another node has begun is gone on with where the server can do that: some take a
    last message of the assistant for the beginning of the answer, others close it and begin anew.
    No field of the API tells; the number of tokens does, for a closed message takes more. From
    those that begin anew, the whole answer is asked for and what was shown passed over.

    Args:
        name: For logs and task names.
        server: The server.
        slots: Calls at a time.
        died: Called once after the end.
    """

    def __init__(self, *, name: str, server: Server, slots: int, died: base.Died) -> None:
        super().__init__(name=name, slots=slots, died=died, info={"engine": "openai"})
        self._server = server
        self._goes_on: bool | None = None
        headers = {"accept": "text/event-stream, application/json"}
        if server.api_key is not None:
            headers["authorization"] = f"Bearer {server.api_key.get_secret_value()}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            # Silence within an answer is watched here, with a limit of its own for its beginning.
            timeout=httpx2.Timeout(None, connect=server.connect_s, write=server.first_s),
            limits=httpx2.Limits(max_connections=slots, keepalive_expiry=_KEPT_OPEN_S),
            trust_env=False,  # no proxy and no password file that the node file does not name
        )

    async def _on_start(self) -> None:
        url = f"{self._server.base_url}/models"
        try:
            async with asyncio.timeout(self._server.connect_s * 2):
                async with self._client.stream("GET", url) as found:
                    body = await _read(found.aiter_bytes(), _LIST_LIMIT_BYTES)
        except TimeoutError as exc:
            raise base.InstanceFailed(
                f"the server at {self._server.base_url} was silent for "
                f"{self._server.connect_s * 2:g} s"
            ) from exc
        except httpx2.HTTPError as exc:
            raise base.InstanceFailed(
                f"no server of the OpenAI API answers at {self._server.base_url}: "
                f"{_say(exc)}; is it running?"
            ) from exc
        if found.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise base.InstanceFailed(
                f"{self._server.base_url} refuses the API key: "
                f"{self._without_key(_body_text(body))}"
            )
        models = _models(body)
        if models and self._server.model not in models:
            _log.warning("openai.model_unlisted", model=self._server.model, listed=models[:10])
        self._info["models"] = models

    def _without_key(self, text: str) -> str:
        """Return a server's words without the API key, which some repeat."""
        key = self._server.api_key
        return text if key is None else text.replace(key.get_secret_value(), "[API key]")

    async def _on_stopped(self) -> None:
        await self._client.aclose()

    async def answer(self, request: base.Request, put: Put) -> None:
        """Send a request and put its answers; see `InLoopInstance.answer`."""
        try:
            await self._answer(request, put)
        except httpx2.HTTPError as exc:
            raise self.lost(f"{self._server.base_url}: {_say(exc)}") from exc
        except FoamError as exc:
            exc.message = self._without_key(exc.message)
            exc.args = (exc.message,)
            raise

    async def _answer(self, request: base.Request, put: Put) -> None:
        loop = asyncio.get_running_loop()
        go_on = bool(request.shown) and can_go_on(request) and await self._can_go_on()
        body = request_body(request, go_on=go_on)
        started = loop.time()
        if "input" in body:
            await put(await self._embeddings(body))
            return
        answer = ChatAnswer(
            tools=bool(request.options.get("tools")),
            parse=bool(request.options.get("parse")),
            shown=request.shown or "" if go_on else "",
        )
        again = _Again("" if go_on else request.shown or "", self._server.base_url)
        first: float | None = None
        try:
            async with contextlib.aclosing(self._events(body)) as events:
                async for event in events:
                    text = answer.add(event)
                    if first is None and (text or answer.finish):
                        first = loop.time()
                    if fresh := again.fresh(text):
                        await put(base.Piece(fresh))
        except base.InstanceDied:
            if not answer.finish:  # else it is whole, and only its [DONE] is missing
                raise
        if not answer.finish:
            raise Garbage(
                "the server ended its answer without saying why; some do when the prompt is longer"
                " than their context"
            )
        again.end()
        first = loop.time() if first is None else first
        await put(
            answer.final(
                prefill_ms=(first - started) * 1000, decode_ms=(loop.time() - first) * 1000
            )
        )

    async def _can_go_on(self) -> bool:
        """Tell whether the server goes on behind a last message of the assistant; asked once."""
        if self._goes_on is None:
            try:
                none, once = await self._prompt_tokens(""), await self._prompt_tokens(_SAID)
                twice = await self._prompt_tokens(f"{_SAID} {_SAID}")
                self._goes_on = once - none <= twice - once
            except Garbage:
                self._goes_on = True  # it does not count: what the function declares holds
            except InvalidTask:
                self._goes_on = False  # it takes no such message
            _log.info("openai.probed", server=self._server.base_url, goes_on=self._goes_on)
        return self._goes_on

    async def _prompt_tokens(self, said: str) -> int:
        """Return how many tokens a prompt has behind which the model has said something."""
        messages = [{"role": "user", "content": _SAID}]
        body: dict[str, Any] = {"model": self._server.model, "max_tokens": 1, "messages": messages}
        if said:
            messages.append({"role": "assistant", "content": said})
            body |= GO_ON
        async with self._response("chat/completions", body) as (_, chunks):
            data = await _read(chunks, _ERROR_LIMIT_BYTES)
        try:
            return int(json.loads(data)["usage"]["prompt_tokens"])
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise Garbage("the server does not say how many tokens a prompt has") from exc

    async def _events(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        async with self._response("chat/completions", body) as (response, chunks):
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise _no_stream(await _read(chunks, _ERROR_LIMIT_BYTES), kind)
            stream = EventStream()
            async for data in chunks:
                for event in stream.feed(data):
                    yield event
                if stream.ended:
                    # What follows is the end of the response, after which the connection serves
                    # the next call; a server that holds it back loses no more than that.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_TRAILER_S):
                            async for _ in chunks:
                                pass
                    return

    async def _embeddings(self, body: dict[str, Any]) -> base.Final:
        async with self._response("embeddings", body) as (_, chunks):
            data = await _read(chunks, _BODY_LIMIT_BYTES)
        try:
            found, usage = vectors(json.loads(data), len(body["input"]))
        except (ValueError, RecursionError) as exc:
            raise Garbage(f"the server sent no JSON: {_body_text(data)}") from exc
        return base.Final(output=found, usage=usage)

    @contextlib.asynccontextmanager
    async def _response(
        self, path: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[httpx2.Response, AsyncGenerator[bytes, None]]]:
        """Send a request; yields a good response and its body in chunks, under the time limits."""
        request = self._client.build_request("POST", f"{self._server.base_url}/{path}", json=body)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._server.first_s
        try:
            async with asyncio.timeout_at(until):
                response = await self._client.send(request, stream=True)
        except TimeoutError:
            raise self._silent(self._server.first_s) from None
        try:
            async with contextlib.aclosing(self._chunks(response, until)) as chunks:
                if response.status_code != HTTPStatus.OK:
                    raise _refused(response, await _read(chunks, _ERROR_LIMIT_BYTES))
                yield response, chunks
        finally:
            await response.aclose()

    async def _chunks(self, response: httpx2.Response, until: float) -> AsyncGenerator[bytes, None]:
        loop = asyncio.get_running_loop()
        limit_s = self._server.first_s
        async with contextlib.aclosing(response.aiter_bytes()) as chunks:
            while True:
                try:
                    async with asyncio.timeout_at(until):
                        data = await anext(chunks, None)
                except TimeoutError:
                    raise self._silent(limit_s) from None
                if data is None:
                    return
                yield data
                limit_s = self._server.between_s
                until = loop.time() + limit_s

    def _silent(self, limit_s: float) -> base.InstanceDied:
        """Say that an answer stopped; the server may be well, so that other calls go on."""
        return base.InstanceDied(
            f"{self._server.base_url} said nothing for {limit_s:g} s", status=None
        )


class _Again:
    """Passes over what was shown of an answer that is given again from its beginning."""

    def __init__(self, shown: str, url: str) -> None:
        self._left = shown
        self._url = url

    def fresh(self, text: str) -> str:
        common = min(len(text), len(self._left))
        if text[:common] != self._left[:common]:
            raise self._differs()
        self._left = self._left[common:]
        return text[common:]

    def end(self) -> None:
        if self._left:
            raise self._differs()

    def _differs(self) -> ExecutionFailed:
        return ExecutionFailed(
            f"the server at {self._url} does not go on with an answer but gives it again, and gave"
            " another one than was shown before its node was lost: make it repeatable"
            ' (temperature = 0, or a seed), or declare continues = "restart"'
        )


async def _read(chunks: AsyncIterator[bytes], limit_bytes: int) -> bytes:
    """Return a body, or what fits of it."""
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > limit_bytes:
            break
    return bytes(data[:limit_bytes])


def _refused(response: httpx2.Response, data: bytes) -> FoamError:
    """Return the error behind a status other than 200, with the server's own words."""
    status = response.status_code
    message = f"the server answers {status}: {_body_text(data)}"
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return Overloaded(message, retry_after_ms=_retry_after_ms(response))
    if status in (400, 413, 422):
        return InvalidTask(message, status=status)
    retryable = status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return ExecutionFailed(message, retryable=retryable, status=status)


def _retry_after_ms(response: httpx2.Response) -> int:
    """Return ``Retry-After`` in milliseconds; 1000 where it is missing or a date."""
    try:
        asked_ms = int(float(response.headers["retry-after"]) * 1000)
        return min(max(0, asked_ms), _RETRY_LIMIT_MS)
    except (KeyError, ValueError, OverflowError):
        return 1000


def _no_stream(data: bytes, kind: str) -> FoamError:
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(data)
        if isinstance(body, dict) and "error" in body:
            return server_error(body)
    return Garbage(f"the server sent {kind or 'something'} and no event stream: {_body_text(data)}")


def _body_text(data: bytes) -> str:
    try:
        return error_text(json.loads(data))
    except (ValueError, RecursionError):
        return data[:200].decode("utf-8", errors="replace")


def _models(data: bytes) -> list[str]:
    """Return the models a server lists; none where it does not keep to the form."""
    try:
        return [str(one["id"]) for one in json.loads(data)["data"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def _say(exc: BaseException) -> str:
    return str(exc) or type(exc).__name__
