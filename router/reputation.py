"""What nodes have done with the work they were given: Beta posteriors that fade. Pure.

After the beta reputation system (Josang and Ismail, 15th Bled Electronic Commerce Conference 2002)
with exponential forgetting: ``good`` and ``bad`` outcomes halve with every half-life, and
``(prior_good + good) / (prior_good + prior_bad + good + bad)`` is the chance that the next one is
good. What a node has done with other functions of the same skills stands in for what it has not
done with this one yet: the skills of the node set the mean of the prior, not its weight.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Final, NamedTuple

from capability_schemas.errors import ConfigurationError
from router.settings import ReputationSettings

_SKILLS: Final = 16
"""Skills of a function that are counted; a record may name more."""

_MOST: Final = 2**53
"""Largest number of a snapshot."""

_FORGOTTEN: Final = 1e-3
"""Outcomes left below which an entry says nothing any more."""


class Belief(NamedTuple):
    """A Beta distribution of the chance of a good outcome."""

    good: float
    bad: float

    @property
    def mean(self) -> float:
        """Expected chance, 0 to 1."""
        return self.good / (self.good + self.bad)


@dataclass(frozen=True, slots=True)
class _Tally:
    good: float
    bad: float
    at: int

    def faded(self, now: int, half_life_ms: float) -> tuple[float, float]:
        """Return good and bad outcomes as they count now."""
        left: float = 0.5 ** (max(0, now - self.at) / half_life_ms)
        return self.good * left, self.bad * left


_Key = tuple[str, str]
_Book = OrderedDict[_Key, _Tally]


class Reputation:
    """Outcomes by node and function, and by node and skill; owned by the router's event loop.

    Args:
        settings: Prior, half-life and bounds.
    """

    def __init__(self, settings: ReputationSettings | None = None) -> None:
        self._settings = settings or ReputationSettings()
        self._half_life_ms = self._settings.half_life_s * 1000
        self._functions: _Book = OrderedDict()
        self._skills: _Book = OrderedDict()

    def __len__(self) -> int:
        return len(self._functions)

    @property
    def prior(self) -> float:
        """How far a node is trusted that nothing is known of, 0 to 1."""
        return self._prior.mean

    @property
    def _prior(self) -> Belief:
        return Belief(self._settings.prior_good, self._settings.prior_bad)

    def learn(
        self, node: str, function: str, good: bool, now: int, *, skills: Iterable[str] = ()
    ) -> None:
        """Take in how a run went.

        Args:
            node: The node.
            function: Its function.
            good: Whether a result came of it.
            now: UTC milliseconds.
            skills: Skills the function offers.
        """
        self._count(self._functions, (node, function), good, now)
        for skill in list(skills)[:_SKILLS]:
            self._count(self._skills, (node, skill), good, now)

    def score(self, node: str, function: str, now: int, *, skills: Iterable[str] = ()) -> float:
        """Return the chance that a run goes well, 0 to 1; ``prior`` where nothing is known.

        Args:
            node: The node.
            function: Its function.
            now: UTC milliseconds.
            skills: Skills the function offers.
        """
        return self.belief(node, function, now, skills=skills).mean

    def draw(
        self, node: str, function: str, now: int, chance: Random, *, skills: Iterable[str] = ()
    ) -> float:
        """Draw how good a node may be (Thompson, Biometrika 1933): 0 to 1, wide where unknown.

        Args:
            node: The node.
            function: Its function.
            now: UTC milliseconds.
            chance: What draws.
            skills: Skills the function offers.
        """
        return chance.betavariate(*self.belief(node, function, now, skills=skills))

    def belief(self, node: str, function: str, now: int, *, skills: Iterable[str] = ()) -> Belief:
        """Return the posterior of a function on a node; arguments as for ``score``."""
        prior = self._prior
        pooled = [
            self._skills[key].faded(now, self._half_life_ms)
            for skill in list(skills)[:_SKILLS]
            if (key := (node, skill)) in self._skills
        ]
        if pooled:
            # Of several skills the one with the most outcomes tells most.
            good, bad = max(pooled, key=sum)
            weight = prior.good + prior.bad
            mean = (prior.good + good) / (weight + good + bad)
            prior = Belief(weight * mean, weight * (1.0 - mean))
        own = self._functions.get((node, function))
        good, bad = own.faded(now, self._half_life_ms) if own else (0.0, 0.0)
        return Belief(prior.good + good, prior.bad + bad)

    def snapshot(self, now: int | None = None) -> dict[str, Any]:
        """Return everything as JSON, the longest unheard of first.

        Args:
            now: UTC milliseconds, to leave out what has faded; None keeps it.
        """
        return self.snapshotting(now)()

    def snapshotting(self, now: int | None = None) -> Callable[[], dict[str, Any]]:
        """Return what makes the snapshot of this moment, in any thread: large books take a while.

        Args:
            now: As for ``snapshot``.
        """
        # Tallies are replaced, never changed.
        functions, skills = list(self._functions.items()), list(self._skills.items())
        return lambda: {
            "version": 1,
            "functions": self._rows(functions, now),
            "skills": self._rows(skills, now),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take up a snapshot in place of what is known; all of it or nothing.

        Args:
            snapshot: As ``snapshot`` returned it.

        Raises:
            ConfigurationError: It is none; the message names the first entry that is wrong.
        """
        if snapshot.get("version") != 1:
            raise ConfigurationError(
                f"reputation snapshot of version {snapshot.get('version')!r}, not 1: remove it"
            )
        functions = self._read(snapshot.get("functions"), "functions")
        skills = self._read(snapshot.get("skills"), "skills")
        self._functions, self._skills = functions, skills

    def _count(self, book: _Book, key: _Key, good: bool, now: int) -> None:
        tally = book.get(key)
        old = tally.faded(now, self._half_life_ms) if tally else (0.0, 0.0)
        at = max(now, tally.at) if tally else now  # a clock set back must not revive the past
        book[key] = _Tally(old[0] + good, old[1] + (not good), at)
        book.move_to_end(key)
        if len(book) > self._settings.limit:
            book.popitem(last=False)

    def _rows(self, book: Iterable[tuple[_Key, _Tally]], now: int | None) -> list[list[Any]]:
        return [
            [*key, round(tally.good, 4), round(tally.bad, 4), tally.at]
            for key, tally in book
            if sum(tally.faded(tally.at if now is None else now, self._half_life_ms)) > _FORGOTTEN
        ]

    def _read(self, rows: Any, what: str) -> _Book:
        if not isinstance(rows, list):
            raise ConfigurationError(f"reputation snapshot: {what} is no array")
        book: _Book = OrderedDict()
        for place, row in enumerate(rows):
            match row:
                case [str() as node, str() as name, good, bad, int() as at] if (
                    _is_count(good) and _is_count(bad) and _is_count(at)
                ):
                    book[node, name] = _Tally(float(good), float(bad), at)
                case _:
                    raise ConfigurationError(
                        f"reputation snapshot: {what}[{place}] is not [node, name, good, bad, at]"
                        " with finite numbers from 0"
                    )
        while len(book) > self._settings.limit:
            book.popitem(last=False)
        return book


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= _MOST
