"""The gates a task passes before anything is done for it. Pure: bytes in, a verdict out.

Order: topic, size, decoding, then the fields that need the mesh to judge them (``reply_to``,
``function``). Whether the id was seen before is for the owner of the live tasks and the ledger.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from capability_schemas.errors import FoamError, InvalidTask, TooLarge
from capability_schemas.ids import is_identifier
from capability_schemas.task import FunctionRef, Task, decode_task, peek_task_id, skim_task_id
from capability_schemas.topics import TopicKind, Topics
from router.entry import Entry
from router.ownership import made_id, mark_of

_REPLY_LEVELS = 3


@dataclass(frozen=True, slots=True)
class Arrival:
    """A task that may be journaled.

    Attributes:
        client: Whose it is; the identity in the topic.
        task_id: Chosen by the client, or made here.
        task: The task, with its id.
        reply: Reply topic without its last level.
        received_at: UTC milliseconds.
        deadline: Absolute, UTC milliseconds.
        function: The function addressed by name, if any.
        mark: What stands for it in every router when it came without an id; empty else.
        size_bytes: Size of the task as received.
    """

    client: str
    task_id: str
    task: Task
    reply: str
    received_at: int
    deadline: int
    function: FunctionRef | None
    mark: str = ""
    size_bytes: int = 0

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """Return a task as it came before it was journaled."""
        task = decode_task(entry.task, limit_bytes=max(len(entry.task), 1))
        return cls(
            client=entry.client,
            task_id=entry.task_id,
            task=task,
            reply=entry.reply,
            received_at=entry.accepted_at,
            deadline=entry.deadline,
            function=FunctionRef.parse(task.function) if task.function else None,
        )

    @property
    def key(self) -> tuple[str, str]:
        """``(client, task id)``: ids are scoped to their client."""
        return self.client, self.task_id

    @property
    def named(self) -> bool:
        """Whether the client chose the id."""
        return not self.mark

    @property
    def subject(self) -> str:
        """What it depends on which router has it."""
        return self.mark or f"{self.client}/{self.task_id}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A task that cannot be taken.

    Attributes:
        client: Whose it is.
        task_id: Its id where that can be read, else a new one.
        reply: Reply topic without its last level; never the ``reply_to`` of a bad task.
        error: Why.
        received_at: UTC milliseconds.
        mark: As for a task; empty when the client chose the id: then an earlier task of that id
            goes first.
    """

    client: str
    task_id: str
    reply: str
    error: FoamError
    received_at: int
    mark: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """``(client, task id)``."""
        return self.client, self.task_id

    @property
    def named(self) -> bool:
        """Whether the client chose the id."""
        return not self.mark

    @property
    def subject(self) -> str:
        """What it depends on which router answers."""
        return self.mark or f"{self.client}/{self.task_id}"


class Intake:
    """Reads what arrives on ``task/{client}``.

    Args:
        topics: Topic grammar of the site.
        limit_bytes: Largest task.
        new_id: Makes the id of a task that has none, of its mark and UTC milliseconds that are
            never the same twice.
    """

    def __init__(
        self, *, topics: Topics, limit_bytes: int, new_id: Callable[[str, int], str] = made_id
    ) -> None:
        self._topics = topics
        self._limit_bytes = limit_bytes
        self._make_id = new_id
        self._made_at = 0

    def read(self, topic: str, payload: bytes, now: int) -> Arrival | Refusal:
        """Judge one task.

        Args:
            topic: Where it was published.
            payload: Its bytes.
            now: Time of receipt, UTC milliseconds; timeouts count from it.

        Raises:
            InvalidTopic: Not a task topic of this site; there is nobody to answer.
        """
        client = self._topics.parse(topic).levels["client"]
        try:
            task = decode_task(payload, limit_bytes=self._limit_bytes)
        except TooLarge as error:
            return self._refusal(client, payload, skim_task_id(payload), error, now)
        except FoamError as error:
            return self._refusal(client, payload, peek_task_id(payload), error, now)
        try:
            function = FunctionRef.parse(task.function) if task.function is not None else None
            mark = "" if task.id else mark_of(client, payload)
            task_id = task.id or self._new_id(mark, now)
            reply = self._reply_of(client, task_id, task.reply_to)
        except FoamError as error:
            return self._refusal(client, payload, task.id, error, now)
        return Arrival(
            client=client,
            task_id=task_id,
            task=task if task.id else task.model_copy(update={"id": task_id}),
            reply=reply,
            received_at=now,
            deadline=now + task.timeout_ms,
            function=function,
            mark=mark,
            size_bytes=len(payload),
        )

    def renamed(self, read: Arrival | Refusal, task_id: str) -> Arrival | Refusal:
        """Return a task without an id as the router that has it calls it."""
        if isinstance(read, Refusal):
            reply = self.reply_topic(read.client, task_id)
            return replace(read, task_id=task_id, reply=reply)
        reply = self._reply_of(read.client, task_id, read.task.reply_to)
        task = read.task.model_copy(update={"id": task_id})
        return replace(read, task_id=task_id, task=task, reply=reply)

    def refuse(self, topic: str, payload: bytes, error: FoamError, now: int) -> Refusal:
        """Make the refusal of a task that was not looked at for want of room.

        Raises:
            InvalidTopic: Not a task topic of this site.
        """
        client = self._topics.parse(topic).levels["client"]
        find_id = peek_task_id if len(payload) <= self._limit_bytes else skim_task_id
        return self._refusal(client, payload, find_id(payload), error, now)

    def reply_topic(self, client: str, task_id: str) -> str:
        """Return the usual reply topic of a task, without its last level."""
        return f"{self._topics.root}/reply/{client}/{task_id}"

    def _new_id(self, mark: str, now: int) -> str:
        """Make an id; the time in it runs ahead of the clock when tasks come too fast for it."""
        self._made_at = max(self._made_at + 1, now)
        return self._make_id(mark, self._made_at)

    def _refusal(
        self, client: str, payload: bytes, task_id: str | None, error: FoamError, now: int
    ) -> Refusal:
        mark = "" if task_id else mark_of(client, payload)
        known = task_id or self._new_id(mark, now)
        return Refusal(client, known, self.reply_topic(client, known), error, now, mark)

    def _reply_of(self, client: str, task_id: str, wanted: str | None) -> str:
        """Return the reply topic without its last level.

        ``reply_to`` is ``reply/{client}/{x}``, with or without the site's prefix: the source is
        appended as the last level, so that the author of an event stays provable.
        """
        if wanted is None:
            return self.reply_topic(client, task_id)
        levels = wanted.removeprefix(self._topics.root + "/").split("/")
        if (
            len(levels) != _REPLY_LEVELS
            or levels[:2] != [TopicKind.REPLY.value, client]
            or not is_identifier(levels[2])
        ):
            raise InvalidTask(
                f"reply_to must be {self._topics.root}/reply/{client}/NAME: the client's own "
                "subtree, one level, to which the source of each event is appended",
                field="reply_to",
            )
        return f"{self._topics.root}/{'/'.join(levels)}"
