"""Request and reply over a session: the events of a task as one ordered stream.

A ``ReplyInbox`` holds the one reply subscription of a client and hands each event to the stream
of its task, which puts them in order (``broker.replies``). What was lost on the way (a broker that
dropped it, a disconnection) the stream asks the router to repeat.

::

    async with ReplyInbox(session=session, topics=topics, client="pump-7") as inbox:
        async with inbox.open("job-1", deadline=now_ms() + 30_000) as stream:
            session.post(topics.build(TopicKind.TASK, client="pump-7"), encode(task))
            async for event in stream:
                ...
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Final, Self

import structlog

from broker.lifecycle import Service
from broker.replies import ReplyOrder
from broker.session.base import Message, Session, Subscription
from capability_schemas.admin import AdminRequest
from capability_schemas.errors import (
    BrokerUnavailable,
    Conflict,
    DeadlineExceeded,
    FoamError,
    InvalidTopic,
    Overloaded,
    ProtocolError,
)
from capability_schemas.ids import new_uuid7, now_ms
from capability_schemas.provenance import Signer
from capability_schemas.reply import ErrorEvent, ReplyEvent, Result, decode_reply
from capability_schemas.task import ResumeRequest
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode

DEFAULT_GRACE_MS: Final = 2_000
GAP_PATIENCE_S: Final = 0.5
SILENCE_PATIENCE_S: Final = 15.0
_PATIENCE_CAP_S: Final = 5.0
_BUFFER_LIMIT: Final = 10_000
_BUFFER_BYTES: Final = 8 * 1024 * 1024
_INBOX_LIMIT: Final = 10_000
_REPLY_LIMIT_BYTES: Final = 16 * 1024 * 1024
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Clock = Callable[[], int]
"""Returns UTC milliseconds."""


class TaskStream:
    """The reply events of one task: an async iterator that ends after the terminal event.

    Bounded: past ``limit`` unread events, or ``limit_bytes`` that arrived since nothing was unread,
    further ones are dropped and asked for again when the reader has caught up. One reader at a
    time. Leaving its context closes it.

    Args:
        task: The task.
        deadline: When the caller stops waiting, UTC milliseconds, before ``grace_ms``.
        grace_ms: Added to the deadline, so that the router's own ``deadline_exceeded`` arrives
            before ours is raised, milliseconds.
        resume: Asks for the repetition of everything from a number on.
        closed: Called once when the stream is closed.
        clock: UTC milliseconds.
        source: Who alone may speak in it; anybody who may publish there when None.
        limit: Most unread events.
        limit_bytes: Most bytes of them.
    """

    def __init__(
        self,
        *,
        task: str,
        deadline: int,
        grace_ms: int,
        resume: Callable[[int], None],
        closed: Callable[[], None],
        clock: Clock,
        source: str | None = None,
        limit: int = _BUFFER_LIMIT,
        limit_bytes: int = _BUFFER_BYTES,
    ) -> None:
        self.task = task
        self._deadline = deadline
        self._grace_ms = grace_ms
        self._resume = resume
        self._on_closed = closed
        self._clock = clock
        self._source = source
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._order = ReplyOrder()
        self._unread: deque[ReplyEvent] = deque()
        self._arrived = asyncio.Event()
        self._lossy = False
        self._patience_s = GAP_PATIENCE_S
        self._quiet_since: float | None = None
        self._failure: FoamError | None = None
        self._closed = False
        self._finished = False

    @property
    def next_seq(self) -> int:
        """Number of the next event that has not arrived in order yet."""
        return self._order.next_seq

    def close(self) -> None:
        """Stop listening; events still unread are lost. Idempotent."""
        if not self._closed:
            self._closed = True
            self._on_closed()
            self._arrived.set()

    def offer(self, event: ReplyEvent, source: str, size_bytes: int = 0) -> None:
        """Take an event from the inbox; one for which there is no room is asked for again later.

        Args:
            event: The event.
            source: Who sent it, by its topic.
            size_bytes: Of its payload.
        """
        if self._source not in {None, source}:
            return
        waiting = len(self._unread) + self._order.held
        if waiting == 0:
            self._bytes = 0
        # What the reader waits for is never too much: all that is held waits for it as well.
        elif (waiting >= self._limit or self._bytes + size_bytes > self._limit_bytes) and (
            self._unread or getattr(event, "seq", None) != self._order.next_seq
        ):
            self._lossy = True
            return
        self._bytes += size_bytes
        before = self._order.next_seq
        self._unread.extend(self._order.push(event, source))
        if self._order.next_seq != before:
            self._patience_s = GAP_PATIENCE_S
        self._quiet_since = None
        self._arrived.set()

    def fail(self, error: FoamError) -> None:
        """End the stream with an error once what has arrived is read."""
        if self._failure is None:
            self._failure = error
        self._arrived.set()

    def note_loss(self) -> None:
        """An event was dropped on the way: ask for it again when the reader has caught up."""
        self._lossy = True
        self._arrived.set()

    def ask_again(self) -> None:
        """Ask for the repetition of what may have been lost, unless the end has arrived."""
        if not self._order.ended and not self._closed:
            self._lossy = False
            self._resume(self._order.next_seq)

    def __aiter__(self) -> AsyncIterator[ReplyEvent]:
        return self

    async def __anext__(self) -> ReplyEvent:
        """Return the next event. Cancellation is safe: no event is lost by it.

        Raises:
            StopAsyncIteration: The terminal event was read, or the stream is closed.
            DeadlineExceeded: Deadline and grace have passed without a terminal event.
            FoamError: The session cannot go on.
        """
        while not self._unread:
            if self._finished or self._closed:
                raise StopAsyncIteration
            if self._failure is not None:
                raise self._failure
            await self._wait()
        event = self._unread.popleft()
        if isinstance(event, Result | ErrorEvent):
            self._finished = True
            self.close()
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _wait(self) -> None:
        """Wait for an arrival; when it takes long, ask for a repetition.

        How long it takes counts across calls, for a reader may come and go.
        """
        loop = asyncio.get_running_loop()
        left_s = (self._deadline + self._grace_ms - self._clock()) / 1000
        if left_s <= 0:
            raise DeadlineExceeded(
                f"no end of task {self.task} by its deadline; the next event wanted was number "
                f"{self._order.next_seq}",
                task=self.task,
                next_seq=self._order.next_seq,
            )
        if self._lossy:
            self.ask_again()
        if self._quiet_since is None:
            self._quiet_since = loop.time()
        patience_s = self._patience_s if self._order.held else SILENCE_PATIENCE_S
        patience_s = max(0.0, self._quiet_since + patience_s - loop.time())
        self._arrived.clear()
        try:
            async with asyncio.timeout(min(left_s, patience_s)):
                await self._arrived.wait()
        except TimeoutError:
            if left_s > patience_s:
                self._quiet_since = None
                self._patience_s = min(self._patience_s * 2, _PATIENCE_CAP_S)
                self.ask_again()


class ReplyInbox(Service):
    """The one reply subscription of a client, shared by all its tasks.

    Args:
        session: Session of the client; entered by its owner.
        topics: Topic grammar of the site.
        client: Identity of the client: the ``{client}`` level of its topics.
        clock: UTC milliseconds.
    """

    def __init__(
        self, *, session: Session, topics: Topics, client: str, clock: Clock = now_ms
    ) -> None:
        super().__init__(service_id=client)
        self.session = session
        self.topics = topics
        self.client = client
        self.clock = clock
        self._streams: dict[str, TaskStream] = {}
        self._subscription: Subscription | None = None
        self._forget: Callable[[], None] | None = None
        self._resume_topic = topics.build(TopicKind.RESUME, client=client)
        self.stray = 0
        """Events that belonged to no open stream."""

    def open(
        self,
        task: str,
        *,
        deadline: int,
        grace_ms: int = DEFAULT_GRACE_MS,
        resumable: bool = True,
        node: str | None = None,
    ) -> TaskStream:
        """Start listening for the events of a task; do so before publishing it.

        Args:
            task: Id of the task.
            deadline: When to stop waiting, UTC milliseconds.
            grace_ms: Added to it, milliseconds.
            resumable: Whether a router keeps the events and can be asked to repeat them.
            node: The node that is asked for it directly, and keeps the events instead: nobody else
                is listened to.

        Raises:
            Conflict: A stream for this task is open.
        """
        if task in self._streams:
            raise Conflict(f"the events of task {task} are being read already", task=task)
        topic = self._resume_topic
        if node is not None:
            topic = self.topics.build(TopicKind.DIRECT_RESUME, node=node, client=self.client)
        stream = TaskStream(
            task=task,
            deadline=deadline,
            grace_ms=grace_ms,
            resume=lambda seq: self._ask(topic, task, seq) if resumable else None,
            closed=lambda: self._drop(task),
            clock=self.clock,
            source=node,
        )
        self._streams[task] = stream
        return stream

    async def _on_start(self) -> None:
        self._subscription = await self.session.subscribe(
            self.topics.filter(TopicKind.REPLY, client=self.client),
            self._on_reply,
            queue_limit=_INBOX_LIMIT,
            on_overflow=self._on_overflow,
        )
        self._forget = self.session.on_connection(self._on_connection)
        self.spawn(self._watch_session(), name="session")

    async def _on_stop(self) -> None:
        if self._forget is not None:
            self._forget()
        if self._subscription is not None:
            await self.session.unsubscribe(self._subscription)

    async def _on_stopped(self) -> None:
        self._fail_all(BrokerUnavailable(f"the inbox of {self.client} was closed"))

    async def _watch_session(self) -> None:
        try:
            await self.session.wait()
        except FoamError as error:
            self._fail_all(error)
        else:
            self._fail_all(BrokerUnavailable(f"the session of {self.client} has ended"))

    async def _on_reply(self, message: Message) -> None:
        try:
            source = self.topics.parse(message.topic).levels["source"]
            event = decode_reply(message.payload, limit_bytes=_REPLY_LIMIT_BYTES)
        except ProtocolError as error:
            _log.warning("inbox.bad_event", topic=message.topic, reason=error.message)
            return
        stream = self._streams.get(event.task)
        if stream is None:
            self.stray += 1
            return
        stream.offer(event, source, len(message.payload))

    def _on_overflow(self, message: Message) -> None:
        try:
            task = self.topics.parse(message.topic).levels["task"]
        except InvalidTopic:
            return
        stream = self._streams.get(task)
        if stream is not None:
            stream.note_loss()

    def _on_connection(self, up: bool) -> None:
        if up:  # what was published meanwhile is gone, unless the broker keeps our session
            for stream in tuple(self._streams.values()):
                stream.ask_again()

    def _ask(self, topic: str, task: str, seq: int) -> None:
        try:
            self.session.post(topic, encode(ResumeRequest(task=task, from_seq=seq)))
        except (Overloaded, BrokerUnavailable) as error:  # the next round asks again
            _log.info("inbox.resume_postponed", task=task, reason=error.message)

    def _drop(self, task: str) -> None:
        self._streams.pop(task, None)

    def _fail_all(self, error: FoamError) -> None:
        for stream in tuple(self._streams.values()):
            stream.fail(error)


async def call_admin(
    inbox: ReplyInbox,
    *,
    target: str,
    verb: str,
    args: dict[str, Any] | None = None,
    timeout_s: float = 10.0,
    signer: Signer | None = None,
) -> Any:
    """Ask a router or registry to do something and wait for its answer.

    Args:
        inbox: Inbox of an admin client.
        target: Id of the router or registry.
        verb: What to do.
        args: Arguments of the verb, JSON.
        timeout_s: Time limit, seconds.
        signer: Signs the request, where it has a passport to show; None: it goes unsigned.

    Returns:
        The ``output`` of its result event: JSON.

    Raises:
        DeadlineExceeded: No answer in time: is ``target`` running, and may the client do this?
        FoamError: What the target answered; or the session cannot go on.
    """
    request = AdminRequest(id=new_uuid7(), verb=verb, args=args or {})
    if signer is not None and signer.passport is not None:
        named = {
            "sender": signer.identity,
            "client": inbox.client if inbox.client != signer.identity else None,
            "target": target,
            "sent_at": inbox.clock(),
            "passport": signer.passport,
        }
        request = signer.sign(request.model_copy(update=named))
    deadline = inbox.clock() + round(timeout_s * 1000)
    topic = inbox.topics.build(TopicKind.ADMIN, target=target, client=inbox.client)
    async with inbox.open(request.id, deadline=deadline, grace_ms=0, resumable=False) as stream:
        inbox.session.post(topic, encode(request))
        try:
            async for event in stream:
                if isinstance(event, ErrorEvent):
                    raise event.to_error()
                if isinstance(event, Result):
                    return event.output
        except DeadlineExceeded as error:
            if error.remote:
                raise
            raise DeadlineExceeded(
                f"{target} did not answer {verb} within {timeout_s:g} s: is it running, and may "
                f"{inbox.client} ask it?",
                target=target,
                verb=verb,
            ) from error
    raise BrokerUnavailable(f"the answer of {target} to {verb} was cut off")
