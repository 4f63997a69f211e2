"""Routing quality of the very class the router uses: who is found first, and who is refused.

    python tests/benchmarks/routing_quality.py [--encoder DIR] [--data DIR]

Prints a table for the developers' set (a folder with ``capabilities.jsonl``, ``tasks.jsonl`` and
``oos.jsonl``; default ``../shared/data/routing/metatool``) and for a small plant fleet.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from capability_schemas.capability import CatalogRecord
from registry.encoders import Encoder, default_folder, load_encoder
from registry.search import CapabilitySearch, Match
from registry.vectors import capability_texts, centroid, pack_vector
from support.plant_fleet import FUNCTIONS, IN_SCOPE, OUT_OF_SCOPE, Function

DATA = Path(__file__).parents[3] / "shared" / "data" / "routing" / "metatool"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def identifier(name: str) -> str:
    """The data's names hold characters that a function name may not have."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


def fill(search: CapabilitySearch, encoder: Encoder, functions: list[Function], nodes: int) -> None:
    for function in functions:
        rows = encoder.encode(
            capability_texts(function.name, function.description, function.examples)
        )
        for node in range(nodes):
            search.upsert(
                CatalogRecord(
                    node=f"node-{node}",
                    function=function.name,
                    version="1.0.0",
                    epoch=1,
                    revision=1,
                    description=function.description,
                    examples=function.examples,
                    embedding=pack_vector(centroid(rows)),
                    space=encoder.space,
                    registry="registry-1",
                    admitted_at=1,
                    claim_digest="sha256:0",
                )
            )
    texts = search.calibration_texts()
    search.calibrate(dict(zip(texts, encoder.encode(texts), strict=True)))


def area_under_roc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive scores above a negative (Mann-Whitney), ties counting half."""
    wins = (positive[:, None] > negative[None, :]).mean()
    return float(wins + 0.5 * (positive[:, None] == negative[None, :]).mean())


def evaluate(
    name: str,
    search: CapabilitySearch,
    encoder: Encoder,
    tasks: list[tuple[str, set[str]]],
    nowhere: list[str],
) -> None:
    started = time.perf_counter()
    vectors = encoder.encode([text for text, _ in tasks])
    encode_ms = (time.perf_counter() - started) / len(tasks) * 1e3
    started = time.perf_counter()
    found: list[list[Match]] = [
        search.search(text, vector, 10) for (text, _), vector in zip(tasks, vectors, strict=True)
    ]
    search_ms = (time.perf_counter() - started) / len(tasks) * 1e3
    ranks = []
    for (_, gold), matches in zip(tasks, found, strict=True):
        names = list(dict.fromkeys(match.key[1] for match in matches))
        ranks.append(next((at for at, seen in enumerate(names) if seen in gold), len(names) + 99))
    rank = np.array(ranks)
    inside = np.array([matches[0].score for matches in found])
    outside = np.array(
        [
            search.search(text, vector, 1)[0].score
            for text, vector in zip(nowhere, encoder.encode(nowhere), strict=True)
        ]
    )
    fit = search.calibration
    print(
        f"{name:<28} R@1 {np.mean(rank < 1):.3f}  R@5 {np.mean(rank < 5):.3f}  "
        f"MRR {np.mean(np.where(rank < 10, 1 / (rank + 1), 0)):.3f}  "
        f"AUROC {area_under_roc(inside, outside):.3f}  threshold {fit.threshold:.3f}  "
        f"half {fit.half:.2f}  kept {np.mean(inside >= fit.threshold):.3f}  "
        f"rejected {np.mean(outside < fit.threshold):.3f}  "
        f"encode {encode_ms:.2f} ms  search {search_ms:.2f} ms"
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", type=Path, default=default_folder())
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    encoder = load_encoder(options.backend, None if options.backend != "onnx" else options.encoder)
    print(f"encoder {encoder.space.model} {encoder.space.revision}")
    if options.data.is_dir():
        functions = [
            Function(identifier(entry["id"]), entry["description"], tuple(entry["examples"]))
            for entry in lines(options.data / "capabilities.jsonl")
        ]
        tasks = [
            (t["text"], {identifier(gold) for gold in t["gold"]})
            for t in lines(options.data / "tasks.jsonl")
        ]
        nowhere = [entry["text"] for entry in lines(options.data / "oos.jsonl")]
        search = CapabilitySearch(space=encoder.space)
        fill(search, encoder, functions, nodes=1)
        evaluate("developers' set (199)", search, encoder, tasks, nowhere)
    else:
        print(f"no developers' set in {options.data}: only the plant fleet is measured")
    wanted = [(text, {name}) for text, name in IN_SCOPE]
    for label, functions, nodes in (
        ("plant (10 functions)", FUNCTIONS, 1),
        ("plant, 5 nodes each", FUNCTIONS, 5),
        ("plant, 2 examples each", [f._replace(examples=f.examples[:2]) for f in FUNCTIONS], 1),
        ("plant, no examples", [f._replace(examples=()) for f in FUNCTIONS], 1),
        ("plant, 4 functions", FUNCTIONS[:4], 1),
    ):
        names = {function.name for function in functions}
        search = CapabilitySearch(space=encoder.space)
        fill(search, encoder, functions, nodes)
        evaluate(label, search, encoder, [w for w in wanted if w[1] <= names], OUT_OF_SCOPE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
