"""``foam chaos``: break a mesh on purpose and see whether it keeps its word."""

import json
import sys
import tempfile
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import typer

from foam.cli.app import app, run_async
from foam.cli.codes import CODES_EPILOG
from foam.cli.look import JsonOption

__all__ = ["chaos"]

_TRACE_LINES = 40


@app.command(epilog=CODES_EPILOG)
def chaos(
    *,
    minutes: Annotated[
        float, typer.Option("--minutes", help="How long things are broken.", min=0.05)
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="What faults and load are drawn from.")] = 1,
    broker: Annotated[
        str | None,
        typer.Option("--broker", help="embedded, mosquitto or nats; chosen as by `foam up`."),
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Number of nodes.", min=1)] = 4,
    devices: Annotated[int, typer.Option("--devices", help="Number of clients.", min=1)] = 3,
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="Have a language model answer, too.")
    ] = True,
    rate: Annotated[float, typer.Option("--rate", help="Tasks sent each second.", min=0.1)] = 4.0,
    faults: Annotated[
        float, typer.Option("--faults", help="Faults each second; 0: none.", min=0.0)
    ] = 0.25,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Empty folder for the mesh and its logs; kept. Default: none."),
    ] = None,
    simulated: Annotated[
        bool,
        typer.Option("--simulated", help="Simulate many meshes under virtual time instead."),
    ] = False,
    seeds: Annotated[
        int, typer.Option("--seeds", help="Simulations, of one seed each from --seed on.", min=1)
    ] = 10,
    tasks: Annotated[int, typer.Option("--tasks", help="Tasks of a simulation.", min=1)] = 200,
    routers: Annotated[int, typer.Option("--routers", help="Routers of a simulation.", min=1)] = 1,
    jobs: Annotated[
        int | None, typer.Option("--jobs", help="Simulations at a time; all processors.", min=1)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Break a mesh on purpose; exit code 1 when it did not keep a promise.

    Starts a mesh of its own, sends tasks as plain devices do, kills, stops, cuts off and slows down
    its processes, and judges by what the devices saw: nothing accepted is lost, nothing is answered
    twice, no number is missing. With --simulated, meshes are simulated under virtual time instead;
    a failure names its seed, and `python -m foam.simulation --seed N --shrink` shows what it takes.
    """
    if simulated:
        arguments = {
            "nodes": nodes,
            "devices": devices,
            "tasks": tasks,
            "routers": routers,
            "seconds": max(1, round(60 * minutes)),
            "fault-rate": faults,
        }
        run_async(_simulate(range(seed, seed + seeds), arguments, jobs=jobs, as_json=as_json))
        return
    from foam.chaos.mesh import MeshPlan
    from foam.chaos.run import ChaosPlan
    from foam.demo import PLANT_NODES
    from foam.up import choose_engine

    engine, _ = choose_engine(broker)
    with tempfile.TemporaryDirectory(prefix="foam-chaos-") as folder:
        mesh = MeshPlan(
            data=Path(folder) if data is None else data,
            engine=engine,
            nodes=nodes,
            devices=devices,
            node_files=PLANT_NODES[:1] if model else (),
        )
        plan = ChaosPlan(
            mesh=mesh, seed=seed, seconds=60 * minutes, task_rate=rate, fault_rate=faults
        )
        run_async(_break(plan, as_json=as_json))


async def _break(plan: Any, *, as_json: bool) -> int:
    from foam.chaos.run import run_chaos
    from foam.logging import configure_logging

    def say(sentence: str) -> None:
        sys.stderr.write(f"foam: {sentence}\n")
        sys.stderr.flush()

    configure_logging("error", process="chaos", stream=sys.stderr)
    report = await run_chaos(plan, notify=say)
    summary = report.summary()
    sys.stdout.write(json.dumps(summary) + "\n" if as_json else _table(summary))
    return int(report.failed)


async def _simulate(
    seeds: range, arguments: dict[str, Any], *, jobs: int | None, as_json: bool
) -> int:
    from foam.simulation.seeds import run_seeds

    given = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    failed: list[int] = []
    messages = tasks = 0
    async with aclosing(run_seeds(seeds, given, jobs=jobs)) as reports:
        async for report in reports:
            messages += report["messages"]
            tasks += report["tasks"]
            if as_json:
                sys.stdout.write(json.dumps(report) + "\n")
            elif report["failed"]:
                sys.stdout.write(_failure(report, given))
            sys.stdout.flush()
            failed += [report["seed"]] if report["failed"] else []
    if not as_json:
        sys.stdout.write(
            f"{len(seeds)} simulations, {tasks} tasks, {messages} messages: "
            + (f"{len(failed)} failed: {sorted(failed)}\n" if failed else "every promise kept\n")
        )
    return int(bool(failed))


def _failure(report: Any, given: list[str]) -> str:
    """Return what there is to know about a failing seed."""
    again = f"python -m foam.simulation --seed {report['seed']} {' '.join(given)} --shrink"
    lines = [
        f"seed {report['seed']} failed (again, smaller: PYTHONHASHSEED=0 {again})",
        *(f"  {line}" for line in report["breaches"]),
        *(f"  {line}" for line in report["problems"]),
        *(f"    {line[:200]}" for line in report["trace"][-_TRACE_LINES:]),
    ]
    return "\n".join(lines) + "\n"


def _table(summary: dict[str, Any]) -> str:
    """Return the report for people."""
    lines = []
    for name, value in summary.items():
        if name == "breaches":
            continue
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {_shown(part)}" for key, part in value.items()) or "none"
        elif isinstance(value, list):
            shown = "; ".join(map(str, value)) or "none"
        lines.append(f"{name:<14} {shown}")
    lines += [f"BROKEN {breach}" for breach in summary["breaches"]]
    return "\n".join(lines) + "\n"


def _shown(part: Any) -> str:
    if isinstance(part, dict):
        return "(" + ", ".join(f"{key} {value}" for key, value in part.items()) + ")"
    return str(part)
