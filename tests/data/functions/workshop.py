"""Functions of every kind, for the tests of the node agent."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from node_agent.functions import InvocationContext, function


@dataclass
class Reading:
    device: str
    value: float


@function(version="1.2.0", examples=["what is 1 plus 2?"], skills=["arithmetic"])
def add(a: float, b: float = 2.0) -> float:
    """Add two numbers."""
    return a + b


@function
def words(text: str) -> Iterator[str]:
    """Say the words of a text one by one."""
    for word in text.split():
        yield word + " "


@function
def recite(lines: int, pause_s: float = 0.0) -> Iterator[str]:
    """Say numbered lines, the same every time."""
    for number in range(lines):
        yield f"line {number}\n"
        time.sleep(pause_s)


@function
def nested(depth: int) -> list[object]:
    """Return a list in a list in a list."""
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


@function
def orphan(pid_file: str) -> str:
    """Start a program of its own session that holds our output, then die."""
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(program, start_new_session=True, stdin=subprocess.DEVNULL)
    Path(pid_file).write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


@function
def squares(n: int) -> Generator[int, None, dict[str, int]]:
    """Stream squares and return their sum."""
    total = 0
    for value in range(n):
        total += value * value
        yield value * value
    return {"sum": total}


@function(concurrency=4)
async def meet(name: str, folder: str, parties: int) -> list[str]:
    """Wait until so many calls are here at the same time."""
    (Path(folder) / name).touch()
    while len(list(Path(folder).iterdir())) < parties:  # noqa: ASYNC110 - others write the files
        await asyncio.sleep(0.005)
    return sorted(path.name for path in Path(folder).iterdir())


@function
async def ticks(n: int) -> AsyncIterator[str]:
    """Stream numbers without an end in sight."""
    for value in range(n):
        yield f"{value} "
        await asyncio.sleep(0.001)


@function
def describe(reading: Reading, context: InvocationContext) -> str:
    """Describe a reading."""
    remaining = context.remaining_s
    return f"{reading.device}={reading.value:g} in time: {remaining is not None and remaining > 0}"


@function
def shout(text: str) -> str:
    """Print a great deal."""
    for number in range(1000):
        print(f"{number} {text}" * 100)
    return "done"


@function
def fail(reason: str) -> None:
    """Raise."""
    raise ValueError(reason)


@function
def leave() -> None:
    """Call sys.exit, which is no crash."""
    sys.exit(7)


@function
def vanish(after: int = 0) -> Iterator[str]:
    """End the process, after so many pieces."""
    for number in range(after):
        yield f"{number} "
    os.kill(os.getpid(), signal.SIGKILL)


@function
def stubborn(marker: str) -> str:
    """Ignore every cancel."""
    Path(marker).write_text(str(os.getpid()))
    while True:
        time.sleep(0.01)


@function
def polite(marker: str, context: InvocationContext) -> str:
    """Wait for the cancel."""
    Path(marker).write_text(str(os.getpid()))
    context.cancelled.wait(20)
    return "stopped"


@function
def parent(marker: str) -> str:
    """Leave a process of its own behind."""
    child = subprocess.Popen(["sleep", "60"])
    Path(marker).write_text(str(child.pid))
    return "started"


@function(limits={"memory_bytes": 1_000_000_000})
def greedy(megabytes: int) -> int:
    """Take memory."""
    return len(bytearray(megabytes * 1_000_000))


@function
def unprintable() -> object:
    """Return what is not JSON."""
    return object()


@function
def flood(size: int) -> Iterator[str]:
    """Yield more than anybody wants."""
    while True:
        yield "x" * size


async def torrent(size: int, n: int = 10**9) -> AsyncIterator[str]:
    """Yield more than anybody wants, beside others."""
    for _ in range(n):
        yield "x" * size
