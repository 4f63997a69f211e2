"""The score of a candidate: meaning first, then the bounded terms. Pure.

After Federation of Agents (arXiv 2509.20175, equation 2), with its sign and shortfall pitfalls
mended::

    alpha = gates · max(0, sim) · exp(-Σ w·shortfall) · (1 + cos(spec)) / 2
    value = alpha + bonus - λ_cost·cost - λ_energy·energy - λ_time·time - λ_load·load
          + λ_affinity·affinity + λ_reputation·(reputation - prior)

``sim`` is the mixed similarity of the search (1 when the function is named), ``cos(spec)`` is 1 as
long as tasks carry no specification vector, ``bonus`` is what the routing rules prefer. A shortfall
is what a node lacks of what is needed, never what it has too much of.
"""

import math
from collections.abc import Sequence
from typing import Final

from router.candidates import Candidate, Request
from router.catalogue import NodeView
from router.gates import Gatekeeper
from router.reputation import Reputation
from router.settings import Weights

_IMBALANCE: Final = 8
"""Tasks by which the node of a session may be ahead of the idlest one and still keep it: the rule
of AIBrix (load-aware prefix routing), beyond which load goes before affinity."""


class Scales:
    """What the terms of one selection are relative to: the most among those that can be chosen.

    Args:
        candidates: What competes.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        costs = [one.offer.record.cost for one in candidates]
        known = [
            one.finish.total_ms - one.finish.wait_ms
            for one in candidates
            if one.finish.total_ms is not None
        ]
        self.money = max((cost.money for cost in costs), default=0.0)
        self.energy = max((cost.energy_j for cost in costs), default=0.0)
        # Nothing is known of a new node: it is neither favoured nor held back for it.
        self.usual_run_ms = sum(known) / len(known) if known else 0.0
        self.slowest_ms = max((self.finish_ms(one) for one in candidates), default=0.0)
        self.fewest_tasks = min((tasks_of(one.offer.node) for one in candidates), default=0)

    def finish_ms(self, one: Candidate) -> float:
        """Return the expected finish of a candidate, after its own queue.

        Where the length of a run is unknown it is what the others need: their queues are not its.
        """
        if one.finish.total_ms is not None:
            return one.finish.total_ms
        node = one.offer.node
        turns = 1 + tasks_of(node) // node.capacity
        return one.finish.wait_ms + turns * self.usual_run_ms


def tasks_of(node: NodeView) -> int:
    """Return how many tasks a node has, by its own word or ours, whichever are more."""
    told = node.load.running + node.load.queued if node.load else 0
    return max(told, node.assigned)


class Scorer:
    """Puts figures on candidates of one request.

    Args:
        request: What is asked.
        gatekeeper: Knows the size of the request.
        weights: Those of the router, and of the task where it brings its own.
        now: UTC milliseconds.
        reputation: What nodes have done so far; None: nothing is known of any.
    """

    def __init__(
        self,
        request: Request,
        gatekeeper: Gatekeeper,
        *,
        weights: Weights,
        now: int,
        reputation: Reputation | None = None,
    ) -> None:
        self._request = request
        self._gatekeeper = gatekeeper
        self._weights = weights
        self._now = now
        self._reputation = reputation

    def stand(self, one: Candidate) -> None:
        """Put the figures on a candidate that it has of its own: those of meaning.

        Args:
            one: A candidate; its ``terms`` and ``standing`` are set.
        """
        offer = one.offer
        load = offer.node.function(offer.record.function)
        cold = float(offer.node.load is not None and load.instances == 0)
        missing = self._gatekeeper.context_missing(offer.record)
        weights = self._weights
        shortfall = (
            weights.cold * cold
            + weights.degraded * float(load.degraded)
            + weights.context * missing
        )
        gates, sim = (0.0 if one.failed else 1.0), max(0.0, offer.sim)
        fit, spec = math.exp(-shortfall), 1.0
        alpha = gates * sim * fit * (1.0 + spec) / 2.0
        one.terms = {
            "gates": gates,
            "sim": sim,
            "fit": fit,
            "spec": spec,
            "alpha": alpha,
        }
        one.standing = alpha

    def weigh(self, one: Candidate, scales: Scales) -> None:
        """Put the figures on a candidate that depend on the others.

        Args:
            one: A candidate that has its standing; ``terms``, ``weighted`` and ``value`` are set.
            scales: What they are relative to.
        """
        record, node, weights = one.offer.record, one.offer.node, self._weights
        affinity = (
            self._request.prefer == record.node
            and tasks_of(node) - scales.fewest_tasks <= _IMBALANCE
        )
        reputation, prior = 0.0, 0.0
        if self._reputation is not None:
            prior = self._reputation.prior
            reputation = self._reputation.score(
                record.node, record.function, self._now, skills=record.skills
            )
        one.terms |= {
            "bonus": self._request.effect.bonus(record),
            "cost": _relative(record.cost.money, scales.money),
            "energy": _relative(record.cost.energy_j, scales.energy),
            "time": _relative(scales.finish_ms(one), scales.slowest_ms),
            "load": node.busy,
            "affinity": float(affinity),
            "reputation": reputation,
        }
        terms = one.terms
        one.weighted = {
            "alpha": terms["alpha"],
            "bonus": terms["bonus"],
            "cost": -weights.cost * terms["cost"],
            "energy": -weights.energy * terms["energy"],
            "time": -weights.time * terms["time"],
            "load": -weights.load * terms["load"],
            "affinity": weights.affinity * terms["affinity"],
            "reputation": weights.reputation * (reputation - prior),
        }
        one.value = sum(one.weighted.values())


def _relative(figure: float, most: float) -> float:
    return min(1.0, figure / most) if most > 0 else 0.0
