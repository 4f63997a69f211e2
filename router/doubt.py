"""A task of which the router may have missed something: first the node that has it is asked.

A node tells the client and the router at the same time. What it says can reach the client and not
the router: a broker that forgets its sessions was restarted, or the router was killed with messages
in its hands. What the router did then of its own accord (the task once more, an end) would be a
second answer. So after a restart, a lost connection, an overflow, and a take-over of a task that
was not watched all the time, the machine is in doubt: the node is asked for an account of its
attempt (a ``Control`` with the verb ``account``), again and again until it answers, and only its
own word counts. Everything else waits, the deadline too:

- ``running``, or a further chunk: nothing decisive was missed;
- its last word once more (``finished`` and the terminal event before it, ``failed`` …);
- ``unknown``: it never had the attempt, or was started anew since.

Of a task whose journal names no node, all that policy lets have it are asked, for a moment: the
journal may have been full, or the router killed before it wrote. Of others nobody is told, and what
they say of it counts for nothing.

A node that is gone meanwhile is given ``RouterSettings.doubt_ms`` to come back: only who is gone
for longer, or for ever, can leave an answer behind that nobody else here has heard.

What a client was told in such a time is not known either, so the router repeats a node's end under
its own name: a reader may have passed it over (PROTOCOL section 3, a lower attempt).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Self

from capability_schemas.errors import NodeLost
from capability_schemas.invocation import Report
from router import events as ev
from router.commons import Commons
from router.entry import Entry
from router.events import WITH_NODE, Action, End, Event, Phase
from router.guard import GuardedMachine
from router.ownership import GENERATION
from router.settings import RouterSettings
from router.times import is_due
from router.turns import Turn

if TYPE_CHECKING:
    from router.shown import Origin

_UNWRITTEN: Final = 1
"""Attempts that a killed router may have made and not written down: it writes at once."""

_FURTHEST: Final = 4 * GENERATION
"""How far such an attempt may be beyond what is known, for the router may have claimed the task for
itself and not written it: what names a higher one is made up."""

_EARLY: Final = 32
"""Words of nodes kept that came before it was known what the nodes offer."""

_UNASKED: Final = frozenset({"unknown", "refused", "failed"})
"""What a node says again when it is asked, and what the router acts upon at once."""

MayHave = Callable[[str, int], bool]
"""Tells of a node whether policy lets it have the task now (UTC milliseconds)."""


@dataclass(slots=True)
class _Doubt:
    """What is asked, and what waits for the answer.

    Attributes:
        turn: The attempt.
        ask_at: When it is asked for next, UTC milliseconds.
        until: Until when an answer is waited for.
        patience_ms: How long one is waited for when the node is gone.
        waiting: What has happened meanwhile, one of each kind.
        bound: Number up to which the client can have heard the attempt; None: not known.
        asked: Whether it was asked.
        finished: Whether it has said that it has told the end.
    """

    turn: Turn
    ask_at: int
    until: int
    patience_ms: int
    waiting: dict[object, Event] = field(default_factory=dict)
    bound: int | None = None
    asked: bool = False
    finished: bool = False

    def keep(self, event: Event) -> None:
        """Let an event wait."""
        kind: object = (type(event), event.node) if isinstance(event, ev.NodeGone) else type(event)
        before = self.waiting.get(kind)
        if isinstance(event, ev.Fenced) and isinstance(before, ev.Fenced):
            event = max(before, event, key=lambda fence: fence.attempt)
        self.waiting[kind] = event

    @property
    def fenced(self) -> bool:
        """Whether readers pass over what the attempt says by now."""
        fence = self.waiting.get(ev.Fenced)
        return isinstance(fence, ev.Fenced) and fence.attempt > self.turn.attempt

    @property
    def seems_gone(self) -> bool:
        """Whether the node was lost meanwhile."""
        return (ev.NodeGone, self.turn.node) in self.waiting

    def found(self) -> Iterable[Event]:
        """Return what waited, but that the node seemed to be gone."""
        gone = (ev.NodeGone, self.turn.node)
        return [event for kind, event in self.waiting.items() if kind != gone]


class DoubtingMachine(GuardedMachine):
    """A task's machine that hears the node out before it acts on half of what was said.

    Attributes:
        may_have: Whose word counts on an attempt that is not known here; None: every node's.
    """

    _doubt: _Doubt | None = None
    _retell = False
    _asked_for: int | None = None
    _silent: Turn | None = None
    _search_until: int | None = None
    _journaled: int | None = None
    _unheeded: ev.CancelAsked | None = None
    _known = 0
    _early_words: dict[tuple[str, str], Event]
    may_have: MayHave | None = None

    @classmethod
    def restore(
        cls,
        entry: Entry,
        *,
        settings: RouterSettings,
        now: int,
        commons: Commons | None = None,
        missed: bool = True,
    ) -> Self:
        """Take up a task; see `TaskMachine.restore`. A node that has it is asked for it.

        Args:
            entry: What is known of it.
            settings: Time limits and bounds.
            now: UTC milliseconds.
            commons: As for a new machine.
            missed: Whether the node may have said something that is not known.
        """
        machine = super().restore(entry, settings=settings, now=now, commons=commons)
        machine.resume(entry, now, patience_ms=settings.doubt_ms if missed else 0)
        return machine

    def resume(self, entry: Entry, now: int, *, patience_ms: int) -> None:
        """Begin with doubt.

        Args:
            entry: As for `restore`.
            now: UTC milliseconds.
            patience_ms: How long an answer is waited for when the node is gone.
        """
        self._retell, self._journaled = patience_ms > 0, entry.attempt
        self.turns.attempt = max(entry.attempt, entry.given) + _UNWRITTEN
        self._early_words, self._known = {}, self.turns.attempt
        if self.turns.current is not None:
            ask_at, self._times.settle = self._times.settle or now, None
            self._wonder(self.turns.current, now, ask_at, patience_ms)

    @property
    def wake_at(self) -> int | None:
        """When the next ``Tick`` is due, UTC milliseconds; None: not before another event."""
        doubt = self._doubt
        return super().wake_at if doubt is None else min(doubt.ask_at, doubt.until)

    def handle(self, event: Event, now: int) -> list[Action]:
        """Take an event; see `TaskMachine.handle`."""
        self._recall(event, now)
        self._note_word(event)
        if isinstance(event, ev.Missed):
            return self._on_missed(now, event.wait_ms)
        if self._doubt is not None:
            actions = self._in_doubt(event, self._doubt, now)
        elif isinstance(event, ev.CancelAsked) and self._sought:
            self._unheeded = event  # whoever has it has to be known first
            return []
        elif isinstance(event, ev.Tick) and self._overdue(now):
            return self._ask_first(now)
        elif isinstance(event, ev.Tick) and self._unsearched(now):
            return self._search(now)
        elif self._unheeded is not None and is_due(self._times.settle, now):
            self._times.settle, cancel, self._unheeded = None, self._unheeded, None
            actions = super().handle(cancel, now)
        else:
            actions = super().handle(event, now)
            self._await_end(event, now)
        if self.ended:
            self._doubt = None
        last = actions[-1] if actions else None
        if self._retell and isinstance(last, End) and last.payload is not None:
            return [*actions[:-1], replace(last, retell=True)]
        return actions

    # ---- getting into doubt

    def _on_missed(self, now: int, wait_ms: int) -> list[Action]:
        if self.ended:
            return []
        self._retell = True
        turn = self._speaking()
        if turn is not None and not turn.over and turn is not self._silent:
            self._wonder(turn, now, now + wait_ms, self._settings.doubt_ms)
        return []

    def _await_end(self, event: Event, now: int) -> None:
        """Wait for the end that a node says it has told: it may be under way yet, or was lost."""
        turn = self._speaking()
        if self.ended or turn is None or not isinstance(event, ev.Reported):
            return
        report, settings = event.report, self._settings
        if report.status == "finished" and turn.is_of(report.node, report.attempt):
            self._retell |= self._held is not None  # the client may have passed it over
            ask_at = now + settings.finish_grace_ms
            until = now + settings.doubt_ms
            self._doubt = _Doubt(turn, ask_at, until, settings.doubt_ms, finished=True)

    def _note_word(self, event: Event) -> None:
        """Take note that a node that had not answered says something again."""
        match event:
            case ev.Reported(report=Report(node=node, attempt=attempt)):
                pass
            case ev.Observed(source=node, attempt=attempt):
                pass
            case _:
                return
        if self._silent is not None and self._silent.is_of(node, attempt):
            self._silent = None

    def _speaking(self) -> Turn | None:
        """Return the attempt whose word counts until the next one is invoked."""
        if self._held is not None:
            return self._speaker
        if self.course.before is not None:
            return self.course.before
        return self.turns.current if self.phase in WITH_NODE else None

    def _wonder(self, turn: Turn, now: int, ask_at: int, patience_ms: int) -> None:
        doubt = self._doubt
        if doubt is not None and doubt.turn is turn and doubt.patience_ms >= patience_ms:
            doubt.ask_at = min(doubt.ask_at, ask_at)  # what is asked for already is not put off
            return
        waiting = doubt.waiting if doubt is not None else {}
        until = max(now, ask_at, self.deadline) + 2 * self._settings.doubt_ms
        if self._closing is not None:
            until = max(now, ask_at) + self._settings.doubt_ms
        self._doubt = _Doubt(turn, ask_at, until, patience_ms, waiting)

    def _overdue(self, now: int) -> bool:
        """Tell, once for each, whether a time has come to do without a node that may be there.

        Fences stand in the order in which one broker hands everything on; some do not keep it.
        """
        due, turn = self._times, self.turns.current
        if self._held is not None or self.phase not in WITH_NODE or turn is None or turn.over:
            return False
        if (
            self._rivalry.answered
        ):  # it was asked to give the task up, and its time for that is over
            return False
        closing = due.closing if self._closing is not None else None
        time = next((at for at in (due.finish, closing, due.quiet) if is_due(at, now)), None)
        new, self._asked_for = time not in {None, self._asked_for}, time or self._asked_for
        return new

    def _ask_first(self, now: int) -> list[Action]:
        """Ask the node, and wait no longer than an answer takes."""
        turn, wait_ms = self.turns.current, self._commons.patience.timeout_ms
        if turn is None:
            return []
        self._doubt = _Doubt(turn, now + wait_ms, now + wait_ms, 0, asked=True)
        return [ev.Ask(turn.node, turn.attempt)]

    @property
    def _sought(self) -> bool:
        """Whether it is not known yet if some node has the task."""
        settled = self._times.settle is None or self.turns.current is not None
        return self._journaled is not None and not settled

    def _unsearched(self, now: int) -> bool:
        """Tell whether a restored task without a node has listened long enough to be asked for.

        Once; of one that was begun, as something was shown, until whoever did can be back.
        """
        if self._journaled is None or not is_due(self._times.settle, now):
            return False
        if self._search_until is None:
            self._search_until = now + (self._settings.doubt_ms if self.next_seq else 0)
        elif now >= self._search_until:
            return False
        self._times.settle = now + self._commons.patience.timeout_ms
        return True

    def _search(self, now: int) -> list[Action]:
        """Hear once more what came too early; if that was nothing, ask all that may have it."""
        actions: list[Action] = []
        for event in self._early_words.values():
            actions += self.handle(event, now)
        return actions if self.ended or self.turns.current is not None else [*actions, ev.Ask()]

    def _recall(self, event: Event, now: int) -> None:
        """Learn of an attempt that was made and not written down before the router was killed.

        What the router said itself it believes, a node only what it may have been asked for.
        """
        if self.turns.tried:
            self._journaled = None  # for good, also when that attempt is forgiven
        if self._journaled is None or self.ended:
            return
        origin: Origin | None = None
        match event:
            case ev.Fenced(attempt=attempt, node=node, origin=known) if node:
                origin = known
            case ev.Observed(source=node, attempt=int(attempt)) if self.turns.current is None:
                pass
            case ev.Reported(report=report) if self.turns.current is None:
                node, attempt = report.node, report.attempt
            case _:
                return
        if attempt <= self._journaled:
            return
        turns = self.turns
        if not isinstance(event, ev.Fenced) and not self._believes(event, node, attempt, now):
            return
        self._journaled, turns.attempt = attempt, max(turns.attempt, attempt)
        turns.current, self.phase = Turn(node, attempt), Phase.INVOKED
        self.course.origin, self._retell = origin or self.course.origin, True
        self._times.settle = self._times.look = None
        self.waiting = False
        ask_at = now if self._doubt is None else self._doubt.ask_at
        self._wonder(turns.current, now, ask_at, self._settings.doubt_ms)
        if self._unheeded is not None and self._doubt is not None:
            self._in_doubt(self._unheeded, self._doubt, now)
            self._unheeded = None

    def _believes(self, event: Event, node: str, attempt: int, now: int) -> bool:
        """Tell whether a node may speak of an attempt; what is too early waits for the search."""
        if attempt > max(self._known, self.turns.floor) + _FURTHEST:
            return False
        if self.may_have is None or self.may_have(node, now):
            return True
        if self._search_until is None and len(self._early_words) < _EARLY:
            self._early_words[type(event).__name__, node] = event
        return False

    # ---- in doubt

    def _in_doubt(self, event: Event, doubt: _Doubt, now: int) -> list[Action]:
        turn = doubt.turn
        match event:
            case ev.Reported(report=report) if turn.is_of(report.node, report.attempt):
                return self._on_account(report, doubt, now)
            case ev.Observed():
                return self._on_word_in_doubt(event, doubt, now)
            case ev.Tick():
                return self._on_tick_in_doubt(doubt, now)
            case ev.Reported():
                return super().handle(event, now)
            case ev.NodeGone(node=node) if node not in {turn.node, self.node}:
                return super().handle(event, now)
        doubt.keep(event)
        if isinstance(event, ev.NodeGone) and event.node == doubt.turn.node:
            doubt.until = min(doubt.until, now + doubt.patience_ms)
            return self._give_up(doubt, now) if now >= doubt.until else []
        if isinstance(event, ev.CancelAsked):
            doubt.until = min(doubt.until, now + self._settings.doubt_ms)
        return []

    def _on_tick_in_doubt(self, doubt: _Doubt, now: int) -> list[Action]:
        if not self._commons.line.up:  # no answer can come: the node has time for it once it can
            doubt.until = max(doubt.until, now + self._settings.doubt_ms)
        if now >= doubt.until:
            return self._give_up(doubt, now)
        if now < doubt.ask_at:
            return []
        self._retell |= doubt.patience_ms > 0  # readers may have passed over what was missed here
        doubt.ask_at, doubt.asked = now + self._commons.patience.timeout_ms, True
        return [ev.Ask(doubt.turn.node, doubt.turn.attempt)]

    def _on_word_in_doubt(self, event: ev.Observed, doubt: _Doubt, now: int) -> list[Action]:
        own = event.attempt is not None and doubt.turn.is_of(event.source, event.attempt)
        if own and event.event == "chunk" and event.seq is not None:
            if doubt.fenced:  # readers have passed it over
                doubt.bound = min(event.seq, event.seq if doubt.bound is None else doubt.bound)
                return []
            if event.seq >= self.next_seq and not doubt.finished:
                # It had not ended, and what follows is heard here.
                self._asked_for = None  # it may be ending just now: that is asked once more
                return super().handle(event, now) + self._go_on_with(doubt.found(), now)
        return super().handle(event, now)

    def _on_account(self, report: Report, doubt: _Doubt, now: int) -> list[Action]:
        """Take the answer, or any other report of the node on that attempt."""
        if report.status in _UNASKED and not doubt.asked:
            # Old, or said to a router that took the task over, whose own word is still to come.
            return []
        turn, told = doubt.turn, report.seq or 0
        told = told if doubt.bound is None else min(told, doubt.bound)
        has_it = self._held is None and turn is self.turns.current and self.phase in WITH_NODE
        if report.status == "finished":  # the end itself is on its way, or was lost: asked again
            doubt.until = min(doubt.until, now + self._settings.doubt_ms)
            doubt.finished = True
            return super().handle(ev.Reported(report), now) if has_it else []
        if report.status == "admitted":
            return super().handle(ev.Reported(report), now) if has_it else []
        if self._held is not None:
            self.course.shown.skip_to(told)
            return self._go_on_with(doubt.found(), now)
        if report.status == "running":
            self.course.owed_seq = max(self.course.owed_seq, told)
            if has_it:
                self._hear(turn, now)
                self.phase = Phase.STREAMING if self.course.midway else Phase.ADMITTED
                if not self._rivalry.answered:
                    self._times.quiet = now + self._settings.hang_ms
            # Where it seemed to be gone: who answers has said that it is there again, before.
            check = [ev.Ask(turn.node, turn.attempt)] if has_it and doubt.seems_gone else []
            return [*self._go_on_with(doubt.found(), now), *check]
        if not has_it:
            self.course.owed_seq = max(self.course.owed_seq, told)
            return self._go_on_with(doubt.found(), now)
        waiting, self._doubt = doubt.found(), None
        if report.status == "unknown":
            unknown = NodeLost(f"node {turn.node} knows nothing of the task", node=turn.node)
            begun = self.course.once or self.course.midway
            actions = self._mend(unknown, now, choose=True, begun=begun)
        else:
            actions = super().handle(ev.Reported(report), now)
        return actions + self._go_on_with(waiting, now)

    def _give_up(self, doubt: _Doubt, now: int) -> list[Action]:
        """Do without an answer; it is not asked again before it says something."""
        self._silent = doubt.turn
        if self.phase in WITH_NODE and self._times.quiet is None:
            self._times.quiet = now + self._settings.hang_ms
        return self._go_on_with(list(doubt.waiting.values()), now)

    def _go_on_with(self, waiting: Iterable[Event], now: int) -> list[Action]:
        """Take up what waited: the doubt is over."""
        self._doubt = None
        actions: list[Action] = []
        for event in waiting:
            if not self.ended:
                actions += super().handle(event, now)
        if self._overdue(now):
            return actions + self._ask_first(now)
        return actions if self.ended else actions + super().handle(ev.Tick(), now)
