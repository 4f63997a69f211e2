"""Cold start of the shipped model's instance: nothing runs, and then the first token is there.

An instance is started by the runtime, asked, and ended, again and again. The parts: ``spawn`` until
Python runs our code in the child, ``import`` of the engine, ``load`` of the model with its
calibration, and ``prompt`` from the call to its first piece. The first two are measured in a bare
child process of the same imports; the whole is measured on the instance itself.
"""

import asyncio
import subprocess
import sys
import time
from contextlib import aclosing
from typing import Any

from benchmarks.measure import ROOT, p50, p95
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes.base import Request, RuntimeContext
from node_agent.runtimes.llama_cpp import LlamaCppRuntime

MODEL = ROOT / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
PARTS = """
import time
started = time.monotonic()
import node_agent.worker.__main__, node_agent.worker.engine_host
from node_agent.worker.engines import llama_cpp
from node_agent.worker.engines.base import EngineOptions
imported = time.monotonic()
llama_cpp.LlamaCppEngine(EngineOptions(model={model!r}))
print(started, imported, time.monotonic())
"""


def parts_ms() -> dict[str, float]:
    """Time of each part in a bare child; the monotonic clock is the machine's."""
    began = time.monotonic()
    said = subprocess.run(
        [sys.executable, "-c", PARTS.format(model=str(MODEL))],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    started, imported, loaded = map(float, said.split())
    return {
        "spawn": (started - began) * 1000,
        "import": (imported - started) * 1000,
        "load": (loaded - imported) * 1000,
    }


async def first_token_ms() -> dict[str, float]:
    runtime = LlamaCppRuntime(RuntimeContext())
    spec = FunctionSpec(name="cold", description="d", runtime="llama_cpp", model=str(MODEL))
    began = time.monotonic()
    instance = await runtime.start(spec, died=lambda _: None)
    ready = time.monotonic()
    text = "What should I do? the vibration of pump-3 is too high."
    request = Request(id="r", input={}, text=text, options=runtime.call_options(spec))
    async with aclosing(instance.invoke(request)) as answers:
        await anext(answers)
        first = time.monotonic()
        async for _ in answers:
            pass
    await instance.close(1.0)
    return {"whole": (first - began) * 1000, "prompt": (first - ready) * 1000}


def measure(*, rounds: int = 15) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, value in {**parts_ms(), **asyncio.run(first_token_ms())}.items():
            times.setdefault(name, []).append(value)
    return [
        {
            "rounds": rounds,
            **{f"{name} ms": round(p50(times[name])) for name in ("spawn", "import", "load")},
            "prompt to first piece ms": round(p50(times["prompt"]), 1),
            "start to first piece p50 ms": round(p50(times["whole"])),
            "p95 ms": round(p95(times["whole"])),
        }
    ]
