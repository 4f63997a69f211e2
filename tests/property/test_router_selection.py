"""Whatever is on offer: gates hold, meaning goes before price, and figures stay figures."""

import json
import math
from itertools import pairwise
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from capability_schemas.errors import ConfigurationError
from capability_schemas.node import FunctionLoad, NodeLoad
from capability_schemas.task import Preference
from capability_schemas.wire import MAX_COUNT
from router.candidates import Offer
from router.reputation import Reputation
from router.selection import Selection
from router.settings import Weights
from support.offers import chosen, nodes, offer

WINDOW = 0.05
PREFERENCES = st.sampled_from(["balanced", "best", "cheapest", "fastest"])
SHARES = st.floats(0, 1)
ANY_FLOAT = st.floats(allow_nan=False, allow_infinity=False)
ANY_COST = st.floats(0.0, float(MAX_COUNT))
"""What a record may name; anything beyond is refused before the router sees it."""
TIMES = st.none() | st.floats(0, 1e6)


STATES: list[dict[str, Any]] = [
    {"presence": "birth"},
    {"presence": "draining"},
    {"presence": "offline"},
    {"presence": "birth", "silent": True},
    {"presence": "birth", "cordoned": True},
]
LOADS: list[dict[str, int]] = [
    {},
    {"running": 1, "capacity": 2},
    {"running": 2, "capacity": 2, "queue_limit": 3},
    {"running": 2, "capacity": 2, "queued": 3, "queue_limit": 3},
]
NAMES = ("echo", "repeat", "say")
KINDS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(NAMES),
        "state": st.sampled_from(STATES[:1] * 5 + STATES),
        "load": st.none() | st.sampled_from(LOADS),
        "counts": st.tuples(st.integers(0, 3), st.integers(0, 2)),
        "assigned": st.integers(0, 12),
        "degraded": st.booleans(),
        "zones": st.sampled_from([("hall",), ()]),
        "skills": st.sampled_from([("ocr",), ()]),
        "money": st.floats(0, 10),
        "energy_j": st.floats(0, 10),
        "times": st.tuples(TIMES, TIMES, TIMES, TIMES),
    }
)
WILD = st.fixed_dictionaries(
    {
        **{name: st.just(value) for name, value in {"name": "echo", "state": STATES[0]}.items()},
        "load": st.just(LOADS[0]),
        "counts": st.tuples(st.integers(0, 10**9), st.integers(0, 2)),
        "assigned": st.integers(0, 10**9),
        "degraded": st.booleans(),
        "zones": st.just(("hall",)),
        "skills": st.just(("ocr",)),
        "money": ANY_COST,
        "energy_j": ANY_COST,
        "times": st.tuples(*[st.none() | ANY_FLOAT] * 4),
    }
)


def made(kinds: list[dict[str, Any]], sims: tuple[float, ...]) -> list[Offer]:
    """Make offers by nodes of their own; those of a function are equally similar."""
    fleet = []
    for place, kind in enumerate(kinds):
        queued, instances = kind["counts"]
        least, first, total, wait = kind["times"]
        figures = FunctionLoad(
            queued=queued,
            instances=instances,
            first_ms=first,
            total_ms=total,
            least_ms=least,
            wait_ms=wait,
            degraded=kind["degraded"],
        )
        told = kind["load"]
        name = kind["name"]
        view = kind["state"] | {
            "assigned": kind["assigned"],
            "load": None
            if told is None
            else NodeLoad(node="n", epoch=1, at=0, functions={name: figures}, **told),
        }
        fleet.append(
            offer(
                f"n{place}",
                sims[NAMES.index(name)],
                view,
                function=name,
                cost={"money": kind["money"], "energy_j": kind["energy_j"]},
                policy={"zones": kind["zones"]},
                skills=kind["skills"],
            )
        )
    return fleet


def fleets(kinds: Any = KINDS, least: float = 0.3) -> Any:
    """Some nodes with some functions, none of them less similar than ``least``."""
    sims = st.tuples(*[st.floats(least, 1.0)] * 3)
    return st.builds(made, st.lists(kinds, min_size=1, max_size=7), sims)


FINE = KINDS.map(lambda kind: kind | {"state": STATES[0], "load": LOADS[0]})
"""Nodes that may be chosen, when there is time."""

AMPLE_MS = 10**9
ALIKE = 0.86
"""Similarities from here on are not too far apart for a substitute."""

TASKS = st.fixed_dictionaries(
    {
        "prefer": PREFERENCES,
        "weights": st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(("cost", "time", "load", "reputation"), SHARES),
        ),
        "policy": st.sampled_from([{}, {"zones": ["hall"]}, {"max_cost": 5.0}]),
        "skills": st.sampled_from([(), ("ocr",)]),
        "priority": st.integers(0, 9),
    }
)
WISHES = TASKS.map(lambda task: {name: task[name] for name in ("prefer", "weights", "priority")})
OUTCOMES = st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=20)


def reputation_of(outcomes: list[tuple[int, bool]]) -> Reputation:
    reputation = Reputation()
    for node, good in outcomes:
        for function in ("echo", "repeat", "say"):
            reputation.learn(f"n{node}", function, good, 0)
    return reputation


def select(fleet: list[Offer], task: dict[str, Any], **options: Any) -> Selection:
    options.setdefault("weights", Weights(exploration=0.5))
    return chosen(*fleet, task=task, **options)


def is_allowed(one: Offer, task: dict[str, Any], deadline: int) -> bool:
    """Say once more, in other words, what the gates say."""
    node, policy = one.node, task["policy"]
    told = node.load
    figures = node.function(one.record.function)
    return (
        one.sim >= 0.5
        and ("zones" not in policy or "hall" in one.record.policy.zones)
        and one.record.cost.money <= policy.get("max_cost", math.inf)
        and set(task["skills"]) <= set(one.record.skills)
        and node.presence == "birth"
        and not node.silent
        and not node.cordoned
        and not (
            told is not None
            and told.capacity > 0
            and told.running >= told.capacity
            and told.queued >= told.queue_limit
        )
        and (figures.least_ms or 0.0) <= deadline
    )


@settings(max_examples=60, deadline=None)
@given(fleet=fleets(), task=TASKS, outcomes=OUTCOMES, seed=st.integers(0, 99))
def test_nobody_is_chosen_who_fails_a_gate_and_somebody_is_if_one_may(
    fleet: list[Offer], task: dict[str, Any], outcomes: list[tuple[int, bool]], seed: int
) -> None:
    deadline = 30_000
    selection = select(
        fleet, task, reputation=reputation_of(outcomes), chance=Random(seed), deadline=deadline
    )
    allowed = {one.record.node for one in fleet if is_allowed(one, task, deadline)}
    assert set(nodes(selection)) <= allowed
    assert (selection.problem is None) == bool(selection.choices)
    passed = {
        row["node"]
        for row in selection.explanation["candidates"]
        if set(row["gates"].values()) == {"pass"} and row["similarity"]["score"] >= 0.5
    }
    assert set(nodes(selection)) <= passed


@settings(max_examples=60, deadline=None)
@given(fleet=fleets(), task=TASKS, outcomes=OUTCOMES, seed=st.integers(0, 99))
def test_nothing_beats_a_meaning_that_is_clear(
    fleet: list[Offer], task: dict[str, Any], outcomes: list[tuple[int, bool]], seed: int
) -> None:
    selection = select(
        fleet, task, reputation=reputation_of(outcomes), chance=Random(seed), prefer="n0"
    )
    standing = {row["node"]: row["standing"] for row in selection.explanation["candidates"]}
    ranked = [standing[node] for node in nodes(selection)]
    if not ranked:
        return
    assert ranked[0] >= max(ranked) - WINDOW - 1e-3
    behind = [one for one in ranked if one < max(ranked) - WINDOW - 1e-3]
    assert ranked[len(ranked) - len(behind) :] == sorted(behind, reverse=True)


@settings(max_examples=60, deadline=None)
@given(fleet=fleets(FINE, ALIKE), task=WISHES, place=st.integers(0, 7), more=st.floats(0.1, 50))
def test_who_gets_dearer_never_comes_earlier(
    fleet: list[Offer], task: dict[str, Any], place: int, more: float
) -> None:
    one = fleet[place % len(fleet)]
    cost = one.record.cost.model_copy(update={"money": one.record.cost.money + more})
    record = one.record.model_copy(update={"cost": cost})
    dearer = Offer(record, one.node, one.sim, one.dense, one.lexical)
    changed = [dearer if other is one else other for other in fleet]
    before = nodes(select(fleet, task, deadline=AMPLE_MS))
    after = nodes(select(changed, task, deadline=AMPLE_MS))
    name = one.record.node
    assert (name in before) == (name in after)
    if name not in before:  # behind the window, and four of its function are enough there
        return
    assert set(before[: before.index(name)]) <= set(after[: after.index(name)])


@settings(max_examples=60, deadline=None)
@given(fleet=fleets(), task=TASKS, outcomes=OUTCOMES, data=st.data())
def test_the_order_of_the_offers_does_not_matter(
    fleet: list[Offer], task: dict[str, Any], outcomes: list[tuple[int, bool]], data: st.DataObject
) -> None:
    reputation = reputation_of(outcomes)
    mixed = data.draw(st.permutations(fleet))
    one, other = (select(list(order), task, reputation=reputation) for order in (fleet, mixed))
    assert one.choices == other.choices
    assert type(one.problem) is type(other.problem)


@settings(max_examples=60, deadline=None)
@given(fleet=fleets(WILD), task=WISHES, outcomes=OUTCOMES)
def test_figures_stay_finite_whatever_nodes_tell(
    fleet: list[Offer], task: dict[str, Any], outcomes: list[tuple[int, bool]]
) -> None:
    selection = select(fleet, task, reputation=reputation_of(outcomes))
    text = json.dumps(selection.explanation, allow_nan=False)
    assert json.loads(text)["looked_at"] >= len(selection.choices)
    for row in selection.explanation["candidates"]:
        assert all(0 <= value <= 1 for value in row["terms"].values()), row["terms"]
        assert math.isfinite(row["value"])
    for choice in selection.choices:
        assert choice.finish_ms is None or 0 <= choice.finish_ms < math.inf


@settings(max_examples=60, deadline=None)
@given(prefer=PREFERENCES, fleet=fleets(FINE, ALIKE))
def test_within_the_window_the_preference_is_kept(prefer: Preference, fleet: list[Offer]) -> None:
    selection = select(fleet, {"prefer": prefer}, deadline=AMPLE_MS)
    rows = {row["node"]: row for row in selection.explanation["candidates"]}
    competing = nodes(selection)[: selection.explanation["competing"]]
    costs = {one.record.node: one.record.cost.money for one in fleet}
    figures: list[float] = [
        {
            "balanced": -rows[node]["value"],
            "best": -rows[node]["standing"],
            "cheapest": costs[node],
            "fastest": rows[node]["terms"]["time"],
        }[prefer]
        for node in competing
    ]
    assert competing
    assert all(one <= other + 1e-3 for one, other in pairwise(figures))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(
    snapshot=st.dictionaries(st.sampled_from(["version", "functions", "skills"]), JSON)
    | st.fixed_dictionaries({"version": st.just(1), "functions": JSON, "skills": JSON})
)
def test_any_json_is_a_snapshot_or_refused(snapshot: dict[str, Any]) -> None:
    reputation = Reputation()
    try:
        reputation.restore(snapshot)
    except ConfigurationError:
        assert len(reputation) == 0
    assert 0 <= reputation.score("a", "echo", 0) <= 1
