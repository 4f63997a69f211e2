"""What a quiet client feels of a noisy one, and a short task of the long run before it.

A real router and real node agents with child processes, over a broker in memory: what is measured
is whose turn it is, not what a broker takes. The baseline hands every task to a node at once, as
routers without a waiting room do.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from benchmarks.measure import p50, p95
from broker.session.base import Message
from broker.session.memory import MemorySession
from capability_schemas.functions import FunctionSpec
from capability_schemas.topics import TopicKind, Topics
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings
from router import RouterSettings, catalogue
from support.capabilities import make_record
from support.scripted_mesh import Mesh

SOURCE = """
import time

def echo(seconds: float) -> float:
    time.sleep(seconds)
    return seconds
"""
RUN_S = 0.2
NODES = 2
PLACES = 2
NOISY = 200
QUIET = 16
QUIET_EVERY_S = 0.5
LONG_S = 5.0
ROUNDS = 3


@contextmanager
def _bound_at_once() -> Iterator[None]:
    """Have the router give nodes all they take."""
    with mock.patch.object(catalogue, "allowance", return_value=1_000_000):
        yield


class _Bench:
    """One mesh for one measurement."""

    def __init__(self, mesh: Mesh, source: Path, topics: Topics) -> None:
        self.mesh = mesh
        self.source = source
        self.topics = topics
        self.ends: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def _heard(self, message: Message) -> None:
        event = json.loads(message.payload)
        end = self.ends.get(event["task"])
        if event["event"] in {"result", "error"} and end is not None and not end.done():
            end.set_result(event)

    async def client(self, name: str) -> MemorySession:
        session = await self.mesh.session(name)
        await session.subscribe(self.topics.filter(TopicKind.REPLY, client=name), self._heard)
        return session

    async def node(self, name: str, *, places: int = PLACES) -> None:
        spec = FunctionSpec(
            description="d", entry=f"{self.source}:echo", name="echo", concurrency=places, warm=True
        )
        agent = NodeAgent(
            session=await self.mesh.session(name),
            topics=self.topics,
            settings=NodeSettings(node=name, load_interval_s=0.5, queue_limit=10_000),
            functions=[spec],
        )
        await self.mesh.stack.enter_async_context(agent)
        await agent.wait_warm(60)
        record = make_record(self.mesh.words, name)
        topic = self.topics.build(TopicKind.CATALOG, node=name, function="echo")
        self.mesh.client.post(
            topic, record.model_dump_json(exclude_none=True).encode(), retain=True
        )
        fleet = self.mesh.router.fleet
        async with asyncio.timeout(60):
            while (name, "echo") not in fleet.records or fleet.node(name).load is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def given(self, count: int) -> None:
        """Wait until the first node has so many tasks."""
        view = self.mesh.router.fleet.node("edge-0")
        async with asyncio.timeout(60):
            while view.given["echo"] < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def submit(
        self, session: MemorySession, task: str, seconds: float
    ) -> asyncio.Future[dict[str, Any]]:
        end = self.ends[task] = asyncio.get_running_loop().create_future()
        fields = {"id": task, "function": "echo", "input": seconds, "timeout_ms": 300_000}
        topic = self.topics.build(TopicKind.TASK, client=session.client_id)
        session.post(topic, json.dumps(fields).encode())
        return end


@asynccontextmanager
async def _bench(settings: RouterSettings) -> AsyncIterator[_Bench]:
    topics = Topics()
    with TemporaryDirectory() as folder:
        source = Path(folder) / "functions.py"
        source.write_text(SOURCE)
        async with AsyncExitStack() as stack:
            mesh = Mesh(stack, Path(folder), topics)
            await mesh.start_client()
            await mesh.start_router(settings)
            yield _Bench(mesh, source, topics)
            await mesh.stop_router()


async def _noisy_neighbour(*, noisy: int) -> tuple[list[float], float]:
    """Return the milliseconds of each of the quiet client's tasks, and the noisy one's seconds."""
    async with _bench(RouterSettings()) as bench:
        for number in range(NODES):
            await bench.node(f"edge-{number}")
        loud, quiet = await bench.client("loud"), await bench.client("quiet")
        for number in range(2 * NODES * PLACES):  # run times become known
            await bench.submit(loud, f"w{number}", RUN_S)
        began = time.perf_counter()
        ends = [bench.submit(loud, f"n{number}", RUN_S) for number in range(noisy)]

        async def ask(number: int) -> float:
            await asyncio.sleep(number * QUIET_EVERY_S)
            asked = time.perf_counter()
            await bench.submit(quiet, f"q{number}", RUN_S)
            return (time.perf_counter() - asked) * 1000

        took_ms = await asyncio.gather(*(ask(number) for number in range(QUIET)))
        await asyncio.gather(*ends)
        return took_ms, time.perf_counter() - began


async def _behind_a_long_run(*, moves_per_s: float) -> float:
    """Return the seconds of a short task that was given to a node just before another came."""
    async with _bench(RouterSettings(moves_per_s=moves_per_s)) as bench:
        client = await bench.client("device")
        await bench.node("edge-0", places=1)
        long = bench.submit(client, "long", LONG_S)
        await bench.given(1)
        asked = time.perf_counter()
        short = bench.submit(client, "short", 0.1)
        await bench.given(2)
        await bench.node("edge-1", places=1)
        await short
        took_s = time.perf_counter() - asked
        await long
        return took_s


def measure() -> list[dict[str, Any]]:
    """Measure a quiet client beside a noisy one, with and without the waiting room."""
    rows: list[dict[str, Any]] = []
    for name, noisy, bound in (
        ("alone", 0, False),
        ("queues at the nodes", NOISY, True),
        ("waiting room", NOISY, False),
    ):
        with _bound_at_once() if bound else nullcontext():
            took_ms, noisy_s = asyncio.run(_noisy_neighbour(noisy=noisy))
        rows.append(
            {
                "quiet client": name,
                "p50 ms": round(p50(took_ms)),
                "p95 ms": round(p95(took_ms)),
                "noisy client s": round(noisy_s, 1),
            }
        )
    return rows


def measure_moves() -> list[dict[str, Any]]:
    """Measure how long a short task stands behind a long run, with and without moving it."""
    rows = []
    for name, moves_per_s in (("stays", 0.0), ("moved", RouterSettings().moves_per_s)):
        took = [asyncio.run(_behind_a_long_run(moves_per_s=moves_per_s)) for _ in range(ROUNDS)]
        rows.append({f"behind a run of {LONG_S:g} s": name, "p50 s": round(p50(took), 2)})
    return rows
