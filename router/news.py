"""What a router hears of the mesh around it: catalogue, presence and load of the nodes."""

import asyncio
import hashlib
from collections.abc import Callable
from typing import Final

import structlog

from broker.security import SecurityAlarm, hear_registry
from broker.session.base import Message
from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import AccessDenied, FoamError, ProtocolError
from capability_schemas.node import NodeLoad, NodeState
from capability_schemas.passport import PassportBook
from capability_schemas.signing import verify
from capability_schemas.topics import Topics
from capability_schemas.wire import DEFAULT_LIMIT_BYTES, Model, decode
from router.catalogue import Fleet, Key
from router.meaning import Meaning
from router.people import People
from router.statistics import RouterStats
from router.upkeep import Upkeep

FRAME_LIMIT_BYTES: Final = 64 * 1024
"""Largest frame of nodes and clients that carries no task and no record."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Frames:
    """Takes frames apart; what does not fit is counted and dropped.

    Args:
        topics: Topic grammar of the site.
        stats: Counters.
    """

    def __init__(self, topics: Topics, stats: RouterStats) -> None:
        self._topics = topics
        self._stats = stats

    def level(self, message: Message, name: str) -> str | None:
        """Return a level of the topic; None, counted, when the topic is not of the grammar."""
        try:
            return self._topics.parse(message.topic).levels[name]
        except ProtocolError:
            self._stats.dropped["topic"] += 1
            return None

    def read(
        self, model: type[Model], message: Message, *, limit_bytes: int = FRAME_LIMIT_BYTES
    ) -> Model | None:
        """Decode a frame; None, counted, when it is bad."""
        try:
            return decode(model, message.payload, limit_bytes=limit_bytes)
        except ProtocolError as error:
            self._stats.dropped["decode"] += 1
            _log.debug("frame.dropped", topic=message.topic, reason=error.message)
            return None

    def drop(self, reason: str) -> None:
        """Count a frame that was read and counts for nothing all the same."""
        self._stats.dropped[reason] += 1


class FleetNews:
    """Keeps fleet and index as the catalogue and the nodes themselves say. Owned by the event loop.

    Args:
        frames: Takes frames apart.
        fleet: Nodes and records.
        meaning: Index of the records.
        upkeep: Hears when the picture changes.
        gone: Told of a node that is lost, and why.
        heard: Told of a node that has said how it is.
        people: Hears what the registry says of members.
        standing: Told of each member the registry speaks of, and whether it was thrown out.
        book: Knows the registries, whose signature a record needs; None where no registry of the
            site is known: then the broker's word is all there is.
        alarm: Told of records that no registry signed.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        frames: Frames,
        fleet: Fleet,
        meaning: Meaning,
        upkeep: Upkeep,
        gone: Callable[[str, str], None],
        heard: Callable[[str], None] = lambda _: None,
        people: People,
        standing: Callable[[str, bool], None] = lambda _member, _revoked: None,
        book: PassportBook | None,
        alarm: SecurityAlarm,
        clock: Callable[[], int],
    ) -> None:
        self._frames = frames
        self._fleet = fleet
        self._meaning = meaning
        self._upkeep = upkeep
        self._gone = gone
        self._heard = heard
        self._people = people
        self._standing = standing
        self._book = book
        self._alarm = alarm
        self._clock = clock
        self._taken: dict[Key, bytes] = {}
        """Digests of the payloads whose records are kept, so that none is checked twice."""

    async def on_node_state(self, message: Message) -> None:
        """Take ``node/{node}/state``."""
        self._upkeep.heard()
        node = self._frames.level(message, "node")
        if node is None:
            return
        if not message.payload:
            if self._fleet.forget_state(node):
                self._gone(node, "the node was removed")
            return
        state = self._frames.read(NodeState, message)
        if state is None or state.node != node:
            return
        lost = self._fleet.hear_state(state, self._clock(), kept=message.retain)
        if lost is not None:
            self._gone(node, lost)
        self._heard(node)

    async def on_trust(self, message: Message) -> None:
        """Take ``trust/{member}``; what a node holds that was thrown out goes to others at once."""
        self._upkeep.heard()  # whose a client is has to be known before its task goes anywhere
        await self._people.hear(message)
        member = self._frames.level(message, "member")
        if member is None:
            return
        revoked = self._people.revoked(member)
        self._standing(member, revoked)
        lost = self._fleet.revoke(member, revoked=revoked)
        if lost is not None:
            self._gone(member, lost)

    async def on_node_load(self, message: Message) -> None:
        """Take ``node/{node}/load``."""
        node = self._frames.level(message, "node")
        load = self._frames.read(NodeLoad, message)
        if load is None or load.node != node:
            return
        lost = self._fleet.hear_load(load, self._clock())
        if lost is not None:
            self._gone(load.node, lost)
        self._heard(node)

    async def on_registry_state(self, message: Message) -> None:
        """Take ``registry/{registry}/state``: whose records and words count."""
        registry = self._frames.level(message, "registry")
        if registry is not None and self._book is not None:
            hear_registry(message.payload, registry=registry, book=self._book)

    async def on_catalog(self, message: Message) -> None:
        """Take ``catalog/{node}/{function}``."""
        self._upkeep.heard()
        node = self._frames.level(message, "node")
        function = self._frames.level(message, "function")
        if node is None or function is None:
            return
        key = (node, function)
        if not message.payload:
            self._taken.pop(key, None)
            if self._fleet.withdraw(key):
                self._meaning.remove(key)
                self._upkeep.catalogue_changed()
            return
        seen = hashlib.sha256(message.payload).digest()
        if self._taken.get(key) == seen:
            return  # retained messages come again with every connection
        if self._take(message, key):
            self._taken[key] = seen
        # The messages of a whole catalogue are there at once when a router starts: tasks and
        # heartbeats get their turn between two records.
        await asyncio.sleep(0)

    def _take(self, message: Message, key: Key) -> bool:
        """Keep what a record says; tell whether it is news."""
        record = self._frames.read(CatalogRecord, message, limit_bytes=DEFAULT_LIMIT_BYTES)
        if record is None or record.key != key:
            return False
        try:
            self._prove(record, message.payload)
        except FoamError as error:
            self._frames.drop("signature")
            what = f"record {record.node}/{record.function}"
            self._alarm.tell(error, sender=record.registry, what=what)
            return False
        if not self._fleet.admit(record):
            return False
        if self._meaning.upsert(record):
            self._fleet.lighten(key)
        self._upkeep.catalogue_changed()
        return True

    def _prove(self, record: CatalogRecord, payload: bytes) -> None:
        if self._book is None:
            return
        root = self._book.registries.get(record.registry)
        if root is None:
            raise AccessDenied(
                f"record {record.node}/{record.function} is signed by {record.registry}, which is "
                "no registry here",
                identity=record.registry,
            )
        verify(payload, root)
