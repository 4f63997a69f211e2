"""The gate of a node: which orders it lets through, and what is said about the others."""

import json

import pytest

from broker.events import EventSource
from broker.security import SecurityAlarm
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.invocation import Control, Invocation
from capability_schemas.node import RouterState
from capability_schemas.passport import CLOCK_SKEW_MS
from capability_schemas.provenance import Signer
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind
from capability_schemas.trust import TrustState
from capability_schemas.wire import encode
from node_agent.orders import OrderGate
from support.members import REGISTRY_KEY, make_book, make_signer, passport_of

NOW = 1_790_000_000_000
EPOCH = NOW - 60_000


class Site:
    """A gate, the broker it listens to, and a router that signs."""

    def __init__(self, broker, session, topics):
        self.now = NOW
        self.broker = broker
        self.session = session
        self.topics = topics
        self.obeyed = []
        self.refused = []
        self.router = make_signer("router-1", "router", now=NOW)
        self.book = make_book(self.clock)
        self.gate = self.make_gate(self.book)

    def clock(self):
        return self.now

    def make_gate(self, book):
        self.alarm = SecurityAlarm(
            events=EventSource(
                session=self.session,
                topics=self.topics,
                source="edge-1",
                component="node",
                clock=self.clock,
            ),
            own="edge-1",
            clock=self.clock,
        )
        return OrderGate(
            session=self.session,
            topics=self.topics,
            node="edge-1",
            epoch=EPOCH,
            book=book,
            alarm=self.alarm,
            clock=self.clock,
        )

    def show(self, signer=None, *, router=None, **fields):
        signer = signer or self.router
        router = router or signer.identity
        state = RouterState(
            router=router, state="birth", epoch=1, at=NOW, passport=signer.passport, **fields
        )
        topic = self.topics.build(TopicKind.ROUTER_STATE, router=router)
        self.session.post(topic, encode(state), retain=True)

    def trust(self, **fields):
        state = TrustState(
            member="router-1", state="revoked", at=NOW, void_before=NOW + 1,
            registry="registry-1", **fields,
        )  # fmt: skip
        topic = self.topics.build(TopicKind.TRUST, member="router-1")
        self.session.post(topic, encode(sign(state, REGISTRY_KEY)), retain=True)

    def invocation(self, signer=None, **fields):
        made = Invocation.model_validate(
            {
                "task": "t1", "client": "pump-7", "router": "router-1", "node": "edge-1",
                "function": "add", "version": "1.0.0", "deadline": NOW + 60_000, "epoch": EPOCH,
                "reply": f"{self.topics.root}/reply/pump-7/t1", "sent_at": self.now, **fields,
            }
        )  # fmt: skip
        return (signer or self.router).sign(made)

    def control(self, signer=None, **fields):
        made = Control.model_validate(
            {
                "verb": "drain", "sender": "router-1", "node": "edge-1", "epoch": EPOCH,
                "sent_at": self.now, "nonce": "n1", **fields,
            }
        )  # fmt: skip
        return (signer or self.router).sign(made)

    def give(self, order, payload=None):
        self.gate.check(
            payload or encode(order),
            order,
            obey=lambda repeated: self.obeyed.append((order, repeated)),
            refuse=lambda error: self.refused.append(error.message),
        )

    def told(self):
        topic = self.topics.build(TopicKind.EVENT, source="edge-1", kind="audit")
        return [json.loads(message.payload)["data"] for message in self.broker.published(topic)]


@pytest.fixture
async def site(topics):
    broker = MemoryBroker()
    async with MemorySession(broker=broker, client_id="edge-1") as session:
        await session.wait_connected()
        made = Site(broker, session, topics)
        await made.gate.listen()
        yield made
        made.gate.stop()


async def test_orders_of_a_router_that_has_shown_its_passport(site):
    site.show()
    await site.broker.settle()
    order = site.invocation()
    site.give(order)
    site.give(order)
    site.give(site.control())
    site.give(site.control())
    assert [repeated for _, repeated in site.obeyed] == [False, True, False, True]
    assert not site.refused
    assert not site.alarm.refused


async def test_an_order_that_comes_before_its_router_is_known_waits_in_order(site):
    first, second = site.invocation(), site.control(verb="cancel", task="t1")
    site.give(first)
    site.give(second)
    assert not site.obeyed
    site.show()
    await site.broker.settle()
    assert site.obeyed == [(first, False), (second, False)]


async def test_who_never_shows_a_passport_is_refused_without_a_word(site, monkeypatch, eventually):
    monkeypatch.setattr("node_agent.orders._WAIT_S", 0.0)
    site.give(site.invocation())
    await eventually(lambda: site.alarm.refused, timeout_s=30)
    await site.broker.settle()
    assert not site.obeyed
    assert not site.refused
    assert site.told()[0]["detail"]["reason"] == "router-1 has shown no passport"


async def test_orders_of_unknown_routers_wait_in_bounded_number(site, monkeypatch):
    monkeypatch.setattr("node_agent.orders._WAITING_LIMIT", 2)
    for number in range(3):
        site.give(site.invocation(task=f"t{number}"))
    assert site.alarm.refused == {"invocation": 1}
    site.show()
    await site.broker.settle()
    assert [order.task for order, _ in site.obeyed] == ["t0", "t1"]
    site.give(site.invocation(task="t3"))
    assert len(site.obeyed) == 3


@pytest.mark.parametrize(
    ("change", "words", "answered"),
    [
        ({"node": "edge-2"}, "is for edge-2", False),
        ({"node": None}, "nobody in particular", True),
        ({"sent_at": NOW - CLOCK_SKEW_MS - 1}, "behind ours", True),
        ({"epoch": EPOCH - 1}, "earlier start of edge-1", True),
        ({"epoch": None}, "names no start of edge-1", True),
    ],
)
async def test_a_signed_order_that_is_not_for_now_and_here(site, change, words, answered):
    site.show()
    await site.broker.settle()
    site.give(site.invocation(**change))
    await site.broker.settle()
    assert not site.obeyed
    assert words in site.told()[0]["detail"]["reason"]
    assert bool(site.refused) is answered


async def test_of_orders_for_any_start_only_those_to_cancel_are_obeyed(site):
    """Recorded before a node restarts, they come again to one that cannot know them."""
    site.show()
    await site.broker.settle()
    for verb in ("drain", "undrain", "cancel"):
        site.give(site.control(verb=verb, epoch=None, nonce=verb, sent_at=EPOCH - 1_000))
    assert [order.verb for order, _ in site.obeyed] == ["cancel"]
    assert site.alarm.refused == {"control": 2}
    site.give(site.control(sent_at=EPOCH - 1_000))  # of a router whose clock is behind
    assert [order.verb for order, _ in site.obeyed] == ["cancel", "drain"]


async def test_who_asks_for_an_account_is_answered_whichever_start_is_meant(site):
    site.show()
    await site.broker.settle()
    for number, epoch in enumerate((None, EPOCH - 1, EPOCH)):
        site.give(site.control(verb="account", epoch=epoch, nonce=f"n{number}"))
    assert [order.verb for order, _ in site.obeyed] == ["account"] * 3


async def test_forged_and_altered_orders(site):
    site.show()
    await site.broker.settle()
    order = site.invocation()
    altered = order.model_copy(update={"function": "format_disk"})
    site.give(altered)
    site.give(site.control(verb="undrain").model_copy(update={"signature": None}))
    site.give(Control(verb="drain"))
    forger = Signer(identity="router-1", key=SigningKey.generate(), passport=None)
    site.give(site.invocation(forger))
    await site.broker.settle()
    assert not site.obeyed
    assert site.alarm.refused == {"invocation": 2, "control": 2}
    assert [told["action"] for told in site.told()] == ["signature_refused"] * 4
    site.give(order)
    assert len(site.obeyed) == 1  # the genuine one was not spoilt by its forgery


async def test_only_a_router_or_registry_may_order(site):
    node = make_signer("edge-9", "node", now=NOW)
    site.book.admit(node.passport)
    site.give(site.invocation(node, router="edge-9"))
    assert not site.obeyed
    assert not site.refused
    registry = Signer(identity="registry-1", key=REGISTRY_KEY, passport=None)
    site.give(site.control(registry, sender="registry-1"))
    assert len(site.obeyed) == 1


async def test_a_state_with_somebody_elses_passport_counts_for_nothing(site):
    other = make_signer("router-2", "router", now=NOW)
    site.show(other, router="router-1")
    forged = Signer(
        identity="router-1",
        key=other.key,
        passport=passport_of(
            "router-1", "router", other.key, now=NOW, registry_key=SigningKey.generate()
        ),
    )
    site.show(forged)
    await site.broker.settle()
    assert site.alarm.refused == {"passport": 2}
    assert not site.book.knows("router-1")


async def test_a_revoked_router_is_refused_whatever_the_broker_does(site):
    site.show()
    site.trust()
    await site.broker.settle()
    assert not site.book.knows("router-1")
    site.show()  # the broker repeats what it has
    await site.broker.settle()
    site.give(site.invocation())
    assert not site.obeyed
    fresh = Signer(
        identity="router-1",
        key=site.router.key,
        passport=passport_of("router-1", "router", site.router.key, now=NOW, issued_at=NOW + 5),
    )
    site.show(fresh)
    await site.broker.settle()
    assert len(site.obeyed) == 1


async def test_a_trust_state_of_nobody_changes_nothing(site):
    site.show()
    await site.broker.settle()
    state = TrustState(
        member="router-1", state="revoked", at=NOW, void_before=NOW + 1, registry="registry-1"
    )
    topic = site.topics.build(TopicKind.TRUST, member="router-1")
    for payload in (encode(sign(state, SigningKey.generate())), b"{", b""):
        site.session.post(topic, payload)
    await site.broker.settle()
    site.give(site.invocation())
    assert len(site.obeyed) == 1


async def test_a_node_that_knows_no_registry_takes_the_brokers_word(site):
    site.gate = site.make_gate(None)
    await site.gate.listen()
    site.give(Control(verb="drain"))
    site.give(site.invocation().model_copy(update={"signature": None}))
    assert len(site.obeyed) == 2


async def test_a_flood_of_forgeries_does_not_flood_the_log(site):
    site.show()
    await site.broker.settle()
    for number in range(100):
        site.give(site.control(nonce=f"n{number}").model_copy(update={"reason": "x"}))
    await site.broker.settle()
    assert site.alarm.refused["control"] == 100
    assert len(site.told()) == 10
    site.now += 60_000
    site.give(Control(verb="drain"))
    await site.broker.settle()
    assert site.told()[-1]["detail"]["untold"] == 90
