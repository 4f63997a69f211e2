"""What the sequences of a context still hold, and which of them a new prompt continues. Pure."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final

LEAST_COPIED: Final = 4
"""Shortest common beginning worth a copy, tokens; every prompt begins with the same marks."""


@dataclass(slots=True)
class Sequence:
    """One sequence of a context.

    Attributes:
        number: Its id in the context.
        tokens: Tokens whose keys and values are in memory.
        session: Whose call filled it last.
        used: Order of its last use.
        busy: Whether a call runs in it.
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    session: str | None = None
    used: int = 0
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a prompt goes.

    Attributes:
        target: The idle sequence that takes it.
        source: The sequence that holds its beginning; the target itself, another one to copy from,
            or None.
        shared: Length of that beginning, tokens.
    """

    target: Sequence
    source: Sequence | None = None
    shared: int = 0


def common(left: Items[int], right: Items[int]) -> int:
    """Return the length of the common beginning of two lists of tokens."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return next(at for at in range(length) if left[at] != right[at])


def place(
    sequences: Items[Sequence], tokens: list[int], session: str | None, *, least_copied: int = 0
) -> Placement | None:
    """Choose the sequence for a prompt; None while all are busy.

    The longest common beginning wins, that of the same session among equals. A sequence is
    continued in place when it is the session's own or the prompt goes on where it ends; else its
    beginning is copied, so that whoever filled it finds it again, into the least recently used one.
    At least the last token of the prompt is always decoded: the answer begins with what follows it.

    Args:
        sequences: All of the context.
        tokens: The prompt.
        session: Affinity key, or None.
        least_copied: Shortest beginning that is cheaper to copy than to decode, tokens.
    """
    idle = [one for one in sequences if not one.busy]
    if not idle:
        return None
    oldest = min(idle, key=lambda one: (bool(one.tokens), one.used))
    prompt = tokens[:-1]
    shared, _, source = max(
        (
            (common(one.tokens, prompt), session is not None and one.session == session, one)
            for one in sequences
        ),
        key=lambda found: (*found[:2], not found[2].busy),
    )
    own = session is not None and source.session == session
    if not source.busy and (own or source is oldest or shared == len(source.tokens)):
        return Placement(source, source, shared) if shared else Placement(oldest)
    if shared < max(LEAST_COPIED, least_copied):
        return Placement(oldest)
    return Placement(oldest, source, shared)
