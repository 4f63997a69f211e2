"""The hand that breaks things: signals, links and the disk of a real mesh."""

import asyncio
import contextlib
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from capability_schemas.errors import ConfigurationError
from foam.chaos.mesh import ChaosMesh, MeshPlan
from foam.chaos.schedule import Fault, Kind

__all__ = ["ChaosHand", "kinds_of"]

_T = TypeVar("_T")

_GROUP: Final = {"kill": signal.SIGKILL, "pause": signal.SIGSTOP}


def kinds_of(plan: MeshPlan) -> Mapping[str, Kind]:
    """Return what may happen to a mesh.

    Args:
        plan: The mesh.
    """
    nodes, routers = plan.node_names, plan.router_names
    registries, brokers = plan.registry_names, plan.broker_names
    links = [*nodes, *routers, *registries, *plan.device_names]
    return {
        "kill_node": Kind(weight=4, targets=nodes),
        "kill_router": Kind(weight=2, targets=routers),
        "kill_registry": Kind(weight=1, targets=registries),
        "kill_broker": Kind(weight=1, targets=brokers),
        "pause_node": Kind(weight=2, targets=nodes, mean_ms=4_000),
        "pause_router": Kind(weight=1, targets=routers, mean_ms=2_000),
        "pause_registry": Kind(weight=0.5, targets=registries, mean_ms=4_000),
        "pause_broker": Kind(weight=0.5, targets=brokers, mean_ms=2_000),
        "cut": Kind(weight=4, targets=links),
        "refuse": Kind(weight=2, targets=links, mean_ms=4_000),
        "stall": Kind(weight=2, targets=links, mean_ms=5_000),
        "slow": Kind(weight=2, targets=links, mean_ms=8_000, amounts=(0.05, 0.3)),
        "twist": Kind(weight=2, targets=links, mean_ms=8_000),
        "fill_disk": Kind(weight=1, targets=[*routers, *registries], mean_ms=4_000),
    }


class ChaosHand:
    """Makes faults of a schedule happen.

    Args:
        mesh: What to break.
        clock: Milliseconds.

    Attributes:
        kills: Who was killed when: member and milliseconds by the clock.
    """

    def __init__(self, *, mesh: ChaosMesh, clock: Callable[[], int]) -> None:
        self.kills: list[tuple[str, int]] = []
        self._mesh = mesh
        self._clock = clock

    async def happen(self, fault: Fault) -> None:
        """Let a fault happen, last and pass. Cancellation makes it pass at once.

        Raises:
            ConfigurationError: There is no such kind of fault.
        """
        verb, _, _ = fault.kind.partition("_")
        lasts_s = fault.lasts_ms / 1000
        if verb == "kill":
            if self._mesh.signal(fault.target, signal.SIGKILL):
                self.kills.append((fault.target, self._clock()))
        elif verb == "pause":
            await self._pause(fault.target, lasts_s)
        elif verb == "fill":
            await self._fill_disk(fault.target, lasts_s)
        else:
            await self._hurt_link(fault, lasts_s)

    async def _pause(self, member: str, lasts_s: float) -> None:
        pid = self._mesh.pid(member)
        if not self._mesh.signal(member, signal.SIGSTOP):
            return
        try:
            await asyncio.sleep(lasts_s)
        finally:
            if self._mesh.pid(member) == pid:
                self._mesh.signal(member, signal.SIGCONT)

    async def _hurt_link(self, fault: Fault, lasts_s: float) -> None:
        link = self._mesh.links[fault.target]
        match fault.kind:
            case "cut":
                link.cut()
            case "refuse":
                await _for_a_while(link.refuse, True, False, lasts_s)
            case "stall":
                await _for_a_while(link.stall, True, False, lasts_s)
            case "twist":
                await _for_a_while(link.twist, True, False, lasts_s)
            case "slow":
                await _for_a_while(link.slow, fault.amount, 0.0, lasts_s)
            case _:
                raise ConfigurationError(f"no fault is called {fault.kind!r}")

    async def _fill_disk(self, member: str, lasts_s: float) -> None:
        """Let no file of a member grow: a limit of its process, which takes no special right."""
        pid = self._mesh.pid(member)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            _, hardest = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            full_bytes = await asyncio.to_thread(_size, self._mesh.database(member))
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (full_bytes, hardest))
            try:
                await asyncio.sleep(lasts_s)
            finally:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (hardest, hardest))


async def _for_a_while(turn: Callable[[_T], None], on: _T, off: _T, lasts_s: float) -> None:
    turn(on)
    try:
        await asyncio.sleep(lasts_s)
    finally:
        turn(off)


def _size(database: Path) -> int:
    """Return how large the journal of a database is now, bytes."""
    journal = database.with_name(f"{database.name}-wal")
    return journal.stat().st_size if journal.exists() else 0
