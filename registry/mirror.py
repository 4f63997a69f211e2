"""What a registry holds, and what the broker keeps of the catalogue, are made one.

Following, a registry takes over what the leader writes, so that it has it all when it leads itself.
Leading, it mends what somebody else writes: a registry that was replaced and has not noticed, or
whose last words were on the way.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from broker.session.base import Message, Session
from capability_schemas.capability import CatalogRecord, EncoderSpace
from capability_schemas.errors import (
    AccessDenied,
    FoamError,
    InvalidTopic,
    Overloaded,
    Unavailable,
)
from capability_schemas.signing import verify
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import DEFAULT_LIMIT_BYTES, decode
from registry.admission import Key
from registry.catalog import Catalog
from registry.leadership import Lead
from registry.pending import PendingWork
from registry.publisher import CatalogPublisher
from registry.store import Change, HistoryEntry, SqliteStore

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_QUEUE: Final = 20_000
_RENEWED_FIELDS: Final = frozenset(
    {
        "revision",
        "expires_at",
        "signature",
        "admitted_at",
        "claim_digest",
        "embedding",
        "parts",
        "registry",
        "term",
    }
)


def is_renewal(previous: CatalogRecord, record: CatalogRecord) -> bool:
    """Tell whether only the lease, and what follows from it, is new."""
    renewed = set(_RENEWED_FIELDS)
    return previous.model_dump(exclude=renewed) == record.model_dump(exclude=renewed)


class CatalogMirror:
    """Reads ``catalog/…``. Owned by the registry's event loop.

    Args:
        session: Connection of the registry.
        topics: The site's topics.
        lead: Whether the registry leads.
        registry_id: Its id.
        registries: Returns the public keys of the registries that are believed, its own included.
        space: Of the own encoder: vectors of another one are made anew when it leads.
        catalog: What is current.
        pending: Claims on their way into it.
        store: Keeps it.
        publisher: Writes to the broker.
        counts: Counters of the registry.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        lead: Lead,
        registry_id: str,
        registries: Callable[[], Mapping[str, str]],
        space: EncoderSpace,
        catalog: Catalog,
        pending: PendingWork,
        store: SqliteStore,
        publisher: CatalogPublisher,
        counts: Counter[str],
        clock: Callable[[], int],
    ) -> None:
        self._session = session
        self._topics = topics
        self._lead = lead
        self._id = registry_id
        self._registries = registries
        self._space = space
        self._catalog = catalog
        self._pending = pending
        self._store = store
        self._publisher = publisher
        self._counts = counts
        self._clock = clock
        self._kept: set[Key] = set()

    async def restore(self) -> None:
        """Read the store; a record of another space or key is known, but made anew when claimed.

        Raises:
            Unavailable: It cannot be read now.
        """
        kept = 0
        for stored in await self._store.load():
            record = stored.record
            sound = self.is_sound(record)
            self._catalog.restore(record, withdrawn=stored.withdrawn or not sound)
            if record.key in self._catalog:
                kept += 1
                self._publisher.announce(record.key)
        _log.info("registry.restored", registry=self._id, records=kept)

    async def watch(self) -> None:
        """Look at the catalogue from now on, beginning with what the broker has kept of it."""
        try:
            await self._session.subscribe(
                self._topics.filter(TopicKind.CATALOG), self._on_catalog, queue_limit=_QUEUE
            )
        except AccessDenied as exc:
            _log.warning("registry.ghosts_unseen", registry=self._id, error=exc.message)

    def is_sound(self, record: CatalogRecord) -> bool:
        """Tell whether a registry that is believed made a record with vectors like our own."""
        key = self._registries().get(record.registry)
        if key is None or record.space != self._space:
            return False
        try:
            verify(record, key)
        except FoamError:
            return False
        return True

    def clear_ghosts(self) -> int:
        """Clear what the broker keeps of a catalogue that is no longer true.

        Returns:
            How many were cleared.
        """
        ghosts = [
            key for key in self._kept if key not in self._catalog and key not in self._pending
        ]
        for key in sorted(ghosts):
            _log.info("registry.ghost_cleared", node=key[0], function=key[1])
            self._publisher.clear(key)
        self._kept.difference_update(ghosts)
        return len(ghosts)

    async def _on_catalog(self, message: Message) -> None:
        try:
            levels = self._topics.parse(message.topic).levels
        except InvalidTopic as exc:
            _log.warning("registry.bad_topic", error=exc.message)
            return
        key = levels["node"], levels["function"]
        if message.payload:
            self._kept.add(key)
        else:
            self._kept.discard(key)
        if self._lead.leads:
            self._mend(key, message)
        elif not self._lead.alone:
            await self._take_over(key, message)

    # ---- leading

    def _mend(self, key: Key, message: Message) -> None:
        """Put our own record in the place of somebody else's word."""
        if self._publisher.wrote(key, message.payload):
            return
        own = self._catalog.record(key)
        if not message.payload:
            foreign = own is not None  # or it was our own, and the claim has come back since
        else:
            record = self._read(key, message)
            foreign = record is None or (record != own and not self._is_ours(record))
        if not foreign:
            return
        if own is not None:
            self._counts["mended"] += 1
            self._publisher.announce(key)
        elif not message.retain and key not in self._pending:
            self._counts["mended"] += 1
            self._publisher.clear(key)  # what is kept from before is a ghost when the grace is over

    def _is_ours(self, record: CatalogRecord) -> bool:
        return record.registry == self._id and record.term == self._lead.term

    # ---- following

    async def _take_over(self, key: Key, message: Message) -> None:
        if not message.payload:
            await self._withdraw(key)
            return
        record = self._read(key, message)
        known = self._catalog.record(key)
        if record is None or record == known:
            return
        if known is not None and (record.term or 0) < (known.term or 0):
            return
        sound = self.is_sound(record)
        if not sound and record.registry not in self._registries():
            _log.warning("registry.record_ignored", key=key, registry=record.registry)
            return
        self._catalog.restore(record, withdrawn=not sound)
        if not sound:  # of another encoder: it is claimed, and made anew when this one leads
            return
        self._pending.drop_until(key, record.order)
        renewal = known is not None and is_renewal(known, record)
        entry = None if renewal else HistoryEntry.of(record, Change.ADMITTED, at=record.admitted_at)
        try:
            await self._store.put(record, at=self._clock(), entry=entry)
        except (Unavailable, Overloaded) as exc:
            self._counts["not_copied"] += 1
            _log.warning("registry.not_copied", key=key, error=exc.message)
        else:
            self._counts["copied"] += 1

    async def _withdraw(self, key: Key) -> None:
        record = self._catalog.withdraw(key)
        if record is None:
            return
        entry = HistoryEntry.of(
            record,
            Change.WITHDRAWN,
            at=self._clock(),
            reason="the registry that leads withdrew it",
        )
        try:
            await self._store.withdraw(entry)
        except (Unavailable, Overloaded) as exc:
            self._counts["not_copied"] += 1
            _log.warning("registry.not_copied", key=key, error=exc.message)

    def _read(self, key: Key, message: Message) -> CatalogRecord | None:
        try:
            record: CatalogRecord = decode(
                CatalogRecord, message.payload, limit_bytes=DEFAULT_LIMIT_BYTES
            )
        except FoamError as exc:
            _log.warning("registry.bad_record", topic=message.topic, error=exc.message)
            return None
        return record if record.key == key else None
