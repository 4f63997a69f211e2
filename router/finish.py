"""When a node would be done with a task, from what it says of itself. Pure.

Admission by predicted finish, as deadline-aware schedulers of edge devices do it, in two figures. A
task is refused here only for the least a run takes: nodes know the sizes of inputs and serve the
nearest deadline first, so they look again. The expected finish ranks those that are left.
"""

from typing import Final, NamedTuple

from capability_schemas.capability import CatalogRecord
from capability_schemas.node import FunctionLoad
from router.catalogue import NodeView

_SURE_SHARE: Final = 0.5
"""Share of a smoothed time to the first output that is sure: prompts may be half as long as usual.
The forecast of a node takes as much of a prefill for granted."""

_LONGEST_MS: Final = 1e12
"""Thirty years."""


class Finish(NamedTuple):
    """A prediction; what is unknown counts as nothing in the least, and leaves the rest unknown.

    Attributes:
        wait_ms: Expected wait for a place, the start of an instance included.
        least_wait_ms: Wait of a task that goes before all that waits.
        least_run_ms: What the run takes at the least.
        total_ms: Expected time to the end of the run; None when nothing is known of its length.
    """

    wait_ms: float
    least_wait_ms: float
    least_run_ms: float
    total_ms: float | None

    @property
    def least_ms(self) -> float:
        """Time to the end at the very least."""
        return self.least_wait_ms + self.least_run_ms


UNKNOWN: Final = Finish(0.0, 0.0, 0.0, None)


def predict_finish(record: CatalogRecord, node: NodeView) -> Finish:
    """Predict when a node would be done with a task given to it now.

    Args:
        record: The function.
        node: The node as it stands.
    """
    load = node.function(record.function)
    first_ms = _sane(load.first_ms)
    if first_ms is None:
        first_ms = _sane(record.resources.first_ms)
    total_ms, told_ms, least_ms = _sane(load.total_ms), _sane(load.wait_ms), _sane(load.least_ms)
    run_ms = first_ms if total_ms is None else total_ms
    queue_ms = (run_ms or 0.0) * load.queued / load.concurrency
    told_ms = queue_ms if told_ms is None else told_ms
    least_run_ms = _SURE_SHARE * (first_ms or 0.0) if least_ms is None else least_ms
    wait_ms = told_ms + _given_since_ms(load, node, run_ms or 0.0)
    return Finish(
        wait_ms=wait_ms,
        least_wait_ms=max(0.0, told_ms - queue_ms),
        least_run_ms=least_run_ms,
        total_ms=None if run_ms is None else wait_ms + run_ms,
    )


def _sane(told_ms: float | None) -> float | None:
    """Return a time that a node tells within what a time can be: nodes say what they like."""
    return None if told_ms is None else min(max(0.0, told_ms), _LONGEST_MS)


def _given_since_ms(load: FunctionLoad, node: NodeView, run_ms: float) -> float:
    """Return the wait for what this router has given the node since it last spoke.

    Heartbeats are seconds apart; without this a burst would go to one node all of it.
    """
    told = node.load.running + node.load.queued if node.load else 0
    free = max(0, node.capacity - told)
    return run_ms * max(0, node.assigned - told - free) / load.concurrency
