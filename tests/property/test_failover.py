"""Nodes that are lost, and come back, at any moment: a reader sees one answer without a seam.

A broker that keeps one order for everybody, a router behind it that may lag, nodes that give the
same answer in pieces of any size and hear orders late or never.
"""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from broker.replies import ReplyOrder
from capability_schemas.errors import FoamError, NoCapableNode
from capability_schemas.invocation import Report
from capability_schemas.reply import Chunk, ErrorEvent, Result, Routed
from capability_schemas.wire import encode
from router.events import (
    Action,
    Announce,
    CancelNode,
    Choice,
    Choose,
    Chosen,
    End,
    Event,
    Fenced,
    Invoke,
    Journaled,
    NodeGone,
    Observed,
    Reported,
    Tick,
)
from router.guard import GuardedMachine
from router.settings import RouterSettings

ANSWER = "the bearing of pump 7 is worn, order a new one"
SETTINGS = RouterSettings(attempts=8, hang_ms=5_000)
NAMES = ("a", "b", "c")


@dataclass
class Run:
    """One attempt on a node that says its answer, whoever may want to hear it."""

    node: str
    attempt: int
    seq: int
    at: int
    hold: bool = False
    orders: deque[str] = field(default_factory=deque)
    over: bool = False


class Mesh(RuleBasedStateMachine):
    """One task, three nodes, one reader."""

    continues = "prefix"
    idempotent = False

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.log: list[tuple[str, Chunk | Result | ErrorEvent | Routed]] = []
        self.read = 0
        self.runs: list[Run] = []
        self.reports: deque[Report] = deque()
        self.choosing = 0
        self.task = GuardedMachine(deadline=60_000, settings=SETTINGS)
        self.feed(Journaled())
        self.choosing = 1

    # ---- the router

    def feed(self, event: Event) -> None:
        for action in self.task.handle(event, self.now):
            self.do(action)

    def do(self, action: Action) -> None:
        if isinstance(action, Choose):
            self.choosing += 1
        elif isinstance(action, Announce):
            self.say_routed(action.choice, action.attempt)
        elif isinstance(action, Invoke):
            if not action.announced:
                self.say_routed(action.choice, action.attempt)
            shown = "" if action.continuation is None else "".join(action.continuation.shown)
            assert ANSWER.startswith(shown)
            assert action.continuation is None or action.continuation.chunks == action.seq
            self.runs.append(
                Run(action.choice.node, action.attempt, action.seq, len(shown), action.hold)
            )
        elif isinstance(action, CancelNode):
            for run in self.runs:
                if run.node == action.node and run.attempt <= action.attempt:
                    run.orders.append(action.reason)
        elif isinstance(action, End) and action.payload is None:
            self.log.append(("router", self.final(action)))

    def final(self, end: End) -> Result | ErrorEvent:
        if end.draft is not None:
            text = end.draft.output.decode().strip('"')
            return Result(task="t", at=1, seq=end.seq, attempt=end.attempt, output=text)
        error = end.error or FoamError("nothing")
        return ErrorEvent.from_error(error, task="t", at=1, seq=end.seq, attempt=end.attempt)

    def say_routed(self, choice: Choice, attempt: int) -> None:
        routed = Routed(
            task="t",
            at=1,
            node=choice.node,
            function="f",
            version="1.0.0",
            score=1,
            attempt=attempt,
        )
        self.log.append(("router", routed))

    @precondition(lambda self: self.read < len(self.log))
    @rule(count=st.integers(1, 8))
    def router_hears(self, count: int) -> None:
        for _ in range(min(count, len(self.log) - self.read)):
            source, event = self.log[self.read]
            self.read += 1
            if isinstance(event, Routed):
                self.feed(Fenced(event.attempt))
            elif source != "router":
                code = event.code if isinstance(event, ErrorEvent) else None
                self.feed(
                    Observed(source, event.event, event.seq, event.attempt, encode(event), code)
                )

    @precondition(lambda self: self.reports)
    @rule()
    def router_hears_a_report(self) -> None:
        self.feed(Reported(self.reports.popleft()))

    @precondition(lambda self: self.choosing)
    @rule(order=st.permutations(NAMES), none=st.booleans())
    def chosen(self, order: list[str], none: bool) -> None:
        self.choosing -= 1
        if none:
            self.feed(Chosen((), NoCapableNode("nobody now")))
            return
        choices = tuple(
            Choice(
                node,
                "f",
                "1.0.0",
                0.5,
                continues=self.continues,  # type: ignore[arg-type]
                model="sha256:1",
                idempotent=self.idempotent,
            )
            for node in order
        )
        self.feed(Chosen(choices, hedge_after_ms=50 if self.idempotent else None))

    @rule(node=st.sampled_from(NAMES))
    def node_is_believed_lost(self, node: str) -> None:
        self.feed(NodeGone(node, "its will was heard"))

    @precondition(lambda self: self.task.wake_at is not None)
    @rule()
    def time_comes(self) -> None:
        self.now = max(self.now, self.task.wake_at or 0)
        self.feed(Tick())

    # ---- the nodes

    @precondition(lambda self: any(not run.over for run in self.runs))
    @rule(which=st.integers(0, 5), letters=st.integers(1, 20), report=st.booleans())
    def node_speaks(self, which: int, letters: int, report: bool) -> None:
        speaking = [run for run in self.runs if not run.over]
        run = speaking[which % len(speaking)]
        if report:
            self.report(run, "admitted")
        if run.hold or run.at == len(ANSWER):
            self.finish(run)
            return
        text = ANSWER[run.at : run.at + letters]
        chunk = Chunk(task="t", at=1, seq=run.seq, attempt=run.attempt, data=text)
        self.log.append((run.node, chunk))
        run.seq, run.at = run.seq + 1, run.at + len(text)

    def finish(self, run: Run) -> None:
        run.over = True
        if run.hold:
            self.report(run, "held", output=ANSWER)
            return
        result = Result(task="t", at=1, seq=run.seq, attempt=run.attempt, output=ANSWER)
        self.log.append((run.node, result))
        self.report(run, "finished", seq=run.seq + 1)

    @precondition(lambda self: any(run.orders for run in self.runs))
    @rule(which=st.integers(0, 5))
    def node_hears_an_order(self, which: int) -> None:
        told = [run for run in self.runs if run.orders]
        run = told[which % len(told)]
        reason = run.orders.popleft()
        blank = not any(one.attempt == run.attempt for _, one in self.log if isinstance(one, Chunk))
        if run.over or (reason == "overtaken" and not blank):
            return
        run.over = True
        if reason == "overtaken":
            self.report(run, "failed", code="cancelled", seq=run.seq)

    @precondition(lambda self: any(not run.over for run in self.runs))
    @rule(which=st.integers(0, 5))
    def node_gives_up(self, which: int) -> None:
        speaking = [run for run in self.runs if not run.over]
        run = speaking[which % len(speaking)]
        run.over = True
        self.report(run, "failed", code="node_lost", seq=run.seq)

    def report(self, run: Run, status: str, **more: object) -> None:
        fields = {"task": "t", "client": "c", "node": run.node, "attempt": run.attempt}
        self.reports.append(Report.model_validate({**fields, "status": status, **more}))

    # ---- the reader

    def what_is_shown_is_the_answer(self) -> None:
        order = ReplyOrder()
        text, finals = "", 0
        for source, event in self.log:
            for shown in order.push(event, source):
                if isinstance(shown, Chunk):
                    assert not finals
                    text += str(shown.data)
                elif isinstance(shown, Result):
                    finals += 1
                    assert shown.output == ANSWER
                    assert text in ("", ANSWER)
                elif isinstance(shown, ErrorEvent):
                    finals += 1
        assert ANSWER.startswith(text)
        assert finals <= 1
        self.reader_is_done = finals == 1

    def teardown(self) -> None:
        """Everything is delivered and time goes on: then it ends, for the reader too."""
        for _ in range(400):
            if self.read < len(self.log):
                self.router_hears(8)
            elif self.reports:
                self.router_hears_a_report()
            elif self.choosing:
                self.chosen(list(NAMES), none=False)
            elif any(not run.over and not run.orders for run in self.runs):
                self.node_speaks(0, 20, report=False)
                self.deliver()
            elif self.task.wake_at is not None:
                self.deliver()
                self.time_comes()
            else:
                break
        assert self.task.ended
        self.what_is_shown_is_the_answer()
        assert self.reader_is_done

    def deliver(self) -> None:
        while any(run.orders for run in self.runs):
            self.node_hears_an_order(0)


class HedgedMesh(Mesh):
    """The same with a second node beside a slow one."""

    idempotent = True


class OnceOnlyMesh(Mesh):
    """The same with a function that cannot be gone on with: a clear end, nothing twice."""

    continues = "restart"


TestMesh = Mesh.TestCase
TestMesh.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestHedgedMesh = HedgedMesh.TestCase
TestHedgedMesh.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestOnceOnlyMesh = OnceOnlyMesh.TestCase
TestOnceOnlyMesh.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
