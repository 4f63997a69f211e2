"""The way of one client to its broker, be that one server or several: a proxy in front of each."""

from collections.abc import Sequence
from typing import Self

from broker.lifecycle import Service
from broker.session.settings import BrokerUrl
from foam.chaos.proxy import TcpProxy
from foam.chaos.twist import Twist

__all__ = ["Link"]


class Link(Service):
    """A link that can be hurt as a whole; an ``async with``.

    Args:
        servers: Where the servers of the broker are; the first one is tried first.
        twist: What may happen to the messages for the client.
    """

    def __init__(self, *, servers: Sequence[BrokerUrl], twist: Twist) -> None:
        super().__init__(service_id=",".join(map(str, servers)))
        self._twist = twist
        self._proxies = [
            TcpProxy(host=server.host, port=server.port, twist=twist) for server in servers
        ]

    @classmethod
    def of(cls, url: str, *, twist: Twist, turn: int = 0) -> Self:
        """Make a link to the servers of a URL.

        Args:
            url: The broker; several servers separated by commas.
            twist: As for the class.
            turn: How many servers to begin later in the list, so that not all are at the first.
        """
        servers = BrokerUrl.parse_all(url)
        first = turn % len(servers)
        return cls(servers=servers[first:] + servers[:first], twist=twist)

    @property
    def url(self) -> str:
        """Where the client finds its broker."""
        return ",".join(proxy.url for proxy in self._proxies)

    def cut(self) -> None:
        """Reset every connection."""
        for proxy in self._proxies:
            proxy.cut()

    def refuse(self, refused: bool) -> None:
        """Let no connection through, or let them through again."""
        for proxy in self._proxies:
            proxy.refuse() if refused else proxy.accept()

    def stall(self, stalled: bool) -> None:
        """Hold back all bytes, or let them go."""
        for proxy in self._proxies:
            proxy.stall() if stalled else proxy.flow()

    def slow(self, delay_s: float) -> None:
        """Delay all bytes, seconds each way; 0 heals it."""
        for proxy in self._proxies:
            proxy.delay_s = delay_s

    def twist(self, twisted: bool) -> None:
        """Deliver twice, late and out of order (`foam.chaos.twist`), or as it comes."""
        self._twist.active = twisted

    async def _on_start(self) -> None:
        for proxy in self._proxies:
            await proxy.start()

    async def _on_stopped(self) -> None:
        for proxy in self._proxies:
            await proxy.stop()
