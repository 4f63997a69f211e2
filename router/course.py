"""How far the answer to one task has come, and how another node can go on with it. Pure."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from capability_schemas.invocation import Continuation
from router.commons import Room
from router.events import Observed
from router.settings import RouterSettings
from router.shown import Origin, Shown

if TYPE_CHECKING:
    from router.turns import Turn

_NOT_YET: Final = 0


class Course:
    """The course of one answer over all its attempts.

    Args:
        settings: Bounds.
        room: What shown chunks may take for all tasks together.

    Attributes:
        origin: What the answer was begun with; None before the first invocation.
        shown: What the client has seen of it.
        owed_seq: Number up to which the node before says it has told the client.
        before: Who had the task, to be heard until the fence.
        patient_until: Until when somebody is looked for who goes on, UTC milliseconds.
    """

    def __init__(self, *, settings: RouterSettings, room: Room) -> None:
        self._settings = settings
        self.origin: Origin | None = None
        self.shown = Shown(most=settings.shown_events, most_bytes=settings.shown_bytes, room=room)
        self.owed_seq = 0
        self.before: Turn | None = None
        self.patient_until = _NOT_YET

    def resume(
        self, origin: Origin | None, chunks: Iterable[tuple[int, bytes]], next_seq: int
    ) -> None:
        """Take up what an earlier process knew; see `Shown.restore`."""
        self.origin = origin
        self.shown.restore(chunks, next_seq)

    @property
    def midway(self) -> bool:
        """Whether the client has been shown something that the next node has to go on with."""
        return max(self.shown.next_seq, self.owed_seq) > 0

    @property
    def once(self) -> bool:
        """Whether nobody else may be asked once a node may have begun."""
        return self.origin is not None and self.origin.once

    def can_go_on(self, now: int) -> bool:
        """Tell whether another node can go on, and be patient from now on until there is one."""
        if self.origin is None or not self.origin.midway or not self.shown.whole:
            return False
        if self.patient_until == _NOT_YET:
            self.patient_until = now + self._settings.successor_ms
        return True

    def is_late(self, event: Observed) -> bool:
        """Tell whether an event is of the node before, which the client has heard as well."""
        return self.before is not None and self.before.is_of(event.source, event.attempt)

    def hush(self, attempt: int) -> None:
        """Take it that an attempt was announced: of a node before it nobody hears any more."""
        if self.before is not None and attempt > self.before.attempt:
            self.before = None

    def fenced(self) -> Continuation | None:
        """Hear the node before no more; return what the next one has to know, if that is known."""
        self.shown.skip_to(self.owed_seq)
        self.owed_seq, self.before, self.patient_until = 0, None, _NOT_YET
        return self.shown.continuation()
