"""Offers, loads and selections for tests of the router's decision."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import FoamError
from capability_schemas.node import FunctionLoad, NodeLoad
from capability_schemas.task import FunctionRef, Task
from registry.calibration import Calibration
from router.candidates import Offer, Request
from router.catalogue import NodeView
from router.gates import glance
from router.rules import NO_RULES, RuleEffect
from router.selection import Selection, select
from router.settings import Weights

CALIBRATION = Calibration(threshold=0.5, window=0.05)
"""Everything above half a similarity is an answer."""


@dataclass(frozen=True, slots=True)
class FixedEffect(RuleEffect):
    """Rules that refuse and favour nodes by name."""

    refusals: Mapping[str, str] = field(default_factory=dict)
    bonuses: Mapping[str, float] = field(default_factory=dict)

    def refusal(self, record: CatalogRecord) -> str | None:
        return self.refusals.get(record.node)

    def bonus(self, record: CatalogRecord) -> float:
        return self.bonuses.get(record.node, 0.0)


def offer(
    node: str = "a",
    sim: float = 0.8,
    view: dict[str, Any] | None = None,
    capability: str = "",
    **fields: Any,
) -> Offer:
    """An offer of ``echo`` by a node that is there and idle; ``view`` says what else it is."""
    values: dict[str, Any] = {
        "node": node,
        "function": "echo",
        "version": "1.2.0",
        "epoch": 1,
        "revision": 1,
        "description": "Repeat the text.",
        "registry": "registry-1",
        "admitted_at": 0,
        "claim_digest": "sha256:0",
    }
    state: dict[str, Any] = {"presence": "birth", "epoch": 1} | (view or {})
    record = CatalogRecord(**(values | fields))
    return Offer(record, NodeView(node=node, **state), sim, sim, 0.0, capability)


def load(functions: dict[str, FunctionLoad] | None = None, **fields: Any) -> dict[str, Any]:
    """The part of a view that is the node's last load message."""
    return {"load": NodeLoad(node="a", epoch=1, at=0, functions=functions or {}, **fields)}


def busy(**figures: Any) -> dict[str, Any]:
    """A view of a node whose ``echo`` has one live instance and these figures."""
    return load({"echo": FunctionLoad(**({"instances": 1} | figures))})


def by_function(offers: Iterable[Offer]) -> list[list[Offer]]:
    """Group offers as the router's search does, the most similar function first."""
    groups: dict[str, list[Offer]] = {}
    for one in offers:
        groups.setdefault(one.record.function, []).append(one)
    return sorted(groups.values(), key=lambda group: -max(one.sim for one in group))


def chosen(*offers: Offer, **options: Any) -> Selection:
    """Select among offers; options: those of a request, and those of ``select``."""
    task = Task(**({"text": "say it"} | options.pop("task", {})))
    named = options.pop("function", None)
    request = Request(
        task,
        FunctionRef.parse(named) if named else None,
        deadline=options.pop("deadline", 60_000),
        prefer=options.pop("prefer", None),
        effect=options.pop("effect", NO_RULES),
    )
    defaults: dict[str, Any] = {
        "calibration": CALIBRATION,
        "weights": Weights(),
        "nearest": 3,
        "now": 0,
    }
    look = glance(request, now=(defaults | options)["now"])
    groups = [
        sorted(group, key=lambda one: look(one.record, one.node).value)
        for group in by_function(offers)
    ]
    return select(request, groups, **(defaults | options))


def problem(*offers: Offer, **options: Any) -> FoamError:
    """Select among offers of which none may be chosen, and return why."""
    selection = chosen(*offers, **options)
    assert selection.choices == ()
    assert selection.problem is not None
    return selection.problem


def nodes(selection: Selection) -> list[str]:
    """Nodes of the choices, best first."""
    return [choice.node for choice in selection.choices]
