"""What the journal is told of tasks under way, so that a killed router can go on with them.

Nobody waits for any of it. Chunks are gathered for a moment, so that a fast stream costs a few
writes a second and not one for each chunk; a router that is killed loses what came in that moment.
"""

import asyncio
from collections.abc import Iterable
from typing import Final

from router.entry import pack_chunks
from router.events import Invoke
from router.ledger import Ledger
from router.live import LiveTask

_GATHERED_S: Final = 0.02

_KEPT: Final = ("by", "chosen", "problem")
"""What is kept of the explanation of a task that waits."""


class TaskNotes:
    """Writes notes on live tasks. Owned by the router's event loop.

    Args:
        ledger: The journal.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._fresh: dict[int, LiveTask] = {}
        self._timer: asyncio.TimerHandle | None = None

    def route(self, live: LiveTask, action: Invoke) -> None:
        """Note who was asked; of a second node beside another one only that there was one."""
        choice = action.choice
        if action.hold:
            self.attempt(live, action.attempt)
            return
        self._ledger.note_route(
            live.arrival.key,
            node=choice.node,
            function=choice.function,
            version=choice.version,
            continues=choice.continues,
            model=choice.model,
            attempt=action.attempt,
        )
        self.explanation(live)

    def attempt(self, live: LiveTask, attempt: int) -> None:
        """Note that a number was given to an attempt: it is not given again."""
        self._ledger.note_attempt(live.arrival.key, attempt)

    def chunk(self, live: LiveTask) -> None:
        """Note soon what the client has been shown."""
        if live.noted_seq == 0 and live.machine.next_seq == 1:
            self._note(live)  # whether anything was shown decides what a restarted router may do
            return
        self._fresh[id(live)] = live
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_GATHERED_S, self._note_fresh)

    def shown(self, tasks: Iterable[LiveTask]) -> None:
        """Note how far all streams have come."""
        for live in tasks:
            if live.machine.next_seq != live.noted_seq:
                self._note(live)

    def explanation(self, live: LiveTask) -> None:
        """Note why a task went where it went."""
        if live.explanation is None:
            return
        explanation = live.explanation()
        cascade = live.machine.turns.cascade
        if cascade is not None:
            explanation |= {"cascade": cascade.describe()}
            if cascade.asked:  # which need not be who was ranked first
                explanation |= {"chosen": list(cascade.asked[0])}
        self._ledger.note_explanation(live.arrival.key, explanation)
        if cascade is None or live.machine.ended:
            live.explanation = None

    def forget_candidates(self, live: LiveTask) -> None:
        """Keep of an explanation only why nobody had room: thousands of tasks may wait."""
        if live.explanation is not None:
            told = live.explanation()
            brief = {name: told.get(name) for name in _KEPT} | {"candidates": []}
            live.explanation = lambda: brief

    def _note_fresh(self) -> None:
        fresh, self._fresh, self._timer = self._fresh, {}, None
        self.shown(live for live in fresh.values() if not live.machine.ended)

    def _note(self, live: LiveTask) -> None:
        course, since = live.machine.course, live.noted_seq
        live.noted_seq = live.machine.next_seq
        goes_on = course.origin is not None and course.origin.midway
        chunks = pack_chunks(course.shown.since(since)) if goes_on else b""
        self._ledger.note_shown(live.arrival.key, live.noted_seq, since=since, chunks=chunks)
