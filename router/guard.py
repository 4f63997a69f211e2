"""The end of a task by the router's own word, when a node may be speaking yet.

A node that was cancelled, has passed the deadline or passes for lost may have its own end under
way, held up on a slow line. Two ends would be shown. So the router's end waits behind a fence as
well (``router.machine``): one more attempt is announced, which no node gets; what the node has said
until the announcement has come back counts, its end too; what it says later is of a lower attempt,
which readers pass over.
"""

from dataclasses import replace
from typing import Final

from capability_schemas.reply import ENDS_HERE
from router import events as ev
from router.events import WITH_NODE, Action, Choice, End, Event
from router.patient import PatientMachine
from router.turns import Turn

_UNKNOWN: Final = "unknown"
"""Stands for the function of an attempt that was not written down before the router was killed."""


class GuardedMachine(PatientMachine):
    """A task's machine whose own ends wait for the fence; see `TaskMachine`."""

    _held: End | None = None
    _speaker: Turn | None = None
    _fence: ev.Announce | None = None
    _again_at = 0

    def leave(self) -> None:
        """Be over."""
        super().leave()
        self._held = None if self._fence is not None else self._held

    @property
    def ended(self) -> bool:
        """Whether the final event is known."""
        return super().ended and self._held is None

    @property
    def wake_at(self) -> int | None:
        """When the next ``Tick`` is due, UTC milliseconds; None: not before another event."""
        return super().wake_at if self._held is None else self._again_at

    def handle(self, event: Event, now: int) -> list[Action]:
        """Take an event; see `TaskMachine.handle`."""
        if self._held is not None:
            return self._guarded(event, self._held, now)
        if isinstance(event, ev.Fenced):
            self.course.hush(event.attempt)
        speaker = self._may_speak()
        actions = super().handle(event, now)
        end = actions[-1] if actions else None
        speaker = speaker if speaker is not None and not speaker.over else None
        if not isinstance(end, End) or end.payload is not None or speaker is None:
            return actions
        self._held, self._speaker = end, speaker
        origin = self.course.origin
        choice = speaker.choice or Choice(
            speaker.node,
            origin.function if origin is not None else _UNKNOWN,
            origin.version if origin is not None else _UNKNOWN,
            0.0,
        )
        attempt = self.turns.give(replace(choice, reason=ENDS_HERE), now).attempt
        self._fence = ev.Announce(replace(choice, reason=ENDS_HERE), attempt, last=True)
        self._again_at = now + self._commons.patience.timeout_ms
        return [*actions[:-1], self._fence]

    def _may_speak(self) -> Turn | None:
        """Return the node that the client may be hearing of yet."""
        if self.course.before is not None:
            return self.course.before
        turn = self.turns.current
        return turn if turn is not None and self.phase in WITH_NODE and not turn.hold else None

    def _guarded(self, event: Event, held: End, now: int) -> list[Action]:
        """Hear the node out until the fence, and end."""
        if self._speaker is None:
            return []
        if isinstance(event, ev.Observed):
            return self._on_late(event) if self._speaker.is_of(event.source, event.attempt) else []
        if isinstance(event, ev.Fenced) and event.attempt > self._speaker.attempt:
            self.leave()
            return [replace(held, seq=max(held.seq, self.next_seq), attempt=self.attempt)]
        if isinstance(event, ev.Tick) and now >= self._again_at and self._fence is not None:
            self._again_at = now + self._commons.patience.timeout_ms
            return [self._fence]
        return []
