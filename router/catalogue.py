"""The router's view of the fleet: admitted records, presence, load. Pure: messages and a clock in.

A node is live when it has announced itself, has not gone offline in that same epoch, and its
heartbeats (load messages) keep coming: some brokers lose last wills (PROTOCOL section 5). A will
with an older epoch kills nobody, and neither does one of a process that never made itself known
(a second one with the same id, turned away). A node that sleeps is not dead: its heartbeats are
missed only when it should have been back. One that was lost against its will a moment ago is often
back in seconds (a supervisor starts it anew, a broker had cut it): it may be waited for. Times are
the router's own, of receipt: node clocks differ.
"""

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from capability_schemas.capability import EVERY_TENANT, CatalogRecord
from capability_schemas.node import FunctionLoad, NodeLoad, NodeState, Presence
from router.names import NameIndex
from router.pulse import Pulse
from router.sharing import Sharing
from router.waiting import allowance

_IDLE = FunctionLoad()
_LONGEST_SLEEP_MS = 400 * 86_400_000
"""Sleep that is believed, milliseconds: a clock that is wrong names any time."""
_LATE_MS = 300_000
"""By how much a heartbeat may be older than the last one heard and be a late one; of one that is
older yet the clock was set back."""
_LAST = "\uffff"
"""Sorts after every identifier."""

Key = tuple[str, str]
"""``(node, function)``."""


@dataclass(slots=True)
class NodeView:
    """What is known of one node.

    Attributes:
        node: Its id.
        presence: What it said of itself last; None before it said anything.
        epoch: Start of its process, as it says.
        pulse: Its heartbeats, which are its load messages.
        load: Its last load message.
        cordoned: Whether an administrator keeps new tasks from it.
        assigned: Invocations of this router that have not ended; fresher than ``load``.
        silent: Whether its heartbeats have stopped, or it did not wake in time.
        revoked: Whether the registry has thrown it out: then it is gone, whatever it says.
        reason: Why it is in its state, as it says.
        sleep_ms: How long it sleeps from when it was heard of last, milliseconds; None where it
            does not say.
        unborn: Whether all that is known is the last will of a process whose birth was not heard.
        given: What it has of ``assigned``, by function.
        said_at: When it said last that it was there, UTC milliseconds of its own clock.
        lost_at: When it was lost last while it took work and had not said that it would go, or
            began to leave invocations without an answer, UTC milliseconds; None: it was not.
        grace_ms: How long such a node may be waited for, milliseconds.
    """

    node: str
    presence: Presence | None = None
    epoch: int = -1
    pulse: Pulse = field(default_factory=Pulse)
    load: NodeLoad | None = None
    cordoned: bool = False
    assigned: int = 0
    silent: bool = False
    revoked: bool = False
    reason: str = ""
    sleep_ms: int | None = None
    unborn: bool = False
    given: Counter[str] = field(default_factory=Counter)
    said_at: int = -1
    lost_at: int | None = None
    grace_ms: int = 0

    @property
    def live(self) -> bool:
        """Whether it is there, be it draining."""
        return self.presence in {"birth", "draining"} and not self.silent and not self.revoked

    @property
    def asleep(self) -> bool:
        """Whether it is away for a while, by its own word, and not overdue."""
        return self.presence == "sleeping" and not self.silent and not self.revoked

    @property
    def wake_at(self) -> int | None:
        """When it should be back, UTC milliseconds of our clock; None: awake, or it did not say."""
        if not self.asleep or self.sleep_ms is None:
            return None
        return self.pulse.seen_at + self.sleep_ms

    def just_lost(self, now: int) -> bool:
        """Tell whether it was lost so short a time ago that it may be waited for, or is just back.

        Args:
            now: UTC milliseconds.
        """
        lost_at = self.lost_at
        return lost_at is not None and not self.revoked and 0 <= now - lost_at < self.grace_ms

    @property
    def back_by(self) -> int | None:
        """Until when it may be waited for, UTC milliseconds; None where it was not lost."""
        return None if self.lost_at is None else self.lost_at + self.grace_ms

    @property
    def open(self) -> bool:
        """Whether it takes new tasks."""
        return self.presence == "birth" and not self.cordoned

    @property
    def capacity(self) -> int:
        """Tasks it can run at a time; 1 where it does not say."""
        return max(1, self.load.capacity if self.load else 1)

    @property
    def busy(self) -> float:
        """Share of its places that are taken, 0 to 1, its own word or ours, the greater."""
        told = self.load.running + self.load.queued if self.load else 0
        return min(1.0, max(told, self.assigned) / self.capacity)

    @property
    def full(self) -> bool:
        """Whether all places and the whole queue are taken, as it says itself."""
        load = self.load
        if load is None or load.capacity == 0:
            return False
        return load.running >= load.capacity and load.queued >= load.queue_limit

    def has_room(self, record: CatalogRecord, *, session: bool = False) -> bool:
        """Tell whether it may be given one more task of a function: queues of nodes are kept short.

        Args:
            record: The function on this node.
            session: Whether it served the session of the task last: then as much again may wait.
        """
        given = self.given.get(record.function)
        if not given:
            return True
        load = self.load.functions.get(record.function) if self.load else None
        return given < allowance(load, record.resources) * (1 + session)

    def function(self, name: str) -> FunctionLoad:
        """Return the live figures of a function; those of an idle one where none are known."""
        return self.load.functions.get(name, _IDLE) if self.load else _IDLE


@dataclass(slots=True)
class Fleet:
    """All nodes and admitted records. Owned by the router's event loop.

    Attributes:
        heartbeat_s: Interval assumed where a node names none.
        missed_heartbeats: So many missed in a row mean that a node is gone, more where they are
            often late.
        grace_ms: How long a node that was just lost may be waited for, milliseconds; 0: not at all.
    """

    heartbeat_s: float = 5.0
    missed_heartbeats: int = 3
    grace_ms: int = 0
    _nodes: dict[str, NodeView] = field(default_factory=dict)
    _records: dict[Key, CatalogRecord] = field(default_factory=dict)
    _keys: list[Key] = field(default_factory=list)
    _by_name: dict[str, dict[str, CatalogRecord]] = field(default_factory=dict)
    _names: NameIndex = field(default_factory=NameIndex)
    _vectors: dict[Key, int] = field(default_factory=dict)
    _sharing: Sharing = field(default_factory=Sharing)
    _tenants: set[Key] = field(default_factory=set)
    _revoked: set[str] = field(default_factory=set)

    @property
    def nodes(self) -> Mapping[str, NodeView]:
        """Nodes by id."""
        return self._nodes

    @property
    def records(self) -> Mapping[Key, CatalogRecord]:
        """Admitted records by ``(node, function)``."""
        return self._records

    @property
    def keys(self) -> Sequence[Key]:
        """Keys of the records in order, so that long lists can be shown page by page."""
        return self._keys

    @property
    def names(self) -> NameIndex:
        """Names of the functions on offer."""
        return self._names

    def node(self, node: str) -> NodeView:
        """Return the view of a node, a blank one if it has not been heard of."""
        view = self._nodes.get(node)
        if view is None:
            pulse = Pulse(interval_s=self.heartbeat_s, missed=self.missed_heartbeats)
            view = self._nodes[node] = NodeView(
                node=node, pulse=pulse, revoked=node in self._revoked, grace_ms=self.grace_ms
            )
        return view

    def named(self, function: str) -> Mapping[str, CatalogRecord]:
        """Return every record of a function name, by node."""
        return self._by_name.get(function, {})

    def functions(self, node: str) -> list[str]:
        """Return the names of what a node offers, in order."""
        first = bisect_left(self._keys, (node, ""))
        return [name for _, name in self._keys[first : bisect_right(self._keys, (node, _LAST))]]

    def admit(self, record: CatalogRecord) -> bool:
        """Take an admitted record; tell whether it is news.

        An older order is not, and neither is what a registry wrote that has been replaced since.
        """
        known = self._records.get(record.key)
        if known is None:
            insort(self._keys, record.key)
            self._names.add(record.function)
        elif (
            (record.term or 0) < (known.term or 0)
            or record.order < known.order
            or self._is_known(record, known)
        ):
            return False
        self._vectors.pop(record.key, None)
        self._keep(record)
        return True

    def lighten(self, key: Key) -> None:
        """Let go of the vectors of a record, once the search has taken them; unknown is ignored."""
        record = self._records.get(key)
        if record is not None and key not in self._vectors:
            self._vectors[key] = _vectors_of(record)
            self._keep(self._sharing.lighten(record))

    @property
    def has_tenants(self) -> bool:
        """Whether any node serves a tenant; as long as none does, nobody need be kept apart."""
        return bool(self._tenants)

    @property
    def apart(self) -> int:
        """How many records serve one tenant alone, and nobody who is of none."""
        return sum(self._records[key].policy.tenant != EVERY_TENANT for key in self._tenants)

    def serving(self, tenant: str | None, function: str) -> list[str]:
        """Return the nodes that offer a function of a name to members of a tenant."""
        offered = self.named(function)
        return [node for node, record in offered.items() if record.policy.serves(tenant)]

    def withdraw(self, key: Key) -> bool:
        """Forget a record; tell whether it was there."""
        if self._records.pop(key, None) is None:
            return False
        self._tenants.discard(key)
        self._vectors.pop(key, None)
        del self._keys[bisect_left(self._keys, key)]
        node, function = key
        offered = self._by_name[function]
        del offered[node]
        if not offered:
            del self._by_name[function]
            self._names.discard(function)
        return True

    def _keep(self, record: CatalogRecord) -> None:
        self._records[record.key] = record
        self._by_name.setdefault(record.function, {})[record.node] = record
        if record.policy.tenant is None:
            self._tenants.discard(record.key)
        else:
            self._tenants.add(record.key)

    def _is_known(self, record: CatalogRecord, known: CatalogRecord) -> bool:
        """Tell whether a record is the one that is kept, be it without its vectors."""
        vectors = self._vectors.get(record.key)
        if vectors is None:
            return record == known
        return (
            record.order == known.order
            and vectors == _vectors_of(record)
            and self._sharing.lighten(record) == known
        )

    def hear_state(self, state: NodeState, now: int, *, kept: bool = False) -> str | None:
        """Take a node's presence.

        Args:
            state: The message; an empty retained payload is not one.
            now: Time of receipt, UTC milliseconds.
            kept: Whether the broker had kept it, so that it may have been said long ago.

        Returns:
            Why invocations given to the node so far are lost, or None when they are not: it went
            offline or to sleep, or it started anew.
        """
        view = self.node(state.node)
        if state.epoch < view.epoch and not view.unborn:
            return None  # the will of an earlier process
        known = view.presence is not None and not view.unborn
        restarted = known and state.epoch > view.epoch
        unborn = state.state == "offline" and state.since is None and state.epoch != view.epoch
        if restarted and unborn:
            return None
        was_live, slept = view.live, view.asleep
        view.lost_at = _lost_at(view, state, now)
        view.said_at = max(view.said_at, state.at) if state.epoch == view.epoch else state.at
        view.presence, view.epoch, view.reason = state.state, state.epoch, state.reason
        view.unborn = unborn
        if state.state in {"birth", "draining"}:
            if slept:
                view.pulse.restart(now)
            view.pulse.beat(now, interval_s=state.load_interval_s or self.heartbeat_s)
            view.silent = False
        elif state.state == "sleeping":
            view.pulse.restart(now)
            view.silent, view.load = False, None
            view.sleep_ms = _left_of_sleep(state, now, kept=kept)
        if restarted:
            view.load = None
            return "the node started anew"
        if was_live and not view.live:
            return f"the node is {state.state}"
        return None

    def hear_load(self, load: NodeLoad, now: int) -> str | None:
        """Take a node's heartbeat; returns as ``hear_state``."""
        view = self.node(load.node)
        away = view.presence in {"offline", "sleeping"}
        if load.epoch < view.epoch and not view.unborn:
            return None  # of an earlier process
        if load.epoch == view.epoch and away:
            return None  # late: a will overtook it
        late = load.epoch == view.epoch and 0 < view.said_at - load.at < _LATE_MS
        if late and view.silent:
            return None  # said before it fell silent
        known = view.presence is not None and not view.unborn
        restarted = known and load.epoch > view.epoch
        if not known or restarted:
            view.presence, view.epoch, view.unborn = "birth", load.epoch, False
        view.pulse.beat(now)
        view.said_at = view.said_at if late else load.at
        view.load, view.silent = load, False
        return "the node started anew" if restarted else None

    def forget_state(self, node: str) -> bool:
        """Take an emptied state topic: the node was removed. Tell whether it was live."""
        view = self._nodes.get(node)
        if view is None:
            return False
        was_live = view.live
        view.presence, view.load, view.lost_at = None, None, None
        return was_live

    def revoke(self, member: str, *, revoked: bool = True) -> str | None:
        """Take a member for gone that was thrown out, or for what it says again.

        Args:
            member: Its identity; it need not be a node that was heard of.
            revoked: False once it has been let in anew.

        Returns:
            As ``hear_state``.
        """
        if revoked:
            self._revoked.add(member)
        else:
            self._revoked.discard(member)
        view = self._nodes.get(member)
        if view is None:
            return None
        was_live, view.revoked = view.live, revoked
        return "the node was revoked" if was_live and revoked else None

    def silenced(self, now: int) -> list[str]:
        """Return the nodes whose heartbeats have just been found missing.

        A sleeper that is overdue passes for gone too; it is not named, for it holds no work.

        Args:
            now: UTC milliseconds.
        """
        gone = []
        for view in self._nodes.values():
            if view.live and view.pulse.is_overdue(now):
                view.silent = True
                view.lost_at = now if view.presence == "birth" else None
                gone.append(view.node)
            wake_at = view.wake_at
            if wake_at is not None and now > wake_at + view.pulse.patience_ms:
                view.silent = True
        return gone

    def wake_all(self, now: int) -> None:
        """Restart every heartbeat clock: the router itself was cut off, or its clock was set."""
        for view in self._nodes.values():
            view.pulse.restart(now)

    def cordon(self, nodes: Iterable[str], *, closed: bool = True) -> None:
        """Keep new tasks from nodes, or let them in again."""
        for node in nodes:
            self.node(node).cordoned = closed


def _lost_at(view: NodeView, state: NodeState, now: int) -> int | None:
    """Return when a node was lost last, with what it says now; None where it goes by itself."""
    worked = view.live and view.presence == "birth"
    if state.state == "offline":
        if state.at > view.said_at:  # a last will is older: it was written at the connection
            return None
        return now if worked else view.lost_at
    if state.state != "birth":
        return None
    return now if worked and state.epoch > view.epoch else view.lost_at


def _left_of_sleep(state: NodeState, now: int, *, kept: bool) -> int | None:
    """Return how long a sleeper will still be away, milliseconds, whatever its clock says.

    Of a state that was said just now that is as long as it says. One that was kept may be of any
    age: then the clocks decide, but for no longer than the whole sleep.
    """
    if state.wake_at is None:
        return None
    whole_ms = min(max(0, state.wake_at - state.at), _LONGEST_SLEEP_MS)
    return min(whole_ms, max(0, state.wake_at - now)) if kept else whole_ms


def _vectors_of(record: CatalogRecord) -> int:
    """Return what tells the vectors of a record from others, for as long as the process runs."""
    return hash((record.embedding, record.parts))
