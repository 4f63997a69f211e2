"""A façade for programs without an event loop: the same client, one thread behind it.

::

    with BlockingMesh() as mesh:
        for text in mesh.stream("pump 7 vibrates at 14 mm/s, what now?"):
            print(text, end="")
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from capability_schemas.reply import Result
from foam.sdk.client import MeshClient, TaskHandle

__all__ = ["BlockingMesh"]

_R = TypeVar("_R")


class BlockingMesh:
    """`MeshClient` for synchronous code; a context manager, entered once.

    A thread of its own runs the loop. Methods may be called from several threads.

    Args:
        url: Broker; the mesh of the data folder when omitted.
        options: As for `MeshClient`.
    """

    def __init__(self, url: str | None = None, **options: Any) -> None:
        self._client = MeshClient(url, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="foam-mesh", daemon=True
        )

    def __enter__(self) -> Self:
        """Connect; raises as entering `MeshClient` does."""
        self._thread.start()
        try:
            self._run(self._client.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect and end the thread."""
        try:
            self._run(self._client.__aexit__(kind, error, trace))
        finally:
            self._end()

    def ask(self, text: str | None = None, **options: Any) -> Result:
        """Submit a task and wait for its result; as `MeshClient.ask`."""
        return self._run(self._client.ask(text, **options))

    def stream(self, text: str | None = None, **options: Any) -> Iterator[str]:
        """Submit a task and yield its answer as text; abandoning the iterator cancels the task.

        Raises:
            FoamError: The task ended with an error.
        """
        handle: TaskHandle = self._run(self._client.submit(text, **options))
        pieces = handle.text()
        try:
            while (piece := self._run(_next(pieces))) is not None:
                yield piece
        finally:
            if handle.outcome is None:
                self._run(handle.cancel())
                handle.close()

    def admin(self, verb: str, **options: Any) -> Any:
        """Administrate; as `MeshClient.admin`."""
        return self._run(self._client.admin(verb, **options))

    def _run(self, coroutine: Coroutine[Any, Any, _R]) -> _R:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(pieces: Any) -> str | None:
    async for piece in pieces:
        return str(piece)
    return None
