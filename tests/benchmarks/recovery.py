"""How long the mesh is without what was killed, on each broker.

A mesh of processes under a steady load of quick tasks; one process at a time is killed (SIGKILL),
the supervisor starts it again. Measured from the kill: router and broker, until a task sent after
it was accepted; registry, until a question of an administrator was answered; node, until it said
that it lives anew. ``of two``: one of two routers is killed, the other one takes its tasks over.
``waited``: the longest that any task of the whole run waited for its ``accepted``.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from broker.mosquitto import MosquittoBroker
from broker.nats import NatsBroker
from foam.chaos.mesh import BROKER, MeshPlan
from foam.chaos.report import ChaosPlan, ChaosReport
from foam.chaos.run import run_chaos
from foam.chaos.schedule import Fault
from foam.mesh import REGISTRY_ID, ROUTER_ID

ROUNDS = 5
PAUSE_MS = 15_000
"""From one kill to the next: long enough for all to be back."""
RATE = 20
"""Tasks a second: the recovery of router and broker is known to within the time between two."""


def measure() -> list[dict[str, Any]]:
    engines = ["embedded"]
    engines += ["mosquitto"] if MosquittoBroker.available() else []
    engines += ["nats"] if NatsBroker.available() else []
    return [asyncio.run(_measured(engine)) for engine in engines]


async def _measured(engine: str) -> dict[str, Any]:
    alone = await _killed(engine, 1, (ROUTER_ID, REGISTRY_ID, BROKER, "chaos-1"))
    paired = await _killed(engine, 2, (ROUTER_ID,))
    found = {
        "router": alone.recovered_ms[ROUTER_ID],
        "of two": paired.recovered_ms[ROUTER_ID],
        "registry": alone.recovered_ms[REGISTRY_ID],
        "broker": alone.recovered_ms[BROKER],
        "node": alone.recovered_ms["node"],
    }
    row: dict[str, Any] = {"broker": engine, "kills of each": ROUNDS}
    for name, times in found.items():
        ordered = sorted(times)
        row[f"{name} p50 ms"] = ordered[len(ordered) // 2]
        row[f"{name} most ms"] = ordered[-1]
    row["waited ms"] = max(alone.verdict.accepted_ms)
    row["waited, of two ms"] = max(paired.verdict.accepted_ms)
    row["lost or doubled"] = len(alone.verdict.breaches) + len(paired.verdict.breaches)
    return row


async def _killed(engine: str, routers: int, members: tuple[str, ...]) -> ChaosReport:
    """Kill each of the members in turn, several times."""
    kinds = {ROUTER_ID: "kill_router", REGISTRY_ID: "kill_registry", BROKER: "kill_broker"}
    order = [member for _ in range(ROUNDS) for member in members]
    faults = tuple(
        Fault(at_ms=PAUSE_MS * number + 2_000, kind=kinds.get(member, "kill_node"), target=member)
        for number, member in enumerate(order)
    )
    seconds = PAUSE_MS * len(order) / 1000
    with tempfile.TemporaryDirectory() as place:
        plan = ChaosPlan(
            mesh=MeshPlan(
                data=Path(place) / "mesh", engine=engine, nodes=2, devices=2, routers=routers
            ),
            seed=1,
            seconds=seconds,
            tasks=round(RATE * seconds),
            pace=0.0,
            faults=faults,
        )
        return await run_chaos(plan, notify=lambda _: None)
