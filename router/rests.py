"""Which places are left alone for a while, because they have just turned out to be of no use. Pure.

A node that refuses for want of room, and goes on refusing, is asked ever less often: each refusal
costs a round trip, a line in the journal and a number of an attempt. It is the same for a place
that seems free and that none of those who wait for it can use.
"""

from collections import OrderedDict
from typing import Final, NamedTuple

from router.waiting import Place

LEAST_REST_MS: Final = 100
MOST_REST_MS: Final = 5_000

_MOST_PLACES: Final = 10_000


class _Rest(NamedTuple):
    """A pause of a place: until when (UTC milliseconds), and how long it was."""

    until: int
    pause_ms: int


class Rests:
    """Places that are left alone, and for how long. Owned by the router's event loop.

    Args:
        most: Places that are remembered; the one that was put to rest first is forgotten for more.
    """

    def __init__(self, *, most: int = _MOST_PLACES) -> None:
        self._most = most
        self._rests: OrderedDict[Place, _Rest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rests)

    def rest(self, place: Place, now: int, *, wanted_ms: int = 0) -> int:
        """Leave a place alone: for twice as long as the last time, if that is not long ago.

        Args:
            place: It.
            now: UTC milliseconds.
            wanted_ms: For how long its node asks at the least; more than the most counts as that.

        Returns:
            For how long, milliseconds.
        """
        before = self._rests.pop(place, None)
        pause_ms = max(LEAST_REST_MS, wanted_ms)
        if before is not None and now - before.until <= MOST_REST_MS:
            # Several that were given to it at a time are refused at a time: that is one refusal.
            pause_ms = max(pause_ms, before.pause_ms * (1 + (now >= before.until)))
        pause_ms = min(MOST_REST_MS, pause_ms)
        self._rests[place] = _Rest(now + pause_ms, pause_ms)
        if len(self._rests) > self._most:
            self._rests.popitem(last=False)
        return pause_ms

    def serve(self, place: Place) -> None:
        """Take it that a place has turned out to be of use: the next pause is a short one again."""
        self._rests.pop(place, None)

    def is_resting(self, place: Place, now: int) -> bool:
        """Tell whether a place is to be left alone; a clock that was set back ends every pause.

        Args:
            place: It.
            now: UTC milliseconds.
        """
        rest = self._rests.get(place)
        return rest is not None and 0 < rest.until - now <= rest.pause_ms

    def tidy(self, now: int) -> None:
        """Forget pauses that are long over.

        Args:
            now: UTC milliseconds.
        """
        while self._rests:
            place, rest = next(iter(self._rests.items()))
            if 0 <= now - rest.until + rest.pause_ms <= 2 * MOST_REST_MS:
                return
            del self._rests[place]
