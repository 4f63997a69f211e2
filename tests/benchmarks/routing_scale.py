"""What a decision costs as fleets grow: 100 to 100,000 distinct capabilities.

    python tests/benchmarks/routing_scale.py [SIZE ...]

Every size runs in a process of its own, through the production path: catalogue messages are
decoded, admitted and indexed as the router does it, decisions are made by ``TaskRouting``. Texts
come from a generator (five examples, a schema and a price for each capability, rare names among
common words). Of the vectors 1,000 are MiniLM's, embedded in the same run; the others are blends of
two of these with noise, for embedding 100,000 texts would take an hour. Comparing all is measured
in the same run, on the same vectors. Times are given twice: by the clock on the wall, and as work
of the thread (``cpu``), which other programs on the machine lengthen less.
"""

import argparse
import asyncio
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import psutil

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[at]) for at in (1, 2)]

from capability_schemas.capability import CatalogRecord, EncoderSpace
from capability_schemas.node import NodeLoad
from capability_schemas.task import Task, TaskPolicy
from capability_schemas.wire import decode, encode
from foam.logging import configure_logging
from registry.encoders import EncoderThread, Vectors, load_encoder
from registry.index import CapabilityIndex
from registry.lexical import LexicalIndex
from registry.search import CapabilitySearch
from registry.vectors import pack_parts, pack_vector
from router.catalogue import Fleet
from router.meaning import Meaning
from router.routing import TaskRouting, Wanted
from router.settings import RouterSettings
from router.sharing import CollectorRest, Sharing

SIZES: Final = (100, 1_000, 10_000, 100_000)
REAL: Final = 1_000
NODES: Final = 500
ZONES: Final = 4
TASKS: Final = 300
CHANGES_S: Final = 8.0
EXAMPLES: Final = 5
NOW: Final = 1_700_000_000_000

_VERBS: Final = """
check measure read adjust start stop plan report summarise translate classify forecast
inspect clean calibrate compare count detect draw explain fetch find fix list log map match
mix move order pack print rank record repair scan schedule search send sort store test track
tune update weigh
"""
_THINGS: Final = """
pump valve tank motor belt sensor alarm invoice parcel truck pallet shelf camera door lamp
heater fan boiler filter oven mixer press drill welder robot gripper conveyor recipe batch
shift worker visitor meeting calendar mail letter contract claim ticket customer supplier
warehouse route driver ship train flight hotel weather soil crop seed cow field tractor well
river dam turbine battery panel inverter grid meter cable server disk backup certificate
password account payment refund tax salary budget chart table document page photo video song
voice sentence
"""
_ASPECTS: Final = """
leak noise pressure level temperature speed vibration wear colour weight size date cost risk
quality humidity voltage current flow delay error trend status address name language tone
length topic rating margin demand supply age position angle distance duration
"""
_SYLLABLES: Final = """
ba be bo da de di fa fe ga go ka ki ko la li lo ma mi mo na ne no pa pe po ra ri
"""
VERBS, THINGS, ASPECTS, SYLLABLES = (
    words.split() for words in (_VERBS, _THINGS, _ASPECTS, _SYLLABLES)
)


class Texts:
    """Capabilities in words: common verbs and things, rare names; the same for the same seed."""

    def __init__(self, count: int, seed: int = 1) -> None:
        rng = random.Random(seed)
        makers = self._names(max(20, count // 20), rng)
        places = self._names(max(10, count // 100), rng)
        self.functions: list[str] = []
        self.descriptions: list[str] = []
        self.examples: list[tuple[str, ...]] = []
        for at in range(count):
            verb, thing, maker = rng.choice(VERBS), rng.choice(THINGS), rng.choice(makers)
            aspect, other = rng.sample(ASPECTS, 2)
            place = rng.choice(places)
            self.functions.append(f"{verb}_{thing}_{aspect}_{at}")
            self.descriptions.append(
                f"Can {verb} the {aspect} and the {other} of every {maker} {thing} in {place}, "
                "and says what to do when it is out of range"
            )
            self.examples.append(
                (
                    f"please {verb} the {aspect} of the {maker} {thing}",
                    f"how is the {other} of {thing} {at % 97} in {place}",
                    f"{verb} {thing} {aspect} for {place} now",
                    f"what about the {aspect} of my {thing} from {maker}",
                    f"{verb} the {thing} by tonight and ask {rng.choice(makers)} for its {aspect}",
                )
            )

    def request(self, rng: random.Random) -> str:
        """About twenty words that ask for one of those with a real vector in a roundabout way."""
        at = rng.randrange(min(REAL, len(self.functions)))
        said = " ".join(rng.sample(self.examples[at], 2))
        return f"{said} because the {rng.choice(THINGS)} was {rng.choice(ASPECTS)} again today"

    @staticmethod
    def _names(count: int, rng: random.Random) -> list[str]:
        found: set[str] = set()
        while len(found) < count:
            found.add("".join(rng.choices(SYLLABLES, k=rng.choice((3, 4, 5)))))
        return sorted(found)


def blended(real: Vectors, count: int, seed: int = 2) -> Vectors:
    """Unit vectors: the real ones first, then blends of two of them with some noise."""
    rng = np.random.default_rng(seed)
    made = np.empty((count, real.shape[1]), dtype=np.float32)
    made[: len(real)] = real[:count]
    for at in range(len(real), count, 4_096):
        size = min(4_096, count - at)
        one, other = rng.integers(len(real), size=(2, size))
        share = rng.uniform(0.3, 0.7, (size, 1))
        noise = rng.standard_normal((size, real.shape[1])) * (0.35 / np.sqrt(real.shape[1]))
        made[at : at + size] = share * real[one] + (1.0 - share) * real[other] + noise
    units: Vectors = made / np.linalg.norm(made, axis=1, keepdims=True)
    return units


class Catalogue:
    """What a broker would keep: one message for each capability."""

    def __init__(self, texts: Texts, vectors: Vectors, space: EncoderSpace) -> None:
        self.texts = texts
        self.vectors = vectors
        self._rng = np.random.default_rng(5)
        blank = CatalogRecord(
            node="node-0",
            function="blank",
            version="1.0.0",
            epoch=1,
            revision=1,
            description="blank",
            space=space,
            registry="registry-1",
            admitted_at=1,
            claim_digest="sha256:" + "0" * 64,
        )
        self._template: dict[str, Any] = json.loads(encode(blank))

    def __len__(self) -> int:
        return len(self.texts.functions)

    def message(self, at: int, *, revision: int = 1, vector: Vectors | None = None) -> bytes:
        """The message of one capability; only what differs is written anew."""
        mine = self.vectors[at] if vector is None else vector
        noise = self._rng.standard_normal((EXAMPLES + 1, len(mine))).astype(np.float32)
        properties = {
            name: {"type": "string", "description": f"the {name} to look at"}
            for name in self.texts.functions[at].split("_")[1:3]
        }
        own = {
            "node": f"node-{at % NODES}",
            "function": self.texts.functions[at],
            "revision": revision,
            "description": self.texts.descriptions[at],
            "examples": self.texts.examples[at],
            "skills": [THINGS[at % len(THINGS)]],
            "input_schema": {"type": "object", "properties": properties},
            "cost": {"money": 0.01 * (at % 7), "energy_j": 0.0},
            "policy": self._template["policy"] | {"zones": [f"zone-{at % ZONES}"]},
            "embedding": pack_vector(mine),
            "parts": pack_parts(mine + 0.03 * noise),
        }
        return json.dumps(self._template | own).encode()

    def messages(self) -> Iterator[bytes]:
        """All of them."""
        return (self.message(at) for at in range(len(self)))


class Router:
    """The parts of a router that decide, as the service joins them."""

    def __init__(self, search: CapabilitySearch, encoder: EncoderThread) -> None:
        self.search = search
        self.fleet = Fleet()
        self.rest = CollectorRest()
        self.meaning = Meaning(search=search, encoder=encoder)
        self.routing = TaskRouting(
            meaning=self.meaning, fleet=self.fleet, settings=RouterSettings()
        )
        for number in range(NODES):
            load = NodeLoad(
                node=f"node-{number}", epoch=1, at=NOW, capacity=4, queue_limit=16, functions={}
            )
            self.fleet.hear_load(load, NOW)

    def take(self, payload: bytes) -> None:
        """A catalogue message, as ``RouterService`` takes it."""
        record = decode(CatalogRecord, payload, limit_bytes=1 << 20)
        if self.fleet.admit(record):
            if self.meaning.upsert(record):
                self.fleet.lighten(record.key)
            self.rest.changed()

    async def take_all(self, payloads: Sequence[bytes]) -> tuple[float, float]:
        """Take the whole catalogue; return seconds and the longest single message."""
        worst = 0.0
        begun = time.perf_counter()
        for payload in payloads:
            started = time.perf_counter()
            self.take(payload)
            worst = max(worst, time.perf_counter() - started)
            await asyncio.sleep(0)
        return time.perf_counter() - begun, worst


def wanted(text: str, **policy: Any) -> Wanted:
    task = Task(id="t-1", text=text, policy=TaskPolicy(**policy))
    return Wanted(client="c-1", task=task, function=None, deadline=NOW + 60_000)


class Times(NamedTuple):
    """Milliseconds of each: by the clock on the wall, and of this thread's work."""

    wall: list[float]
    cpu: list[float]

    def shares(self, name: str) -> dict[str, float]:
        """Median and 99th percentile of both, under a name."""
        return {
            f"{name}_p50_ms": at_share(self.wall, 0.5),
            f"{name}_p99_ms": at_share(self.wall, 0.99),
            f"{name}_cpu_p50_ms": at_share(self.cpu, 0.5),
            f"{name}_cpu_p99_ms": at_share(self.cpu, 0.99),
        }


def timed(act: Callable[[Any], Any], items: Sequence[Any]) -> Times:
    """Do something with each."""
    times = Times([], [])
    for item in items:
        started, worked = time.perf_counter(), time.thread_time()
        act(item)
        times.cpu.append((time.thread_time() - worked) * 1e3)
        times.wall.append((time.perf_counter() - started) * 1e3)
    return times


def at_share(values: Sequence[float], share: float) -> float:
    return round(float(np.quantile(values, share)), 3)


def rss_mb() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / 1e6


@asynccontextmanager
async def watched() -> AsyncIterator[list[float]]:
    """How long the event loop kept others waiting, in milliseconds."""
    pauses: list[float] = []

    async def watch() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0)
            pauses.append((time.perf_counter() - started) * 1e3)

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch(), name="benchmarks.routing_scale.watch")
        yield pauses
        watching.cancel()


class Pauses:
    """What the event loop kept others waiting while something went on."""

    def __init__(self, pauses: list[float]) -> None:
        self.worst_ms = round(max(pauses, default=0.0), 1)
        self.p99_ms = at_share(pauses or [0.0], 0.99)


async def graphs_built(search: CapabilitySearch) -> float:
    """Wait until no graph is being built; return the seconds."""
    started = time.perf_counter()
    while search.index.maintain() or search.index.building:  # noqa: ASYNC110 - a thread's work
        await asyncio.sleep(0.001)
    return time.perf_counter() - started


async def decisions(router: Router, catalogue: Catalogue) -> dict[str, Any]:
    """Decide with the encoder and without; never the same words twice, so nothing is cached."""
    rng = random.Random(11)
    asked = [wanted(catalogue.texts.request(rng)) for _ in range(2 * TASKS)]
    with_encoding = Times([], [])
    for one in asked[:TASKS]:
        started, worked = time.perf_counter(), time.process_time()  # the encoder's thread included
        query = await router.routing.embed(one)
        router.routing.select(one, query, NOW)
        with_encoding.cpu.append((time.process_time() - worked) * 1e3)
        with_encoding.wall.append((time.perf_counter() - started) * 1e3)
    queries = [await router.routing.embed(one) for one in asked[TASKS:]]
    pairs = list(zip(asked[TASKS:], queries, strict=True))
    zoned = [(wanted(one.task.text or "", zones=["zone-1"]), query) for one, query in pairs]
    select, search = router.routing.select, router.search.search
    return {
        **with_encoding.shares("with"),
        **timed(lambda pair: select(pair[0], pair[1], NOW), pairs).shares("without"),
        **timed(lambda pair: select(pair[0], pair[1], NOW), zoned).shares("zoned"),
        **timed(lambda pair: search(pair[1].text, pair[1].vector, 8), pairs).shares("search"),
    }


def against_all(index: CapabilityIndex, asked: Vectors) -> dict[str, Any]:
    """The index as it serves against comparing all, on the same vectors."""
    exact = CapabilityIndex(dimension=asked.shape[1], exact_limit=len(index) + 1)
    for key in index:
        exact.upsert(key, index.vector(key))
    found = [{key for key, _ in index.search(row, 10)} for row in asked]
    wide = [{key for key, _ in index.search(row, 64)[:10]} for row in asked]
    best = [{key for key, _ in exact.search(row, 10)} for row in asked]
    hits = sum(len(one & two) for one, two in zip(found, best, strict=True))
    wide_hits = sum(len(one & two) for one, two in zip(wide, best, strict=True))
    total = sum(map(len, best))
    return {
        **timed(lambda row: index.search(row, 32), list(asked)).shares("index"),
        **timed(lambda row: exact.search(row, 32), list(asked)).shares("all"),
        "recall_at_10": round(hits / total, 4),
        "recall_at_10_of_64": round(wide_hits / total, 4),
    }


async def changes(router: Router, catalogue: Catalogue) -> dict[str, Any]:
    """Replace capabilities as fast as may be, a search for every ten, and watch the event loop."""
    rng = random.Random(13)
    fresh = blended(catalogue.vectors[:REAL], 4_000 + REAL, seed=21)[REAL:]
    made = [
        catalogue.message(rng.randrange(len(catalogue)), revision=2 + at, vector=fresh[at])
        for at in range(len(fresh))
    ]
    asked = list(catalogue.vectors[:100])
    search_ms: list[float] = []
    count = 0
    async with watched() as pauses:
        started = time.perf_counter()
        while time.perf_counter() - started < CHANGES_S and count < len(made):
            router.take(made[count])
            count += 1
            if count % 10 == 0:
                vector = asked[count // 10 % len(asked)]
                search_ms += timed(lambda row: router.search.search("pump", row, 8), [vector]).wall
            await asyncio.sleep(0)
        spent = time.perf_counter() - started
    return {
        "changes_per_s": round(count / spent),
        "search_meanwhile_p50_ms": at_share(search_ms, 0.5),
        "pause_p99_ms": Pauses(pauses).p99_ms,
        "pause_worst_ms": Pauses(pauses).worst_ms,
    }


async def grow(size: int, real: Vectors, folder: Path) -> dict[str, Any]:
    """Everything that is measured at one size."""
    texts = Texts(size)
    row: dict[str, Any] = {"capabilities": size}
    with ThreadPoolExecutor(1) as background:
        async with EncoderThread(encoder=lambda: load_encoder("onnx")) as encoder:
            catalogue = Catalogue(texts, blended(real, size), encoder.space)
            router = Router(CapabilitySearch(space=encoder.space, background=background), encoder)
            payloads = list(catalogue.messages())
            row["message_bytes"] = len(payloads[0])
            before = rss_mb()
            worked = time.thread_time()
            took_s, worst_s = await router.take_all(payloads)
            row["rebuild_cpu_s"] = round(time.thread_time() - worked, 2)
            built_s = await graphs_built(router.search)
            row["rebuild_s"] = round(took_s, 2)
            row["rebuild_worst_ms"] = round(worst_s * 1e3, 1)
            row["graphs_after_s"] = round(built_s, 2)
            row["router_mb"] = round(rss_mb() - before)
            started = time.perf_counter()
            await router.meaning.calibrate()
            row["calibration_s"] = round(time.perf_counter() - started, 2)
            row |= await decisions(router, catalogue)
            started = time.perf_counter()
            await asyncio.wrap_future(router.search.snapshot(folder))
            row["save_s"] = round(time.perf_counter() - started, 2)
            row |= await changes(router, catalogue)
            router.search.index.close()
            del router
            again = Router(CapabilitySearch(space=encoder.space, background=background), encoder)
            started = time.perf_counter()
            again.search.restore(folder)
            row["load_s"] = round(time.perf_counter() - started, 2)
            took_s, _ = await again.take_all(payloads)
            again.search.forget_unclaimed()
            row["rebuild_with_snapshot_s"] = round(took_s + row["load_s"], 2)
            asked = blended(real, REAL + 200, seed=31)[REAL:]
            row |= against_all(again.search.index, asked)
            again.search.index.close()
    return row


def memory(size: int, real: Vectors, snapshot: Path) -> dict[str, Any]:
    """Memory of the parts, one after another, in a process that holds nothing else."""
    texts = Texts(size)
    row: dict[str, Any] = {}
    kept: list[Any] = []

    def part(name: str, made: Any, before: float) -> float:
        kept.append(made)
        now = rss_mb()
        row[f"{name}_mb"] = round(now - before)
        return now

    def words() -> LexicalIndex:
        lexical = LexicalIndex()
        for number, key in enumerate(texts.functions):
            lexical.upsert(key, [key, texts.descriptions[number], *texts.examples[number]])
        return lexical

    space = EncoderSpace(model="m", revision="1", dimension=real.shape[1])
    told = json.loads((snapshot / "manifest.json").read_text())["space"]
    at = rss_mb()
    at = part("words", words(), at)
    at = part("vectors_and_graphs", CapabilityIndex.load(snapshot, space=told), at)
    messages = Catalogue(texts, blended(real, size), space).messages()
    at = rss_mb()
    sharing = Sharing()
    records = (decode(CatalogRecord, one, limit_bytes=1 << 20) for one in messages)
    part("records", [sharing.lighten(record) for record in records], at)
    return row


def measure(sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    """Measure every size in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="foam-scale-") as made:
        folder = Path(made)
        texts = Texts(REAL)
        encoder = load_encoder("onnx")
        pairs = zip(texts.functions, texts.descriptions, strict=True)
        np.save(
            folder / "real.npy",
            np.concatenate([encoder.encode([f"{one}: {two}"]) for one, two in pairs]),
        )
        return [_child(folder, "grow", size) | _child(folder, "memory", size) for size in sizes]


def _child(folder: Path, what: str, size: int) -> dict[str, Any]:
    work = folder / str(size)
    work.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", what, str(size)]
    subprocess.run([*command, "--folder", str(folder)], check=True)
    found: dict[str, Any] = json.loads((work / f"{what}.json").read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--child", choices=["grow", "memory"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    configure_logging("error")
    if options.child is None:
        for row in measure(options.sizes):
            print(json.dumps(row, indent=1))
        return 0
    size = options.sizes[0]
    real: Vectors = np.load(options.folder / "real.npy")
    work = options.folder / str(size)
    if options.child == "grow":
        row = asyncio.run(grow(size, real, work / "index"))
    else:
        row = memory(size, real, work / "index")
    (work / f"{options.child}.json").write_text(json.dumps(row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
