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

    def next_s(self, *, floor_s: float) -> float:
        """Return the next wait, seconds, from ``floor_s`` on."""
        jitter_s = full_jitter(self._tries, self._base_s, self._cap_s, self._rng)
        self._tries += 1
        return max(floor_s, min(floor_s + jitter_s, self._cap_s))
