"""Small and near nodes first, stronger ones when an answer is not sure enough. Pure.

What decides about the next step, in this order (after MAI-UI, arXiv 2512.22047; CE-CoLLM,
arXiv 2411.02829; Hera, arXiv 2605.24598):

1. privacy: private data, and a task that is ``local_only``, is asked of nobody outside the site;
2. time: the predicted finish of the step must fit into what is left;
3. budget: what was spent and the price of the step must fit into the ``max_cost`` of the task;
4. confidence: an answer that is sure enough ends it. That is judged by the node, which holds its
   answer back until it knows (ADR 17).

The next step is always a stronger one: dearer, outside the site, or a larger model than the one
that answered last. Another function is asked besides when it may as well be the one meant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from capability_schemas.errors import PolicyDenied
from capability_schemas.invocation import Cascade, Report
from capability_schemas.reply import CascadeStep
from capability_schemas.task import TaskPolicy
from router.events import Choice, Draft

_LARGER: Final = 1.2
"""So much more memory makes a larger model; two copies of one differ by what they have cached."""

_ROUNDING: Final = 1e-9
"""By so much a sum of prices may miss the limit."""


class Escalation:
    """The cascade of one task: what was answered so far, and who may be asked next.

    Args:
        accept: Least confidence of an answer, 0 to 1.
        policy: What the task demands of nodes.

    Attributes:
        steps: Answers so far, in order.
        draft: The surest of them, of equals the latest; None before the first.
        asked: ``(node, function)`` of everybody asked so far, in order.
        vetoes: Why others are not asked, by ``(node, function)``.
    """

    def __init__(self, *, accept: float, policy: TaskPolicy) -> None:
        self.steps: tuple[CascadeStep, ...] = ()
        self.draft: Draft | None = None
        self.asked: list[tuple[str, str]] = []
        self.vetoes: dict[tuple[str, str], str] = {}
        self._accept = accept
        self._policy = policy
        self._answered: dict[str, Choice] = {}  # who answered last, by function

    @property
    def spent(self) -> float:
        """Price of the answers so far."""
        return sum(step.cost for step in self.steps)

    @property
    def settled(self) -> bool:
        """Whether the draft is sure enough after all, for a node may hand back what it will."""
        return self.draft is not None and _sureness(self.draft.step) >= self._accept

    def order(self, choices: Sequence[Choice]) -> list[Choice]:
        """Return whom to ask, near and small first; empty when privacy forbids everybody.

        Args:
            choices: Candidates, best first; at least one.
        """
        policy = self._policy
        private = policy.local_only or policy.data == "private"
        near = [choice for choice in choices if not (private and choice.external)]
        why = "the data are private" if policy.data == "private" else "the task is local only"
        for choice in choices:
            if private and choice.external:
                self._veto(choice, f"privacy: {why}, and it hands them to a service outside")
        if not near:
            return []
        best = near[0]
        alike = [
            choice
            for choice in near
            if choice.function == best.function or (best.ambiguous and choice.ambiguous)
        ]
        return sorted(alike, key=_effort)

    def denied(self) -> PolicyDenied:
        """Return the error for a task that privacy leaves nobody for."""
        return PolicyDenied(
            f"the policy of the task excludes every node that could: {self._words()}"
        )

    def admissible(self, waiting: Sequence[Choice], *, now: int, ends_at: int) -> list[Choice]:
        """Return those of the waiting candidates that may be asked now, in their order.

        Before the first answer that is everybody: whoever refused or was lost is replaced.

        Args:
            waiting: Candidates in order.
            now: UTC milliseconds.
            ends_at: When the answer must be there, UTC milliseconds.
        """
        if self.draft is None:
            return list(waiting)
        kept = []
        for choice in waiting:
            veto = self._objection(choice, self._answered, self.spent, ends_at - now)
            if veto is None:
                kept.append(choice)
            else:
                self._veto(choice, veto)
        return kept

    def ask(
        self, choice: Choice, rest: Sequence[Choice], *, now: int, ends_at: int, tries_left: int
    ) -> tuple[Choice, Cascade | None]:
        """Return a choice with the reason for this step, and the terms to invoke it on.

        Args:
            choice: Who is asked.
            rest: Who may be asked after it, in order.
            now: UTC milliseconds.
            ends_at: When the answer must be there, UTC milliseconds.
            tries_left: Attempts left after this one.

        Returns:
            No terms where it is the only one: it answers as in a task without a cascade.
        """
        further = min(tries_left, self._climb(choice, rest, ends_at - now))
        key = (choice.node, choice.function)
        self.asked.append(key)
        self.vetoes.pop(key, None)
        if not self.steps and not further:
            return choice, None
        number = len(self.steps) + 1
        reason = f"step {number} of at most {number + further}: {self._why(choice)}"
        terms = Cascade(accept=self._accept if further else 0.0, steps=self.steps)
        return replace(choice, reason=reason), terms

    def answered(self, choice: Choice, report: Report) -> bool:
        """Take an answer that is not sure enough.

        Args:
            choice: Who gave it.
            report: Its report.

        Returns:
            Whether it can be an answer: false when its output is nothing that JSON has words for.
        """
        draft = Draft.of(choice, report)
        if draft is None:
            return False
        self.steps += (draft.step,)
        self._answered[choice.function] = choice
        if self.draft is None or _sureness(draft.step) >= _sureness(self.draft.step):
            self.draft = draft
        return True

    def describe(self) -> dict[str, Any]:
        """Return what was decided as JSON."""
        return {
            "accept": self._accept,
            "asked": [list(key) for key in self.asked],
            "steps": [step.model_dump(mode="json", exclude_none=True) for step in self.steps],
            "spent": round(self.spent, 6),
            "vetoed": [
                {"node": node, "function": function, "why": why}
                for (node, function), why in self.vetoes.items()
            ],
        }

    def _why(self, choice: Choice) -> str:
        if not self.steps:
            return choice.reason
        last = self.steps[-1].confidence
        told = "no confidence" if last is None else f"confidence {last:.2f}"
        spent = f"; spent {self.spent:g}" if self.spent else ""
        return f"{told} below {self._accept:.2f}{spent}"

    def _climb(self, choice: Choice, rest: Sequence[Choice], left_ms: float) -> int:
        """Count the steps that may follow a choice if no answer is sure enough."""
        answered, spent = dict(self._answered), self.spent
        step, count = choice, 0
        answered[step.function] = step
        for following in rest:
            spent_by_then = spent + step.cost
            left_by_then = left_ms - (step.finish_ms or 0.0)
            veto = self._objection(following, answered, spent_by_then, left_by_then)
            if veto is not None:
                self._veto(following, veto)
                continue
            spent, left_ms, step = spent_by_then, left_by_then, following
            answered[step.function] = step
            count += 1
        return count

    def _objection(
        self, choice: Choice, answered: Mapping[str, Choice], spent: float, left_ms: float
    ) -> str | None:
        """Return what speaks against a further step, None when nothing does."""
        last = answered.get(choice.function)
        if last is not None and not is_stronger(choice, last):
            return f"strength: it is no stronger than {last.node}, asked before it"
        finish_ms = choice.finish_ms or 0.0
        if left_ms <= 0 or finish_ms > left_ms:
            return f"time: it needs {finish_ms:.0f} ms, {max(0.0, left_ms):.0f} ms are left"
        limit = self._policy.max_cost
        if limit is not None and spent + choice.cost > limit + _ROUNDING:
            return f"budget: {spent:g} spent and {choice.cost:g} more, at most {limit:g} allowed"
        return None

    def _veto(self, choice: Choice, why: str) -> None:
        self.vetoes[choice.node, choice.function] = why

    def _words(self) -> str:
        return "; ".join(f"{node}: {why}" for (node, _), why in self.vetoes.items())


def is_stronger(choice: Choice, than: Choice) -> bool:
    """Tell whether a candidate is a step up from another one: outside, dearer, or larger."""
    if choice.external != than.external:
        return choice.external
    return choice.cost > than.cost or choice.strength > _LARGER * than.strength


def _effort(choice: Choice) -> tuple[bool, float, float, float]:
    return choice.external, choice.cost, choice.strength, choice.finish_ms or 0.0


def _sureness(step: CascadeStep) -> float:
    return step.confidence or 0.0
