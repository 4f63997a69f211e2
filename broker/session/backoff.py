"""How long to wait between two tries to connect."""

import random


def full_jitter(attempt: int, base_s: float, cap_s: float, rng: random.Random) -> float:
    """Return how long to wait before try ``attempt`` (0, 1 ...), seconds.

    Full jitter: uniform between 0 and the doubled limit (M. Brooker, "Exponential Backoff and
    Jitter", AWS Architecture Blog, 2015).
    """
    return rng.uniform(0.0, min(cap_s, base_s * 2.0 ** min(attempt, 32)))


class Backoff:
    """The waits of one connection loop. Pure but for its randomness.

    Args:
        base_s: Longest first wait, seconds; doubles with each further try.
        cap_s: Longest wait of all, seconds.
        rng: Randomness.
    """

    def __init__(self, *, base_s: float, cap_s: float, rng: random.Random) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._rng = rng
        self._tries = 0

    def reset(self) -> None:
        """A connection has lasted: begin with short waits again."""
        self._tries = 0

    def next_s(self, *, floor_s: float, grows: bool = True) -> float:
        """Return the next wait, seconds, from ``floor_s`` on.

        Args:
            floor_s: Shortest wait, seconds.
            grows: Whether this failure makes the waits longer; else it is a short one: another
                broker of the list is still to be tried.
        """
        jitter_s = full_jitter(self._tries if grows else 0, self._base_s, self._cap_s, self._rng)
        self._tries += grows
        return max(floor_s, min(floor_s + jitter_s, self._cap_s))
