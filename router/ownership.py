"""Which of several routers has a task, worked out alike by all of them. Pure.

Every router hears every task. The live ones are put into an order that depends on the task alone
(rendezvous hashing: Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
IEEE/ACM Transactions on Networking 6(1), 1998): the first has it, the next one waits to see that it
does, and when a router goes, only the tasks that were its own change hands.

Views differ for moments, so the order alone is not enough. A router that takes over counts
attempts on from the next generation, a hundred further: whoever was cut off and does not know yet
can only use lower attempts, which nodes and clients pass over once they have seen a higher one. Of
two claims the higher generation counts, and within one the earlier router in the order.
"""

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from capability_schemas.node import Presence, RouterState
from router.pulse import Pulse

GENERATION: Final = 100
"""Attempts of one router at one task, over its restarts; `RouterSettings.attempts` allows 16 in a
process, and one more announces an end of the router's own making."""

_TIME_BITS: Final = 48
_TAIL_BITS: Final = 74

News = Literal["came", "gone"]


def rank(subject: str, routers: Iterable[str]) -> list[str]:
    """Return routers in the order in which they answer for a task.

    Args:
        subject: What the order depends on; `subject_of`.
        routers: Their ids.
    """
    wanted = subject.encode()

    def weight(router: str) -> tuple[bytes, str]:
        return hashlib.blake2b(wanted, key=router.encode(), digest_size=8).digest(), router

    return sorted(routers, key=weight, reverse=True)


def first_attempt(generation: int) -> int:
    """Return the lowest attempt of a generation, counted from 0."""
    return 1 + GENERATION * generation


def generation_of(attempt: int) -> int:
    """Return the generation that an attempt (from 1; 0: none was made) belongs to."""
    return max(0, attempt - 1) // GENERATION


def mark_of(client: str, payload: bytes) -> str:
    """Return what stands for a task without an id: the same in every router (hex of SHA-256)."""
    return hashlib.sha256(client.encode() + b"\0" + payload).hexdigest()


def made_id(mark: str, at: int) -> str:
    """Make the id of a task that has none, such that others see which task it is of.

    UUID version 7 (RFC 9562 section 5.7) whose random part is a hash of the mark and the time.

    Args:
        mark: `mark_of` the task.
        at: UTC milliseconds; another one for each task of the same mark.
    """
    at &= (1 << _TIME_BITS) - 1
    digest = hashlib.blake2b(f"{mark}/{at}".encode(), digest_size=10).digest()
    tail = int.from_bytes(digest, "big") & (1 << _TAIL_BITS) - 1
    value = at << 80 | 0x7 << 76 | (tail >> 62) << 64 | 0b10 << 62 | tail & (1 << 62) - 1
    return str(uuid.UUID(int=value))


def is_made_from(task_id: str, mark: str) -> bool:
    """Tell whether `made_id` made an id for a mark, whichever router ran it."""
    try:
        value = uuid.UUID(task_id).int
    except ValueError:
        return False
    return made_id(mark, value >> 80) == task_id


@dataclass(frozen=True, slots=True)
class Claim:
    """A router's word that it has a task.

    Attributes:
        router: Who says so.
        attempt: First attempt that it makes itself; the first one of a generation.
    """

    router: str
    attempt: int = 1

    def outranks(self, other: "Claim", subject: str) -> bool:
        """Tell whether this claim counts rather than another one on the same task."""
        if self.attempt != other.attempt:
            return self.attempt > other.attempt
        if self.router == other.router:
            return False
        return rank(subject, (self.router, other.router))[0] == self.router


@dataclass(slots=True)
class RouterView:
    """What is known of another router.

    Attributes:
        router: Its id.
        pulse: Its heartbeats.
        presence: What it said of itself last.
        epoch: Start of its process, as it says.
        came_at: When this process of it was heard of first, UTC milliseconds.
        silent: Whether its heartbeats have stopped.
        revoked: Whether the registry has thrown it out: then nothing counts that it says.
    """

    router: str
    pulse: Pulse
    presence: Presence = "offline"
    epoch: int = -1
    came_at: int = 0
    silent: bool = False
    revoked: bool = False

    @property
    def live(self) -> bool:
        """Whether it takes tasks."""
        return self.presence == "birth" and not self.silent and not self.revoked


@dataclass(slots=True)
class RouterBook:
    """The routers of the site as one of them knows them. Owned by its event loop.

    Attributes:
        own: The router whose book it is; it passes for live.
        heartbeat_s: Interval of heartbeats where a router names none.
        missed: So many missed in a row mean that it is gone.
    """

    own: str
    heartbeat_s: float = 2.0
    missed: int = 3
    _views: dict[str, RouterView] = field(default_factory=dict)
    _revoked: set[str] = field(default_factory=set)

    @property
    def alone(self) -> bool:
        """Whether no other router was ever heard of."""
        return not self._views

    @property
    def others(self) -> list[RouterView]:
        """The other routers, live or not, by id."""
        return [self._views[router] for router in sorted(self._views)]

    def __contains__(self, router: object) -> bool:
        view = self._views.get(router) if isinstance(router, str) else None
        return router == self.own or (view is not None and not view.revoked)

    def is_live(self, router: str) -> bool:
        """Tell whether a router takes tasks."""
        if router == self.own:
            return True
        view = self._views.get(router)
        return view is not None and view.live

    def epoch_of(self, router: str) -> int:
        """Return when the process of another router was heard of first; 0 when it is not known."""
        view = self._views.get(router)
        return view.came_at if view is not None else 0

    def order(self, subject: str) -> list[str]:
        """Return the live routers in the order in which they answer for a task."""
        live = [view.router for view in self._views.values() if view.live]
        return rank(subject, (self.own, *live)) if live else [self.own]

    def doubts(self, subject: str) -> int:
        """Return how many routers before our own may be alive, though they are not heard."""
        silent = [v.router for v in self._views.values() if v.silent and not v.revoked]
        return rank(subject, (self.own, *silent)).index(self.own) if silent else 0

    def hear(self, state: RouterState, now: int) -> News | None:
        """Take a router's word about itself.

        Args:
            state: A birth, a heartbeat, a goodbye or a will.
            now: Time of receipt, UTC milliseconds.

        Returns:
            ``came`` for a process that was not here before, ``gone`` for one that was; None else.
        """
        if state.router == self.own:
            return None
        view = self._views.get(state.router)
        if view is None:
            pulse = Pulse(interval_s=state.heartbeat_s or self.heartbeat_s, missed=self.missed)
            view = self._views[state.router] = RouterView(state.router, pulse)
            view.revoked = state.router in self._revoked
        if state.epoch < view.epoch or (state.unborn and state.epoch != view.epoch):
            return None  # the will of an earlier process, or of one that was refused its place
        was_live, restarted = view.live, state.epoch > view.epoch
        if restarted:
            view.came_at = now
        view.presence, view.epoch = state.state, state.epoch
        if state.state == "birth":
            view.pulse.beat(now, interval_s=state.heartbeat_s or self.heartbeat_s)
            view.silent = False
        if view.live and (restarted or not was_live):
            return "came"
        return "gone" if was_live and not view.live else None

    def forget(self, router: str) -> bool:
        """Take an emptied state topic: the router was removed. Tell whether it was live."""
        view = self._views.pop(router, None)
        return view is not None and view.live

    def revoke(self, member: str, *, revoked: bool) -> bool:
        """Take what the registry says of a member, whether it is known as a router or not.

        A broker may let it speak on; here it is gone, until it is in good standing again and says
        once more that it is there.

        Args:
            member: Its id.
            revoked: Whether it was thrown out.

        Returns:
            Whether it is lost by that.
        """
        if revoked:
            self._revoked.add(member)
        else:
            self._revoked.discard(member)
        view = self._views.get(member)
        if view is None or view.revoked == revoked:
            return False
        was_live, view.revoked = view.live, revoked
        view.presence = "offline"
        return was_live

    def silenced(self, now: int) -> list[str]:
        """Return the routers whose heartbeats have just been found missing."""
        gone = [view for view in self._views.values() if view.live and view.pulse.is_overdue(now)]
        for view in gone:
            view.silent = True
        return [view.router for view in gone]

    def wake_all(self, now: int) -> None:
        """Restart every heartbeat clock: this router was cut off, or its clock was set.

        Who seemed silent meanwhile may have been there all the time.
        """
        for view in self._views.values():
            view.pulse.restart(now)
            view.silent = False
