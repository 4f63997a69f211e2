"""What a router hears of the mesh around it: catalogue, presence and load of the nodes."""

from collections.abc import Callable
from typing import Final

import structlog

from broker.session.base import Message
from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import ProtocolError
from capability_schemas.node import NodeLoad, NodeState
from capability_schemas.topics import Topics
from capability_schemas.wire import DEFAULT_LIMIT_BYTES, Model, decode
from router.catalogue import Fleet
from router.meaning import Meaning
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


class FleetNews:
    """Keeps fleet and index as the catalogue and the nodes themselves say. Owned by the event loop.

    Args:
        frames: Takes frames apart.
        fleet: Nodes and records.
        meaning: Index of the records.
        upkeep: Hears when the picture changes.
        gone: Told of a node that is lost, and why.
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
        clock: Callable[[], int],
    ) -> None:
        self._frames = frames
        self._fleet = fleet
        self._meaning = meaning
        self._upkeep = upkeep
        self._gone = gone
        self._clock = clock

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
        lost = self._fleet.hear_state(state, self._clock())
        if lost is not None:
            self._gone(node, lost)

    async def on_node_load(self, message: Message) -> None:
        """Take ``node/{node}/load``."""
        node = self._frames.level(message, "node")
        load = self._frames.read(NodeLoad, message)
        if load is None or load.node != node:
            return
        lost = self._fleet.hear_load(load, self._clock())
        if lost is not None:
            self._gone(load.node, lost)

    async def on_catalog(self, message: Message) -> None:
        """Take ``catalog/{node}/{function}``."""
        self._upkeep.heard()
        node = self._frames.level(message, "node")
        function = self._frames.level(message, "function")
        if node is None or function is None:
            return
        key = (node, function)
        if not message.payload:
            if self._fleet.withdraw(key):
                self._meaning.remove(key)
                self._upkeep.catalogue_changed()
            return
        record = self._frames.read(CatalogRecord, message, limit_bytes=DEFAULT_LIMIT_BYTES)
        if record is None or record.key != key:
            return
        if self._fleet.admit(record):
            if self._meaning.upsert(record):
                self._fleet.lighten(key)
            self._upkeep.catalogue_changed()
