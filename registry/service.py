"""The registry on the wire: claims in, the signed catalogue out.

::

    capability/{node}/{function} ─ judge ─▶ pending ─ embed ─▶ store ─▶ catalog/{node}/{function}

Judging takes a fraction of a millisecond and happens as claims arrive; embedding and storing are
one worker's, so that a thousand claims at once delay nobody. What the store cannot take now is
tried again and published only when it is kept.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from broker.events import EventSource
from broker.lifecycle import Service
from broker.security import SecurityAlarm, hear_trust
from broker.session.base import Message, Session, Subscription
from capability_schemas.capability import CapabilityClaim, CatalogRecord
from capability_schemas.errors import (
    InvalidTopic,
    Overloaded,
    ProtocolError,
    Unavailable,
)
from capability_schemas.ids import now_ms
from capability_schemas.node import NodeState
from capability_schemas.passport import PassportBook
from capability_schemas.provenance import AdminCheck, Provenance
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode
from registry.admin import RegistryAdmin, Verb
from registry.admission import (
    Admitted,
    Identities,
    Key,
    Reason,
    Refused,
    Unchanged,
    check_given,
    judge,
)
from registry.auditor import Auditor
from registry.catalog import Catalog
from registry.encoders.thread import EncoderThread
from registry.leadership import Lead, Sole
from registry.mirror import CatalogMirror, is_renewal
from registry.pending import PendingWork, Withdrawal
from registry.publisher import CatalogPublisher
from registry.refusals import Refusals
from registry.rights import RecordRights
from registry.settings import RegistrySettings
from registry.store import Change, HistoryEntry, SqliteStore
from registry.vectors import RecordVectors, capability_texts, record_vectors, unpack_vector

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_CLAIM_QUEUE: Final = 20_000
_SMALL_MESSAGE_BYTES: Final = 64 * 1024


class RegistryService(Service):
    """Admits claims and keeps ``catalog/…``, as long as it leads the registries of the site.

    While another one leads, it judges what it hears and lets it wait, takes over what the leader
    admits, and so has it all at hand when its own turn comes: what the leader did not get to is
    admitted then.

    The event loop that started it owns all of its state. Session, store and encoder are entered
    and left by the caller, around the service.

    Args:
        session: connection with the identity ``registry_id``.
        topics: the site's topics.
        store: catalogue and history.
        encoder: embeds descriptions and examples.
        key: signs the records.
        identities: looks nodes up.
        registry_id: identity of this registry.
        settings: limits and intervals.
        verbs: further verbs for administrators, which are told who asks.
        book: passports of administrators; None: signatures of requests cannot be checked.
        unsigned_admin: whether the broker's word will do for who administrates.
        auditor: knows who administrates, and writes it down; entered by the caller.
        lead: whether it leads; entered by the caller. None: it is the only registry.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        store: SqliteStore,
        encoder: EncoderThread,
        key: SigningKey,
        identities: Identities,
        registry_id: str,
        settings: RegistrySettings | None = None,
        verbs: Mapping[str, Verb] | None = None,
        book: PassportBook | None = None,
        unsigned_admin: bool = True,
        auditor: Auditor | None = None,
        lead: Lead | None = None,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        super().__init__(service_id=registry_id)
        self._lead = lead or Sole()
        self._session = session
        self._topics = topics
        self._store = store
        self._encoder = encoder
        self._key = key
        self._identities = identities
        self._id = registry_id
        self._settings = settings or RegistrySettings()
        self._clock = clock
        self._catalog = Catalog()
        self._pending = PendingWork(limit=self._settings.pending_limit)
        self._publisher = CatalogPublisher(
            session=session,
            topics=topics,
            catalog=self._catalog,
            registry_id=registry_id,
            clock=clock,
            lead=self._lead,
        )
        self._ghosts_until: int | None = None
        self._missed_claims = False
        self._vanished: set[Key] = set()
        """Keys whose claims went while another registry led."""
        self._claims_subscription: Subscription | None = None
        self._forget_listener: Callable[[], None] | None = None
        self.counts: Counter[str] = Counter()
        self._refusals = Refusals(
            pending=self._pending, publisher=self._publisher, counts=self.counts, clock=clock
        )
        self._rights = RecordRights(
            catalog=self._catalog,
            pending=self._pending,
            identities=identities,
            store=store,
            publisher=self._publisher,
            withdraw=self._withdraw,
            key=key,
            registry_id=registry_id,
            counts=self.counts,
            clock=clock,
            lead=self._lead,
        )
        self._mirror = CatalogMirror(
            session=session,
            topics=topics,
            lead=self._lead,
            registry_id=registry_id,
            registries=self._registries,
            space=encoder.space,
            catalog=self._catalog,
            pending=self._pending,
            store=store,
            publisher=self._publisher,
            counts=self.counts,
            clock=clock,
        )
        self._admin = RegistryAdmin(
            session=session,
            topics=topics,
            store=store,
            catalog=self._catalog,
            counts=self.counts,
            registry_id=registry_id,
            clock=clock,
            more=verbs,
            auditor=auditor,
            lead=self._lead,
            check=AdminCheck(
                target=registry_id,
                provenance=None
                if book is None
                else Provenance(own=registry_id, book=book, clock=clock, since=clock()),
                unsigned=unsigned_admin,
            ),
            alarm=SecurityAlarm(
                events=EventSource(
                    session=session,
                    topics=topics,
                    source=registry_id,
                    component="registry",
                    clock=clock,
                ),
                own=registry_id,
                clock=clock,
            ),
        )
        self._passports = book

    async def _on_start(self) -> None:
        await self._mirror.restore()
        self._forget_listener = self._session.on_connection(self._connection_changed)
        self._lead.on_change(self._lead_changed)
        await self._mirror.watch()
        await self._subscribe_claims()
        await self._session.subscribe(
            self._topics.filter(TopicKind.NODE_STATE), self._on_node_state
        )
        await self._session.subscribe(self._topics.filter(TopicKind.TRUST), self._on_trust)
        await self._session.subscribe(
            self._topics.filter(TopicKind.ADMIN, target=self._id), self._admin.answer
        )
        if self._session.connected:
            self._connection_changed(True)
        self.spawn(self._admit_claims(), name="admit")
        self.spawn(self._sweep(), name="sweep")
        self.spawn(self._rights.follow(), name="rights")

    def readmit(self, node: str) -> None:
        """Write a node's records anew, as far as what is attested of it has changed.

        Takes effect soon; what a claim wished for and was not granted before comes back too.

        Args:
            node: the node, enrolled or not.
        """
        self._rights.look_at(node)

    async def _on_stopped(self) -> None:
        if self._forget_listener is not None:
            self._forget_listener()

    # ------------------------------------------------------------------ what was known before

    def _registries(self) -> Mapping[str, str]:
        """Public keys of the registries whose records count."""
        known = self._passports.registries if self._passports is not None else {}
        return {**known, self._id: self._key.public}

    def _lead_changed(self, leads: bool) -> None:
        """Begin where the registry that led before has ended; to step down nothing need be done."""
        if not leads:
            return
        self._publisher.announce_all()
        self._ghosts_until = self._grace_end()
        for key in tuple(self._vanished):
            self._withdraw(key, Change.WITHDRAWN, "its node withdrew it")
        self._vanished.clear()
        if not self._lead.alone:
            # What the one before refused, or did not get to, is judged again.
            self._catalog.doubt_all()
            self._missed_claims = True

    async def _subscribe_claims(self) -> None:
        self._claims_subscription = await self._session.subscribe(
            self._topics.filter(TopicKind.CAPABILITY),
            self._on_claim,
            queue_limit=_CLAIM_QUEUE,
            on_overflow=self._claim_missed,
        )

    def _claim_missed(self, message: Message) -> None:
        """Remember that retained claims must be asked for again; told by the session."""
        if not self._missed_claims:
            _log.warning("registry.claims_missed", registry=self._id, topic=message.topic)
        self._missed_claims = True
        self.counts["missed"] += 1

    def _connection_changed(self, up: bool) -> None:
        if not up:
            self._catalog.doubt_all()
            return
        until = self._grace_end()
        self._catalog.start_grace(until)
        self._ghosts_until = until

    def _grace_end(self) -> int:
        return self._clock() + round(self._settings.grace_s * 1000)

    # ------------------------------------------------------------------ what arrives

    def _key_of(self, message: Message) -> Key | None:
        """Node and function of a topic; None, counted, when its levels are no identifiers."""
        try:
            levels = self._topics.parse(message.topic).levels
        except InvalidTopic as exc:
            self.counts["bad_topics"] += 1
            _log.warning("registry.bad_topic", error=exc.message)
            return None
        return levels["node"], levels["function"]

    async def _on_claim(self, message: Message) -> None:
        key = self._key_of(message)
        if key is None:
            return
        if not message.payload:
            if self._lead.leads:
                self._withdraw(key, Change.WITHDRAWN, "its node withdrew it")
            else:
                self._pending.withdraw(key, None)
                self._vanished.add(key)
            return
        self._vanished.discard(key)
        verdict = judge(
            message.payload,
            key=key,
            standing=self._pending.standing(key) or self._catalog.standing(key),
            identity=self._identities(key[0]),
            now=self._clock(),
            limit_bytes=self._settings.claim_limit_bytes,
        )
        if isinstance(verdict, Unchanged):
            self.counts["unchanged"] += 1
            self._catalog.confirm(key)
            self._rights.heard_again(verdict.claim)
        elif isinstance(verdict, Refused):
            self._refuse(key, verdict, message.payload)
        elif self._pending.offer(key, verdict):
            self._catalog.confirm(key)
            self._rights.wished(verdict.claim)
        else:
            self._missed_claims = self._missed_claims or not self._lead.leads
            full = f"{self._settings.pending_limit} claims wait to be embedded: claim again later"
            self._refuse(key, Refused(Reason.OVERLOADED, full), message.payload)

    async def _on_node_state(self, message: Message) -> None:
        if not message.payload:
            return
        try:
            node = self._topics.parse(message.topic).levels["node"]
            state = decode(NodeState, message.payload, limit_bytes=_SMALL_MESSAGE_BYTES)
        except ProtocolError as exc:
            _log.warning("registry.bad_node_state", topic=message.topic, error=exc.message)
            return
        if state.node == node and state.state == "birth":
            self._catalog.node_started(node, state.epoch, grace_until=self._grace_end())

    async def _on_trust(self, message: Message) -> None:
        """Hear its own words, kept by the broker, and those of other registries of the site."""
        try:
            member = self._topics.parse(message.topic).levels["member"]
        except InvalidTopic:
            self.counts["bad_topics"] += 1
            return
        if self._passports is not None:
            hear_trust(message.payload, member=member, book=self._passports)
        self._rights.look_whether_member(member)

    def _refuse(self, key: Key, refused: Refused, payload: bytes) -> None:
        if (
            self._lead.leads
        ):  # else the leader says so, or this one when it leads and hears it again
            self._refusals.tell(key, refused, payload)

    def _withdraw(self, key: Key, change: Change, reason: str) -> None:
        self._rights.forget(key)
        record = self._catalog.withdraw(key)
        if record is None:
            self._pending.withdraw(key, None)
            return
        self._pending.withdraw(
            key, HistoryEntry.of(record, change, at=self._clock(), reason=reason)
        )
        self._publisher.clear(key)
        self.counts[change.value] += 1
        _log.info("registry.capability_withdrawn", node=key[0], function=key[1], reason=reason)
        self._publisher.emit(
            "capability_withdrawn", key, {"change": change.value, "reason": reason}
        )

    # ------------------------------------------------------------------ the worker

    async def _admit_claims(self) -> None:
        failures = 0
        while True:
            await self._pending.next()
            await self._lead.until()
            key, work = await self._pending.next()
            try:
                await self._perform(key, work)
            except (Unavailable, Overloaded) as exc:
                delay = min(self._settings.retry_cap_s, self._settings.retry_first_s * 2**failures)
                failures = min(failures + 1, 16)
                self.counts["retried"] += 1
                _log.warning(
                    "registry.retry",
                    node=key[0],
                    function=key[1],
                    error=exc.message,
                    delay_s=delay,
                    waiting=len(self._pending),
                )
                await asyncio.sleep(delay)
                continue
            except Exception:  # noqa: BLE001 - supervision boundary: one odd claim must not end the registry
                self.counts["failed"] += 1
                _log.exception("registry.claim_failed", node=key[0], function=key[1])
            failures = 0
            self._pending.done(key, work)

    async def _perform(self, key: Key, work: Admitted | Withdrawal | HistoryEntry) -> None:
        if isinstance(work, Withdrawal):
            await self._store.withdraw(work.entry)
        elif isinstance(work, HistoryEntry):
            await self._store.note(work)
        else:
            await self._admit(key, work)

    async def _admit(self, key: Key, admitted: Admitted) -> None:
        previous = self._catalog.record(key)
        vectors = await self._embed(previous, admitted)
        self._lead.check()
        now = self._clock()
        claim = admitted.claim
        own = unpack_vector(vectors.embedding, self._encoder.space.dimension)
        refused = check_given(
            claim, own, self._encoder.space, similarity=self._settings.given_similarity
        )
        if refused is not None:
            self._refuse(key, refused, encode(claim))
            if previous is not None and (previous.expires_at or now) < now:
                self._withdraw(key, Change.EXPIRED, "its lease ended and its renewal was refused")
            return
        fields = claim.model_dump(exclude={"policy", "embedding", "space", "signature"})
        record = sign(
            CatalogRecord(
                **fields,
                policy=self._rights.now(key[0], claim.policy, admitted.policy),
                embedding=vectors.embedding,
                parts=vectors.parts,
                space=self._encoder.space,
                registry=self._id,
                term=self._lead.term,
                admitted_at=now,
                claim_digest=admitted.digest,
            ),
            self._key,
        )
        renewal = previous is not None and is_renewal(previous, record)
        entry = None if renewal else HistoryEntry.of(record, Change.ADMITTED, at=now)
        await self._store.put(record, at=now, entry=entry)
        if key not in self._pending:  # withdrawn while it was being embedded or stored
            self._catalog.restore(record, withdrawn=True)
            gone = HistoryEntry.of(record, Change.WITHDRAWN, at=now, reason="withdrawn meanwhile")
            self._pending.withdraw(key, gone)
            return
        self._catalog.admit(record, grace_until=self._grace_end())
        self._publisher.announce(key)
        self.counts["renewed" if renewal else "admitted"] += 1
        if not renewal:
            _log.info(
                "registry.capability_admitted",
                node=claim.node,
                function=claim.function,
                version=claim.version,
                epoch=claim.epoch,
                revision=claim.revision,
            )
            self._publisher.emit("capability_admitted", key, {"version": claim.version})

    async def _embed(self, previous: CatalogRecord | None, admitted: Admitted) -> RecordVectors:
        """Our own vectors of a claim, taken from the record before where the texts are equal."""
        claim = admitted.claim
        if (
            previous is not None
            and previous.embedding is not None
            and previous.parts is not None
            and previous.space == self._encoder.space
            and _texts(previous) == _texts(claim)
        ):
            return RecordVectors(previous.embedding, previous.parts)
        rows = await self._encoder.encode(_texts(claim))
        return record_vectors(rows, len(claim.examples))

    # ------------------------------------------------------------------ the sweep

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._settings.sweep_interval_s)
            if not self._lead.leads:
                continue
            now = self._clock()
            for lapse in self._catalog.due(now):
                if lapse.key not in self._pending:  # else its renewal is about to replace it
                    self._withdraw(lapse.key, Change.EXPIRED, lapse.reason)
            self._publisher.retry()
            if self._ghosts_until is not None and now >= self._ghosts_until:
                self._ghosts_until = None
                self.counts["ghosts"] += self._mirror.clear_ghosts()
            if self._missed_claims and not len(self._pending):
                self._missed_claims = False
                if self._claims_subscription is not None:
                    await self._session.unsubscribe(self._claims_subscription)
                await self._subscribe_claims()
                self._catalog.start_grace(self._grace_end())


def _texts(claim: CapabilityClaim | CatalogRecord) -> list[str]:
    return capability_texts(claim.function, claim.description, claim.examples, claim.input_schema)
