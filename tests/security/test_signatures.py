"""A hostile broker: it reads everything, repeats, drops, alters and invents. Nothing runs by it.

The broker is the one in memory, which carries whatever it is given; the attacker posts on any topic
under any name. Router and node are the real ones.
"""

import json
from contextlib import AsyncExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.admin import AdminRequest
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Control, Invocation
from capability_schemas.node import RouterState
from capability_schemas.provenance import check_result
from capability_schemas.reply import Result
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings
from support.members import REGISTRY_KEY, make_book, make_signer
from support.scripted_mesh import Mesh

NODE = "edge-1"
COUNTING = '''
"""Leaves a mark for every run."""
import pathlib

def mark(where: str) -> str:
    with pathlib.Path(where).open("a") as file:
        file.write("x")
    return "done"
'''


class Hostile:
    """A node under attack, and everything the attacker has recorded of an honest router."""

    def __init__(self, broker, session, topics, agent, folder):
        self.broker = broker
        self.session = session
        self.topics = topics
        self.agent = agent
        self.marks = folder / "marks"
        self.router = make_signer("router-1", "router", now=now_ms())

    def show(self, signer):
        state = RouterState(
            router=signer.identity, state="birth", epoch=1, at=now_ms(), passport=signer.passport
        )
        topic = self.topics.build(TopicKind.ROUTER_STATE, router=signer.identity)
        self.session.post(topic, encode(state), retain=True)

    def order(self, **fields):
        return Invocation.model_validate(
            {
                "task": "t1", "client": "pump-7", "router": "router-1", "node": NODE,
                "epoch": self.agent.epoch, "function": "mark", "version": "1.0.0",
                "input": {"where": str(self.marks)}, "deadline": now_ms() + 60_000,
                "reply": f"{self.topics.root}/reply/pump-7/t1", "sent_at": now_ms(), **fields,
            }
        )  # fmt: skip

    def invoke(self, payload):
        self.session.post(self.topics.build(TopicKind.INVOKE, node=NODE), payload)

    def control(self, order):
        self.session.post(self.topics.build(TopicKind.CONTROL, node=NODE), encode(order))

    def runs(self):
        return len(self.marks.read_text()) if self.marks.exists() else 0

    def results(self):
        found = self.broker.published(f"{self.topics.root}/reply/pump-7/#")
        return [m.payload for m in found if json.loads(m.payload)["event"] == "result"]

    def reports(self, status):
        found = self.broker.published(f"{self.topics.root}/report/+/{NODE}")
        return [
            report
            for message in found
            if (report := json.loads(message.payload))["status"] == status
        ]


@pytest.fixture
async def attack(tmp_path, topics):
    (tmp_path / "counting.py").write_text(COUNTING)
    broker = MemoryBroker()
    function = FunctionSpec.model_validate(
        {"name": "mark", "description": "mark", "entry": f"{tmp_path}/counting.py:mark"}
    )
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(MemorySession(broker=broker, client_id=NODE))
        attacker = await enter(MemorySession(broker=broker, client_id="mallory"))
        await session.wait_connected()
        await attacker.wait_connected()
        agent = await enter(
            NodeAgent(
                session=session,
                topics=topics,
                settings=NodeSettings(node=NODE, cancel_grace_s=0.2),
                functions=(function,),
                signer=make_signer(NODE, "node", now=now_ms()),
                book=make_book(now_ms),
            )
        )
        made = Hostile(broker, attacker, topics, agent, tmp_path)
        made.show(made.router)
        await broker.settle()
        yield made


async def test_an_honest_order_runs_and_its_result_proves_itself(attack, eventually):
    attack.invoke(encode(attack.router.sign(attack.order(proof=True))))
    await eventually(attack.results, timeout_s=60)
    assert attack.runs() == 1
    result = decode(Result, attack.results()[0])
    passport = check_result(result, client="pump-7", book=make_book(now_ms))
    assert passport.identity == NODE
    state = attack.broker.retained[attack.topics.build(TopicKind.NODE_STATE, node=NODE)]
    assert json.loads(state.payload)["passport"]["identity"] == NODE


async def test_forged_orders_run_nothing(attack):
    other_node = make_signer("edge-2", "node", now=now_ms())
    device = make_signer("pump-7", "device", now=now_ms())
    honest = attack.router.sign(attack.order(task="t0", node="edge-2"))
    forged = [
        attack.order(),
        sign(attack.order(), SigningKey.generate()),
        other_node.sign(attack.order()),
        other_node.sign(attack.order(router="edge-2")),
        device.sign(attack.order(router="pump-7")),
        honest,
        honest.model_copy(update={"node": NODE}),
        attack.router.sign(attack.order(sent_at=now_ms() - 400_000)),
        attack.router.sign(attack.order(sent_at=now_ms() + 400_000)),
        attack.router.sign(attack.order(epoch=attack.agent.epoch - 1)),
        attack.router.sign(attack.order(node=None)),
    ]
    attack.show(other_node)
    attack.show(device)
    for order in forged:
        attack.invoke(encode(order))
    await attack.broker.settle()
    assert attack.runs() == 0
    assert not attack.reports("admitted")
    assert attack.agent.counters.finished == 0
    assert sum(attack.agent.refused.values()) >= len(forged)
    assert {report["code"] for report in attack.reports("refused")} == {"unauthorized"}


async def test_a_recorded_order_runs_once_however_often_it_is_repeated(attack, eventually):
    payload = encode(attack.router.sign(attack.order()))
    attack.invoke(payload)
    await eventually(attack.results, timeout_s=60)
    for _ in range(20):
        attack.invoke(payload)
    await attack.broker.settle()
    assert attack.runs() == 1
    assert attack.agent.counters.duplicates == 20


async def test_a_repeated_order_does_not_run_when_its_outcome_is_forgotten(attack, eventually):
    first = encode(attack.router.sign(attack.order()))
    attack.invoke(first)
    await eventually(attack.results, timeout_s=60)
    attack.agent._executor._outcomes._limit = 0  # the memory of outcomes is small and busy
    attack.invoke(encode(attack.router.sign(attack.order(task="t2"))))
    await eventually(lambda: len(attack.results()) == 2, timeout_s=60)
    attack.invoke(first)
    await attack.broker.settle()
    assert attack.runs() == 2


async def test_orders_to_drain_are_checked_too(attack, eventually):
    plain = Control(verb="drain", reason="hostile")
    honest = attack.router.sign(
        Control(
            verb="drain",
            sender="router-1",
            node=NODE,
            epoch=attack.agent.epoch,
            sent_at=now_ms(),
            nonce="n1",
        )
    )
    for order in (plain, honest.model_copy(update={"nonce": "n2"})):
        attack.control(order)
    await attack.broker.settle()
    assert attack.agent.refused["control"] == 2
    attack.control(honest)
    await eventually(lambda: _presence(attack) == "draining", timeout_s=30)
    attack.agent.undrain()
    attack.control(honest)  # recorded, and sent again
    await attack.broker.settle()
    assert _presence(attack) == "birth"


def _presence(attack):
    topic = attack.topics.build(TopicKind.NODE_STATE, node=NODE)
    return json.loads(attack.broker.retained[topic].payload)["state"]


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
async def test_no_flipped_cut_or_spliced_order_runs(attack, data):
    """Of a genuine order to another node, bent at will; the genuine one is never delivered."""
    payload = encode(attack.router.sign(attack.order(node="edge-2")))
    bent = bytearray(payload)
    at = data.draw(st.integers(0, len(bent) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "node", "repeat"])):
        case "flip":
            bent[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del bent[at:]
        case "node":
            bent[:] = payload.replace(b'"edge-2"', b'"edge-1"')
        case _:
            bent[at:at] = bent[at:]
    attack.invoke(bytes(bent))
    await attack.broker.settle()
    assert attack.runs() == 0
    assert not attack.reports("admitted")


# ---- a router that is asked to administrate


@pytest.fixture
async def mesh(tmp_path, topics):
    async with AsyncExitStack() as stack:
        made = Mesh(stack, tmp_path, topics)
        made.registry_key = REGISTRY_KEY
        await made.start_client("admin-1")
        yield made
        await made.stop_router()


async def _ask(mesh, eventually, request):
    topic = mesh.topics.build(TopicKind.ADMIN, target="router-1", client="admin-1")
    mesh.client.post(topic, encode(request))
    await eventually(lambda: mesh.final(request.id), timeout_s=30)
    return mesh.final(request.id)


def _request(signer=None, **fields):
    now = now_ms()
    made = AdminRequest.model_validate(
        {"id": "q1", "verb": "stats", "sender": "admin-1", "target": "router-1", "sent_at": now}
        | ({"passport": signer.passport} if signer is not None else {})
        | fields
    )
    return signer.sign(made) if signer is not None else made


async def test_a_router_that_does_not_trust_its_broker(mesh, eventually):
    admin = make_signer("admin-1", "admin", now=now_ms())
    router = make_signer("router-1", "router", now=now_ms())
    await mesh.start_router(signer=router, book=make_book(now_ms), unsigned_admin=False)
    answer = await _ask(mesh, eventually, _request(admin))
    assert answer["output"]["router"] == "router-1"
    unsigned = await _ask(mesh, eventually, _request(id="q2"))
    assert (unsigned["code"], unsigned["event"]) == ("unauthorized", "error")
    assert "signed requests only" in unsigned["message"]
    other = await _ask(mesh, eventually, _request(admin, id="q3", target="router-2"))
    assert "is for router-2, not for router-1" in other["message"]
    node = make_signer("admin-1", "node", now=now_ms(), issued_at=now_ms() - 60_000)
    assert (await _ask(mesh, eventually, _request(node, id="q4")))["code"] == "unauthorized"
    before = len(mesh.events)
    topic = mesh.topics.build(TopicKind.ADMIN, target="router-1", client="admin-1")
    mesh.client.post(topic, encode(_request(admin, id="q5")))
    replay = mesh.broker.published(topic)[0].payload
    mesh.client.post(topic, replay)  # the first one once more: passed over
    await eventually(lambda: mesh.final("q5"), timeout_s=30)
    await mesh.broker.settle()
    assert len(mesh.events) == before + 1
    audits = mesh.broker.published(f"{mesh.topics.root}/event/router-1/audit")
    assert any("signature_refused" in message.payload.decode() for message in audits)


async def test_a_router_signs_what_it_orders(mesh, eventually):
    router = make_signer("router-1", "router", now=now_ms())
    await mesh.start_router(signer=router, book=make_book(now_ms))
    node = await mesh.node("edge-1")
    await mesh.start_client("pump-7")
    mesh.submit(id="job-1", function="echo")
    await eventually(lambda: node.invocations, timeout_s=30)
    (invocation,) = node.invocations
    assert (invocation.node, invocation.epoch) == ("edge-1", 10)
    payload = mesh.broker.published(f"{mesh.topics.root}/invoke/edge-1")[0].payload
    book = make_book(now_ms)
    state = mesh.broker.retained[mesh.topics.build(TopicKind.ROUTER_STATE, router="router-1")]
    book.admit(decode(RouterState, state.payload).passport)
    book.verify(payload, "router-1", "router")
    plain = {"id": "q9", "verb": "drain", "args": {"node": "edge-1"}}
    topic = mesh.topics.build(TopicKind.ADMIN, target="router-1", client="pump-7")
    mesh.client.post(topic, json.dumps(plain).encode())  # its broker is trusted
    await eventually(lambda: node.orders, timeout_s=30)
    order = mesh.broker.published(f"{mesh.topics.root}/control/edge-1")[0].payload
    book.verify(order, "router-1", "router")
    assert node.orders[0]["node"] == "edge-1"


async def test_a_router_shows_its_renewed_passport(mesh, eventually):
    router = make_signer("router-1", "router", now=now_ms())
    service = await mesh.start_router(signer=router)
    renewed = make_signer("router-1", "router", now=now_ms(), key=router.key, issued_at=now_ms())
    router.passport = renewed.passport
    service.show_passport()
    await mesh.broker.settle()
    state = mesh.broker.retained[Topics().build(TopicKind.ROUTER_STATE, router="router-1")]
    assert decode(RouterState, state.payload).passport == renewed.passport
