"""How long a stream stands still when its node is killed, against a client that asks again itself.

Two nodes offer the same. After some chunks the node that answers is killed (SIGKILL, the whole
process). ``gap``: from the kill to the next chunk that the client sees. The baseline is the same
function without ``continues``: the client is told ``node_lost``, asks again and waits until it sees
more than it had. A Python function that says the same again (``skip``) has to say it, so that it
saves the client's work and no time; a language model (``prefix``) reads what was shown instead of
writing it. ``pace``: between two chunks of a stream that nobody disturbs.
"""

import asyncio
import contextlib
import itertools
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from pydantic import SecretStr

from benchmarks.measure import p50
from capability_schemas.errors import NodeLost
from capability_schemas.reply import Chunk, ErrorEvent
from foam.demo.traces import quantile
from foam.sdk.client import MeshClient, TaskHandle
from support.foam_process import FoamUp, foam_up

SOURCE = Path(__file__).resolve().parent / "node" / "steady.py"
MODEL = SOURCE.parents[3] / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
NAMES = ("left", "right")
KINDS = {"python, skip": ("steady", "fragile", 10), "model, prefix": ("list", "list_again", 6)}
"""What goes on, what does not, and after how many chunks its node is killed."""

LIST = f"""
[[function]]
name = "NAME"
description = "Write a list of severities as JSON."
runtime = "llama_cpp"
model = "{MODEL}"
warm = true
continues = "HOW"
options = {{ json_output = true, max_tokens = 480 }}
output_schema = {{ type = "array", minItems = 150, maxItems = 150, items = {{ enum = [0, 1] }} }}
"""
ROUNDS = 20
_BACK_S = 60.0
_AGAIN_S = 0.1


def measure() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for node in NAMES:
            text = f'[node]\nid = "{node}"\n\n[[function]]\nsource = "{SOURCE}"\n'
            for name, how in (("list", "prefix"), ("list_again", "restart")):
                text += LIST.replace("NAME", name).replace("HOW", how)
            (folder / f"{node}.toml").write_text(text)
        nodes = [part for node in NAMES for part in ("--node", str(folder / f"{node}.toml"))]
        with foam_up(folder / "data", "--broker", "embedded", *nodes) as up:
            return [asyncio.run(_measured(up, kind)) for kind in KINDS]


async def _measured(up: FoamUp, kind: str) -> dict[str, Any]:
    goes_on, ends, killed_at = KINDS[kind]
    pace: list[float] = []
    gaps: dict[str, list[float]] = {goes_on: [], ends: []}
    async with _client(up, "device") as mesh, _client(up, "admin", admin=True) as admin:
        for function, found in gaps.items():
            while len(found) < ROUNDS:
                await _both_live(admin)
                gap, between = await _killed(up, mesh, function, killed_at)
                if gap is not None:  # else its answer was there before the kill
                    found.append(gap)
                pace += between
    ours, again = gaps[goes_on], gaps[ends]
    return {
        "function": kind,
        "rounds": ROUNDS,
        "pace p50 ms": p50(pace),
        "gap p50 ms": p50(ours),
        "gap p99 ms": round(quantile(ours, 0.99), 1),
        "asked again p50 ms": p50(again),
        "asked again p99 ms": round(quantile(again, 0.99), 1),
        "asked again / gap": round(p50(again) / p50(ours), 2),
    }


def _client(up: FoamUp, who: str, *, admin: bool = False) -> MeshClient:
    facts = up.facts[who]
    return MeshClient(
        up.facts["broker"],
        client=facts["id"],
        username=facts["username"],
        password=SecretStr(facts["password"]),
        site=up.facts["site"],
        admin=admin,
    )


async def _both_live(admin: MeshClient) -> None:
    async with asyncio.timeout(_BACK_S):
        while True:
            found = await admin.admin("nodes", target="router-1")
            live = [one["node"] for one in found["nodes"] if one.get("live", True)]
            if set(NAMES) <= set(live) and await _offers(admin):
                return
            await asyncio.sleep(0.2)


async def _offers(admin: MeshClient) -> bool:
    found = await admin.admin("functions", target="router-1")
    keys = {(one["node"], one["function"]) for one in found["functions"]}
    return {
        (node, name) for node in NAMES for name in ("steady", "fragile", "list", "list_again")
    } <= keys


async def _ask(mesh: MeshClient, function: str) -> TaskHandle:
    given = {"count": 40} if function in KINDS["python, skip"] else None
    return await mesh.submit("which pumps run?", function=function, input=given, timeout_s=60)


async def _killed(
    up: FoamUp, mesh: MeshClient, function: str, after: int
) -> tuple[float | None, list[float]]:
    """Return the gap in milliseconds, None if there was none, and the times between chunks."""
    handle = await _ask(mesh, function)
    times: list[float] = []
    killed_at, shown = 0.0, ""
    async for event in handle:
        now = time.perf_counter()
        if isinstance(event, Chunk):
            if killed_at and event.attempt > 1:
                await _drain(handle)
                return (now - killed_at) * 1000, _between(times)
            times.append(now)
            shown += str(event.data)
            if len(times) == after and handle.routed is not None:
                killed_at = time.perf_counter()
                _kill(up, handle.routed.node)
        elif isinstance(event, ErrorEvent):
            if not isinstance(event.to_error(), NodeLost):
                raise event.to_error()
            return await _asked_again(mesh, function, shown, killed_at), _between(times)
    return None, _between(times)


async def _asked_again(mesh: MeshClient, function: str, shown: str, killed_at: float) -> float:
    async with asyncio.timeout(_BACK_S):
        while True:
            handle = await _ask(mesh, function)
            text = ""
            async for event in handle:
                text += str(event.data) if isinstance(event, Chunk) else ""
                if len(text) > len(shown):
                    gap_ms = (time.perf_counter() - killed_at) * 1000
                    await _drain(handle)
                    return gap_ms
            if not isinstance(handle.outcome, ErrorEvent) or not handle.outcome.retryable:
                raise RuntimeError(f"{function} did not come as far as before: {handle.outcome}")
            await asyncio.sleep(_AGAIN_S)  # nobody has it just now: a client would ask again


async def _drain(handle: TaskHandle) -> None:
    async for _ in handle:
        pass


def _between(times: list[float]) -> list[float]:
    return [(after - before) * 1000 for before, after in itertools.pairwise(times)]


def _kill(up: FoamUp, node: str) -> None:
    for process in psutil.Process(up.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = process.cmdline()
            if any(part.endswith(f"{node}.toml") for part in line) and "node" in line:
                process.send_signal(signal.SIGKILL)
                return
    raise RuntimeError(f"no process of node {node}")
