"""What a node keeps of the tasks that clients gave it themselves: no router keeps it."""

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from capability_schemas.invocation import Invocation
from capability_schemas.reply import Chunk, Working
from capability_schemas.wire import encode
from node_agent.invocation import Named

_KNOWN_LIMIT: Final = 1_024
_KEPT_BYTES: Final = 4 * 1024 * 1024
"""Events kept of all tasks together; beyond, the client that takes most loses its oldest ends."""

_SHOWN_BYTES: Final = 512 * 1024
"""Chunks kept of one task; of more than that only the end is repeated."""

_RUN_BYTES: Final = 4_096
"""What a task takes that shows nothing, roughly: what the room for 1,024 of them comes to."""

_MOST_STAND_INS: Final = 8_192

Key = tuple[str, str]
"""``(client, task)``."""


class DirectInvocation(Invocation):
    """A run that a client asked for itself; it never travels, and no router hears of it."""


@dataclass(slots=True)
class DirectRun:
    """What is known of a task that was taken.

    Attributes:
        invocation: The attempt that answers it: its own, or that of a router which is gone.
        topic: Where its events go.
        kept: Its chunks so far, by number.
        kept_bytes: What is kept of it takes.
        next_seq: Number of the next event.
        last: Its last event, once it has ended.
    """

    invocation: Named
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

    def runs(self, run: DirectRun) -> bool:
        """Tell whether a task has not ended."""
        return self._running.get(run.topic) is run

    def begin(self, key: Key, invocation: Named, topic: str) -> DirectRun:
        """Keep what will be said of a task."""
        run = self._runs[key] = self._running[topic] = DirectRun(invocation, topic)
        self._trim()
        return run

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

    def missed(self, run: DirectRun, from_seq: int) -> Iterator[bytes]:
        """Make the events of a task from a number on, one by one.

        A reader goes by the numbers: chunks of an ended task that are not kept are stood in for by
        empty ones, as a router does; the whole answer is in the result. Of a task that runs the
        last one says so.
        """
        if run.last is None:
            yield from [payload for seq, payload in run.kept.items() if seq >= from_seq]
            working = Working(
                task=run.invocation.task, at=self._clock(), attempt=run.invocation.attempt
            )
            yield encode(working)
            return
        end, terminal = run.last
        task, attempt = run.invocation.task, run.invocation.attempt
        for seq in range(max(from_seq, end - _MOST_STAND_INS), end):
            kept = run.kept.get(seq)
            stand_in = Chunk(task=task, at=self._clock(), seq=seq, attempt=attempt, data="")
            yield kept if kept is not None else encode(stand_in)
        yield terminal

    def _trim(self) -> None:
        """Forget what ended longest ago of the client that takes most, where it is too much."""
        while len(self._runs) > _KNOWN_LIMIT or self._kept_bytes > _KEPT_BYTES:
            ended = [key for key, run in self._runs.items() if not self.runs(run)]
            if not ended:
                return
            takes: Counter[str] = Counter()
            for key in ended:
                takes[key[0]] += _RUN_BYTES + self._runs[key].kept_bytes
            heaviest = takes.most_common(1)[0][0]
            self.forget(next(key for key in ended if key[0] == heaviest))
