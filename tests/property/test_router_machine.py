"""Whatever happens to a task in whatever order: it is accepted once and ends exactly once."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from capability_schemas.errors import NoCapableNode, Overloaded, TaskCancelled
from capability_schemas.invocation import Report
from capability_schemas.task import TaskPolicy
from router.events import (
    Action,
    Announce,
    CancelAsked,
    CancelNode,
    Choice,
    Choose,
    Chosen,
    End,
    Event,
    Fenced,
    Invoke,
    Journaled,
    Learn,
    NodeGone,
    Observed,
    Phase,
    Reported,
    SendAccepted,
    Tick,
    Uninvoked,
    Unjournaled,
)
from router.guard import GuardedMachine
from router.settings import RouterSettings
from support.journal import journaled

SETTINGS = RouterSettings()
NODES = st.sampled_from(["a", "b", "c"])
ATTEMPTS = st.integers(1, 4)
SEQS = st.integers(0, 6)
STRENGTHS = st.sampled_from([0.0, 1e9, 8e9])
TIMES = st.sampled_from([None, 100.0, 50_000.0])


class OneTask(RuleBasedStateMachine):
    """Events of every kind, sensible or not, with a clock that goes forward."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.actions: list[Action] = []
        self.invoked: list[int] = []
        self.task = GuardedMachine(deadline=60_000, settings=SETTINGS)

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
            GuardedMachine(deadline=deadline, settings=SETTINGS)
            if fresh
            else GuardedMachine.restore(
                journaled(node, attempt=attempt, next_seq=next_seq, deadline=deadline),
                settings=SETTINGS,
                now=0,
            )
        )
        self.known_attempt = self.task.attempt
        self.judged: set[int] = set()
        self.drafted = False

    def feed(self, event: Event) -> None:
        was_ended = self.task.ended
        shown, attempt = self.task.next_seq, self.task.attempt
        actions = self.task.handle(event, self.now)
        assert not (was_ended and actions)
        self.drafted = self.drafted or any(
            isinstance(action, Learn) and action.verdict == "unsure" for action in actions
        )
        for action in actions:
            if isinstance(action, Invoke):
                assert action.attempt > self.known_attempt or action.announced
                assert action.seq == shown == self.task.next_seq == 0
                assert action.cascade is None or bool(action.cascade.steps) == self.drafted
                self.known_attempt = action.attempt
            if isinstance(action, Announce):
                assert action.attempt >= self.known_attempt
                self.known_attempt = action.attempt
            if isinstance(action, Learn):
                assert attempt not in self.judged, "an attempt is judged once"
                assert action.took_ms >= 0
                self.judged.add(attempt)
            if isinstance(action, CancelNode):
                assert action.attempt <= self.known_attempt
            if isinstance(action, End):
                assert action is actions[-1]
                told = (action.error, action.payload, action.draft)
                assert sum(one is not None for one in told) == 1
                assert action.payload is not None or action.seq >= shown
                assert action.draft is None or (self.drafted and action.seq == 0)
                # An answer that was held is never lost, but for a client that no longer wants it.
                if self.drafted and shown == self.task.next_seq == 0 and action.error is not None:
                    assert isinstance(action.error, TaskCancelled)
        self.actions += actions

    @rule()
    def journaled(self) -> None:
        self.feed(Journaled())

    @rule()
    def unjournaled(self) -> None:
        self.feed(Unjournaled(Overloaded("disk full")))

    @rule(
        nodes=st.lists(st.tuples(NODES, STRENGTHS, TIMES, st.booleans()), max_size=4),
        accept=st.sampled_from([None, 0.0, 0.6]),
        local=st.booleans(),
    )
    def chosen(self, nodes: list[Any], accept: float | None, local: bool) -> None:
        choices = tuple(
            Choice(node, "f", "1.0.0", 0.5, strength=strength, finish_ms=ms, external=external)
            for node, strength, ms, external in nodes
        )
        problem = None if choices else NoCapableNode("nobody")
        self.feed(Chosen(choices, problem, accept, TaskPolicy(local_only=local)))

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

    @precondition(lambda self: self.task.node is not None)
    @rule(confidence=st.sampled_from([None, 0.0, 0.3, 0.59]))
    def unsure(self, confidence: float | None) -> None:
        """The node that holds the task hands an answer back, whether it was asked to or not."""
        report = Report(
            task="t",
            client="c",
            attempt=max(1, self.task.attempt),
            node=self.task.node or "",
            status="unsure",
            output="perhaps",
            confidence=confidence,
        )
        self.feed(Reported(report))

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

    @rule(attempt=ATTEMPTS)
    def fenced(self, attempt: int) -> None:
        """What was announced comes back, or something of another time."""
        self.feed(Fenced(attempt))

    @precondition(lambda self: self.task.phase is Phase.HANDING or self.task.wake_at is not None)
    @rule()
    def fenced_in_time(self) -> None:
        self.feed(Fenced(self.task.attempt))

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
            self.feed(Fenced(self.task.attempt))
            if self.task.wake_at is not None:
                self.now = max(self.now, self.task.wake_at)
                self.feed(Tick())
        assert self.task.ended
        self.ends_at_most_once()


class OneCascade(OneTask):
    """The same, begun with a cascade under way: its first node has been asked."""

    @initialize(
        nodes=st.lists(st.tuples(NODES, STRENGTHS, TIMES, st.booleans()), min_size=1, max_size=6),
        deadline=st.integers(1, 90_000),
        accept=st.sampled_from([0.3, 0.6]),
    )
    def begin(self, nodes: list[Any], deadline: int, accept: float) -> None:
        self.task = GuardedMachine(deadline=deadline, settings=SETTINGS)
        self.known_attempt, self.judged, self.drafted = 0, set(), False
        self.journaled()
        self.chosen(nodes, accept, local=False)


TestOneTask = OneTask.TestCase
TestOneTask.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestOneCascade = OneCascade.TestCase
TestOneCascade.settings = settings(max_examples=200, stateful_step_count=20, deadline=None)
