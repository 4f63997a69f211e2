"""What keeps a task from going on, as its client sees it: no broker, or no router."""

import asyncio
from collections.abc import Callable
from typing import Final

from broker.presence import RouterPresence
from broker.session.mqtt import MqttSession

__all__ = ["OutageWatch"]

_ROUTER_QUIET_S: Final = 3.0
"""Silence after which it matters to a task that no router lives, seconds: a node that runs it goes
on without one."""


class OutageWatch:
    """Says that something is gone, and that it is back. Owned by the client's event loop.

    Whoever waits for something asks it from time to time; nothing is said while answers flow.

    Args:
        session: The client's connection.
        presence: Tells which routers live.
        told: Called with one sentence at each change.
    """

    def __init__(
        self, *, session: MqttSession, presence: RouterPresence, told: Callable[[str], None]
    ) -> None:
        self._session = session
        self._presence = presence
        self._told = told
        self._used = ""
        self._what = ""  # broker, router, or nothing
        self._since = 0.0

    def look(self, quiet_s: float) -> None:
        """Tell what has changed.

        Args:
            quiet_s: For how long nothing has been heard of the task, seconds.
        """
        if self._session.connected:
            self._used = next(
                (one.url for one in self._session.brokers if one.state == "in use"), self._used
            )
        what = self._missing(quiet_s)
        if what == self._what:
            return
        if what:
            self._since = asyncio.get_running_loop().time()
            self._told(f"{self._gone(what)}; trying again")
        elif self._what == "broker":
            self._told(f"connected to {self._used} again")
        else:
            self._told(f"{self._presence.present()} lives again")
        self._what = what

    def reason(self) -> str | None:
        """Return what is missing now and for how long, in words; None: nothing."""
        what = self._missing(_ROUTER_QUIET_S)
        if not what:
            return None
        tried = [one.reason for one in self._session.brokers if one.reason and what == "broker"]
        said = f" (the last try: {tried[-1]})" if tried else ""
        if what != self._what:
            return f"{self._gone(what)}{said}"
        gone_s = asyncio.get_running_loop().time() - self._since
        return f"{self._gone(what)}, for {gone_s:.0f} s now{said}"

    def _missing(self, quiet_s: float) -> str:
        if not self._session.connected:
            return "broker"
        if self._presence.bereft and (quiet_s >= _ROUTER_QUIET_S or self._what == "router"):
            return "router"
        return ""

    def _gone(self, what: str) -> str:
        if what == "router":
            return f"no router lives: {self._presence.told()}"
        every = ", ".join(one.url for one in self._session.brokers)
        others = len(self._session.brokers) > 1 and self._what != "broker"
        return f"the broker {(self._used if others else '') or every} is gone"
