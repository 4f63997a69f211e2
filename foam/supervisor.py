"""Child processes of ``foam up``: started, watched, restarted, and never left behind.

A child is a ``foam`` command of its own with ``--supervised``: it reports on stdout
(`foam.status`), logs to a file of its own, and watches its stdin, a pipe whose other end only the
supervisor holds. When the supervisor dies, however it dies (``kill -9`` included), the pipes close
and the children stop by themselves. Each child has a process group of its own, so that Ctrl-C in a
terminal reaches the supervisor alone and the order of stopping stays ours: last started, first
stopped, those of one group together.

A child that ends is started again after a back-off with full jitter; one that said that it cannot
work (a wrong setting, a wrong password, a port in use) is not, and neither is one that crashed
`RestartPolicy.limit` times in a row: the supervisor then ends with that reason.
"""

import asyncio
import contextlib
import itertools
import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import structlog

from broker.lifecycle import Service
from broker.pipes import OutputPipe
from capability_schemas.errors import AccessDenied, ConfigurationError, FoamError, Unavailable
from foam.status import StatusLine, parse_status

__all__ = ["Child", "ChildSpec", "RestartPolicy", "Supervisor"]

_LINE_LIMIT_BYTES: Final = 1024 * 1024
_DRAIN_S: Final = 1.0
_SLOW_STOP_S: Final = 2.0
"""After that it is said whom a stop waits for, seconds."""

_FATAL: Final[Mapping[str, type[FoamError]]] = {
    "ConfigurationError": ConfigurationError,
    "Conflict": ConfigurationError,
    "AccessDenied": AccessDenied,
}
"""Failures that another start cannot mend; anything else is a crash."""

Facts = Mapping[str, Any]
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a crashed child is started again.

    Attributes:
        base_s: Longest wait before the first restart, seconds; doubles with every further one.
        cap_s: Longest wait of all, seconds.
        limit: Crashes in a row after which the supervisor gives up.
        settled_s: A child that was ready for this long starts counting anew, seconds.
    """

    base_s: float = 0.5
    cap_s: float = 15.0
    limit: int = 6
    settled_s: float = 30.0

    def delay_s(self, crashes: int, chance: float) -> float:
        """Return the wait before the next start: full jitter, exponential, capped.

        Args:
            crashes: Crashes in a row so far, at least 1.
            chance: Uniform random number in [0, 1).
        """
        return chance * min(self.cap_s, self.base_s * 2.0 ** (crashes - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """How to run one child.

    Attributes:
        name: Name in messages and of its log file.
        command: Makes the command line from the facts the child was last ready with (None at
            first), so that a broker that found itself a port comes back on the same one.
        log: File of its stderr, appended to; whoever owns the folder keeps it small
            (`foam.log_files`).
        environment: Its environment.
        stop_s: Time it gets between SIGTERM and SIGKILL, seconds.
        spare: Whether the others go on without it when, having worked before, it cannot work any
            more.
        group: Those of one group stand in for each other: such a one is spare as well, as long as
            another one of them is ready. They are stopped together. Empty: of none.
    """

    name: str
    command: Callable[[Facts | None], Sequence[str]]
    log: Path
    environment: Mapping[str, str]
    stop_s: float = 10.0
    spare: bool = False
    group: str = ""


class Child:
    """One child as others see it; its state is owned by the supervisor task that keeps it.

    Attributes:
        spec: How it is run.
        process: Its latest process.
        facts: What it was last ready with.
        ready: Set while it serves.
        crashes: Crashes in a row.
        failure: Why it can never work, once it said so.
    """

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None
        self.facts: Facts | None = None
        self.ready = asyncio.Event()
        self.crashes = 0
        self.failure: FoamError | None = None

    async def wait_ready(self) -> Facts:
        """Wait, without limit, until it serves; a failure to do so is the supervisor's crash.

        Returns:
            What it reported.
        """
        await self.ready.wait()
        return self.facts or {}

    @property
    def lives(self) -> bool:
        """Whether it has a process."""
        return self.process is not None and self.process.returncode is None

    def kill(self) -> None:
        """Kill its process, and all of the process's group; nothing where it has none."""
        if self.process is not None and self.lives:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Supervisor(Service):
    """Runs children until it is stopped; the failure of one that cannot be mended is its crash.

    Args:
        policy: When to restart.
        notify: Told in one sentence about everything a person should hear (waiting, crash,
            restart).
        chance: Source of jitter, uniform in [0, 1); the system's when None.
    """

    stop_timeout_s = 120.0

    def __init__(
        self,
        *,
        policy: RestartPolicy | None = None,
        notify: Callable[[str], None],
        chance: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(service_id="up")
        self._policy = policy or RestartPolicy()
        self._notify = notify
        self._chance = chance or random.SystemRandom().random
        self._children: list[Child] = []
        self._stop_asked = asyncio.Event()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the children that live, by name."""
        return {
            child.spec.name: child.process.pid
            for child in self._children
            if child.process is not None and child.lives
        }

    def add(self, spec: ChildSpec) -> Child:
        """Start a child and keep it alive.

        Args:
            spec: How to run it.
        """
        child = Child(spec)
        self._children.append(child)
        self.spawn(self._keep(child), name=f"keep.{spec.name}")
        return child

    async def _on_stop(self) -> None:
        self._stop_asked.set()
        for _, stage in itertools.groupby(reversed(self._children), key=_stage):
            ends = {
                self.spawn(self._end(child), name=f"end.{child.spec.name}"): child
                for child in stage
                if child.lives
            }
            if not ends:
                continue
            _, slow = await asyncio.wait(ends, timeout=_SLOW_STOP_S)
            if slow:
                names = ", ".join(sorted(ends[task].spec.name for task in slow))
                longest_s = max(ends[task].spec.stop_s for task in slow)
                self._notify(f"waiting for {names} to stop, {longest_s:.0f} s at most")
                await asyncio.wait(slow)

    def kill(self) -> None:
        """Kill all children now; for a stop that takes too long."""
        self._stop_asked.set()
        for child in self._children:
            child.kill()

    async def _keep(self, child: Child) -> None:
        while not self._stop_asked.is_set():
            started = asyncio.get_running_loop().time()
            code = await self._run(child)
            if self._stop_asked.is_set():
                return
            if child.failure is not None:
                if self._can_be_spared(child):
                    self._notify(f"{child.failure.message}; it is not started again")
                    return
                raise child.failure
            lived = asyncio.get_running_loop().time() - started
            settled = child.ready.is_set() and lived >= self._policy.settled_s
            child.crashes = 1 if settled else child.crashes + 1
            child.ready.clear()
            why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            _log.error(
                "supervisor.child_ended", child=child.spec.name, code=code, crashes=child.crashes
            )
            if child.crashes >= self._policy.limit:
                problem = (
                    f"{child.spec.name} ended {child.crashes} times in a row, last with {why}; "
                    f"its log is {child.spec.log}"
                )
                if not self._can_be_spared(child):
                    raise Unavailable(problem, retryable=False)
                if child.crashes == self._policy.limit:
                    self._notify(f"{problem}; the others go on without it")
            delay_s = self._policy.delay_s(child.crashes, self._chance())
            self._notify(f"{child.spec.name} ended ({why}); starting it again in {delay_s:.1f} s")
            await asyncio.sleep(delay_s)

    def _can_be_spared(self, child: Child) -> bool:
        """Tell whether the others go on without a child that cannot work any more."""
        if child.facts is None:
            return False
        return child.spec.spare or any(
            other.spec.group == child.spec.group and other.ready.is_set()
            for other in self._children
            if other is not child and child.spec.group
        )

    async def _run(self, child: Child) -> int:
        spec = child.spec
        child.failure = None
        command = spec.command(child.facts)
        reports = _Reports(lambda report: self._heard(child, report))
        with spec.log.open("ab") as log, _Lifeline() as lifeline, OutputPipe(reports.take) as out:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=lifeline.read_end,
                stdout=out.write_end,
                stderr=log,
                env=dict(spec.environment),
                process_group=0,
            )
            out.started()
            child.process = process
            _log.info("supervisor.child_started", child=spec.name, pid=process.pid)
            try:
                code = await process.wait()
                # A stray grandchild may still hold the pipe: what the child itself said is in it by
                # now.
                await out.drain(_DRAIN_S)
                return code
            finally:
                if process.returncode is None:
                    await self._end(child)

    def _heard(self, child: Child, report: StatusLine) -> None:
        """Take what a child says of itself."""
        if report.status == "ready":
            child.facts = report.facts
            child.ready.set()
            if child.crashes:
                self._notify(f"{child.spec.name} runs again")
            _log.info("supervisor.child_ready", child=child.spec.name)
            return
        message = str(report.facts.get("message", ""))
        if report.status == "waiting":
            self._notify(f"{child.spec.name}: {message}")
        elif (kind := _FATAL.get(str(report.facts.get("kind")))) is not None:
            child.failure = kind(f"{child.spec.name}: {message}")
        else:
            self._notify(f"{child.spec.name} failed: {message}")

    async def _end(self, child: Child) -> None:
        process = child.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(child.spec.stop_s):
                await process.wait()
        except TimeoutError:
            self._notify(
                f"{child.spec.name} did not stop in {child.spec.stop_s:.0f} s and is killed"
            )
        finally:
            child.kill()


def _stage(child: Child) -> str:
    """Return what those children have in common that are stopped together."""
    return child.spec.group or f" {child.spec.name}"


class _Reports:
    """Cuts what a child writes into lines and reads those that are reports."""

    def __init__(self, on_report: Callable[[StatusLine], None]) -> None:
        self._on_report = on_report
        self._rest = b""

    def take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_LIMIT_BYTES:
            self._rest = b""  # so long a line is no report, and neither is what is left of it
        for line in lines:
            report = parse_status(line)
            if report is not None:
                self._on_report(report)


class _Lifeline:
    """A pipe that ends when this process does: the stdin of a child."""

    def __enter__(self) -> Self:
        self.read_end, self._write_end = os.pipe()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.read_end)
        os.close(self._write_end)
