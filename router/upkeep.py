"""What a router does by itself, between tasks: it gets informed, fits itself, keeps its house."""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from broker.events import EventSource
from broker.session.base import Session
from capability_schemas.errors import Overloaded
from router.catalogue import Fleet
from router.dispatch import Dispatcher
from router.ledger import Ledger
from router.meaning import Meaning
from router.peers import PeerDesk
from router.reception import Reception
from router.replies import ReplyDesk
from router.settings import RouterSettings
from router.sharing import CollectorRest
from router.steering import SteeringDesk

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_PRUNE_EVERY: Final = 60
_SAVE_EVERY: Final = 10 * _PRUNE_EVERY
_JUMP_MS: Final = 1_000
"""Difference between two clocks that is no drift."""

_TENDED: Final = 16
"""Turns of a few milliseconds that each sweep gives to the index."""


class Upkeep:
    """The loops of a router; each runs until it is cancelled. Owned by the event loop.

    Args:
        session: Whether the router hears anybody at all.
        fleet: Nodes and records.
        meaning: Encoder and search.
        steering: Calibrates, and follows the rules.
        dispatcher: Live tasks.
        reception: Tasks that wait until it is known who has them.
        peers: The other routers.
        replies: Outcomes that a full disk refused.
        ledger: Journal.
        events: Where a damaged journal is told.
        settings: Intervals.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        fleet: Fleet,
        meaning: Meaning,
        steering: SteeringDesk,
        dispatcher: Dispatcher,
        reception: Reception,
        peers: PeerDesk,
        replies: ReplyDesk,
        ledger: Ledger,
        events: EventSource,
        settings: RouterSettings,
        clock: Callable[[], int],
    ) -> None:
        self._session = session
        self._fleet = fleet
        self._meaning = meaning
        self._steering = steering
        self._dispatcher = dispatcher
        self._reception = reception
        self._peers = peers
        self._replies = replies
        self._ledger = ledger
        self._events = events
        self._settings = settings
        self._clock = clock
        self._catalogue_changed = asyncio.Event()
        self._heard = 0
        self._rest = CollectorRest()
        self._offset_ms: float | None = None

    def heard(self) -> None:
        """Take note that something was heard of the mesh."""
        self._heard += 1

    def catalogue_changed(self) -> None:
        """Take note that a record came or went."""
        self._catalogue_changed.set()
        self._rest.changed()

    async def get_informed(self) -> None:
        """Have nodes chosen once the mesh is known.

        A persistent session hands over the tasks that waited for it before the catalogue, which
        is sent again on the subscriptions: judged at once, they would find nobody.
        """
        await self._listen(lambda: bool(self._fleet.records))
        self._dispatcher.be_informed()
        _log.info("router.informed", functions=len(self._fleet.records))

    async def catch_up(self) -> None:
        """Have tasks taken once it is known what other routers did with those that waited."""
        await self._listen(lambda: True)
        self._reception.catch_up()

    async def resume(self) -> None:
        """Go on after the connection was lost."""
        self._peers.tell_all()
        await self.catch_up()
        self._dispatcher.be_informed()

    async def _listen(self, knows: Callable[[], bool]) -> None:
        """Return when nothing new comes and something is known, or after the settling time."""
        loop = asyncio.get_running_loop()
        latest = loop.time() + self._settings.settle_ms / 1000
        while (left_s := latest - loop.time()) > 0:
            heard = self._heard
            await asyncio.sleep(min(left_s, self._settings.quiet_ms / 1000))
            if heard == self._heard and knows():
                return

    async def sweep(self) -> None:
        """Look for silent nodes and keep the ledger in order, until cancelled."""
        rounds = 0
        while True:
            await asyncio.sleep(self._settings.sweep_s)
            rounds += 1
            now = self._clock()
            self.look_for_silent(now, asyncio.get_running_loop().time())
            self._reception.sweep()
            self._dispatcher.note_progress()
            await self._replies.save_again()
            self._tell_of_damage()
            await self._steering.follow_rules()
            for _ in range(_TENDED):
                if not self._meaning.maintain():
                    break
                await asyncio.sleep(0)
            if rounds % _PRUNE_EVERY == 0:
                try:
                    await self._ledger.prune(now - int(self._settings.retention_s * 1000))
                    if rounds % _SAVE_EVERY == 0:
                        await self._steering.save()
                except Overloaded as error:
                    _log.warning("ledger.unpruned", error=error.message)

    def _tell_of_damage(self) -> None:
        aside = self._ledger.take_damage()
        if aside is not None:
            lost = "what was journaled in it: tasks accepted before may end without an answer"
            self._events.emit("ledger_damaged", {"aside": str(aside), "lost": lost})

    def look_for_silent(self, now: int, monotonic_s: float) -> None:
        """Give up nodes whose heartbeats stopped; none when it was the router that heard nobody.

        That is while it is cut off, and after its clock was set or its machine slept.

        Args:
            now: UTC milliseconds.
            monotonic_s: The same moment by a clock that nobody sets.
        """
        offset_ms = now - 1000 * monotonic_s
        known, self._offset_ms = self._offset_ms, offset_ms
        jumped = known is not None and abs(offset_ms - known) > _JUMP_MS
        if jumped or not self._session.connected:
            self._fleet.wake_all(now)
            self._peers.wake_all(now)
            return
        self._peers.look_for_silent(now)
        for node in self._fleet.silenced(now):
            self._dispatcher.node_gone(node, "its heartbeats stopped")

    async def calibrate(self) -> None:
        """Fit the threshold anew when the catalogue has come to rest, until cancelled."""
        while True:
            await self._catalogue_changed.wait()
            self._catalogue_changed.clear()
            await asyncio.sleep(self._settings.calibration_delay_s)
            if self._catalogue_changed.is_set() or not self._meaning.needs_calibration:
                continue
            try:
                await self._steering.calibrate()
            except Overloaded as error:
                _log.warning("calibration.postponed", error=error.message)
                self._catalogue_changed.set()

    async def embed_records(self) -> None:
        """Embed what the registry embedded in another space, until cancelled."""
        while True:
            try:
                embedded = await self._meaning.embed_missing()
            except Exception as error:  # noqa: BLE001  # supervision boundary: the model's library
                _log.error("records.not_embedded", exc_info=error)
                continue
            if embedded:
                self._catalogue_changed.set()
