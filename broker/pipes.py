"""What child processes write, on pipes of our own.

asyncio's pipes (``stdout=PIPE``) belong to the process object: its ``wait`` also waits for their
end (cpython issue 119710), which may never come, for whatever the child started can hold the other
end; and what is not closed when the loop ends is leaked. These pipes are closed when their ``with``
is left, by nobody else and whoever still holds the other end.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

_READ_BYTES: Final = 64 * 1024
"""Capacity of a pipe on Linux, ``pipe(7)``."""

_WINDOW_S: Final = 1.0


class OutputPipe:
    """The read end of a pipe on the running loop; a context manager, used once.

    ::

        with OutputPipe(take) as pipe:
            process = await asyncio.create_subprocess_exec(*command, stdout=pipe.write_end)
            pipe.started()
            await process.wait()
            await pipe.drain(1.0)

    Args:
        on_data: Gets what is written, in pieces.
        limit_bytes_s: Bytes a second beyond which the pipe is left alone for the rest of the
            second, so that the writers wait and the reader is not kept busy; None for no limit.
    """

    def __init__(
        self, on_data: Callable[[bytes], None], *, limit_bytes_s: int | None = None
    ) -> None:
        self._on_data = on_data
        self._limit_bytes_s = limit_bytes_s
        self._window_s = 0.0
        self._taken = 0
        self._pause: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._loop.add_reader(self._read_end, self._read)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.started()
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._read_end)
        os.close(self._read_end)

    @property
    def write_end(self) -> int:
        """Descriptor for the child; not inherited by other children."""
        return self._write_end

    @property
    def paused(self) -> bool:
        """Whether it is left alone for now."""
        return self._pause is not None

    def started(self) -> None:
        """Close our copy of the write end: from here on the pipe ends with its writers."""
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1

    async def drain(self, limit_s: float) -> None:
        """Read to the end, but no longer than ``limit_s`` seconds; cancellation is safe."""
        self._limit_bytes_s = None
        if self._pause is not None:
            self._pause.cancel()
            self._resume()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._ended.wait()

    def _read(self) -> None:
        try:
            data = os.read(self._read_end, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._read_end)
            self._ended.set()
            return
        self._on_data(data)
        self._hold_back(len(data))

    def _hold_back(self, size_bytes: int) -> None:
        now_s = self._loop.time()
        if now_s - self._window_s >= _WINDOW_S:
            self._window_s, self._taken = now_s, 0
        self._taken += size_bytes
        if self._limit_bytes_s is not None and self._taken >= self._limit_bytes_s:
            self._loop.remove_reader(self._read_end)
            self._pause = self._loop.call_at(self._window_s + _WINDOW_S, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._read_end, self._read)
