"""The semantic-router package on somebody else's vectors; a program for its own interpreter.

    PYTHON semantic_router_side.py FOLDER < request.json > answer.json

The package need not be installed beside the mesh: `routing_quality.py` calls this with the
interpreter of an environment that holds it, and hands over the vectors its routes and queries have
in the mesh's encoder (``FOLDER/rows.npy``), so that the two differ in the routing alone. Its router
is built with its defaults; the hybrid one has its BM25 encoder with the words of the mesh's
tokenizer file in place of one from a hub.
"""

import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from semantic_router import IndexedRouter, Route  # type: ignore[import-not-found]
from semantic_router.encoders import (  # type: ignore[import-not-found]
    BM25Encoder,
    DenseEncoder,
)
from semantic_router.tokenizers import BaseTokenizer  # type: ignore[import-not-found]
from tokenizers import Tokenizer

_SHOWN = 100


class KnownVectors(DenseEncoder):  # type: ignore[misc]
    """Looks vectors up."""

    rows: dict[str, Any] = {}  # noqa: RUF012 - a field of a pydantic model

    def __call__(self, docs: list[Any]) -> list[list[float]]:
        return [self.rows[doc] for doc in docs]


class FileTokenizer(BaseTokenizer):  # type: ignore[misc]
    """The package's own tokenizer class, from a file."""

    def __init__(self, path: str) -> None:
        self._tokenizer = Tokenizer.from_file(path)
        self._tokenizer.no_truncation()
        self._tokenizer.enable_padding(direction="right", pad_id=0)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def tokenize(self, texts: str | list[str], pad: bool = True) -> np.ndarray:
        given = [texts] if isinstance(texts, str) else texts
        encoded = self._tokenizer.encode_batch(given, add_special_tokens=False)
        return np.array([one.ids for one in encoded])


def main() -> int:
    logging.disable(logging.WARNING)
    request = json.load(sys.stdin)
    rows = dict(zip(request["texts"], np.load(Path(sys.argv[1]) / "rows.npy"), strict=True))
    routes = [Route(name=name, utterances=said) for name, said in request["routes"].items()]
    encoder = KnownVectors(name="known", rows=rows)
    sparse = {"sparse_encoder": BM25Encoder(tokenizer=FileTokenizer(request["tokenizer"]))}
    answer: dict[str, Any] = {"version": version("semantic-router")}
    for kind, extra in (("default", {}), ("hybrid", sparse)):
        router = IndexedRouter(encoder=encoder, routes=routes, **extra)
        found = []
        for query in request["queries"]:
            started = time.perf_counter()
            picked = router(query, limit=_SHOWN)
            ms = (time.perf_counter() - started) * 1e3
            found.append([[p.name for p in picked], picked[0].confidence, ms])
        answer[kind] = found
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
