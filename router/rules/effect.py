"""What the rules that apply to a task make of it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple

from capability_schemas.capability import CatalogRecord
from capability_schemas.task import Preference, TaskPolicy
from router.rules.model import MOST_BONUS, Target
from router.rules.patterns import Globs

_REASONS: Final = 4
_CHARACTERS: Final = 400
"""Reasons are kept with every candidate of every task; what matters stands in front."""


class Selector:
    """Some targets, any of which a capability may be.

    Args:
        targets: The targets, at least one.
    """

    __slots__ = ("_kinds", "demands", "words")

    def __init__(self, targets: Sequence[Target]) -> None:
        self._kinds = [_Kind(target) for target in targets]
        words = "; or ".join(_in_words(target) for target in targets)
        self.words = words if len(words) <= _CHARACTERS else f"{words[:_CHARACTERS]} …"
        self.demands = _demands(self._kinds)

    def admits(self, record: CatalogRecord) -> bool:
        """Tell whether a capability is one of the targets."""
        return any(kind.fits(record) for kind in self._kinds)


class _Kind:
    """One target, compiled."""

    __slots__ = ("external", "function", "model", "node", "skill", "zone")

    def __init__(self, target: Target) -> None:
        self.function = _globs(target.function)
        self.node = _globs(target.node)
        self.skill = _globs(target.skill)
        self.zone = _globs(target.zone)
        self.model = _globs(target.model)
        self.external = target.external

    def fits(self, record: CatalogRecord) -> bool:
        return (
            (self.function is None or self.function.match(record.function))
            and (self.node is None or self.node.match(record.node))
            and (self.external is None or self.external == record.policy.external)
            and (self.skill is None or self.skill.match_any(record.skills))
            and (self.zone is None or self.zone.match_any(record.policy.zones))
            and (
                self.model is None or self.model.match(record.model.name if record.model else None)
            )
        )


def _globs(patterns: Sequence[str] | None) -> Globs | None:
    return None if patterns is None else Globs(patterns)


def _in_words(target: Target) -> str:
    said = target.model_dump(exclude_none=True)
    return ", ".join(
        f"{name} {' or '.join(json.dumps(one, ensure_ascii=False) for one in value)}"
        if isinstance(value, tuple)
        else f"{name} {json.dumps(value)}"
        for name, value in said.items()
    )


def _demands(kinds: Sequence[_Kind]) -> tuple[frozenset[str], ...]:
    """Return what every capability among some targets must have, as the search knows it.

    Each set must share a member with the attributes of a record. Patterns are left out, and so
    are several targets: the demands are necessary, the targets themselves stay the judge.
    """
    if len(kinds) != 1:
        return ()
    kind = kinds[0]
    sets = [
        frozenset(f"{name}:{one}" for one in globs.literals)
        for name, globs in (("zone", kind.zone), ("skill", kind.skill))
        if globs is not None and globs.exact
    ]
    if kind.external is False:
        sets.append(frozenset({"local"}))
    return tuple(sets)


class Pick(NamedTuple):
    """An action of a rule on capabilities.

    Attributes:
        rule: Whose it is.
        selector: Which capabilities it is about.
        bonus: What they get, for ``prefer``.
    """

    rule: str
    selector: Selector
    bonus: float = 0.0


@dataclass(frozen=True, slots=True)
class RuleEffect:
    """What the rules that apply to one task demand and prefer.

    Attributes:
        matched: Names of the rules that apply, in order.
        requires: What every candidate must be.
        forbids: What no candidate may be.
        favours: What gets a bonus.
        min_confidence: Least confidence of an answer; None when no rule says.
        prefer: What decides between candidates of like meaning; None when no rule says.
        policy: Demands to be added to the policy of the task (``TaskPolicy.narrowed``); None when
            there are none.
        conflict: Why no capability at all can meet the rules, naming them; None when one may.
    """

    matched: tuple[str, ...] = ()
    requires: tuple[Pick, ...] = ()
    forbids: tuple[Pick, ...] = ()
    favours: tuple[Pick, ...] = ()
    min_confidence: float | None = None
    prefer: Preference | None = None
    policy: TaskPolicy | None = None
    conflict: str | None = None

    def refusal(self, record: CatalogRecord) -> str | None:
        """Return which rules exclude a capability, and by what; None when none does.

        Args:
            record: The admitted record.
        """
        if self.conflict is not None:
            return self.conflict
        if not self.requires and not self.forbids:
            return None
        reasons = list(islice(self._refusals(record), _REASONS + 1))
        if len(reasons) > _REASONS:
            reasons[_REASONS:] = ["further rules exclude it too"]
        return "; ".join(reasons) or None

    def _refusals(self, record: CatalogRecord) -> Iterator[str]:
        for pick in self.requires:
            if not pick.selector.admits(record):
                yield f"rule {pick.rule} requires {pick.selector.words}"
        for pick in self.forbids:
            if pick.selector.admits(record):
                yield f"rule {pick.rule} forbids {pick.selector.words}"

    def bonus(self, record: CatalogRecord) -> float:
        """Return what a capability gains, 0 to 0.1 in all.

        Args:
            record: The admitted record.
        """
        if not self.favours:
            return 0.0
        gained = sum(pick.bonus for pick in self.favours if pick.selector.admits(record))
        return min(MOST_BONUS, gained)

    @property
    def demands(self) -> tuple[frozenset[str], ...]:
        """What of ``requires`` the search can be told: each set must share a member with a record.

        Members: ``zone:X``, ``skill:X``, ``local``.
        """
        return tuple(one for pick in self.requires for one in pick.selector.demands)

    def describe(self) -> dict[str, Any]:
        """Return it as JSON; what is not demanded is left out."""
        policy = self.policy.model_dump(mode="json", exclude_defaults=True) if self.policy else {}
        described: dict[str, Any] = {
            "matched": list(self.matched),
            "require": _described(self.requires),
            "forbid": _described(self.forbids),
            "prefer": [
                {"rule": pick.rule, "target": pick.selector.words, "bonus": pick.bonus}
                for pick in self.favours
            ],
            "min_confidence": self.min_confidence,
            "route": self.prefer,
            "policy": policy,
            "conflict": self.conflict,
        }
        return {
            name: value
            for name, value in described.items()
            if name == "matched" or value not in (None, [], {})
        }


def _described(picks: Sequence[Pick]) -> list[dict[str, str]]:
    return [{"rule": pick.rule, "target": pick.selector.words} for pick in picks]


NO_RULES: Final = RuleEffect()
"""The effect of no rule."""
