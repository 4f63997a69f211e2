"""A chaos run from start to report."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, Final

from capability_schemas.topics import Topics
from foam.chaos.hand import ChaosHand, kinds_of
from foam.chaos.judge import Judge
from foam.chaos.mesh import ChaosMesh
from foam.chaos.probe import MeshProbe
from foam.chaos.report import ChaosPlan, ChaosReport
from foam.chaos.schedule import Fault, draw_faults, draw_load

__all__ = ["run_chaos"]

_GRACE_MS: Final = 30_000
_POLL_S: Final = 0.25


async def run_chaos(plan: ChaosPlan, *, notify: Callable[[str], None]) -> ChaosReport:
    """Start a mesh, break it for a while, let it heal, and judge it.

    Args:
        plan: What to do.
        notify: Told in one sentence what happens.

    Raises:
        FoamError: The mesh did not start.
    """
    loop = asyncio.get_running_loop()

    def clock() -> int:
        return round(1000 * loop.time())

    judge = Judge(grace_ms=_GRACE_MS)
    mesh = ChaosMesh(plan=plan.mesh, judge=judge, clock=clock, seed=str(plan.seed), notify=notify)
    async with mesh, mesh.admin_session() as admin:
        signer = await asyncio.to_thread(mesh.admin_signer)
        probe = MeshProbe(
            session=admin,
            registries=plan.mesh.registry_names,
            topics=Topics(),
            signer=signer,
            clock=clock,
        )
        await probe.listen()
        mesh.spawn(probe.ask(), name="probe")
        return await _Run(plan, mesh, judge, probe, clock, notify).run()


class _Run:
    """Load, faults and judgement over a running mesh."""

    def __init__(
        self,
        plan: ChaosPlan,
        mesh: ChaosMesh,
        judge: Judge,
        probe: MeshProbe,
        clock: Callable[[], int],
        notify: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._mesh = mesh
        self._judge = judge
        self._probe = probe
        self._clock = clock
        self._notify = notify
        self._hand = ChaosHand(mesh=mesh, clock=clock)
        self._watched = frozenset([*plan.mesh.node_names, *plan.mesh.registry_names])
        self._begin_ms = clock()

    async def run(self) -> ChaosReport:
        span_ms = round(1000 * self._plan.seconds)
        faults = self._plan.faults
        if faults is None:
            kinds = kinds_of(self._plan.mesh)
            faults = draw_faults(
                {name: kinds[name] for name in self._plan.kinds or kinds},
                seed=str(self._plan.seed),
                span_ms=span_ms,
                count=round(self._plan.seconds * self._plan.fault_rate),
            )
        self._notify(f"the mesh is up; {len(faults)} faults in {self._plan.seconds:.0f} s")
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send_all(span_ms), name="chaos.load")
            for fault in faults:
                group.create_task(self._happen(fault), name="chaos.fault")
        self._notify("all faults have passed; waiting for what is open")
        await self._settle()
        recovered, unrecovered = self._recoveries()
        return ChaosReport(
            plan=self._plan,
            faults=faults,
            verdict=self._judge.verdict(at=self._clock()),
            recovered_ms=recovered,
            unrecovered=tuple(unrecovered),
        )

    async def _send_all(self, span_ms: int) -> None:
        plan = self._plan
        loads = draw_load(
            plan.mesh.device_names,
            seed=str(plan.seed),
            span_ms=span_ms,
            count=plan.tasks,
            words=self._mesh.words,
            pace=plan.pace,
        )
        moments: list[tuple[int, int, Callable[[], None]]] = []
        numbers = itertools.count()
        for load in loads:
            client = self._mesh.clients[load.ask.client]

            def send(client: Any = client, load: Any = load) -> None:
                client.submit(load.ask, load.body)

            def cancel(client: Any = client, task: str = load.ask.task) -> None:
                client.cancel(task)

            moments.append((load.at_ms, next(numbers), send))
            if load.repeated_at_ms is not None:
                moments.append((load.repeated_at_ms, next(numbers), send))
            if load.cancelled_at_ms is not None:
                moments.append((load.cancelled_at_ms, next(numbers), cancel))
        for at_ms, _, act in sorted(moments):
            await self._sleep_until(at_ms)
            act()

    async def _happen(self, fault: Fault) -> None:
        await self._sleep_until(fault.at_ms)
        self._notify(str(fault))
        await self._hand.happen(fault)

    async def _settle(self) -> None:
        """Wait until every task has ended, or should have."""
        open_ms = [ask.timeout_ms for ask, *_ in self._judge.open_tasks()]
        end_ms = self._clock() + max(open_ms, default=0) + _GRACE_MS + 1_000
        while self._clock() < end_ms:
            lacking = any(self._judge.missing(client) for client in self._mesh.clients)
            back = all(
                self._back_at(member, at) is not None
                for member, at in self._hand.kills
                if member in self._watched
            )
            if not self._judge.open_tasks() and not lacking and back:
                return
            await asyncio.sleep(_POLL_S)

    def _back_at(self, member: str, killed_at: int) -> int | None:
        """Return when a killed member was made good; None while it is not."""
        plan = self._plan.mesh
        if member in plan.node_names:
            return self._probe.born_after(member, killed_at)
        if member in plan.registry_names:
            return self._probe.answered_after(member, killed_at)
        return self._judge.served_after(killed_at)

    def _recoveries(self) -> tuple[dict[str, list[int]], list[str]]:
        recovered: dict[str, list[int]] = {}
        unrecovered = []
        for member, at in self._hand.kills:
            back_at = self._back_at(member, at)
            if back_at is not None:
                kind = "node" if member in self._plan.mesh.node_names else member
                recovered.setdefault(kind, []).append(back_at - at)
            elif member in self._watched:  # of the others the open tasks tell
                unrecovered.append(f"{member}, killed {(at - self._begin_ms) / 1000:.1f} s in")
        return recovered, unrecovered

    async def _sleep_until(self, at_ms: int) -> None:
        await asyncio.sleep(max(0, self._begin_ms + at_ms - self._clock()) / 1000)
