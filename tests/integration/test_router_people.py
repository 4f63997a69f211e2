"""Quotas, roles and the audit trail at a router, over a session in memory."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from capability_schemas.capability import CapabilityPolicy
from capability_schemas.passport import PassportBook
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import TrustState
from capability_schemas.wire import encode
from router.entry import Entry
from router.quota import QuotaFile
from support.capabilities import make_record
from support.scripted_mesh import QUICK, Mesh, admit, answer

REGISTRY = SigningKey.generate()


class People:
    """A mesh with a registry's word on who is who."""

    def __init__(self, mesh: Mesh, quotas: Path) -> None:
        self.mesh = mesh
        self.quotas = quotas

    async def start(self, text: str = "") -> None:
        self.quotas.write_text(text)
        file = QuotaFile(self.quotas)
        file.load()
        book = PassportBook(site="local", registries={"registry-1": REGISTRY.public})
        self.mesh.registry_key = REGISTRY
        await self.mesh.start_router(QUICK, quotas=file, book=book)

    def say(self, member: str, **fields: Any) -> None:
        state = {"member": member, "state": "trusted", "at": 1_000, "registry": "registry-1"}
        payload = encode(sign(TrustState.model_validate(state | fields), REGISTRY))
        topic = self.mesh.topics.build(TopicKind.TRUST, member=member)
        self.mesh.client.post(topic, payload, retain=True)

    def told(self, action: str) -> list[dict[str, Any]]:
        """What the router has told the audit trail."""
        topic = self.mesh.topics.build(TopicKind.EVENT, source="router-1", kind="audit")
        events = [json.loads(m.payload)["data"] for m in self.mesh.broker.published(topic)]
        return [event for event in events if event["action"] == action]


@pytest.fixture
async def people(tmp_path: Path, topics: Topics) -> AsyncIterator[People]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack, tmp_path, topics)
        await mesh.start_client()
        yield People(mesh, tmp_path / "quotas.toml")
        await mesh.stop_router()


# ---- roles


async def test_an_operator_drains_and_looks_and_sets_nothing(
    people: People, eventually: Any
) -> None:
    mesh = people.mesh
    people.say("pump-7", role="operator")
    await people.start()
    node = await mesh.node("edge-1")
    assert (await mesh.admin(eventually, "drain", node="edge-1"))["event"] == "result"
    await eventually(lambda: [order["verb"] for order in node.orders] == ["drain"])
    for verb in ("nodes", "functions", "stats", "weights", "rules", "encoder", "quotas"):
        assert (await mesh.admin(eventually, verb))["event"] == "result", verb
    refused = await mesh.admin(eventually, "weights", cost=0.2)
    assert (refused["event"], refused["code"]) == ("error", "unauthorized")
    assert "needs an administrator, pump-7 is known here as operator" in refused["message"]
    assert mesh.router.routing.weights.cost != 0.2


async def test_an_administrator_is_one_by_the_registrys_word(
    people: People, eventually: Any
) -> None:
    people.say("pump-7", role="admin")
    await people.start()
    answer = await people.mesh.admin(eventually, "weights", cost=0.2)
    assert answer["output"]["weights"]["cost"]["value"] == 0.2


async def test_an_order_waits_for_the_registrys_word(people: People, eventually: Any) -> None:
    await people.start()
    asked = asyncio.create_task(people.mesh.admin(eventually, "weights", cost=0.2))
    await people.mesh.broker.settle()
    people.say("pump-7", role="admin")
    assert (await asked)["event"] == "result"


async def test_who_was_thrown_out_orders_nothing_whatever_the_broker_lets_through(
    people: People, eventually: Any
) -> None:
    people.say("pump-7", state="revoked", void_before=1_000, reason="left us")
    await people.start()
    refused = await people.mesh.admin(eventually, "nodes")
    assert "was revoked: left us" in refused["message"]


# ---- quotas


async def test_over_quota_is_told_when_to_come_back_and_gets_in_then(
    people: People, eventually: Any
) -> None:
    mesh = people.mesh
    await people.start("[default]\ntasks_per_s = 4\nburst = 2\n")
    await mesh.node("edge-1")
    for number in range(3):
        mesh.submit(id=f"t-{number}", function="echo")
    await eventually(lambda: all(mesh.final(f"t-{number}") for number in range(3)))
    refused = mesh.final("t-2")
    assert refused is not None
    assert refused["code"] == "overloaded"
    wait_ms = refused["detail"]["retry_after_ms"]
    assert 0 < wait_ms <= 250
    await asyncio.sleep(wait_ms / 1_000)
    mesh.submit(id="t-2", function="echo", input={"again": True})  # refused: it was no task yet
    await eventually(lambda: mesh.kinds("t-2")[-1] == "result")


async def test_a_repeated_id_is_no_new_task(people: People, eventually: Any) -> None:
    mesh = people.mesh
    await people.start("[default]\ntasks_per_s = 0.001\nburst = 2\n")
    node = await mesh.node("edge-1")
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.final("t"))
    for _ in range(5):
        mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.kinds("t").count("result") == 6)
    mesh.submit(id="u", function="echo")
    await eventually(lambda: mesh.final("u"))
    assert mesh.kinds("u")[-1] == "result"
    assert len(node.invocations) == 2


async def test_a_journaled_id_is_answered_although_the_quota_is_spent(
    people: People, eventually: Any
) -> None:
    mesh = people.mesh
    await people.start("[default]\ntasks_per_s = 0.001\nburst = 1\n")
    await mesh.node("edge-1")
    mesh.submit(id="t", function="echo")
    await eventually(lambda: mesh.final("t") and len(mesh.router.dispatcher) == 0)
    await mesh.stop_router()
    await people.start("[default]\ntasks_per_s = 0.001\nburst = 1\n")
    mesh.submit(id="t", function="echo")  # neither live nor recent: found as it is written
    await eventually(lambda: mesh.kinds("t").count("result") == 2)
    mesh.submit(id="u", function="echo")  # what it cost was given back
    await eventually(lambda: mesh.final("u"))
    assert mesh.kinds("u")[-1] == "result"
    await mesh.stop_router()
    await people.start("[default]\ntasks_per_s = 0.001\nburst = 1\n")
    mesh.submit(id="v", function="echo")
    mesh.submit(id="u", function="echo")  # nothing is left, but it is no new task
    await eventually(lambda: mesh.kinds("u").count("result") == 2)


async def test_tasks_at_a_time_and_cancelling_at_any_time(people: People, eventually: Any) -> None:
    mesh = people.mesh
    await people.start("[client.pump-7]\nconcurrent = 1\n")
    await mesh.node("edge-1", admit)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: "routed" in mesh.kinds("t"))
    mesh.submit(id="u", function="echo")
    await eventually(lambda: mesh.final("u"))
    assert mesh.of("u")[0]["detail"]["quota"] == "concurrent"
    mesh.tell(TopicKind.CANCEL, task="t")
    await eventually(lambda: mesh.final("t"))
    mesh.submit(id="w", function="echo")
    await eventually(lambda: "routed" in mesh.kinds("w"))
    answer = await mesh.admin(eventually, "quotas", client="pump-7")
    assert answer["output"]["clients"][0]["live"] == 1
    assert answer["output"]["clients"][0]["refused"] == 1


async def test_a_task_that_is_taken_up_while_it_is_live_counts_once(
    people: People, eventually: Any
) -> None:
    mesh = people.mesh
    await people.start("[client.pump-7]\nconcurrent = 1\n")
    node = await mesh.node("edge-1", admit)
    mesh.submit(id="t", function="echo")
    await eventually(lambda: "routed" in mesh.kinds("t"))
    live = mesh.router.dispatcher.live(("pump-7", "t"))
    assert live is not None
    entry = Entry(
        client="pump-7",
        task_id="t",
        task=encode(live.arrival.task),
        reply=live.arrival.reply,
        accepted_at=live.arrival.received_at,
        deadline=live.arrival.deadline,
    )
    node.forget()
    mesh.router.dispatcher.restore([entry], floor=101, settled=True)
    await eventually(lambda: [sent.attempt for sent in node.invocations] == [1, 101])
    node.reply(node.invocations[1], event="result", seq=0, output="done", node="edge-1")
    await eventually(lambda: mesh.final("t"))
    assert mesh.router.fleet.node("edge-1").assigned == 0
    mesh.submit(id="u", function="echo")
    await eventually(lambda: mesh.of("u"))
    assert mesh.final("u") is None


async def test_too_large_for_this_client(people: People, eventually: Any) -> None:
    mesh = people.mesh
    await people.start("[client.pump-7]\ntask_bytes = 200\n")
    await mesh.node("edge-1")
    mesh.submit(id="t", function="echo", text="x" * 300)
    await eventually(lambda: mesh.final("t"))
    assert mesh.of("t")[0]["code"] == "too_large"


async def test_an_edit_of_the_file_counts_without_a_restart(
    people: People, eventually: Any
) -> None:
    mesh = people.mesh
    await people.start()
    await mesh.node("edge-1", admit)
    people.quotas.write_text("[default]\nconcurrent = 1\n")
    await eventually(lambda: people.told("quotas_changed"))
    mesh.submit(id="t", function="echo")
    await eventually(lambda: "routed" in mesh.kinds("t"))
    mesh.submit(id="u", function="echo")
    await eventually(lambda: mesh.final("u"))
    people.quotas.write_text("[defauld]\nconcurrent = 1\n")
    await eventually(lambda: people.told("quotas_refused"))
    assert "defauld" in people.told("quotas_refused")[0]["detail"]["reason"]


# ---- the audit trail


async def test_orders_and_refusals_are_told_and_looking_is_not(
    people: People, eventually: Any
) -> None:
    mesh = people.mesh
    people.say("pump-7", role="operator")
    await people.start()
    await mesh.node("edge-1")
    await mesh.admin(eventually, "nodes")
    await mesh.admin(eventually, "cordon", node="edge-1")
    await mesh.admin(eventually, "cordon", node="edge-9")
    for _ in range(3):
        await mesh.admin(eventually, "weights", cost=0.1)
    mesh.submit(id="t", function="echo", policy={"zones": ["nowhere"]})
    await eventually(lambda: mesh.final("t"))
    await mesh.stop_router()  # what was counted is told before it ends
    (order,) = people.told("order")
    assert (order["actor"], order["subject"]) == ("pump-7", "cordon")
    assert order["detail"] == {
        "role": "operator",
        "signed": False,
        "args": {"node": "edge-1"},
    }
    (failed,) = people.told("order_failed")
    assert failed["detail"]["args"] == {"node": "edge-9"}
    (refused,) = people.told("order_refused")
    assert (refused["subject"], refused["detail"]["count"]) == ("weights", 3)
    (task,) = people.told("task_refused")
    assert (task["actor"], task["subject"]) == ("pump-7", "policy_denied")
    told = [one["number"] for action in ("order", "order_failed") for one in people.told(action)]
    assert told == [1, 2]


async def test_hundreds_of_refusals_are_one_entry(people: People, eventually: Any) -> None:
    mesh = people.mesh
    await people.start("[default]\ntasks_per_s = 0.001\nburst = 1\n")
    for number in range(500):
        mesh.submit(id=f"t-{number}", function="echo")
    await eventually(lambda: mesh.router.stats.refused["overloaded"] >= 499)
    await mesh.stop_router()
    entries = [one for one in people.told("task_refused") if one["subject"] == "overloaded"]
    assert sum(one["detail"]["count"] for one in entries) == 499
    assert len(entries) <= 3


# ---- nodes that were thrown out


async def test_the_tasks_of_a_revoked_node_go_to_another_at_once(
    people: People, eventually: Any
) -> None:
    mesh = people.mesh
    await people.start()
    nodes = [await mesh.node(name, admit) for name in ("edge-1", "edge-2")]
    mesh.submit(id="held", function="echo")
    await eventually(lambda: any(node.invocations for node in nodes))
    gone, other = sorted(nodes, key=lambda node: -len(node.invocations))
    other.behaviour = answer
    people.say(gone.node, state="revoked", at=2_000, void_before=2_000, reason="stolen")
    await eventually(lambda: mesh.final("held"))
    assert mesh.kinds("held")[-1] == "result"
    for number in range(4):
        mesh.submit(id=f"t-{number}", function="echo")
    await eventually(lambda: all(mesh.final(f"t-{number}") for number in range(4)))
    assert (len(gone.invocations), len(other.invocations)) == (1, 5)
    rows = (await mesh.admin(eventually, "nodes"))["output"]["nodes"]
    assert {row["node"]: (row["live"], row["revoked"]) for row in rows} == {
        gone.node: (False, True),
        other.node: (True, False),
    }
    told = (await mesh.admin(eventually, "explain", task={"function": "echo"}))["output"]
    gates = {one["node"]: one["gates"] for one in told["candidates"]}
    assert gates[gone.node]["liveness"] == "revoked"


async def test_a_new_enrollment_lets_a_node_in_again(people: People, eventually: Any) -> None:
    mesh = people.mesh
    people.say("edge-1", state="revoked", at=2_000, void_before=2_000)
    await people.start()
    node = await mesh.node("edge-1")
    mesh.submit(id="early", function="echo", timeout_ms=60_000)
    await eventually(lambda: mesh.final("early"))
    assert mesh.kinds("early")[-1] == "error"
    assert node.invocations == []
    people.say("edge-1", role="node", at=3_000, void_before=2_000)
    await mesh.broker.settle()
    mesh.submit(id="late", function="echo")
    await eventually(lambda: mesh.final("late"))
    assert mesh.kinds("late")[-1] == "result"


async def test_explain_asks_in_the_name_of_a_client_with_its_tenant(
    people: People, eventually: Any
) -> None:
    mesh = people.mesh
    people.say("valve-1", role="device", tenant="acme")
    await people.start()
    record = make_record(mesh.words, "edge-1", policy=CapabilityPolicy(tenant="acme"))
    await mesh.node("edge-1", admit, record)
    asked: dict[str, Any] = {"task": {"function": record.function}}
    theirs = (await mesh.admin(eventually, "explain", client="valve-1", **asked))["output"]
    assert theirs["chosen"] == ["edge-1", record.function]
    assert "apart" not in theirs
    nobodys = (await mesh.admin(eventually, "explain", **asked))["output"]
    assert nobodys["chosen"] is None
    assert nobodys["apart"] == 1
