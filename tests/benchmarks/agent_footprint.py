"""How soon a node agent is ready, and how much memory it takes when idle without a model."""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import ROOT, BenchMesh, p50

SETTLE_S = 2.0


async def start_once(mesh: BenchMesh, declaration: Path) -> tuple[float, float, float]:
    """Return seconds to ready, resident MB of the agent, and of its children, after settling."""
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "foam", "node", str(declaration)),
        *("--id", "bench-node-2", "--data", str(mesh.data)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            while b"READY" not in (line := await process.stdout.readline()):
                if not line:
                    raise RuntimeError("the node ended before it was ready")
        ready_s = time.perf_counter() - started
        await asyncio.sleep(SETTLE_S)  # idle memory is what is left after the start
        agent = psutil.Process(process.pid)
        children = sum(child.memory_info().rss for child in agent.children(recursive=True))
        return ready_s, agent.memory_info().rss / 1e6, children / 1e6
    finally:
        process.terminate()
        await process.wait()


async def measure(mesh: BenchMesh, *, rounds: int = 5) -> dict[str, Any]:
    declaration = mesh.data / "idle.py"
    declaration.write_text(
        "from foam import function\n\n\n"
        '@function(description="Add two numbers.", examples=["what is 2 plus 3?"])\n'
        "def add(a: float, b: float) -> float:\n"
        "    return a + b\n"
    )
    runs = [await start_once(mesh, declaration) for _ in range(rounds)]
    return {
        "broker": mesh.broker,
        "starts": rounds,
        "ready p50 s": p50([run[0] for run in runs]),
        "ready worst s": round(max(run[0] for run in runs), 2),
        "agent resident MB p50": round(p50([run[1] for run in runs]), 1),
        "its children resident MB p50": round(p50([run[2] for run in runs]), 1),
    }
