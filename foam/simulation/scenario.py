"""What a simulation is made of: its size, its load and its faults, all drawn from one seed."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from foam.chaos.schedule import Fault, Kind, Load, draw_faults, draw_load
from foam.simulation.network import Quality

__all__ = ["Scenario"]

_HOUR_MS: Final = 3_600_000
_KEEPING: Final = 0.7
"""Share of brokers that keep what they hold over a restart, as those with a disk do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A simulation, complete but for the code it runs.

    Attributes:
        seed: Everything that is drawn comes from it.
        nodes: Number of nodes.
        sleepers: How many of them sleep when they have nothing to do.
        routers: Number of routers.
        devices: Number of clients.
        tasks: Number of tasks.
        seconds: Virtual time in which tasks are sent and faults happen.
        faults: What happens; None: drawn from the seed.
        fault_rate: Faults drawn for each virtual second.
        quality: How good the network is; None: drawn from the seed.
        trace: Events kept for the report of a failure.
    """

    seed: int
    nodes: int = 8
    sleepers: int = 0
    routers: int = 1
    devices: int = 4
    tasks: int = 200
    seconds: int = 60
    faults: tuple[Fault, ...] | None = None
    fault_rate: float = 0.4
    quality: Quality | None = None
    trace: int = 400

    @property
    def node_names(self) -> list[str]:
        """The nodes."""
        return [f"node-{number}" for number in range(1, self.nodes + 1)]

    @property
    def sleeper_names(self) -> list[str]:
        """The nodes that sleep."""
        return self.node_names[: self.sleepers]

    @property
    def router_names(self) -> list[str]:
        """The routers."""
        return [f"router-{number}" for number in range(1, self.routers + 1)]

    @property
    def device_names(self) -> list[str]:
        """The clients."""
        return [f"device-{number}" for number in range(1, self.devices + 1)]

    def with_faults(self, faults: Sequence[Fault]) -> Self:
        """Return the same simulation with other faults; everything else is drawn as before."""
        return dataclasses.replace(self, faults=tuple(faults))

    def drawn(self) -> Self:
        """Return the same simulation with its faults drawn, if they were not."""
        if self.faults is not None:
            return self
        count = round(self.seconds * self.fault_rate)
        span_ms = 1_000 * self.seconds
        kinds = self._kinds()
        return self.with_faults(
            draw_faults(kinds, seed=str(self.seed), span_ms=span_ms, count=count)
        )

    def load(self) -> list[Load]:
        """Return the tasks, in the order in which they are sent."""
        return draw_load(
            self.device_names, seed=str(self.seed), span_ms=1_000 * self.seconds, count=self.tasks
        )

    def network(self) -> Quality:
        """Return how good the network is."""
        if self.quality is not None:
            return self.quality
        chance = random.Random(f"{self.seed}/quality")  # noqa: S311  # a simulation
        kept = chance.random() < _KEEPING
        return Quality(
            delay_s=chance.choice([0.001, 0.004, 0.02]),
            loss=chance.choice([0.0, 0.01, 0.1]),
            lost_wills=chance.choice([0.0, 0.05, 0.5]),
            keeps_retained=kept,
            keeps_sessions=kept,
        )

    def _kinds(self) -> Mapping[str, Kind]:
        nodes, routers = self.node_names, self.router_names
        anybody = [*nodes, *routers, *self.device_names]
        clocks = (-_HOUR_MS, -5_000, 5_000, _HOUR_MS)
        return {
            "kill_node": Kind(weight=4, targets=nodes),
            "leave_node": Kind(weight=1, targets=nodes),
            "pause_node": Kind(weight=2, targets=nodes),
            "kill_router": Kind(weight=2, targets=routers),
            "pause_router": Kind(weight=1, targets=routers),
            "fill_disk": Kind(weight=1, targets=routers),
            "restart_broker": Kind(weight=1, targets=[""]),
            "cut": Kind(weight=5, targets=anybody),
            "stall": Kind(weight=3, targets=anybody),
            "slow": Kind(weight=2, targets=anybody, amounts=(10.0, 50.0, 200.0)),
            "set_clock": Kind(weight=1, targets=[*nodes, *routers], amounts=clocks),
        }
