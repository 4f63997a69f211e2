"""Which neighbour is named."""

from capability_schemas.node import FunctionLoad, NodeLoad
from node_agent.admission.peers import PeerBook


def load(node, *, queue_limit=10, all_queued=0, **fields):
    function = FunctionLoad(**{"total_ms": 100.0, **fields})
    return NodeLoad(
        node=node,
        epoch=1,
        at=0,
        queued=all_queued,
        queue_limit=queue_limit,
        functions={"f": function},
    )


def test_the_shortest_wait_is_named():
    book = PeerBook(["a", "b"])
    book.heard(load("a", running=1, queued=3), now=0)
    book.heard(load("b", running=1), now=0)
    assert book.best("f", now=0) == "b"
    book.heard(load("a"), now=0)
    assert book.best("f", now=0) == "a"


def test_nobody_is_named_for_an_unknown_function_or_after_long_silence():
    book = PeerBook(["a"])
    book.heard(load("a"), now=0)
    assert book.best("g", now=0) is None
    assert book.best("f", now=20_000) == "a"
    assert book.best("f", now=20_001) is None


def test_strangers_broken_functions_and_full_queues_do_not_count():
    book = PeerBook(["a", "b"])
    book.heard(load("stranger"), now=0)
    book.heard(load("a", degraded=True), now=0)
    book.heard(load("b", running=1, queued=2, all_queued=2, queue_limit=2), now=0)
    assert book.best("f", now=0) is None
