"""A warm call through each runtime against the same work without it, interleaved.

Direct means, in this process: ``python`` calls the function, ``command`` runs the program by
``subprocess.run``, ``wasm`` makes a store and runs the module, ``llama_cpp`` asks the engine for
eight tokens, ``openai`` posts the same request and reads the stream (of a scripted server in this
process, alike on both sides). Inputs differ from round to round, alike on both sides.
"""

import asyncio
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import wasmtime

from benchmarks.measure import p50, p95
from capability_schemas.functions import FunctionSpec
from data.functions import workshop
from foam.demo.traces import quantile
from node_agent.runtimes.base import RuntimeContext
from node_agent.runtimes.catalogue import make_runtimes
from node_agent.worker.engines import load_engine
from node_agent.worker.engines.base import EngineOptions, Prompt
from support.calls import collect, request, running, spec_of
from support.scripted_openai import Answer, ScriptedOpenAI

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = ROOT / "tests" / "data" / "functions"
MODEL = ROOT / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
WARM_UP = 10
ROUNDS = 200
TOKENS = 8

Direct = Callable[[int], Awaitable[None]]


def p10(values: list[float]) -> float:
    """The calls that no other process disturbed."""
    return quantile(values, 0.1)


def ask_of(number: int) -> str:
    return f"Extract JSON: The humidity of greenhouse-{number % 90 + 1} is 48 %."


async def python_subject(stack: AsyncExitStack) -> tuple[FunctionSpec, Direct, Any]:
    async def direct(number: int) -> None:
        workshop.add(number, 2)

    spec = spec_of("python", entry=f"{FUNCTIONS}/workshop.py:add")
    return spec, direct, lambda number: {"value": {"a": number}}


async def command_subject(stack: AsyncExitStack) -> tuple[FunctionSpec, Direct, Any]:
    async def direct(number: int) -> None:
        subprocess.run(["cat"], input=b"%d\n" % number, capture_output=True, check=True)

    return spec_of("command", options={"command": ["cat"]}), direct, lambda n: {"value": {"a": n}}


async def wasm_subject(stack: AsyncExitStack) -> tuple[FunctionSpec, Direct, Any]:
    program = FUNCTIONS / "program.wat"
    engine = wasmtime.Engine()
    module = wasmtime.Module.from_file(engine, str(program))
    linker = wasmtime.Linker(engine)
    linker.define_wasi()

    async def direct(number: int) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"1%d\n" % number)
            file.flush()
            store = wasmtime.Store(engine)
            wasi = wasmtime.WasiConfig()
            wasi.stdin_file = file.name
            wasi.stdout_file = os.devnull
            store.set_wasi(wasi)
            start = linker.instantiate(store, module).exports(store)["_start"]
            assert isinstance(start, wasmtime.Func)
            start(store)

    return spec_of("wasm", entry=str(program)), direct, lambda n: {"value": int(f"1{n}")}


async def llama_subject(stack: AsyncExitStack) -> tuple[FunctionSpec, Direct, Any]:
    _, engine, _ = load_engine("llama_cpp", EngineOptions(model=str(MODEL), n_ctx=512))
    stack.callback(engine.close)

    async def direct(number: int) -> None:
        messages = [{"role": "user", "content": ask_of(number)}]
        prompt = Prompt(messages=messages, max_tokens=TOKENS)
        engine.generate(prompt, lambda _text: None, threading.Event())

    spec = spec_of("llama_cpp", model=str(MODEL), options={"n_ctx": 512, "max_tokens": TOKENS})
    return spec, direct, lambda number: {"text": ask_of(number)}


async def openai_subject(stack: AsyncExitStack) -> tuple[FunctionSpec, Direct, Any]:
    words = Answer(text=[f"{number} " for number in range(TOKENS)])
    server = await stack.enter_async_context(ScriptedOpenAI(answers=lambda _body: words))
    client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False))

    async def direct(number: int) -> None:
        messages = [{"role": "user", "content": ask_of(number)}]
        body = {"model": "scripted", "stream": True, "messages": messages}
        url = f"{server.base_url}/chat/completions"
        async with client.stream("POST", url, json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    json.loads(line.removeprefix("data: "))

    spec = spec_of("openai", model="scripted", options={"base_url": server.base_url})
    return spec, direct, lambda number: {"text": ask_of(number)}


SUBJECTS = {
    "python": python_subject,
    "command": command_subject,
    "wasm": wasm_subject,
    "openai": openai_subject,
    "llama_cpp": llama_subject,
}


async def measure_runtime(name: str) -> dict[str, Any]:
    times: dict[str, list[float]] = {"direct": [], "runtime": []}
    async with AsyncExitStack() as stack:
        spec, direct, asked = await SUBJECTS[name](stack)
        runtime = make_runtimes([name], RuntimeContext())[name]
        instance = await stack.enter_async_context(running(runtime, spec))
        for number in range(ROUNDS + WARM_UP):
            started = time.perf_counter()
            await direct(number)
            between = time.perf_counter()
            await collect(instance, request(runtime, spec, **asked(number)))
            ended = time.perf_counter()
            if number >= WARM_UP:
                times["direct"].append((between - started) * 1000)
                times["runtime"].append((ended - between) * 1000)
    return {
        "runtime": name,
        "rounds": ROUNDS,
        "direct p50 ms": p50(times["direct"]),
        "runtime p50 ms": p50(times["runtime"]),
        "p95": p95(times["runtime"]),
        "added ms": round(p50(times["runtime"]) - p50(times["direct"]), 3),
        "added p10 ms": round(p10(times["runtime"]) - p10(times["direct"]), 3),
    }


def measure() -> list[dict[str, Any]]:
    return [asyncio.run(measure_runtime(name)) for name in SUBJECTS]
