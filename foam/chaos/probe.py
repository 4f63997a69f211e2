"""How a chaos run knows that something it killed is back: it asks, and it hears births."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Final

from broker.session.base import Message, Session
from capability_schemas.admin import AdminRequest
from capability_schemas.errors import FoamError
from capability_schemas.ids import now_ms
from capability_schemas.provenance import Signer
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from foam.mesh import ADMIN_ID

__all__ = ["MeshProbe"]

_PROBE_S: Final = 0.25
_ASKED: Final = 1_000
"""Most questions waiting for an answer; older ones will get none."""


class MeshProbe:
    """Asks the registries again and again as an administrator, and hears which nodes come.

    Args:
        session: An administrator's connection.
        registries: Whom it asks.
        topics: Topics of the site.
        signer: Signs the questions.
        clock: Milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        registries: Sequence[str],
        topics: Topics,
        signer: Signer,
        clock: Callable[[], int],
    ) -> None:
        self._registries = registries
        self._session = session
        self._topics = topics
        self._signer = signer
        self._clock = clock
        self._asked: dict[str, tuple[str, int]] = {}
        self._answers: list[tuple[str, int, int]] = []
        self._births: dict[str, dict[int, int]] = {}

    async def listen(self) -> None:
        """Subscribe to the answers, and to the states of nodes."""
        await self._session.subscribe(
            self._topics.filter(TopicKind.REPLY, client=ADMIN_ID), self._on_reply
        )
        await self._session.subscribe(self._topics.filter(TopicKind.NODE_STATE), self._on_state)

    async def ask(self) -> None:
        """Ask, until cancelled."""
        for number in itertools.count(1):
            for registry in self._registries:
                self._question(f"probe-{number}-{registry}", registry)
            await asyncio.sleep(_PROBE_S)

    def _question(self, name: str, registry: str) -> None:
        request = AdminRequest(
            id=name,
            verb="stats",
            sender=ADMIN_ID,
            target=registry,
            sent_at=now_ms(),
            passport=self._signer.passport,
        )
        topic = self._topics.build(TopicKind.ADMIN, target=registry, client=ADMIN_ID)
        self._asked[name] = (registry, self._clock())
        if len(self._asked) > _ASKED:
            del self._asked[next(iter(self._asked))]
        with contextlib.suppress(FoamError):  # not connected: the next one will be heard
            self._session.post(topic, encode(self._signer.sign(request)))

    def answered_after(self, registry: str, at: int) -> int | None:
        """Return when a registry first answered a question that was asked after a moment."""
        return min(
            (heard for who, asked, heard in self._answers if who == registry and asked > at),
            default=None,
        )

    def born_after(self, node: str, at: int) -> int | None:
        """Return when a node first said after a moment that it lives anew."""
        return min((one for one in self._births.get(node, {}).values() if one > at), default=None)

    async def _on_reply(self, message: Message) -> None:
        answer = json.loads(message.payload)
        asked = self._asked.pop(str(answer.get("task")), None)
        if asked is not None and answer.get("event") == "result":
            self._answers.append((*asked, self._clock()))

    async def _on_state(self, message: Message) -> None:
        if not message.payload:
            return
        said = json.loads(message.payload)
        if said.get("state") == "birth":
            # A life has one epoch, however often it says so.
            self._births.setdefault(said["node"], {}).setdefault(said["epoch"], self._clock())
