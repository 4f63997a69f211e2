"""What a selection works with: the request, what was found for it, and what came of judging it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from capability_schemas.capability import CatalogRecord
from capability_schemas.task import FunctionRef, Task
from router.catalogue import NodeView
from router.finish import Finish
from router.rules import NO_RULES, RuleEffect


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the selection.

    Attributes:
        task: The task, its policy and preference as the rules left them.
        function: Function addressed by name, if any.
        deadline: UTC milliseconds.
        prefer: Node that served the session last, if any.
        effect: What the routing rules make of the task.
        tenant: Whose the client is.
        called_by: Node that was found to have room for the task, which has waited for it.
    """

    task: Task
    function: FunctionRef | None
    deadline: int
    prefer: str | None = None
    effect: RuleEffect = NO_RULES
    tenant: str | None = None
    called_by: str | None = None


class Offer(NamedTuple):
    """One capability on one node, as found; thousands of them are made for one task.

    Attributes:
        record: The admitted record.
        node: The node as it stands.
        sim: Mixed similarity, 0 to 1; 1 when addressed by name.
        dense: Cosine part of it, if searched.
        lexical: Word part of it, if searched.
        capability: Identity of the text that was found; that of nodes which offer the very same is
            equal. Empty when addressed by name.
    """

    record: CatalogRecord
    node: NodeView
    sim: float = 1.0
    dense: float | None = None
    lexical: float | None = None
    capability: str = ""

    def is_same(self, other: "Offer") -> bool:
        """Tell whether another offer is of the same function, whoever makes it."""
        return self.record.function == other.record.function or (
            self.capability == other.capability != ""
        )


@dataclass(slots=True)
class Candidate:
    """One offer judged.

    Attributes:
        offer: What was judged.
        failed: Gates it failed, with the reason each.
        skipped: Gates that were not looked at, for another had decided already.
        finish: When its node would be done, as predicted.
        terms: Terms of the score, each 0 to 1.
        weighted: What each adds to the value.
        value: Rank value.
        standing: Similarity as far as the node measures up to it (``alpha`` of the score).
        verdict: ``candidate``, or why it is none.
    """

    offer: Offer
    failed: dict[str, str]
    skipped: frozenset[str]
    finish: Finish
    terms: dict[str, float] = field(default_factory=dict)
    weighted: dict[str, float] = field(default_factory=dict)
    value: float = 0.0
    standing: float = 0.0
    verdict: str = "candidate"

    def describe(self, gates: tuple[str, ...]) -> dict[str, Any]:
        """Return it as JSON: every gate and every term.

        Args:
            gates: Names of all gates.
        """
        offer, record = self.offer, self.offer.record
        return {
            "node": record.node,
            "function": record.function,
            "version": record.version,
            "similarity": {
                "score": short(offer.sim),
                "dense": short(offer.dense),
                "lexical": short(offer.lexical),
            },
            "gates": {
                gate: "not looked at" if gate in self.skipped else self.failed.get(gate, "pass")
                for gate in gates
            },
            "terms": {name: short(value) for name, value in self.terms.items()},
            "weighted": {name: short(value) for name, value in self.weighted.items()},
            "finish_ms": short(self.finish.total_ms),
            "standing": short(self.standing),
            "value": short(self.value),
            "verdict": self.verdict,
        }


def short(value: float | None) -> float | None:
    """Round a figure for an explanation."""
    return None if value is None else round(value, 4)
