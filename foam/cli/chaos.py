"""``foam chaos``: break a mesh on purpose and see whether it keeps its word."""

import json
import sys
import tempfile
from collections.abc import Collection
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import typer

from foam.cli.app import app, run_async
from foam.cli.codes import CODES_EPILOG
from foam.cli.look import JsonOption

__all__ = ["chaos"]

_TRACE_LINES = 40
_SIMULATED_TASKS = 200


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
    sleepers: Annotated[
        int,
        typer.Option("--sleepers", help="Simulated: nodes that sleep when idle.", min=0),
    ] = 0,
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="Have a language model answer, too.")
    ] = True,
    rate: Annotated[float, typer.Option("--rate", help="Tasks sent each second.", min=0.1)] = 4.0,
    tasks: Annotated[
        int | None,
        typer.Option("--tasks", help="Number of tasks, in place of a rate.", min=1),
    ] = None,
    pace: Annotated[
        float,
        typer.Option("--pace", help="How long tasks take, 1 as usual (2 s a stream).", min=0.0),
    ] = 1.0,
    faults: Annotated[
        float, typer.Option("--faults", help="Faults each second; 0: none.", min=0.0)
    ] = 0.25,
    only: Annotated[
        str, typer.Option("--only", help="Kinds of faults: kill_node,cut …; all when not said.")
    ] = "",
    routers: Annotated[
        int, typer.Option("--routers", help="Routers that share the tasks.", min=1)
    ] = 1,
    registries: Annotated[
        int, typer.Option("--registries", help="Registries, of which one leads.", min=1)
    ] = 1,
    brokers: Annotated[
        int, typer.Option("--brokers", help="Servers of the broker: 1, or 3 or 5 of nats.", min=1)
    ] = 1,
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
    if sleepers > (nodes if simulated else 0):
        raise typer.BadParameter(
            f"{sleepers} of {nodes} nodes cannot sleep"
            if simulated
            else "nodes sleep in simulations only: add --simulated",
            param_hint="--sleepers",
        )
    if simulated:
        arguments = {
            "nodes": nodes,
            "sleepers": sleepers,
            "devices": devices,
            "tasks": tasks or _SIMULATED_TASKS,
            "routers": routers,
            "seconds": max(1, round(60 * minutes)),
            "fault-rate": faults,
        }
        run_async(_simulate(range(seed, seed + seeds), arguments, jobs=jobs, as_json=as_json))
        return
    from foam.chaos.hand import kinds_of
    from foam.chaos.mesh import MeshPlan
    from foam.chaos.report import ChaosPlan
    from foam.up import choose_engine

    engine, _ = choose_engine(broker, servers=brokers)
    with tempfile.TemporaryDirectory(prefix="foam-chaos-") as folder:
        mesh = MeshPlan(
            data=Path(folder) if data is None else data,
            engine=engine,
            nodes=nodes,
            devices=devices,
            routers=routers,
            registries=registries,
            brokers=brokers,
            model=model,
        )
        plan = ChaosPlan(
            mesh=mesh,
            seed=seed,
            seconds=60 * minutes,
            tasks=tasks or max(1, round(60 * minutes * rate)),
            fault_rate=faults,
            kinds=_known(only, kinds_of(mesh)),
            pace=pace,
        )
        run_async(_break(plan, as_json=as_json))


def _known(only: str, kinds: Collection[str]) -> tuple[str, ...]:
    """Return the kinds of faults that were named.

    Raises:
        BadParameter: There is no such kind.
    """
    named = tuple(name.strip() for name in only.split(",") if name.strip())
    unknown = [name for name in named if name not in kinds]
    if unknown:
        raise typer.BadParameter(
            f"no fault is called {', '.join(unknown)}: there are {', '.join(kinds)}",
            param_hint="--only",
        )
    return named


async def _break(plan: Any, *, as_json: bool) -> int:
    from foam.chaos.report import describe
    from foam.chaos.run import run_chaos
    from foam.logging import configure_logging

    def say(sentence: str) -> None:
        sys.stderr.write(f"foam: {sentence}\n")
        sys.stderr.flush()

    configure_logging("error", process="chaos", stream=sys.stderr)
    report = await run_chaos(plan, notify=say)
    summary = report.summary()
    sys.stdout.write(json.dumps(summary) + "\n" if as_json else describe(summary))
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
