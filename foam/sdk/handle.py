"""``TaskHandle``: one task as whoever asked for it sees it, from its first event to its end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Final

from broker.replies import AnswerText
from broker.rpc import TaskStream
from capability_schemas.errors import BrokerUnavailable, DeadlineExceeded, Overloaded
from capability_schemas.passport import PassportBook
from capability_schemas.provenance import check_result
from capability_schemas.reply import Chunk, ErrorEvent, ReplyEvent, Result, Routed
from foam.sdk.direct import Direct, DirectStream, RoutersAreBack

if TYPE_CHECKING:
    from foam.sdk.client import MeshClient

__all__ = ["TaskHandle"]

_SILENCE_S: Final = 2.0
"""Silence after which a task is published again, seconds; doubles each time."""

_LOOK_S: Final = 1.0
"""How often it is looked whether a node has to be asked instead, seconds."""

Detour = Callable[[], Awaitable[DirectStream | None]]
"""Finds a node to ask in place of routers that do not answer; None: not now."""


class TaskHandle:
    """One submitted task: its events, its text, its result. One reader at a time.

    Iterating yields every reply event in order and ends after the terminal one, be it a result or
    an error. `text` and `result` raise the error instead. Leaving the client closes every handle.

    While no router lives a node is asked itself (`direct`), from which there is no fail-over.

    Attributes:
        routed: The latest choice of a node; None before the first.
        outcome: The terminal event; None before it has arrived.
    """

    def __init__(
        self,
        *,
        stream: TaskStream | DirectStream,
        client: "MeshClient",
        publish: Callable[[], Awaitable[None]],
        book: PassportBook | None = None,
        detour: Detour | None = None,
    ) -> None:
        self.routed: Routed | None = None
        self.outcome: Result | ErrorEvent | None = None
        self._stream = stream
        self._client = client
        self._publish = publish
        self._book = book
        self._detour = detour
        self._heard = False

    @property
    def id(self) -> str:
        """Id of the task: another one from when it was taken back, or a node refused it."""
        return self._stream.task

    @property
    def direct(self) -> Direct | None:
        """Who was asked itself because no router lives; None where routers have the task."""
        return self._stream.direct if isinstance(self._stream, DirectStream) else None

    def __aiter__(self) -> AsyncIterator[ReplyEvent]:
        return self

    async def __anext__(self) -> ReplyEvent:
        """Return the next event; cancellation is safe.

        Raises:
            StopAsyncIteration: The terminal event was read.
            BadSignature, AccessDenied: The result is not one of the node that it names, where that
                was to be checked.
            DeadlineExceeded: Nobody ended the task in time.
            NodeLost: The node that was asked itself is gone.
            BrokerUnavailable: The session cannot go on.
        """
        try:
            event = await (self._next() if self._heard else self._first())
        except DeadlineExceeded as error:
            if (why := self._client.outage.reason()) is None:
                raise
            raise DeadlineExceeded(f"{why}: {error.message}", gone=why, **error.detail) from error
        self._heard = True
        if isinstance(event, Routed) and not event.is_nobodys:
            self.routed = event
        elif isinstance(event, Result | ErrorEvent):
            if self._book is not None and isinstance(event, Result):
                check_result(event, client=self._client.client, book=self._book)
            self.outcome = event
        return event

    async def _next(self) -> ReplyEvent:
        """Wait for an event that is not the first; say what is gone meanwhile."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        while not isinstance(self._stream, DirectStream):
            try:
                async with asyncio.timeout(_LOOK_S):
                    event = await anext(self._stream)
            except TimeoutError:
                self._client.outage.look(loop.time() - since)
            else:
                self._client.outage.look(0.0)
                return event
        return await anext(self._stream)

    async def _first(self) -> ReplyEvent:
        """Wait for the first event; publish the task again while there is none.

        A broker that was killed and started again confirms tasks before the router is back, and
        forgets them. The id makes the repetition harmless.
        """
        loop = asyncio.get_running_loop()
        patience_s = _SILENCE_S
        again_at = loop.time() + patience_s
        while True:
            if isinstance(self._stream, DirectStream):
                try:
                    return await anext(self._stream)
                except RoutersAreBack:
                    await self._go_back(self._stream)
                    again_at = loop.time() + patience_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_LOOK_S, max(0.0, again_at - loop.time()))):
                    return await anext(self._stream)
            self._client.outage.look(0.0)  # of routers that are gone the detour tells
            if self._detour is not None and (stream := await self._detour()) is not None:
                self._stream.close()
                self._stream = stream
            elif loop.time() >= again_at:
                patience_s *= 2
                again_at = loop.time() + patience_s
                with contextlib.suppress(BrokerUnavailable, Overloaded):  # the next turn may do
                    await self._publish()

    async def _go_back(self, stream: DirectStream) -> None:
        """Give the task to the routers after all: no node has run it."""
        stream.close()
        self._detour = None
        self._stream, self._publish = self._client.return_to_routers(stream)
        with contextlib.suppress(BrokerUnavailable, Overloaded):  # published again in a moment
            await self._publish()

    async def text(self) -> AsyncIterator[str]:
        """Yield the answer as text, piece by piece; an answer without chunks comes as one piece.

        Raises:
            FoamError: The task ended with an error; its class tells the code.
        """
        answer = AnswerText()
        async for event in self:
            if isinstance(event, ErrorEvent):
                raise event.to_error()
            if isinstance(event, Chunk | Result) and (text := answer.add(event)):
                yield text

    async def result(self) -> Result:
        """Wait for the end and return the result event.

        Raises:
            FoamError: The task ended with an error; its class tells the code.
        """
        async for _ in self:
            pass
        if isinstance(self.outcome, Result):
            return self.outcome
        if isinstance(self.outcome, ErrorEvent):
            raise self.outcome.to_error()
        raise BrokerUnavailable(
            f"the events of task {self.id} were closed before its end", task=self.id
        )

    async def cancel(self) -> None:
        """Ask for the end of the task; its last event, whatever came first, still arrives.

        Raises:
            BrokerUnavailable: The broker did not confirm the request in time.
        """
        if isinstance(self._stream, DirectStream):
            await self._stream.cancel()
        else:
            await self._client.cancel(self.id)

    def close(self) -> None:
        """Stop listening; the task itself goes on. Idempotent."""
        self._stream.close()
