"""The hand that breaks things: signals, links and the disk of a real mesh."""

import asyncio
import contextlib
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from capability_schemas.errors import ConfigurationError
from foam.chaos.mesh import BROKER, ChaosMesh, MeshPlan
from foam.chaos.schedule import Fault, Kind
from foam.mesh import REGISTRY_ID, ROUTER_ID

__all__ = ["ChaosHand", "kinds_of"]

_GROUP: Final = {"kill": signal.SIGKILL, "pause": signal.SIGSTOP}


def kinds_of(plan: MeshPlan) -> Mapping[str, Kind]:
    """Return what may happen to a mesh.

    Args:
        plan: The mesh.
    """
    nodes = plan.node_names
    links = [*nodes, ROUTER_ID, REGISTRY_ID, *plan.device_names]
    return {
        "kill_node": Kind(weight=4, targets=nodes),
        "kill_router": Kind(weight=2, targets=[ROUTER_ID]),
        "kill_registry": Kind(weight=1, targets=[REGISTRY_ID]),
        "kill_broker": Kind(weight=1, targets=[BROKER]),
        "pause_node": Kind(weight=2, targets=nodes, mean_ms=4_000),
        "pause_router": Kind(weight=1, targets=[ROUTER_ID], mean_ms=2_000),
        "pause_registry": Kind(weight=0.5, targets=[REGISTRY_ID], mean_ms=4_000),
        "pause_broker": Kind(weight=0.5, targets=[BROKER], mean_ms=2_000),
        "cut": Kind(weight=4, targets=links),
        "refuse": Kind(weight=2, targets=links, mean_ms=4_000),
        "stall": Kind(weight=2, targets=links, mean_ms=5_000),
        "slow": Kind(weight=2, targets=links, mean_ms=8_000, amounts=(0.05, 0.3)),
        "fill_disk": Kind(weight=1, targets=[ROUTER_ID], mean_ms=4_000),
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
        proxy = self._mesh.proxies[fault.target]
        match fault.kind:
            case "cut":
                proxy.cut()
            case "refuse":
                proxy.refuse()
                try:
                    await asyncio.sleep(lasts_s)
                finally:
                    proxy.accept()
            case "stall":
                proxy.stall()
                try:
                    await asyncio.sleep(lasts_s)
                finally:
                    proxy.flow()
            case "slow":
                proxy.delay_s = fault.amount
                try:
                    await asyncio.sleep(lasts_s)
                finally:
                    proxy.delay_s = 0.0
            case _:
                raise ConfigurationError(f"no fault is called {fault.kind!r}")

    async def _fill_disk(self, member: str, lasts_s: float) -> None:
        """Let no file of a member grow: a limit of its process, which takes no special right."""
        pid = self._mesh.pid(member)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            _, hardest = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            full_bytes = await asyncio.to_thread(_size, self._mesh.router_database)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (full_bytes, hardest))
            try:
                await asyncio.sleep(lasts_s)
            finally:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (hardest, hardest))


def _size(database: Path) -> int:
    """Return how large the journal of a database is now, bytes."""
    journal = database.with_name(f"{database.name}-wal")
    return journal.stat().st_size if journal.exists() else 0
