"""From a task to its candidates: rules, embed, search, look at the fleet, select.

``TaskRouting`` is where the parts of a decision meet. Tasks that name their function are neither
embedded nor searched for; rules and gates hold for them all the same.
"""

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from operator import attrgetter
from typing import Any, Final

from capability_schemas.capability import EVERY_TENANT, CatalogRecord
from capability_schemas.errors import FoamError, NoCapableNode, PolicyDenied
from capability_schemas.task import FunctionRef, Task, TaskPolicy
from registry.index.base import Demands
from registry.search import Match
from router.breaker import Breakers
from router.candidates import Offer, Request
from router.catalogue import Fleet, Key, NodeView
from router.events import Choice, Verdict
from router.finish import predict_finish
from router.gates import Gatekeeper, Glance, Outlook, glance
from router.meaning import Meaning, Query
from router.reputation import Reputation
from router.rules import NO_RULES, RuleEffect, RuleFile
from router.selection import Selection, select
from router.settings import RouterSettings, Weights
from router.waiting import Place
from router.whatif import Supposition

_MEANT: Final = 0.6
"""Likeness from which another name is taken for the one meant (difflib's own cutoff)."""

_SESSIONS: Final = 10_000
_UNORDERED: Final = 32
_ORDERED: Final = 256
_SORTED_OUT: Final = 512
"""Offers kept that fail a glance in one way; more than are looked at to say why."""

_WIDER: Final = 4
"""So many times as many capabilities are looked at when of the first nobody will do."""

_SOUNDING: Final = 16
_DEMANDS: Final = 32
"""Demands of one kind that the search is told of; the gates look at all, be they thousands."""

_HIDDEN: Final = 8
"""Offers looked at of a capability that the demands keep from being found: they all miss."""

_KEPT_CANDIDATES: Final = 16
_MOST_PLACES: Final = 4_096
"""Nodes that one task waits for; those that wait for the same share them."""

_AS_IT_IS: Final = Supposition()
_OUTLOOKS: Final = tuple(Outlook)
_HOPELESS: Final = frozenset({Outlook.AWAY, Outlook.NEVER})

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
        tenant_of: Returns whose a client is; None: of no tenant.
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
        tenant_of: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        self._meaning = meaning
        self._fleet = fleet
        self._settings = settings
        self._reputation = Reputation(settings.reputation) if reputation is None else reputation
        self._breakers = Breakers(settings.breaker) if breakers is None else breakers
        self._rules = rules
        self._chance = chance
        self._tenant_of = tenant_of
        self._sessions: OrderedDict[tuple[str, str], str] = OrderedDict()
        self.weights: Weights = settings.weights

    async def embed(self, wanted: Wanted) -> Query | None:
        """Embed the words of a task; None when it names its function.

        Cancellation is safe.
        """
        if wanted.function is not None or wanted.task.text is None:
            return None
        return await self._meaning.embed(wanted.task.text)

    def select(
        self, wanted: Wanted, query: Query | None, now: int, *, called_by: str | None = None
    ) -> Selection:
        """Select candidates from the fleet as it stands.

        Args:
            wanted: What is to be routed.
            query: As ``embed`` returned it.
            now: UTC milliseconds.
            called_by: Node that was found to have room for it, to be looked at in any case.

        Returns:
            The selection; its explanation holds the best candidates only, for it is kept with
            the task.
        """
        selection, told = self._decide(
            wanted, query, now, _AS_IT_IS, chance=self._chance, called_by=called_by
        )

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

        Some of those whom the demands keep from being found are told with the others.

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

    def objection(self, wanted: Wanted, choice: Choice, now: int) -> FoamError | None:
        """Return why somebody chosen a while ago may not be asked any more; None when that may be.

        Registry, operator and owner may have changed their minds since. Policy is looked at again,
        and nothing else: a node that is full by now says so itself.

        Args:
            wanted: The task.
            choice: Who was chosen.
            now: UTC milliseconds.
        """
        record = self._fleet.records.get((choice.node, choice.function))
        if record is None or record.version != choice.version:
            return NoCapableNode(
                f"node {choice.node} no longer offers {choice.function} {choice.version}",
                retryable=True,
            )
        request = self._request(wanted)
        failed = [*Gatekeeper(request, now=now).failed_policy(record).values()]
        if record.policy.external and not choice.external:
            failed.append("hands the task to a service outside the site by now")
        if record.cost.money > choice.cost:
            failed.append(f"costs {record.cost.money:g} by now, {choice.cost:g} was counted on")
        return PolicyDenied(f"node {choice.node}: {'; '.join(failed)}") if failed else None

    def may_hold(self, wanted: Wanted, node: str, now: int) -> bool:
        """Tell whether a node that was not seen to get a task may have been given it."""
        return any(self.holders(wanted, (node,), now))

    def holders(self, wanted: Wanted, nodes: Iterable[str], now: int) -> Iterator[str]:
        """Yield the nodes that may have been given a task, so far as policy goes.

        Args:
            wanted: The task.
            nodes: Who is looked at, be it away, full or draining.
            now: UTC milliseconds.
        """
        request, named, fleet = self._request(wanted), wanted.function, self._fleet
        look, gatekeeper = glance(request, now=now), Gatekeeper(request, now=now)

        def may_run(key: Key, view: NodeView) -> bool:
            record = fleet.records.get(key)
            return (
                record is not None
                and look(record, view) is not Outlook.NEVER
                and not gatekeeper.failed_policy(record)
            )

        for node in nodes:
            view = fleet.nodes.get(node)
            if view is None or view.revoked:
                continue
            functions = fleet.functions(node) if named is None else (named.name,)
            if any(may_run((node, function), view) for function in functions):
                yield node

    def everywhere(self, wanted: Wanted, places: Iterable[Place], now: int) -> frozenset[Place]:
        """Return all places that a task may wait for when it has to wait for some.

        A selection looks at so many nodes of a function and leaves the others. A task waits for all
        of them: else they would stand idle, and newcomers would get them first.

        Args:
            wanted: The task.
            places: Those that were found, with their functions.
            now: UTC milliseconds.
        """
        found, request = set(places), self._request(wanted)
        look, records = glance(request, now=now), self._fleet.records
        for function in sorted({function for _, function in found}):
            for node in self._fleet.serving(request.tenant, function):
                if len(found) >= _MOST_PLACES:
                    break
                place, view = (node, function), self._fleet.nodes.get(node)
                if view is not None and look(records[place], view) not in _HOPELESS:
                    found.add(place)
        return frozenset(found)

    def may_have(self, wanted: Wanted, place: Place | None, node: str, now: int) -> bool:
        """Tell whether a task that one node has may go to another one of the same function.

        Args:
            wanted: The task.
            place: Who has it, and of which function; None: nobody.
            node: The other one.
            now: UTC milliseconds.
        """
        held = None if place is None else self._fleet.records.get(place)
        record = None if held is None else self._fleet.records.get((node, held.function))
        if held is None or record is None or record.version != held.version:
            return False
        choice = Choice(
            node,
            record.function,
            record.version,
            0.0,
            cost=max(held.cost.money, 0.0),
            external=held.policy.external,
        )
        return self.objection(wanted, choice, now) is None

    def is_current(self, query: Query | None) -> bool:
        """Tell whether a query is of the space that serves; one that is none always is."""
        return query is None or query.search is self._meaning.search

    def remember(self, wanted: Wanted, choice: Choice, now: int) -> None:
        """Note who was asked: the next task of the session prefers that node.

        Args:
            wanted: The task.
            choice: Who was asked.
            now: UTC milliseconds.
        """
        self._breakers.sent(choice.node, choice.function, now)
        if wanted.task.session is not None:
            self.keep_session(wanted.client, wanted.task.session, choice.node)

    def keep_session(self, client: str, session: str, node: str) -> None:
        """Note who has a session, for this router or another one: its prompt cache is there."""
        key = (client, session)
        self._sessions[key] = node
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
        if self._breakers.learn(node, function, verdict != "lost", now):
            # Its broker may have told nobody yet: it is waited for as if it had.
            self._fleet.node(node).lost_at = now
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
        called_by: str | None = None,
    ) -> tuple[Selection, dict[str, Any]]:
        effect = self._effect(wanted)
        task = _ruled(wanted.task, effect)
        session = self._sessions.get((wanted.client, task.session)) if task.session else None
        tenant = self._tenant_of(wanted.client)
        request = Request(
            task,
            wanted.function,
            wanted.deadline,
            prefer=session,
            effect=effect,
            tenant=tenant,
            called_by=called_by,
        )
        look = glance(request, now=now)
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
            named = self._named(wanted.function, tenant)
            told: dict[str, Any] = {"rules": effect.describe(), "demands": []}
            if wanted.function is not None and not named:
                return self._unknown(wanted.function, tenant), told
            return chosen_from([self._offers(named, request, supposed, look)]), told
        skills = [frozenset({f"skill:{skill}"}) for skill in task.skills[:_DEMANDS]]
        demands = (*skills, *_demands(task.policy), *effect.demands)
        walls = self._walls(tenant)

        def decide(most: int, *, others: bool) -> tuple[Selection, list[Match]]:
            found = self._found(query, most, (*walls, *demands))
            matches = found
            if len(demands) > len(skills):
                # What is forbidden may be what is meant: then nothing poor stands in for it.
                matches = _with_hidden(matches, self._found(query, most, (*walls, *skills)))
            if others and skills:
                matches = _with_hidden(matches, self._found(query, most, walls))
            selection = chosen_from(self._groups(matches, request, supposed, look))
            return selection, found

        most = self._settings.candidates
        selection, found = decide(most, others=everyone)
        if selection.problem is not None and (
            skills
            or (
                len({match.capability for match in found}) >= most
                and found[-1].score >= search.calibration.threshold
            )
        ):
            # The next ones may do; else the client is told who comes nearest, whatever its skills.
            selection, _ = decide(_WIDER * most, others=True)
        return selection, {"demands": [sorted(demand)[:_DEMANDS] for demand in demands]}

    def _request(self, wanted: Wanted) -> Request:
        """Return a task as the gates of policy see it."""
        effect = self._effect(wanted)
        task, tenant = _ruled(wanted.task, effect), self._tenant_of(wanted.client)
        return Request(task, wanted.function, wanted.deadline, effect=effect, tenant=tenant)

    def _effect(self, wanted: Wanted) -> RuleEffect:
        return (
            NO_RULES if self._rules is None else self._rules.book.apply(wanted.client, wanted.task)
        )

    def _named(self, function: FunctionRef | None, tenant: str | None) -> list[Key]:
        if function is None:
            return []
        return [(node, function.name) for node in self._fleet.serving(tenant, function.name)]

    def _walls(self, tenant: str | None) -> Demands:
        """Return what a search must not look beyond: a tenant's own offers and those for all."""
        if tenant is None and not self._fleet.has_tenants:
            return ()
        return (frozenset({f"tenant:{tenant or ''}", f"tenant:{EVERY_TENANT}"}),)

    def _found(self, query: Query, most: int, demands: Demands = ()) -> list[Match]:
        return query.search.search(query.text, query.vector, most, demands=demands)

    def _groups(
        self, matches: Sequence[Match], request: Request, supposed: Supposition, look: Glance
    ) -> Iterator[Iterator[Offer]]:
        """Yield the offers of one capability after the other, each made when it is asked for."""
        for _, same in groupby(matches, key=attrgetter("capability")):
            found = list(same)
            yield self._offers([match.key for match in found], request, supposed, look, found[0])

    def _offers(
        self,
        keys: list[Key],
        request: Request,
        supposed: Supposition,
        look: Glance,
        match: Match | None = None,
    ) -> Iterator[Offer]:
        """Yield what nodes offer of one capability, the most promising first.

        Args:
            keys: Of records of the same words, so that one match holds for all of them.
            request: What is asked.
            supposed: What is to be supposed of the mesh.
            look: Sorts out what plainly fails.
            match: How it was found; None when it was named.
        """
        how = (match.score, match.dense, match.lexical, match.capability) if match else ()
        shut: dict[Outlook, list[_Pair]] = {outlook: [] for outlook in _OUTLOOKS}

        def open_ones() -> Iterator[_Pair]:
            records, nodes = self._fleet.records, self._fleet.nodes
            for key in self._in_turn(keys, request):
                record = records.get(key)
                if record is None or not record.policy.serves(request.tenant):
                    continue  # another tenant's: as if it were not there, not even as a near miss
                view = nodes.get(record.node) or self._fleet.node(record.node)
                if supposed is not _AS_IT_IS:
                    record, view = supposed.see(record, view)
                outlook = look(record, view)
                if outlook is Outlook.OPEN:
                    yield record, view
                    continue
                alike = shut[outlook]
                if len(alike) < _SORTED_OUT:
                    alike.append((record, view))
                elif outlook is Outlook.FULL:
                    return  # hundreds have no place: the others hardly have one, and all may soon

        others = open_ones()
        first = list(islice(others, _ORDERED))
        if len(first) > _UNORDERED:
            first.sort(key=partial(_promise, request))
        for record, view in chain(first, others, *shut.values()):
            yield Offer(record, view, *how)

    def _in_turn(self, keys: list[Key], request: Request) -> list[Key]:
        """Return keys with those first that are worth a look.

        A selection stops after a few dozen that pass. Of thousands a few hundred are put in order,
        the cheapest where that is asked for, or others each millisecond, so that the time a task
        takes does not grow with the fleet.
        """
        if len(keys) <= _ORDERED:
            return keys
        records = self._fleet.records
        if request.task.prefer == "cheapest":
            known = [key for key in keys if key in records]
            keys = sorted(known, key=lambda key: records[key].cost.money)
        else:
            start = request.deadline % len(keys)
            keys = keys[start:] + keys[:start]
        for node in (request.prefer, request.called_by):
            place = (node or "", keys[0][1])
            if place in keys:
                keys = [place, *(key for key in keys if key != place)]
        return keys

    def _unknown(self, function: FunctionRef, tenant: str | None) -> Selection:
        """Nobody has a function of that name: name those that sound like it."""
        most = max(1, self._settings.nearest)
        sounding = self._fleet.names.nearest(function.name, _SOUNDING * most)
        near = [one for one in sounding if self._fleet.serving(tenant, one[0])][:most]
        close = [name for name, likeness in near if likeness >= _MEANT]
        misses: list[dict[str, Any]] = [
            {
                "function": name,
                "node": min(self._fleet.serving(tenant, name)),
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


def _promise(request: Request, pair: _Pair) -> tuple[bool, float, float, str]:
    """Order first who served the session, then who is cheap, quick or free, as is preferred."""
    record, view = pair
    first = 0.0
    if request.task.prefer == "cheapest":
        first = record.cost.money
    elif request.task.prefer == "fastest":
        total_ms = predict_finish(record, view).total_ms
        first = math.inf if total_ms is None else total_ms
    return record.node != request.prefer, first, view.busy, record.node


def _ruled(task: Task, effect: RuleEffect) -> Task:
    """Return a task as the rules leave it: a narrower policy, a preference where it has none."""
    changes: dict[str, Any] = {}
    if effect.policy is not None:
        changes["policy"] = task.policy.narrowed(effect.policy)
    if effect.prefer is not None and task.prefer == "balanced":
        changes["prefer"] = effect.prefer
    return task.model_copy(update=changes) if changes else task


def _with_hidden(matches: Sequence[Match], others: Sequence[Match]) -> list[Match]:
    """Return matches with some of each capability that only a search with fewer demands finds."""
    found = {match.capability for match in matches}
    hidden = [
        match
        for capability, same in groupby(others, key=attrgetter("capability"))
        if capability not in found
        for match in islice(same, _HIDDEN)
    ]
    return sorted([*matches, *hidden], key=lambda match: (-match.score, match.capability))


def _demands(policy: TaskPolicy) -> list[frozenset[str]]:
    """Return what the search can be told of a policy; the gates look at all of it."""
    demands = [frozenset({f"grant:{grant}"}) for grant in policy.grants[:_DEMANDS]]
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
