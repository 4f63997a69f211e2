"""FOAM, Federation Of Agents over MQTT. What people touch: SDK, command line and wiring.

A mesh turns a handful of machines into one place that answers tasks. A device publishes a task over
plain MQTT, the mesh finds by meaning, load, cost and policy the node whose model or function can do
it, and that node streams the answer back.

Ask a mesh (``foam up`` started one in another terminal)::

    from foam import MeshClient

    async with MeshClient() as mesh:
        async for text in (await mesh.submit(text="pump 7 vibrates at 14 mm/s, what now?")).text():
            print(text, end="")

Teach a mesh something: put this into ``distance.py`` and run ``foam node distance.py``::

    from foam import function

    @function(examples=["how far apart are 3 and 10?"])
    def distance(a: float, b: float) -> float:
        '''Distance between two numbers.'''
        return abs(a - b)

Where things are: `foam.sdk` (client), `foam.cli` (commands), `foam.settings` (environment and
defaults), `foam.mesh` (the data folder), `foam.wiring` (the one place that joins concrete classes
into processes), `foam.up` and `foam.supervisor` (a whole mesh on one machine), `foam.demo` (the
plant).

Importing this package loads nothing else: the names below load on first use, so that a node with
one small function does not carry the client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from capability_schemas.errors import FoamError
    from foam.sdk.client import MeshClient, TaskHandle
    from node_agent.functions import InvocationContext, function

__all__ = ["FoamError", "InvocationContext", "MeshClient", "TaskHandle", "function"]

_HOMES: Final = {
    "FoamError": "capability_schemas.errors",
    "InvocationContext": "node_agent.functions",
    "MeshClient": "foam.sdk.client",
    "TaskHandle": "foam.sdk.client",
    "function": "node_agent.functions",
}


def __getattr__(name: str) -> Any:
    """Load one of the public names on first use (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'foam' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
