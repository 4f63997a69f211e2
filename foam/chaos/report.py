"""What came of a chaos run: as JSON, and for people."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from foam.chaos.judge import Verdict, percentile
from foam.chaos.mesh import MeshPlan
from foam.chaos.schedule import Fault

__all__ = ["ChaosPlan", "ChaosReport", "describe"]

_COLUMN = 14
"""Width of the first column of the report for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """What a run does.

    Attributes:
        mesh: What is broken.
        seed: Faults and load come from it; what the machine makes of them does not.
        seconds: How long tasks are sent and things broken.
        tasks: Tasks sent in that time.
        fault_rate: Faults each second.
        kinds: What may happen; everything when empty.
        pace: How long the tasks take, compared with the usual.
        faults: What happens; None: drawn from the seed.
    """

    mesh: MeshPlan
    seed: int
    seconds: float
    tasks: int
    fault_rate: float = 0.25
    kinds: tuple[str, ...] = ()
    pace: float = 1.0
    faults: tuple[Fault, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosReport:
    """What came of a run, as its clients saw it.

    Attributes:
        plan: What was done.
        faults: What happened.
        verdict: What the clients saw.
        recovered_ms: For each kind of process, times in milliseconds from each kill until it was
            made good: a task sent after it accepted (router, broker), a question of an
            administrator answered (registry), the node there again (node).
        unrecovered: Kills after which that never happened.
    """

    plan: ChaosPlan
    faults: tuple[Fault, ...]
    verdict: Verdict
    recovered_ms: Mapping[str, list[int]] = field(default_factory=dict)
    unrecovered: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a promise was broken."""
        return bool(self.verdict.breaches or self.unrecovered)

    def summary(self) -> dict[str, Any]:
        """Return it as JSON."""
        verdict, broken, mesh = self.verdict, self.verdict.broken, self.plan.mesh
        return {
            "seed": self.plan.seed,
            "broker": mesh.engine,
            "nodes": mesh.nodes,
            "routers": mesh.routers,
            "registries": mesh.registries,
            "brokers": mesh.brokers,
            "devices": mesh.devices,
            "seconds": self.plan.seconds,
            "failed": self.failed,
            "faults": dict(sorted(Counter(fault.kind for fault in self.faults).items())),
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
            "accepted_ms": _spread(verdict.accepted_ms),
            "answer_ms": _spread(verdict.answer_ms),
            "recovery_ms": {
                name: _spread(times) for name, times in sorted(self.recovered_ms.items())
            },
            "unrecovered": list(self.unrecovered),
            "breaches": [
                f"{breach.kind}: {breach.client}/{breach.task}: {breach.what}"
                for breach in verdict.breaches
            ],
        }


def describe(summary: Mapping[str, Any]) -> str:
    """Return a summary for people.

    Args:
        summary: What `ChaosReport.summary` returns.
    """
    errors = summary["errors"]
    promises = ("lost", "unanswered", "doubled", "gaps", "wrong")
    parts = ("brokers", "registries", "routers", "nodes", "devices")
    sizes = ", ".join(f"{name} {summary[name]}" for name in parts)
    lines = [
        f"seed {summary['seed']} on {summary['broker']}: {sizes}, {summary['seconds']:g} s",
        "",
        _line("faults", _listed(summary["faults"])),
        _line("tasks", _listed({name: summary[name] for name in ("submitted", "accepted")})),
        _line("ended", f"result {summary['finished']}, error {sum(errors.values())}"),
        _line("  errors", _listed(errors)),
        _line("promises", _listed({name: summary[name] for name in promises})),
        _line("allowed", _listed({name: summary[name] for name in ("repeated", "stale")})),
        _line("moved", f"{summary['moved']} tasks were given to more than one node"),
        "",
        _line("milliseconds", "     n     p50     p99    most"),
        _line("accepted", _row(summary["accepted_ms"])),
        _line("answered", _row(summary["answer_ms"])),
        _line("fail-over", _row(summary["fail_over_ms"])),
        *(_line(f"{name} back", _row(spread)) for name, spread in summary["recovery_ms"].items()),
        "",
        *(f"NOT BACK: {one}" for one in summary["unrecovered"]),
        *(f"BROKEN: {one}" for one in summary["breaches"]),
        "promises were broken" if summary["failed"] else "every promise kept",
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, rest: str) -> str:
    return f"{name:<{_COLUMN}} {rest}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items()) or "none"


def _row(spread: Mapping[str, int | None]) -> str:
    cells = ("-" if spread[name] is None else spread[name] for name in ("p50", "p99", "most"))
    return f"{spread['n']:>6}" + "".join(f" {cell:>7}" for cell in cells)


def _spread(times: Iterable[int]) -> dict[str, int | None]:
    known = list(times)
    return {
        "n": len(known),
        "p50": percentile(known, 0.5),
        "p99": percentile(known, 0.99),
        "most": max(known, default=None),
    }
