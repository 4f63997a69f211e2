"""The gates a task passes before anything is done for it. Pure: bytes in, a verdict out.

Order: topic, size, decoding, then the fields that need the mesh to judge them (``reply_to``,
``function``). Whether the id was seen before is for the owner of the live tasks and the ledger.
"""

from collections.abc import Callable
from dataclasses import dataclass

from capability_schemas.errors import FoamError, InvalidTask, TooLarge
from capability_schemas.ids import is_identifier, new_uuid7
from capability_schemas.task import FunctionRef, Task, decode_task, peek_task_id, skim_task_id
from capability_schemas.topics import TopicKind, Topics

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
        size_bytes: Size of the task as received.
        named: Whether the client chose the id.
    """

    client: str
    task_id: str
    task: Task
    reply: str
    received_at: int
    deadline: int
    function: FunctionRef | None
    size_bytes: int = 0
    named: bool = True

    @property
    def key(self) -> tuple[str, str]:
        """``(client, task id)``: ids are scoped to their client."""
        return self.client, self.task_id


@dataclass(frozen=True, slots=True)
class Refusal:
    """A task that cannot be taken.

    Attributes:
        client: Whose it is.
        task_id: Its id where that can be read, else a new one.
        reply: Reply topic without its last level; never the ``reply_to`` of a bad task.
        error: Why.
        named: Whether the client chose the id: then an earlier task of that id goes first.
    """

    client: str
    task_id: str
    reply: str
    error: FoamError
    named: bool

    @property
    def key(self) -> tuple[str, str]:
        """``(client, task id)``."""
        return self.client, self.task_id


class Intake:
    """Reads what arrives on ``task/{client}``.

    Args:
        topics: Topic grammar of the site.
        limit_bytes: Largest task.
        new_id: Makes the id of a task that has none; takes UTC milliseconds.
    """

    def __init__(
        self, *, topics: Topics, limit_bytes: int, new_id: Callable[[int], str] = new_uuid7
    ) -> None:
        self._topics = topics
        self._limit_bytes = limit_bytes
        self._new_id = new_id

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
            return self._refusal(client, skim_task_id(payload), error, now)
        except FoamError as error:
            return self._refusal(client, peek_task_id(payload), error, now)
        try:
            function = FunctionRef.parse(task.function) if task.function is not None else None
            task_id = task.id or self._new_id(now)
            reply = self._reply_of(client, task_id, task.reply_to)
        except FoamError as error:
            return self._refusal(client, task.id, error, now)
        return Arrival(
            client=client,
            task_id=task_id,
            task=task if task.id else task.model_copy(update={"id": task_id}),
            reply=reply,
            received_at=now,
            deadline=now + task.timeout_ms,
            function=function,
            size_bytes=len(payload),
            named=bool(task.id),
        )

    def refuse(self, topic: str, payload: bytes, error: FoamError, now: int) -> Refusal:
        """Make the refusal of a task that was not looked at for want of room.

        Raises:
            InvalidTopic: Not a task topic of this site.
        """
        client = self._topics.parse(topic).levels["client"]
        find_id = peek_task_id if len(payload) <= self._limit_bytes else skim_task_id
        return self._refusal(client, find_id(payload), error, now)

    def reply_topic(self, client: str, task_id: str) -> str:
        """Return the usual reply topic of a task, without its last level."""
        return f"{self._topics.root}/reply/{client}/{task_id}"

    def _refusal(self, client: str, task_id: str | None, error: FoamError, now: int) -> Refusal:
        known = task_id or self._new_id(now)
        return Refusal(client, known, self.reply_topic(client, known), error, task_id is not None)

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
