"""A task as the ledger keeps it."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from capability_schemas.capability import Continues
from router.shown import Origin

_FRAME: Final = struct.Struct(">QI")


@dataclass(frozen=True, slots=True)
class Entry:
    """One journaled task.

    Attributes:
        client: Whose it is.
        task_id: Its id.
        task: The Task message; empty once the task has ended.
        reply: Reply topic without its last level.
        accepted_at: UTC milliseconds.
        deadline: UTC milliseconds.
        node: Who held it last.
        function: Function of that node.
        version: Its version.
        continues: What becomes of an answer of that function when its node is lost.
        model: Digest of the model file behind it.
        given: Highest number given to an attempt beside that one: announced, or a hedge.
        claimed_by: The router that has it; None: the one whose journal this is.
        claimed_from: First attempt of that router's own.
        attempt: The attempt that it has.
        next_seq: First number the client may not have seen; of an ended task, that of its end.
        ended_at: UTC milliseconds; None while it runs.
        code: Error code of the outcome; None for a result.
        terminal: The final event, as published.
        chunks: What was shown before it, packed by the caller.
    """

    client: str
    task_id: str
    task: bytes
    reply: str
    accepted_at: int
    deadline: int
    node: str | None = None
    function: str | None = None
    version: str | None = None
    attempt: int = 0
    next_seq: int = 0
    ended_at: int | None = None
    code: str | None = None
    terminal: bytes | None = None
    chunks: bytes | None = None
    continues: Continues = "restart"
    model: str | None = None
    given: int = 0
    claimed_by: str | None = None
    claimed_from: int = 1

    @property
    def origin(self) -> Origin | None:
        """What the answer was begun with; None before the first invocation."""
        if self.function is None or self.version is None:
            return None
        return Origin(self.function, self.version, self.continues, self.model)

    @property
    def key(self) -> tuple[str, str]:
        """``(client, task id)``."""
        return self.client, self.task_id


def pack_chunks(shown: Iterable[tuple[int, bytes]]) -> bytes:
    """Return chunks as one blob: number (8 bytes), length (4 bytes), payload, and so on."""
    return b"".join(_FRAME.pack(seq, len(payload)) + payload for seq, payload in shown)


def unpack_chunks(blob: bytes) -> tuple[tuple[int, bytes], ...]:
    """Return what ``pack_chunks`` packed."""
    shown, at = [], 0
    while at < len(blob):
        seq, size = _FRAME.unpack_from(blob, at)
        at += _FRAME.size
        shown.append((seq, blob[at : at + size]))
        at += size
    return tuple(shown)
