"""Instances of functions: started on demand, shared by group, restarted after a crash."""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from broker.lifecycle import Service
from capability_schemas.errors import FoamError, Overloaded
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes.base import Instance, InstanceFailed, Runtime

_DEGRADED_CRASHES: Final = 3
"""Crashes in a row after which a function counts as degraded."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Group:
    instances: list[Instance] = field(default_factory=list)
    leased: dict[int, int] = field(default_factory=dict)
    starting: asyncio.Task[FoamError | None] | None = None
    crashes: int = 0
    pause_until: float = 0.0


class InstancePool(Service):
    """The running instances of a node, owned by its event loop.

    It does not queue: the agent asks for an instance only when the admission queue has counted a
    free one. A first crash is mended at once; from the second in a row on there is a pause, with
    full jitter, that doubles up to a cap.

    Args:
        runtimes: Runtime by name.
        backoff_s: First pause, seconds.
        backoff_limit_s: Longest pause, seconds.
        jitter: Source of random numbers in [0, 1).
        monotonic: Clock, seconds.
        grace_s: Time instances have to end when the pool stops, seconds.
    """

    def __init__(
        self,
        *,
        runtimes: Mapping[str, Runtime],
        backoff_s: float = 0.5,
        backoff_limit_s: float = 30.0,
        jitter: Callable[[], float] | None = None,
        monotonic: Callable[[], float] | None = None,
        grace_s: float = 1.0,
    ) -> None:
        super().__init__()
        self._runtimes = runtimes
        self._backoff_s = backoff_s
        self._backoff_limit_s = backoff_limit_s
        self._jitter = jitter or random.Random().random  # noqa: S311 - spreads restarts, no secret
        self._monotonic = monotonic
        self._grace_s = grace_s
        self._groups: dict[str, _Group] = {}
        self._closed = False

    def instances(self, spec: FunctionSpec) -> list[Instance]:
        """Return the live instances that can serve a function."""
        return list(self._group(spec).instances)

    def is_degraded(self, spec: FunctionSpec) -> bool:
        """Tell whether the function's instances keep crashing."""
        return self._group(spec).crashes >= _DEGRADED_CRASHES

    async def acquire(self, spec: FunctionSpec) -> Instance:
        """Lease an instance with a free slot, starting one if need be; give it back by ``release``.

        Cancellation is safe: a start that is under way goes on and serves the next one, or else
        calls with less time than a start takes would keep a cold function cold for ever.

        Raises:
            InstanceFailed: It could not be started.
            Overloaded: Its instances crashed lately; ``retry_after_ms`` says how long the pause is.
        """
        group = self._group(spec)
        while (instance := self._free(group)) is None:
            failure = await self._started(spec, group)
            if failure is not None:
                raise failure
        group.leased[id(instance)] = group.leased.get(id(instance), 0) + 1
        return instance

    def release(self, spec: FunctionSpec, instance: Instance, *, served: bool) -> None:
        """Give an instance back.

        Args:
            spec: The function it was leased for.
            instance: The instance.
            served: Whether it did its work, which ends a series of crashes.
        """
        group = self._group(spec)
        left = group.leased.get(id(instance), 0) - 1
        if left > 0:
            group.leased[id(instance)] = left
        else:
            group.leased.pop(id(instance), None)
        if served:
            group.crashes = 0

    async def warm(self, spec: FunctionSpec) -> None:
        """Start a first instance ahead of need; a failure is logged and shows in the load.

        Cancellation is safe.
        """
        group = self._group(spec)
        failure = None if group.instances else await self._started(spec, group)
        if failure is not None:
            _log.warning("pool.warm_failed", function=spec.name, error=failure.message)

    async def _on_stop(self) -> None:
        self._closed = True
        async with asyncio.TaskGroup() as tasks:
            for group in self._groups.values():
                for instance in group.instances:
                    tasks.create_task(
                        instance.close(self._grace_s),
                        name=f"node_agent.InstancePool[{instance.pid}].close",
                    )

    def _group(self, spec: FunctionSpec) -> _Group:
        name = self._runtimes[spec.runtime].group(spec)
        return self._groups.setdefault(name, _Group())

    def _free(self, group: _Group) -> Instance | None:
        for instance in group.instances:
            # An abandoned call occupies an instance without a lease, a new lease without a call.
            taken = max(instance.busy, group.leased.get(id(instance), 0))
            if instance.alive and taken < instance.slots:
                return instance
        return None

    async def _started(self, spec: FunctionSpec, group: _Group) -> FoamError | None:
        """Wait for the start under way, or for a new one; returns why it failed, if it did."""
        if group.starting is None or group.starting.done():
            group.starting = self.spawn(self._start(spec, group), name=f"start.{spec.name}")
        return await asyncio.shield(group.starting)

    async def _start(self, spec: FunctionSpec, group: _Group) -> FoamError | None:
        wait_s = group.pause_until - self._now()
        if wait_s > 0:
            return Overloaded(
                f"instances of {spec.name} crashed {group.crashes} times in a row",
                retry_after_ms=round(wait_s * 1000) + 1,
            )

        def died(instance: Instance) -> None:
            self._bury(group, instance, spec)

        try:
            instance = await self._runtimes[spec.runtime].start(spec, died=died)
        except InstanceFailed as exc:
            self._count_crash(group)
            return exc
        if not instance.alive:
            self._count_crash(group)
            return InstanceFailed(f"an instance of {spec.name} died as soon as it was ready")
        group.instances.append(instance)
        return None

    def _bury(self, group: _Group, instance: Instance, spec: FunctionSpec) -> None:
        """Forget an instance that has ended."""
        if instance not in group.instances:
            return
        group.instances.remove(instance)
        group.leased.pop(id(instance), None)
        if not self._closed and not instance.killed:
            self._count_crash(group)
            _log.warning("pool.instance_lost", function=spec.name, crashes=group.crashes)

    def _count_crash(self, group: _Group) -> None:
        group.crashes += 1
        if group.crashes > 1:
            pause_s = min(self._backoff_limit_s, self._backoff_s * 2 ** min(group.crashes - 2, 16))
            group.pause_until = self._now() + pause_s * (0.5 + self._jitter() / 2)

    def _now(self) -> float:
        return asyncio.get_running_loop().time() if self._monotonic is None else self._monotonic()
