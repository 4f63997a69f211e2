"""Whose turn it is: the candidates of one task, who was asked, and what came of it. Pure."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from capability_schemas.errors import FoamError
from capability_schemas.invocation import Cascade
from capability_schemas.reply import CascadeStep
from router.cascade import Escalation, is_stronger
from router.events import Choice, Chosen, Draft
from router.ownership import first_attempt, generation_of
from router.shown import Origin

_KEPT_NUMBERS: Final = 10


@dataclass(slots=True)
class Turn:
    """One attempt.

    Attributes:
        node: Who has it.
        attempt: Its number.
        choice: Why that node; None for an attempt of an earlier process.
        since: When it was asked, UTC milliseconds.
        hold: Whether its answer comes to the router and not to the client.
        draft: That answer, once it is there.
        over: Whether the node has said that it will say no more.
    """

    node: str
    attempt: int
    choice: Choice | None = None
    since: int = 0
    hold: bool = False
    draft: Draft | None = None
    over: bool = False

    def is_of(self, node: str, attempt: int | None) -> bool:
        """Tell whether a node's word on an attempt is about this one."""
        return node == self.node and attempt in (None, self.attempt)


class Turns:
    """The attempts of one task.

    Args:
        most: Most attempts of this process.

    Attributes:
        current: Who holds the task, or will; None while nobody does.
        rival: Who was asked beside it (a hedge).
        attempt: Highest number given to an attempt.
        floor: Least number of the next one.
        tried: Attempts of this process.
        problems: What became of them, in order.
        waiting: Candidates not yet asked, best first.
        cascade: The task's cascade; None where whatever comes is the answer.
    """

    def __init__(self, *, most: int) -> None:
        self._most = most
        self.current: Turn | None = None
        self.rival: Turn | None = None
        self.attempt = 0
        self.floor = 1
        self.tried = 0
        self.problems: list[FoamError] = []
        self.waiting: deque[Choice] = deque()
        self.cascade: Escalation | None = None

    @property
    def left(self) -> int:
        """Attempts that may still be made."""
        return max(0, min(self._most - self.tried, self.numbers))

    @property
    def numbers(self) -> int:
        """Numbers that may still be given to attempts: never those of the next generation.

        They belong to whichever router takes the task over (`router.ownership`). Some are kept for
        the announcement of an end, and for what a killed router did not write down.
        """
        following = first_attempt(generation_of(max(self.attempt, self.floor)) + 1)
        return max(0, following - _KEPT_NUMBERS - self._next_number)

    @property
    def draft(self) -> Draft | None:
        """The surest answer of the cascade so far."""
        return self.cascade.draft if self.cascade is not None else None

    @property
    def steps(self) -> tuple[CascadeStep, ...]:
        """The answers of the cascade so far."""
        return self.cascade.steps if self.cascade is not None else ()

    @property
    def last_terms(self) -> Cascade | None:
        """Terms for whoever goes on with the answer of the last step; None without earlier ones."""
        return Cascade(accept=0.0, steps=self.steps) if self.steps else None

    def resume(self, node: str | None, attempt: int) -> None:
        """Take up what an earlier process knew.

        Args:
            node: Who holds the task; None: nobody does.
            attempt: Last attempt.
        """
        self.attempt = attempt
        self.current = None if node is None else Turn(node, attempt)

    def offer(self, chosen: Chosen) -> FoamError | None:
        """Take candidates; return why none of them may be asked."""
        self.waiting = deque(chosen.choices)
        if self.cascade is None and chosen.min_confidence is not None and chosen.choices:
            self.cascade = Escalation(accept=chosen.min_confidence, policy=chosen.policy)
        if self.cascade is None:
            return None
        self.waiting = deque(self.cascade.order(chosen.choices))
        return None if self.waiting else self.cascade.denied()

    def next(self, now: int, ends_at: int) -> tuple[Choice, Cascade | None] | None:
        """Return who is asked next and the terms of that; None when nobody is left.

        Args:
            now: UTC milliseconds.
            ends_at: When the nodes' time is over, UTC milliseconds.
        """
        if self.cascade is not None:
            self.waiting = deque(self.cascade.admissible(self.waiting, now=now, ends_at=ends_at))
        if not self.waiting or not self.left:
            return None
        choice = self.waiting.popleft()
        if self.cascade is None:
            return choice, None
        return self.cascade.ask(
            choice, self.waiting, now=now, ends_at=ends_at, tries_left=self.left - 1
        )

    def give(self, choice: Choice, now: int) -> Turn:
        """Give the task to a node: one more attempt."""
        self.current = self._new(choice, now)
        return self.current

    def hedge(self, choice: Choice, now: int) -> Turn:
        """Ask a second node, whose answer is held back."""
        self.waiting.remove(choice)
        self.rival = self._new(choice, now)
        self.rival.hold = True
        return self.rival

    def promote(self) -> Turn | None:
        """Give the task to the second node, if one was asked."""
        rival, self.rival = self.rival, None
        if rival is not None:
            self.current = rival
        return rival

    def second(self) -> Choice | None:
        """Return the best candidate that may run the task at the same time as the first."""
        first = self.current.choice if self.current is not None else None
        if first is None or not first.idempotent or not self.left:
            return None
        for choice in self.waiting:
            alike = (choice.function, choice.version) == (first.function, first.version)
            if alike and choice.idempotent and choice.node != first.node:
                return choice
        return None

    def successor(self, origin: Origin | None, choices: Iterable[Choice]) -> Choice | None:
        """Return who goes on with an answer; the others that could wait behind."""
        fit = origin.successors(choices) if origin is not None and self.left else []
        self.waiting = deque(fit[1:])
        return fit[0] if fit else None

    def prefer(self, peer: str | None) -> None:
        """Try a node next that another has named, if it was chosen as a candidate itself.

        In a cascade that must not skip a step.
        """
        named = [choice for choice in self.waiting if choice.node == peer]
        first = self.current.choice if self.current is not None else None
        if self.cascade is not None and first is not None:
            named = [choice for choice in named if not is_stronger(choice, first)]
        others = [choice for choice in self.waiting if choice not in named]
        self.waiting = deque(named + others)

    def drop(self, node: str) -> None:
        """Ask a node no more."""
        self.waiting = deque(choice for choice in self.waiting if choice.node != node)

    def why_nobody(self, origin: Origin | None, known: Sequence[Choice]) -> str:
        """Say why nobody goes on with an answer."""
        if not self.left:
            return f"{self.tried} nodes were tried"
        return origin.why_not(known) if origin is not None else "nobody knows what began it"

    @property
    def _next_number(self) -> int:
        return max(self.attempt + 1, self.floor)

    def _new(self, choice: Choice, now: int) -> Turn:
        self.tried += 1
        self.attempt = self._next_number
        return Turn(choice.node, self.attempt, choice, now)
