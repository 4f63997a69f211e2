"""One decision from its parts: rules, search, offers, selection, and what is learnt of it."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from capability_schemas.capability import CapabilityPolicy, CatalogRecord, Cost
from capability_schemas.errors import NoCapableNode, Overloaded, PolicyDenied
from capability_schemas.node import NodeLoad, NodeState
from capability_schemas.task import FunctionRef, Task, TaskPolicy
from registry.encoders import EncoderThread
from registry.search import CapabilitySearch
from router.catalogue import Fleet
from router.events import Choice
from router.meaning import Meaning
from router.routing import TaskRouting, Wanted
from router.rules import RuleBook, RuleFile
from router.selection import Selection
from router.settings import RouterSettings
from router.whatif import Supposition
from support.capabilities import bare_record, make_record
from support.encoders import WordEncoder

WORDS = WordEncoder()
NOW = 1_000_000


class World:
    """A router's decisions over a fleet of the test's making."""

    def __init__(self, encoder: EncoderThread, path: Path) -> None:
        self.fleet = Fleet()
        self.rules = RuleFile(path / "rules.toml")
        self.meaning = Meaning(search=CapabilitySearch(space=WORDS.space), encoder=encoder)
        self.routing = TaskRouting(
            meaning=self.meaning, fleet=self.fleet, settings=RouterSettings(), rules=self.rules
        )

    def offer(self, record: CatalogRecord, *, busy: int = 0) -> None:
        self.fleet.admit(record)
        self.meaning.upsert(record)
        self.fleet.hear_state(NodeState(node=record.node, state="birth", epoch=1, at=1), NOW)
        load = NodeLoad(node=record.node, epoch=1, at=1, capacity=4, queue_limit=4, running=busy)
        self.fleet.hear_load(load, NOW)

    async def select(self, client: str = "pump-7", **task: Any) -> Selection:
        wanted = wanted_of(client, **task)
        return self.routing.select(wanted, await self.routing.embed(wanted), NOW)

    async def explain(self, supposed: Supposition | None = None, **task: Any) -> dict[str, Any]:
        wanted = wanted_of(**task)
        query = await self.routing.embed(wanted)
        more = {} if supposed is None else {"supposed": supposed}
        return self.routing.explain(wanted, query, NOW, candidates=64, **more)


def wanted_of(client: str = "pump-7", **fields: Any) -> Wanted:
    task = Task(**fields)
    function = FunctionRef.parse(task.function) if task.function else None
    return Wanted(client, task, function, NOW + task.timeout_ms)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with EncoderThread(encoder=WORDS) as encoder:
        yield World(encoder, tmp_path)


async def test_a_session_stays_with_its_node(world: World) -> None:
    for node in ("a", "b", "c"):
        world.offer(make_record(WORDS, node))
    wanted = wanted_of(function="echo", session="s")
    before = world.routing.select(wanted, None, NOW)
    assert before.choices[0].node == "a"
    world.routing.remember(wanted, next(one for one in before.choices if one.node == "c"), NOW)
    assert world.routing.select(wanted, None, NOW).choices[0].node == "c"
    stranger = wanted_of("pump-8", function="echo", session="s")
    assert world.routing.select(stranger, None, NOW).choices[0].node == "a"


async def test_what_may_not_run_does_not_crowd_out_what_may(world: World) -> None:
    for number in range(30):
        text = f"echo this text number {number}"
        world.offer(
            make_record(
                WORDS, f"n{number}", f"echo_{number}", description=text, examples=(text, text)
            )
        )
    granted = CapabilityPolicy(grants=("actuate",))
    world.offer(
        make_record(
            WORDS,
            "granted",
            "repeat",
            description="echo this text again",
            examples=("echo this text as it was said", "echo that text"),
            policy=granted,
        )
    )
    policy = TaskPolicy(grants=("actuate",))
    selection = await world.select(text="echo this text", policy=policy)
    assert [choice.node for choice in selection.choices] == ["granted"]
    told = await world.explain(text="echo this text", policy=policy)
    assert told["demands"] == [["grant:actuate"]]
    assert len(told["candidates"]) > 5
    assert told["chosen"] == ["granted", "repeat"]
    assert len(selection.explain()["candidates"]) <= 16


async def test_when_nobody_may_the_nearest_are_named(world: World) -> None:
    world.offer(make_record(WORDS, "a"))
    selection = await world.select(text="echo this text", policy=TaskPolicy(zones=("hall-9",)))
    assert isinstance(selection.problem, PolicyDenied)
    assert selection.problem.detail["nearest"][0]["node"] == "a"


async def test_what_demands_hide_is_not_replaced_by_something_else(world: World) -> None:
    world.offer(make_record(WORDS, "a", policy=CapabilityPolicy(zones=("hall-1",))))
    other = {"description": "text of a poem", "examples": ("this is a poem",)}
    world.offer(
        make_record(WORDS, "b", "poem", **other, policy=CapabilityPolicy(zones=("hall-2",)))
    )
    world.rules.value = RuleBook.parse(
        '[[rule]]\nname = "hall"\nwhen = { client = "gauge-*" }\nrequire = { zone = "hall-2" }\n'
    )
    poem = await world.select(text="this poem", policy=TaskPolicy(zones=("hall-2",)))
    assert [choice.node for choice in poem.choices] == ["b"]
    by_policy = await world.select(text="echo this text", policy=TaskPolicy(zones=("hall-2",)))
    by_rule = await world.select("gauge-1", text="echo this text")
    for selection in (by_policy, by_rule):
        assert isinstance(selection.problem, PolicyDenied)
        assert [miss["node"] for miss in selection.problem.detail["nearest"]] == ["a", "b"]
    assert by_policy.problem is not None
    told = await world.explain(text="echo this text", policy=TaskPolicy(zones=("hall-2",)))
    assert told["problem"]["message"] == by_policy.problem.message


async def test_rules_narrow_the_policy_and_hold_for_named_functions_too(world: World) -> None:
    world.offer(make_record(WORDS, "a", policy=CapabilityPolicy(external=True)))
    world.offer(make_record(WORDS, "b", cost=Cost(money=3.0)))
    world.rules.value = RuleBook.parse(
        '[[rule]]\nname = "stay"\nwhen = { client = "pump-*" }\n'
        'policy = { local_only = true }\nroute = "cheapest"\n'
    )
    for task in ({"text": "echo this text"}, {"function": "echo"}):
        selection = await world.select(**task)
        assert [choice.node for choice in selection.choices] == ["b"]
        assert selection.explain()["prefer"] == "cheapest"
        assert selection.explain()["rules"]["matched"] == ["stay"]
        assert (await world.select("gauge-1", **task)).choices[0].node == "a"
    own = wanted_of(function="echo", policy=TaskPolicy(max_cost=5.0))
    assert world.routing.policy(own) == TaskPolicy(max_cost=5.0, local_only=True)
    fastest = await world.select(function="echo", prefer="fastest")
    assert fastest.explain()["prefer"] == "fastest"


@pytest.mark.parametrize("task", [{"function": "echo"}, {"text": "echo this text"}])
async def test_of_thousands_of_nodes_few_are_looked_at(world: World, task: dict[str, Any]) -> None:
    template = make_record(WORDS, "n")
    for number in range(2_000):
        price = Cost(money=float(abs(number - 1_234)))
        made = template.model_copy(update={"node": f"n{number:04}", "cost": price})
        world.offer(made, busy=0 if number % 50 == 0 else 3)
    plain = await world.select(**task)
    assert plain.explain()["looked_at"] < 100
    assert plain.explain()["more"]
    assert world.fleet.node(plain.choices[0].node).busy == 0
    assert (await world.select(prefer="cheapest", **task)).choices[0].node == "n1234"
    wanted = wanted_of(session="s", **task)
    world.routing.remember(wanted, Choice("n0777", "echo", "1.0.0", 1.0), NOW)
    session = await world.select(session="s", **task)
    assert "n0777" in {choice.node for choice in session.choices}


@pytest.mark.parametrize(
    ("many", "code"),
    [
        ({"cost": Cost(money=9.0)}, "policy_denied"),
        ({"policy": CapabilityPolicy(zones=("hall",))}, "policy_denied"),
        ({"policy": CapabilityPolicy(grants=("pii",))}, "policy_denied"),
        ({"skills": ()}, "no_capable_node"),
        ({"version": "0.9.0"}, "no_capable_node"),
        ({"expires_at": NOW}, "no_capable_node"),
    ],
)
async def test_the_one_that_may_is_found_among_hundreds(
    world: World, many: dict[str, Any], code: str
) -> None:
    fine = {
        "cost": Cost(),
        "policy": CapabilityPolicy(zones=("hall",), grants=("pii",)),
        "skills": ("ocr",),
        "version": "1.2.0",
    }
    template = make_record(WORDS, "n").model_copy(update=fine)
    for number in range(400):
        world.offer(template.model_copy(update={**many, "node": f"n{number:04}"}))
    policy = TaskPolicy(zones=("hall",), grants=("pii",), max_cost=1.0)
    task: dict[str, Any] = {"function": "echo@>=1", "skills": ("ocr",), "policy": policy}
    nobody = await world.select(**task)
    assert nobody.problem is not None
    assert nobody.problem.code.value == code
    assert nobody.explain()["looked_at"] < 100
    world.offer(template.model_copy(update={"node": "n0200"}))
    assert [one.node for one in (await world.select(**task)).choices] == ["n0200"]
    world.offer(template.model_copy(update={"node": "n0200"}))
    world.fleet.node("n0200").cordoned = True
    away = await world.select(**task)
    assert isinstance(away.problem, NoCapableNode)
    assert away.problem.retryable


async def test_a_task_with_thousands_of_demands_is_explained_in_short(world: World) -> None:
    world.offer(make_record(WORDS, "a"))
    many = tuple(f"{number:0200}" for number in range(4_000))
    policy = TaskPolicy(zones=many, grants=many)
    selection = await world.select(text="echo this text", skills=many, policy=policy)
    assert isinstance(selection.problem, PolicyDenied | NoCapableNode)
    assert len(json.dumps(selection.explain())) < 50_000


async def test_when_the_first_few_are_away_the_next_are_asked(world: World) -> None:
    for number in range(24):
        description = f"echo this text in hall {number}"
        world.offer(make_record(WORDS, f"n{number:02}", description=description, examples=()))
    for number in range(23):
        world.fleet.node(f"n{number:02}").cordoned = True
    selection = await world.select(text="echo this text")
    assert [choice.node for choice in selection.choices] == ["n23"]
    told = await world.explain(text="echo this text")
    assert told["chosen"] == ["n23", "echo"]


async def test_where_hundreds_are_full_the_others_are_not_asked_about(world: World) -> None:
    template = make_record(WORDS, "n")
    for number in range(2_000):
        world.offer(template.model_copy(update={"node": f"n{number:04}"}))
    for node in list(world.fleet.nodes):
        full = NodeLoad(node=node, epoch=1, at=1, capacity=1, queue_limit=0, running=1)
        world.fleet.hear_load(full, NOW)
    selection = await world.select(function="echo")
    assert isinstance(selection.problem, Overloaded)
    assert selection.explain()["more"]


async def test_those_away_are_passed_over_to_the_last_that_may(world: World) -> None:
    template = make_record(WORDS, "n")
    for number in range(400):
        world.offer(template.model_copy(update={"node": f"n{number:04}"}))
        if number != 399:
            world.fleet.node(f"n{number:04}").cordoned = True
    selection = await world.select(function="echo")
    assert [choice.node for choice in selection.choices] == ["n0399"]


@pytest.mark.parametrize(
    ("asked", "hint"), [("ecko", "did you mean echo?"), ("zzz", "offers the function zzz")]
)
async def test_an_unknown_name_is_answered_with_what_it_may_mean(
    world: World, asked: str, hint: str
) -> None:
    world.offer(bare_record("a"))
    world.offer(bare_record("b"))
    selection = await world.select(function=asked)
    assert isinstance(selection.problem, NoCapableNode)
    assert hint in selection.problem.message
    assert selection.problem.detail["nearest"][0]["node"] == "a"
    assert selection.explain()["candidates"] == []


async def test_outcomes_change_later_decisions(world: World) -> None:
    for node in ("a", "b"):
        world.offer(make_record(WORDS, node))
    for _ in range(8):
        world.routing.learn("a", "echo", "failed", NOW)
    assert (await world.select(function="echo")).choices[0].node == "b"
    told = await world.explain(function="echo")
    weighted = {row["node"]: row["weighted"]["reputation"] for row in told["candidates"]}
    assert weighted["a"] < 0 == weighted["b"]
    for verdict in ("refused", "unsure"):
        world.routing.learn("b", "echo", verdict, NOW)
    assert (await world.explain(function="echo")) == told
    for _ in range(3):
        world.routing.learn("b", "echo", "lost", NOW)
    assert [one.node for one in (await world.select(function="echo")).choices] == ["a"]
    told = await world.explain(function="echo")
    gates = {row["node"]: row["gates"]["breaker"] for row in told["candidates"]}
    assert "lost" in gates["b"]


async def test_a_supposition_changes_what_is_told_and_nothing_else(world: World) -> None:
    for node in ("a", "b"):
        world.offer(make_record(WORDS, node))
    before = await world.explain(text="echo this text")
    supposed = Supposition(gone=("a",), cost={"b": 2.0}, weights={"cost": 0.5})
    then = await world.explain(supposed, text="echo this text")
    assert (before["chosen"], then["chosen"]) == (["a", "echo"], ["b", "echo"])
    (kept,) = [row for row in then["candidates"] if row["node"] == "b"]
    assert kept["weighted"]["cost"] == -0.5
    assert await world.explain(text="echo this text") == before


async def test_weights_hold_from_the_next_decision_on(world: World) -> None:
    world.offer(make_record(WORDS, "a"), busy=3)
    world.offer(make_record(WORDS, "b", cost=Cost(money=1.0)))
    change: Callable[..., Any] = world.routing.weights.changed
    world.routing.weights = change({"load": 0.5, "cost": 0.0})
    assert (await world.select(function="echo")).choices[0].node == "b"
    world.routing.weights = change({"load": 0.0, "cost": 0.5})
    assert (await world.select(function="echo")).choices[0].node == "a"


# ---- tenants

TENANTS = {"acme-1": "acme", "bolt-1": "bolt"}


@pytest.fixture
def divided(world: World) -> World:
    """A fleet of two tenants, with offers for nobody in particular and for all."""
    world.routing = TaskRouting(
        meaning=world.meaning,
        fleet=world.fleet,
        settings=RouterSettings(),
        rules=world.rules,
        tenant_of=TENANTS.get,
    )
    words = {"description": "echo this text", "examples": ("echo that text",)}
    for node, tenant in (("a", "acme"), ("b", "bolt"), ("n", None), ("s", "*")):
        policy = CapabilityPolicy(tenant=tenant)
        world.offer(make_record(WORDS, node, "echo", **words, policy=policy))
        other = {"description": f"secret work of {node}", "examples": (f"do {node} work",)}
        world.offer(make_record(WORDS, node, f"secret_{node}", **other, policy=policy))
    return world


SEEN = {"acme-1": {"a", "s"}, "bolt-1": {"b", "s"}, "stranger": {"n", "s"}}


@pytest.mark.parametrize(("client", "nodes"), SEEN.items())
async def test_a_client_reaches_its_tenants_nodes_and_those_of_all(
    divided: World, client: str, nodes: set[str]
) -> None:
    for asked in ({"text": "echo this text"}, {"function": "echo"}):
        selection = await divided.select(client, **asked)
        assert {choice.node for choice in selection.choices} == nodes, asked


@pytest.mark.parametrize(("client", "nodes"), SEEN.items())
async def test_what_others_offer_is_as_if_it_were_not_there(
    divided: World, client: str, nodes: set[str]
) -> None:
    """Neither explanations nor near misses nor suggestions tell of another tenant."""
    hidden = {"a", "b", "n", "s"} - nodes
    for node in hidden:
        for asked in (
            {"text": f"do secret work of {node}"},
            {"text": f"do {node} work", "skills": ["x"]},
            {"text": f"secret work of {node}", "policy": TaskPolicy(zones=("z",))},
            {"function": f"secret_{node}"},
            {"function": f"secret_{node}x"},
            {"function": f"secret_{node}@>=9"},
        ):
            wanted = wanted_of(client, **asked)
            query = await divided.routing.embed(wanted)
            told = divided.routing.explain(wanted, query, NOW, candidates=64)
            selection = divided.routing.select(wanted, query, NOW)
            assert {one["node"] for one in told["candidates"]} <= nodes, asked
            said = json.dumps([told["problem"], selection.problem and selection.problem.detail])
            for other in hidden:
                if other != node:  # what was asked for may be said again
                    assert f"secret_{other}" not in said, (asked, said)
                assert f'"node": "{other}"' not in said, (asked, said)
            assert "another tenant" not in said


async def test_many_of_another_tenant_crowd_nobody_out(divided: World) -> None:
    for number in range(40):
        text = f"paint the wall number {number}"
        divided.offer(
            make_record(
                WORDS,
                "b",
                f"paint_{number}",
                description=text,
                examples=(text, text),
                policy=CapabilityPolicy(tenant="bolt"),
            )
        )
    own = {"description": "paint the wall of the hall", "examples": ("paint that wall",)}
    divided.offer(make_record(WORDS, "a", "painter", **own, policy=CapabilityPolicy(tenant="acme")))
    selection = await divided.select("acme-1", text="paint the wall")
    assert [choice.function for choice in selection.choices] == ["painter"]


async def test_a_node_that_changes_hands_is_not_asked_again(divided: World) -> None:
    wanted = wanted_of("acme-1", function="echo")
    choice = next(
        one for one in divided.routing.select(wanted, None, NOW).choices if one.node == "a"
    )
    assert divided.routing.objection(wanted, choice, NOW) is None
    moved = make_record(
        WORDS, "a", "echo", revision=2, policy=CapabilityPolicy(tenant="bolt"), examples=()
    )
    divided.fleet.admit(moved)
    objection = divided.routing.objection(wanted, choice, NOW)
    assert isinstance(objection, PolicyDenied)


async def test_supposing_things_of_the_mesh_shows_no_other_tenant(divided: World) -> None:
    wanted = wanted_of("acme-1", text="echo this text")
    query = await divided.routing.embed(wanted)
    told = divided.routing.explain(
        wanted, query, NOW, candidates=64, supposed=Supposition(weights={"cost": 0.5})
    )
    assert {one["node"] for one in told["candidates"]} <= {"a", "s"}


async def test_where_no_node_has_a_tenant_clients_of_one_reach_nobody(world: World) -> None:
    world.routing = TaskRouting(
        meaning=world.meaning,
        fleet=world.fleet,
        settings=RouterSettings(),
        tenant_of=TENANTS.get,
    )
    world.offer(make_record(WORDS, "n"))
    assert (await world.select("stranger", function="echo")).choices
    for asked in ({"text": "echo this text"}, {"function": "echo"}):
        assert isinstance((await world.select("acme-1", **asked)).problem, NoCapableNode)


async def test_only_who_policy_lets_have_a_task_may_hold_it(world: World) -> None:
    zone = CapabilityPolicy(zones=("hall-3",))
    world.offer(make_record(WORDS, "right", policy=zone))
    world.offer(make_record(WORDS, "elsewhere"))
    world.offer(make_record(WORDS, "of_another_tenant", policy=CapabilityPolicy(tenant="acme")))
    world.offer(make_record(WORDS, "thrown_out", policy=zone))
    world.offer(make_record(WORDS, "else", "other", policy=zone))
    world.fleet.revoke("thrown_out")
    world.fleet.hear_state(NodeState(node="right", state="draining", epoch=1, at=2), NOW)

    def holders(**task: Any) -> set[str]:
        wanted = wanted_of(**task)
        nodes = [*world.fleet.nodes, "never_heard_of"]
        return {node for node in nodes if world.routing.may_hold(wanted, node, NOW)}

    here = TaskPolicy(zones=("hall-3",))
    assert holders(function="echo", policy=here) == {"right"}
    assert holders(text="echo this", policy=here) == {"right", "else"}
    assert holders(function="echo") == {"right", "elsewhere"}
    assert holders(function="echo@2.0.0") == set()
    assert "never_heard_of" not in world.fleet.nodes
