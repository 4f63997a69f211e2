"""Circuit breakers: a function on a node that does not answer is left alone for a while. Pure.

After Nygard, Release It! (2nd edition 2018, section 5.2)::

    closed ── losses in a row ──▶ open ── pause over ──▶ half open: one probe at a time
       ▲                           ▲                              │
       └──── it answered ──────────┼──────────────────────────────┤
                                   └── lost again, pause doubled ─┘

Only what is lost counts: silence, or a node gone with the task. An execution that failed was
answered, and may have been the input's fault: if it counted, one client with bad input would close
a function to all others. Failures count in the reputation, and as ``degraded`` where instances
crash.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from router.settings import BreakerSettings


@dataclass(slots=True)
class _Breaker:
    lost: int = 0
    pause_ms: int = 0
    open_until: int = 0
    probe_until: int = 0

    @property
    def open(self) -> bool:
        """Whether it has opened, and nothing has been answered since."""
        return self.pause_ms > 0

    def pause_left_ms(self, now: int) -> int:
        """Time until the next try; a clock that was set back does not make it longer."""
        left_ms = self.open_until - now
        return left_ms if 0 < left_ms <= self.pause_ms else 0


class Breakers:
    """One breaker per function on a node; owned by the router's event loop.

    Args:
        settings: When they open, and for how long.
    """

    def __init__(self, settings: BreakerSettings | None = None) -> None:
        self._settings = settings or BreakerSettings()
        self._breakers: OrderedDict[tuple[str, str], _Breaker] = OrderedDict()

    def __len__(self) -> int:
        return len(self._breakers)

    def learn(self, node: str, function: str, ok: bool, now: int) -> bool:
        """Take in how an invocation went; tell whether the breaker has opened by that.

        Args:
            node: The node.
            function: Its function.
            ok: Whether it answered, be it with a refusal or a failure; false when it was lost.
            now: UTC milliseconds.
        """
        key = node, function
        if ok:
            self._breakers.pop(key, None)
            return False
        breaker = self._breakers.setdefault(key, _Breaker())
        self._breakers.move_to_end(key)
        if len(self._breakers) > self._settings.limit:
            self._breakers.popitem(last=False)
        breaker.lost += 1
        # What was sent before it opened, and is lost too, tells nothing new.
        if breaker.pause_left_ms(now) or breaker.lost < self._settings.losses:
            return False
        longest, was_open = self._settings.longest_pause_ms, breaker.open
        pause_ms = 2 * breaker.pause_ms if was_open else self._settings.pause_ms
        breaker.pause_ms = min(longest, pause_ms)
        breaker.open_until = now + breaker.pause_ms
        breaker.probe_until = 0
        return not was_open

    def sent(self, node: str, function: str, now: int) -> None:
        """Note that an invocation was sent; while half open it is the probe.

        Args:
            node: The node.
            function: Its function.
            now: UTC milliseconds.
        """
        breaker = self._breakers.get((node, function))
        if breaker is not None and breaker.open and not breaker.pause_left_ms(now):
            breaker.probe_until = now + self._settings.probe_ms

    def blocked(self, node: str, function: str, now: int) -> str | None:
        """Return why nothing is to be sent there now; None when it may be.

        Args:
            node: The node.
            function: Its function.
            now: UTC milliseconds.
        """
        breaker = self._breakers.get((node, function))
        if breaker is None or not breaker.open:
            return None
        left_ms = breaker.pause_left_ms(now)
        if left_ms:
            return f"{breaker.lost} invocations in a row were lost, next try in {left_ms} ms"
        if 0 < breaker.probe_until - now <= self._settings.probe_ms:
            return f"{breaker.lost} invocations in a row were lost, one is being tried"
        return None

    def describe(self, now: int) -> list[dict[str, Any]]:
        """Return those that are not closed, as JSON.

        Args:
            now: UTC milliseconds.
        """
        return [
            {
                "node": node,
                "function": function,
                "lost": breaker.lost,
                "pause_ms": breaker.pause_ms,
                "open_for_ms": breaker.pause_left_ms(now),
            }
            for (node, function), breaker in self._breakers.items()
            if breaker.open
        ]
