"""The mesh as a node sees it that asks something of others: its agents' way to other nodes."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from broker.lifecycle import Service
from broker.rpc import ReplyInbox, TaskStream
from broker.session.base import Session
from capability_schemas.errors import BrokerUnavailable, InvalidTask, Overloaded, TooLarge
from capability_schemas.ids import new_uuid7, now_ms
from capability_schemas.reply import Chunk, ErrorEvent, ReplyEvent, Result, Step
from capability_schemas.task import TASK_LIMIT_BYTES, CancelRequest, Task
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode, first_problem
from node_agent.runtimes import base

_SILENCE_S: Final = 2.0
"""How long a task may go unanswered before it is published again, seconds; doubles every time."""

_GRACE_MS: Final = 500


class MeshClient(Service):
    """Sends tasks over the node's own session, under the node's own name (ADR 13).

    It subscribes at the first ask: a node whose functions ask nothing of others pays nothing. The
    state belongs to the event loop it is started on.

    Args:
        session: The node's session, entered and left by its owner, left after this.
        topics: Topic grammar of the site.
        node: The node's id, which is the client of the tasks.
        limit: Most tasks under way; further ones are refused. Agents that call each other in a
            circle end here at the latest.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        node: str,
        limit: int = 64,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        super().__init__(service_id=node)
        self._session = session
        self._topics = topics
        self._node = node
        self._limit = limit
        self._clock = clock
        self._inbox: ReplyInbox | None = None
        self._opening = asyncio.Lock()  # of _inbox
        self._under_way = 0

    async def ask(
        self, task: Mapping[str, Any], *, timeout_s: float
    ) -> AsyncGenerator[base.Answer, None]:
        """Send a task and yield its answer; closing the iterator early cancels the task.

        Args:
            task: Fields of a task (PROTOCOL section 2) but ``id`` and ``timeout_ms``.
            timeout_s: Time for it, seconds.

        Raises:
            InvalidTask: A field does not fit.
            Overloaded: Too many tasks are under way, or the session has no room.
            DeadlineExceeded: It ended in nothing in time.
            FoamError: It ended in this error.
        """
        wanted = _checked(task, timeout_s)
        if self._under_way >= self._limit:
            raise Overloaded(
                f"node {self._node} has {self._limit} tasks of its own under way", limit=self._limit
            )
        self._under_way += 1
        try:
            inbox = await self._open_inbox()
            deadline = self._clock() + wanted.timeout_ms
            async with (
                inbox.open(str(wanted.id), deadline=deadline, grace_ms=_GRACE_MS) as stream,
                contextlib.aclosing(self._answers(wanted, stream)) as answers,
            ):
                async for answer in answers:
                    yield answer
        finally:
            self._under_way -= 1

    async def _on_stopped(self) -> None:
        if self._inbox is not None:
            await self._inbox.stop()

    async def _open_inbox(self) -> ReplyInbox:
        """Return the inbox, subscribed.

        Raises:
            BrokerUnavailable: The client does not run, or the broker does not answer.
        """
        async with self._opening:
            if not self.running:
                raise BrokerUnavailable(f"node {self._node} asks nothing of the mesh any more")
            if self._inbox is None:
                inbox = ReplyInbox(
                    session=self._session,
                    topics=self._topics,
                    client=self._node,
                    clock=self._clock,
                )
                await inbox.start()
                self._inbox = inbox
            return self._inbox

    async def _answers(self, task: Task, stream: TaskStream) -> AsyncGenerator[base.Answer, None]:
        ended = False
        try:
            event: ReplyEvent | None = await self._first(task, stream)
            while event is not None:
                ended = isinstance(event, Result | ErrorEvent)
                answer = _answer(event)
                if answer is not None:
                    yield answer
                event = await anext(stream, None)
            if not ended:
                raise BrokerUnavailable(f"the events of task {task.id} were cut off")
        finally:
            if not ended:
                with contextlib.suppress(Overloaded, BrokerUnavailable):  # the deadline ends it
                    self._session.post(
                        self._topics.build(TopicKind.CANCEL, client=self._node),
                        encode(CancelRequest(task=str(task.id))),
                    )

    async def _first(self, task: Task, stream: TaskStream) -> ReplyEvent | None:
        """Publish a task and return its first event; again while there is none.

        The id makes the repetition harmless, and a broker that was started again forgets.
        """
        topic = self._topics.build(TopicKind.TASK, client=self._node)
        payload = encode(task)
        patience_s = _SILENCE_S
        while True:
            self._session.post(topic, payload)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    return await anext(stream, None)
            patience_s *= 2


def _checked(task: Mapping[str, Any], timeout_s: float) -> Task:
    try:
        wanted = Task.model_validate(
            {**task, "id": new_uuid7(), "timeout_ms": max(0, round(timeout_s * 1000))}
        )
    except ValidationError as exc:
        field, problem = first_problem(exc)
        raise InvalidTask(f"{field}: {problem}" if field else problem, field=field) from exc
    size_bytes = len(encode(wanted))
    if size_bytes > TASK_LIMIT_BYTES:
        raise TooLarge("task", size_bytes=size_bytes, limit_bytes=TASK_LIMIT_BYTES)
    return wanted


def _answer(event: ReplyEvent) -> base.Answer | None:
    """Return what an event says about the answer; None for what is only about its way.

    Raises:
        FoamError: The task ended in it.
    """
    if isinstance(event, Chunk):
        return base.Piece(event.data)
    if isinstance(event, Step):
        return base.Progress(step=event.step, state=event.state, detail=event.detail)
    if isinstance(event, ErrorEvent):
        raise event.to_error()
    if isinstance(event, Result):
        usage = event.usage.model_dump(exclude_none=True) if event.usage is not None else {}
        counts = ("input_tokens", "output_tokens")
        return base.Final(
            output=event.output,
            usage={name: usage[name] for name in counts if name in usage},
            confidence=event.confidence,
        )
    return None
