"""Tasks that another router has, as far as they can be seen from here. Pure.

A shadow begins with the task or with another router's word about it, whichever comes first, for
messages of different topics cross. It follows who has the task, which node runs it and what the
client was shown, so that this router can go on with it. Bounded by number and bytes: the oldest go
first, and are left to the journal of the router that has them.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from broker.fair_memory import FairMemory
from capability_schemas.capability import CatalogRecord
from router.entry import Entry, pack_chunks, unpack_chunks
from router.events import Observed
from router.intake import Arrival, Refusal
from router.ownership import Claim, generation_of, is_made_from
from router.shown import Origin

_OVERHEAD_BYTES: Final = 1_000
_ORPHANS: Final = 32
"""Ends heard before their tasks, remembered for each client."""

_ORPHANED_CLIENTS: Final = 1_000
_RETRACTED: Final = 16_384
"""Cancellations heard before their tasks, remembered of all clients together."""

_RETRACTED_MS: Final = 60_000
"""How long such a cancellation waits for its task, milliseconds: after an outage a kept session may
hand over thousands of both, each kind in its own order."""

_ORPHAN_MS: Final = 10_000
"""How long such an end is waited for by its task, milliseconds."""

Key = tuple[str, str]


@dataclass(slots=True)
class Route:
    """Who runs a task.

    Attributes:
        node: The node.
        function: Its function.
        version: Version of the function.
        attempt: Number of the attempt.
        last: Whether nobody gets the attempt, for the router ends the task (`Routed.is_nobodys`).
    """

    node: str
    function: str
    version: str
    attempt: int
    last: bool = False

    def origin(self, record: CatalogRecord | None) -> Origin:
        """Return what the answer is begun with.

        Args:
            record: What the node offers by that name now.
        """
        if record is None or record.version != self.version:
            return Origin(self.function, self.version)
        model = record.model.digest if record.model else None
        return Origin(self.function, self.version, record.continues, model)


@dataclass(slots=True)
class Shadow:
    """One task that another router has, or should have.

    Attributes:
        key: ``(client, task id)``.
        read: The task; None until it arrives.
        reply: Reply topic without its last level; empty until it is known.
        deadline: UTC milliseconds.
        claim: Who says that it has the task; None: nobody yet.
        due: When this router takes it, unless somebody claims it; None: it does not.
        route: Who runs it.
        next_seq: First number that the client has not been shown.
        cancelled: Whether the client wants it no longer.
        doubtful: Whether this router was cut off meanwhile and may have missed its end.
        lost: The router it was taken from.
        given_up: Node and attempt of our own that have not been called off yet.
        journaled: Whether it stands in this router's journal, as a task without an outcome.
    """

    key: Key
    read: Arrival | Refusal | None = None
    reply: str = ""
    deadline: int = 0
    claim: Claim | None = None
    due: int | None = None
    route: Route | None = None
    next_seq: int = 0
    cancelled: bool = False
    doubtful: bool = False
    lost: str = ""
    given_up: tuple[str, int] | None = None
    journaled: bool = False
    shown: deque[tuple[int, bytes]] = field(default_factory=deque)
    shown_bytes: int = 0

    @classmethod
    def of(cls, entry: Entry, claim: Claim) -> "Shadow":
        """Return what the journal knows of a task that was left to another router.

        Args:
            entry: The task.
            claim: Whose it is.
        """
        read = Arrival.of(entry)
        shadow = cls(read.key, read, read.reply, read.deadline, claim, next_seq=entry.next_seq)
        shadow.doubtful = shadow.journaled = True
        shadow.shown.extend(unpack_chunks(entry.chunks or b""))
        shadow.shown_bytes = sum(len(payload) for _, payload in shadow.shown)
        return shadow

    @property
    def size_bytes(self) -> int:
        """What it takes to keep, roughly."""
        task = self.read.task if isinstance(self.read, Arrival) else None
        text = len(task.text or "") if task is not None else 0
        return _OVERHEAD_BYTES + text + self.shown_bytes

    @property
    def subject(self) -> str:
        """What it depends on which router has it."""
        return self.read.subject if self.read is not None else "/".join(self.key)

    @property
    def next_generation(self) -> int:
        """The generation of whoever takes it over from the router that claims it."""
        tried = self.route.attempt if self.route is not None else 0
        claimed = self.claim.attempt if self.claim is not None else 0
        return generation_of(max(tried, claimed)) + 1

    def see(self, event: Observed, *, most_events: int, most_bytes: int) -> None:
        """Take what a node showed the client.

        Args:
            event: A chunk, or a sign of life.
            most_events: Chunks kept.
            most_bytes: Their bytes.
        """
        if event.seq is None or event.event != "chunk" or event.seq < self.next_seq:
            return
        if self.has_passed_over(event):
            return
        self.next_seq = event.seq + 1
        self.shown.append((event.seq, event.payload))
        self.shown_bytes += len(event.payload)
        while self.shown and (len(self.shown) > most_events or self.shown_bytes > most_bytes):
            self.shown_bytes -= len(self.shown.popleft()[1])

    def has_passed_over(self, event: Observed) -> bool:
        """Tell whether readers pass over what a node said: another one has the task by now."""
        route = self.route
        if route is None:
            return False
        if event.attempt is None:
            return event.source != route.node
        return (event.attempt, event.source) != (route.attempt, route.node) and (
            event.attempt <= route.attempt
        )

    def entry(self, arrival: Arrival, task: bytes, record: CatalogRecord | None) -> Entry:
        """Return it as the ledger would keep it.

        Args:
            arrival: The task.
            task: The same as a message.
            record: The function that runs it, as far as it is known.
        """
        route = self.route
        return Entry(
            client=arrival.client,
            task_id=arrival.task_id,
            task=task,
            reply=arrival.reply,
            accepted_at=arrival.received_at,
            deadline=self.deadline or arrival.deadline,
            node=route.node if route is not None else None,
            function=route.function if route is not None else None,
            version=route.version if route is not None else None,
            attempt=route.attempt if route is not None else 0,
            next_seq=self.next_seq,
            chunks=pack_chunks(self.shown) or None,
            continues=record.continues if record is not None else "restart",
            model=record.model.digest if record is not None and record.model else None,
        )


class ShadowTable:
    """All shadows of a router. Owned by its event loop.

    Args:
        limit: Most shadows.
        limit_bytes: Most bytes of them.
        evicted: Told of each shadow that found no room.

    Attributes:
        caught_up_at: Since when tasks are taken as they come, UTC milliseconds.
    """

    def __init__(self, *, limit: int, limit_bytes: int, evicted: Callable[[Shadow], None]) -> None:
        self.caught_up_at = 0
        self._evicted = evicted
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._shadows: OrderedDict[Key, Shadow] = OrderedDict()
        self._sizes: dict[Key, int] = {}
        self._bytes = 0
        self._nameless: dict[str, list[Key]] = {}
        self._orphans: OrderedDict[str, deque[tuple[str, int]]] = OrderedDict()
        self._retracted: FairMemory[int] = FairMemory(limit=_RETRACTED)

    def __len__(self) -> int:
        return len(self._shadows)

    def __iter__(self) -> Iterator[Shadow]:
        return iter(tuple(self._shadows.values()))

    def get(self, key: Key) -> Shadow | None:
        """Return the shadow of a task; None where there is none."""
        return self._shadows.get(key)

    def find(self, key: Key) -> Shadow | None:
        """As ``get``, and of a task without an id by the one that its router made for it."""
        return self._shadows.get(key) or next(
            (
                self._shadows[held]
                for held in self._nameless.get(key[0], ())
                if is_made_from(key[1], self._shadows[held].subject)
            ),
            None,
        )

    def enter(self, shadow: Shadow) -> None:
        """Keep a shadow, at the cost of the oldest ones."""
        self._shadows[shadow.key] = shadow
        if shadow.read is not None and shadow.read.mark and shadow.claim is None:
            self._nameless.setdefault(shadow.key[0], []).append(shadow.key)
        self.weigh(shadow)

    def weigh(self, shadow: Shadow) -> None:
        """Count what a shadow takes now."""
        size = shadow.size_bytes
        self._bytes += size - self._sizes.get(shadow.key, 0)
        self._sizes[shadow.key] = size
        while len(self._shadows) > self._limit or (
            self._bytes > self._limit_bytes and len(self._shadows) > 1
        ):
            oldest = self.drop(next(iter(self._shadows)))
            if oldest is not None:
                self._evicted(oldest)

    def drop(self, key: Key) -> Shadow | None:
        """Take a shadow out."""
        shadow = self._shadows.pop(key, None)
        if shadow is None:
            return None
        self._bytes -= self._sizes.pop(key, 0)
        held = self._nameless.get(key[0])
        if held is not None and key in held:
            held.remove(key)
            if not held:
                del self._nameless[key[0]]
        return shadow

    def orphan(self, key: Key, now: int) -> None:
        """Remember the end of a task that was not heard of: the task itself may be on its way."""
        ends = self._orphans.setdefault(key[0], deque(maxlen=_ORPHANS))
        ends.append((key[1], now))
        self._orphans.move_to_end(key[0])
        if len(self._orphans) > _ORPHANED_CLIENTS:
            self._orphans.popitem(last=False)

    def has_ended(self, read: Arrival | Refusal, now: int) -> bool:
        """Tell whether the end of a task came before the task; true once for each end."""
        ends = self._orphans.get(read.client, ())
        for end in ends:
            if end[1] + _ORPHAN_MS >= now and _is_of(end[0], read):
                self._orphans[read.client].remove(end)
                return True
        return False

    def retract(self, key: Key, now: int) -> None:
        """Remember the cancellation of a task that was not heard of: it may be on its way."""
        self._retracted.put(key, now)

    def was_retracted(self, key: Key, now: int) -> bool:
        """Tell whether the cancellation of a task came before the task; true once for each."""
        at = self._retracted.pop(key)
        return at is not None and max(at, self.caught_up_at) + _RETRACTED_MS >= now

    def awaited(self, read: Arrival | Refusal) -> str | None:
        """Return the id under which another router has a task that came without one."""
        for shadow in self._shadows.values():
            waits = shadow.read is None and shadow.key[0] == read.client
            if waits and is_made_from(shadow.key[1], read.mark):
                return shadow.key[1]
        return None


def _is_of(task_id: str, read: Arrival | Refusal) -> bool:
    return is_made_from(task_id, read.mark) if read.mark else task_id == read.task_id
