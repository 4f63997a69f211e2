"""Rules that cannot be meant: contradictions, and rules that never come to anything."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from router.rules.model import Rule, Target
from router.rules.patterns import covers, disjoint, is_literal

_MOST: Final = 50
"""Contradictions named at most: further ones are much the same."""

_PATTERNS: Final = ("client", "function", "skill")

_SINGLE: Final = ("function", "node", "model")
"""Fields of a target of which a capability has one value."""


class Conflict(NamedTuple):
    """Something wrong between rules, or within one.

    Attributes:
        place: Which rule it is told of.
        field: Field of that rule.
        message: What is wrong.
    """

    place: int
    field: str
    message: str


def contradiction(one: Rule, other: Rule) -> tuple[str, str] | None:
    """Return why no capability can meet two rules that apply together; None when one may.

    Args:
        one: A rule.
        other: Another, or the same.

    Returns:
        The field of ``one``, and what it clashes with, as it follows "rule so-and-so".
    """
    return (
        _required_and_forbidden(one, other)
        or _required_apart(one, other)
        or _policies_apart(one, other)
    )


def _required_and_forbidden(one: Rule, other: Rule) -> tuple[str, str] | None:
    for field, barred, verb in (
        ("require", (one.require, other.forbid), "forbids"),
        ("forbid", (other.require, one.forbid), "requires"),
    ):
        wanted, forbidden = barred
        if wanted and forbidden and _all_within(wanted, forbidden):
            return field, f"{verb} all of this"
    return None


def _all_within(wanted: Sequence[Target], forbidden: Sequence[Target]) -> bool:
    return all(any(_within(target, barred) for barred in forbidden) for target in wanted)


def _within(target: Target, other: Target) -> bool:
    """Tell whether every capability that is the one target certainly is the other."""
    for name in other.model_fields_set:
        mine, its = getattr(target, name), getattr(other, name)
        if mine is None:
            return False
        if mine != its and (
            name == "external" or not all(covers(its, pattern) for pattern in mine)
        ):
            return False
    return True


def _required_apart(one: Rule, other: Rule) -> tuple[str, str] | None:
    if not one.require or not other.require:
        return None
    if all(_apart(mine, its) for mine in one.require for its in other.require):
        return "require", "requires something else: nothing is both"
    return None


def _apart(one: Target, other: Target) -> bool:
    """Tell whether certainly no capability is both."""
    if None not in (one.external, other.external) and one.external != other.external:
        return True
    for name in _SINGLE:
        mine, its = getattr(one, name), getattr(other, name)
        if mine and its and all(disjoint(a, b) for a in mine for b in its):
            return True
    return False


def _policies_apart(one: Rule, other: Rule) -> tuple[str, str] | None:
    if one.policy and other.policy:
        zones, others = one.policy.zones, other.policy.zones
        if zones is not None and others is not None and not set(zones) & set(others):
            return "policy.zones", "allows only other zones"
    for field, local, leaving, verb in (
        ("policy.local_only", one, other, "requires what leaves the site"),
        ("require", other, one, "keeps tasks on the site"),
    ):
        if (
            local.policy
            and local.policy.local_only
            and leaving.require
            and all(target.external for target in leaving.require)
        ):
            return field, verb
    return None


def find_conflicts(
    rules: Sequence[Rule], told: Callable[[int], str] = lambda place: f"rule {place + 1}"
) -> list[Conflict]:
    """Find rules that can never apply, never count, or never be met.

    Only what is certain is named: rules whose conditions merely may hold together are left to the
    moment when they do.

    Args:
        rules: Valid rules in order.
        told: How a message names another rule, by its place.

    Returns:
        The first few, in order.
    """
    found = []
    for conflict in _conflicts(rules, told):
        found.append(conflict)
        if len(found) == _MOST:
            break
    return found


def _conflicts(rules: Sequence[Rule], told: Callable[[int], str]) -> Iterator[Conflict]:
    earlier = _Earlier()
    for place, rule in enumerate(rules):
        within = contradiction(rule, rule)
        if within is not None:
            yield Conflict(place, within[0], f"can never be met: the same rule {within[1]}")
            continue
        for other in earlier.comparable(rule):
            conflict = _between(rules[other], rule, partial(told, other))
            if conflict is not None:
                yield Conflict(place, *conflict)
                break
        if rule.stop or rule.route or rule.require or rule.forbid or rule.policy:
            earlier.add(place, rule)


class _Earlier:
    """Rules by what they ask for, so that each is compared with few others.

    One condition can only hold whenever another one does if both ask for some same thing, or one
    of them asks for nothing but patterns, or for nothing at all.
    """

    def __init__(self) -> None:
        self._all: list[int] = []
        self._loose: list[int] = []
        self._asking: dict[tuple[str, object], list[int]] = {}

    def add(self, place: int, rule: Rule) -> None:
        asked = _asked(rule)
        self._all.append(place)
        if asked is None:
            self._loose.append(place)
        for thing in asked or ():
            self._asking.setdefault(thing, []).append(place)

    def comparable(self, rule: Rule) -> Sequence[int]:
        asked = _asked(rule)
        if asked is None:
            return self._all
        found = (place for thing in asked for place in self._asking.get(thing, ()))
        return sorted({*self._loose, *found})


def _asked(rule: Rule) -> set[tuple[str, object]] | None:
    """Return the things that the conditions of a rule ask for; None when one asks for nothing."""
    asked: set[tuple[str, object]] = set()
    for condition in rule.when or ():
        things: set[tuple[str, object]] = set()
        for name in condition.model_fields_set:
            value = getattr(condition, name)
            if not isinstance(value, tuple):
                things.add((name, repr(value)))
            elif name != "excluded" and (name not in _PATTERNS or all(map(is_literal, value))):
                things.update((name, one) for one in value)
        if not things:
            return None
        asked |= things
    return asked or None


def _between(before: Rule, rule: Rule, told: Callable[[], str]) -> tuple[str, str] | None:
    """Return what is wrong between two rules; the dearer question, of conditions, comes last."""
    if before.stop:
        never = rule.implies(before)
        return ("when", f"is never reached: {told()} stops before it") if never else None
    clash = contradiction(rule, before)
    if clash is not None and (rule.implies(before) or before.implies(rule)):
        return clash[0], f"can never be met: {told()}, which applies together with it, {clash[1]}"
    overridden = before.route and rule.route and before.route != rule.route
    if overridden and before.implies(rule):
        return "route", f"leaves {told()} without effect, which says {before.route} for the same"
    return None
