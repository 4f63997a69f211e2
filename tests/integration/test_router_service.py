"""A router over a session in memory, with nodes that do what the test says."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from broker.session.base import Message
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.ids import now_ms
from capability_schemas.topics import TopicKind, Topics
from router import Ledger
from router.entry import Entry
from router.events import Phase
from support.capabilities import make_record
from support.scripted_mesh import (
    QUICK,
    Mesh,
    admit,
    answer,
    begin,
    refuse,
    say_nothing,
)


@pytest.fixture
async def mesh(tmp_path: Path, topics: Topics) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack, tmp_path, topics)
        await mesh.start_client()
        await mesh.start_router()
        yield mesh
        await mesh.stop_router()


async def test_a_task_is_accepted_routed_and_streamed(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1")
    mesh.submit(id="t", text="echo this text")
    await eventually(lambda: mesh.final("t"))
    assert mesh.kinds("t") == ["accepted", "routed", "chunk", "chunk", "result"]
    routed = mesh.of("t")[1]
    assert (routed["node"], routed["function"], routed["attempt"]) == ("edge-1", "echo", 1)
    assert node.invocations[0].text == "echo this text"
    sources = [topic.rpartition("/")[2] for topic, _ in mesh.events]
    assert sources == ["router-1", "router-1", "edge-1", "edge-1", "edge-1"]
    await eventually(lambda: len(mesh.router.dispatcher) == 0)
    assert mesh.router.stats.ended == {"result": 1}
    assert mesh.router.fleet.node("edge-1").assigned == 0


async def test_a_plain_text_task_and_a_named_function(mesh: Mesh, eventually: Any) -> None:
    await mesh.node("edge-1")
    mesh.send(b"echo this text")
    mesh.submit(id="named", function="echo@>=1", input={"x": 1})
    await eventually(lambda: mesh.router.stats.ended["result"] == 2)
    await eventually(lambda: mesh.final("named"))
    assert mesh.words.encoded.count("echo this text") >= 1


async def test_one_result_and_no_chunks_when_no_stream_is_wanted(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1")
    mesh.submit(id="t", function="echo", stream=False)
    await eventually(lambda: mesh.final("t"))
    assert mesh.kinds("t") == ["accepted", "routed", "result"]
    assert not node.invocations[0].stream


async def test_reply_to_moves_all_events(mesh: Mesh, eventually: Any) -> None:
    await mesh.node("edge-1")
    mesh.submit(id="t", function="echo", reply_to="reply/pump-7/inbox")
    await eventually(lambda: mesh.final("t"))
    assert {topic.split("/")[5] for topic, _ in mesh.events} == {"inbox"}


async def test_a_repeated_id_gets_the_same_outcome_and_runs_nothing(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1")
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.final("t"))
    mesh.submit(id="t", function="echo", input={"other": "content"})
    mesh.send(b'{"id": "t", "text": ""}')
    await eventually(lambda: mesh.kinds("t").count("result") == 3)
    assert len(node.invocations) == 1
    repeats = [event for event in mesh.of("t") if event["event"] == "result"]
    assert repeats[0] == repeats[1] == repeats[2]
    assert mesh.events[-1][0].endswith("/router-1")


async def test_a_repeated_id_of_a_running_task_is_accepted_again_only(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1", admit)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: node.invocations)
    mesh.submit(id="t", function="echo")
    mesh.send(b'{"id": "t", "text": ""}')
    await eventually(lambda: mesh.kinds("t").count("accepted") == 3)
    assert mesh.kinds("t").count("routed") == 1
    assert mesh.final("t") is None
    assert len(node.invocations) == 1


async def test_a_task_the_broker_kept_runs_once_however_often_the_router_starts(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1")
    topic = mesh.topics.build(TopicKind.TASK, client="pump-7")
    mesh.client.post(topic, b'{"text": "echo this text"}', retain=True)
    await eventually(lambda: mesh.router.stats.ended["result"] == 1)
    for _ in range(2):
        await mesh.stop_router()
        await mesh.start_router()
    mesh.submit(id="later", function="echo")
    await eventually(lambda: mesh.final("later"))
    assert len(node.invocations) == 2
    assert mesh.router.stats.dropped["retained"] == 1


async def test_tasks_that_waited_for_the_router_are_judged_with_the_mesh_known(
    mesh: Mesh, eventually: Any
) -> None:
    await mesh.node("edge-1")
    record = mesh.broker.retained.pop("foam/v1/local/catalog/edge-1/echo")
    await mesh.stop_router()
    mesh.submit(id="waited", text="echo this text")
    await mesh.start_router(QUICK.model_copy(update={"settle_ms": 5_000}))
    await eventually(lambda: mesh.kinds("waited") == ["accepted"])
    mesh.client.post(record.topic, record.payload, retain=True)
    await eventually(lambda: mesh.final("waited"))
    assert mesh.kinds("waited") == ["accepted", "routed", "chunk", "chunk", "result"]


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b'{"id": "ask", "verb": "nodes", "args": [1]}', "args"),
        (b'{"id": "ask"}', "verb"),
        (b'{"id": "ask", "verb": 5}', "verb"),
    ],
)
async def test_a_malformed_admin_request_is_answered(
    mesh: Mesh, eventually: Any, payload: bytes, field: str
) -> None:
    mesh.client.post("foam/v1/local/admin/router-1/pump-7", payload)
    await eventually(lambda: mesh.final("ask"))
    answer = mesh.final("ask")
    assert answer is not None
    assert (answer["code"], answer["detail"]["field"]) == ("invalid_task", field)


async def test_explain_tells_how_a_past_task_was_routed(mesh: Mesh, eventually: Any) -> None:
    await mesh.node("edge-1")
    mesh.submit(id="t", text="echo this text")
    await eventually(lambda: mesh.router.stats.ended["result"] == 1)
    answer = await mesh.admin(eventually, "explain", task="t")
    assert answer["output"]["outcome"] == "result"
    assert answer["output"]["explanation"]["chosen"] == ["edge-1", "echo"]


async def test_an_unknown_function_is_answered_with_the_nearest_names(
    mesh: Mesh, eventually: Any
) -> None:
    await mesh.node("edge-1")
    mesh.submit(id="t", function="weld")
    await eventually(lambda: mesh.final("t"))
    error = mesh.final("t")
    assert error is not None
    assert [miss["function"] for miss in error["detail"]["nearest"]] == ["echo"]
    assert "did you mean" not in error["message"]


async def test_outcomes_outlive_the_router(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1")
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.router.stats.ended["result"] == 1)
    await mesh.stop_router()
    mesh.events.clear()
    await mesh.start_router()
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.kinds("t") == ["result"])
    mesh.tell(TopicKind.RESUME, task="t", from_seq=0)
    await eventually(lambda: mesh.kinds("t") == ["result", "chunk", "chunk", "result"])
    assert len(node.invocations) == 1


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b'{"id": "t", "text": "x", "nonsense": 1}', "invalid_task"),
        (b'{"id": "t", "text": "x", "reply_to": "reply/other/x"}', "invalid_task"),
        (b'{"id": "t", "function": "echo@latest"}', "invalid_task"),
        (b'{"id": "t", "text": "x", "timeout_ms": 0}', "deadline_exceeded"),
        (b'{"id": "t", "function": "ecko"}', "no_capable_node"),
        (b'{"id": "t", "function": "echo@>=9"}', "no_capable_node"),
        (b'{"id": "t", "text": "zzz qqq"}', "no_capable_node"),
        (b'{"id": "t", "function": "echo", "policy": {"grants": ["g"]}}', "policy_denied"),
    ],
)
async def test_what_cannot_be_done_ends_in_one_clear_error(
    mesh: Mesh, eventually: Any, payload: bytes, code: str
) -> None:
    node = await mesh.node("edge-1")
    mesh.send(payload)
    await eventually(lambda: mesh.final("t"))
    await mesh.broker.settle()
    final = mesh.final("t")
    assert final is not None
    assert final["code"] == code
    assert mesh.kinds("t").count("error") == 1
    assert not node.invocations
    if code == "no_capable_node":
        assert final["detail"]["nearest"][0]["function"] == "echo"


@pytest.mark.parametrize("payload", [b"\xff", b"", b"{", b"x" * (1024 * 1024 + 1)])
async def test_what_cannot_be_read_is_answered_under_a_new_id(
    mesh: Mesh, eventually: Any, payload: bytes
) -> None:
    mesh.send(payload)
    await eventually(lambda: mesh.events)
    assert mesh.events[0][1]["code"] == ("too_large" if len(payload) > 9 else "invalid_task")


async def test_an_input_that_the_schema_refuses_is_told_with_its_path(
    mesh: Mesh, eventually: Any
) -> None:
    schema = {"type": "object", "properties": {"rpm": {"type": "number"}}, "required": ["rpm"]}
    await mesh.node("edge-1", answer, make_record(mesh.words, "edge-1", input_schema=schema))
    mesh.submit(id="t", function="echo", input={"rpm": "fast"})
    await eventually(lambda: mesh.final("t"))
    final = mesh.final("t")
    assert final is not None
    assert final["code"] == "invalid_task"
    assert final["detail"]["field"] == "input.rpm"


async def test_a_refusal_goes_to_the_next_node(mesh: Mesh, eventually: Any) -> None:
    await mesh.node("edge-1", refuse)
    await mesh.node("edge-2")
    mesh.submit(id="t", text="echo this text")
    await eventually(lambda: mesh.final("t"))
    assert mesh.kinds("t") == ["accepted", "routed", "routed", "chunk", "chunk", "result"]
    assert [event["attempt"] for event in mesh.of("t")[1:3]] == [1, 2]


async def test_without_a_waiting_room_a_full_mesh_says_when_to_come_back(
    mesh: Mesh, eventually: Any
) -> None:
    await mesh.stop_router()
    await mesh.start_router(QUICK.model_copy(update={"waiting_limit": 0}))
    node = await mesh.node("edge-1")
    node.load(running=1, capacity=1, queued=2, queue_limit=2)
    await mesh.broker.settle()
    mesh.submit(id="t", text="echo this text")
    await eventually(lambda: mesh.final("t"))
    final = mesh.final("t")
    assert final is not None
    assert final["code"] == "overloaded"
    assert final["retry_after_ms"] > 0
    assert not node.invocations


async def test_a_silent_node_is_superseded(mesh: Mesh, eventually: Any) -> None:
    silent = await mesh.node("edge-1", say_nothing)
    await mesh.node("edge-2")
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.final("t"))
    assert [event["node"] for event in mesh.of("t") if event["event"] == "routed"] == [
        "edge-1",
        "edge-2",
    ]
    await eventually(lambda: silent.orders)
    assert (silent.orders[0]["verb"], silent.orders[0]["reason"]) == ("cancel", "superseded")
    assert mesh.of("t")[-1]["attempt"] == 2


async def test_a_node_that_dies_in_mid_answer_is_a_clear_end(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1", begin)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: "chunk" in mesh.kinds("t"))
    await mesh.broker.settle()
    node.be("offline")
    await eventually(lambda: mesh.final("t"))
    final = mesh.final("t")
    assert final is not None
    assert (final["code"], final["seq"], final["retryable"]) == ("node_lost", 1, True)


async def test_a_node_whose_heartbeats_stop_is_lost(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1", admit)
    await mesh.node("edge-2")
    mesh.submit(id="t", function="echo")
    await eventually(lambda: node.invocations)
    await mesh.broker.settle()
    mesh.router.fleet.node("edge-1").pulse.seen_at -= 3 * 60_000 + 1
    await eventually(lambda: mesh.final("t"))
    assert mesh.of("t")[-1]["event"] == "result"


async def test_a_cancelled_task_ends_whatever_the_node_does(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1", begin)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: "chunk" in mesh.kinds("t"))
    mesh.tell(TopicKind.CANCEL, task="t")
    await eventually(lambda: mesh.final("t"))
    final = mesh.final("t")
    assert final is not None
    assert (final["code"], final["seq"]) == ("cancelled", 1)
    assert node.orders[0]["reason"] == "client"


async def test_a_deadline_ends_a_task_and_cancels_the_node(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1", admit)
    mesh.submit(id="t", function="echo", timeout_ms=80)
    await eventually(lambda: mesh.final("t"))
    final = mesh.final("t")
    assert final is not None
    assert final["code"] == "deadline_exceeded"
    assert node.orders[0]["reason"] == "deadline"


async def test_missed_events_are_repeated_on_request(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1", begin)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: "chunk" in mesh.kinds("t"))
    await mesh.broker.settle()
    mesh.tell(TopicKind.RESUME, task="t", from_seq=0)
    await eventually(lambda: mesh.kinds("t").count("chunk") == 2)
    assert mesh.events[-1][0].endswith("/router-1")
    node.reply(node.invocations[0], event="result", seq=1, output="hel")
    await eventually(lambda: mesh.final("t"))
    await eventually(lambda: len(mesh.router.dispatcher) == 0)
    mesh.tell(TopicKind.RESUME, task="t", from_seq=1)
    await eventually(lambda: mesh.kinds("t").count("result") == 2)
    assert mesh.kinds("t").count("chunk") == 2
    mesh.tell(TopicKind.RESUME, task="stranger", from_seq=0)
    await mesh.broker.settle()
    assert mesh.of("stranger") == []


async def test_only_the_node_that_holds_the_task_counts(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1", admit)
    other = await mesh.node("edge-2", answer, make_record(mesh.words, "edge-2", "other"))
    mesh.submit(id="t", function="echo")
    await eventually(lambda: node.invocations)
    other.reply(node.invocations[0], event="result", seq=0, output="mine!")
    await mesh.broker.settle()
    assert len(mesh.router.dispatcher) == 1


async def test_live_tasks_are_bounded(mesh: Mesh, eventually: Any) -> None:
    await mesh.stop_router()
    await mesh.start_router(QUICK.model_copy(update={"live_limit": 1}))
    await mesh.node("edge-1", admit)
    mesh.submit(id="a", function="echo")
    mesh.submit(id="b", function="echo")
    await eventually(lambda: mesh.final("b"))
    final = mesh.final("b")
    assert final is not None
    assert (final["code"], final["retryable"]) == ("overloaded", True)
    assert mesh.final("a") is None


async def test_a_full_ledger_refuses_tasks_aloud(mesh: Mesh, eventually: Any) -> None:
    await mesh.stop_router()
    await mesh.start_router(QUICK.model_copy(update={"ledger_bytes": 128 * 1024}))
    node = await mesh.node("edge-1", admit)
    mesh.submit(id="big", function="echo", input={"x": "y" * 200_000})
    await eventually(lambda: mesh.final("big"))
    final = mesh.final("big")
    assert final is not None
    assert (final["code"], final["retry_after_ms"]) == ("overloaded", 5000)
    assert "accepted" not in mesh.kinds("big")
    assert not node.invocations
    mesh.submit(id="small", function="echo")
    await eventually(lambda: "accepted" in mesh.kinds("small"))


async def test_a_restarted_router_runs_again_what_its_node_has_forgotten(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1", admit)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: node.invocations)
    await mesh.broker.settle()
    await mesh.stop_router()
    node.behaviour = answer
    node.forget()
    await mesh.start_router()
    await eventually(lambda: mesh.final("t"))
    assert mesh.of("t")[-1]["event"] == "result"
    first, second = node.invocations
    assert first.attempt == 1
    assert second.attempt > 1


async def test_a_restarted_router_leaves_a_task_to_the_node_that_runs_it(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1", admit)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: node.invocations)
    await mesh.broker.settle()
    await mesh.stop_router()
    await mesh.start_router()
    (live,) = mesh.router.dispatcher
    await eventually(lambda: live.machine.phase is Phase.ADMITTED)
    node.reply(node.invocations[0], event="result", seq=0, output="done")
    await eventually(lambda: mesh.final("t"))
    assert len(node.invocations) == 1
    assert not node.orders


async def test_a_router_whose_session_was_not_kept_asks_for_the_end_it_missed(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1", admit)
    mesh.submit(id="t", function="echo", timeout_ms=400)
    await eventually(lambda: node.invocations)
    await mesh.kill_router("router-1")
    node.reply(node.invocations[0], event="result", seq=0, output="done")
    await eventually(lambda: mesh.final("t"))
    mesh.broker.forget_absent()
    await mesh.start_router(epoch=2)
    await eventually(lambda: not len(mesh.router.dispatcher))
    await mesh.broker.settle()
    finals = [event for event in mesh.of("t") if event["event"] in {"result", "error"}]
    assert {json.dumps(event) for event in finals} == {json.dumps(finals[0])}
    assert len(node.invocations) == 1
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.router.stats.repeated)
    assert len(node.invocations) == 1


async def test_nobody_else_is_asked_or_believed_about_a_task_without_a_node(
    mesh: Mesh, eventually: Any
) -> None:
    await mesh.stop_router()
    now, words = now_ms(), mesh.words
    task = {"id": "t", "function": "echo", "text": "private", "policy": {"zones": ["hall-3"]}}
    reply = mesh.topics.build(TopicKind.REPLY, client="pump-7", task="t", source="x")
    async with Ledger(path=mesh.path / "router-1.sqlite") as ledger:
        await ledger.journal(
            Entry(
                client="pump-7",
                task_id="t",
                task=json.dumps(task).encode(),
                reply=reply.rpartition("/")[0],
                accepted_at=now,
                deadline=now + 30_000,
            )
        )
    zone = CapabilityPolicy(zones=("hall-3",))
    right = await mesh.node("edge-1", answer, make_record(words, "edge-1", "echo", policy=zone))
    wrong = await mesh.node("edge-2", answer, make_record(words, "edge-2", "echo"))
    await mesh.start_router(QUICK.model_copy(update={"settle_ms": 500}))
    (live,) = mesh.router.dispatcher
    forged = {"v": 1, "task": "t", "event": "result", "at": 1, "attempt": 7, "seq": 0}
    topic = mesh.topics.build(TopicKind.REPLY, client="pump-7", task="t", source="edge-2")
    wrong.session.post(topic, json.dumps(forged | {"output": "forged"}).encode())
    await eventually(lambda: right.invocations)
    await eventually(lambda: live.machine.ended)
    assert live.machine.node == "edge-1"
    assert (wrong.questions, right.questions) == ([], [None])


async def test_of_many_tasks_that_waited_a_node_is_asked_in_few_orders(
    mesh: Mesh, eventually: Any
) -> None:
    await mesh.stop_router()
    now = now_ms()
    async with Ledger(path=mesh.path / "router-1.sqlite") as ledger:
        for number in range(300):
            name = f"t-{number}"
            reply = mesh.topics.build(TopicKind.REPLY, client="pump-7", task=name, source="x")
            task = json.dumps({"id": name, "function": "echo", "text": "x"}).encode()
            where = reply.rpartition("/")[0]
            await ledger.journal(Entry("pump-7", name, task, where, now, now + 60_000))
    node = await mesh.node("edge-1", answer)
    await mesh.start_router()
    await eventually(lambda: len(node.invocations) == 300, timeout_s=60.0)
    assert len(node.questions) == 2


async def test_after_an_overflow_nodes_have_time_to_answer_before_they_are_asked_again(
    mesh: Mesh, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await mesh.node("edge-1", admit)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: len(mesh.router.dispatcher))
    (live,) = mesh.router.dispatcher
    await eventually(lambda: live.machine.phase is Phase.ADMITTED)
    monkeypatch.setattr("router.dispatch._ASKED_PER_MS", 1e-5)  # as if there were many tasks
    dropped = Message(topic="x", payload=b"")
    for _ in range(3):
        mesh.router.dispatcher.overflow(dropped)
        mesh.router.dispatcher.note_progress()
        await eventually(lambda: node.questions)
        await mesh.broker.settle()
    assert node.questions == [1]


async def test_an_id_is_known_though_the_disk_is_full(mesh: Mesh, eventually: Any) -> None:
    await mesh.stop_router()
    small = {"ledger_bytes": 128 * 1024, "recent_bytes": 0}
    await mesh.start_router(QUICK.model_copy(update=small))
    node = await mesh.node("edge-1")
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.final("t"))
    mesh.submit(id="big", function="echo", input={"x": "y" * 200_000})
    await eventually(lambda: mesh.final("big"))
    mesh.submit(id="t", function="echo", input={"x": "y" * 200_000})
    await eventually(lambda: mesh.kinds("t").count("result") == 2)
    assert "error" not in mesh.kinds("t")
    assert len(node.invocations) == 1


async def test_a_restarted_router_takes_what_was_said_meanwhile(
    mesh: Mesh, eventually: Any
) -> None:
    node = await mesh.node("edge-1", begin)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: "chunk" in mesh.kinds("t"))
    await mesh.broker.settle()
    await mesh.stop_router()
    node.reply(node.invocations[0], event="result", seq=1, output="hel")
    await eventually(lambda: mesh.final("t"))
    await mesh.start_router()
    await eventually(lambda: len(mesh.router.dispatcher) == 0)
    await mesh.broker.settle()
    await eventually(lambda: mesh.kinds("t").count("result") == 2)  # nobody has passed it over
    ends = [json.dumps(event) for event in mesh.of("t") if event["event"] == "result"]
    assert ends[0] == ends[1]
    assert len(node.invocations) == 1


async def test_a_restarted_router_ends_what_is_past_its_deadline(
    mesh: Mesh, eventually: Any
) -> None:
    await mesh.node("edge-1", admit)
    mesh.submit(id="t", function="echo", timeout_ms=60)
    await eventually(lambda: "routed" in mesh.kinds("t"))
    await mesh.stop_router()
    await mesh.start_router()
    await eventually(lambda: mesh.final("t"))
    final = mesh.final("t")
    assert final is not None
    assert final["code"] == "deadline_exceeded"
    await mesh.broker.settle()
    assert mesh.kinds("t").count("error") == 1


async def test_administration(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1")
    mesh.submit(id="t", text="echo this text")
    await eventually(lambda: mesh.router.stats.ended["result"] == 1)

    functions = (await mesh.admin(eventually, "functions"))["output"]["functions"]
    assert [(row["node"], row["function"], row["live"]) for row in functions] == [
        ("edge-1", "echo", True)
    ]
    nodes = (await mesh.admin(eventually, "nodes"))["output"]["nodes"]
    assert [(row["node"], row["state"], row["functions"]) for row in nodes] == [
        ("edge-1", "birth", ["echo"])
    ]
    explained = (await mesh.admin(eventually, "explain", text="echo this text"))["output"]
    assert explained["chosen"] == ["edge-1", "echo"]
    assert explained["candidates"][0]["gates"]["schema"] == "pass"
    assert "alpha" in explained["candidates"][0]["terms"]
    stored = (await mesh.admin(eventually, "task", id="t"))["output"]
    assert stored["outcome"] == "result"
    assert stored["explanation"]["chosen"] == ["edge-1", "echo"]
    stats = (await mesh.admin(eventually, "stats"))["output"]
    assert stats["ended"] == {"result": 1}
    assert stats["route_ms"]["count"] == 1

    assert (await mesh.admin(eventually, "drain", node="edge-1"))["output"]["ordered"] == "drain"
    await eventually(lambda: [order["verb"] for order in node.orders] == ["drain"])
    for verb, args in (("reboot", {}), ("task", {"id": "no"}), ("nodes", {"x": 1})):
        assert (await mesh.admin(eventually, verb, **args))["event"] == "error"
    assert len(node.invocations) == 1


async def test_a_cordon_holds_across_a_restart(mesh: Mesh, eventually: Any) -> None:
    node = await mesh.node("edge-1")
    await mesh.admin(eventually, "cordon", node="edge-1")
    await mesh.stop_router()
    await mesh.start_router()
    mesh.submit(id="t", text="echo this text")
    await eventually(lambda: mesh.final("t"))
    final = mesh.final("t")
    assert final is not None
    assert (final["code"], final["retryable"]) == ("no_capable_node", True)
    await mesh.admin(eventually, "uncordon", node="edge-1")
    mesh.submit(id="u", text="echo this text")
    await eventually(lambda: mesh.final("u"))
    assert len(node.invocations) == 1


async def test_a_withdrawn_record_is_forgotten(mesh: Mesh, eventually: Any) -> None:
    await mesh.node("edge-1")
    topic = mesh.topics.build(TopicKind.CATALOG, node="edge-1", function="echo")
    mesh.client.post(topic, b"", retain=True)
    await mesh.broker.settle()
    mesh.submit(id="t", text="echo this text")
    await eventually(lambda: mesh.final("t"))
    final = mesh.final("t")
    assert final is not None
    assert final["code"] == "no_capable_node"


async def test_the_router_announces_itself_and_its_end(mesh: Mesh) -> None:
    topic = mesh.topics.build(TopicKind.ROUTER_STATE, router="router-1")
    assert json.loads(mesh.broker.retained[topic].payload)["state"] == "birth"
    await mesh.stop_router()
    assert json.loads(mesh.broker.retained[topic].payload)["state"] == "offline"
