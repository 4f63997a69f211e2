"""The nodes and what they offer, as a client sees them that has to choose for itself (ADR 37).

Gates, liveness and prediction are those of the router (`router.gates`, `router.catalogue`); meaning
is not, for a client has no encoder: it goes by the words alone, and rather says that it does not
know. Imported only where no router lives.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import structlog

from broker.session.base import Message, Session, Subscription
from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import (
    AccessDenied,
    FoamError,
    NoCapableNode,
    PolicyDenied,
    ProtocolError,
)
from capability_schemas.node import NodeLoad, NodeState
from capability_schemas.signing import verify
from capability_schemas.task import FunctionRef, Task
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode
from registry.lexical import LexicalIndex
from registry.vectors import capability_texts
from router.candidates import Candidate, Offer, Request
from router.catalogue import Fleet
from router.gates import Gatekeeper
from router.nobody import why_nobody

__all__ = ["FleetView"]

LEAST_COVERAGE: Final = 0.5
"""Share of a request's words, by weight, that a function's texts must hold to be meant.

With 199 functions (MetaTool) this threshold and the margin below answer 57 % of the requests, 90 %
of them rightly, and 9 % of those that nobody can serve; without the margin 79, 78 and 19 %."""

LEAST_MARGIN: Final = 1.3
"""So many times more of the words than any other function holds."""

_QUIET_S: Final = 0.3
_MOST_RECORDS: Final = 20_000
_NEAREST: Final = 3
_QUEUE_LIMIT: Final = 20_000
_STATE_BYTES: Final = 64 * 1024

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class FleetView:
    """Follows catalogue, states and loads; owned by the client's event loop.

    Args:
        session: The client's session.
        topics: The site's topics.
        client: The client, by whom nodes of equal worth are told apart.
        registries: Public keys of the site's registries by id: records without the signature of one
            count for nothing. Empty: the broker's word counts.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        client: str,
        registries: Mapping[str, str],
        clock: Callable[[], int],
    ) -> None:
        self._session = session
        self._topics = topics
        self._client = client
        self._registries = registries
        self._clock = clock
        self._fleet = Fleet()
        self._words = LexicalIndex()
        self._texts: dict[tuple[str, str], str] = {}
        self._holders: dict[str, set[tuple[str, str]]] = {}
        self._heard = asyncio.Event()
        self._subscriptions: list[Subscription] = []

    async def open(self, wait_s: float) -> None:
        """Subscribe, and listen until nothing new is heard for a moment; idempotent.

        Args:
            wait_s: Longest wait, seconds.

        Raises:
            PolicyDenied: The broker keeps the catalogue from this client: it is a tenant's.
            BrokerUnavailable: The session has ended.
        """
        if not self._subscriptions:
            # QoS 0: what is lost only narrows the choice. States first, for records to be live.
            for kind, handler in (
                (TopicKind.NODE_STATE, self._on_state),
                (TopicKind.NODE_LOAD, self._on_load),
                (TopicKind.CATALOG, self._on_record),
            ):
                try:
                    self._subscriptions.append(
                        await self._session.subscribe(
                            self._topics.filter(kind), handler, qos=0, queue_limit=_QUEUE_LIMIT
                        )
                    )
                except AccessDenied as exc:
                    await self.close()
                    raise PolicyDenied(
                        f"no router lives, and {self._client} may not ask nodes itself: "
                        f"{exc.message}"
                    ) from exc
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while True:
                    self._heard.clear()
                    quiet_s = _QUIET_S if self._fleet.records else wait_s
                    async with asyncio.timeout(quiet_s):
                        await self._heard.wait()

    async def close(self) -> None:
        """Follow nothing any more."""
        for subscription in self._subscriptions:
            await self._session.unsubscribe(subscription)
        self._subscriptions.clear()

    def gone(self, node: str) -> str | None:
        """Return why a node passes for lost; None when it lives."""
        self._fleet.silenced(self._clock())
        view = self._fleet.nodes.get(node)
        if view is None or view.live:
            return None
        return "is silent" if view.silent else f"is {view.presence or 'removed'}"

    def choose(self, task: Task, *, deadline: int, steady: bool) -> list[CatalogRecord]:
        """Return who may do a task, in the order in which they are to be asked.

        Args:
            task: The task.
            deadline: UTC milliseconds.
            steady: Whether the same id shall find the same node again, as long as that is there:
                then the order goes by the id, else by predicted finish and price.

        Raises:
            NoCapableNode: Nobody is meant for certain, or who is cannot have it now.
            FoamError: The reason why nobody gets it, as a router would give it.
        """
        now = self._clock()
        self._fleet.silenced(now)
        function = FunctionRef.parse(task.function) if task.function is not None else None
        request = Request(task=task, function=function, deadline=deadline)
        gates = Gatekeeper(request, now=now)
        if function is not None:
            named = self._fleet.named(function.name).values()
            offers = [Offer(record, self._fleet.node(record.node)) for record in named]
        else:
            offers = self._meant(task.text or "")
        judged = [gates.judge(offer) for offer in offers]
        for one in judged:
            one.verdict = "; ".join(f"{gate}: {why}" for gate, why in one.failed.items()) or "fits"
        fit = [one for one in judged if not one.failed and one.offer.sim >= LEAST_COVERAGE]
        if not fit:
            raise why_nobody(
                request,
                judged,
                threshold=LEAST_COVERAGE,
                floor=LEAST_COVERAGE,
                nearest=_NEAREST,
            )
        best = max(fit, key=lambda one: one.offer.sim)
        if function is None:
            self._check_margin(best, judged)
        same = [one for one in fit if one.offer.record.function == best.offer.record.function]
        order = self._by_id(str(task.id)) if steady else _by_finish
        return [one.offer.record for one in sorted(same, key=order)]

    def _meant(self, text: str) -> list[Offer]:
        found = self._words.coverage(text)
        return [
            Offer(record, self._fleet.node(node), sim=share, lexical=share, capability=key)
            for key, share in found.items()
            for node, name in sorted(self._holders.get(key, ()))
            if (record := self._fleet.records.get((node, name))) is not None
        ]

    @staticmethod
    def _check_margin(best: Candidate, judged: Iterable[Candidate]) -> None:
        """Make sure that nobody else may be meant.

        Raises:
            NoCapableNode: It cannot be told by the words.
        """
        name, share = best.offer.record.function, best.offer.sim
        for one in judged:
            other = one.offer.record.function
            if other != name and one.offer.sim * LEAST_MARGIN > share:
                raise NoCapableNode(
                    f"by its words the task may be for {name} or {other}, and no router lives that "
                    "knows meanings: name the function (--function)",
                    nearest=[{"function": name}, {"function": other}],
                )

    def _by_id(self, task: str) -> Callable[[Candidate], tuple[bytes, str]]:
        def order(one: Candidate) -> tuple[bytes, str]:
            node = one.offer.record.node
            return hashlib.sha256(f"{self._client}/{task}/{node}".encode()).digest(), node

        return order

    # ---- what arrives

    async def _on_state(self, message: Message) -> None:
        try:
            node = self._topics.parse(message.topic).levels["node"]
            if not message.payload:
                self._fleet.forget_state(node)
                return
            state = decode(NodeState, message.payload, limit_bytes=_STATE_BYTES)
        except ProtocolError:
            return
        if state.node == node:
            self._fleet.hear_state(state, self._clock(), kept=message.retain)
            self._heard.set()

    async def _on_load(self, message: Message) -> None:
        try:
            load = decode(NodeLoad, message.payload, limit_bytes=_STATE_BYTES)
            node = self._topics.parse(message.topic).levels["node"]
        except ProtocolError:
            return
        if load.node == node:
            self._fleet.hear_load(load, self._clock())

    async def _on_record(self, message: Message) -> None:
        try:
            levels = self._topics.parse(message.topic).levels
            key = levels["node"], levels["function"]
            if not message.payload:
                self._withdraw(key)
                return
            record = decode(CatalogRecord, message.payload)
            if record.key != key or len(self._fleet.records) >= _MOST_RECORDS:
                return
            self._prove(record, message.payload)
        except FoamError as exc:
            _log.warning("direct.record_refused", topic=message.topic, reason=exc.message)
            return
        bare = record.model_copy(update={"embedding": None, "parts": None, "space": None})
        if self._fleet.admit(bare):
            self._index(bare)
        self._heard.set()
        await asyncio.sleep(0)  # a whole catalogue comes at once: others get their turn

    def _prove(self, record: CatalogRecord, payload: bytes) -> None:
        if not self._registries:
            return
        root = self._registries.get(record.registry)
        if root is None:
            raise AccessDenied(f"signed by {record.registry}, which is no registry here")
        verify(payload, root)

    def _index(self, record: CatalogRecord) -> None:
        self._unindex(record.key)
        texts = capability_texts(
            record.function, record.description, record.examples, record.input_schema
        )
        texts.extend(record.skills)
        text = hashlib.sha256("\0".join((record.function, *texts)).encode()).hexdigest()
        holders = self._holders.setdefault(text, set())
        if not holders:
            self._words.upsert(text, texts)
        holders.add(record.key)
        self._texts[record.key] = text

    def _withdraw(self, key: tuple[str, str]) -> None:
        if self._fleet.withdraw(key):
            self._unindex(key)

    def _unindex(self, key: tuple[str, str]) -> None:
        text = self._texts.pop(key, None)
        if text is None:
            return
        self._holders[text].discard(key)
        if not self._holders[text]:
            del self._holders[text]
            self._words.remove(text)


def _by_finish(one: Candidate) -> tuple[float, float, str]:
    total_ms = one.finish.total_ms
    record = one.offer.record
    return (float("inf") if total_ms is None else total_ms), record.cost.money, record.node
