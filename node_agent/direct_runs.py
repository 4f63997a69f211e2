"""What a node keeps of the tasks that clients gave it themselves: no router keeps it."""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from capability_schemas.invocation import Invocation
from capability_schemas.reply import Chunk
from capability_schemas.wire import encode

_KNOWN_LIMIT: Final = 1_024
_KEPT_BYTES: Final = 4 * 1024 * 1024
"""Events kept of all tasks together; of those that have ended longest ago none are, beyond."""

_SHOWN_BYTES: Final = 512 * 1024
"""Chunks kept of one task; of more than that only the end is repeated."""

_MOST_STAND_INS: Final = 8_192

Key = tuple[str, str]
"""``(client, task)``."""


class DirectInvocation(Invocation):
    """A run that a client asked for itself; it never travels, and no router hears of it."""


@dataclass(slots=True)
class DirectRun:
    """What is known of a task that was taken.

    Attributes:
        invocation: What was made of it.
        topic: Where its events go.
        kept: Its chunks so far, by number.
        kept_bytes: What is kept of it takes.
        next_seq: Number of the next event.
        last: Its last event, once it has ended.
    """

    invocation: DirectInvocation
    topic: str
    kept: dict[int, bytes] = field(default_factory=dict)
    kept_bytes: int = 0
    next_seq: int = 0
    last: tuple[int, bytes] | None = None


class DirectRuns:
    """The direct tasks of a node that run or have ended lately; bounded. Of the event loop.

    Args:
        clock: UTC milliseconds.
    """

    def __init__(self, *, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._runs: OrderedDict[Key, DirectRun] = OrderedDict()
        self._running: dict[str, DirectRun] = {}  # by topic
        self._kept_bytes = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._runs

    def get(self, key: Key) -> DirectRun | None:
        """Return what is known of a task; None where nothing is."""
        return self._runs.get(key)

    def running(self) -> Iterable[DirectRun]:
        """Return those that have not ended."""
        return self._running.values()

    def begin(self, key: Key, invocation: DirectInvocation, topic: str) -> None:
        """Keep what will be said of a task."""
        self._runs[key] = self._running[topic] = DirectRun(invocation, topic)
        self._trim()

    def keep(self, topic: str, payload: bytes) -> None:
        """Keep an event, if it is one of these tasks and has a number."""
        run = self._running.get(topic)
        if run is None:
            return
        event: dict[str, Any] = json.loads(payload)
        kind, seq = event.get("event"), event.get("seq")
        if kind not in {"chunk", "result", "error"} or not isinstance(seq, int):
            return
        run.next_seq = seq + 1
        if kind != "chunk":
            run.last = seq, payload
        elif run.kept_bytes + len(payload) > _SHOWN_BYTES:
            return
        else:
            run.kept[seq] = payload
        run.kept_bytes += len(payload)
        self._kept_bytes += len(payload)

    def end(self, run: DirectRun) -> None:
        """Note that a task has ended."""
        self._running.pop(run.topic, None)
        self._trim()

    def forget(self, key: Key) -> None:
        """Let go of a task."""
        run = self._runs.pop(key)
        self._running.pop(run.topic, None)
        self._kept_bytes -= run.kept_bytes

    def missed(self, run: DirectRun, from_seq: int) -> list[bytes]:
        """Return the events of a task from a number on.

        A reader goes by the numbers: chunks of an ended task that are not kept are stood in for by
        empty ones, as a router does; the whole answer is in the result.
        """
        if run.last is None:
            return [payload for seq, payload in run.kept.items() if seq >= from_seq]
        end, terminal = run.last
        task, attempt = run.invocation.task, run.invocation.attempt
        events = [
            run.kept.get(seq)
            or encode(Chunk(task=task, at=self._clock(), seq=seq, attempt=attempt, data=""))
            for seq in range(max(from_seq, end - _MOST_STAND_INS), end)
        ]
        return [*events, terminal]

    def _trim(self) -> None:
        """Forget what ended longest ago, where there is too much of it."""
        for key, run in list(self._runs.items()):
            if len(self._runs) <= _KNOWN_LIMIT and self._kept_bytes <= _KEPT_BYTES:
                return
            if run.topic not in self._running:
                self.forget(key)
