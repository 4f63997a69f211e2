"""Counters of a router."""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Final

_SAMPLES: Final = 4_096


@dataclass(slots=True)
class RouterStats:
    """What a router has done since it started.

    Attributes:
        accepted: Tasks journaled.
        repeated: Tasks whose id was known: nothing was run.
        rerouted: Invocations after the first of a task, for want of an answer.
        escalated: Invocations after the first of a task, for want of a sure answer.
        missed_chunks: Chunks the client was shown and the router did not see.
        ended: Tasks ended, by error code or ``result``.
        refused: Tasks never accepted, by error code.
        dropped: Frames dropped, by reason.
        route_ms: Milliseconds from receipt to invocation, of the latest tasks.
    """

    accepted: int = 0
    repeated: int = 0
    rerouted: int = 0
    escalated: int = 0
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
            "rerouted": self.rerouted,
            "escalated": self.escalated,
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
