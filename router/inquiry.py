"""Asking nodes how an attempt stands; the answers come as reports (`router.doubt`)."""

import asyncio
from typing import Any, Final

import structlog

from capability_schemas.errors import FoamError
from capability_schemas.invocation import ACCOUNTS_AT_ONCE
from router.catalogue import Fleet, Key
from router.intake import Arrival
from router.live import LiveTask
from router.orders import OrderDesk
from router.routing import TaskRouting

_SEARCHES: Final = 65_536
"""Most questions of a router about tasks of an earlier process whose journal names no node: at a
restart that are all that wait, at each node that may have them. Many go in one order."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class InquiryDesk:
    """Asks. Owned by the router's event loop.

    Args:
        orders: Tells nodes what to do.
        fleet: Who is there.
        routing: Knows who may have a task.
    """

    def __init__(self, *, orders: OrderDesk, fleet: Fleet, routing: TaskRouting) -> None:
        self._orders = orders
        self._fleet = fleet
        self._routing = routing
        self._searches = _SEARCHES
        self._wanted: dict[str, list[Key]] = {}

    def ask(self, arrival: Arrival, node: str, attempt: int | None) -> bool:
        """Ask a node for an attempt; tell whether the node passes for alive.

        Args:
            arrival: The task.
            node: The node.
            attempt: The attempt; None: its latest one, if it has any.
        """
        self._send(node, task=arrival.task_id, client=arrival.client, attempt=attempt)
        return self._fleet.node(node).live

    def search(self, live: LiveTask, now: int) -> None:
        """Ask all that may have a task; none when too much has been asked already.

        Args:
            live: The task. Those that policy keeps it from are not even told of it.
            now: UTC milliseconds.
        """
        function, fleet = live.arrival.function, self._fleet
        nodes = fleet.nodes if function is None else fleet.named(function.name)
        there = (node for node in sorted(nodes) if fleet.node(node).live)
        for node in self._routing.holders(live.wanted, there, now) if self._searches else ():
            if not self._wanted:  # those of other tasks that are due now go with it
                asyncio.get_running_loop().call_soon(self._ask_many)
            self._wanted.setdefault(node, []).append(live.arrival.key)
            self._searches -= 1
            if not self._searches:
                return

    def _ask_many(self) -> None:
        wanted, self._wanted = self._wanted, {}
        for node, keys in wanted.items():
            for first in range(0, len(keys), ACCOUNTS_AT_ONCE):
                self._send(node, tasks=tuple(keys[first : first + ACCOUNTS_AT_ONCE]))

    def _send(self, node: str, **fields: Any) -> None:
        try:
            self._orders.control(node, "account", **fields)
        except FoamError as error:  # it is asked again
            _log.warning("control.dropped", node=node, verb="account", error=error.message)
