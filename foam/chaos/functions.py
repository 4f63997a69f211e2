"""Functions whose answers are known beforehand: what a node runs while its mesh is being broken.

``foam node`` runs this file; the judge and the simulator compute the same answers. They wait rather
than work, and one process of each serves many calls, so that a small machine can run a large mesh.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

from node_agent.functions import function

__all__ = ["answer_of", "count", "look_up", "recite"]


def answer_of(name: str, key: str, pieces: int) -> tuple[tuple[Any, ...], Any]:
    """Return what a function answers: its pieces in order, and its output.

    Args:
        name: Name of the function.
        key: Whose answers differ.
        pieces: How many there shall be.
    """
    mark = hashlib.sha256(key.encode()).hexdigest()[:8]
    if name == "look_up":
        return (), {"mark": mark}
    if name == "count":
        return tuple({"i": i, "mark": mark} for i in range(pieces)), None
    words = tuple(f"{mark}-{i} " for i in range(pieces))
    return words, "".join(words)


async def _told(name: str, key: str, pieces: int, ms: float, fails: bool) -> AsyncIterator[Any]:
    known, _ = answer_of(name, key, pieces)
    for number, piece in enumerate(known):
        if fails and 2 * number >= pieces:
            break
        await asyncio.sleep(ms / 1000 / pieces)
        yield piece
    if fails:
        raise RuntimeError("as it was asked to")


@function(examples=["look up the figure of pump 7"], concurrency=8, idempotent=True)
async def look_up(
    key: str, pieces: int = 0, ms: float = 0.0, fails: bool = False
) -> dict[str, str]:
    """Look a figure up and tell it at once."""
    await asyncio.sleep(ms / 1000)
    if fails:
        raise RuntimeError("as it was asked to")
    output: dict[str, str] = answer_of("look_up", key, pieces)[1]
    return output


@function(examples=["count the parts, one by one"], concurrency=8)
async def count(
    key: str, pieces: int, ms: float = 0.0, fails: bool = False
) -> AsyncIterator[dict[str, Any]]:
    """Count, and tell every number as a value of its own."""
    async for piece in _told("count", key, pieces, ms, fails):
        yield piece


@function(examples=["recite the text word by word"], concurrency=8, continues="skip")
async def recite(key: str, pieces: int, ms: float = 0.0, fails: bool = False) -> AsyncIterator[str]:
    """Recite a text word by word."""
    async for piece in _told("recite", key, pieces, ms, fails):
        yield piece
