"""From a task to its candidates: rules, embed, search, look at the fleet, select.

``TaskRouting`` is where the parts of a decision meet. Tasks that name their function are neither
embedded nor searched for; rules and gates hold for them all the same.
"""

import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from operator import attrgetter
from typing import Any, Final

from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import NoCapableNode
from capability_schemas.task import FunctionRef, Task, TaskPolicy
from registry.index.base import Demands
from registry.search import Match
from router.breaker import Breakers
from router.candidates import Offer, Request
from router.catalogue import Fleet, Key, NodeView
from router.events import Choice, Verdict
from router.finish import predict_finish
from router.meaning import Meaning, Query
from router.reputation import Reputation
from router.rules import NO_RULES, RuleEffect, RuleFile
from router.selection import Selection, select
from router.settings import RouterSettings, Weights
from router.whatif import Supposition

_MEANT: Final = 0.6
"""Likeness from which another name is taken for the one meant (difflib's own cutoff)."""

_SESSIONS: Final = 10_000
_UNORDERED: Final = 32
_ORDERED: Final = 256
_MISSES_LOOKED_AT: Final = 64
_KEPT_CANDIDATES: Final = 16
_AS_IT_IS: Final = Supposition()

_Pair = tuple[CatalogRecord, NodeView]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be routed.

    Attributes:
        client: Whose task it is; sessions are scoped to it.
        task: The task.
        function: Function addressed by name, if any.
        deadline: UTC milliseconds.
    """

    client: str
    task: Task
    function: FunctionRef | None
    deadline: int


class TaskRouting:
    """Finds candidates and explains them. Owned by the router's event loop.

    Args:
        meaning: Encoder and search.
        fleet: Nodes and records.
        settings: Weights and bounds to begin with.
        reputation: What nodes have done so far; nothing when None.
        breakers: Functions that do not answer; none when None.
        rules: What the operator has laid down; no rules when None.
        chance: Randomness of exploration; None: no exploration.
    """

    def __init__(
        self,
        *,
        meaning: Meaning,
        fleet: Fleet,
        settings: RouterSettings,
        reputation: Reputation | None = None,
        breakers: Breakers | None = None,
        rules: RuleFile | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self._meaning = meaning
        self._fleet = fleet
        self._settings = settings
        self._reputation = Reputation(settings.reputation) if reputation is None else reputation
        self._breakers = Breakers(settings.breaker) if breakers is None else breakers
        self._rules = rules
        self._chance = chance
        self._sessions: OrderedDict[tuple[str, str], str] = OrderedDict()
        self.weights: Weights = settings.weights

    async def embed(self, wanted: Wanted) -> Query | None:
        """Embed the words of a task; None when it names its function.

        Cancellation is safe.
        """
        if wanted.function is not None or wanted.task.text is None:
            return None
        return await self._meaning.embed(wanted.task.text)

    def select(self, wanted: Wanted, query: Query | None, now: int) -> Selection:
        """Select candidates from the fleet as it stands.

        Args:
            wanted: What is to be routed.
            query: As ``embed`` returned it.
            now: UTC milliseconds.

        Returns:
            The selection; its explanation holds the best candidates only, for it is kept with
            the task.
        """
        selection, told = self._decide(wanted, query, now, _AS_IT_IS, chance=self._chance)

        def explain() -> dict[str, Any]:
            return _cut(selection.explain() | told, _KEPT_CANDIDATES)

        return replace(selection, explain=explain)

    def explain(
        self,
        wanted: Wanted,
        query: Query | None,
        now: int,
        *,
        candidates: int,
        supposed: Supposition = _AS_IT_IS,
    ) -> dict[str, Any]:
        """Tell what would be chosen, and why; chooses nothing and remembers nothing.

        Those whom the demands of policy and rules keep from being found are told with the others.

        Args:
            wanted: What would be asked.
            query: As ``embed`` returned it.
            now: UTC milliseconds.
            candidates: Most candidates to tell of.
            supposed: What is to be supposed of the mesh.
        """
        selection, told = self._decide(wanted, query, now, supposed, everyone=True)
        return _cut(selection.explain() | told, candidates)

    def policy(self, wanted: Wanted) -> TaskPolicy:
        """Return what a task demands of nodes, by itself and by the rules."""
        return _ruled(wanted.task, self._effect(wanted)).policy

    def remember(self, wanted: Wanted, choice: Choice, now: int) -> None:
        """Note who was asked: the next task of the session prefers that node.

        Args:
            wanted: The task.
            choice: Who was asked.
            now: UTC milliseconds.
        """
        self._breakers.sent(choice.node, choice.function, now)
        if wanted.task.session is None:
            return
        key = (wanted.client, wanted.task.session)
        self._sessions[key] = choice.node
        self._sessions.move_to_end(key)
        if len(self._sessions) > _SESSIONS:
            self._sessions.popitem(last=False)

    def learn(
        self, node: str, function: str, verdict: Verdict, now: int, *, took_ms: float | None = None
    ) -> None:
        """Take the outcome of an attempt into account.

        A node that refuses or is unsure has done its work: that speaks neither for nor against it.

        Args:
            node: Who was asked.
            function: For what.
            verdict: How it went.
            now: UTC milliseconds.
            took_ms: Time from the invocation to the end.
        """
        self._breakers.learn(node, function, verdict != "lost", now)
        if verdict in {"good", "failed", "lost"}:
            record = self._fleet.records.get((node, function))
            skills = record.skills if record else ()
            self._reputation.learn(node, function, verdict == "good", now, skills=skills)

    # ---- one decision

    def _decide(
        self,
        wanted: Wanted,
        query: Query | None,
        now: int,
        supposed: Supposition,
        *,
        everyone: bool = False,
        chance: random.Random | None = None,
    ) -> tuple[Selection, dict[str, Any]]:
        effect = self._effect(wanted)
        task = _ruled(wanted.task, effect)
        session = self._sessions.get((wanted.client, task.session)) if task.session else None
        request = Request(task, wanted.function, wanted.deadline, prefer=session, effect=effect)
        search = query.search if query is not None else self._meaning.search

        weights = self.weights.changed(supposed.weights) if supposed.weights else self.weights

        def chosen_from(groups: Iterable[Iterable[Offer]]) -> Selection:
            return select(
                request,
                groups,
                calibration=search.calibration,
                weights=weights,
                nearest=self._settings.nearest,
                now=now,
                reputation=self._reputation,
                breakers=self._breakers,
                chance=chance,
            )

        if query is None:
            named = self._named(wanted.function)
            told: dict[str, Any] = {"rules": effect.describe(), "demands": []}
            if wanted.function is not None and not named:
                return self._unknown(wanted.function), told
            return chosen_from([self._offers(named, request, supposed)]), told
        demands = (*_demands(task), *effect.demands)
        matches = self._found(query, demands)
        if everyone and demands:
            known = {match.key for match in matches}
            matches += [match for match in self._found(query) if match.key not in known]
            matches.sort(key=lambda match: (-match.score, match.capability))
        selection = chosen_from(self._groups(matches, request, supposed))
        if selection.problem is not None and demands and not everyone:
            # Nobody whom the demands let through will do: the client is told who comes nearest.
            nearest = self._groups(self._found(query), request, supposed)
            selection = chosen_from(islice(group, _MISSES_LOOKED_AT) for group in nearest)
        return selection, {"demands": [sorted(demand) for demand in demands]}

    def _effect(self, wanted: Wanted) -> RuleEffect:
        return (
            NO_RULES if self._rules is None else self._rules.book.apply(wanted.client, wanted.task)
        )

    def _named(self, function: FunctionRef | None) -> list[Key]:
        if function is None:
            return []
        return [(node, function.name) for node in self._fleet.named(function.name)]

    def _found(self, query: Query, demands: Demands = ()) -> list[Match]:
        return query.search.search(
            query.text, query.vector, self._settings.candidates, demands=demands
        )

    def _groups(
        self, matches: Sequence[Match], request: Request, supposed: Supposition
    ) -> Iterator[Iterator[Offer]]:
        """Yield the offers of one capability after the other, each made when it is asked for."""
        for _, same in groupby(matches, key=attrgetter("capability")):
            found = list(same)
            yield self._offers([match.key for match in found], request, supposed, found[0])

    def _offers(
        self,
        keys: list[Key],
        request: Request,
        supposed: Supposition,
        match: Match | None = None,
    ) -> Iterator[Offer]:
        """Yield what nodes offer of one capability, the most promising first.

        Args:
            keys: Of records of the same words, so that one match holds for all of them.
            request: What is asked.
            supposed: What is to be supposed of the mesh.
            match: How it was found; None when it was named.
        """
        how = (match.score, match.dense, match.lexical, match.capability) if match else ()
        first, others = self._most_promising(keys, request)
        pairs = list(self._seen(first, supposed))
        if len(pairs) > _UNORDERED:
            pairs.sort(key=partial(_promise, request))
        for record, view in chain(pairs, self._seen(others, supposed)):
            yield Offer(record, view, *how)

    def _most_promising(
        self, keys: list[Key], request: Request
    ) -> tuple[Iterable[Key], Iterable[Key]]:
        """Return some keys that are worth putting in order, and the others.

        A selection stops after a few dozen that pass. Of thousands a few hundred are put in order,
        the cheapest where that is asked for, or others each millisecond, so that the time a task
        takes does not grow with the fleet.
        """
        if len(keys) <= _ORDERED:
            return keys, ()
        records = self._fleet.records
        if request.task.prefer == "cheapest":
            known = [key for key in keys if key in records]
            keys = sorted(known, key=lambda key: records[key].cost.money)
        else:
            start = request.deadline % len(keys)
            keys = keys[start:] + keys[:start]
            session = (request.prefer or "", keys[0][1])
            if session in keys:
                keys = [session, *(key for key in keys if key != session)]
        return keys[:_ORDERED], islice(keys, _ORDERED, None)

    def _seen(self, keys: Iterable[Key], supposed: Supposition) -> Iterator[_Pair]:
        """Yield records and their nodes as they stand, or are supposed to."""
        records = self._fleet.records
        for key in keys:
            record = records.get(key)
            if record is not None:
                view = self._fleet.node(record.node)
                yield (record, view) if supposed is _AS_IT_IS else supposed.see(record, view)

    def _unknown(self, function: FunctionRef) -> Selection:
        """Nobody has a function of that name: name those that sound like it."""
        near = self._fleet.names.nearest(function.name, max(1, self._settings.nearest))
        close = [name for name, likeness in near if likeness >= _MEANT]
        misses: list[dict[str, Any]] = [
            {
                "function": name,
                "node": min(self._fleet.named(name)),
                "score": round(likeness, 4),
                "reason": "another name",
            }
            for name, likeness in near[: self._settings.nearest]
        ]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        problem = NoCapableNode(
            f"no node offers the function {function.name}{hint}", nearest=misses
        )
        explanation: dict[str, Any] = {
            "by": "name",
            "chosen": None,
            "problem": {"code": problem.code.value, "message": problem.message},
            "candidates": [],
            "looked_at": 0,
        }
        return Selection(choices=(), problem=problem, explain=lambda: explanation)


def _promise(request: Request, pair: _Pair) -> tuple[bool, bool, float, float, str]:
    """Order first who served the session, then who is free, cheap or quick, as is preferred."""
    record, view = pair
    first = 0.0
    if request.task.prefer == "cheapest":
        first = record.cost.money
    elif request.task.prefer == "fastest":
        total_ms = predict_finish(record, view).total_ms
        first = math.inf if total_ms is None else total_ms
    shut = not (view.live and view.open) or view.full
    return record.node != request.prefer, shut, first, view.busy, record.node


def _ruled(task: Task, effect: RuleEffect) -> Task:
    """Return a task as the rules leave it: a narrower policy, a preference where it has none."""
    changes: dict[str, Any] = {}
    if effect.policy is not None:
        changes["policy"] = task.policy.narrowed(effect.policy)
    if effect.prefer is not None and task.prefer == "balanced":
        changes["prefer"] = effect.prefer
    return task.model_copy(update=changes) if changes else task


def _demands(task: Task) -> list[frozenset[str]]:
    """Return what the search can be told of the demands of a task; the gates look at all of it."""
    policy = task.policy
    demands = [frozenset({f"skill:{skill}"}) for skill in task.skills]
    demands += [frozenset({f"grant:{grant}"}) for grant in policy.grants]
    if policy.zones is not None:
        demands.append(frozenset(f"zone:{zone}" for zone in policy.zones))
    if policy.data is not None:
        demands.append(frozenset({f"data:{policy.data}"}))
    if policy.local_only:
        demands.append(frozenset({"local"}))
    return demands


def _cut(explanation: dict[str, Any], most: int) -> dict[str, Any]:
    """Keep the best candidates of an explanation; ``looked_at`` tells how many there were."""
    return {**explanation, "candidates": explanation["candidates"][:most]}
