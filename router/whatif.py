"""What if: the mesh as it would be with nodes gone, loaded or dearer; nothing real changes."""

from collections import Counter
from dataclasses import replace
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field

from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import NotFound
from capability_schemas.ids import Identifier
from capability_schemas.node import NodeLoad
from router.catalogue import Fleet, NodeView

_FINE: Final = 1_000
"""Places of a node whose load is supposed, so that any share of them is a whole number."""

_Share = Annotated[float, Field(ge=0, le=1)]
_Money = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Supposition(BaseModel):
    """What is supposed, of a mesh that is otherwise as it is.

    Attributes:
        gone: Nodes that are not there.
        load: Share of its places that is taken, 0 to 1, by node.
        cost: Price of a call, by node or ``node/function``; the latter goes before.
        weights: Weights of the score in place of those that hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gone: Annotated[tuple[Identifier, ...], Field(max_length=1_000)] = ()
    load: Annotated[dict[Identifier, _Share], Field(max_length=1_000)] = {}
    cost: Annotated[dict[str, _Money], Field(max_length=1_000)] = {}
    weights: dict[str, float] = {}

    def check(self, fleet: Fleet) -> Self:
        """Return itself, when everything it speaks of is known.

        Raises:
            NotFound: A node or function is not, which is a misspelling more often than not.
        """
        for node in (*self.gone, *self.load):
            if node not in fleet.nodes:
                raise NotFound(f"node {node} is not known here", node=node)
        for name in self.cost:
            node, _, function = name.partition("/")
            known = (node, function) in fleet.records if function else node in fleet.nodes
            if not known:
                raise NotFound(
                    f"{name} is not known here: name a node, or node/function", node=node
                )
        return self

    def see(self, record: CatalogRecord, view: NodeView) -> tuple[CatalogRecord, NodeView]:
        """Return a record and its node as they would be."""
        money = self.cost.get(f"{record.node}/{record.function}", self.cost.get(record.node))
        if money is not None:
            cost = record.cost.model_copy(update={"money": money})
            record = record.model_copy(update={"cost": cost})
        if record.node in self.gone:
            view = replace(view, presence="offline", reason="supposed to be gone")
        elif record.node in self.load:
            loaded = _loaded(view, self.load[record.node])
            view = replace(view, assigned=0, given=Counter(), load=loaded)
        return record, view


def _loaded(view: NodeView, share: float) -> NodeLoad:
    """Return the load of a node of whose places a share is taken, and of whose queue nothing."""
    told = view.load or NodeLoad(node=view.node, epoch=max(0, view.epoch), at=0)
    return told.model_copy(
        update={
            "capacity": _FINE,
            "running": round(share * _FINE),
            "queued": 0,
            "queue_limit": max(1, told.queue_limit),
        }
    )
