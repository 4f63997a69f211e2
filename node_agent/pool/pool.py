"""Instances of functions: on demand and ahead of it, shared by group, gone again when idle."""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from broker.lifecycle import Service
from capability_schemas.errors import FoamError, Overloaded
from capability_schemas.functions import FunctionSpec
from node_agent.pool.keepwarm import Idle, KeepWarm, WarmthSettings, eviction_order
from node_agent.pool.memory import (
    available_memory_bytes,
    first_need_bytes,
    larger_than_memory,
    no_room,
    resident_bytes,
    total_memory_bytes,
)
from node_agent.runtimes.base import Instance, InstanceFailed, Runtime

_DEGRADED_CRASHES: Final = 3
"""Crashes in a row after which a function counts as degraded."""

_SESSIONS: Final = 256
"""Sessions of a group whose last instance is remembered."""

_LEAST_IDLE_S: Final = 0.1
"""Shortest stay: between two calls that queue for it, an instance is idle for a moment."""

_MEMORY_CHECK_S: Final = 2.0
_RETRY_S: Final = 5.0
"""Pause between two attempts to start something ahead of need, seconds."""

_RESERVE_SHARE: Final = 0.05

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Member:
    """An instance of a group.

    Attributes:
        instance: The instance.
        leases: Calls it is leased for.
        used_at: Last use, seconds of the pool's clock.
    """

    instance: Instance
    used_at: float
    leases: int = 0

    @property
    def taken(self) -> int:
        # An abandoned call occupies an instance without a lease, a new lease without a call.
        return max(self.instance.busy, self.leases)

    @property
    def free(self) -> bool:
        return self.instance.alive and self.taken < self.instance.slots


@dataclass(slots=True)
class _Group:
    warmth: KeepWarm
    members: list[_Member] = field(default_factory=list)
    sessions: OrderedDict[str, Instance] = field(default_factory=OrderedDict)
    starts: dict[asyncio.Task[FoamError | None], float] = field(default_factory=dict)
    freed: asyncio.Future[None] | None = None
    waiting: int = 0
    leases: int = 0
    slots: int | None = None
    memory_bytes: int | None = None
    crashes: int = 0
    pause_until: float = 0.0
    specs: tuple[FunctionSpec, ...] = ()
    retry_at: float = 0.0
    wanted: bool = False

    @property
    def warm(self) -> bool:
        return any(spec.warm for spec in self.specs)

    @property
    def keep_s(self) -> float:
        """How long an idle instance stays: as its functions say, or as its use has shown."""
        said = [self.warmth.keep_s if one.idle_s is None else one.idle_s for one in self.specs]
        return max([_LEAST_IDLE_S, *said])


class InstancePool(Service):
    """The running instances of a node, owned by its event loop.

    It does not queue: the agent asks for an instance only when the admission queue has counted a
    free place. A first crash is mended at once; from the second in a row on there is a pause, with
    full jitter, that doubles up to a cap. Idle instances end by `keepwarm`, or when memory runs
    short.

    Args:
        runtimes: Runtime by name; may grow.
        backoff_s: First pause, seconds.
        backoff_limit_s: Longest pause, seconds.
        warmth: What idle time is worth.
        memory_reserve_bytes: Available memory below which idle instances are evicted; a twentieth
            of all when None.
        model_file: Returns the file of a function's model, None when there is none; blocks.
        available: Returns the memory a new process may take, bytes, None when unknown.
        total: Likewise all the memory there is.
        resident: Likewise the memory of a process.
        jitter: Source of random numbers in [0, 1).
        monotonic: Clock, seconds.
        grace_s: Time instances have to end, seconds.
    """

    def __init__(
        self,
        *,
        runtimes: Mapping[str, Runtime],
        backoff_s: float = 0.5,
        backoff_limit_s: float = 30.0,
        warmth: WarmthSettings | None = None,
        memory_reserve_bytes: int | None = None,
        model_file: Callable[[FunctionSpec], Path | None] = lambda _spec: None,
        available: Callable[[], int | None] = available_memory_bytes,
        total: Callable[[], int | None] = total_memory_bytes,
        resident: Callable[[int], int | None] = resident_bytes,
        jitter: Callable[[], float] | None = None,
        monotonic: Callable[[], float] | None = None,
        grace_s: float = 1.0,
    ) -> None:
        super().__init__()
        self._runtimes = runtimes
        self._backoff_s = backoff_s
        self._backoff_limit_s = backoff_limit_s
        self._warmth = warmth or WarmthSettings()
        self._reserve_bytes = memory_reserve_bytes
        self._model_file = model_file
        self._available = available
        self._total = total
        self._resident = resident
        self._jitter = jitter or random.Random().random  # noqa: S311 - spreads restarts, no secret
        self._monotonic = monotonic
        self._grace_s = grace_s
        self._groups: dict[str, _Group] = {}
        self._names: dict[int, tuple[FunctionSpec, str]] = {}
        self._lent: dict[int, tuple[_Group, _Member]] = {}  # by id of the instance
        self._ending: dict[asyncio.Task[None], None] = {}
        self._changed = asyncio.Event()
        self._claimed_bytes = 0
        self._evicting = asyncio.Lock()  # one at a time: each first looks what the last has freed
        self._closed = False

    def offer(self, specs: Iterable[FunctionSpec]) -> None:
        """Say which functions are offered now; instances of no other group outlast their work.

        Args:
            specs: All of them.
        """
        offered: dict[str, list[FunctionSpec]] = {}
        self._names.clear()
        for spec in specs:
            offered.setdefault(self.group_of(spec), []).append(spec)
        for name in offered.keys() | self._groups.keys():
            self._named(name).specs = tuple(offered.get(name, ()))
        self._changed.set()

    def group_of(self, spec: FunctionSpec) -> str:
        """Return the name of the instances that can serve a function."""
        known = self._names.get(id(spec))  # its runtime may have to hash a lot
        if known is None or known[0] is not spec:
            known = (spec, self._runtimes[spec.runtime].group(spec))
            self._names[id(spec)] = known
        return known[1]

    def instances(self, spec: FunctionSpec) -> list[Instance]:
        """Return the live instances that can serve a function."""
        return [member.instance for member in self._group(spec).members]

    def info(self, spec: FunctionSpec) -> dict[str, Any]:
        """Return what an instance of a function said about itself; empty when there is none."""
        members = self._group(spec).members
        return members[0].instance.info if members else {}

    def is_degraded(self, spec: FunctionSpec) -> bool:
        """Tell whether the function's instances keep crashing."""
        return self._group(spec).crashes >= _DEGRADED_CRASHES

    def start_ms(self, spec: FunctionSpec) -> float | None:
        """Predict how long `acquire` would take, milliseconds; None when no start was measured."""
        group = self._group(spec)
        if any(member.free for member in group.members):
            return 0.0
        start_s = group.warmth.start_s
        if start_s is None:
            return None
        under_way = min(group.starts.values(), default=self._now())
        return max(0.0, start_s - (self._now() - under_way)) * 1000

    async def acquire(self, spec: FunctionSpec, *, session: str | None = None) -> Instance:
        """Lease an instance with a free slot, starting one if need be; give it back by ``release``.

        The instance that served the session last is preferred, then the one used last, so that
        the others can go. Cancellation is safe: a start that is under way goes on and serves the
        next one, or else calls with less time than a start takes would keep a cold function cold
        for ever.

        Args:
            spec: The function.
            session: Affinity key of the call.

        Raises:
            InstanceFailed: It could not be started.
            ConfigurationError: It needs more memory than there is.
            Overloaded: Its instances crashed lately, or memory is short; ``retry_after_ms`` says
                when another try is sensible.
        """
        group = self._group(spec)
        group.warmth.called(self._now())
        group.leases += 1  # from now on: what is being started for it is not idle
        group.waiting += 1
        member = None
        try:
            while (member := self._free(group, session)) is None:
                failure = await self._started(spec, group)
                if failure is not None:
                    raise failure
        finally:
            group.waiting -= 1
            if member is None:
                self._count_out(group)
        member.leases += 1
        self._lent[id(member.instance)] = group, member
        if session is not None:
            group.sessions[session] = member.instance
            group.sessions.move_to_end(session)
            if len(group.sessions) > _SESSIONS:
                group.sessions.popitem(last=False)
        return member.instance

    def release(self, instance: Instance, *, served: bool) -> None:
        """Give an instance back.

        Args:
            instance: What `acquire` returned.
            served: Whether it did its work, which ends a series of crashes.
        """
        # Not by its function: an edit of what that rests on may have made it another group since.
        group, member = self._lent[id(instance)]
        member.leases -= 1
        member.used_at = self._now()
        if not member.leases:
            del self._lent[id(instance)]
            if instance.alive:
                self._measure(group, instance)
        if served:
            group.crashes = 0
        if group.freed is not None:
            group.freed.set_result(None)
            group.freed = None
        self._count_out(group)
        self._changed.set()

    async def warm(self, spec: FunctionSpec) -> None:
        """Start a first instance ahead of need; a failure is logged and shows in the load.

        Cancellation is safe.
        """
        group = self._group(spec)
        failure = None if group.members else await self._started(spec, group)
        if failure is not None:
            _log.warning("pool.warm_failed", function=spec.name, error=failure.message)

    def prepare(self, spec: FunctionSpec) -> None:
        """Have an instance started for calls to come, if there is none; returns at once.

        For a call that was refused because a start takes longer than it has: without it a cold
        function would stay cold, and what one slow start has shown would hold for ever.
        """
        group = self._group(spec)
        if not (group.members or group.starts or group.pause_until > self._now()):
            group.wanted = True
            self.spawn(self.warm(spec), name=f"prepare.{spec.name}")

    async def tend(self) -> float | None:
        """End what has been idle for long enough or is in the way, start what is due soon.

        Returns:
            Seconds until that is worth doing again; None: not before something happens.
        """
        now = self._now()
        if any(member.taken == 0 for group in self._groups.values() for member in group.members):
            await self._relieve()
        due = [
            at
            for name, group in list(self._groups.items())
            for at in (self._tend_idle(name, group, now), self._tend_starts(group, now))
            if at is not None
        ]
        if any(group.members for group in self._groups.values()):
            due.append(now + _MEMORY_CHECK_S)
        return max(0.01, min(due) - now) if due else None

    async def _on_start(self) -> None:
        self.spawn(self._keep_tending(), name="tend")

    async def _on_stop(self) -> None:
        self._closed = True
        starts = [start for group in self._groups.values() for start in group.starts]
        for start in starts:
            start.cancel()
        if starts:
            await asyncio.wait(starts)
        for group in self._groups.values():
            for member in list(group.members):
                self._end(group, member)
        while self._ending:
            await asyncio.wait(self._ending)

    async def _keep_tending(self) -> None:
        while True:
            self._changed.clear()
            wait_s = await self.tend()
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    # ---- leases

    def _group(self, spec: FunctionSpec) -> _Group:
        return self._named(self.group_of(spec))

    def _named(self, name: str) -> _Group:
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(warmth=KeepWarm(self._warmth))
        return group

    def _free(self, group: _Group, session: str | None) -> _Member | None:
        free = [member for member in group.members if member.free]
        if not free:
            return None
        known = None if session is None else group.sessions.get(session)
        return max(free, key=lambda member: (member.instance is known, member.used_at))

    def _count_out(self, group: _Group) -> None:
        group.leases -= 1
        if not group.leases:
            group.warmth.idle(self._now())

    # ---- starts

    async def _started(self, spec: FunctionSpec, group: _Group) -> FoamError | None:
        """Wait for a start, or for an instance to come free; returns why it failed, if it did.

        Once it is known how many slots an instance has, as many start at a time as the callers
        that wait can use.
        """
        stopping = InstanceFailed(f"no instance of {spec.name} starts: the node is stopping")
        if self._closed:
            return stopping
        if len(group.starts) * (group.slots or group.waiting or 1) < max(1, group.waiting):
            start = self.spawn(self._start(spec, group), name=f"start.{spec.name}")
            group.starts[start] = self._now()
            start.add_done_callback(lambda done: group.starts.pop(done, None))
        if group.freed is None:
            group.freed = asyncio.get_running_loop().create_future()
        freed = group.freed
        starts = list(group.starts)
        news: list[asyncio.Future[Any]] = [*starts, freed]
        await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
        done = [start for start in starts if start.done()]
        if any(one.cancelled() for one in done):
            return stopping
        failures = [one.result() for one in done]
        return None if freed.done() or None in failures else failures[0]

    async def _start(self, spec: FunctionSpec, group: _Group) -> FoamError | None:
        began = self._now()
        if group.pause_until > began:
            return Overloaded(
                f"instances of {spec.name} crashed {group.crashes} times in a row",
                retry_after_ms=round((group.pause_until - began) * 1000) + 1,
            )

        def died(instance: Instance) -> None:
            self._bury(group, instance, spec)

        need_bytes = 0
        try:
            need_bytes = await self._make_room(spec, group)
            instance = await self._runtimes[spec.runtime].start(spec, died=died)
        except InstanceFailed as exc:
            self._count_crash(group)
            return exc
        except FoamError as exc:
            return exc
        except Exception as exc:  # noqa: BLE001 - supervision boundary: runtimes may be others'
            _log.error("pool.start_failed", function=spec.name, exc_info=exc)
            self._count_crash(group)
            return InstanceFailed(f"no instance of {spec.name} starts: {exc!r}"[:500])
        finally:
            self._claimed_bytes -= need_bytes
            group.wanted = False
        if not instance.alive:
            self._count_crash(group)
            return InstanceFailed(f"an instance of {spec.name} died as soon as it was ready")
        member = _Member(instance, used_at=self._now())
        group.members.append(member)
        group.slots = instance.slots
        group.warmth.started(self._now() - began)
        self._measure(group, instance)
        if self._closed:
            self._end(group, member)
        self._changed.set()
        return None

    def _bury(self, group: _Group, instance: Instance, spec: FunctionSpec) -> None:
        """Forget an instance that has ended."""
        member = _member_of(group, instance)
        if member is None:
            return
        self._remove(group, member)
        if not self._closed and not instance.killed:
            self._count_crash(group)
            _log.warning("pool.instance_lost", function=spec.name, crashes=group.crashes)
        self._changed.set()

    def _remove(self, group: _Group, member: _Member) -> None:
        group.members.remove(member)
        for session in [one for one, last in group.sessions.items() if last is member.instance]:
            del group.sessions[session]

    def _count_crash(self, group: _Group) -> None:
        group.crashes += 1
        if group.crashes > 1:
            pause_s = min(self._backoff_limit_s, self._backoff_s * 2 ** min(group.crashes - 2, 16))
            group.pause_until = self._now() + pause_s * (0.5 + self._jitter() / 2)

    # ---- idle instances

    def _tend_idle(self, name: str, group: _Group, now: float) -> float | None:
        """End what has been idle for long enough; returns when the next will have been."""
        expected = group.warmth.prewarm
        due: list[float] = []
        for member in sorted(group.members, key=lambda one: one.used_at):
            if member.taken or group.waiting or (group.warm and len(group.members) == 1):
                continue
            until = member.used_at + group.keep_s
            if expected is not None and expected[0] <= now and len(group.members) == 1:
                until = max(until, expected[1])
            if until > now:
                due.append(until)
            else:
                self._end(group, member)
        if not (group.specs or group.members or group.starts or group.leases):
            del self._groups[name]
        return min(due, default=None)

    def _tend_starts(self, group: _Group, now: float) -> float | None:
        """Start what shall always be there or is due soon; returns when the next start is due."""
        if self._closed or group.members or group.starts or not group.specs:
            return None
        if group.warm:
            due = now
        elif group.warmth.prewarm is not None and any(one.idle_s is None for one in group.specs):
            due, until = group.warmth.prewarm
            if until <= now:
                return None
        else:
            return None
        due = max(due, group.pause_until, group.retry_at)
        if due <= now:
            group.retry_at = due = now + _RETRY_S
            spec = next((one for one in group.specs if one.warm), group.specs[0])
            self.spawn(self.warm(spec), name=f"prewarm.{spec.name}")
        return due

    def _end(self, group: _Group, member: _Member) -> None:
        """Close an instance; it takes nothing from now on."""
        self._remove(group, member)
        instance = member.instance
        ending = self.spawn(self._close(instance), name=f"close.{instance.pid}")
        self._ending[ending] = None
        ending.add_done_callback(lambda done: self._ending.pop(done, None))

    async def _close(self, instance: Instance) -> None:
        try:
            await instance.close(self._grace_s)
        except Exception as exc:  # noqa: BLE001 - supervision boundary: runtimes may be others'
            _log.error("pool.close_failed", pid=instance.pid, exc_info=exc)

    # ---- memory

    def _measure(self, group: _Group, instance: Instance) -> None:
        said = instance.info.get("memory_bytes")
        found = self._resident(instance.pid) if said is None else int(said)
        if found is not None:
            group.memory_bytes = max(found, group.memory_bytes or 0)

    def _idle(self) -> list[Idle[tuple[_Group, _Member]]]:
        """Return what may be evicted, the first to go first."""
        now = self._now()
        return eviction_order(
            Idle(
                instance=(group, member),
                idle_s=now - member.used_at,
                start_s=group.warmth.start_s,
                memory_bytes=group.memory_bytes,
            )
            for group in self._groups.values()
            for member in group.members
            if not (member.taken or group.waiting or (group.warm and len(group.members) == 1))
        )

    async def _evict(self, why: str) -> bool:
        """End one idle instance and wait until it is gone; returns whether there was one."""
        for one in self._idle():
            group, member = one.instance
            name = group.specs[0].name if group.specs else ""
            _log.info("pool.evicted", function=name, idle_s=round(one.idle_s, 1), why=why)
            before = set(self._ending)
            self._end(group, member)
            await asyncio.wait(set(self._ending) - before)
            return True
        return False

    def _reserve(self) -> int:
        if self._reserve_bytes is not None:
            return self._reserve_bytes
        return round((self._total() or 0) * _RESERVE_SHARE)

    async def _relieve(self) -> None:
        """Evict while less memory is available than shall be."""
        reserve = self._reserve()
        async with self._evicting:
            while (free := self._available()) is not None and free < reserve:
                if not await self._evict("memory"):
                    return

    async def _make_room(self, spec: FunctionSpec, group: _Group) -> int:
        """See to it that there is memory for another instance; returns how much is claimed for it.

        What starts at the same time has not taken its share yet: the claims stand for it.

        Raises:
            ConfigurationError: It needs more than there is in all.
            Overloaded: It needs more than there is now, with all idle instances gone.
        """
        need = group.memory_bytes
        if need is None:
            need = await asyncio.to_thread(first_need_bytes, spec, self._model_file)
        total = self._total()
        if total is not None and need > total:
            raise larger_than_memory(spec.name, need, total)
        async with self._evicting:
            while True:
                # What nobody has asked for takes nothing but room to spare: two that are started
                # ahead would end each other in turn, and pressure either of them again and again.
                asked = group.waiting or group.warm or group.wanted
                free = self._available()
                needed = need if asked else need + self._reserve()
                if free is None or free - self._claimed_bytes >= needed:
                    break
                if not asked or not await self._evict(f"room for {spec.name}"):
                    raise no_room(spec.name, need, free)
            self._claimed_bytes += need
        return need

    def _now(self) -> float:
        return asyncio.get_running_loop().time() if self._monotonic is None else self._monotonic()


def _member_of(group: _Group, instance: Instance) -> _Member | None:
    return next((one for one in group.members if one.instance is instance), None)
