"""What a node makes of tasks that clients give it themselves."""

import json
from typing import Any

import pytest

from broker import presence
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.errors import Overloaded
from capability_schemas.functions import FunctionSpec
from capability_schemas.invocation import Invocation
from capability_schemas.node import RouterState
from capability_schemas.reply import Chunk, Result
from capability_schemas.signing import sign
from capability_schemas.topics import TopicKind
from capability_schemas.trust import TrustState
from capability_schemas.wire import encode
from node_agent import direct, direct_runs
from node_agent.direct import DirectDesk
from node_agent.invocation import Outcome, Standing
from node_agent.settings import NodeSettings
from support.members import REGISTRY_KEY, make_book, make_signer, passport_of

NOW = 1_790_000_000_000
NODE, CLIENT = "edge-1", "pump-7"
SPEC = FunctionSpec(name="echo", description="says it again", version="1.2.0", entry="x:y")


class Site:
    """A desk, and a client before it."""

    def __init__(self, broker, session, far, topics):
        self.broker = broker
        self.session = session
        self.far = far
        self.topics = topics
        self.taken = []
        self.stopped = []
        self.said = []
        self.signer = make_signer(NODE, "node", now=NOW)
        self.spec = SPEC
        self.known = {}  # what the executor knows of tasks, by client and id

    async def open(self, **settings):
        self.desk = DirectDesk(
            session=self.session,
            topics=self.topics,
            settings=NodeSettings(node=NODE, **settings),
            functions=lambda: {"echo": self.spec},
            signer=self.signer,
            book=make_book(lambda: NOW),
            clock=lambda: NOW,
        )
        executor: Any = self
        self.desk.attach(executor)
        await self.desk.listen()
        await self.far.subscribe(self.topics.filter(TopicKind.REPLY), self._hear)

    def take(self, invocation, reply):
        self.taken.append((invocation, reply))

    def cancel(self, control):
        self.stopped.append(control)

    def standing(self, whose):
        return self.known.get(whose, Standing())

    def attest(self, **fields):
        policy = None if not fields else SPEC.policy.model_copy(update=fields)
        key = self.signer.key
        self.signer.passport = passport_of(NODE, "node", key, now=NOW, attested=policy)

    async def _hear(self, message):
        self.said.append(json.loads(message.payload))

    async def send(self, kind, payload, *, client=CLIENT, **fields):
        topic = self.topics.build(kind, node=NODE, client=client)
        self.far.post(topic, payload, **fields)
        await self.broker.settle()

    async def ask(self, task="t1", *, client=CLIENT, **fields):
        task = {"id": task, "function": "echo", "text": "hi", **fields}
        task = {name: value for name, value in task.items() if value is not None}
        await self.send(TopicKind.DIRECT, json.dumps(task).encode(), client=client)

    async def router(self, state="birth", **fields):
        said = RouterState(router="router-1", state=state, **{"epoch": 1, "at": 1, **fields})
        topic = self.topics.build(TopicKind.ROUTER_STATE, router="router-1")
        self.far.post(topic, encode(said), retain=True)
        await self.broker.settle()

    def speak(self, *events):
        for event in events:
            self.desk.post(self.taken[-1][1], encode(event))

    @property
    def refusal(self):
        assert not self.taken
        event = self.said.pop()
        assert event["event"] == "error"
        assert event["detail"]["refused"] is True
        return event["code"], event["message"]


def chunk(seq, data="x", task="t1"):
    return Chunk(task=task, at=NOW, seq=seq, data=data)


def result(seq, output="xx", task="t1"):
    return Result(task=task, at=NOW, seq=seq, output=output, node=NODE)


@pytest.fixture
async def site(topics, monkeypatch):
    monkeypatch.setattr(presence, "_SETTLING_S", 0.0)
    broker = MemoryBroker()
    async with (
        MemorySession(broker=broker, client_id=NODE) as session,
        MemorySession(broker=broker, client_id="far") as far,
    ):
        await session.wait_connected()
        await far.wait_connected()
        yield Site(broker, session, far, topics)


async def test_a_task_becomes_an_invocation_that_no_router_made(site):
    await site.open()
    await site.ask(function="echo@>=1.0", priority=7, stream=False, proof=True, session="s")
    (invocation, topic), *others = site.taken
    assert not others
    assert (invocation.task, invocation.client, invocation.router) == ("t1", CLIENT, NODE)
    assert (invocation.function, invocation.version) == ("echo", "1.2.0")
    assert (invocation.text, invocation.deadline) == ("hi", NOW + 60_000)
    assert (invocation.priority, invocation.stream, invocation.proof) == (7, False, True)
    assert topic == site.topics.build(TopicKind.REPLY, client=CLIENT, task="t1", source=NODE)


async def test_nobody_gets_past_a_router_that_lives(site):
    await site.open()
    await site.router()
    await site.ask()
    assert site.said[-1]["detail"]["router"] == "router-1"
    code, why = site.refusal
    assert code == "policy_denied"
    assert "router-1 lives" in why
    await site.router("offline")
    await site.ask("t2")
    assert len(site.taken) == 1


async def test_a_copy_that_comes_late_is_refused_like_the_first_one(site, monkeypatch):
    await site.open()
    await site.router()
    await site.ask()
    await site.router("offline")
    await site.ask()
    first, again = site.said
    assert again == first
    assert not site.taken
    monkeypatch.setattr(direct, "_REFUSED_S", 0.0)
    await site.router("birth", at=2)
    await site.ask("t2")
    await site.router("offline", at=3)
    await site.ask("t2")  # asked again in earnest, later
    assert len(site.taken) == 1


async def test_nobody_gets_past_rules_that_only_routers_know(site):
    await site.open()
    await site.router(direct=False)
    await site.router("offline", direct=False)
    await site.ask()
    assert site.said[-1]["detail"]["router"] == "router-1"  # the client waits for one
    assert "let nobody past it" in site.refusal[1]


async def test_a_node_that_has_just_come_back_listens_first(site, monkeypatch):
    monkeypatch.setattr(presence, "_SETTLING_S", 60.0)
    await site.open()
    await site.ask()
    assert site.refusal[0] == "overloaded"


async def test_a_node_may_be_closed(site):
    await site.open(direct="never")
    await site.ask()
    assert site.said[-1]["retryable"] is True  # whoever else is not closed may be asked
    code, why = site.refusal
    assert (code, "routers only" in why) == ("policy_denied", True)


async def test_a_node_that_its_broker_does_not_let_listen_takes_nothing(topics, monkeypatch):
    monkeypatch.setattr(presence, "_SETTLING_S", 0.0)
    refused = topics.filter(TopicKind.ROUTER_STATE)
    broker = MemoryBroker(allows=lambda _, __, what: what != refused)
    async with (
        MemorySession(broker=broker, client_id=NODE) as session,
        MemorySession(broker=broker, client_id="far") as far,
    ):
        await session.wait_connected()
        await far.wait_connected()
        site = Site(broker, session, far, topics)
        await site.open()
        await site.ask()
        assert site.refusal[0] == "overloaded"


@pytest.mark.parametrize(
    ("fields", "code", "why"),
    [
        ({"function": None}, "invalid_task", "by name"),
        ({"function": "sing"}, "no_capable_node", "no such function"),
        ({"function": "echo@<1"}, "no_capable_node", "version 1.2.0"),
        ({"reply_to": "foam/v1/local/reply/pump-7/x"}, "invalid_task", "answers on"),
        ({"verb": "x"}, "invalid_task", "verb"),
        ({"policy": {"zones": ["hall-3"]}}, "policy_denied", "attests"),
        ({"policy": {"grants": ["controls"]}}, "policy_denied", "attests"),
        ({"policy": {"data": "private"}}, "policy_denied", "attests"),
        ({"policy": {"max_cost": 0.5}}, "policy_denied", "costs 2"),
        ({"policy": {"local_only": True}}, "policy_denied", "outside the site"),
    ],
)
async def test_what_is_refused(site, fields, code, why):
    site.spec = SPEC.model_copy(
        update={
            "cost": SPEC.cost.model_copy(update={"money": 2.0}),
            "policy": SPEC.policy.model_copy(update={"external": True}),
        }
    )
    await site.open()
    await site.ask(**fields)
    got = site.refusal
    assert got[0] == code
    assert why in got[1]


async def test_what_a_registry_attests_decides(site):
    site.attest(zones=("hall-3",), data=("public",), grants=("read",))
    await site.open()
    for demand, why in (
        ({"zones": ["hall-4"]}, "zones"),
        ({"data": "private"}, "private"),
        ({"grants": ["read", "controls"]}, "lacks controls"),
    ):
        await site.ask(why.replace(" ", "-"), policy=demand)
        assert why in site.refusal[1]
    await site.ask(policy={"zones": ["hall-3"], "data": "public", "grants": ["read"]})
    assert len(site.taken) == 1


async def test_tenants_are_kept_apart_by_routers_alone(site):
    site.attest(tenant="acme")
    await site.open()
    await site.ask("t0")
    assert "tenant acme" in site.refusal[1]
    site.attest()
    topic = site.topics.build(TopicKind.TRUST, member=CLIENT)
    for fields, why in (({"tenant": "acme"}, "tenant acme"), ({"state": "revoked"}, "revoked")):
        said = {"member": CLIENT, "state": "trusted", "at": NOW, "registry": "registry-1"}
        trust = sign(TrustState.model_validate({**said, **fields}), REGISTRY_KEY)
        site.far.post(topic, encode(trust), retain=True)
        await site.ask(f"t-{len(why)}")
        assert why in site.refusal[1]
    site.far.post(topic, b"", retain=True)
    await site.ask()
    assert len(site.taken) == 1


async def test_of_one_client_and_of_all_together_so_many_run_at_a_time(site):
    await site.open(direct_per_client=2, direct_limit=3)
    for number in range(3):
        await site.ask(f"t{number}")
    assert [invocation.task for invocation, _ in site.taken] == ["t0", "t1"]
    assert site.said[-1]["code"] == "overloaded"
    assert site.said[-1]["retry_after_ms"] == 1000
    for number in range(2):
        await site.ask(f"u{number}", client="pump-8")
    assert [invocation.task for invocation, _ in site.taken] == ["t0", "t1", "u0"]
    site.speak(result(0, task="u0"))
    site.desk.ended(site.taken[-1][0], Outcome(status="finished", seq=1, payload=b"{}"))
    await site.ask("u2", client="pump-8")
    assert site.taken[-1][0].task == "u2"


async def test_the_same_id_is_answered_by_the_same_run(site):
    await site.open()
    await site.ask()
    await site.router()  # too late: it runs
    await site.ask()
    assert [event["event"] for event in site.said] == ["working"]
    site.speak(result(0))
    site.desk.ended(site.taken[0][0], Outcome(status="finished", seq=1, payload=b"{}"))
    await site.ask()
    assert [event["event"] for event in site.said] == ["working", "result", "result"]
    assert len(site.taken) == 1


async def test_a_refusal_of_the_queue_leaves_room_for_another_try(site, monkeypatch):
    monkeypatch.setattr(direct, "_REFUSED_S", 0.0)
    await site.open()
    await site.ask()
    site.desk.ended(
        site.taken[0][0],
        Outcome(status="refused", code="overloaded", reason="full", retry_after_ms=70),
    )
    await site.broker.settle()
    assert site.said[-1]["code"] == "overloaded"
    assert site.said[-1]["retry_after_ms"] == 70
    assert site.said[-1]["detail"]["refused"] is True
    site.known[CLIENT, "t1"] = Standing(1, outcome=Outcome(status="refused"))
    await site.ask()
    assert [invocation.attempt for invocation, _ in site.taken] == [1, 2]


async def test_what_was_shown_is_repeated_while_the_node_lives(site):
    await site.open()
    await site.ask()
    site.speak(chunk(0, "a"), chunk(1, "b"))
    await site.broker.settle()
    site.said.clear()
    await site.send(TopicKind.DIRECT_RESUME, b'{"task": "t1", "from_seq": 1}')
    assert [event["event"] for event in site.said] == ["chunk", "working"]
    site.speak(chunk(2, "c"), result(3, "abc"))
    site.desk.ended(site.taken[0][0], Outcome(status="finished", seq=4, payload=b"{}"))
    await site.broker.settle()
    site.said.clear()
    await site.send(TopicKind.DIRECT_RESUME, b'{"task": "t1", "from_seq": 0}')
    assert [(event["seq"], event.get("data")) for event in site.said] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
        (3, None),
    ]


async def test_what_is_too_long_to_be_kept_is_stood_in_for(site, monkeypatch):
    monkeypatch.setattr(direct_runs, "_SHOWN_BYTES", 200)
    await site.open()
    await site.ask()
    site.speak(chunk(0, "a"), chunk(1, "b" * 300), chunk(2, "c"), result(3))
    site.desk.ended(site.taken[0][0], Outcome(status="finished", seq=4, payload=b"{}"))
    site.said.clear()
    await site.broker.settle()
    site.said.clear()
    await site.send(TopicKind.DIRECT_RESUME, b'{"task": "t1"}')
    assert [(event["seq"], event.get("data")) for event in site.said][:3] == [
        (0, "a"),
        (1, ""),
        (2, "c"),
    ]


async def test_old_ends_make_room(site, monkeypatch):
    monkeypatch.setattr(direct_runs, "_KNOWN_LIMIT", 3)
    await site.open()
    for number in range(6):
        await site.ask(f"t{number}")
        site.speak(result(0, task=f"t{number}"))
        site.desk.ended(site.taken[-1][0], Outcome(status="finished", seq=1, payload=b"{}"))
    await site.broker.settle()
    site.said.clear()
    for number in range(6):
        await site.send(TopicKind.DIRECT_RESUME, json.dumps({"task": f"t{number}"}).encode())
    assert [event["task"] for event in site.said] == ["t3", "t4", "t5"]  # of the others later


async def test_what_a_restarted_node_has_forgotten_is_lost_and_said_to_be(
    site, monkeypatch, eventually
):
    monkeypatch.setattr(direct, "_OVERTAKEN_S", 0.01)
    await site.open()
    await site.send(TopicKind.DIRECT_RESUME, b'{"task": "t9", "from_seq": 4}')
    await eventually(lambda: site.said)
    assert (site.said[-1]["code"], site.said[-1]["seq"]) == ("node_lost", 4)
    await site.ask("t9")  # which its broker had kept back
    assert [event["code"] for event in site.said] == ["node_lost", "node_lost"]
    assert not site.taken


async def test_a_task_that_its_resumption_has_overtaken_runs(site, monkeypatch, eventually):
    monkeypatch.setattr(direct, "_OVERTAKEN_S", 0.3)
    await site.open()
    await site.send(TopicKind.DIRECT_RESUME, b'{"task": "t1", "from_seq": 0}')
    await site.ask()
    site.speak(chunk(0))
    await eventually(lambda: [event["event"] for event in site.said][-2:] == ["chunk", "working"])
    assert len(site.taken) == 1


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome(status="failed", code="node_lost", reason="the instance died"), "node_lost"),
        (Outcome(status="dropped", reason="cut off"), "node_lost"),
        (Outcome(status="dropped", reason="superseded"), None),
    ],
)
async def test_what_a_router_would_mend_ends_the_task_here(site, outcome, code):
    await site.open()
    await site.ask()
    site.speak(chunk(0))
    await site.broker.settle()
    site.said.clear()
    site.desk.ended(site.taken[0][0], outcome)
    await site.broker.settle()
    assert [(event["code"], event["seq"]) for event in site.said] == ([(code, 1)] if code else [])


async def test_a_client_cancels_its_own(site):
    await site.open()
    await site.ask()
    await site.send(TopicKind.DIRECT_CANCEL, b'{"task": "t1"}', client="pump-8")
    await site.send(TopicKind.DIRECT_CANCEL, b'{"task": "t2"}')
    assert not site.stopped
    await site.send(TopicKind.DIRECT_CANCEL, b'{"task": "t1"}')
    assert [(order.verb, order.task, order.client) for order in site.stopped] == [
        ("cancel", "t1", CLIENT)
    ]


async def test_rubbish_is_counted_and_answered_where_it_has_a_name(site):
    await site.open()
    await site.send(TopicKind.DIRECT, b"just words")
    await site.send(TopicKind.DIRECT, b'{"function": "echo"}')
    await site.send(TopicKind.DIRECT_CANCEL, b"{}")
    await site.send(TopicKind.DIRECT_RESUME, b"\xff")
    assert site.desk.bad_frames == 4
    assert not site.said
    await site.send(TopicKind.DIRECT, b'{"id": "t1", "function": "echo", "priority": 11}')
    assert site.refusal[0] == "invalid_task"
    big = b'{"id": "t2", "function": "echo", "text": "' + b"x" * 2**20 + b'"}'
    await site.send(TopicKind.DIRECT, big)
    assert site.refusal[0] == "too_large"


async def test_a_kept_task_is_nobodys(site):
    await site.send(
        TopicKind.DIRECT, b'{"id": "t1", "function": "echo", "text": "hi"}', retain=True
    )
    await site.open()
    await site.broker.settle()
    assert not site.taken


# ---- what routers had here before they went


def attempt_of_a_router(number=1, **fields):
    return Invocation(
        **{
            "task": "t1",
            "client": CLIENT,
            "router": "router-1",
            "attempt": number,
            "function": "echo",
            "version": "1.2.0",
            "text": "hi",
            "deadline": NOW + 60_000,
            "reply": f"foam/v1/local/reply/{CLIENT}/t1",
            "sent_at": NOW,
            **fields,
        }
    )


def finished(seq=2):
    return Outcome(status="finished", seq=seq + 1, payload=encode(result(seq)))


async def test_the_end_of_a_routers_attempt_answers_the_same_id(site):
    site.known[CLIENT, "t1"] = Standing(3, outcome=finished())
    await site.open(direct_per_client=1)
    await site.ask()
    assert [(event["event"], event["seq"]) for event in site.said] == [
        ("chunk", 0),
        ("chunk", 1),
        ("result", 2),
    ]
    await site.ask("t2")  # its place is free
    assert [invocation.task for invocation, _ in site.taken] == ["t2"]


async def test_a_routers_attempt_that_runs_is_followed_to_its_end(site):
    running = attempt_of_a_router(3)
    site.known[CLIENT, "t1"] = Standing(3, running=running)
    await site.open(direct_per_client=1)
    await site.ask()
    assert [event["event"] for event in site.said] == ["working"]
    assert not site.taken
    site.desk.ended(attempt_of_a_router(2), Outcome(status="dropped", reason="superseded"))
    site.desk.ended(running, finished())  # which it had said on a topic of the router's choice
    await site.broker.settle()
    assert site.said[-1]["event"] == "result"
    await site.ask("t2")
    assert [invocation.task for invocation, _ in site.taken] == ["t2"]


@pytest.mark.parametrize(
    ("standing", "attempt"),
    [
        (Standing(3, outcome=Outcome(status="failed", code="node_lost")), 4),
        (Standing(3, outcome=Outcome(status="unsure", payload=b"{}")), 4),
        (Standing(3, running=attempt_of_a_router(3, hold=True)), 4),
        (Standing(3), 4),
    ],
    ids=["failed", "unsure", "held", "forgotten"],
)
async def test_what_a_router_would_have_gone_on_with_is_run_anew(site, standing, attempt):
    site.known[CLIENT, "t1"] = standing
    await site.open()
    await site.ask()
    assert [invocation.attempt for invocation, _ in site.taken] == [attempt]


async def test_what_may_run_once_is_not_run_anew(site):
    site.spec = SPEC.model_copy(update={"continues": "none"})
    site.known[CLIENT, "t1"] = Standing(1, outcome=Outcome(status="failed", code="node_lost"))
    await site.open()
    await site.ask()
    assert not site.taken
    assert site.said[-1]["code"] == "node_lost"
    assert "refused" not in site.said[-1]["detail"]


async def test_an_end_that_found_no_room_is_told_when_the_client_asks(site, monkeypatch):
    await site.open()
    await site.ask()
    monkeypatch.setattr(site.session, "post", full)
    site.desk.ended(site.taken[0][0], Outcome(status="finished", code=None, reason="no room"))
    monkeypatch.undo()
    await site.send(TopicKind.DIRECT_RESUME, b'{"task": "t1"}')
    assert [event["code"] for event in site.said] == ["node_lost"]


def full(*_, **__):
    raise Overloaded("the outbox is full")


async def test_a_cancellation_that_overtakes_its_task_is_kept(site):
    await site.open()
    await site.send(TopicKind.DIRECT_CANCEL, b'{"task": "t1"}')
    assert not site.said
    await site.ask()
    assert site.refusal[0] == "cancelled"
    await site.ask(client="pump-8")
    assert len(site.taken) == 1


async def test_a_flood_of_one_client_makes_nobody_elses_refusal_be_forgotten(site, monkeypatch):
    monkeypatch.setattr(direct, "_MOST_REFUSALS", 8)
    await site.open()
    await site.router()
    await site.ask("t1")
    for number in range(20):
        await site.ask(f"u{number}", client="pump-8")
    await site.router("offline")
    await site.ask("t1")
    assert not site.taken


async def test_the_ends_of_a_busy_client_make_nobody_elses_be_forgotten(site, monkeypatch):
    monkeypatch.setattr(direct_runs, "_KNOWN_LIMIT", 3)
    await site.open()
    for number, client in enumerate([CLIENT, *["pump-8"] * 5]):
        await site.ask(f"t{number}", client=client)
        site.speak(result(0, task=f"t{number}"))
        site.desk.ended(site.taken[-1][0], Outcome(status="finished", seq=1, payload=b"{}"))
    await site.broker.settle()
    site.said.clear()
    await site.send(TopicKind.DIRECT_RESUME, b'{"task": "t0"}')
    assert [event["task"] for event in site.said] == ["t0"]
