"""Whether rules fit a task: each signal a check, the cheap ones first, each fact found out once."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, Final, NamedTuple

from capability_schemas.task import Task
from router.rules.language import LanguageGuess
from router.rules.model import (
    LOOKED_AT,
    Condition,
    InputSignal,
    KeywordSignal,
    LengthSignal,
    Rule,
    Signals,
    Span,
)
from router.rules.patterns import Globs, any_of, compile_expression
from router.rules.words import WordIndex, needle_of

Token = tuple[str, str | int]
"""Something a task has that a rule may hinge on: a keyword, its client, a function, a skill."""


class Means(NamedTuple):
    """What looks into texts, for all rules at once.

    Attributes:
        words: Finds keywords.
        languages: Names the language; None when no rule asks.
        any_expression: Tells whether one of all expressions may be found.
    """

    words: WordIndex
    languages: LanguageGuess | None
    any_expression: Callable[[str], bool]


class Facts:
    """What rules may ask about one task; worked out when first asked.

    Args:
        client: Who sent it.
        task: The task.
        means: Finds things in its text.
    """

    def __init__(self, client: str, task: Task, means: "Means") -> None:
        self.client = client
        self.task = task
        self._means = means

    @cached_property
    def text(self) -> str:
        """The text, as far as it is looked at; empty when there is none."""
        return (self.task.text or "")[:LOOKED_AT]

    @cached_property
    def function(self) -> str | None:
        """Name of the function that is asked for, without the range of versions."""
        return self.task.function.partition("@")[0] if self.task.function else None

    @cached_property
    def keywords(self) -> set[int]:
        """Numbers of the keywords in the text."""
        return self._means.words.found(self.text) if self.text else set()

    @cached_property
    def language(self) -> str | None:
        """Language of the text, when that can be told."""
        languages = self._means.languages
        return languages.of(self.text) if languages and self.text else None

    @cached_property
    def holds_expression(self) -> bool:
        """Whether one of all expressions may be found in the text."""
        return bool(self.text) and self._means.any_expression(self.text)

    @cached_property
    def characters(self) -> int:
        """Characters of the text."""
        return len(self.task.text or "")

    @cached_property
    def words(self) -> int:
        """Words of the text, as separated by spaces."""
        return len((self.task.text or "").split())

    @cached_property
    def bytes(self) -> int:
        """Bytes of the text and of the input as JSON."""
        data = "" if self.task.input is None else json.dumps(self.task.input, ensure_ascii=False)
        return sum(len(one.encode(errors="surrogatepass")) for one in (self.task.text or "", data))

    def tokens(self) -> Iterable[Token]:
        """Return all that rules may hinge on."""
        yield "client", self.client
        if self.function is not None:
            yield "function", self.function
        for skill in self.task.skills:
            yield "skill", skill
        for number in self.keywords:
            yield "keyword", number


Check = Callable[[Facts], bool]


class Matcher:
    """Finds the rules that fit a task.

    A rule that hinges on something exact (a keyword, one client) is looked at only when the task
    has it, so that a thousand such rules cost no more than a few.

    Args:
        rules: The rules in order.
        spoken: Languages of the site.
    """

    def __init__(self, rules: Sequence[Rule], spoken: Sequence[str] = ()) -> None:
        signals = [one for rule in rules for when in rule.when or () for one in when.signals()]
        self._numbers: dict[str, int] = {}
        for one in signals:
            for word in one.keywords.words() if one.keywords else ():
                self._numbers.setdefault(needle_of(word), len(self._numbers))
        asks = any(one.language for one in signals)
        self._means = Means(
            words=WordIndex(self._numbers),
            languages=LanguageGuess(spoken) if asks else None,
            any_expression=any_of({one for some in signals for one in some.regex or ()}),
        )
        self._fits = [self._rule(rule) for rule in rules]
        self._stops = [rule.stop for rule in rules]
        self._always: list[int] = []
        self._hinged: dict[Token, list[int]] = {}
        for place, rule in enumerate(rules):
            hinges = self._hinges(rule)
            for token in hinges or ():
                self._hinged.setdefault(token, []).append(place)
            if hinges is None:
                self._always.append(place)

    def matching(self, client: str, task: Task) -> tuple[int, ...]:
        """Return the places of the rules that apply, in order, the one that stops included.

        Args:
            client: Who sent the task.
            task: The task.
        """
        facts = Facts(client, task, self._means)
        places = set(self._always)
        if self._hinged:
            for token in facts.tokens():
                places.update(self._hinged.get(token, ()))
        found = []
        for place in sorted(places):
            if self._fits[place](facts):
                found.append(place)
                if self._stops[place]:
                    break
        return tuple(found)

    def _rule(self, rule: Rule) -> Check:
        conditions = [self._condition(when) for when in rule.when or ()]
        if len(conditions) == 1:
            return conditions[0]
        if not conditions:
            return lambda _: True
        return lambda facts: any(fits(facts) for fits in conditions)

    def _condition(self, condition: Condition) -> Check:
        asked = _all_of(self._checks(condition))
        barred = [_all_of(self._checks(one)) for one in condition.excluded or ()]
        if not barred:
            return asked
        return lambda facts: asked(facts) and not any(fits(facts) for fits in barred)

    def _checks(self, signals: Signals) -> list[Check]:
        """Return the checks of some signals, those that cost most last."""
        return [
            build(self, getattr(signals, name))
            for name, build in _BUILDERS.items()
            if name in signals.model_fields_set
        ]

    def _numbers_of(self, words: Iterable[str] | None) -> frozenset[int]:
        return frozenset(self._numbers[needle_of(word)] for word in words or ())

    def keyword_check(self, signal: KeywordSignal) -> Check:
        """Return the check for keywords.

        Args:
            signal: The keywords.
        """
        some = self._numbers_of(signal.any)
        every, barred = self._numbers_of(signal.all), self._numbers_of(signal.none)

        def fits(facts: Facts) -> bool:
            there = facts.keywords
            return (
                (not some or not there.isdisjoint(some))
                and every <= there
                and barred.isdisjoint(there)
            )

        return fits

    def _hinges(self, rule: Rule) -> set[Token] | None:
        """Return what a rule hinges on: without one of these it does not apply; None: nothing."""
        hinges: set[Token] = set()
        for condition in rule.when or ():
            found = self._hinge(condition)
            if not found:
                return None
            hinges |= found
        return hinges or None

    def _hinge(self, signals: Signals) -> set[Token]:
        for name in ("client", "function", "skill"):
            names = Globs(getattr(signals, name) or ())
            if names.literals and names.exact:
                return {(name, one) for one in names.literals}
        words = signals.keywords
        asked = self._numbers_of((words.any or (words.all or ())[:1]) if words else ())
        return {("keyword", number) for number in asked}


def _all_of(checks: Sequence[Check]) -> Check:
    if len(checks) == 1:
        return checks[0]

    def fits(facts: Facts) -> bool:
        for check in checks:  # noqa: SIM110  # all() takes twice as long
            if not check(facts):
                return False
        return True

    return fits


def _client_check(_: Matcher, patterns: Sequence[str]) -> Check:
    names = Globs(patterns)
    return lambda facts: names.match(facts.client)


def _function_check(_: Matcher, patterns: Sequence[str]) -> Check:
    names = Globs(patterns)
    return lambda facts: names.match(facts.function)


def _skill_check(_: Matcher, patterns: Sequence[str]) -> Check:
    names = Globs(patterns)
    return lambda facts: names.match_any(facts.task.skills)


def _data_check(_: Matcher, classes: Sequence[str]) -> Check:
    return lambda facts: facts.task.policy.data in classes


def _priority_check(_: Matcher, span: Span) -> Check:
    return lambda facts: span.holds(facts.task.priority)


def _regex_check(_: Matcher, expressions: Sequence[str]) -> Check:
    searches = [compile_expression(one) for one in expressions]
    return lambda facts: facts.holds_expression and any(search(facts.text) for search in searches)


def _language_check(_: Matcher, codes: Sequence[str]) -> Check:
    return lambda facts: facts.language in codes


def _length_check(_: Matcher, signal: LengthSignal) -> Check:
    return _all_of(
        [_span_check(name, getattr(signal, name)) for name in sorted(signal.model_fields_set)]
    )


def _span_check(name: str, span: Span) -> Check:
    count = attrgetter(name)
    return lambda facts: span.holds(count(facts))


def _input_check(_: Matcher, signal: InputSignal) -> Check:
    equal = signal.equals or {}
    lowest, highest = signal.at_least or {}, signal.at_most or {}

    def fits(facts: Facts) -> bool:
        value = facts.task.input
        return (
            all(_at(value, path) is not None for path in signal.has or ())
            and all(_is_one_of(_at(value, path), wanted) for path, wanted in equal.items())
            and all(_reaches(_at(value, path), low) for path, low in lowest.items())
            and all(_reaches(_at(value, path), high, -1) for path, high in highest.items())
        )

    return fits


def _at(value: Any, path: str) -> Any:
    """Return a field of nested objects; None where there is none."""
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _is_one_of(value: Any, wanted: Iterable[Any]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in wanted)


def _reaches(value: Any, bound: float, sign: int = 1) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and sign * value >= sign * bound


_BUILDERS: Final[Mapping[str, Callable[[Matcher, Any], Check]]] = {
    "client": _client_check,
    "function": _function_check,
    "skill": _skill_check,
    "data": _data_check,
    "priority": _priority_check,
    "input": _input_check,
    "keywords": Matcher.keyword_check,
    "length": _length_check,
    "regex": _regex_check,
    "language": _language_check,
}
"""Makes the check of each signal; in the order in which they are done, the dear ones last."""
