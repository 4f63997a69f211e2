"""Asking nodes how an attempt stands; the answers come as reports (`router.doubt`)."""

from typing import Any, Final

import structlog

from capability_schemas.errors import FoamError
from router.catalogue import Fleet
from router.intake import Arrival
from router.orders import OrderDesk

_SEARCHES: Final = 4_096
"""Most questions of a router about tasks of an earlier process whose journal names no node."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class InquiryDesk:
    """Asks. Owned by the router's event loop.

    Args:
        orders: Tells nodes what to do.
        fleet: Who is there.
    """

    def __init__(self, *, orders: OrderDesk, fleet: Fleet) -> None:
        self._orders = orders
        self._fleet = fleet
        self._searches = _SEARCHES

    def ask(self, arrival: Arrival, node: str, attempt: int | None) -> bool:
        """Ask a node for an attempt; tell whether the node passes for alive.

        Args:
            arrival: The task.
            node: The node.
            attempt: The attempt; None: its latest one, if it has any.
        """
        self._send(node, task=arrival.task_id, client=arrival.client, attempt=attempt)
        return self._fleet.node(node).live

    def search(self, arrival: Arrival) -> None:
        """Ask all that may have a task; none when too much has been asked already."""
        wanted = arrival.function
        able = {
            node
            for node, function in self._fleet.records
            if wanted is None or wanted.name == function
        }
        for node in sorted(able):
            if self._searches and self._fleet.node(node).live:
                self._searches -= 1
                self.ask(arrival, node, None)

    def _send(self, node: str, **fields: Any) -> None:
        try:
            self._orders.control(node, "account", **fields)
        except FoamError as error:  # it is asked again
            _log.warning("control.dropped", node=node, verb="account", error=error.message)
