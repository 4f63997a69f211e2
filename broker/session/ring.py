"""Which broker of a list comes next, and what is known of the others. Pure: no I/O, no clock.

The list is tried from its first entry on. Whoever has connected stays where it is until that
connection is lost, and goes on with the next entry then, the first one after the last: nobody moves
back by itself, for a move costs every subscriber what is under way, and a broker that comes and
goes would cost it again and again. One round through the list is made without growing pauses.

A refusal (wrong password, unknown member) ends a session when every broker of the list refuses, one
after the other: one that has come back with old access rules must not end what others let in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from broker.session.settings import BrokerUrl
from broker.session.silence import Known

BrokerState = Literal["in use", "down", "refuses", "not tried"]


@dataclass(frozen=True, slots=True)
class BrokerStanding:
    """What a session knows of one broker of its list.

    Attributes:
        url: Its address, without credentials.
        state: Whether it is the one in use; else how the last try there ended.
        reason: Why it is down or refuses; empty otherwise.
    """

    url: str
    state: BrokerState
    reason: str = ""


class BrokerRing:
    """The brokers of one session, in turn.

    Args:
        urls: At least one.
    """

    def __init__(self, urls: Sequence[BrokerUrl]) -> None:
        self._urls = tuple(urls)
        self._at = -1
        self._tried = 0
        self._served: set[BrokerUrl] = set()
        self._standings = [BrokerStanding(str(url), "not tried") for url in urls]

    @property
    def standings(self) -> tuple[BrokerStanding, ...]:
        """What is known of each, in the order of the list."""
        return tuple(self._standings)

    @property
    def round_is_over(self) -> bool:
        """Whether each was tried since a connection lasted."""
        return len(self._urls) == 1 or self._tried >= len(self._urls)

    @property
    def all_refuse(self) -> bool:
        """Whether the last try at each of them ended with a refusal."""
        return all(one.state == "refuses" for one in self._standings)

    def next(self) -> BrokerUrl:
        """Return the one to try now."""
        if self.round_is_over:
            self._tried = 0
        self._at = (self._at + 1) % len(self._urls)
        self._tried += 1
        return self._urls[self._at]

    def connected(self) -> None:
        """The try succeeded."""
        self._served.add(self._urls[self._at])
        self._set("in use")

    def known_of(self, url: BrokerUrl) -> Known:
        """Return what helps to guess why a broker does not let us in."""
        return Known(served=url in self._served, clustered=len(self._urls) > 1)

    def lost(self, reason: str, *, had_lasted: bool) -> None:
        """The connection was lost.

        Args:
            reason: Why, for people; without secrets.
            had_lasted: Whether it had lasted: then a new round begins. A broker that lets in and
                throws out at once is as good as one that does not answer.
        """
        self._set("down", reason)
        if had_lasted:
            self._tried = 0

    def failed(self, reason: str, *, refused: bool = False) -> bool:
        """The try failed.

        A broker that has served us and refuses is asked once more: it may be reading its rights
        anew at that very moment (nats-server does so, now and then).

        Args:
            reason: Why, for people; without secrets.
            refused: Whether the broker answered, and does not want us.

        Returns:
            Whether a refusal is to be believed.
        """
        url = self._urls[self._at]
        believed = refused and url not in self._served
        if refused:
            self._served.discard(url)
        self._set("refuses" if believed else "down", reason)
        return believed

    def troubles(self) -> str:
        """Say what is wrong with those that are not in use; of one broker, only the reason."""
        if len(self._urls) == 1:
            return self._standings[0].reason
        return "; ".join(
            one.reason if one.reason.startswith(one.url) else f"{one.url}: {one.reason}"
            for one in self._standings
            if one.reason
        )

    def _set(self, state: BrokerState, reason: str = "") -> None:
        self._standings[self._at] = BrokerStanding(str(self._urls[self._at]), state, reason)
