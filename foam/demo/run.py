"""Conducts the demo: starts the mesh and the devices, shows and judges every task, and ends."""

import asyncio
import contextlib
import json
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from broker.access.policy import Role
from broker.lifecycle import ProcessEnd
from broker.session.settings import BrokerUrl
from capability_schemas.errors import (
    ConfigurationError,
    DeadlineExceeded,
    ExecutionFailed,
    TaskCancelled,
)
from foam.demo import PLANT_NODES
from foam.demo.recording import DEFAULT_RECORDING, Recording, load_recording
from foam.demo.traces import Summary, Trace, summarise
from foam.demo.view import DemoView
from foam.mesh import MeshFolder
from foam.sdk.address import external_person
from foam.settings import Settings, child_environment

__all__ = ["DemoMesh", "DemoOptions", "run_demo"]

READY: Final = "FOAM READY "
START_LIMIT_S: Final = 120.0
STOP_LIMIT_S: Final = 30.0
PLAY_SLACK_S: Final = 90.0
_LINE_LIMIT_BYTES: Final = 4 * 1024 * 1024
_DEVICE: Final = Path(__file__).resolve().parent / "device.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What ``foam demo`` was asked for.

    Attributes:
        broker: Broker engine or URL, as for ``foam up``; None lets it choose.
        keep: Whether the mesh stays up afterwards, until Ctrl-C.
        speed: Seconds of the shift that pass in one second, above 0.
        recording: What to replay.
        data: Data folder of the mesh; None means a temporary one that is removed afterwards.
    """

    broker: str | None = None
    keep: bool = False
    speed: float = 1500.0
    recording: Path = DEFAULT_RECORDING
    data: Path | None = None

    def __post_init__(self) -> None:
        """Refuse a clock that stands still."""
        if not self.speed > 0:
            raise ConfigurationError(f"speed is {self.speed}: use more than 0")


class DemoMesh:
    """``foam up`` as a child process with the nodes of the plant.

    Entering it returns once tasks can be served; leaving it stops the mesh.

    Args:
        data: Data folder.
        broker: Broker engine or URL; None lets ``foam up`` choose.
        nodes: Declarations of the nodes.

    Attributes:
        facts: Fields of the ``FOAM READY`` line.
    """

    def __init__(
        self,
        *,
        data: Path,
        broker: str | None = None,
        nodes: tuple[Path, ...] = PLANT_NODES,
    ) -> None:
        self._data = data
        self._broker = broker
        self._nodes = nodes
        self._process: asyncio.subprocess.Process | None = None
        self.facts: Mapping[str, Any] = {}

    async def __aenter__(self) -> Self:
        """Start the mesh.

        Raises:
            ExecutionFailed: It ended instead of getting ready; its own words are on stderr.
            DeadlineExceeded: It was not ready in time.
        """
        command = [sys.executable, "-m", "foam", "up", "--supervised"]
        command += ["--port", "0", "--data", str(self._data)]
        command += ["--broker", self._broker] if self._broker is not None else []
        for node in self._nodes:
            command += ["--node", str(node)]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # closes when this process dies, however it dies
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(),
            limit=_LINE_LIMIT_BYTES,
            start_new_session=True,  # Ctrl-C reaches the conductor, who stops the mesh in order
        )
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await self._wait_ready()
        except TimeoutError:
            await self._stop()
            raise DeadlineExceeded(f"the mesh was not ready within {START_LIMIT_S:g} s") from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the mesh and everything it started."""
        await self._stop()

    async def wait(self) -> int:
        """Wait until the mesh ends on its own; returns its exit status."""
        return await self._process.wait() if self._process is not None else 0

    async def _wait_ready(self) -> None:
        process = self._process
        if process is None or process.stdout is None:
            raise ExecutionFailed("the mesh was not started")
        async for line in process.stdout:
            text = line.decode(errors="replace")
            if text.startswith(READY):
                self.facts = json.loads(text.removeprefix(READY))
                return
        status = await process.wait()
        raise ExecutionFailed(f"the mesh ended with status {status} before it was ready")

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@dataclass
class _Stage:
    """What one performance works with; owned by the conductor's task.

    Attributes:
        recording: What is played.
        view: Where it is shown.
        traces: Task id to what its device saw.
        ready: Counts devices that have subscribed.
    """

    recording: Recording
    view: DemoView
    traces: dict[str, Trace] = field(default_factory=dict)
    ready: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    def take(self, told: Mapping[str, Any]) -> None:
        """Take one line of a device."""
        kind = told["tell"]
        if kind == "ready":
            self.ready.release()
            return
        task = told["task"]
        if kind == "sent":
            device = self.recording.device_of[task]
            self.traces[task] = Trace(task=task, device=device, text=told["text"])
        else:
            trace = self.traces[task]
            trace.take(told["event"], told["after_ms"])
            if trace.ended:
                trace.judged(self.recording.truths[task])
        self.view.progress(self.traces[task], self.recording.clock(task))


class _Devices:
    """The device processes of one performance.

    Args:
        stage: Where their lines go.
        facts: Fields of the ``FOAM READY`` line.
        speed: Seconds of the shift in one second.
    """

    def __init__(self, *, stage: _Stage, facts: Mapping[str, Any], speed: float) -> None:
        self._stage = stage
        self._facts = facts
        self._speed = speed
        self._run = secrets.token_hex(4)
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    async def play(self, logins: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """Start every device, let all clocks begin together, and wait for the last.

        Args:
            logins: Device to ``username`` and ``password``.

        Returns:
            Device to exit status; one that had to be killed has a negative one.
        """
        limit_s = self._stage.recording.seconds / self._speed + PLAY_SLACK_S
        try:
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
                for device, login in logins.items():
                    await self._start(device, login)
                    group.create_task(
                        self._listen(device), name=f"foam.demo.Device[{device}].listen"
                    )
                for _ in logins:
                    await self._stage.ready.acquire()
                for process in self._processes.values():
                    _tell(process, "go")
        except TimeoutError:
            self._stage.view.say(f"stopped after {limit_s:.0f} s with answers missing", style="red")
        finally:
            await self._end()
        return {device: process.returncode or 0 for device, process in self._processes.items()}

    async def _start(self, device: str, login: Mapping[str, Any]) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",  # nothing of the mesh is importable by accident: no current folder, no PYTHONPATH
            str(_DEVICE),
            *("--device", device),
            *("--url", self._facts["broker"]),
            *("--site", self._facts["site"]),
            *("--recording", str(self._stage.recording.path)),
            *("--run", self._run),
            *("--speed", str(self._speed)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(),
            limit=_LINE_LIMIT_BYTES,
            start_new_session=True,
        )
        self._processes[device] = process
        _tell(process, json.dumps(dict(login)))

    async def _listen(self, device: str) -> None:
        process = self._processes[device]
        if process.stdout is None:
            return
        said_ready = False
        async for line in process.stdout:
            told = json.loads(line)
            said_ready = said_ready or told["tell"] == "ready"
            self._stage.take(told)
        status = await process.wait()
        if status != 0:
            self._stage.view.say(f"{device} ended with status {status}", style="red")
        if not said_ready:
            self._stage.ready.release()  # the others need not wait for one that is gone

    async def _end(self) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.wait()


def _tell(process: asyncio.subprocess.Process, line: str) -> None:
    if process.stdin is not None:
        process.stdin.write(line.encode() + b"\n")


@contextlib.asynccontextmanager
async def _data_folder(wanted: Path | None) -> AsyncIterator[Path]:
    if wanted is not None:
        yield wanted
        return
    with tempfile.TemporaryDirectory(prefix="foam-demo-") as made:
        yield Path(made)


def _logins(
    data: Path, recording: Recording, broker: str | None
) -> dict[str, dict[str, str | None]]:
    """Enroll the devices before the mesh starts, as ``foam device add`` does."""
    folder = MeshFolder(data).prepare()
    person = None
    if broker is not None and "://" in broker:
        person = external_person(BrokerUrl.parse_all(broker)[0])
    logins: dict[str, dict[str, str | None]] = {}
    for device in recording.devices:
        identity = folder.ensure(device, Role.DEVICE, external=person)
        secret = identity.password.get_secret_value() if identity.password is not None else None
        logins[device] = {"username": identity.username, "password": secret}
    return logins


async def run_demo(
    settings: Settings, options: DemoOptions, *, view: DemoView | None = None
) -> int:
    """Play the shift once; main thread only, for it takes SIGTERM and Ctrl-C.

    Args:
        settings: Environment of the program; its ``url`` is the broker when ``options`` names none.
        options: What was asked for.
        view: Where to show it; None means the terminal.

    Returns:
        0 when every answer came and was right, else 1.

    Raises:
        TaskCancelled: It was stopped by a signal before its summary; the mesh is stopped too.
        FoamError: The mesh could not be started, in one sentence.
    """
    chosen = replace(options, broker=options.broker or settings.url)
    performance = _Performance(options=chosen, view=view or DemoView())
    try:
        async with ProcessEnd() as end, asyncio.TaskGroup() as group:
            play = group.create_task(performance.play(), name="foam.demo.play")
            stop = group.create_task(_cancel_at_end(end, play), name="foam.demo.stop")
            await asyncio.wait({play})
            stop.cancel()
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None  # there is one failure, that of the play
    if performance.summary is None:
        raise TaskCancelled("the demo was stopped before its end")
    return 0 if performance.summary.passed else 1


async def _cancel_at_end(end: ProcessEnd, play: asyncio.Task[None]) -> None:
    await end.wait()
    play.cancel()


class _Performance:
    """One run of the demo, from an empty folder to the summary.

    Args:
        options: What was asked for.
        view: Where to show it.

    Attributes:
        summary: What it came to; None before the end of the shift.
    """

    def __init__(self, *, options: DemoOptions, view: DemoView) -> None:
        self._options = options
        self._view = view
        self.summary: Summary | None = None

    async def play(self) -> None:
        """Start the mesh, play the shift, stop the mesh; cancelling it stops everything too."""
        options, view = self._options, self._view
        recording = load_recording(options.recording)
        async with _data_folder(options.data) as data:
            logins = await asyncio.to_thread(_logins, data, recording, options.broker)
            view.say("starting the mesh: broker, registry, router and three nodes")
            async with DemoMesh(data=data, broker=options.broker) as mesh:
                self.summary = await _perform(recording, view, mesh, logins, options.speed)
                if options.keep:
                    view.say(f'the mesh stays up: foam ask --data {data} "..."; Ctrl-C stops it')
                    await mesh.wait()


async def _perform(
    recording: Recording,
    view: DemoView,
    mesh: DemoMesh,
    logins: Mapping[str, Mapping[str, Any]],
    speed: float,
) -> Summary:
    stage = _Stage(recording=recording, view=view)
    view.plant(recording, mesh.facts)
    with view:
        await _Devices(stage=stage, facts=mesh.facts, speed=speed).play(logins)
    summary = summarise(recording, stage.traces)
    for task in recording.truths.keys() - stage.traces.keys():
        view.say(f"{task} was never asked", style="red")
    view.summary(summary)
    return summary
