"""The process of an instance: confined, its output on the log, and a sure end with all it started.

It runs ``python -m node_agent.worker`` in a session and process group of its own, with an
environment, a folder for temporary files and, where there are any, a control group of its own.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from broker.pipes import OutputPipe
from node_agent.isolation.environment import child_environment
from node_agent.isolation.folders import LockedFolder
from node_agent.isolation.strays import end_strays, new_mark
from node_agent.isolation.system import Isolation
from node_agent.runtimes.plumbing import LogTap

if TYPE_CHECKING:
    from node_agent.isolation.cgroup import Cgroup

_PACKAGE_ROOT: Final = Path(__file__).resolve().parents[2]
_LAST_LINES_S: Final = 1.0
"""How long what a killed process still has to say, or its end, is waited for, seconds."""

_OUTPUT_LIMIT_BYTES_S: Final = 16 * 1024 * 1024
"""Output a second that is read: it goes to a log of 100 lines a second, but must not block a
function that prints a lot for long. Reading it costs about 1 % of a processor."""


class WorkerProcess:
    """One process, from its start to the end of everything it left behind.

    Args:
        name: The instance, for the log.
        limits: As made by `limits_frame`.
        isolation: What the machine offers.
        log: Where its output goes.
    """

    def __init__(
        self,
        *,
        name: str,
        limits: Mapping[str, Any],
        isolation: Isolation,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._name = name
        self._limits = dict(limits)
        self._isolation = isolation
        self._log = log
        self._mark = new_mark()
        self._process: asyncio.subprocess.Process | None = None
        self._folder: LockedFolder | None = None
        self._cgroup: Cgroup | None = None
        self._taps = [LogTap(log, stream=stream) for stream in ("stdout", "stderr")]
        self._pipes = contextlib.ExitStack()
        self._outputs: list[OutputPipe] = []
        self._cause = ""
        self.status: int | None = None

    @property
    def pid(self) -> int:
        """Process id, which is also its process group and session; 0 before the start."""
        return 0 if self._process is None else self._process.pid

    @property
    def last_lines(self) -> list[str]:
        """The last lines of its stderr."""
        return list(self._taps[1].tail)

    @property
    def confinement(self) -> dict[str, Any]:
        """What its ``load`` frame says besides the limits."""
        return {
            "cgroup": None if self._cgroup is None else str(self._cgroup.door),
            "mark": self._mark,
        }

    @property
    def limit(self) -> str:
        """Which of its limits ended it, in words; empty when none did. Known after `wait`."""
        return self._cause

    async def start(self) -> socket.socket:
        """Start it; cancellation is safe.

        Returns:
            Our end of the socket pair for frames.

        Raises:
            OSError: There is no process, folder or descriptor to be had; nothing is left over.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                await self._spawn(theirs.fileno(), self._prepare())
        except BaseException:
            ours.close()
            self._pipes.close()
            self.clear()
            raise
        return ours

    async def wait(self) -> int:
        """Wait for its end, then end what it started.

        Returns:
            Its exit status; negative for a signal.
        """
        if self._process is None:
            raise RuntimeError(f"{self._name} was not started")
        with self._pipes:
            self.status = await self._process.wait()
            self.kill()
            self._cause = self._find_cause(self.status)
            if self._cgroup is None or not self._cgroup.kill():
                await self._end_strays()
            for output in self._outputs:
                await output.drain(_LAST_LINES_S)
        now_s = asyncio.get_running_loop().time()
        for tap in self._taps:
            tap.end(now_s=now_s)
        return self.status

    def kill(self) -> None:
        """Kill it and what it started, as far as that is known without a search."""
        if self._process is not None:
            # The group's id is the pid of its leader; while a member lives the kernel reuses
            # neither, and a group that is gone is not found.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._cgroup is not None:
            self._cgroup.kill()

    async def abandon(self) -> None:
        """Do at once what `wait` and `clear` have not come to; blocks for some milliseconds.

        For a loop that ends: work given to a thread that has not begun is not done any more, but
        the end of the process has to arrive on the loop, or its transport outlives that.
        """
        self.kill()
        if sys.platform == "linux":
            end_strays(self._mark)
        self.clear()
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_LINES_S):
                    await self._process.wait()

    def clear(self) -> None:
        """Remove its folder and its control group; blocks, so call it in a thread after `wait`."""
        if self._cgroup is not None and not self._cgroup.remove():
            self._log.warning("instance.cgroup_left", path=str(self._cgroup.path))
        if self._folder is not None:
            self._folder.remove()

    def _prepare(self) -> LockedFolder:
        folder = self._folder = LockedFolder()
        if self._isolation.cgroups is not None:
            self._cgroup = self._isolation.cgroups.create(str(self._mark), self._limits)
        loop = asyncio.get_running_loop()
        for tap in self._taps:

            def take(data: bytes, tap: LogTap = tap) -> None:
                tap.feed(data, now_s=loop.time())

            pipe = OutputPipe(take, limit_bytes_s=_OUTPUT_LIMIT_BYTES_S)
            self._outputs.append(self._pipes.enter_context(pipe))
        return folder

    async def _spawn(self, descriptor: int, folder: LockedFolder) -> None:
        stdout, stderr = self._outputs
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-u",
            "-m",
            "node_agent.worker",
            str(descriptor),
            str(os.getpid()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout.write_end,
            stderr=stderr.write_end,
            cwd=_PACKAGE_ROOT,  # puts node_agent onto the child's import path
            env=child_environment(folder=str(folder.path), limits=self._limits),
            pass_fds=(descriptor,),
            start_new_session=True,
        )
        for output in self._outputs:
            output.started()

    async def _end_strays(self) -> None:
        if sys.platform != "linux":
            return
        left = await asyncio.to_thread(end_strays, self._mark)
        if left:
            self._log.error("instance.strays_left", count=left)

    def _find_cause(self, status: int) -> str:
        if status == -signal.SIGXCPU:
            return f"used more processor time than limits.cpu_s = {self._limits.get('cpu_s')}"
        if status == -signal.SIGSYS:
            return "ran a 32-bit program, which only limits.network = true allows"
        cgroup = self._cgroup
        if status == -signal.SIGKILL and cgroup is not None and cgroup.ran_out_of_memory():
            return f"used more than limits.memory_bytes = {self._limits.get('memory_bytes')}"
        return ""
