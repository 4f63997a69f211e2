"""A whole mesh in one loop under virtual time: real routers and nodes, simulated network and clock.

What a test with real processes sees once in a thousand runs happens here in every tenth, and
happens again with the same seed. Real are the router service with its ledger and the node agent
with everything in it; simulated are the broker and its links (`network`), the functions
(`runtime`), the encoder (`words`), devices and the registry's part (`members`), processes and time
(`loop`).

::

    run = simulate(Scenario(seed=7, nodes=20))
    assert not run.failed, run.trace

``foam chaos --simulated`` runs many seeds; ``python -m foam.simulation --seed 7 --shrink`` runs one
and cuts the faults of a failure down to those it takes.
"""

from foam.simulation.scenario import Scenario
from foam.simulation.seeds import run_seeds
from foam.simulation.world import Run, simulate

__all__ = ["Run", "Scenario", "run_seeds", "simulate"]
