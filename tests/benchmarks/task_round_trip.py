"""A task with a python echo function against three bare hops of the same client on the same broker.

Interleaved: every round measures the hops, the task addressed by name, and the task matched by
meaning (a new text each time, so that nothing comes from a cache). The encoding time is measured by
itself in the same rounds.
"""

import secrets
import time
from typing import Any

from benchmarks.measure import BareHops, BenchMesh, p50, p95
from registry.encoders import load_encoder

WARM_UP = 20


async def measure(mesh: BenchMesh, *, rounds: int = 200) -> dict[str, Any]:
    encoder = load_encoder()
    times: dict[str, list[float]] = {"hops": [], "named": [], "matched": [], "encoding": []}
    async with BareHops(mesh).running() as hops:
        for number in range(rounds + WARM_UP):
            text = f"repeat after me: {secrets.token_hex(3)}"
            taken = {"hops": await hops.task_hops_ms(text.encode().ljust(300))}
            for name, function in (("named", "echo"), ("matched", None)):
                started = time.perf_counter()
                result = await mesh.client.ask(text, function=function)
                taken[name] = (time.perf_counter() - started) * 1000
                if result.output != text:
                    raise RuntimeError(f"{result.output!r} is no echo of {text!r}")
            started = time.perf_counter()
            encoder.encode([text])
            taken["encoding"] = (time.perf_counter() - started) * 1000
            if number >= WARM_UP:
                for name, value in taken.items():
                    times[name].append(value)
    middle = {name: p50(values) for name, values in times.items()}
    return {
        "broker": mesh.broker,
        "rounds": rounds,
        "three bare hops p50 ms": middle["hops"],
        "p95": p95(times["hops"]),
        "task by name p50 ms": middle["named"],
        "p95 ": p95(times["named"]),
        "task by meaning p50 ms": middle["matched"],
        "encoding p50 ms": middle["encoding"],
        "by name / hops": round(middle["named"] / middle["hops"], 2),
        "(by meaning - encoding) / hops": round(
            (middle["matched"] - middle["encoding"]) / middle["hops"], 2
        ),
    }
