"""Makes a failing simulation smaller: fewer faults that still break the same promise.

Delta debugging (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002,
figure 3) over the schedule of faults: load and network stay as the seed drew them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from foam.chaos.schedule import Fault
from foam.simulation.world import Run, simulate

__all__ = ["Shrunk", "shrink"]

_MOST_RUNS: Final = 60


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest failing run that was found.

    Attributes:
        run: The run.
        runs: Simulations that it took.
    """

    run: Run
    runs: int


def shrink(run: Run, *, most_runs: int = _MOST_RUNS) -> Shrunk:
    """Cut the faults of a failing run down.

    Args:
        run: It failed.
        most_runs: Simulations to spend.

    Returns:
        A run that breaks a promise of the same kind, with as few faults as were found to do.
    """
    wanted = _kinds(run)
    best, runs = run, 0

    def still_fails(faults: Sequence[Fault]) -> bool:
        nonlocal best, runs
        runs += 1
        tried = simulate(run.scenario.with_faults(faults))
        if tried.failed and _kinds(tried) & wanted:
            best = tried
            return True
        return False

    _minimise(
        list(run.scenario.faults or ()), lambda faults: runs < most_runs and still_fails(faults)
    )
    return Shrunk(best, runs)


def _kinds(run: Run) -> set[str]:
    """Return what kinds of promises a run broke."""
    return {*run.verdict.broken, *(problem.partition(":")[0] for problem in run.problems)}


def _minimise(faults: list[Fault], fails: Callable[[list[Fault]], bool]) -> list[Fault]:
    """Return a smaller list that fails; every list handed to ``fails`` is smaller than the last."""
    pieces = 2
    while len(faults) > 1:
        size = -(-len(faults) // pieces)
        without = [faults[:at] + faults[at + size :] for at in range(0, len(faults), size)]
        smaller = next((rest for rest in without if fails(rest)), None)
        if smaller is not None:
            faults, pieces = smaller, max(2, pieces - 1)
        elif size == 1:
            break
        else:
            pieces = min(len(faults), 2 * pieces)
    return faults
