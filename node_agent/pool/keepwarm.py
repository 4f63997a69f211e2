"""How long an idle instance stays, when one is started ahead, which one goes first. Pure.

An instance stays while its idle time costs less than another start would: the break-even rule of
the ski-rental problem, at most twice as dear as knowing the future (Karlin, Manasse, Rudolph and
Sleator, Algorithmica 1988). How regularly work comes refines it, after Shahrad et al., Serverless
in the Wild, USENIX ATC 2020: where nearly every pause is shorter than the break-even time, an
instance goes soon after the longest usual pause; where nearly every pause is longer, it goes at
once, and if the pauses are alike too, one is started shortly before the next call is due.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

_LEAST_PAUSES: Final = 8
"""Pauses seen before they say anything about the next."""

_REMEMBERED: Final = 64
_LOW, _HIGH = 0.05, 0.95
_MARGIN: Final = 1.2
"""A pause may be this much longer than the longest usual one, or shorter than the shortest."""

_SMOOTHING: Final = 0.3
_USUAL_BYTES: Final = 32 * 1024 * 1024
_LEAST_START_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmthSettings:
    """What idle time is worth.

    Attributes:
        worth: Idle seconds that one second of starting is worth.
        least_s: Shortest stay of an instance, seconds.
        costly_s: Start from which ``costly_least_s`` holds, seconds.
        costly_least_s: Shortest stay of an instance that is costly to start, seconds.
        most_s: Longest stay, seconds.
    """

    worth: float = 120.0
    least_s: float = 5.0
    costly_s: float = 0.5
    costly_least_s: float = 30.0
    most_s: float = 1800.0


class KeepWarm:
    """What one group of instances has shown about starts and pauses. Times in seconds.

    Args:
        settings: What idle time is worth.
    """

    def __init__(self, settings: WarmthSettings) -> None:
        self._settings = settings
        self._pauses: deque[float] = deque(maxlen=_REMEMBERED)
        self._idle_since: float | None = None
        self.start_s: float | None = None

    def started(self, took_s: float) -> None:
        """Take in how long a start took."""
        old = self.start_s
        self.start_s = took_s if old is None else old + _SMOOTHING * (took_s - old)

    def called(self, now: float) -> None:
        """Work has come."""
        if self._idle_since is not None:
            self._pauses.append(max(0.0, now - self._idle_since))
            self._idle_since = None

    def idle(self, now: float) -> None:
        """Nothing runs any more."""
        self._idle_since = now

    @property
    def keep_s(self) -> float:
        """How long an idle instance stays after its last use."""
        settings, start_s = self._settings, self.start_s or 0.0
        least_s = settings.costly_least_s if start_s >= settings.costly_s else settings.least_s
        even_s = min(settings.most_s, max(least_s, settings.worth * start_s))
        usual = self._usual()
        if usual is None:
            return even_s
        low_s, high_s = usual
        if high_s * _MARGIN <= even_s:
            return max(least_s, high_s * _MARGIN)
        return least_s if low_s > even_s else even_s

    @property
    def prewarm(self) -> tuple[float, float] | None:
        """From when until when an instance should stand ready ahead of the next call.

        None when that is not foreseeable, or no instance would have gone in the meantime.
        """
        usual = self._usual()
        if usual is None or self._idle_since is None or self.start_s is None:
            return None
        low_s, high_s = usual
        even_s = min(self._settings.most_s, self._settings.worth * self.start_s)
        # Long enough for an instance to go, alike enough not to have the next one wait for long.
        if low_s <= even_s or high_s * _MARGIN - low_s / _MARGIN > even_s:
            return None
        return (
            self._idle_since + low_s / _MARGIN - 2 * self.start_s,
            self._idle_since + high_s * _MARGIN,
        )

    def _usual(self) -> tuple[float, float] | None:
        """Return the shortest and longest usual pause (5th and 95th percentile)."""
        if len(self._pauses) < _LEAST_PAUSES:
            return None
        ordered = sorted(self._pauses)
        last = len(ordered) - 1
        return ordered[round(_LOW * last)], ordered[round(_HIGH * last)]


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle(Generic[_T]):
    """An idle instance that may be evicted.

    Attributes:
        instance: The instance.
        idle_s: Time since its last use.
        start_s: What a start takes; None when unknown.
        memory_bytes: What it holds; None when unknown.
    """

    instance: _T
    idle_s: float
    start_s: float | None
    memory_bytes: int | None


def eviction_order(idle: Iterable[Idle[_T]]) -> list[Idle[_T]]:
    """Order idle instances for eviction: longest idle, cheapest to start again, largest first.

    By the memory-time each has wasted per second of its start, the value of GreedyDual-Size (Cao
    and Irani, USENIX Internet Technologies 1997) with recency for its clock; used for functions in
    FaasCache (Fuerst and Sharma, ASPLOS 2021).
    """

    def wasted(one: Idle[Any]) -> float:
        size = one.memory_bytes or _USUAL_BYTES
        return float((one.idle_s + 1.0) * size / ((one.start_s or 0.0) + _LEAST_START_S))

    return sorted(idle, key=wasted, reverse=True)
