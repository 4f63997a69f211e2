"""What signatures cost: one message, and a whole task with and without them.

Two meshes of a router and a node with a python echo function, all in one process over the broker in
memory (so that nothing but the work itself is in the figures), asked in turn: one signs and checks,
the other does neither, which only the constructors allow.
"""

import asyncio
import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import p50, p95
from broker.session.memory import MemorySession
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Invocation
from capability_schemas.provenance import ORDER_ROLES, Provenance
from capability_schemas.reply import Result, decode_reply
from capability_schemas.signing import canonical_bytes, sign, verify
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings
from router import RouterSettings
from support.capabilities import make_record
from support.members import REGISTRY_KEY, make_book, make_signer
from support.scripted_mesh import Mesh

ECHO = "def echo(text: str) -> str:\n    return text\n"
SIZES = (100, 10_000, 1_000_000)
_NUMBERS = itertools.count()


def microseconds(work: Callable[[], object], *, times: int) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append((time.perf_counter() - started) * 1e6)
    return round(p50(taken), 1)


def _canonical(payload: bytes) -> bytes:
    return canonical_bytes(json.loads(payload))


def measure_messages() -> list[dict[str, Any]]:
    """Return what signing and checking an invocation costs, by the size of its text and of JSON."""
    router = make_signer("router-1", "router", now=now_ms())
    book = make_book(now_ms)
    assert router.passport is not None
    book.admit(router.passport)
    rows = []
    for kind, size in [("text", size) for size in SIZES] + [("json", SIZES[-1])]:
        value = [{"at": n, "x": "y"} for n in range(size // 20)] if kind == "json" else None
        order = Invocation(
            task="0190f0f0-aaaa", client="pump-7", router="router-1", node="edge-1",
            function="echo", version="1.0.0", text="x" * (size if kind == "text" else 1),
            input=value, deadline=now_ms() + 60_000, reply="foam/v1/local/reply/pump-7/t",
            sent_at=now_ms(),
        )  # fmt: skip
        signed = router.sign(order)
        payload = encode(signed)

        def check(payload: bytes = payload) -> bool:
            return Provenance(own="edge-1", book=book).check(
                payload,
                sender="router-1",
                roles=ORDER_ROLES,
                target="edge-1",
                sent_at=now_ms(),
                nonce=next(_NUMBERS),
            )

        times = 2_000 if size < SIZES[-1] else 20
        rows.append(
            {
                "payload": f"{kind}, {len(payload)} bytes",
                "encode µs": microseconds(partial(encode, order), times=times),
                "sign µs": microseconds(partial(router.sign, order), times=times),
                "decode µs": microseconds(partial(decode, Invocation, payload), times=times),
                "check µs": microseconds(check, times=times),
                "of it the signature µs": microseconds(
                    partial(verify, payload, router.key.public), times=times
                ),
                "of it canonical form µs": microseconds(partial(_canonical, payload), times=times),
            }
        )
    return rows


class Asked:
    """A mesh whose client waits for one result at a time."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._done: asyncio.Future[Result] | None = None

    async def start(self, topics: Topics) -> None:
        client = await self._mesh.session("pump-7")
        self._mesh.client = client
        await client.subscribe(topics.filter(TopicKind.REPLY, client="pump-7"), self._on_reply)

    async def ask_ms(self, number: int, *, proof: bool) -> float:
        self._done = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        fields = {"id": f"t{number}", "function": "echo", "text": "x" * 300}
        self._mesh.submit(**fields, **({"proof": True} if proof else {}))
        async with asyncio.timeout(30):
            await self._done
        return (time.perf_counter() - started) * 1000

    async def _on_reply(self, message: Any) -> None:
        event = decode_reply(message.payload)
        if isinstance(event, Result) and self._done is not None and not self._done.done():
            self._done.set_result(event)


@contextlib.asynccontextmanager
async def running(folder: Path, *, signed: bool) -> AsyncIterator[Asked]:
    folder.mkdir()
    (folder / "functions.py").write_text(ECHO)
    topics = Topics()
    function = FunctionSpec.model_validate(
        {"name": "echo", "description": "echo", "entry": f"{folder}/functions.py:echo"}
    )
    async with contextlib.AsyncExitStack() as stack:
        mesh = Mesh(stack, folder, topics)
        asked = Asked(mesh)
        await asked.start(topics)
        trust: dict[str, Any] = {}
        if signed:
            trust = {
                "signer": make_signer("router-1", "router", now=now_ms()),
                "book": make_book(now_ms),
            }
        await mesh.start_router(RouterSettings(settle_ms=50, quiet_ms=10), **trust)
        stack.push_async_callback(mesh.stop_router)
        session = await stack.enter_async_context(
            MemorySession(broker=mesh.broker, client_id="edge-1")
        )
        if signed:
            trust["signer"] = make_signer("edge-1", "node", now=now_ms())
            trust["book"] = make_book(now_ms)
        await stack.enter_async_context(
            NodeAgent(
                session=session,
                topics=topics,
                settings=NodeSettings(node="edge-1"),
                functions=(function,),
                **trust,
            )
        )
        record = sign(make_record(mesh.words, "edge-1"), REGISTRY_KEY)
        topic = topics.build(TopicKind.CATALOG, node="edge-1", function="echo")
        mesh.client.post(topic, encode(record), retain=True)
        await mesh.broker.settle()
        yield asked


def measure_catalogue(*, records: int = 10_000) -> list[dict[str, Any]]:
    """Return how long a starting router takes for its catalogue, checked and unchecked.

    Args:
        records: How many there are, of one function each.
    """
    return [asyncio.run(_read_catalogue(records, checked=checked)) for checked in (False, True)]


async def _read_catalogue(records: int, *, checked: bool) -> dict[str, Any]:
    topics = Topics()
    with tempfile.TemporaryDirectory(prefix="foam-bench-") as made:
        async with contextlib.AsyncExitStack() as stack:
            mesh = Mesh(stack, Path(made), topics)
            await mesh.start_client()
            model = make_record(mesh.words, "edge-1")
            for number in range(records):
                record = model.model_copy(update={"function": f"function-{number}"})
                topic = topics.build(TopicKind.CATALOG, node="edge-1", function=record.function)
                mesh.client.post(topic, encode(sign(record, REGISTRY_KEY)), retain=True)
                if number % 100 == 0:
                    await mesh.broker.settle()
            await mesh.broker.settle()
            trust: dict[str, Any] = {"book": make_book(now_ms)} if checked else {}
            longest = asyncio.create_task(_longest_turn_ms())
            started = time.perf_counter()
            router = await mesh.start_router(RouterSettings(queue_limit=2 * records), **trust)
            taken = time.perf_counter() - started
            if len(router.fleet.records) != records:
                raise RuntimeError(f"{len(router.fleet.records)} of {records} records are known")
            longest.cancel()
            await mesh.stop_router()
            return {
                "records": records,
                "checked": checked,
                "all known after, s": round(taken, 2),
                "longest turn of the loop, ms": round(await longest, 1),
            }


async def _longest_turn_ms() -> float:
    """Return how long others had to wait for the loop at most, until cancelled."""
    longest = 0.0
    try:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, (time.perf_counter() - started) * 1e3)
    except asyncio.CancelledError:
        return longest


def measure_tasks(*, rounds: int = 300) -> list[dict[str, Any]]:
    """Return how long a task takes with and without signatures, in turn."""
    return asyncio.run(_measure_tasks(rounds=rounds, warm_up=20))


async def _measure_tasks(*, rounds: int, warm_up: int) -> list[dict[str, Any]]:
    kinds = {"unsigned": (False, False), "signed": (True, False), "signed, proof": (True, True)}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory(prefix="foam-bench-") as made:
        async with (
            running(Path(made) / "plain", signed=False) as plain,
            running(Path(made) / "signed", signed=True) as checked,
        ):
            for number in range(rounds + warm_up):
                for place, (name, (signed, proof)) in enumerate(kinds.items()):
                    mesh = checked if signed else plain
                    taken = await mesh.ask_ms(number * len(kinds) + place, proof=proof)
                    if number >= warm_up:
                        times[name].append(taken)
    base = p50(times["unsigned"])
    return [
        {
            "task": name,
            "rounds": rounds,
            "p50 ms": round(p50(taken), 2),
            "p95 ms": round(p95(taken), 2),
            "more than unsigned ms": round(p50(taken) - base, 2),
        }
        for name, taken in times.items()
    ]
