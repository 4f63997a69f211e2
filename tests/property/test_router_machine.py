"""Whatever happens to a task in whatever order: it is accepted once and ends exactly once."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from capability_schemas.errors import NoCapableNode, Overloaded
from capability_schemas.invocation import Report
from router.events import (
    Action,
    CancelAsked,
    CancelNode,
    Choice,
    Choose,
    Chosen,
    End,
    Event,
    Invoke,
    Journaled,
    NodeGone,
    Observed,
    Reported,
    SendAccepted,
    Tick,
    Uninvoked,
    Unjournaled,
)
from router.machine import Phase, TaskMachine
from router.settings import RouterSettings

SETTINGS = RouterSettings()
NODES = st.sampled_from(["a", "b", "c"])
ATTEMPTS = st.integers(1, 4)
SEQS = st.integers(0, 6)


class OneTask(RuleBasedStateMachine):
    """Events of every kind, sensible or not, with a clock that goes forward."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.actions: list[Action] = []
        self.invoked: list[int] = []
        self.task = TaskMachine(deadline=60_000, settings=SETTINGS)

    @initialize(
        fresh=st.booleans(),
        deadline=st.integers(-1_000, 90_000),
        node=st.one_of(st.none(), NODES),
        attempt=st.integers(0, 3),
        next_seq=SEQS,
    )
    def begin(
        self, fresh: bool, deadline: int, node: str | None, attempt: int, next_seq: int
    ) -> None:
        self.task = (
            TaskMachine(deadline=deadline, settings=SETTINGS)
            if fresh
            else TaskMachine.restore(
                deadline=deadline,
                settings=SETTINGS,
                node=node,
                attempt=attempt,
                next_seq=next_seq,
                now=0,
            )
        )
        self.restored = not fresh
        self.known_attempt = self.task.attempt

    def feed(self, event: Event) -> None:
        was_ended = self.task.ended
        shown = self.task.next_seq
        actions = self.task.handle(event, self.now)
        assert not (was_ended and actions)
        for action in actions:
            if isinstance(action, Invoke):
                assert action.attempt > self.known_attempt
                assert action.seq == shown == 0
                self.known_attempt = action.attempt
            if isinstance(action, CancelNode):
                assert action.attempt <= self.known_attempt
            if isinstance(action, End):
                assert action is actions[-1]
                assert (action.error is None) != (action.payload is None)
                assert action.payload is not None or action.seq >= shown
        self.actions += actions

    @rule()
    def journaled(self) -> None:
        self.feed(Journaled())

    @rule()
    def unjournaled(self) -> None:
        self.feed(Unjournaled(Overloaded("disk full")))

    @rule(nodes=st.lists(NODES, max_size=4))
    def chosen(self, nodes: list[str]) -> None:
        choices = tuple(Choice(node, "f", "1.0.0", 0.5) for node in nodes)
        self.feed(Chosen(choices, None if choices else NoCapableNode("nobody")))

    @rule()
    def uninvoked(self) -> None:
        self.feed(Uninvoked(Overloaded("outbox full")))

    @rule(
        node=NODES,
        attempt=ATTEMPTS,
        status=st.sampled_from(["admitted", "refused", "failed", "finished"]),
        code=st.sampled_from([None, "overloaded", "execution_failed", "of a newer version"]),
        seq=st.one_of(st.none(), SEQS),
    )
    def reported(self, node: str, attempt: int, status: Any, code: str | None, seq: Any) -> None:
        self.feed(
            Reported(
                Report(
                    task="t",
                    client="c",
                    attempt=attempt,
                    node=node,
                    status=status,
                    code=code,
                    seq=seq,
                )
            )
        )

    @rule(node=NODES, attempt=ATTEMPTS, seq=SEQS, kind=st.sampled_from(["chunk", "working"]))
    def shown(self, node: str, attempt: int, seq: int, kind: Any) -> None:
        self.feed(Observed(node, kind, seq, attempt, b"x"))

    @rule(node=NODES, attempt=ATTEMPTS, seq=SEQS, kind=st.sampled_from(["result", "error"]))
    def finished(self, node: str, attempt: int, seq: int, kind: Any) -> None:
        holder = self.task.node == node and self.task.attempt == attempt
        running = self.task.phase in {Phase.INVOKED, Phase.ADMITTED, Phase.STREAMING}
        self.feed(Observed(node, kind, seq, attempt, b"final", "internal"))
        if holder and running:
            assert self.task.ended

    @rule(node=NODES)
    def gone(self, node: str) -> None:
        self.feed(NodeGone(node, "offline"))

    @rule()
    def cancelled(self) -> None:
        self.feed(CancelAsked())

    @rule(step_ms=st.integers(0, 5_000))
    def tick(self, step_ms: int) -> None:
        self.now += step_ms
        self.feed(Tick())

    @precondition(lambda self: self.task.wake_at is not None)
    @rule()
    def alarm(self) -> None:
        self.now = max(self.now, self.task.wake_at or 0)
        before = self.task.wake_at
        self.feed(Tick())
        assert self.task.ended or self.task.wake_at != before, "an alarm must change something"

    @invariant()
    def ends_at_most_once(self) -> None:
        assert sum(isinstance(action, End) for action in self.actions) == int(self.task.ended)
        assert sum(isinstance(action, SendAccepted) for action in self.actions) <= 1

    @invariant()
    def has_an_alarm_while_it_waits_for_others(self) -> None:
        if self.task.phase not in {Phase.RECEIVED, Phase.ENDED}:
            assert self.task.wake_at is not None

    def teardown(self) -> None:
        """However far it has come: time alone brings it to its one end."""
        if self.task.phase is Phase.RECEIVED:
            self.feed(Journaled())
        for _ in range(40):
            if self.task.ended:
                break
            pending = [action for action in self.actions if isinstance(action, Choose)]
            if pending:
                self.feed(Chosen((), NoCapableNode("nobody")))
            if self.task.wake_at is not None:
                self.now = max(self.now, self.task.wake_at)
                self.feed(Tick())
        assert self.task.ended
        self.ends_at_most_once()


TestOneTask = OneTask.TestCase
TestOneTask.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
