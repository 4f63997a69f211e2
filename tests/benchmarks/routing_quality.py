"""Who is found first, and who is refused: the router beside what one could use in its place.

    python tests/benchmarks/routing_quality.py [FOLDER ...] [--limit N] [--semantic-router PYTHON]

The router is asked through its own path (`foam.evaluation`); the others rank the same capabilities
with the same vectors, in the same run. ``FOLDER`` holds labelled requests, as for ``foam eval
routing``; without one, the developers' set beside the repository is taken where it is there. A
small plant fleet is measured always. ``--semantic-router`` names the interpreter of an environment
that has the package of that name.
"""

import argparse
import asyncio
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.measure import table
from foam.evaluation import (
    LabelledCapability,
    LabelledSet,
    LabelledTask,
    Route,
    evaluate_routing,
    figures,
    read_labelled,
)
from registry.encoders import Encoder, EncoderThread, default_folder, load_encoder
from registry.encoders.base import Vectors
from registry.lexical import K1, B, Tokenizer
from registry.vectors import capability_texts, centroid
from support.plant_fleet import FUNCTIONS, IN_SCOPE, OUT_OF_SCOPE, Function

DEVELOPERS: Final = Path(__file__).parents[3] / "shared" / "data" / "routing" / "metatool"
RANKED: Final = 100
SIDE: Final = Path(__file__).with_name("semantic_router_side.py")

Scores = Callable[[str, Vectors], np.ndarray]
"""Text and vector of a request to the score of every capability."""


def plant(label: str, functions: Sequence[Function]) -> LabelledSet:
    """Return a small fleet with the requests that it serves."""
    names = {function.name for function in functions}
    return LabelledSet(
        name=label,
        capabilities=tuple(
            LabelledCapability(f.name, f.name, f.description, f.examples) for f in functions
        ),
        tasks=tuple(
            LabelledTask(text, text, frozenset({name})) for text, name in IN_SCOPE if name in names
        ),
        outside=tuple(LabelledTask(text, text, frozenset()) for text in OUT_OF_SCOPE),
    )


def plants() -> list[LabelledSet]:
    return [
        plant("plant, 10 functions", FUNCTIONS),
        plant("plant, 2 examples each", [f._replace(examples=f.examples[:2]) for f in FUNCTIONS]),
        plant("plant, no examples", [f._replace(examples=()) for f in FUNCTIONS]),
        plant("plant, 4 functions", FUNCTIONS[:4]),
    ]


@dataclass(frozen=True, slots=True)
class Embedded:
    """A set with its vectors.

    Attributes:
        labelled: The set.
        parts: Of each capability, the texts that the registry embeds, float32, ``(n, dimension)``.
        asked: Of each task and out-of-scope text.
        rows: Vectors by text.
    """

    labelled: LabelledSet
    parts: list[Vectors]
    asked: list[Vectors]
    rows: dict[str, Vectors]

    @property
    def requests(self) -> tuple[LabelledTask, ...]:
        return (*self.labelled.tasks, *(self.labelled.outside or ()))


def embed(labelled: LabelledSet, encoder: Encoder) -> Embedded:
    """Embed everything, a text at a time: a quantised vector depends on its batch."""
    rows: dict[str, Vectors] = {}

    def row(text: str) -> Vectors:
        if text not in rows:
            rows[text] = encoder.encode([text])[0]
        return rows[text]

    parts = [np.stack([row(text) for text in texts_of(one)]) for one in labelled.capabilities]
    asked = [row(task.text) for task in (*labelled.tasks, *(labelled.outside or ()))]
    return Embedded(labelled, parts, asked, rows)


def texts_of(capability: LabelledCapability) -> list[str]:
    return capability_texts(
        capability.function, capability.description, capability.examples, capability.input_schema
    )


# ---- the others


def described(known: Embedded) -> Scores:
    """Cosine to the vector of name and description."""
    matrix = np.stack([rows[0] for rows in known.parts])
    return lambda _, vector: matrix @ vector


def centred(known: Embedded) -> Scores:
    """Cosine to the mean direction of description and examples."""
    matrix = np.stack([centroid(rows) for rows in known.parts])
    return lambda _, vector: matrix @ vector


def nearest(known: Embedded) -> Scores:
    """Cosine to the nearest of description and examples."""
    matrix = np.concatenate(known.parts)
    starts = np.cumsum([0, *(len(rows) for rows in known.parts[:-1])])
    return lambda _, vector: np.maximum.reduceat(matrix @ vector, starts)


def worded(known: Embedded) -> Scores:
    """BM25 over stems of name, description and examples, without any embedding.

    Robertson and Zaragoza (2009), with the inverse document frequency of Lucene.
    """
    tokens = Tokenizer()
    documents = [
        Counter(stem for text in texts_of(one) for stem in tokens(text))
        for one in known.labelled.capabilities
    ]
    lengths = np.array([document.total() for document in documents])
    norms = K1 * (1 - B + B * lengths / lengths.mean())
    held: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for at, document in enumerate(documents):
        for stem, count in document.items():
            held[stem].append((at, count))
    weights = {}
    for stem, holders in held.items():
        rarity = math.log(1 + (len(documents) - len(holders) + 0.5) / (len(holders) + 0.5))
        places = np.array([at for at, _ in holders])
        counts = np.array([count for _, count in holders])
        weights[stem] = places, rarity * counts * (K1 + 1) / (counts + norms[places])

    def scores(text: str, _: Vectors) -> np.ndarray:
        found = np.zeros(len(documents))
        for stem in tokens(text):
            if stem in weights:
                places, gains = weights[stem]
                found[places] += gains
        return found

    return scores


OTHERS: Final[dict[str, Callable[[Embedded], Scores]]] = {
    "BM25 alone": worded,
    "dense alone: description": described,
    "dense alone: centroid": centred,
    "dense alone: nearest example": nearest,
}


def ranked_by(known: Embedded, scores: Scores) -> Iterator[Route]:
    """Rank every request; a score has no threshold of its own, so nothing is refused."""
    ids = [one.id for one in known.labelled.capabilities]
    for task, vector in zip(known.requests, known.asked, strict=True):
        started = time.perf_counter()
        found = scores(task.text, vector)
        order = np.argsort(-found, kind="stable")[:RANKED]
        ms = (time.perf_counter() - started) * 1e3
        yield Route(tuple(ids[at] for at in order), float(found[order[0]]), ids[order[0]], ms)


def semantic_router(known: Embedded, interpreter: Path) -> dict[str, list[Route]]:
    """Have the semantic-router package rank every request, in an interpreter that has it."""
    request = {
        "routes": {one.id: texts_of(one) for one in known.labelled.capabilities},
        "texts": list(known.rows),
        "queries": [task.text for task in known.requests],
        "tokenizer": str(default_folder() / "tokenizer.json"),
    }
    with tempfile.TemporaryDirectory(prefix="foam-bench-") as folder:
        np.save(Path(folder) / "rows.npy", np.stack(list(known.rows.values())))
        done = subprocess.run(
            [interpreter, SIDE, folder],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        print(f"semantic-router could not be measured: {reason[0]}", file=sys.stderr)
        return {}
    answer = json.loads(done.stdout)
    name = f"semantic-router {answer['version']}"
    return {
        f"{name}, {kind}": [
            Route(tuple(ranked), score, ranked[0], ms) for ranked, score, ms in answer[kind]
        ]
        for kind in ("default", "hybrid")
    }


# ---- side by side


async def foam(labelled: LabelledSet, encoder: Encoder) -> dict[str, Any]:
    """Ask the router."""
    async with EncoderThread(encoder=encoder, cache_texts=0) as front:
        return (await evaluate_routing(labelled, front)).as_json()


def row(labelled: LabelledSet, method: str, found: dict[str, Any]) -> dict[str, Any]:
    names = {
        "recall_at_1": "R@1",
        "recall_at_5": "R@5",
        "ndcg_at_10": "nDCG@10",
        "mrr": "MRR",
        "auroc": "AUROC",
        "in_scope_kept": "kept",
        "oos_rejected": "rejected",
        "p50_ms": "p50 ms",
        "p99_ms": "p99 ms",
    }
    shown = {
        name: "" if found.get(field) is None else f"{found[field]:.3f}"
        for field, name in names.items()
    }
    return {"set": labelled.name, "method": method, **shown}


def compare(
    labelled: LabelledSet, encoder: Encoder, interpreter: Path | None
) -> Iterator[dict[str, Any]]:
    """Measure the router and the others on one set."""
    yield row(labelled, "FOAM", asyncio.run(foam(labelled, encoder)))
    known = embed(labelled, encoder)
    measured = {name: list(ranked_by(known, prepare(known))) for name, prepare in OTHERS.items()}
    if interpreter is not None:
        measured |= semantic_router(known, interpreter)
    split = len(labelled.tasks)
    for name, ranked in measured.items():
        inside = list(zip(ranked[:split], (task.gold for task in labelled.tasks), strict=True))
        found = figures(inside, ranked[split:]).as_json()
        # They refuse nothing by themselves, and their times are without the encoding.
        yield row(labelled, name, found | {"in_scope_kept": None, "oos_rejected": None})


def measure(
    folders: Sequence[Path] = (), interpreter: Path | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Compare on every set.

    Args:
        folders: Labelled requests; the developers' set when empty.
        interpreter: Python that has semantic-router, if any.
        limit: Random tasks of each set, and out-of-scope texts, at most; all when None.
    """
    encoder = load_encoder("onnx", None)
    encoder.encode(["warm up"])
    wanted = list(folders) or ([DEVELOPERS] if DEVELOPERS.is_dir() else [])
    if not wanted:
        print("no folder of labelled requests: only the plant fleet is measured", file=sys.stderr)
    if interpreter is None:
        print("semantic-router is left out: name an interpreter that has it", file=sys.stderr)
    sets = [read_labelled(folder) for folder in wanted]
    if limit is not None:
        sets = [labelled.sampled(limit, seed=0) for labelled in sets]
    rows = [one for labelled in sets for one in compare(labelled, encoder, interpreter)]
    return rows + [
        row(labelled, "FOAM", asyncio.run(foam(labelled, encoder))) for labelled in plants()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--semantic-router", type=Path, default=None, metavar="PYTHON")
    parser.add_argument("--limit", type=int, default=None)
    options = parser.parse_args()
    print(table("routing", measure(options.folders, options.semantic_router, options.limit)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
