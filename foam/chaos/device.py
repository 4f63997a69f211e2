"""A client that knows MQTT and the protocol, and nothing else of FOAM.

It repeats a task that nobody accepted (the id keeps it from running twice), and asks for what it
missed; what arrives goes to the judge.
"""

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any, Final

from broker.session.base import Message, Session
from capability_schemas.errors import FoamError
from capability_schemas.topics import TopicKind, Topics
from foam.chaos.judge import Ask, Judge

__all__ = ["DeviceClient"]

_NAG_S: Final = 2.0
_UNHEARD_MS: Final = 6_000
_QUEUE: Final = 100_000


class DeviceClient:
    """See the module. Owned by the loop it is used on.

    Args:
        client: Its identity.
        session: Its connection.
        topics: Topics of the site.
        judge: Hears what arrives.
        clock: Milliseconds, the same for the judge.
        chance: Spreads its questions.
    """

    def __init__(
        self,
        *,
        client: str,
        session: Session,
        topics: Topics,
        judge: Judge,
        clock: Callable[[], int],
        chance: random.Random,
    ) -> None:
        self._client = client
        self._session = session
        self._topics = topics
        self._judge = judge
        self._clock = clock
        self._chance = chance
        self._sent: dict[str, tuple[bytes, int]] = {}
        self._resumed_at: dict[str, int] = {}

    async def listen(self) -> None:
        """Subscribe to everything that is said to it."""
        await self._session.subscribe(
            self._topics.filter(TopicKind.REPLY, client=self._client),
            self._on_reply,
            queue_limit=_QUEUE,
        )

    def submit(self, ask: Ask, body: dict[str, Any]) -> None:
        """Send a task.

        Args:
            ask: What the judge shall know of it.
            body: The task as it is sent.
        """
        payload = json.dumps(body).encode()
        now = self._clock()
        self._judge.submitted(ask, at=now)
        self._sent[ask.task] = (payload, now)
        self._post(TopicKind.TASK, payload)

    def cancel(self, task: str) -> None:
        """Take a task back."""
        self._post(TopicKind.CANCEL, json.dumps({"task": task}).encode())

    def resume(self, task: str, from_seq: int = 0) -> None:
        """Ask to hear a task again, from a number on."""
        self._post(TopicKind.RESUME, json.dumps({"task": task, "from_seq": from_seq}).encode())

    async def nag(self) -> None:
        """Ask for what should have come, until cancelled."""
        while True:
            await asyncio.sleep(_NAG_S * (0.5 + self._chance.random()))
            now, wanted = self._clock(), set()
            for ask, accepted, next_seq in self._judge.open_tasks(self._client):
                wanted.add(ask.task)
                payload, sent_at = self._sent.get(ask.task, (b"", now))
                if not accepted and now - sent_at > _UNHEARD_MS:
                    self._sent[ask.task] = (payload, now)
                    self._post(TopicKind.TASK, payload)
                elif (
                    accepted and now - self._resumed_at.setdefault(ask.task, sent_at) > _UNHEARD_MS
                ):
                    self._resume(ask.task, next_seq, now)
            for task, next_seq in self._judge.missing(self._client):
                if now - self._resumed_at.get(task, 0) > _UNHEARD_MS:
                    self._resume(task, next_seq, now)
            self._sent = {task: sent for task, sent in self._sent.items() if task in wanted}

    async def _on_reply(self, message: Message) -> None:
        source = message.topic.rpartition("/")[2]
        self._judge.heard(self._client, source, message.payload, at=self._clock())

    def _resume(self, task: str, next_seq: int, now: int) -> None:
        self._resumed_at[task] = now
        self.resume(task, next_seq)

    def _post(self, kind: TopicKind, payload: bytes) -> None:
        try:
            self._session.post(self._topics.build(kind, client=self._client), payload)
        except FoamError:
            return  # its outbox is full: it asks again later
