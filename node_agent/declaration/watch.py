"""Follows the files of a declaration and has a node take up what was edited."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import structlog

from broker.lifecycle import Service
from capability_schemas.errors import ConfigurationError
from capability_schemas.problem import refusal
from node_agent.declaration.introspection import Introspector
from node_agent.declaration.reader import Declaration
from node_agent.declaration.sources import Stamp, stamp_of

_TOLD_CHARS: Final = 500

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Read = Callable[[Introspector], Declaration]
"""Reads the declaration again; blocks, and is called in a thread."""

Told = Callable[[str], None]
"""Told why the latest edit is not in force, or nothing (an empty text) when it is."""

Apply = Callable[[Declaration], Awaitable[None]]
"""Puts a declaration into force; raises ``ConfigurationError`` and changes nothing."""


class SourceWatch(Service):
    """Reads a declaration again when one of its files has changed.

    Files are polled, for that works on every file system and for any number of them. A file that
    is still being written is left alone: a change counts when it has lasted for one more look. A
    declaration with a mistake is logged, once for each edit, and the one before stays in force.

    Args:
        node: The node, for the log.
        files: The files of the declaration in force, as they were when it was read.
        read: Reads it again.
        apply: Puts it into force.
        told: Told how that went.
        poll_s: Time between two looks, seconds; None for no looking: then only `reload` counts.
    """

    def __init__(
        self,
        *,
        node: str,
        files: Mapping[Path, Stamp | None],
        read: Read,
        apply: Apply,
        told: Told = lambda _: None,
        poll_s: float | None = 1.0,
    ) -> None:
        super().__init__(service_id=node)
        self._node = node
        self._known = dict(files)
        self._read = read
        self._apply = apply
        self._told = told
        self._poll_s = poll_s
        self._asked = asyncio.Event()
        self._introspector = Introspector()

    def reload(self) -> None:
        """Have the declaration read again at once, changed or not."""
        self._asked.set()

    async def _on_start(self) -> None:
        self.spawn(self._follow(), name="follow")

    async def _on_stop(self) -> None:
        self._introspector.close()

    async def _follow(self) -> None:
        last: Mapping[Path, Stamp | None] = {}
        while True:
            asked = await self._pause()
            now = await asyncio.to_thread(lambda: {path: stamp_of(path) for path in self._known})
            settled, last = now == last, now
            if asked or (now != self._known and settled):
                self._known = now
                await self._take_up()

    async def _pause(self) -> bool:
        """Wait for the next look; returns whether somebody asked for it."""
        try:
            async with asyncio.timeout(self._poll_s):
                await self._asked.wait()
        except TimeoutError:
            return False
        self._asked.clear()
        return True

    async def _take_up(self) -> None:
        declaration = await asyncio.to_thread(self._read, self._introspector)
        # A mistake may hide files that were known before: an edit there may be what mends it.
        known = self._known if declaration.problems else {}
        self._known = {**known, **declaration.files}
        error = refusal(declaration.problems)
        if error is None:
            try:
                await self._apply(declaration)
            except ConfigurationError as exc:
                error = exc
            except Exception as exc:  # noqa: BLE001  # supervision boundary: the node goes on
                error = ConfigurationError(f"{type(exc).__name__}: {exc}")
                _log.exception("node.edit_failed", node=self._node)
        self._told("" if error is None else f"edit refused: {error.message}"[:_TOLD_CHARS])
        if error is not None:
            _log.error("node.edit_refused", node=self._node, error=error.message)
