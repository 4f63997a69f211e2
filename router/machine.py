"""The life of one task as a pure state machine: events and a clock in, actions out.

::

    received ─ journaled ─▶ accepted ─ chosen ─▶ invoked ─ report ─▶ admitted ─ chunk ─▶ streaming
                                          ▲         │ refused, silent, lost, failed, unsure:
                                          └─────────┘ next candidate
    any of them ─ final event, cancel, deadline, nobody left ─▶ ended (exactly once)

Only events of the node and the attempt that hold the task count; everything else is late and is
ignored. When a client cancels, or the deadline passes, the node has a short grace to say so
itself, because it may be saying something else at that very moment; only then the router does.
Attempts, leases and refusals follow PROTOCOL section 5.

In a cascade (``router.cascade``) an answer that is not sure enough comes back as a draft and a
stronger candidate is asked. As long as nothing was shown the best draft is what the task ends
with, whatever else would have ended it, save the client's own cancellation. It is told so much
before the deadline as a node has to end by itself.
"""

from collections import deque
from enum import StrEnum
from typing import Literal

from capability_schemas.errors import (
    DeadlineExceeded,
    FoamError,
    NodeLost,
    TaskCancelled,
    Unavailable,
)
from capability_schemas.invocation import Report
from router.cascade import DraftRoom, Escalation, is_stronger
from router.events import (
    Action,
    CancelAsked,
    CancelNode,
    Choice,
    Choose,
    Chosen,
    Draft,
    End,
    Event,
    Invoke,
    Journaled,
    Learn,
    MarkShown,
    NodeGone,
    Observed,
    Reported,
    SendAccepted,
    Tick,
    Uninvoked,
    Unjournaled,
    Verdict,
)
from router.patience import ReportPatience
from router.settings import RouterSettings
from router.verdicts import exhausted, problem_of, verdict_on_end, verdict_on_failure


class Phase(StrEnum):
    """Where a task stands."""

    RECEIVED = "received"
    ACCEPTED = "accepted"
    INVOKED = "invoked"
    ADMITTED = "admitted"
    STREAMING = "streaming"
    ENDED = "ended"


_WITH_NODE = frozenset({Phase.INVOKED, Phase.ADMITTED, Phase.STREAMING})


class TaskMachine:
    """One task from receipt to its one final event.

    Args:
        deadline: UTC milliseconds.
        settings: Time limits and bounds.
        patience: How long to wait for a report, shared by the tasks of a router.
        room: What drafts may take, shared likewise.

    Attributes:
        phase: Where it stands.
        node: Who holds it.
        attempt: How many nodes have been invoked; restored machines go on counting.
        next_seq: Number of the next chunk or final event.
        missed: Chunks whose number was skipped: shown to the client, not seen here.
        cascade: The task's cascade; None where whatever comes is the answer.
    """

    def __init__(
        self,
        *,
        deadline: int,
        settings: RouterSettings,
        patience: ReportPatience | None = None,
        room: DraftRoom | None = None,
    ) -> None:
        self.deadline = deadline
        self.phase = Phase.RECEIVED
        self.node: str | None = None
        self.attempt = 0
        self.next_seq = 0
        self.missed = 0
        self.cascade: Escalation | None = None
        self._settings = settings
        self._patience = patience or ReportPatience(base_ms=settings.report_timeout_ms)
        self._room = room or DraftRoom(settings.draft_bytes)
        self._draft_bytes = 0
        self._invoked_at = 0
        self._choice: Choice | None = None
        self._waiting: deque[Choice] = deque()
        self._early: Chosen | None = None
        self._problems: list[FoamError] = []
        self._tried = 0
        self._closing: FoamError | None = None
        self._closing_by: int | None = None
        self._report_by: int | None = None
        self._finish_by: int | None = None
        self._final_seq = 0
        self._settle_by: int | None = None
        self._shown: deque[tuple[int, bytes]] = deque()
        self._shown_bytes = 0

    @classmethod
    def restore(
        cls,
        *,
        deadline: int,
        settings: RouterSettings,
        node: str | None,
        attempt: int,
        next_seq: int,
        now: int,
        patience: ReportPatience | None = None,
        room: DraftRoom | None = None,
    ) -> "TaskMachine":
        """Take up a task that an earlier process accepted.

        It listens for ``settle_ms`` for what its node has sent meanwhile. Then a task of which
        nothing was shown is chosen for anew; one of which something was shown stays with its node.
        Drafts are not journaled: a cascade starts again, for nothing of it was shown.

        Args:
            deadline: UTC milliseconds.
            settings: Time limits and bounds.
            node: Who held it; None when nobody did.
            attempt: Last attempt journaled.
            next_seq: First number the client may not have seen.
            now: UTC milliseconds.
            patience: As for a new machine.
            room: Likewise.
        """
        machine = cls(deadline=deadline, settings=settings, patience=patience, room=room)
        machine.phase = Phase.INVOKED if node is not None else Phase.ACCEPTED
        machine.node, machine.attempt, machine.next_seq = node, attempt, next_seq
        machine._settle_by = now + settings.settle_ms
        return machine

    @property
    def ended(self) -> bool:
        """Whether the final event is known."""
        return self.phase is Phase.ENDED

    @property
    def shown(self) -> list[tuple[int, bytes]]:
        """Chunks kept for ``resume``, with their numbers, oldest first."""
        return list(self._shown)

    @property
    def shown_bytes(self) -> int:
        """Their size."""
        return self._shown_bytes

    @property
    def _draft(self) -> Draft | None:
        """What the task ends with if nothing better comes; None once something was shown."""
        return self.cascade.draft if self.cascade is not None and self.next_seq == 0 else None

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
        times = [self._closing_by, self._report_by, self._finish_by, self._settle_by]
        if self._closing is None and self._settle_by is None:
            times.append(self._ends_at)
        return min((time for time in times if time is not None), default=None)

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
        match event:
            case Observed():
                return self._on_observed(event, now)
            case Reported():
                return self._on_report(event.report, now)
            case Tick():
                return self._on_tick(now)
            case NodeGone():
                return self._on_gone(event, now)
            case CancelAsked():
                return self._on_cancel(now)
            case _:
                return self._on_router(event, now)

    def _on_router(
        self, event: Journaled | Unjournaled | Chosen | Uninvoked, now: int
    ) -> list[Action]:
        """Take an event of the router's own making."""
        match event:
            case Journaled():
                return self._on_journaled(now)
            case Unjournaled():
                return self._on_unjournaled(event.error)
            case Chosen():
                return self._on_chosen(event, now)
            case Uninvoked():
                return self._mend(event.error, now) if self.phase is Phase.INVOKED else []

    # ---- acceptance and choice

    def _on_journaled(self, now: int) -> list[Action]:
        if self.phase is not Phase.RECEIVED:
            return []
        self.phase = Phase.ACCEPTED
        actions: list[Action] = [SendAccepted()]
        if self._closing is not None:
            return actions + self._end(self._closing)
        if now >= self.deadline:
            return actions + self._end(self._past_deadline())
        if self._early is not None:
            early, self._early = self._early, None
            return actions + self._on_chosen(early, now)
        return actions

    def _on_unjournaled(self, error: FoamError) -> list[Action]:
        if self.phase is not Phase.RECEIVED:
            return []
        self.phase = Phase.ENDED
        return [End(seq=0, attempt=1, error=error, code=error.code.value, journaled=False)]

    def _on_chosen(self, event: Chosen, now: int) -> list[Action]:
        if self.phase is Phase.RECEIVED:
            self._early = event
            return []
        if self.phase is not Phase.ACCEPTED or self._settle_by is not None:
            return []
        if event.problem is not None:
            return self._end(exhausted(self._problems) if self._problems else event.problem)
        self._waiting = deque(event.choices)
        if self.cascade is None and event.min_confidence is not None and event.choices:
            self.cascade = Escalation(accept=event.min_confidence, policy=event.policy)
        if self.cascade is not None:
            self._waiting = deque(self.cascade.order(event.choices))
            if not self._waiting:
                return self._end(self.cascade.denied())
        return self._next(now)

    def _next(self, now: int) -> list[Action]:
        """Invoke the next candidate, or end for want of one."""
        if self.cascade is not None:
            allowed = self.cascade.admissible(self._waiting, now=now, ends_at=self._ends_at)
            self._waiting = deque(allowed)
        tries_left = self._settings.attempts - self._tried
        if not self._waiting or tries_left <= 0:
            return self._end(exhausted(self._problems))
        choice, terms = self._waiting.popleft(), None
        if self.cascade is not None:
            choice, terms = self.cascade.ask(
                choice, self._waiting, now=now, ends_at=self._ends_at, tries_left=tries_left - 1
            )
        self._tried += 1
        self.attempt += 1
        self.node, self._choice = choice.node, choice
        self.phase = Phase.INVOKED
        self._invoked_at = now
        self._report_by = now + self._patience.timeout_ms
        self._finish_by = None
        return [Invoke(choice, self.attempt, self.next_seq, terms)]

    # ---- the node's word

    def _on_report(self, report: Report, now: int) -> list[Action]:
        if not self._holds(report.node, report.attempt):
            return []
        self._hear(now)
        if report.status in {"refused", "failed", "unsure"} and report.seq is not None:
            # What it has shown may still be under way, for reports and replies may cross.
            self.missed += max(0, report.seq - self.next_seq)
            self.next_seq = max(self.next_seq, report.seq)
        match report.status:
            case "admitted":
                if self.phase is Phase.INVOKED:
                    self.phase = Phase.ADMITTED
                return []
            case "finished":
                self._finish_by = now + self._settings.finish_grace_ms
                # Reports and replies travel on different topics and may cross.
                self._final_seq = max(0, (report.seq or 0) - 1)
                return []
            case "refused":
                self._prefer(report.peer)
                return self._learn("refused", now) + self._mend(problem_of(report), now)
            case "failed":
                verdict = verdict_on_failure(report, stopped=self._closing is not None)
                return self._learn(verdict, now) + self._mend(problem_of(report), now)
            case "unsure":
                return self._on_unsure(report, now)

    def _on_unsure(self, report: Report, now: int) -> list[Action]:
        """Keep an answer that is not sure enough, and ask a stronger candidate."""
        kept = (
            self.cascade is not None
            and self._choice is not None
            and self.cascade.answered(self._choice, report)
        )
        learnt = self._learn("unsure" if kept else "failed", now)
        problem = problem_of(report)
        if kept and self.cascade is not None and (self.cascade.settled or not self._keep()):
            return learnt + self._end(self._closing or problem)
        return learnt + self._mend(problem, now)

    def _keep(self) -> bool:
        """Find room for the draft; tell whether there is any."""
        draft_bytes = 0 if self._draft is None else len(self._draft.output)
        kept = self._room.swap(self._draft_bytes, draft_bytes)
        self._draft_bytes = draft_bytes if kept else self._draft_bytes
        return kept

    def _leave(self) -> None:
        """Be over."""
        self.phase = Phase.ENDED
        self._room.swap(self._draft_bytes, 0)
        self._draft_bytes = 0

    def _prefer(self, peer: str | None) -> None:
        """Try a node next that another has named, if it was chosen as a candidate itself.

        In a cascade that must not skip a step.
        """
        named = [choice for choice in self._waiting if choice.node == peer]
        if self.cascade is not None and self._choice is not None:
            named = [choice for choice in named if not is_stronger(choice, self._choice)]
        others = [choice for choice in self._waiting if choice not in named]
        self._waiting = deque(named + others)

    def _learn(self, verdict: Verdict | None, now: int) -> list[Action]:
        """Say how the attempt went; nothing for one of an earlier process."""
        if self._choice is None or verdict is None:
            return []
        return [Learn(self._choice, verdict, now - self._invoked_at)]

    def _on_observed(self, event: Observed, now: int) -> list[Action]:
        if not self._holds(event.source, event.attempt):
            return []
        self._hear(now)
        if event.event == "working" or event.seq is None:
            if self.phase is Phase.INVOKED:
                self.phase = Phase.ADMITTED
            return []
        if event.event == "chunk":
            return self._on_chunk(event.seq, event.payload)
        self._leave()
        return [
            *self._learn(verdict_on_end(event), now),
            End(seq=event.seq, attempt=self.attempt, payload=event.payload, code=event.code),
        ]

    def _hear(self, now: int) -> None:
        """The node that holds the task has given a sign of itself."""
        if self._report_by is not None:
            self._patience.answered(now - self._invoked_at)
        self._report_by = self._settle_by = None

    def _on_chunk(self, seq: int, payload: bytes) -> list[Action]:
        self.phase = Phase.STREAMING
        if seq < self.next_seq:
            return []  # delivered twice
        self.missed += seq - self.next_seq
        first = self.next_seq == 0
        self.next_seq = seq + 1
        self._shown.append((seq, payload))
        self._shown_bytes += len(payload)
        while self._shown and (
            len(self._shown) > self._settings.shown_events
            or self._shown_bytes > self._settings.shown_bytes
        ):
            self._shown_bytes -= len(self._shown.popleft()[1])
        return [MarkShown()] if first else []

    def _on_gone(self, event: NodeGone, now: int) -> list[Action]:
        self._waiting = deque(choice for choice in self._waiting if choice.node != event.node)
        if self.phase not in _WITH_NODE or event.node != self.node:
            return []
        # The node may be alive behind a broken line: its lease on the task ends here.
        lost: list[Action] = [CancelNode(event.node, self.attempt, "superseded")]
        error = NodeLost(
            f"node {event.node} was lost while it had the task: {event.reason}", node=event.node
        )
        return lost + self._learn("lost", now) + self._mend(error, now)

    def _mend(self, problem: FoamError, now: int, *, choose: bool = False) -> list[Action]:
        """Go on without the node that has the task.

        Args:
            problem: Why.
            now: UTC milliseconds.
            choose: Whether to choose anew rather than to take the next candidate.
        """
        self._problems.append(problem)
        self._report_by = self._finish_by = None
        if self._closing is not None:
            return self._end(self._closing)
        if self.next_seq > 0:
            # Something was shown. Continuing it elsewhere needs the shown prefix in the
            # invocation, which protocol version 1 does not carry yet: a clear end instead.
            return self._end(problem)
        untried = not self._waiting and self._tried == 0
        if choose or untried or self._settle_by is not None:
            return self._choose_anew()
        return self._next(now)

    def _choose_anew(self) -> list[Action]:
        self.phase, self.node, self._settle_by = Phase.ACCEPTED, None, None
        return [Choose()]

    # ---- the client and the clock

    def _on_cancel(self, now: int) -> list[Action]:
        cancelled = TaskCancelled("the client cancelled the task")
        if self._closing is not None:
            # In the grace of the deadline there may be a draft, which is not wanted any more.
            self._closing = cancelled
            return []
        return self._close(cancelled, "client", now)

    def _close(
        self, error: FoamError, reason: Literal["client", "deadline"], now: int
    ) -> list[Action]:
        if self.phase is Phase.ACCEPTED:
            return self._end(error)
        self._closing = error
        if self.phase is Phase.RECEIVED or self.node is None:
            return []
        grace_ms = (
            self._settings.cancel_grace_ms
            if reason == "client"
            else self._settings.deadline_grace_ms
        )
        self._closing_by = now + grace_ms
        self._report_by = self._settle_by = None
        return [CancelNode(self.node, self.attempt, reason)]

    def _on_tick(self, now: int) -> list[Action]:
        if self.phase is Phase.RECEIVED:
            return []
        if self._closing is not None and _is_due(self._closing_by, now):
            return self._end(self._closing)
        if self._closing is None and self._settle_by is None and now >= self._ends_at:
            return self._close(self._past_deadline(), "deadline", now)
        if _is_due(self._finish_by, now):
            self.next_seq = max(self.next_seq, self._final_seq)
            return self._learn("lost", now) + self._end(
                Unavailable(f"node {self.node} reports an end that never arrived", node=self.node)
            )
        if self.phase is Phase.INVOKED and _is_due(self._report_by, now):
            return self._on_silence(now)
        if _is_due(self._settle_by, now):
            return self._on_settled(now)
        return []

    def _on_silence(self, now: int) -> list[Action]:
        patient_until = self._invoked_at + self._patience.timeout_ms
        if now < patient_until:  # answers to others have turned out to take longer
            self._report_by = patient_until
            return []
        node, waited_ms = self.node or "", now - self._invoked_at
        self._patience.missed()
        dropped: list[Action] = [CancelNode(node, self.attempt, "superseded")]
        error = NodeLost(
            f"node {node} did not answer the invocation within {waited_ms} ms", node=node
        )
        # With nobody else to ask, the same node is asked again while it passes for alive: after the
        # loss of a broker the router may be back before the node is.
        again = not self._waiting and self._tried < self._settings.attempts
        again = again and self._draft is None
        return dropped + self._learn("lost", now) + self._mend(error, now, choose=again)

    def _on_settled(self, now: int) -> list[Action]:
        if now >= self.deadline:
            self._settle_by = None
            return self._close(self._past_deadline(), "deadline", now)
        if self.next_seq > 0:
            self._settle_by = None
            if self.node is None:
                return self._end(NodeLost("it is not known which node had begun the task"))
            self.phase = Phase.STREAMING
            return []
        superseded: list[Action] = (
            [CancelNode(self.node, self.attempt, "superseded")] if self.node is not None else []
        )
        return superseded + self._choose_anew()

    def _past_deadline(self) -> FoamError:
        return DeadlineExceeded("the deadline passed before the task was done")

    def _holds(self, node: str, attempt: int | None) -> bool:
        """Tell whether a node's word on an attempt is the one that counts."""
        return (
            self.phase in _WITH_NODE
            and node == self.node
            and (attempt is None or attempt == self.attempt)
        )

    def _end(self, error: FoamError) -> list[Action]:
        """End without a node's word: by the draft, where there is one, else by an error."""
        self._leave()
        seq, attempt = self.next_seq, max(1, self.attempt)
        draft = self._draft
        if draft is not None and self.cascade and not isinstance(error, TaskCancelled):
            return [End(seq=seq, attempt=attempt, draft=draft, steps=self.cascade.steps)]
        return [End(seq=seq, attempt=attempt, error=error, code=error.code.value)]


def _is_due(time: int | None, now: int) -> bool:
    return time is not None and now >= time
