"""The memory of outcomes."""

from capability_schemas.invocation import Invocation
from node_agent.invocation import Outcome, OutcomeMemory


def invocation(task, attempt=1, client="c"):
    return Invocation(
        task=task,
        client=client,
        router="r",
        attempt=attempt,
        function="f",
        version="1.0.0",
        deadline=1,
        reply="x",
        sent_at=0,
    )


def test_an_outcome_is_found_by_client_task_and_attempt():
    memory = OutcomeMemory(limit=10)
    ended = Outcome(status="finished", seq=3)
    memory.record(invocation("t", 2), ended)
    assert memory.find(invocation("t", 2)) is ended
    assert memory.find(invocation("t", 1)) is None
    assert memory.find(invocation("t", 2, client="other")) is None
    assert memory.latest_attempt(invocation("t")) == 2


def test_the_oldest_outcome_is_forgotten_first():
    memory = OutcomeMemory(limit=2)
    for task in ("a", "b", "c"):
        memory.record(invocation(task), Outcome(status="finished"))
    assert len(memory) == 2
    assert memory.find(invocation("a")) is None
    assert memory.latest_attempt(invocation("a")) == 0
    assert memory.find(invocation("c")) is not None


def test_terminal_events_are_bounded_in_bytes():
    memory = OutcomeMemory(limit=100, terminal_limit_bytes=25)
    for task in ("a", "b", "c"):
        memory.record(invocation(task), Outcome(status="finished", terminal=b"x" * 10))
    assert memory.find(invocation("a")) is None
    assert memory.find(invocation("b")) is not None


def test_recording_an_attempt_twice_counts_it_once():
    memory = OutcomeMemory(limit=100, terminal_limit_bytes=25)
    for _ in range(5):
        memory.record(invocation("a"), Outcome(status="finished", terminal=b"x" * 10))
    assert memory.find(invocation("a")) is not None
    assert len(memory) == 1
