"""The life of one task as a pure state machine: events and a clock in, actions out.

::

    received ─ journaled ─▶ accepted ─ chosen ─▶ invoked ─ report ─▶ admitted ─ chunk ─▶ streaming
                                ▲                 │  ▲ refused, silent, lost, failed, unsure:  │
                 nobody yet can │                 └──┘ next candidate                          │
                                └──── handing ◀──── lost or failed after something was shown ──┘
                                       └─ fenced ─▶ invoked
    any of them ─ final event, cancel, deadline, nobody left ─▶ ended (exactly once)

Only events of the node and the attempt that hold the task count; everything else is late and is
ignored. When a client cancels, or the deadline passes, the node has a short grace to say so
itself, because it may be saying something else at that very moment; only then the router does.
Attempts, leases and refusals follow PROTOCOL section 5.

When a node is lost in mid-answer, and its function says how another one can go on with it
(``router.shown``), the next attempt is announced first. That announcement, once it comes back on
the reply topics, is a fence: what the old node said before it is shown and counted, what it says
after it is ignored by everybody. Only then the next node is invoked, with exactly what was shown.

A second node may be asked beside one that takes long (a hedge); its answer is held back here. When
it is there first, the slow node is asked to give the task up, and the answer is told behind a fence
as well: two nodes never both tell one.

In a cascade (``router.cascade``) an answer that is not sure enough comes back as a draft and a
stronger candidate is asked. As long as nothing was shown the best draft is what the task ends
with, whatever else would have ended it, save the client's own cancellation. It is told so much
before the deadline as a node has to end by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final, Literal, Self

from capability_schemas.errors import (
    DeadlineExceeded,
    FoamError,
    NodeLost,
    TaskCancelled,
    Unavailable,
)
from capability_schemas.invocation import Cascade, Continuation, Report
from router import events as ev
from router.commons import Commons
from router.course import Course
from router.entry import Entry, unpack_chunks
from router.events import UNASKED, WITH_NODE, Action, Choice, Draft, End, Event, Phase
from router.held import Keep, Rivalry, lesson
from router.settings import RouterSettings
from router.shown import Origin
from router.times import Times, is_due
from router.turns import Turn, Turns
from router.verdicts import exhausted, problem_of, verdict_on_end, verdict_on_failure

_LAST_WORDS: Final = frozenset({"refused", "failed", "unsure", "held"})
_LATE: Final = "the deadline passed before the task was done"


class TaskMachine:
    """One task from receipt to its one final event.

    Args:
        deadline: UTC milliseconds.
        settings: Time limits and bounds.
        commons: What it shares with the other tasks of a router; its own when None.

    Attributes:
        phase: Where it stands.
        turns: Who has been asked and who may be.
        course: How far the answer has come, and how it can be gone on with.
    """

    def __init__(
        self, *, deadline: int, settings: RouterSettings, commons: Commons | None = None
    ) -> None:
        self.deadline = deadline
        self.phase = Phase.RECEIVED
        self._commons = commons or Commons.of(settings)
        self.turns = Turns(most=settings.attempts)
        self.course = Course(settings=settings, room=self._commons.shown)
        self._settings = settings
        self._keep = Keep(self._commons)
        self._rivalry = Rivalry(self.turns, self._commons, self._keep)
        self._early: ev.Chosen | None = None
        self._closing: FoamError | None = None
        self._times = Times()
        self._hedge_after_ms: int | None = None
        self._terms: Cascade | None = None
        self._final_seq = 0

    @classmethod
    def restore(
        cls, entry: Entry, *, settings: RouterSettings, now: int, commons: Commons | None = None
    ) -> Self:
        """Take up a task that an earlier process, or another router, accepted.

        It stays with its node, as long as that is there and knows of it (`router.doubt`). One
        without a node is chosen for anew, when it has listened for ``settle_ms`` for what was said
        meanwhile. Drafts are not journaled: a cascade starts again, for nothing of it was shown.

        Args:
            entry: What is known of it, the chunks shown so far included.
            settings: Time limits and bounds.
            now: UTC milliseconds.
            commons: As for a new machine.
        """
        machine = cls(deadline=entry.deadline, settings=settings, commons=commons)
        machine.phase = Phase.INVOKED if entry.node is not None else Phase.ACCEPTED
        machine.turns.resume(entry.node, entry.attempt)
        machine.course.resume(entry.origin, unpack_chunks(entry.chunks or b""), entry.next_seq)
        machine._times.settle = now + settings.settle_ms
        return machine

    @property
    def node(self) -> str | None:
        """Who holds the task, or will."""
        return None if self.turns.current is None else self.turns.current.node

    @property
    def attempt(self) -> int:
        """Highest number of an attempt; restored machines go on counting."""
        return self.turns.attempt

    @property
    def speaking_attempt(self) -> int:
        """The attempt that readers hear: of a lower one they hear nothing any more."""
        current = self.turns.current
        return max(1, self.attempt if current is None else current.attempt)

    @property
    def next_seq(self) -> int:
        """Number of the next chunk or final event."""
        return self.course.shown.next_seq

    @property
    def ended(self) -> bool:
        """Whether the final event is known."""
        return self.phase is Phase.ENDED

    @property
    def _draft(self) -> Draft | None:
        """What the task ends with if nothing better comes; None once something was shown."""
        return None if self.course.midway else self.turns.draft

    @property
    def _ends_at(self) -> int:
        """When the nodes' time is over, UTC milliseconds."""
        held = self._draft is not None
        return self.deadline - (self._settings.deadline_grace_ms if held else 0)

    @property
    def wake_at(self) -> int | None:
        """When the next ``Tick`` is due, UTC milliseconds; None: not before another event."""
        if self.phase in {Phase.ENDED, Phase.RECEIVED}:
            return None
        return self._times.earliest(closing=self._closing is not None, ends_at=self._ends_at)

    def handle(self, event: Event, now: int) -> list[Action]:
        """Take an event.

        Args:
            event: What happened.
            now: UTC milliseconds.

        Returns:
            What to do, in order; nothing once the task has ended.
        """
        if self.phase is Phase.ENDED:
            return []
        return self._HANDLERS[type(event)](self, event, now)

    # ---- acceptance and choice

    def _on_journaled(self, _event: ev.Journaled, now: int) -> list[Action]:
        if self.phase is not Phase.RECEIVED:
            return []
        self.phase = Phase.ACCEPTED
        self._commons.retries.earn()
        self._commons.hedges.earn()
        actions: list[Action] = [ev.SendAccepted()]
        if self._closing is not None:
            return actions + self._end(self._closing)
        if now >= self.deadline:
            return actions + self._end(DeadlineExceeded(_LATE))
        if self._early is not None:
            early, self._early = self._early, None
            return actions + self._on_chosen(early, now)
        return actions

    def _on_unjournaled(self, event: ev.Unjournaled, _now: int) -> list[Action]:
        if self.phase is not Phase.RECEIVED:
            return []
        self.phase, error = Phase.ENDED, event.error
        return [End(seq=0, attempt=1, error=error, code=error.code.value, journaled=False)]

    def _on_chosen(self, event: ev.Chosen, now: int) -> list[Action]:
        if self.phase is Phase.RECEIVED:
            self._early = event
            return []
        if self.phase is not Phase.ACCEPTED or self._times.settle is not None:
            return []
        if self.course.midway:
            return self._hand_over(event.choices, now)
        problems = self.turns.problems
        if event.problem is not None:
            return self._end(exhausted(problems) if problems else event.problem)
        self._hedge_after_ms = event.hedge_after_ms
        denied = self.turns.offer(event)
        return self._next(now) if denied is None else self._end(denied)

    def _next(self, now: int) -> list[Action]:
        """Invoke the next candidate, or end for want of one."""
        asked = self.turns.next(now, self._ends_at)
        if asked is None:
            return self._end(exhausted(self.turns.problems))
        choice, self._terms = asked
        if self.course.before is None:
            return self._begin(choice, self._give(choice, Phase.INVOKED, now), now)
        # Somebody may be speaking yet: first all of that has to be known.
        return [ev.Announce(choice, self._give(choice, Phase.HANDING, now).attempt)]

    def _begin(
        self, choice: Choice, turn: Turn, now: int, continuation: Continuation | None = None
    ) -> list[Action]:
        """Invoke a node; with nothing to go on with, the answer begins here."""
        announced, self.phase, turn.since = self.phase is Phase.HANDING, Phase.INVOKED, now
        self._times.report = now + self._commons.patience.timeout_ms
        if continuation is None:
            self.course.origin, slow_ms = Origin.of(choice), self._hedge_after_ms
            if self._terms is None and slow_ms is not None and self._rivalry.worth:
                self._times.hedge = now + slow_ms
        how = ev.Invoke(choice, turn.attempt, self.next_seq, self._terms)
        return [replace(how, continuation=continuation, announced=announced)]

    def _give(self, choice: Choice, phase: Phase, now: int) -> Turn:
        """Give the task to a node."""
        self._times.stop()
        self.phase = phase
        self._times.report = now + self._commons.patience.timeout_ms
        return self.turns.give(choice, now)

    # ---- going on in mid-answer

    def _go_on(self, problem: FoamError, now: int) -> list[Action]:
        """Have another node go on with what was shown, or end by the problem."""
        if not self.course.can_go_on(now):
            return self._end(problem)
        return self._hand_over(tuple(self.turns.waiting), now)

    def _hand_over(self, known: tuple[Choice, ...], now: int) -> list[Action]:
        """Announce who goes on with the answer; look again for a while where nobody can."""
        choice = self.turns.successor(self.course.origin, known)
        if choice is not None:
            self._terms = self.turns.last_terms
            return [ev.Announce(choice, self._give(choice, Phase.HANDING, now).attempt)]
        if not self.turns.left or now >= self.course.patient_until:
            problem, why = self.turns.problems[-1], self.turns.why_nobody(self.course.origin, known)
            return self._end(NodeLost(f"{problem.message}; {why}", **problem.detail))
        if self.phase is not Phase.ACCEPTED:  # those that were left are not all there are
            return self._choose_anew()
        self._times.look = now + self._settings.successor_pause_ms
        return []

    def _on_fenced(self, event: ev.Fenced, now: int) -> list[Action]:
        """All that the node before has said is counted: go on with the next one."""
        self.course.hush(event.attempt)
        turn = self.turns.current
        if self.phase is not Phase.HANDING or turn is None or event.attempt != turn.attempt:
            return []
        continuation = self.course.fenced()
        self._times.stop()
        if turn.hold:
            return self._take_held(turn, now)
        choice, origin = turn.choice, self.course.origin
        fits = choice is not None and origin is not None and origin.successors([choice])
        if choice is not None and (self.next_seq == 0 or (fits and continuation is not None)):
            return self._begin(choice, turn, now, continuation)
        # It was said to begin or to go on with less than there is now.
        return self._go_on(self.turns.problems[-1], now)

    # ---- a second node beside a slow one

    def _take_held(self, turn: Turn, now: int) -> list[Action]:
        """Behind the fence: the second node's answer is the task's, or will be."""
        if self.course.midway:  # the first one has begun to show its own after all
            dropped: list[Action] = [ev.CancelNode(turn.node, turn.attempt, "superseded")]
            return dropped + self._go_on(self.turns.problems[-1], now)
        if turn.draft is not None:
            self.leave()
            return [End(seq=0, attempt=turn.attempt, draft=turn.draft)]
        self.phase = Phase.ADMITTED
        self._times.quiet = now + self._settings.hang_ms
        return []

    # ---- the node's word

    def _on_reported(self, event: ev.Reported, now: int) -> list[Action]:
        report = event.report
        if self._rivalry.owns(report.node, report.attempt):
            actions = self._rivalry.hear(report, now)
            if self._rivalry.answered:  # so long the first one may take to give up
                self._times.quiet = now + self._commons.patience.timeout_ms
            return actions
        turn = self._holder(report.node, report.attempt)
        if turn is None or report.status in {"running", "unknown"}:
            return []
        self._hear(turn, now)
        turn.over = report.status in _LAST_WORDS
        if report.status in {"refused", "failed", "unsure"} and report.seq is not None:
            # What it has shown may still be under way, for reports and replies may cross.
            self.course.owed_seq = max(self.next_seq, report.seq)
        return self._on_word(turn, report, now)

    def _on_word(self, turn: Turn, report: Report, now: int) -> list[Action]:
        match report.status:
            case "admitted":
                if self.phase is Phase.INVOKED:
                    self.phase = Phase.ADMITTED
                return []
            case "finished":
                self._times.finish = now + self._settings.finish_grace_ms
                # Reports and replies travel on different topics and may cross.
                self._final_seq = max(0, (report.seq or 0) - 1)
                return []
            case "unsure" | "held":
                return self._on_answer(turn, report, now)
        refused = report.status == "refused"
        if refused:
            self.turns.prefer(report.peer)
        verdict = verdict_on_failure(report, stopped=self._closing is not None)
        learnt = lesson(turn, "refused" if refused else verdict, now)
        return learnt + self._mend(problem_of(report), now, begun=not refused)

    def _on_answer(self, turn: Turn, report: Report, now: int) -> list[Action]:
        """Keep an answer that is not sure enough and ask a stronger node; tell a held one."""
        problem, cascade, choice = problem_of(report), self.turns.cascade, turn.choice
        if choice is not None and turn.hold and report.status == "held" and not self.course.midway:
            draft = self._keep.keep(Draft.of(choice, report))
            if draft is not None:
                self.leave()
                told: list[Action] = [End(seq=0, attempt=turn.attempt, draft=draft)]
                return lesson(turn, "good", now) + told
        if choice is None or cascade is None or not cascade.answered(choice, report):
            return lesson(turn, "failed", now) + self._mend(problem, now)
        learnt = lesson(turn, "unsure", now)
        if cascade.settled or self._keep.keep(self._draft) is None:
            return learnt + self._end(self._closing or problem)
        return learnt + self._mend(problem, now, begun=False)

    def leave(self) -> None:
        """Be over."""
        self.phase = Phase.ENDED
        self.course.shown.release()
        self._keep.keep(None)

    def _on_observed(self, event: ev.Observed, now: int) -> list[Action]:
        if self.course.is_late(event):  # until the fence: the client has heard it too
            return self._on_late(event)
        turn = self._holder(event.source, event.attempt)
        if turn is None or turn.hold:
            return []
        self._hear(turn, now)
        self._times.quiet = now + self._settings.hang_ms
        if event.event == "working" or event.seq is None:
            if self.phase is Phase.INVOKED:
                self.phase = Phase.ADMITTED
            return []
        first = self._rivalry.drop() if self.turns.rival else []
        if event.event == "chunk":
            self.phase = Phase.STREAMING
            return first + self._show(event.seq, event.payload)
        return first + lesson(turn, verdict_on_end(event), now) + self._over(event)

    def _on_late(self, event: ev.Observed) -> list[Action]:
        if event.seq is None or event.event == "working":
            return []
        chunk = event.event == "chunk"
        return self._show(event.seq, event.payload) if chunk else self._over(event)

    def _over(self, event: ev.Observed) -> list[Action]:
        """End by a node's own word."""
        last = self._rivalry.drop()
        self.leave()
        seq = self.next_seq if event.seq is None else event.seq
        attempt = event.attempt or max(1, self.attempt)
        return [*last, End(seq=seq, attempt=attempt, payload=event.payload, code=event.code)]

    def _show(self, seq: int, payload: bytes) -> list[Action]:
        """Take note of a chunk that the client has seen."""
        return [ev.MarkShown()] if self.course.shown.add(seq, payload) else []

    def _hear(self, turn: Turn, now: int) -> None:
        """The node that holds the task has given a sign of itself."""
        if self._times.report is not None:
            self._commons.patience.answered(now - turn.since)
        self._times.report = self._times.settle = None

    def _on_gone(self, event: ev.NodeGone, now: int) -> list[Action]:
        self.turns.drop(event.node)
        if event.node != self.node:
            return self._rivalry.gone(event.node, now)
        why = f"node {event.node} was lost while it had the task: {event.reason}"
        error = NodeLost(why, node=event.node)
        turn = self.turns.current
        if self.phase is Phase.HANDING and turn is not None:
            # It has not been asked yet; or it was held back, and its answer may be here already.
            if turn.draft is not None:
                return []
            self.turns.tried -= not turn.hold
            return self._mend(error, now, begun=turn.hold)
        return self._lose(error, now) if self.phase in WITH_NODE else []

    def _lose(self, error: FoamError, now: int, *, choose: bool = False) -> list[Action]:
        """Go on without a node that may be alive behind a broken line: its lease ends here."""
        turn = self.turns.current
        if turn is None:
            return self._end(error)
        lost: list[Action] = [ev.CancelNode(turn.node, turn.attempt, "superseded")]
        return lost + lesson(turn, "lost", now) + self._mend(error, now, choose=choose)

    def _on_uninvoked(self, event: ev.Uninvoked, now: int) -> list[Action]:
        turn, unasked = self.turns.current, self.phase in {Phase.INVOKED, Phase.HANDING}
        if self._rivalry.uninvoked(event.attempt) or not unasked or turn is None:
            return []
        if event.attempt not in {None, turn.attempt}:
            return []
        turn.over = True
        return self._mend(event.error, now, begun=False)

    def _mend(
        self, problem: FoamError, now: int, *, choose: bool = False, begun: bool = True
    ) -> list[Action]:
        """Go on without the node that has the task.

        Args:
            problem: Why.
            now: UTC milliseconds.
            choose: Whether to choose anew rather than to take the next candidate.
            begun: Whether the node may have begun with it.
        """
        turns = self.turns
        turns.problems.append(problem)
        self._times.stop()
        if self.phase is not Phase.HANDING and turns.current is not None:
            silent = turns.current.over and not self.course.midway
            self.course.before = None if silent else turns.current
        if self._closing is not None:
            return self._end(self._closing)
        if begun and self.course.once:
            return self._end(problem)
        if not self.course.midway and (rival := turns.promote()) is not None and rival.choice:
            self.phase = Phase.HANDING
            self._times.report = now + self._commons.patience.timeout_ms
            return [ev.Announce(rival.choice, rival.attempt)]
        if begun and not self._commons.retries.take(now):
            return self._end(problem)
        if self.course.midway:
            return self._go_on(problem, now)
        untried = not turns.waiting and turns.tried == 0
        if choose or untried or self._times.settle is not None:
            return self._choose_anew()
        return self._next(now)

    def _choose_anew(self) -> list[Action]:
        self.phase, self.turns.current, self._times.settle = Phase.ACCEPTED, None, None
        return [ev.Choose()]

    # ---- the client and the clock

    def _on_cancel(self, _event: ev.CancelAsked, now: int) -> list[Action]:
        cancelled = TaskCancelled("the client cancelled the task")
        if self._closing is not None:
            # In the grace of the deadline there may be a draft, which is not wanted any more.
            self._closing = cancelled
            return []
        return self._close(cancelled, "client", now)

    def _close(
        self, error: FoamError, reason: Literal["client", "deadline"], now: int
    ) -> list[Action]:
        if self.phase in UNASKED:
            return self._end(error)
        self._closing = error
        turn = self.turns.current
        if self.phase is Phase.RECEIVED or turn is None:
            return []
        client, settings = reason == "client", self._settings
        grace_ms = settings.cancel_grace_ms if client else settings.deadline_grace_ms
        self._times.closing = now + grace_ms
        self._times.report = self._times.settle = None
        return [*self._rivalry.drop(), ev.CancelNode(turn.node, turn.attempt, reason)]

    def _on_tick(self, _event: ev.Tick, now: int) -> list[Action]:
        due = self._times
        if self.phase is Phase.RECEIVED:
            return []
        if self._closing is not None:
            if is_due(due.closing, now):
                return self._end(self._closing)
        elif due.settle is None and now >= self._ends_at:
            return self._close(DeadlineExceeded(_LATE), "deadline", now)
        if is_due(due.finish, now):
            self.course.shown.skip_to(self._final_seq)
            unsaid = f"node {self.node} reports an end that never arrived"
            lost = lesson(self.turns.current, "lost", now)
            return lost + self._end(Unavailable(unsaid, node=self.node))
        if is_due(due.report, now):
            return self._on_silence(now)
        if is_due(due.settle, now):
            return self._on_settled(now)
        return [] if self._closing is not None else self._on_pause_over(now)

    def _on_pause_over(self, now: int) -> list[Action]:
        due = self._times
        if is_due(due.look, now):
            due.look = None
            return [ev.Choose()]
        if is_due(due.hedge, now):
            due.hedge = None
            return [] if self.course.midway else self._rivalry.begin(now)
        if is_due(due.quiet, now):
            return self._lose(NodeLost(f"node {self.node} has fallen silent", node=self.node), now)
        return []

    def _on_silence(self, now: int) -> list[Action]:
        turn, patience_ms = self.turns.current, self._commons.patience.timeout_ms
        if turn is None or self.phase not in {Phase.INVOKED, Phase.HANDING}:
            self._times.report = None
            return []
        if self.phase is Phase.HANDING and turn.choice is not None:
            # Lost with a broker, perhaps: said once more it is as good a fence.
            self._times.report = now + patience_ms
            return [ev.Announce(turn.choice, turn.attempt)]
        patient_until = turn.since + patience_ms
        if now < patient_until:  # answers to others have turned out to take longer
            self._times.report = patient_until
            return []
        self._commons.patience.missed()
        waited_ms = now - turn.since
        why = f"node {turn.node} did not answer the invocation within {waited_ms} ms"
        # With nobody else to ask, the same node is asked again while it passes for alive: after the
        # loss of a broker the router may be back before the node is.
        again = not self.turns.waiting and self.turns.left > 0 and self._draft is None
        return self._lose(NodeLost(why, node=turn.node), now, choose=again)

    def _on_settled(self, now: int) -> list[Action]:
        self._times.settle = None
        if now >= self.deadline:
            return self._close(DeadlineExceeded(_LATE), "deadline", now)
        unknown = NodeLost("it is not known which node had begun the task")
        return self._end(unknown) if self.next_seq > 0 else self._choose_anew()

    def _holder(self, node: str, attempt: int | None) -> Turn | None:
        """Return the turn that a node speaks of, if its word counts."""
        turn = self.turns.current
        counts = self.phase in WITH_NODE and turn is not None and turn.is_of(node, attempt)
        return turn if counts else None

    def _end(self, error: FoamError) -> list[Action]:
        """End without a node's word: by the draft, where there is one, else by an error."""
        last = self._rivalry.drop()
        self.course.shown.skip_to(self.course.owed_seq)
        self.leave()
        end = End(seq=self.next_seq, attempt=max(1, self.attempt))
        if self._draft is not None and not isinstance(error, TaskCancelled):
            return [*last, replace(end, draft=self._draft, steps=self.turns.steps)]
        return [*last, replace(end, error=error, code=error.code.value)]

    _HANDLERS: ClassVar[Mapping[type, Callable[[Any, Any, int], list[Action]]]] = {
        ev.Journaled: _on_journaled,
        ev.Unjournaled: _on_unjournaled,
        ev.Chosen: _on_chosen,
        ev.Uninvoked: _on_uninvoked,
        ev.Reported: _on_reported,
        ev.Observed: _on_observed,
        ev.Fenced: _on_fenced,
        ev.NodeGone: _on_gone,
        ev.CancelAsked: _on_cancel,
        ev.Tick: _on_tick,
    }
