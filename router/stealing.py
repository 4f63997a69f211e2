"""Work stealing: which tasks that have not begun had better go to an idle node. Pure.

Late binding keeps the queues of nodes short, but what stands in one may turn out to stand behind a
run that takes long, while another node of the function has nothing to do. The idle one takes from
the longest queue, the latest task first (Blumofe and Leiserson, JACM 46(5), 1999, section 3), if
that is clearly sooner done by then. What keeps it from going back and forth: the gain must be worth
a good part of a run, a task is moved twice at most (``router.patient``), and so many are moved in a
second.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from router.commons import Budget
from router.waiting import Key

LEAST_GAIN_MS: Final = 500.0
"""What a move must save at the least, milliseconds: some round trips, and what predictions are
wrong by."""

_GAIN_SHARE: Final = 0.5
"""What it must save at the least, as a share of the run."""

_SAVED_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Held:
    """A task that a node has and, as far as is known, has not begun.

    Attributes:
        key: Its key.
        asked_at: When the node was given it, UTC milliseconds.
    """

    key: Key
    asked_at: int


@dataclass(frozen=True, slots=True)
class Crowd:
    """A node that has more of a function than it runs at a time.

    Attributes:
        node: The node.
        places: Tasks of the function it runs at a time.
        given: Tasks of it that it has.
        run_ms: Usual time of a run, milliseconds; None where that is not known.
        held: Those of them that may be moved, as they were given.
    """

    node: str
    places: int
    given: int
    run_ms: float | None
    held: Sequence[Held]

    def wait_ms(self, held: Held, now: int) -> float:
        """Predict how long the last in line still waits, milliseconds.

        What the runs before it take; where they have turned out longer, as long again as it has
        waited (of waits of unknown length the best guess, by Copernicus: Gott, Nature 363, 1993).

        Args:
            held: Who.
            now: UTC milliseconds.
        """
        usual_ms = (self.run_ms or 0.0) * max(0, self.given - self.places) / self.places
        return max(usual_ms, float(now - held.asked_at))


@dataclass(frozen=True, slots=True)
class Idle:
    """A node that has nothing of a function to do.

    Attributes:
        node: The node.
        wait_ms: What a task would wait for there, the start of an instance, milliseconds.
        run_ms: Usual time of a run there, milliseconds; None where that is not known.
    """

    node: str
    wait_ms: float
    run_ms: float | None


@dataclass(frozen=True, slots=True)
class Move:
    """A task that had better be elsewhere.

    Attributes:
        key: Its key.
        node: Who has it.
        to: Who would have it done sooner.
    """

    key: Key
    node: str
    to: str


class Mover:
    """Decides on moves, so many a second. Owned by the router's event loop.

    Args:
        per_s: Most moves in a second; 0: none.
    """

    def __init__(self, *, per_s: float) -> None:
        self._budget = Budget(share=0.0, least_per_s=per_s, saved=max(1.0, per_s * _SAVED_S))
        self._on = per_s > 0

    def moves(self, crowds: Iterable[Crowd], idle: Iterable[Idle], now: int) -> list[Move]:
        """Return what to move among the nodes of one function.

        Args:
            crowds: Those with a queue.
            idle: Those without work.
            now: UTC milliseconds.
        """
        if not self._on:
            return []
        lines = sorted(crowds, key=lambda one: -(one.given - one.places))
        takers = sorted(idle, key=lambda one: one.wait_ms)
        moves = []
        for crowd, taker in zip(lines, takers, strict=False):
            waits = crowd.held and crowd.given > crowd.places
            last = max(reversed(crowd.held), key=lambda one: one.asked_at) if waits else None
            if last is None or not self._pays(crowd, last, taker, now):
                continue
            if not self._budget.take(now):
                break
            moves.append(Move(last.key, crowd.node, taker.node))
        return moves

    def _pays(self, crowd: Crowd, held: Held, taker: Idle, now: int) -> bool:
        run_ms = taker.run_ms if taker.run_ms is not None else crowd.run_ms
        slower_ms = 0.0
        if taker.run_ms is not None and crowd.run_ms is not None:
            slower_ms = taker.run_ms - crowd.run_ms
        gain_ms = crowd.wait_ms(held, now) - taker.wait_ms - slower_ms
        return gain_ms >= max(LEAST_GAIN_MS, _GAIN_SHARE * (run_ms or 0.0))
