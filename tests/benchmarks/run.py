"""The benchmarks: each compares the mesh with a baseline measured in the same run.

    python tests/benchmarks/run.py all
    python tests/benchmarks/run.py round_trip first_token --brokers mosquitto embedded
    python tests/benchmarks/run.py footprint --json out.json
    python tests/benchmarks/run.py routing --data FOLDER --semantic-router OTHER/bin/python

Verbs: ``round_trip``, ``first_token``, ``throughput``, ``footprint``, ``fifty``; ``streams``,
``cold_start``, ``runtimes``, ``prediction``, ``failover``, ``recovery``, ``fairness``, ``moves``,
``routing_scale``, ``rules``, ``signed_messages``, ``signed_catalogue``, ``signed_tasks``,
``brokers`` and ``routing``, which need no mesh of theirs; ``all``. Tables go to stdout, the same
numbers to ``--json``.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1])]

from benchmarks import (  # noqa: E402 - the test folders are no installed packages
    agent_footprint,
    batched_decoding,
    broker_throughput,
    cold_start,
    fail_over,
    fairness,
    finish_prediction,
    first_token,
    identities,
    idle_agent,
    quotas,
    recovery,
    routing_quality,
    routing_scale,
    rule_matching,
    runtime_overhead,
    signatures,
    task_round_trip,
    token_throughput,
)
from benchmarks.measure import BenchMesh, bench_mesh, machine, table  # noqa: E402
from broker.mosquitto import MosquittoBroker  # noqa: E402
from broker.nats import NatsBroker  # noqa: E402
from foam.logging import configure_logging  # noqa: E402

Measure = Callable[[BenchMesh], Awaitable[dict[str, Any]]]
VERBS: dict[str, Measure] = {
    "round_trip": task_round_trip.measure,
    "first_token": first_token.measure,
    "throughput": token_throughput.measure,
    "footprint": agent_footprint.measure,
    "fifty": idle_agent.measure,
}
WITHOUT_MESH: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "streams": batched_decoding.measure,
    "cold_start": cold_start.measure,
    "runtimes": runtime_overhead.measure,
    "prediction": finish_prediction.measure,
    "routing_scale": routing_scale.measure,
    "rules": rule_matching.measure,
    "failover": fail_over.measure,
    "recovery": recovery.measure,
    "fairness": fairness.measure,
    "moves": fairness.measure_moves,
    "identities": identities.measure,
    "joining": identities.measure_joining,
    "quotas": quotas.measure,
    "signed_messages": signatures.measure_messages,
    "signed_catalogue": signatures.measure_catalogue,
    "signed_tasks": signatures.measure_tasks,
}
ONCE = ("footprint", "fifty")
"""Benchmarks that do not depend on the broker run on the first one only."""


def brokers_here() -> list[str]:
    found = ["embedded"]
    found += ["mosquitto"] if MosquittoBroker.available() else []
    found += ["nats"] if NatsBroker.available() else []
    return found


async def run(verbs: list[str], brokers: list[str]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {verb: [] for verb in verbs}
    for place, broker in enumerate(brokers):
        async with bench_mesh(broker) as mesh:
            for verb in verbs:
                if place == 0 or verb not in ONCE:
                    rows[verb].append(await VERBS[verb](mesh))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmarks of the mesh.")
    parser.add_argument(
        "verbs", nargs="+", choices=[*VERBS, *WITHOUT_MESH, "brokers", "routing", "all"]
    )
    parser.add_argument("--brokers", nargs="+", default=None, help="default: all on this machine")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--data", nargs="+", type=Path, default=[], help="of routing: folders")
    parser.add_argument("--semantic-router", type=Path, default=None, help="of routing: a python")
    options = parser.parse_args()
    everything = [*VERBS, *WITHOUT_MESH, "brokers", "routing"]
    wanted = everything if "all" in options.verbs else options.verbs
    configure_logging("error")
    facts = machine()
    print(json.dumps(facts))
    meshed = [verb for verb in wanted if verb in VERBS]
    rows: dict[str, list[dict[str, Any]]] = {}
    if meshed:
        rows = asyncio.run(run(meshed, options.brokers or brokers_here()))
    rows |= {verb: measured() for verb, measured in WITHOUT_MESH.items() if verb in wanted}
    if "brokers" in wanted:
        rows["brokers"] = asyncio.run(broker_throughput.measure())
    if "routing" in wanted:
        rows["routing"] = routing_quality.measure(options.data, options.semantic_router)
    for verb, found in rows.items():
        if found:
            print(f"\n{table(verb, found)}")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": facts, **rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
