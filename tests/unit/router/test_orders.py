"""What a router says to a node: which start of it is meant, where that is known."""

import json

import pytest

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.errors import NotFound
from capability_schemas.node import NodeState
from capability_schemas.topics import TopicKind, Topics
from router.catalogue import Fleet
from router.orders import OrderDesk
from support.members import make_book, make_signer

NOW = 1_790_000_000_000
T = Topics()


async def test_only_cancelling_does_without_the_start_of_the_node():
    broker, fleet = MemoryBroker(), Fleet()
    signer = make_signer("router-1", "router", now=NOW)
    book = make_book(lambda: NOW)
    book.admit(signer.passport)
    async with MemorySession(broker=broker, client_id="router-1") as session:
        await session.wait_connected()
        desk = OrderDesk(
            session=session,
            topics=T,
            fleet=fleet,
            router_id="router-1",
            signer=signer,
            clock=lambda: NOW,
        )
        fleet.cordon(["edge-1"])  # known by the journal, and not heard of yet
        for verb in ("drain", "undrain"):
            with pytest.raises(NotFound, match="edge-1 has not said here that it is there"):
                desk.control("edge-1", verb)
        desk.control("edge-1", "cancel", task="t1", client="pump-7", attempt=1)
        fleet.hear_state(NodeState(node="edge-1", state="birth", epoch=7, at=NOW), NOW)
        desk.control("edge-1", "drain")
        await broker.settle()
    payloads = [m.payload for m in broker.published(T.build(TopicKind.CONTROL, node="edge-1"))]
    for payload in payloads:
        book.verify(payload, "router-1", "router")
    told = [json.loads(payload) for payload in payloads]
    assert [(one["verb"], one.get("epoch")) for one in told] == [("cancel", None), ("drain", 7)]
