"""Time to the first token through the mesh against calling the engine directly, interleaved.

The direct call runs in a process of its own (this one) with the same engine, model and options.
Prompts differ from round to round, alike on both sides, so that neither side's prompt cache helps.
"""

import threading
import time
from typing import Any

from benchmarks.measure import NODE, BareHops, BenchMesh, p50, p95
from capability_schemas.reply import Chunk
from node_agent.declaration import load_declaration
from node_agent.worker.engines import load_engine
from node_agent.worker.engines.base import Engine, EngineOptions, Prompt

WARM_UP = 10
METRICS = ("vibration", "temperature", "pressure", "noise", "speed", "humidity")


def direct_engine() -> tuple[str, Engine]:
    spec = next(s for s in load_declaration(NODE).functions if s.name == "answer")
    assert spec.model is not None
    name, engine, _ = load_engine("auto", EngineOptions(model=spec.model, n_ctx=512))
    return name, engine


def first_text_ms(engine: Engine, prompt: Prompt) -> float:
    seen: list[float] = []
    stop = threading.Event()

    def took(_text: str) -> None:
        seen.append(time.perf_counter())
        stop.set()

    started = time.perf_counter()
    engine.generate(prompt, took, stop)
    return (seen[0] - started) * 1000


async def measure(mesh: BenchMesh, *, rounds: int = 100) -> dict[str, Any]:
    name, engine = direct_engine()
    times: dict[str, list[float]] = {"direct": [], "mesh": [], "hops": []}
    async with BareHops(mesh).running() as hops:
        for number in range(rounds + WARM_UP):
            metric = METRICS[number % len(METRICS)]
            text = f"What should I do? the {metric} of pump-{number % 90 + 1} is too high."
            prompt = Prompt(messages=[{"role": "user", "content": text}], max_tokens=64)
            taken = {"direct": first_text_ms(engine, prompt)}
            started = time.perf_counter()
            handle = await mesh.client.submit(text, function="answer")
            async for event in handle:
                if isinstance(event, Chunk) and "mesh" not in taken:
                    taken["mesh"] = (time.perf_counter() - started) * 1000
            taken["hops"] = await hops.task_hops_ms(text.encode().ljust(300))
            if number >= WARM_UP:
                for key, value in taken.items():
                    times[key].append(value)
    engine.close()
    middle = {key: p50(values) for key, values in times.items()}
    added = middle["mesh"] - middle["direct"]
    return {
        "broker": mesh.broker,
        "engine": name,
        "rounds": rounds,
        "engine alone p50 ms": middle["direct"],
        "through the mesh p50 ms": middle["mesh"],
        "p95": p95(times["mesh"]),
        "added ms": round(added, 2),
        "three bare hops p50 ms": middle["hops"],
        "added beyond the hops ms": round(added - middle["hops"], 2),
    }
