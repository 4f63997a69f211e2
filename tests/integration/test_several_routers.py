"""Two routers over one broker in memory: each task is one router's, whatever is killed."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from broker.session.base import Message
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.ids import now_ms
from capability_schemas.node import RouterState
from capability_schemas.signing import sign, verify
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import TrustState
from capability_schemas.wire import encode
from router.entry import Entry
from router.ledger import Ledger
from router.ownership import Claim, rank
from router.quota import QuotaFile
from router.service import RouterService
from router.shadow import Shadow
from router.takeover import Takeover
from support.capabilities import make_record
from support.members import REGISTRY_KEY, make_book, make_signer
from support.scripted_mesh import QUICK, Mesh, ScriptedNode, admit, answer, begin, say_nothing

SETTINGS = QUICK.model_copy(update={"takeover_ms": 400, "router_heartbeat_s": 0.1})
PATIENT = SETTINGS.model_copy(update={"takeover_ms": 60_000})
ROUTERS = ("router-1", "router-2")


def owned_by(router: str, count: int = 1, routers: tuple[str, ...] = ROUTERS) -> list[str]:
    """Return ids of tasks that belong to a router."""
    names = (f"{router}-{number}" for number in range(10_000))
    mine = (name for name in names if rank(f"pump-7/{name}", routers)[0] == router)
    return [next(mine) for _ in range(count)]


@pytest.fixture
async def mesh(tmp_path: Path, topics: Topics) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack, tmp_path, topics)
        await mesh.start_client()
        yield mesh
        for name in tuple(mesh.routers):
            await mesh.stop_router(name)


async def start_both(
    mesh: Mesh,
    eventually: Any,
    settings: Any = SETTINGS,
    more: Callable[[str], dict[str, Any]] = lambda _: {},
) -> None:
    for name in ROUTERS:
        await mesh.start_router(settings, name=name, **more(name))
    await know_each_other(mesh, eventually)


async def know_each_other(mesh: Mesh, eventually: Any) -> None:
    for name in ROUTERS:
        router = mesh.routers[name]
        await eventually(lambda router=router: len(router.book.order("x")) == 2)
        await eventually(lambda router=router: router.reception.caught_up)


def finals(mesh: Mesh, task: str) -> list[dict[str, Any]]:
    return [event for event in mesh.of(task) if event["event"] in {"result", "error"}]


def ended_once(mesh: Mesh, task: str) -> bool:
    """Whether a task has ended, its numbers run without a gap and nothing was shown twice."""
    numbers = [event["seq"] for event in mesh.of(task) if event["event"] == "chunk"]
    # A router may repeat a node's end in its own name, when it was in doubt (ADR 36).
    last = {(end["event"], end["seq"], str(end.get("output"))) for end in finals(mesh, task)}
    return len(last) == 1 and [*numbers, last.pop()[1]] == list(range(len(numbers) + 1))


def sources(mesh: Mesh, task: str) -> set[str]:
    return {
        topic.rpartition("/")[2]
        for topic, event in mesh.events
        if event["task"] == task and event["event"] == "accepted"
    }


async def held_task(
    mesh: Mesh,
    eventually: Any,
    behaviour: Any = admit,
    more: Callable[[str], dict[str, Any]] = lambda _: {},
) -> tuple[ScriptedNode, str]:
    """Have two routers, and a task of the first one that has come to a node."""
    node = await mesh.node("edge-1", behaviour)
    await start_both(mesh, eventually, PATIENT, more)
    (task,) = owned_by("router-1")
    mesh.submit(id=task, function="echo")
    await eventually(lambda: node.invocations)
    return node, task


async def ask_again(mesh: Mesh, eventually: Any, task: str) -> None:
    """Send a task that has ended once more, and wait for its one answer."""
    mesh.submit(id=task, function="echo")
    await eventually(lambda: len(finals(mesh, task)) == 2)
    await mesh.broker.settle()


async def a_silent_router(
    mesh: Mesh, eventually: Any, settings: Any = PATIENT, *, count: int = 1
) -> tuple[RouterService, list[str]]:
    """Have a router, beside a first one that may be alive as far as it can tell; and its tasks."""
    for name in ROUTERS:
        await mesh.start_router(settings, name=name, will=False)
    await know_each_other(mesh, eventually)
    await mesh.kill_router("router-1")
    tasks, left = owned_by("router-1", count), mesh.routers["router-2"]
    await eventually(lambda: left.book.doubts(f"pump-7/{tasks[0]}") == 1, timeout_s=30)
    return left, tasks


async def no_shadow_is_left(mesh: Mesh, eventually: Any) -> None:
    """Wait until no router thinks that the other one has a task."""
    for name in ROUTERS:
        await eventually(lambda name=name: len(mesh.routers[name].reception.shadows) == 0)


async def test_each_task_is_taken_by_the_router_it_belongs_to(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1")
    await start_both(mesh, eventually)
    for router in ROUTERS:
        for task in owned_by(router, 5):
            mesh.submit(id=task, function="echo")
            await eventually(lambda task=task: mesh.final(task))
            assert sources(mesh, task) == {router}
            assert ended_once(mesh, task)
    await mesh.broker.settle()
    assert len(node.invocations) == 10
    assert [mesh.routers[name].stats.accepted for name in ROUTERS] == [5, 5]
    await no_shadow_is_left(mesh, eventually)


async def test_tasks_without_an_id_are_taken_once(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1")
    await start_both(mesh, eventually)
    for number in range(20):
        mesh.send(f"echo this text {number % 4}".encode())  # the same words are another task
    await eventually(lambda: sum(event["event"] == "result" for _, event in mesh.events) == 20)
    await mesh.broker.settle()
    assert len(node.invocations) == 20
    assert len({invocation.task for invocation in node.invocations}) == 20
    await no_shadow_is_left(mesh, eventually)


async def test_what_is_wrong_with_a_task_is_said_once(mesh: Mesh, eventually: Any) -> None:
    await start_both(mesh, eventually)
    for router in ROUTERS:
        (task,) = owned_by(router)
        mesh.submit(id=task, text="x", colour="red")
        await eventually(lambda task=task: mesh.final(task))
    mesh.send(b'{"colour": "red"}')
    await eventually(lambda: len(mesh.events) == 3)
    await no_shadow_is_left(mesh, eventually)
    await mesh.broker.settle()
    assert [event["code"] for _, event in mesh.events] == ["invalid_task"] * 3


async def test_a_task_of_a_router_that_says_nothing_is_taken_by_the_next(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1")
    await start_both(mesh, eventually)
    mesh.broker.hold("router-1")  # cut off, its will is out: nobody waits for it
    (task,) = owned_by("router-1")
    mesh.submit(id=task, function="echo")
    await eventually(lambda: mesh.final(task))
    assert sources(mesh, task) == {"router-2"}
    mesh.broker.release("router-1")
    await know_each_other(mesh, eventually)
    await mesh.broker.settle()
    assert ended_once(mesh, task)
    assert len(node.invocations) == 1


@pytest.mark.parametrize("behaviour", [say_nothing, admit, begin])
async def test_a_killed_routers_task_goes_on_with_the_other(
    mesh: Mesh, eventually: Any, behaviour: Any
) -> None:
    node, task = await held_task(mesh, eventually, behaviour)
    await mesh.broker.settle()
    await mesh.kill_router("router-1")
    await eventually(lambda: mesh.routers["router-2"].stats.taken_over == 1)
    first = node.invocations[0]  # the node goes on: nobody tells it otherwise
    seq = 1 if behaviour is begin else 0
    node.reply(first, event="chunk", seq=seq, data="lo")
    node.reply(first, event="result", seq=seq + 1, output="hello", node="edge-1")
    await eventually(lambda: mesh.final(task))
    await eventually(lambda: not len(mesh.routers["router-2"].dispatcher))
    await mesh.broker.settle()
    assert ended_once(mesh, task)
    assert [invocation.attempt for invocation in node.invocations] == [1]


async def test_what_readers_pass_over_ends_a_task_for_no_router(
    mesh: Mesh, eventually: Any
) -> None:
    cut_off, task = await held_task(mesh, eventually)
    second = await mesh.node("edge-2", admit)
    cut_off.be("offline")
    await eventually(lambda: second.invocations)
    await mesh.broker.settle()
    cut_off.reply(cut_off.invocations[0], event="result", seq=0, output="late", node="edge-1")
    await mesh.broker.settle()
    await mesh.kill_router("router-1")
    await eventually(lambda: mesh.routers["router-2"].stats.taken_over == 1)
    second.reply(second.invocations[0], event="result", seq=0, output="hello", node="edge-2")
    await eventually(lambda: not len(mesh.routers["router-2"].dispatcher))
    await mesh.broker.settle()
    told = [end["output"] for end in finals(mesh, task)]
    assert told[:2] == ["late", "hello"]
    assert set(told[2:]) <= {"hello"}  # the router may repeat it in its own name (ADR 36)
    mesh.submit(id=task, function="echo")
    await eventually(lambda: len(finals(mesh, task)) > len(told))
    assert finals(mesh, task)[-1]["output"] == "hello"


async def test_a_task_that_its_node_has_forgotten_is_given_anew_by_whoever_takes_it_over(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1", admit)
    await start_both(mesh, eventually, PATIENT)
    (task,) = owned_by("router-1")
    mesh.submit(id=task, function="echo")
    await eventually(lambda: node.invocations)
    await mesh.broker.settle()
    node.behaviour = answer
    node.forget()
    await mesh.kill_router("router-1")
    await eventually(lambda: mesh.final(task))
    await mesh.broker.settle()
    assert ended_once(mesh, task)
    assert [invocation.attempt for invocation in node.invocations] == [1, 101]


async def test_the_other_router_goes_on_with_what_was_shown_when_the_node_is_lost_too(
    mesh: Mesh, eventually: Any
) -> None:
    first = await mesh.node("edge-1", begin, make_record(mesh.words, "edge-1", continues="skip"))
    await start_both(mesh, eventually, PATIENT)
    (task,) = owned_by("router-1")
    mesh.submit(id=task, function="echo")
    await eventually(lambda: first.invocations)
    await mesh.broker.settle()
    second = await mesh.node("edge-2", admit, make_record(mesh.words, "edge-2", continues="skip"))
    await mesh.kill_router("router-1")
    await eventually(lambda: "router-2" in sources(mesh, task))
    first.be("offline")
    await eventually(lambda: second.invocations)
    invocation = second.invocations[0]
    assert (invocation.attempt, invocation.seq) == (101, 1)
    assert invocation.continuation is not None
    assert invocation.continuation.shown == ("hel",)
    second.reply(invocation, event="chunk", seq=1, data="lo")
    second.reply(invocation, event="result", seq=2, output="hello", node="edge-2")
    await eventually(lambda: mesh.final(task))
    await mesh.broker.settle()
    assert ended_once(mesh, task)


async def test_a_router_whose_will_is_lost_is_missed_by_its_heartbeats(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1", admit)
    for name in ROUTERS:
        await mesh.start_router(PATIENT, name=name, will=False)
    await eventually(lambda: len(mesh.routers["router-2"].book.order("x")) == 2)
    (task,) = owned_by("router-1")
    mesh.submit(id=task, function="echo")
    await eventually(lambda: node.invocations)
    node.behaviour = answer
    node.forget()
    await mesh.kill_router("router-1")
    await eventually(lambda: mesh.final(task), timeout_s=30)
    assert ended_once(mesh, task)


async def test_the_end_of_a_silent_routers_attempt_counts_before_the_task_is_claimed(
    mesh: Mesh, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await mesh.node("edge-1", answer)
    left, (task,) = await a_silent_router(mesh, eventually)
    journal, asked, free = Ledger.journal, asyncio.Event(), asyncio.Event()

    async def write_slowly(ledger: Ledger, entry: Entry) -> Entry | None:
        asked.set()
        await free.wait()
        return await journal(ledger, entry)

    monkeypatch.setattr(Ledger, "journal", write_slowly)
    mesh.submit(id=task, function="echo")
    await asyncio.wait_for(asked.wait(), 30)
    late = await mesh.session("by-hand")
    base = {"v": 1, "task": task, "at": now_ms(), "attempt": 1}
    run = {"node": "edge-1", "function": "echo", "version": "1.0.0"}
    for source, word in (
        ("router-1", {"event": "accepted", "router": "router-1", "deadline": now_ms() + 60_000}),
        ("router-1", {"event": "routed", **run, "score": 1.0, "reason": "x"}),
        ("edge-1", {"event": "result", **run, "seq": 0, "output": "done"}),
    ):
        late.post(f"foam/v1/local/reply/pump-7/{task}/{source}", json.dumps(base | word).encode())
    await eventually(lambda: finals(mesh, task))
    free.set()
    await mesh.broker.settle()
    assert await left.reception.find_outcome(("pump-7", task)) is not None
    assert len(left.dispatcher) == 0
    assert ended_once(mesh, task)
    assert node.invocations == []


async def test_a_task_that_a_silent_router_may_have_is_claimed_before_it_is_run(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1", answer)
    left, tasks = await a_silent_router(mesh, eventually, count=100)
    for task in tasks:  # more than are journaled at a time
        mesh.submit(id=task, function="echo")
    await eventually(lambda: all(mesh.final(task) for task in tasks), timeout_s=60)
    assert all(ended_once(mesh, task) for task in tasks)
    assert {invocation.attempt for invocation in node.invocations} == {101}
    await eventually(lambda: len(left.reception.shadows) == 0)
    assert left.stats.taken_over == 0


async def test_a_task_that_was_claimed_and_ran_out_of_time_behind_a_cut_ends_all_the_same(
    mesh: Mesh, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mesh.node("edge-1", answer)
    _, (task,) = await a_silent_router(mesh, eventually, SETTINGS)
    said: list[Shadow] = []

    def lose_the_claim(_takeover: Takeover, shadow: Shadow) -> None:
        said.append(shadow)
        mesh.broker.hold("router-2")

    with monkeypatch.context() as patch:
        patch.setattr(Takeover, "repeat_claim", lose_the_claim)
        mesh.submit(id=task, function="echo", timeout_ms=1_000)
        late_ms = SETTINGS.takeover_ms + 200  # when it would be claimed once more, were it not cut
        await eventually(lambda: said and now_ms() > said[0].deadline + late_ms)
    assert len(said) == 1
    mesh.broker.release("router-2")
    await eventually(lambda: finals(mesh, task), timeout_s=30)
    assert ended_once(mesh, task)
    assert {end["code"] for end in finals(mesh, task)} == {"deadline_exceeded"}


@pytest.mark.parametrize(("attempt", "told"), [(1, 0), (101, 1)])
async def test_a_router_that_gives_an_ended_task_to_a_node_is_told_how_it_ended(
    mesh: Mesh, eventually: Any, attempt: int, told: int
) -> None:
    await mesh.node("edge-1", answer)
    await start_both(mesh, eventually)
    (task,) = owned_by("router-1")
    mesh.submit(id=task, function="echo")
    await eventually(lambda: mesh.final(task))
    await mesh.broker.settle()
    listener = await mesh.session("by-hand")
    ends: list[Any] = []

    async def hear(message: Message) -> None:
        ends.append(json.loads(message.payload)["data"])

    topic = mesh.topics.build(TopicKind.EVENT, source="router-2", kind="outcome")
    await listener.subscribe(topic, hear)
    routed = {"event": "routed", "v": 1, "task": task, "at": now_ms(), "attempt": attempt}
    routed |= {"node": "edge-1", "function": "echo", "version": "1.0.0"}
    routed |= {"score": 1.0, "reason": "x"}
    listener.post(f"foam/v1/local/reply/pump-7/{task}/router-1", json.dumps(routed).encode())
    await mesh.broker.settle()
    assert len(ends) == told
    assert all((end["task"], end["code"]) == (task, None) for end in ends)


async def test_a_router_that_was_cut_off_tells_what_it_ended_when_the_broker_kept_nothing(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1", admit)
    await start_both(mesh, eventually)
    (task,) = owned_by("router-1")
    mesh.submit(id=task, function="echo")
    await eventually(lambda: node.invocations)
    first, second = (mesh.routers[name] for name in ROUTERS)
    mesh.broker.hold("router-1")
    await eventually(lambda: second.stats.taken_over == 1)
    answer(node, node.invocations[-1])
    await eventually(lambda: finals(mesh, task))
    await eventually(lambda: len(second.dispatcher) == 0)
    mesh.broker.hold("router-2")
    mesh.broker.forget_absent()
    node.forget()
    mesh.broker.release("router-1")  # nobody is left who could tell it that the task has ended
    await eventually(lambda: len(node.invocations) > 1 and len(first.dispatcher) == 1)
    mesh.broker.release("router-2")
    await eventually(lambda: len(first.dispatcher) == 0)
    assert await first.reception.find_outcome(("pump-7", task)) is not None
    assert ended_once(mesh, task)


async def test_a_restarted_router_leaves_its_task_to_the_one_that_took_it_over(
    mesh: Mesh, eventually: Any
) -> None:
    node, task = await held_task(mesh, eventually)
    node.forget()
    await mesh.kill_router("router-1")
    await eventually(lambda: len(node.invocations) == 2)
    await mesh.start_router(PATIENT, name="router-1", epoch=2)
    again = mesh.routers["router-1"]
    await eventually(lambda: again.stats.given_up == 1)
    node.reply(node.invocations[1], event="result", seq=0, output="done", node="edge-1")
    await eventually(lambda: mesh.final(task))
    await mesh.broker.settle()
    assert ended_once(mesh, task)
    assert [invocation.attempt for invocation in node.invocations] == [1, 101]
    assert all(order["attempt"] < 101 for order in node.orders)
    await ask_again(mesh, eventually, task)  # the first owner knows the outcome, too
    assert len(finals(mesh, task)) == 2
    assert len(node.invocations) == 2


async def test_a_restarted_router_learns_how_its_task_ended(mesh: Mesh, eventually: Any) -> None:
    node, task = await held_task(mesh, eventually)
    await mesh.broker.settle()
    node.behaviour = answer
    node.forget()
    await mesh.kill_router("router-1")
    await eventually(lambda: mesh.final(task))
    mesh.broker.forget_absent()  # nor does the broker tell it
    again = await mesh.start_router(PATIENT, name="router-1", epoch=2)
    await eventually(lambda: len(again.dispatcher) == 0)
    await mesh.broker.settle()
    assert ended_once(mesh, task)
    assert len(node.invocations) == 2
    await ask_again(mesh, eventually, task)
    assert len(node.invocations) == 2


async def test_a_restarted_router_is_told_of_ends_that_only_a_journal_knows(
    mesh: Mesh, eventually: Any
) -> None:
    node, task = await held_task(mesh, eventually)
    await mesh.broker.settle()
    node.behaviour = answer
    node.forget()
    await mesh.kill_router("router-1")
    await eventually(lambda: mesh.final(task))
    await mesh.broker.settle()
    await mesh.kill_router("router-2")
    mesh.broker.forget_absent()
    await mesh.start_router(PATIENT, name="router-2", epoch=2)
    node.behaviour = admit  # who asks it once more gets no answer in a hurry
    again = await mesh.start_router(PATIENT, name="router-1", epoch=2)
    await eventually(lambda: len(again.dispatcher) == 0)
    await mesh.broker.settle()
    assert ended_once(mesh, task)
    assert len(node.invocations) == 2


async def test_a_router_hears_what_waited_for_it_before_it_takes_a_task_over(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1")
    await start_both(mesh, eventually, PATIENT)
    await mesh.kill_router("router-2")  # the broker keeps its session
    tasks = [*owned_by("router-1", 3), *owned_by("router-2", 3)]
    for task in tasks:
        mesh.submit(id=task, function="echo")
        await eventually(lambda task=task: mesh.final(task))
    await mesh.broker.settle()
    await mesh.kill_router("router-1")
    late = await mesh.start_router(PATIENT, name="router-2", epoch=2)
    await eventually(lambda: late.reception.caught_up)
    mesh.submit(id="after", function="echo")
    await eventually(lambda: mesh.final("after"))
    await mesh.broker.settle()
    assert all(ended_once(mesh, task) for task in tasks)
    assert len(node.invocations) == len(tasks) + 1


async def test_an_id_is_known_to_the_router_that_is_left(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1")
    await start_both(mesh, eventually)
    (task,) = owned_by("router-1")
    mesh.submit(id=task, function="echo")
    await eventually(lambda: mesh.final(task))
    await mesh.broker.settle()
    await mesh.kill_router("router-1")
    await mesh.stop_router("router-2")
    await mesh.start_router(SETTINGS, name="router-2", epoch=2)  # from the journal
    await ask_again(mesh, eventually, task)
    assert len(node.invocations) == 1
    assert finals(mesh, task)[0] == finals(mesh, task)[1]


async def test_an_id_is_known_to_a_router_that_came_later(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1")
    await mesh.start_router(SETTINGS, name="router-1")
    await eventually(lambda: mesh.router.reception.caught_up)
    (task,) = owned_by("router-2")
    mesh.submit(id=task, function="echo")
    await eventually(lambda: mesh.final(task))
    later = await mesh.start_router(SETTINGS, name="router-2")
    await eventually(lambda: mesh.router.book.order(f"pump-7/{task}")[0] == "router-2")
    await eventually(lambda: later.reception.caught_up)
    node.behaviour = say_nothing
    await ask_again(mesh, eventually, task)
    assert finals(mesh, task)[0] == finals(mesh, task)[1]
    assert len(later.dispatcher) == 0
    assert all(order["reason"] == "superseded" for order in node.orders)


async def test_of_two_routers_that_did_not_see_each_other_one_keeps_the_task(
    mesh: Mesh, eventually: Any
) -> None:
    node, task = await held_task(mesh, eventually)
    node.forget()
    mesh.broker.hold("router-1")  # it lives on and thinks the task its own
    await eventually(lambda: len(node.invocations) == 2)
    mesh.broker.release("router-1")
    await eventually(lambda: mesh.routers["router-1"].stats.given_up == 1)
    assert len(mesh.routers["router-1"].dispatcher) == 0
    late = node.invocations[1]
    assert late.attempt == 101
    assert late.router == "router-2"
    node.reply(late, event="result", seq=0, output="done", node="edge-1")
    await eventually(lambda: mesh.final(task))
    await mesh.broker.settle()
    assert ended_once(mesh, task)
    assert len(node.invocations) == 2


async def given_up_task(mesh: Mesh, eventually: Any) -> tuple[ScriptedNode, str]:
    """Have router-1 leave a task to router-2 which has it from attempt 101 on, and then be gone."""
    node, task = await held_task(mesh, eventually)
    node.forget()
    mesh.broker.hold("router-1")
    await eventually(lambda: len(node.invocations) == 2)
    mesh.broker.release("router-1")
    await eventually(lambda: mesh.routers["router-1"].stats.given_up == 1)
    await mesh.broker.settle()
    await mesh.stop_router("router-1")
    mesh.broker.forget_absent()
    return node, task


async def test_a_task_given_up_is_not_taken_back_by_a_restart(mesh: Mesh, eventually: Any) -> None:
    node, task = await given_up_task(mesh, eventually)
    before = len(node.invocations)
    again = await mesh.start_router(PATIENT, name="router-1", epoch=2)
    assert len(again.dispatcher) == 0
    shadow = again.reception.shadows.get(("pump-7", task))
    assert shadow is not None
    assert shadow.claim == Claim("router-2", 101)
    await know_each_other(mesh, eventually)
    answer(node, node.invocations[1])
    await eventually(lambda: mesh.final(task))
    await no_shadow_is_left(mesh, eventually)
    assert ended_once(mesh, task)
    assert len(node.invocations) == before


async def test_a_restarted_router_asks_how_the_task_ended_that_it_had_given_up(
    mesh: Mesh, eventually: Any
) -> None:
    node, task = await given_up_task(mesh, eventually)
    answer(node, node.invocations[1])
    await eventually(lambda: len(mesh.routers["router-2"].dispatcher) == 0)
    await mesh.broker.settle()
    await mesh.kill_router("router-2")  # nor does it remember whose the task was
    await mesh.start_router(PATIENT, name="router-2", epoch=2)
    again = await mesh.start_router(PATIENT, name="router-1", epoch=2)
    await no_shadow_is_left(mesh, eventually)
    outcome = await again.reception.find_outcome(("pump-7", task))
    assert outcome is not None
    assert outcome.attempt == 101
    assert ended_once(mesh, task)


async def test_a_task_given_up_is_taken_over_when_the_other_router_is_gone_too(
    mesh: Mesh, eventually: Any
) -> None:
    node, task = await given_up_task(mesh, eventually)
    await mesh.kill_router("router-2")
    node.behaviour = answer
    node.forget()
    await mesh.start_router(SETTINGS, name="router-1", epoch=2)
    await eventually(lambda: mesh.final(task), timeout_s=60)
    await mesh.broker.settle()
    assert ended_once(mesh, task)
    assert all(invocation.attempt > 200 for invocation in node.invocations[2:])


async def test_a_router_that_asks_nodes_in_a_later_generation_has_the_task(
    mesh: Mesh, eventually: Any
) -> None:
    node, task = await held_task(mesh, eventually)
    reply = node.invocations[0].reply
    routed = {"task": task, "event": "routed", "at": now_ms(), "node": "edge-1"}
    routed |= {"function": "echo", "version": "1.0.0", "score": 1.0, "reason": "x"}
    other = await mesh.session("router-2-by-hand")
    for attempt, given_up in ((1, 0), (101, 1)):  # no `accepted` of it was heard
        word = json.dumps({"v": 1, **routed, "attempt": attempt}).encode()
        other.post(f"{reply}/router-2", word)
        await mesh.broker.settle()
        assert mesh.routers["router-1"].stats.given_up == given_up


async def test_an_end_that_a_router_repeats_counts_before_the_router_is_known(
    mesh: Mesh, eventually: Any
) -> None:
    await mesh.start_router(PATIENT)
    await mesh.stop_router()
    other = await mesh.session("router-2-by-hand")
    base = {"v": 1, "task": "t", "at": now_ms(), "attempt": 1}
    run = {"node": "edge-1", "function": "echo", "version": "1.0.0"}
    for word in (
        {"event": "accepted", "router": "router-2", "deadline": now_ms() + 60_000},
        {"event": "routed", **run, "score": 1.0, "reason": "x"},
        {"event": "result", **run, "seq": 0, "output": "done"},
    ):
        other.post("foam/v1/local/reply/pump-7/t/router-2", json.dumps(base | word).encode())
    await mesh.broker.settle()  # it waits for router-1, which does not know the other one yet
    again = await mesh.start_router(PATIENT, epoch=2)
    await eventually(lambda: again.reception.caught_up)
    outcome = await again.reception.find_outcome(("pump-7", "t"))
    assert outcome is not None
    assert outcome.attempt == 1


async def test_a_task_that_others_must_have_ended_leaves_the_journal(
    mesh: Mesh, eventually: Any
) -> None:
    long_ago = now_ms() - 600_000
    task = Entry("pump-7", "t", b'{"v":1,"text":"x"}', "r", long_ago, long_ago + 1_000)
    async with Ledger(path=mesh.path / "router-1.sqlite") as ledger:
        await ledger.journal(task)
        ledger.note_claim(task.key, "router-9", 101)
        assert len(await ledger.unfinished()) == 1
    router = await mesh.start_router(SETTINGS)
    assert len(router.dispatcher) == 0
    router.reception.sweep()
    assert len(router.reception.shadows) == 0
    await mesh.stop_router()
    async with Ledger(path=mesh.path / "router-1.sqlite") as ledger:
        assert await ledger.unfinished() == []


async def test_a_cancellation_reaches_whoever_takes_the_task_over(
    mesh: Mesh, eventually: Any
) -> None:
    _, task = await held_task(mesh, eventually)
    await mesh.broker.settle()
    mesh.broker.hold("router-1")
    mesh.tell(TopicKind.CANCEL, task=task)
    await eventually(lambda: mesh.final(task))
    final = mesh.final(task)
    assert final is not None
    assert final["code"] == "cancelled"
    assert ended_once(mesh, task)


async def test_a_node_cannot_pass_for_a_router(mesh: Mesh, eventually: Any) -> None:
    node, task = await held_task(mesh, eventually)
    invocation = node.invocations[0]
    node.reply(invocation, event="accepted", router="edge-1", deadline=9, attempt=201)
    await mesh.broker.settle()
    assert mesh.routers["router-1"].stats.given_up == 0
    answer(node, invocation)
    await eventually(lambda: mesh.final(task))
    assert ended_once(mesh, task)


async def test_routers_are_listed(mesh: Mesh, eventually: Any) -> None:
    await start_both(mesh, eventually)
    output = (await mesh.admin(eventually, "routers"))["output"]
    assert [(row["router"], row["live"]) for row in output["routers"]] == [
        ("router-1", True),
        ("router-2", True),
    ]


async def test_every_task_ends_once_while_routers_come_and_go(mesh: Mesh, eventually: Any) -> None:
    nodes: list[ScriptedNode] = [await mesh.node(name) for name in ("edge-1", "edge-2")]
    await start_both(mesh, eventually, PATIENT)
    tasks: list[str] = []
    for turn in range(6):
        victim = ROUTERS[turn % 2]
        await know_each_other(mesh, eventually)
        for number in range(10):
            tasks.append(f"turn-{turn}-{number}")
            mesh.submit(id=tasks[-1], function="echo", stream=False)
        await mesh.kill_router(victim)
        for number in range(10):
            tasks.append(f"turn-{turn}-b-{number}")
            mesh.submit(id=tasks[-1], function="echo", stream=False)
        await mesh.start_router(PATIENT, name=victim, epoch=turn + 2)
    for task in tasks:
        await eventually(lambda task=task: mesh.final(task), timeout_s=30)
    await mesh.broker.settle()
    # A router that was away repeats an end, so that nobody has passed it over: the very same one.
    ends = {task: {json.dumps(final) for final in finals(mesh, task)} for task in tasks}
    assert [task for task in tasks if len(ends[task]) != 1] == []
    assert all(mesh.final(task)["event"] == "result" for task in tasks)  # type: ignore[index]
    assert sum(len(node.invocations) for node in nodes) >= len(tasks)


# ---- what holds for a task holds at whoever takes it over


async def test_a_members_task_stays_with_its_tenant(mesh: Mesh, eventually: Any) -> None:
    def offer(node: str, tenant: str) -> Any:
        return make_record(mesh.words, node, policy=CapabilityPolicy(tenant=tenant))

    state = TrustState(
        member="pump-7", state="trusted", at=1_000, registry="registry-1", tenant="acme"
    )
    topic = mesh.topics.build(TopicKind.TRUST, member="pump-7")
    mesh.client.post(topic, encode(sign(state, REGISTRY_KEY)), retain=True)
    mesh.registry_key = REGISTRY_KEY
    first = await mesh.node("edge-1", say_nothing, offer("edge-1", "acme"))
    await start_both(mesh, eventually, PATIENT, lambda _: {"book": make_book(now_ms)})
    (task,) = owned_by("router-1")
    mesh.submit(id=task, function="echo")
    await eventually(lambda: first.invocations)
    others = await mesh.node("edge-2", answer, offer("edge-2", "bolt"))
    own = await mesh.node("edge-3", answer, offer("edge-3", "acme"))
    await mesh.kill_router("router-1")
    first.be("offline")
    await eventually(lambda: mesh.final(task))
    await mesh.broker.settle()
    assert ended_once(mesh, task)
    assert [invocation.router for invocation in own.invocations] == ["router-2"]
    assert others.invocations == []


async def test_a_task_counts_where_it_is(mesh: Mesh, eventually: Any, tmp_path: Path) -> None:
    def quotas(_: str) -> dict[str, Any]:
        file = QuotaFile(tmp_path / "quotas.toml")
        file.load()
        return {"quotas": file}

    async def code(task: str) -> str | None:
        mesh.submit(id=task, function="echo")
        await eventually(lambda: mesh.final(task) or "routed" in mesh.kinds(task))
        final = mesh.final(task)
        return final["code"] if final else None

    (tmp_path / "quotas.toml").write_text("[client.pump-7]\nconcurrent = 1\n")
    node = await mesh.node("edge-1", admit)
    await start_both(mesh, eventually, PATIENT, quotas)
    task, fourth = owned_by("router-1", 2)
    second, third = owned_by("router-2", 2)
    mesh.submit(id=task, function="echo")
    await eventually(lambda: node.invocations)
    node.forget()
    mesh.broker.hold("router-1")  # it lives on and thinks the task its own
    await eventually(lambda: len(node.invocations) == 2)
    assert await code(second) == "overloaded"  # the one it has taken over counts
    mesh.broker.release("router-1")
    await eventually(lambda: mesh.routers["router-1"].stats.given_up == 1)
    await know_each_other(mesh, eventually)
    assert await code(fourth) is None  # the one it has given up does not
    answer(node, node.invocations[1])
    await eventually(lambda: mesh.final(task))
    assert await code(third) is None


async def test_what_a_router_says_is_signed_by_it(mesh: Mesh, eventually: Any) -> None:
    signers = {name: make_signer(name, "router", now=now_ms()) for name in ROUTERS}
    node, _ = await held_task(mesh, eventually, more=lambda name: {"signer": signers[name]})
    node.forget()
    mesh.broker.hold("router-1")
    await eventually(lambda: len(node.invocations) == 2)
    mesh.broker.release("router-1")  # it gives the task up, and calls off what it had begun
    await eventually(lambda: [order["reason"] for order in node.orders] == ["superseded"])
    assert [invocation.router for invocation in node.invocations] == [*ROUTERS]
    for kind, sender in ((TopicKind.INVOKE, "router"), (TopicKind.CONTROL, "sender")):
        for message in mesh.broker.published(mesh.topics.build(kind, node="edge-1")):
            order = json.loads(message.payload)
            assert (order["node"], order["epoch"]) == ("edge-1", 10)
            verify(message.payload, signers[order[sender]].key.public)
    for name in ROUTERS:
        said = mesh.broker.published(mesh.topics.build(TopicKind.ROUTER_STATE, router=name))
        states = [RouterState.model_validate_json(message.payload) for message in said]
        shown = {state.passport for state in states if state.state == "birth"}
        assert shown == {signers[name].passport}


async def test_a_session_stays_with_its_node_whichever_router_has_its_tasks(
    mesh: Mesh, eventually: Any
) -> None:
    await start_both(mesh, eventually, PATIENT)
    await mesh.node("edge-2", answer)
    (first,) = owned_by("router-1")
    mesh.submit(id=first, function="echo", session="s")
    await eventually(lambda: mesh.final(first))
    await mesh.node("edge-1", answer)

    async def asked(task: str, **fields: Any) -> str:
        mesh.submit(id=task, function="echo", **fields)
        await eventually(lambda: mesh.final(task))
        final = mesh.final(task)
        return str(final and final["node"])

    second, third = owned_by("router-2", 2)
    assert await asked(second) == "edge-1"
    assert await asked(third, session="s") == "edge-2"
