"""Counters of a router."""

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, Final

_SAMPLES: Final = 4_096
_RUNS: Final = 200
_FUNCTIONS: Final = 2_000
_SLOW: Final = 0.95


class FunctionTimes:
    """How long the latest runs of each function took, from invocation to end, as a router sees it.

    Bounded: ``_RUNS`` runs of each of ``_FUNCTIONS`` functions, the longest unheard of go first.
    """

    def __init__(self) -> None:
        self._runs: OrderedDict[tuple[str, str], deque[int]] = OrderedDict()

    def add(self, function: str, version: str, took_ms: int) -> None:
        """Take a run that went well."""
        key = (function, version)
        runs = self._runs.get(key)
        if runs is None:
            runs = self._runs[key] = deque(maxlen=_RUNS)
        runs.append(took_ms)
        self._runs.move_to_end(key)
        if len(self._runs) > _FUNCTIONS:
            self._runs.popitem(last=False)

    def slow_ms(self, function: str, version: str, *, samples: int) -> int | None:
        """Return what 95 of 100 runs stay below, milliseconds.

        Args:
            function: Its name.
            version: Its version.
            samples: Fewest runs it takes to tell.
        """
        runs = self._runs.get((function, version))
        if runs is None or len(runs) < min(samples, _RUNS):
            return None
        return _quantile(sorted(runs), _SLOW)


@dataclass(slots=True)
class RouterStats:
    """What a router has done since it started.

    Attributes:
        accepted: Tasks journaled.
        repeated: Tasks whose id was known: nothing was run.
        taken_over: Tasks that belonged to another router, or that it had and was lost with.
        given_up: Tasks left to a router with a better claim.
        unwatched: Tasks of other routers that there was no room to follow.
        rerouted: Invocations after the first of a task, for want of an answer.
        continued: Invocations that went on with an answer whose node was lost.
        hedged: Invocations of a second node beside one that took long.
        times: How long runs of functions take.
        escalated: Invocations after the first of a task, for want of a sure answer.
        waited: Tasks that had to wait for a node with room.
        shed: Tasks that might not wait, by priority.
        moved: Tasks taken from a node with a queue, before they had begun.
        missed_chunks: Chunks the client was shown and the router did not see.
        ended: Tasks ended, by error code or ``result``.
        refused: Tasks never accepted, by error code.
        dropped: Frames dropped, by reason.
        route_ms: Milliseconds from receipt to invocation, of the latest tasks.
    """

    accepted: int = 0
    repeated: int = 0
    taken_over: int = 0
    given_up: int = 0
    unwatched: int = 0
    rerouted: int = 0
    continued: int = 0
    hedged: int = 0
    times: FunctionTimes = field(default_factory=FunctionTimes)
    escalated: int = 0
    waited: int = 0
    shed: Counter[int] = field(default_factory=Counter)
    moved: int = 0
    missed_chunks: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    route_ms: deque[int] = field(default_factory=lambda: deque(maxlen=_SAMPLES))

    def describe(self) -> dict[str, Any]:
        """Return them as JSON."""
        times = sorted(self.route_ms)
        return {
            "accepted": self.accepted,
            "repeated": self.repeated,
            "taken_over": self.taken_over,
            "given_up": self.given_up,
            "unwatched": self.unwatched,
            "rerouted": self.rerouted,
            "continued": self.continued,
            "hedged": self.hedged,
            "escalated": self.escalated,
            "waited": self.waited,
            "shed": {str(priority): count for priority, count in sorted(self.shed.items())},
            "moved": self.moved,
            "missed_chunks": self.missed_chunks,
            "ended": dict(self.ended),
            "refused": dict(self.refused),
            "dropped": dict(self.dropped),
            "route_ms": {
                "count": len(times),
                "p50": _quantile(times, 0.50),
                "p99": _quantile(times, 0.99),
            },
        }


def _quantile(ordered: list[int], share: float) -> int | None:
    """Return the nearest-rank quantile of an ascending list."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
