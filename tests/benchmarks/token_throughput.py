"""Tokens per second of a streamed answer against the engine alone, interleaved.

The answer is a JSON list forced by a schema, about 300 tokens long. The rate of the mesh is counted
by the client from the first chunk to the result; the engine's from its first token to its last.
"""

import threading
import time
from typing import Any

from benchmarks.first_token import direct_engine
from benchmarks.measure import NODE, BenchMesh, p50
from capability_schemas.reply import Chunk, Result
from node_agent.declaration import load_declaration
from node_agent.worker.engines.base import Engine, Prompt


def direct_rate(engine: Engine, prompt: Prompt) -> float:
    stamps: list[float] = []
    done = engine.generate(prompt, lambda _: stamps.append(time.perf_counter()), threading.Event())
    return (done.output_tokens - 1) / (time.perf_counter() - stamps[0])


async def measure(mesh: BenchMesh, *, rounds: int = 20) -> dict[str, Any]:
    name, engine = direct_engine()
    spec = next(s for s in load_declaration(NODE).functions if s.name == "long_answer")
    rates: dict[str, list[float]] = {"direct": [], "mesh": []}
    tokens = 0
    for number in range(rounds + 2):
        text = f"Classify the severity of {number} alerts."
        prompt = Prompt(
            messages=[{"role": "user", "content": text}], max_tokens=400, schema=spec.output_schema
        )
        direct = direct_rate(engine, prompt)
        first_s = 0.0
        handle = await mesh.client.submit(text, function="long_answer")
        async for event in handle:
            if isinstance(event, Chunk) and not first_s:
                first_s = time.perf_counter()
        taken_s = time.perf_counter() - first_s
        result = handle.outcome
        if not isinstance(result, Result) or result.usage is None:
            raise RuntimeError(f"no result: {result}")
        tokens = result.usage.output_tokens or 0
        if number >= 2:
            rates["direct"].append(direct)
            rates["mesh"].append((tokens - 1) / taken_s)
    engine.close()
    middle = {key: p50(values) for key, values in rates.items()}
    return {
        "broker": mesh.broker,
        "engine": name,
        "rounds": rounds,
        "tokens an answer": tokens,
        "engine alone tokens/s p50": round(middle["direct"]),
        "through the mesh tokens/s p50": round(middle["mesh"]),
        "share": f"{middle['mesh'] / middle['direct']:.1%}",
    }
