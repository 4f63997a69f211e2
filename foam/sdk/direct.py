"""Asking a node itself, while no router lives (ADR 37).

A task is either given to routers or to nodes, never to both: what was published to routers is taken
back first (``cancel``, confirmed by the broker), and goes to a node under another id. A router that
comes back finds the task and its cancellation, and runs nothing.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from broker.presence import RouterPresence
from broker.rpc import ReplyInbox, TaskStream
from broker.session.base import Session
from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    FoamError,
    NodeLost,
    Overloaded,
    Unavailable,
)
from capability_schemas.ids import new_uuid7, now_ms
from capability_schemas.reply import ErrorEvent, ReplyEvent
from capability_schemas.task import CancelRequest, Task
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode

if TYPE_CHECKING:
    from foam.sdk.fleet import FleetView

__all__ = ["Direct", "DirectRoad", "DirectStream", "RoutersAreBack"]

PATIENCE_S: Final = 5.0
"""How long a router is waited for that may just be starting again, seconds."""

_ANSWER_S: Final = 2.0
"""How long a node may take for its first word, seconds; it is asked twice."""

_LOOK_S: Final = 2.0
"""How often it is seen to whether the node lives, seconds."""

_VIEW_S: Final = 3.0
_MOST_NODES: Final = 8
_FINAL_CODES: Final = frozenset({"invalid_task", "too_large", "unauthorized"})
"""Refusals that another node would repeat."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class RoutersAreBack(Unavailable):
    """A node refuses a task that routers should have: one lives, or they let nobody past them."""


@dataclass(frozen=True, slots=True)
class Direct:
    """A node was asked itself.

    Attributes:
        node: The node.
        function: Its function.
        version: Version of the function.
        reason: Why, in words.
        missing: What nobody sees to then.
    """

    node: str
    function: str
    version: str
    reason: str = "no router lives"
    missing: tuple[str, ...] = ("fail-over", "journal", "quotas", "matching by meaning")

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.reason}: {self.node} is asked itself for {self.function} {self.version}; "
            f"without {', '.join(self.missing)}"
        )


class DirectStream:
    """The events of a task that nodes are asked for one after the other, until one takes it.

    An async iterator like `broker.rpc.TaskStream`; one reader at a time. Each node gets an id of
    its own, unless the id is the caller's: so no id ends twice.

    Args:
        task: The task, with its id.
        records: Whom to ask for what, best first.
        deadline: UTC milliseconds.
        session: The client's session.
        inbox: Where events arrive.
        view: Tells whether a node lives.
        given_id: Whether the id is the caller's.
        told: Called with what the task waits for, in words.

    Attributes:
        task: Id of the task, as the node that is asked knows it.
        given_id: As given.
        asked: The task.
        deadline: UTC milliseconds.
        direct: Who is being asked.
    """

    def __init__(
        self,
        *,
        task: Task,
        records: list[CatalogRecord],
        deadline: int,
        session: Session,
        inbox: ReplyInbox,
        view: "FleetView",
        given_id: bool,
        told: Callable[[str], None],
    ) -> None:
        self.given_id = given_id
        self._told = told
        self.task = str(task.id)
        self.direct: Direct | None = None
        self.asked = task
        self._left = records[:_MOST_NODES]
        self._record = self._left[0]
        self.deadline = deadline
        self._session = session
        self._inbox = inbox
        self._view = view
        self._stream: TaskStream | None = None
        self._heard = False
        self._cancelled = False

    def __aiter__(self) -> AsyncIterator[ReplyEvent]:
        return self

    async def __anext__(self) -> ReplyEvent:
        """Return the next event. Cancellation is safe.

        Raises:
            StopAsyncIteration: The last event was read.
            RoutersAreBack: The task was not run, and is for a router.
            NodeLost: The node that had it is gone; nobody else is asked.
            DeadlineExceeded: Nobody ended it in time.
            BrokerUnavailable: The session cannot go on.
        """
        while True:
            if self._stream is None:
                self._begin()
            event = await (self._follow() if self._heard else self._first())
            if event is None:
                continue
            if not (isinstance(event, ErrorEvent) and event.detail.get("refused")):
                self._heard = True
                return event
            closed = event.code == "policy_denied" and event.retryable and not self._left
            if "router" in event.detail or (closed and not self._cancelled):
                self._told(f"the task goes to the routers after all: {event.message}")
                raise RoutersAreBack(event.message)
            _log.info("direct.refused", node=self._record.node, reason=event.message)
            if self._cancelled or not self._left or event.code in _FINAL_CODES:
                return event
            self._drop()

    async def cancel(self) -> None:
        """Ask the node to stop; its last event still arrives.

        Raises:
            BrokerUnavailable: The broker did not confirm it in time.
        """
        self._cancelled = True  # nobody else is asked, even if this node has not begun
        await self._session.publish(self._topic(TopicKind.DIRECT_CANCEL), self._cancellation())

    def close(self) -> None:
        """Stop listening; the node goes on. Idempotent."""
        if self._stream is not None:
            self._stream.close()

    def _begin(self) -> None:
        self._record = record = self._left.pop(0)
        self.direct = Direct(record.node, record.function, record.version)
        self._stream = self._inbox.open(self.task, deadline=self.deadline, node=record.node)

    def _drop(self) -> None:
        self.close()
        self._stream = None
        if not self.given_id:
            self.task = new_uuid7()
            self.asked = self.asked.model_copy(update={"id": self.task})

    async def _first(self) -> ReplyEvent | None:
        """Ask the node, twice at the most; None when the next one is to be asked."""
        stream = self._open_stream()
        for patience_s in (_ANSWER_S, 2 * _ANSWER_S):
            left_ms = max(0, self.deadline - now_ms())
            asked = self.asked.model_copy(
                update={
                    "function": f"{self._record.function}@{self._record.version}",
                    "timeout_ms": left_ms,
                }
            )
            with contextlib.suppress(Overloaded):  # asked again in a moment
                self._session.post(self._topic(TopicKind.DIRECT), encode(asked))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    return await anext(stream)
        with contextlib.suppress(Overloaded):
            self._session.post(self._topic(TopicKind.DIRECT_CANCEL), self._cancellation())
        lost = NodeLost(f"{self._record.node} does not answer", node=self._record.node)
        spent = self._cancelled or not self._left
        if spent or self._record.continues == "none":  # it may have begun
            raise lost
        _log.info("direct.silent", node=self._record.node)
        self._drop()
        return None

    async def _follow(self) -> ReplyEvent | None:
        try:
            async with asyncio.timeout(_LOOK_S):
                return await anext(self._open_stream())
        except TimeoutError:
            why = self._view.gone(self._record.node)
            if why is None:
                return None
            raise NodeLost(
                f"{self._record.node}, which was asked itself, {why}; no router lives that would "
                "ask another one",
                node=self._record.node,
            ) from None

    def _open_stream(self) -> TaskStream:
        if self._stream is None:
            raise BrokerUnavailable(f"the events of task {self.task} were closed")
        return self._stream

    def _cancellation(self) -> bytes:
        return encode(CancelRequest(task=self.task))

    def _topic(self, kind: TopicKind) -> str:
        return self._inbox.topics.build(kind, node=self._record.node, client=self._inbox.client)


class DirectRoad:
    """Finds nodes for tasks while no router lives. Owned by the client's event loop.

    Args:
        session: The client's session.
        inbox: Its inbox.
        topics: The site's topics.
        registries: Public keys of the site's registries by id.
        presence: Tells which routers live.
        patience_s: How long a router is waited for, seconds.
        told: Called with what a task waits for, in words, where no router lives.
        clock: UTC milliseconds.

    Attributes:
        why: Why the last task was left to the routers although none lives, in words.
    """

    def __init__(
        self,
        *,
        session: Session,
        inbox: ReplyInbox,
        topics: Topics,
        registries: Mapping[str, str],
        presence: RouterPresence,
        patience_s: float = PATIENCE_S,
        told: Callable[[str], None] = lambda _: None,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self.patience_s = patience_s
        self._session = session
        self._inbox = inbox
        self._topics = topics
        self._registries = registries
        self._presence = presence
        self._told = told
        self._clock = clock
        self._view: FleetView | None = None
        self._tried_at = 0.0
        self.why: str | None = None
        self._left: str | None = None  # which task that was

    async def instead(self, task: Task, *, deadline: int, given_id: bool) -> DirectStream | None:
        """Find a node for a task that no router has been given.

        Args:
            task: The task, with its id.
            deadline: UTC milliseconds.
            given_id: Whether its id is the caller's, and shall find the same node again.

        Returns:
            Its events to be; None when a router should have the task: one lives, has been waited
            for too shortly, or may come back sooner than anybody else can do it.

        Raises:
            BrokerUnavailable: The session has ended.
        """
        if not self._presence.bereft:
            return None
        left_s = max(0, deadline - self._clock()) / 1000
        self._told("no router lives: one is waited for, then a node is asked itself")
        if await self._presence.wait_live(min(self.patience_s, left_s / 2)):
            return None
        return await self._stream(task, deadline=deadline, given_id=given_id)

    async def after(
        self, task: Task, *, deadline: int, since: float, kept: bool = False
    ) -> DirectStream | None:
        """Find a node for a task that routers were given and none has accepted.

        Args:
            task: The task, with its id.
            deadline: UTC milliseconds.
            since: When routers were given it, seconds of the loop's clock.
            kept: Whether routers keep it whatever happens: its id is the caller's, or no node is to
                be asked.

        Returns:
            Its events to be, under another id; None, as long as the routers shall keep it: then
            nothing has happened. A function that may run once at the most stays with them.

        Raises:
            DeadlineExceeded: Its time is over, and no router lives that would say so.
        """
        if self._clock() >= deadline and self._presence.absent:
            why = f": {self.why}" if self._left == task.id else ""
            raise DeadlineExceeded(
                f"no router lives, and nobody took task {task.id} in time{why}", task=task.id
            )
        if kept:
            return None
        now = asyncio.get_running_loop().time()
        if now - max(since, self._tried_at) < self.patience_s or not self._presence.absent:
            return None
        self._tried_at = now
        try:
            return await self._stream(task, deadline=deadline, given_id=False, taken_back=True)
        except BrokerUnavailable:
            return None

    async def _stream(
        self, task: Task, *, deadline: int, given_id: bool, taken_back: bool = False
    ) -> DirectStream | None:
        view = await self._open_view(task)
        if view is None or self._presence.present() is not None:
            return None
        barring = self._presence.forbids
        if barring is not None:
            self._leave(task, f"{barring} is gone, and let nobody past it: rules or quotas hold")
            return None
        try:
            records = view.choose(task, deadline=deadline, steady=given_id)
        except FoamError as exc:
            self._leave(task, exc.message)
            return None
        if taken_back:
            records = [record for record in records if record.continues != "none"]
            if not records:
                self._leave(task, "the function may run once at the most, and a router may have it")
                return None
            await self._take_back(str(task.id))
            task = task.model_copy(update={"id": new_uuid7()})
        _log.warning("direct.asked", node=records[0].node, function=records[0].function)
        return DirectStream(
            task=task,
            records=records,
            deadline=deadline,
            session=self._session,
            inbox=self._inbox,
            view=view,
            given_id=given_id,
            told=self._told,
        )

    def _leave(self, task: Task, why: str) -> None:
        if why != self.why:
            _log.warning("direct.left_to_routers", reason=why)
            self._told(f"the task waits for a router, and none lives: {why}")
        self.why, self._left = why, task.id

    async def _take_back(self, task: str) -> None:
        topic = self._topics.build(TopicKind.CANCEL, client=self._inbox.client)
        await self._session.publish(topic, encode(CancelRequest(task=task)))

    async def _open_view(self, task: Task) -> "FleetView | None":
        from foam.sdk.fleet import FleetView  # noqa: PLC0415 - numpy and all, needed only here

        if self._view is None:
            self._view = FleetView(
                session=self._session,
                topics=self._topics,
                client=self._inbox.client,
                registries=self._registries,
                clock=self._clock,
            )
        try:
            await self._view.open(_VIEW_S)
        except FoamError as exc:
            self._leave(task, exc.message)
            return None
        return self._view
