"""A task for which every capable node is full waits, and one that has not begun may be moved. Pure.

In the words of ``router.machine`` a task that waits is accepted and has no node: it can be
cancelled, and its deadline ends it. It leaves the waiting room (``router.waiting``) when it is
chosen for anew, or is shed. A refusal for want of room costs no attempt, for nothing was begun; but
it costs a number, and of those a router has a hundred for a task. So a task that is refused over
and over is offered ever less often: what numbers are left last until its deadline.

It waits in the same way for a node that sleeps, or was lost a moment ago: also when that node was
lost with the task itself, before anything was shown, and nobody else can have it.

A task is moved (``router.stealing``) by asking its node to give it back, which that does only if it
has not begun. Until the node has said so, the task is the node's.
"""

from typing import Final

from capability_schemas.errors import FoamError, NodeLost, Overloaded
from capability_schemas.invocation import Report
from router import events as ev
from router.events import Action, Event, Phase
from router.machine import TaskMachine
from router.verdicts import is_want_of_room

MOST_MOVES: Final = 2
"""How often one task is moved."""

_SPARED: Final = 50
"""Numbers of attempts that are spread over the time that is left."""

_WAKES: Final = "wake_at"
"""What the problem of a task says whose node sleeps, or was just lost, and is to be waited for."""


class PatientMachine(TaskMachine):
    """A task's machine that waits rather than end for want of room; see `TaskMachine`."""

    waiting = False
    moves = 0
    _places: frozenset[tuple[str, str]] = frozenset()
    _start_by: int | None = None
    _refusals = 0
    _begun = 0
    _asked_back = 0
    _given_back = False
    _lost = False
    _returns = False
    _now = 0

    def handle(self, event: Event, now: int) -> list[Action]:
        """Take an event; see `TaskMachine.handle`."""
        self._now = now
        match event:
            case ev.Shed(error):
                waited, self.waiting = self.waiting, False
                return super()._end(error) if waited else []
            case ev.MoveAsked():
                return self._ask_back()
            case ev.Chosen():
                self.waiting = False
                self._places, self._start_by = event.places, event.start_by
                self._returns = self._may_return(event.problem)
            case ev.NodeGone():
                self._lost = event.node == self.node
            case ev.Observed():
                turn = self.turns.current
                if turn is not None and turn.is_of(event.source, event.attempt):
                    self._begun = turn.attempt
            case ev.Reported(report):
                self._note(report)
        actions = super().handle(event, now)
        self._given_back = self._lost = self._returns = False
        if self.ended:
            self.waiting = False
        return actions

    @property
    def movable(self) -> bool:
        """Whether its node may be asked to give it back: as far as is known it has not begun."""
        turn = self.turns.current
        return (
            self.phase is Phase.ADMITTED
            and turn is not None
            and turn.choice is not None
            and not turn.hold
            and self.turns.rival is None
            and self.turns.cascade is None
            and self._closing is None
            and not self.course.midway
            and turn.attempt not in {self._begun, self._asked_back}
            and self.moves < MOST_MOVES
        )

    def _ask_back(self) -> list[Action]:
        turn = self.turns.current
        if turn is None or not self.movable:
            return []
        self._asked_back = turn.attempt
        return [ev.TakeBack(turn.node, turn.attempt)]

    def _note(self, report: Report) -> None:
        """Take note of what a report of the task's node means for waiting and moving."""
        turn = self._holder(report.node, report.attempt)
        if turn is None:
            return
        asked = turn.attempt == self._asked_back
        if report.status == "admitted" and asked:
            self._begun = turn.attempt  # that is how a node says that it goes on with it
        elif is_want_of_room(report):
            self._refusals += 1
            if asked:
                self._given_back, self.moves = True, self.moves + 1
                self.turns.waiting.clear()
            elif turn.choice is not None:
                self._places |= {(turn.node, turn.choice.function)}

    def _mend(
        self, problem: FoamError, now: int, *, choose: bool = False, begun: bool = True
    ) -> list[Action]:
        """Go on without a node; look anew for one that is gone when no candidate is left."""
        turns = self.turns
        bereft = self._lost and not turns.waiting and turns.left > 0 and self._draft is None
        choose = choose or (bereft and self._unfailed)
        return super()._mend(problem, now, choose=choose, begun=begun)

    @property
    def _unfailed(self) -> bool:
        """Whether nobody has failed with the task: those that have are not asked again."""
        return all(isinstance(one, NodeLost | Overloaded) for one in self.turns.problems)

    def _may_return(self, problem: FoamError | None) -> bool:
        """Tell whether whoever could do it may be waited for, though nobody can at the moment.

        After a node that did not answer, too: a busy one may have been slow to, and is still there.
        """
        if problem is None or _WAKES in problem.detail:
            return problem is not None
        again = self.turns.left > 0 and self._unfailed
        return isinstance(problem, Overloaded) and again

    def _end(self, error: FoamError) -> list[Action]:
        """Wait, or look anew for a task that was given back, where that is the remedy; else end."""
        passes = isinstance(error, Overloaded) or _WAKES in error.detail or self._returns
        if not passes or self._closing is not None or self.course.midway:
            return super()._end(error)
        if self._given_back:
            self._forgive()
            return self._choose_anew()
        if not self._places or self._draft is not None or not self.turns.numbers:
            return super()._end(error)
        self._forgive()
        dropped = self._rivalry.drop()
        self._choose_anew()
        self._times.stop()
        # Thousands may wait: the room keeps one set of places for all that wait for the same.
        places, self._places = self._places, frozenset()
        pause_ms = self._pause_ms
        if pause_ms is None:
            self._times.look, self.waiting = self._start_by, True
        else:
            self._times.look, places = self._now + pause_ms, frozenset()
        return [*dropped, ev.Wait(places)]

    @property
    def _pause_ms(self) -> int | None:
        """How long a task is offered to nobody that was refused again and again; None: no pause."""
        numbers = self.turns.numbers
        if numbers > _SPARED:
            return None
        return max(0, self.deadline - self._now) // max(1, numbers)

    def _forgive(self) -> None:
        """Count refusals for want of room no longer."""
        turns = self.turns
        turns.tried = max(0, turns.tried - self._refusals)
        turns.problems = [one for one in turns.problems if not isinstance(one, Overloaded)]
        self._refusals = 0
