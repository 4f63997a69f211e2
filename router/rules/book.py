"""All rules of a file, ready to be applied."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Final, Self

from capability_schemas.problem import refusal
from capability_schemas.task import Preference, Task, TaskPolicy
from router.rules.conflicts import contradiction
from router.rules.effect import NO_RULES, Pick, RuleEffect, Selector
from router.rules.matching import Matcher
from router.rules.model import Rule
from router.rules.reading import Reading, read_rules

_EFFECTS: Final = 1_024
_COMPARED: Final = 12
"""Rules that demand something, compared pair by pair when they apply together: that is only for a
clearer message, and takes ten microseconds a pair."""


class RuleBook:
    """Rules in the order in which they apply. Immutable; any thread may apply it.

    Args:
        reading: The rules as they were read, without mistakes; none when omitted.
    """

    def __init__(self, reading: Reading | None = None) -> None:
        self._reading = reading or Reading()
        self._rules = self._reading.rules
        self._matcher = Matcher(self._rules, self._reading.languages)
        self._picks = [_Picks(rule) for rule in self._rules]
        self._effects: dict[tuple[int, ...], RuleEffect] = {(): NO_RULES}
        self._last: tuple[str, Task, RuleEffect] | None = None

    @classmethod
    def parse(cls, text: str, source: str = "rules.toml") -> Self:
        """Read rules from the text of a file.

        Takes half a second more when a rule asks for a language for the first time.

        Args:
            text: TOML.
            source: What the file is called in messages.

        Raises:
            ConfigurationError: Something is wrong; the message has a line for every mistake, with
                line, rule and field.
        """
        reading = read_rules(text, source)
        error = refusal(reading.problems)
        if error is not None:
            raise error
        return cls(reading)

    def __len__(self) -> int:
        return len(self._rules)

    def apply(self, client: str, task: Task) -> RuleEffect:
        """Return what the rules make of a task. Pure; microseconds, but for very long texts.

        Args:
            client: Who sent it.
            task: The task.
        """
        last = self._last  # one task is asked about several times in a row
        if last is not None and last[0] == client and last[1] is task:
            return last[2]
        places = self._matcher.matching(client, task)
        effect = self._effects.get(places)
        if effect is None:
            effect = self._combined(places)
            if len(self._effects) >= _EFFECTS:  # a client may send any words it likes
                self._effects.pop(next(iter(self._effects)), None)
            self._effects[places] = effect
        self._last = client, task, effect
        return effect

    def describe(self) -> list[dict[str, Any]]:
        """Return every rule as JSON: as it is written, with its line."""
        return [dict(table) for table in self._reading.tables]

    def _combined(self, places: Sequence[int]) -> RuleEffect:
        rules = [self._rules[place] for place in places]
        picks = [self._picks[place] for place in places]
        confidences = [one.min_confidence for one in rules if one.min_confidence is not None]
        routes: list[Preference] = [one.route for one in rules if one.route is not None]
        policy: TaskPolicy | None = None
        for rule in rules:
            if rule.policy is not None:
                policy = (policy or TaskPolicy()).narrowed(rule.policy)
        return RuleEffect(
            matched=tuple(rule.name for rule in rules),
            requires=tuple(one.require for one in picks if one.require is not None),
            forbids=tuple(one.forbid for one in picks if one.forbid is not None),
            favours=tuple(one.prefer for one in picks if one.prefer is not None),
            min_confidence=max(confidences, default=None),
            prefer=routes[-1] if routes else None,
            policy=policy,
            conflict=_conflict(rules, policy),
        )


class _Picks:
    """The actions of a rule on capabilities, compiled."""

    __slots__ = ("forbid", "prefer", "require")

    def __init__(self, rule: Rule) -> None:
        self.require = Pick(rule.name, Selector(rule.require)) if rule.require else None
        self.forbid = Pick(rule.name, Selector(rule.forbid)) if rule.forbid else None
        self.prefer = Pick(rule.name, Selector(rule.prefer), rule.bonus) if rule.prefer else None


def _conflict(rules: Sequence[Rule], policy: TaskPolicy | None) -> str | None:
    """Return why rules that apply together can never be met together, naming them."""
    demanding = [rule for rule in rules if rule.require or rule.forbid or rule.policy]
    for one, other in combinations(demanding[:_COMPARED], 2):
        clash = contradiction(one, other)
        if clash is not None:
            return (
                f"rules {one.name} and {other.name} contradict each other on this task: of what "
                f"{one.name} says under {clash[0]}, {other.name} {clash[1]}"
            )
    if policy is not None and policy.zones == ():
        names = ", ".join(rule.name for rule in rules if rule.policy and rule.policy.zones)
        return f"rules {names} contradict each other on this task: together they leave no zone"
    return None
