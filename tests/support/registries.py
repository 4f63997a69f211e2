"""Registries around one broker in a simulated minute: links that break, clocks that differ."""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from registry.election import DRIFT, Election, Word

LEASE_MS = 2000.0
LOOK_MS = 100.0

Kind = Literal["kill", "stop", "cut", "half_open", "leave", "broker"]


@dataclass(frozen=True)
class Fault:
    """What happens to one registry, or to the broker.

    Attributes:
        at: When, milliseconds.
        kind: `half_open`: the link is dead and its owner does not notice.
        who: Index of the registry.
        lasts: How long, milliseconds.
        told: Whether its last will is published; for the broker, whether it keeps its messages.
    """

    at: int
    kind: Kind
    who: int
    lasts: int
    told: bool


@dataclass(eq=False)
class Member:
    """A registry: process, clock and link."""

    name: str
    rate: float
    offset: float
    election: Election
    running: bool = True
    alive: bool = True
    link: int = 0
    connected: bool = False
    reachable: bool = True
    noticed: bool = True
    waiting: list[Callable[[], None]] = field(default_factory=list)
    arrives_at: float = 0.0
    leaves_at: float = 0.0

    def now(self, real: float) -> float:
        """Read its clock."""
        return self.offset + real * self.rate


class World:
    """Some registries and their broker. The real time is that of the broker, milliseconds."""

    def __init__(self, *, seed: int, registries: int, slowest_ms: float = 300.0, loss: float = 0.0):
        self.chance = random.Random(seed)
        self.real = 0.0
        self.slowest_ms = slowest_ms
        self.loss = loss
        self.kept: dict[str, Word] = {}
        self.broker_up = True
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._lost: dict[str, int] = {}
        names = [f"registry-{number}" for number in range(1, registries + 1)]
        self.members = [
            Member(
                name,
                rate=1 + DRIFT * self.chance.uniform(-0.45, 0.45),
                offset=self.chance.uniform(0, 1e6),
                election=Election(own=name, epoch=1000, lease_ms=LEASE_MS, others=names),
            )
            for name in names
        ]
        for member in self.members:
            self._connect(member)
            self._look(member)

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Have something done."""
        heapq.heappush(self._events, (when, next(self._count), act))

    def run(self, until: float, check: Callable[[], None]) -> None:
        """Let time pass, and check after each event."""
        while self._events and self._events[0][0] <= until:
            self.real, _, act = heapq.heappop(self._events)
            act()
            check()
        self.real = until

    def leaders(self) -> list[str]:
        """Return who would write now."""
        return [
            member.name
            for member in self.members
            if member.alive and member.running and member.election.leads(member.now(self.real))
        ]

    # ---- processes

    def _run(self, member: Member, act: Callable[[], None]) -> None:
        """Do something in a process; one that is stopped does it when it goes on."""
        if member.running:
            act()
        else:
            member.waiting.append(act)

    def _look(self, member: Member) -> None:
        election = member.election

        def look() -> None:
            if member.election is not election:
                return
            if election.look(member.now(self.real)):
                self._say(member)
            self.at(self.real + LOOK_MS * self.chance.uniform(0.5, 1.5), again)

        def again() -> None:
            self._run(member, look)

        again()

    def _say(self, member: Member) -> None:
        self._publish(member, member.election.speak(member.now(self.real)))

    # ---- the broker

    def _publish(self, member: Member, word: Word) -> None:
        """A client's messages reach the broker in order."""
        link = member.link
        if not (member.connected and member.reachable and self.broker_up):
            return
        member.leaves_at = max(
            member.leaves_at, self.real + self.chance.uniform(0, self.slowest_ms)
        )

        def take() -> None:
            if member.link == link and member.reachable and self.broker_up:
                self.kept[word.registry] = word
                for other in self.members:
                    self._hand(other, word)

        self.at(member.leaves_at, take)

    def _hand(self, member: Member, word: Word, *, kept: bool = False) -> None:
        if not (member.connected and member.reachable):
            return
        if self._loses(member):
            return
        link, election = member.link, member.election
        for _ in range(2 if self.chance.random() < 0.1 else 1):
            member.arrives_at = max(
                member.arrives_at, self.real + self.chance.uniform(0, self.slowest_ms)
            )

            def hear() -> None:
                current = member.link == link and member.election is election and member.alive
                if current and election.hear(word, member.now(self.real), kept=kept):
                    self._say(member)

            self.at(member.arrives_at, lambda: self._run(member, hear))

    def _loses(self, member: Member) -> bool:
        """Lose a message now and then, but not three in a row."""
        in_row = self._lost.get(member.name, 0)
        lost = in_row < 2 and self.chance.random() < self.loss
        self._lost[member.name] = in_row + 1 if lost else 0
        return lost

    def _connect(self, member: Member) -> None:
        if not (member.alive and self.broker_up) or member.connected:
            return
        member.link += 1
        member.connected, member.reachable = True, True
        member.arrives_at = member.leaves_at = self.real
        election = member.election

        def begin() -> None:
            if member.election is election:
                election.connect(member.now(self.real))

        self._run(member, begin)
        for word in self.kept.values():
            self._hand(member, word, kept=True)

    def _disconnect(self, member: Member, *, told: bool, noticed: bool = True) -> None:
        if not member.connected:
            return
        member.link += 1
        member.connected = False
        election = member.election
        if noticed:
            self._run(member, election.disconnect)
        if told and self.broker_up:
            for other in self.members:
                if other is not member and other.connected:
                    to = other.election
                    self.at(
                        self.real + self.chance.uniform(0, self.slowest_ms),
                        partial(self._run, other, partial(to.lose, member.name)),
                    )

    # ---- faults

    def apply(self, fault: Fault) -> None:
        """Have a fault happen, and end."""
        member = self.members[fault.who % len(self.members)]
        begin, end = {
            "kill": (self._kill, self._restart),
            "stop": (self._stop, self._go_on),
            "cut": (self._cut, self._mend),
            "half_open": (self._half_open, self._mend),
            "leave": (self._leave, self._restart),
            "broker": (self._broker_down, self._broker_up),
        }[fault.kind]
        self.at(fault.at, lambda: begin(member, fault))
        self.at(fault.at + fault.lasts, lambda: end(member, fault))

    def _kill(self, member: Member, fault: Fault) -> None:
        self._disconnect(member, told=fault.told, noticed=False)
        member.alive, member.running = False, True
        member.waiting.clear()

    def _leave(self, member: Member, fault: Fault) -> None:
        if member.alive and member.running:
            self._publish(member, member.election.leave(member.now(self.real)))
            member.alive = False
            link = member.link

            def part() -> None:
                if member.link == link:
                    self._disconnect(member, told=False, noticed=False)

            self.at(max(self.real, member.leaves_at) + 1, part)

    def _restart(self, member: Member, _: Fault) -> None:
        if member.alive:
            return
        self._disconnect(member, told=False, noticed=False)
        member.alive, member.running = True, True
        member.offset = self.chance.uniform(0, 1e6)
        member.election = Election(
            own=member.name,
            epoch=self.chance.randrange(500, 1500),  # its wall clock may have been set back
            lease_ms=LEASE_MS,
            others=[other.name for other in self.members],
        )
        self._connect(member)
        self._look(member)

    def _stop(self, member: Member, _: Fault) -> None:
        member.running = False

    def _go_on(self, member: Member, _: Fault) -> None:
        member.running = True
        waiting, member.waiting = member.waiting, []
        for act in waiting:
            self.at(self.real, partial(self._run, member, act))

    def _cut(self, member: Member, fault: Fault) -> None:
        self._disconnect(member, told=fault.told)

    def _half_open(self, member: Member, fault: Fault) -> None:
        if member.connected:
            member.reachable = False

    def _mend(self, member: Member, fault: Fault) -> None:
        if not member.connected or not member.reachable:
            self._disconnect(member, told=fault.told)
            self._connect(member)

    def _broker_down(self, _: Member, fault: Fault) -> None:
        self.broker_up = False
        for member in self.members:
            self._disconnect(member, told=False)
        if not fault.told:
            self.kept.clear()

    def _broker_up(self, _: Member, __: Fault) -> None:
        self.broker_up = True
        for member in self.members:
            self.at(self.real + self.chance.uniform(0, 500), partial(self._connect, member))
