"""One simulation in a process of its own: ``python -m foam.simulation --seed 7``.

Prints one line of JSON: the figures and, of a failure, the faults and the last events. Run it with
``PYTHONHASHSEED=0``: the order of sets would differ from process to process otherwise.
"""

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import structlog

from foam.chaos.schedule import Fault
from foam.simulation.scenario import Scenario
from foam.simulation.shrink import shrink
from foam.simulation.world import simulate


def main() -> int:
    """Run it; returns 1 when a promise was broken."""
    options = _options()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    scenario = Scenario(
        seed=options.seed,
        nodes=options.nodes,
        sleepers=options.sleepers,
        routers=options.routers,
        devices=options.devices,
        tasks=options.tasks,
        seconds=options.seconds,
        fault_rate=options.fault_rate,
        trace=options.trace,
    )
    if options.faults is not None:
        listed = json.loads(options.faults.read_text("utf-8"))
        scenario = scenario.with_faults([Fault(**one) for one in listed])
    run = simulate(scenario)
    report: dict[str, Any] = run.summary()
    if run.failed:
        if options.shrink:
            smallest = shrink(run)
            report = {**smallest.run.summary(), "shrunk_in": smallest.runs}
            run = smallest.run
        report["schedule"] = [dataclasses.asdict(fault) for fault in run.scenario.faults or ()]
        report["trace"] = list(run.trace)
    sys.stdout.write(json.dumps(report) + "\n")
    return int(run.failed)


def _options() -> argparse.Namespace:
    defaults = Scenario(seed=0)
    parser = argparse.ArgumentParser(prog="python -m foam.simulation")
    parser.add_argument("--seed", type=int, required=True)
    for name in ("nodes", "sleepers", "routers", "devices", "tasks", "seconds", "trace"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--fault-rate", type=float, default=defaults.fault_rate)
    parser.add_argument("--faults", type=Path, help="a schedule, as a failure printed it")
    parser.add_argument("--shrink", action="store_true", help="cut the faults of a failure down")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
