"""Many simulations at a time, each in a process of its own."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any, Final

from capability_schemas.errors import ExecutionFailed
from foam.settings import child_environment

__all__ = ["run_seeds"]

_LINE_BYTES: Final = 64 * 1024 * 1024
_COMPLAINT_CHARS: Final = 2_000


async def run_seeds(
    seeds: Iterable[int], arguments: Sequence[str], *, jobs: int | None = None
) -> AsyncGenerator[Mapping[str, Any], None]:
    """Simulate seeds, several at a time; yields the report of each as it comes.

    Closing the generator ends the processes.

    Args:
        seeds: The seeds.
        arguments: Further arguments of ``python -m foam.simulation``.
        jobs: Processes at a time; as many as there are processors when None.

    Raises:
        ExecutionFailed: A process ended without a report.
    """
    todo = iter(seeds)
    running: set[asyncio.Task[Mapping[str, Any]]] = set()
    loop = asyncio.get_running_loop()
    try:
        while True:
            while len(running) < (jobs or os.cpu_count() or 1):
                seed = next(todo, None)
                if seed is None:
                    break
                running.add(loop.create_task(_simulate(seed, arguments), name=f"seed {seed}"))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)


async def _simulate(seed: int, arguments: Sequence[str]) -> Mapping[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "foam.simulation",
        "--seed",
        str(seed),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(PYTHONHASHSEED="0"),
        limit=_LINE_BYTES,
    )
    try:
        out, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        report: Mapping[str, Any] = json.loads(out)
    except ValueError as error:
        said = complaint.decode(errors="replace")[-_COMPLAINT_CHARS:]
        raise ExecutionFailed(f"seed {seed} ended without a report: {said}") from error
    return report
