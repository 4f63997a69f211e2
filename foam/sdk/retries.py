"""Asking again when a mesh has no room: when, and how often."""

import random
from typing import Final

from capability_schemas.errors import InvalidTask, Overloaded

_SPREAD: Final = 0.5
"""Jitter, as a share of the wait: clients that were turned away together come back one by one (full
jitter would have some come back before there can be room)."""

_MOST: Final = 100


class Retries:
    """The tries of one question.

    Args:
        most: Most tries after the first, 0 to 100.
        deadline: When no further try may begin, by the caller's clock, seconds.
        chance: What draws the jitter.

    Raises:
        InvalidTask: ``most`` is no such number.
    """

    def __init__(self, *, most: int, deadline: float, chance: random.Random | None = None) -> None:
        if not 0 <= most <= _MOST:
            raise InvalidTask(f"retries is {most}: a number from 0 to {_MOST} is", field="retries")
        self._left = most
        self._deadline = deadline
        self._chance = chance or random.Random()  # noqa: S311 - no secret

    def pause_s(self, error: Overloaded, now: float) -> float | None:
        """Return how long to wait before the next try, seconds; None: there is none.

        Never less than the mesh asked for (``retry_after_ms``).

        Args:
            error: How the last one ended.
            now: By the caller's clock, seconds.
        """
        pause_s = error.retry_after_ms / 1000 * (1.0 + self._chance.uniform(0.0, _SPREAD))
        if self._left <= 0 or now + pause_s >= self._deadline:
            return None
        self._left -= 1
        return pause_s
