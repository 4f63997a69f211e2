"""A chaos run from start to report."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from broker.session.base import Message, Session
from capability_schemas.admin import AdminRequest
from capability_schemas.errors import FoamError
from capability_schemas.ids import now_ms
from capability_schemas.provenance import Signer
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from foam.chaos.hand import ChaosHand, kinds_of
from foam.chaos.judge import Judge, Verdict, percentile
from foam.chaos.mesh import BROKER, ChaosMesh, MeshPlan
from foam.chaos.schedule import Fault, draw_faults, draw_load
from foam.mesh import ADMIN_ID, REGISTRY_ID, ROUTER_ID

__all__ = ["ChaosPlan", "ChaosReport", "run_chaos"]

_GRACE_MS: Final = 30_000
_PROBE_S: Final = 0.25
_POLL_S: Final = 0.25
_WORDED: Final = (
    "the freezer in hall 2 is far too warm, what should I do?",
    "the conveyor is shaking badly, what action is needed?",
    "oven-2 has reached 110 C and gets hotter, recommend an action",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """What a run does.

    Attributes:
        mesh: What is broken.
        seed: Faults and load come from it; what the machine makes of them does not.
        seconds: How long tasks are sent and things broken.
        task_rate: Tasks sent each second.
        fault_rate: Faults each second.
        faults: What happens; None: drawn from the seed.
    """

    mesh: MeshPlan
    seed: int
    seconds: float
    task_rate: float = 4.0
    fault_rate: float = 0.25
    faults: tuple[Fault, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosReport:
    """What came of a run, as its clients saw it.

    Attributes:
        plan: What was done.
        faults: What happened.
        verdict: What the clients saw.
        recovered_ms: For each kind of process: the times, milliseconds, from each kill until
            somebody was served again: a task sent after it accepted (router, broker), a question of
            an administrator answered (registry).
        unrecovered: Kills after which that never happened.
    """

    plan: ChaosPlan
    faults: tuple[Fault, ...]
    verdict: Verdict
    recovered_ms: dict[str, list[int]] = field(default_factory=dict)
    unrecovered: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a promise was broken."""
        return bool(self.verdict.breaches or self.unrecovered)

    def summary(self) -> dict[str, Any]:
        """Return it as JSON."""
        verdict, broken = self.verdict, self.verdict.broken
        return {
            "seed": self.plan.seed,
            "broker": self.plan.mesh.engine,
            "nodes": self.plan.mesh.nodes,
            "seconds": self.plan.seconds,
            "failed": self.failed,
            "faults": _counts(fault.kind for fault in self.faults),
            "submitted": verdict.submitted,
            "accepted": verdict.accepted,
            "finished": verdict.finished,
            "errors": verdict.failed,
            "lost": broken["lost"],
            "unanswered": broken["unanswered"],
            "doubled": broken["doubled"],
            "gaps": broken["gap"],
            "wrong": broken["wrong"] + broken["malformed"],
            "repeated": verdict.repeated,
            "stale": verdict.stale,
            "moved": verdict.moved,
            "fail_over_ms": _spread(verdict.gaps_ms),
            "answer_ms": _spread(verdict.answer_ms),
            "recovery_ms": {name: _spread(times) for name, times in self.recovered_ms.items()},
            "unrecovered": list(self.unrecovered),
            "breaches": [
                f"{breach.kind}: {breach.client}/{breach.task}: {breach.what}"
                for breach in verdict.breaches
            ],
        }


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
        probe = _RegistryProbe(session=admin, topics=Topics(), signer=signer, clock=clock)
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
        probe: "_RegistryProbe",
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
        self._begin_ms = clock()

    async def run(self) -> ChaosReport:
        span_ms = round(1000 * self._plan.seconds)
        faults = self._plan.faults
        if faults is None:
            faults = draw_faults(
                kinds_of(self._plan.mesh),
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
            count=round(plan.seconds * plan.task_rate),
            worded=_WORDED if plan.mesh.node_files else (),
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
            answered = all(self._answered(*kill) for kill in self._hand.kills)
            if not self._judge.open_tasks() and not lacking and answered:
                return
            await asyncio.sleep(_POLL_S)

    def _answered(self, member: str, killed_at: int) -> bool:
        return member != REGISTRY_ID or self._probe.first_after(killed_at) is not None

    def _recoveries(self) -> tuple[dict[str, list[int]], list[str]]:
        recovered: dict[str, list[int]] = {}
        unrecovered = []
        for member, at in self._hand.kills:
            if member not in {REGISTRY_ID, ROUTER_ID, BROKER}:
                continue
            served = (
                self._probe.first_after(at)
                if member == REGISTRY_ID
                else self._judge.served_after(at)
            )
            if served is not None:
                recovered.setdefault(member, []).append(served - at)
            elif member == REGISTRY_ID:  # of the others the open tasks tell
                unrecovered.append(f"{member}, killed {(at - self._begin_ms) / 1000:.1f} s in")
        return recovered, unrecovered

    async def _sleep_until(self, at_ms: int) -> None:
        await asyncio.sleep(max(0, self._begin_ms + at_ms - self._clock()) / 1000)


class _RegistryProbe:
    """Asks the registry again and again as an administrator, and notes when it was answered."""

    def __init__(
        self, *, session: Session, topics: Topics, signer: Signer, clock: Callable[[], int]
    ) -> None:
        self._session = session
        self._topics = topics
        self._signer = signer
        self._clock = clock
        self._asked: dict[str, int] = {}
        self._answers: list[tuple[int, int]] = []

    async def listen(self) -> None:
        """Subscribe to the answers."""
        await self._session.subscribe(
            self._topics.filter(TopicKind.REPLY, client=ADMIN_ID), self._on_reply
        )

    async def ask(self) -> None:
        """Ask, until cancelled."""
        topic = self._topics.build(TopicKind.ADMIN, target=REGISTRY_ID, client=ADMIN_ID)
        for number in itertools.count(1):
            request = AdminRequest(
                id=f"probe-{number}",
                verb="stats",
                sender=ADMIN_ID,
                target=REGISTRY_ID,
                sent_at=now_ms(),
                passport=self._signer.passport,
            )
            self._asked[request.id] = self._clock()
            with contextlib.suppress(FoamError):  # not connected: the next one will be heard
                self._session.post(topic, encode(self._signer.sign(request)))
            await asyncio.sleep(_PROBE_S)

    def first_after(self, at: int) -> int | None:
        """Return when a question asked after a moment was first answered."""
        return min((heard for asked, heard in self._answers if asked > at), default=None)

    async def _on_reply(self, message: Message) -> None:
        answer = json.loads(message.payload)
        asked = self._asked.pop(str(answer.get("task")), None)
        if asked is not None and answer.get("event") == "result":
            self._answers.append((asked, self._clock()))


def _counts(names: Iterable[str]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    return dict(sorted(counted.items()))


def _spread(times: Iterable[int]) -> dict[str, int | None]:
    known = list(times)
    return {
        "n": len(known),
        "p50": percentile(known, 0.5),
        "p99": percentile(known, 0.99),
        "most": max(known, default=None),
    }
