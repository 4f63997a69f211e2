"""What every benchmark needs: a mesh of its own, bare hops on the same broker, and tables."""

import asyncio
import contextlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from broker.access.policy import Role
from broker.session.base import Message
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.topics import TopicKind, Topics
from foam.demo.run import DemoMesh
from foam.demo.traces import quantile
from foam.logging import configure_logging
from foam.mesh import MeshFolder
from foam.sdk.address import MeshAddress
from foam.sdk.client import MeshClient

NODE = Path(__file__).resolve().parent / "node" / "bench.toml"
ROOT = Path(__file__).resolve().parents[2]
HOP_FROM, HOP_TO = "bench-router", "bench-echo"
HOPS_OF_A_TASK = 3
"""Client to router, router to node, node to client."""


def p50(values: Sequence[float]) -> float:
    return round(quantile(values, 0.5), 3)


def p95(values: Sequence[float]) -> float:
    return round(quantile(values, 0.95), 3)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


@dataclass
class BenchMesh:
    """A running mesh with one bench node, a client on it, and two identities for bare hops."""

    broker: str
    data: Path
    facts: Mapping[str, Any]
    client: MeshClient

    def session(self, identity: str, client_id: str | None = None) -> MqttSession:
        known = MeshFolder(self.data).identity(identity)
        return MqttSession(
            settings=SessionSettings(
                urls=(self.facts["broker"],),
                client_id=client_id or identity,
                username=known.username,
                password=known.password,
            )
        )


@contextlib.asynccontextmanager
async def bench_mesh(broker: str) -> AsyncIterator[BenchMesh]:
    """Start a mesh on a broker engine, and stop it afterwards."""
    with tempfile.TemporaryDirectory(prefix="foam-bench-") as made:
        data = Path(made)
        folder = MeshFolder(data).prepare()
        folder.ensure(HOP_FROM, Role.ROUTER)
        folder.ensure(HOP_TO, Role.NODE)
        folder.ensure("bench-node-2", Role.NODE)
        async with DemoMesh(data=data, broker=broker, nodes=(NODE,)) as mesh:
            device = mesh.facts["device"]
            address = MeshAddress(
                url=mesh.facts["broker"],
                site=mesh.facts["site"],
                client=device["id"],
                username=device["username"],
                password=SecretStr(device["password"]),
            )
            async with MeshClient.at(address) as client:
                yield BenchMesh(broker=broker, data=data, facts=mesh.facts, client=client)


class BareHops:
    """Sends a message to another process and back: two hops, by the mesh's own session class."""

    def __init__(self, mesh: BenchMesh) -> None:
        self._mesh = mesh
        self._topics = Topics(site=mesh.facts["site"])
        self._back = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["BareHops"]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).resolve()),
            str(self._mesh.data),
            self._mesh.facts["broker"],
            self._mesh.facts["site"],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
            async with self._mesh.session(HOP_FROM) as session:
                await session.wait_connected(10)
                topic = self._topics.build(TopicKind.REPORT, router=HOP_FROM, node=HOP_TO)
                await session.subscribe(topic, self._arrived)
                self._session = session
                yield self
        finally:
            process.kill()
            await process.wait()

    async def _arrived(self, _message: Message) -> None:
        self._back.set()

    async def task_hops_ms(self, payload: bytes) -> float:
        """Time of as many one-way hops as a task needs."""
        self._back.clear()
        started = time.perf_counter()
        self._session.post(self._topics.build(TopicKind.INVOKE, node=HOP_TO), payload)
        async with asyncio.timeout(10):
            await self._back.wait()
        return (time.perf_counter() - started) * 1000 / 2 * HOPS_OF_A_TASK


async def _echo_hops(data: Path, url: str, site: str) -> None:
    """The other process: whatever comes goes back."""
    known = MeshFolder(data).identity(HOP_TO)
    topics = Topics(site=site)
    settings = SessionSettings(
        urls=(url,), client_id=HOP_TO, username=known.username, password=known.password
    )
    back = topics.build(TopicKind.REPORT, router=HOP_FROM, node=HOP_TO)
    async with MqttSession(settings=settings) as session:
        await session.wait_connected(10)

        async def arrived(message: Message) -> None:
            session.post(back, message.payload)

        await session.subscribe(topics.build(TopicKind.INVOKE, node=HOP_TO), arrived)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as Markdown."""
    names = list(rows[0])
    lines = [f"### {title}", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    configure_logging("error")
    asyncio.run(_echo_hops(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
