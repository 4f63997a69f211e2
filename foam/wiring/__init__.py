"""The only place that joins concrete classes into processes.

`run_broker`, `run_registry`, `run_router` and `run_node` are each the whole life of one process:
settings in, sessions and services entered in order, ready reported, everything left in reverse
order on SIGTERM, SIGINT or the death of the parent. Nothing here decides anything about tasks.

Imports stand inside the functions on purpose: a node process must not load what only a router needs
(numpy and the encoder), and the broker process none of either.
"""

from foam.wiring.broker import ENGINES, engine_available, run_broker
from foam.wiring.node import check_node, run_node
from foam.wiring.registry import run_registry
from foam.wiring.services import run_router

__all__ = [
    "ENGINES",
    "check_node",
    "engine_available",
    "run_broker",
    "run_node",
    "run_registry",
    "run_router",
]
