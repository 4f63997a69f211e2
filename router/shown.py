"""What a client has been shown of an answer, kept so that it can be shown again or gone on with.

The router reads along on the reply topics. From that it repeats what a client missed (``resume``),
and gives the next node the beginning of an answer whose node was lost. Both are bounded, for a task
and for all of them together; an answer whose beginning is no longer kept is not gone on with.
"""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from capability_schemas.capability import Continues
from capability_schemas.invocation import Continuation
from router.commons import Room
from router.events import Choice

_MIDWAY: Final = frozenset({"skip", "prefix", "any"})
_FROM_TEXT: Final = frozenset({"prefix", "any"})


@dataclass(frozen=True, slots=True)
class Origin:
    """What an answer was begun with, and how it can be gone on with.

    Attributes:
        function: The function.
        version: Its version.
        continues: What it declares, see `capability_schemas.capability.Continues`.
        model: Digest of the model file behind it; None where there is none, or it is not known.
    """

    function: str
    version: str
    continues: Continues = "restart"
    model: str | None = None

    @classmethod
    def of(cls, choice: Choice) -> "Origin":
        """Return what a choice begins an answer with."""
        return cls(choice.function, choice.version, choice.continues, choice.model)

    @property
    def once(self) -> bool:
        """Whether nobody else may be asked once a node may have begun."""
        return self.continues == "none"

    @property
    def midway(self) -> bool:
        """Whether another node can go on in mid-answer."""
        return self.continues in _MIDWAY

    def successors(self, choices: Iterable[Choice]) -> list[Choice]:
        """Return those who can go on with the answer, in their order, the same model first."""
        fit = [choice for choice in choices if self._fits(choice)]
        return sorted(fit, key=lambda choice: choice.model != self.model)

    def why_not(self, choices: Sequence[Choice]) -> str:
        """Say why none of the candidates can go on with the answer."""
        if not self.midway:
            return f"{self.function} does not go on in mid-answer (continues = {self.continues})"
        if not choices:
            return f"no other node offers {self.function} now"
        return f"no other node offers {self.function} {self.version} with the same model"

    def _fits(self, choice: Choice) -> bool:
        if (choice.function, choice.version) != (self.function, self.version):
            return False
        if self.continues == "skip":
            return choice.continues == "skip"
        same = self.model is not None and choice.model == self.model
        return choice.continues in _FROM_TEXT and (same or self.continues == "any")


class Shown:
    """The chunks of one running task, in order of their numbers.

    Args:
        most: Most chunks kept; the oldest go first.
        most_bytes: Most bytes kept, likewise.
        room: What all tasks may take together, shared by the tasks of a router.

    Attributes:
        next_seq: Number of the next chunk or final event.
        missed: Chunks whose number was skipped: shown to the client, not seen here.
        size_bytes: Bytes kept.
    """

    def __init__(self, *, most: int, most_bytes: int, room: Room) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._room = room
        self._chunks: deque[tuple[int, bytes]] = deque()
        self.next_seq = 0
        self.missed = 0
        self.size_bytes = 0

    @property
    def chunks(self) -> list[tuple[int, bytes]]:
        """Those kept, with their numbers, oldest first."""
        return list(self._chunks)

    @property
    def whole(self) -> bool:
        """Whether every chunk that was shown is kept."""
        return len(self._chunks) == self.next_seq

    def since(self, seq: int) -> list[tuple[int, bytes]]:
        """Return the chunks from a number on that are kept."""
        found: list[tuple[int, bytes]] = []
        for chunk in reversed(self._chunks):
            if chunk[0] < seq:
                break
            found.append(chunk)
        return found[::-1]

    def add(self, seq: int, payload: bytes) -> bool:
        """Take a chunk; tell whether it was new: chunks are delivered at least once."""
        if seq < self.next_seq:
            return False
        self.skip_to(seq)
        self.next_seq = seq + 1
        while self._chunks and (
            len(self._chunks) >= self._most or self.size_bytes + len(payload) > self._most_bytes
        ):
            self._drop()
        while not self._room.swap(0, len(payload)):
            if not self._chunks:
                return True
            self._drop()
        self._chunks.append((seq, payload))
        self.size_bytes += len(payload)
        return True

    def restore(self, chunks: Iterable[tuple[int, bytes]], next_seq: int) -> None:
        """Take what an earlier process had kept.

        Args:
            chunks: Chunks with their numbers, ascending.
            next_seq: First number the client may not have seen.
        """
        for seq, payload in chunks:
            if seq < next_seq:
                self.add(seq, payload)
        self.next_seq, self.missed = max(self.next_seq, next_seq), 0

    def skip_to(self, seq: int) -> None:
        """Take note that the client was shown what is below a number, seen here or not."""
        self.missed += max(0, seq - self.next_seq)
        self.next_seq = max(self.next_seq, seq)

    def continuation(self) -> Continuation | None:
        """Return what the next node has to know; None when nothing was shown, or not all is kept.

        Texts that stand next to each other are joined: where one chunk ends and the next begins is
        a matter of time.
        """
        if not self.whole or not self._chunks:
            return None
        pieces: list[Any] = []
        texts: list[str] = []
        for _, payload in self._chunks:
            data = json.loads(payload).get("data")
            if isinstance(data, str):
                texts.append(data)
                continue
            if texts:
                pieces.append("".join(texts))
                texts = []
            pieces.append(data)
        if texts:
            pieces.append("".join(texts))
        return Continuation(shown=tuple(pieces), chunks=len(self._chunks))

    def release(self) -> None:
        """Give the room back: the task is over. The chunks can still be read."""
        self._room.swap(self.size_bytes, 0)
        self.size_bytes = 0

    def _drop(self) -> None:
        _, oldest = self._chunks.popleft()
        self.size_bytes -= len(oldest)
        self._room.swap(len(oldest), 0)
