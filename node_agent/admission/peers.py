"""What neighbour nodes say about their load, to name one to a router who is turned away. Pure."""

from collections.abc import Iterable
from typing import Final

from capability_schemas.node import FunctionLoad, NodeLoad

_FRESH_MS: Final = 20_000
"""Age up to which a load message is believed, milliseconds: some intervals."""


class PeerBook:
    """The latest load of each neighbour.

    Args:
        peers: Whose word counts.
    """

    def __init__(self, peers: Iterable[str]) -> None:
        self._peers = frozenset(peers)
        self._loads: dict[str, tuple[int, NodeLoad]] = {}

    @property
    def peers(self) -> list[str]:
        """Whose word counts."""
        return sorted(self._peers)

    def heard(self, load: NodeLoad, *, now: int) -> None:
        """Take in a load message; one of anybody else is ignored.

        Args:
            load: What it says.
            now: UTC milliseconds.
        """
        if load.node in self._peers:
            self._loads[load.node] = (now, load)

    def best(self, function: str, *, now: int) -> str | None:
        """Return the neighbour with the function and the shortest predicted wait; None: nobody.

        One whose queue is full, or whose instances keep crashing, does not count.

        Args:
            function: The function.
            now: UTC milliseconds.
        """
        waits = [
            (_wait_ms(load.functions[function]), node)
            for node, (at, load) in self._loads.items()
            if now - at <= _FRESH_MS
            and function in load.functions
            and not load.functions[function].degraded
            and (load.queued < load.queue_limit or _has_place(load.functions[function]))
        ]
        return min(waits)[1] if waits else None


def _has_place(load: FunctionLoad) -> bool:
    return load.running + load.queued < load.concurrency


def _wait_ms(load: FunctionLoad) -> float:
    ahead = max(0, load.running + load.queued - load.concurrency + 1)
    return ahead / load.concurrency * (load.total_ms or 1.0)
