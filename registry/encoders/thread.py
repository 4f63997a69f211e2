"""Encoding off the event loop: one thread, a bounded queue, and a memory for repeated texts."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from broker.lifecycle import Service
from capability_schemas.capability import EncoderSpace
from capability_schemas.errors import Overloaded
from registry.encoders.base import Encoder, Vectors

CACHE_TEXTS: Final = 2_048
QUEUE_TEXTS: Final = 4_096
_TEXTS_PER_TURN: Final = 4
_RETRY_AFTER_MS: Final = 500


class EncoderThread(Service):
    """Async front of one encoder; an ``async with``.

    All encoding happens on one thread, a few texts a turn, so that one request does not wait for a
    long list before it. Exact repetitions are answered from memory: under a Zipf law of
    exponent 1.1 that is five of six requests. Owned by one event loop.

    Args:
        encoder: a ready encoder, or a function that makes one; the function runs on the thread, so
            that loading a model does not block the loop.
        cache_texts: texts remembered, least recently used first out (1.5 kB each).
        queue_texts: texts that may wait; further ones are refused with ``Overloaded``.
    """

    def __init__(
        self,
        *,
        encoder: Encoder | Callable[[], Encoder],
        cache_texts: int = CACHE_TEXTS,
        queue_texts: int = QUEUE_TEXTS,
    ) -> None:
        super().__init__(service_id="encoder")
        if cache_texts < 0 or queue_texts < 1:
            raise ValueError("cache_texts is at least 0 and queue_texts at least 1")
        self._source = encoder
        self._encoder: Encoder | None = None
        self._cache_texts = cache_texts
        self._queue_texts = queue_texts
        self._cache: OrderedDict[str, Vectors] = OrderedDict()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="foam-encoder")
        self._waiting = 0
        self.hits = 0
        self.misses = 0

    @property
    def space(self) -> EncoderSpace:
        """Space of the vectors.

        Raises:
            RuntimeError: not entered yet.
        """
        if self._encoder is None:
            raise RuntimeError("the encoder thread is not running: enter it with `async with`")
        return self._encoder.space

    async def encode_one(self, text: str) -> Vectors:
        """Embed one text; as ``encode``.

        Returns:
            float32, shape ``(dimension,)``, length 1; do not write into it.
        """
        remembered = self._recall(text)
        if remembered is not None:
            return remembered
        rows: Vectors = await self.encode([text])
        row: Vectors = rows[0]
        return row

    async def encode(self, texts: Sequence[str]) -> Vectors:
        """Embed texts. Cancellation is safe; a turn that has begun is finished and forgotten.

        Returns:
            float32, shape ``(len(texts), dimension)``, rows of length 1.

        Raises:
            Overloaded: more texts would wait than ``queue_texts``.
            RuntimeError: not entered.
        """
        rows = np.empty((len(texts), self.space.dimension), dtype=np.float32)
        missing: OrderedDict[str, list[int]] = OrderedDict()
        for row, text in enumerate(texts):
            remembered = self._recall(text)
            if remembered is not None:
                rows[row] = remembered
            else:
                missing.setdefault(text, []).append(row)
        if not missing:
            return rows
        if self._waiting and self._waiting + len(missing) > self._queue_texts:
            raise Overloaded(
                f"the encoder has {self._waiting} texts waiting, the limit is {self._queue_texts}",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        self.misses += len(missing)
        pending = list(missing)
        self._waiting += len(pending)
        try:
            while pending:
                turn = pending[:_TEXTS_PER_TURN]
                for text, vector in zip(turn, await self._run(turn), strict=True):
                    rows[missing[text]] = vector
                    self._remember(text, vector)
                del pending[: len(turn)]
                self._waiting -= len(turn)
        finally:
            self._waiting -= len(pending)
        return rows

    async def _on_start(self) -> None:
        source = self._source
        if callable(source):

            def load() -> Encoder:
                made = source()
                made.encode(["warm up"])  # the first run of a graph takes a hundred times as long
                return made

            self._encoder = await asyncio.get_running_loop().run_in_executor(self._pool, load)
        else:
            self._encoder = source

    async def _on_stopped(self) -> None:
        # A turn takes some 20 ms; one that a native library never ends must not hold the process.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._encoder = None

    async def _run(self, texts: list[str]) -> Vectors:
        encoder = self._encoder
        if encoder is None:
            raise RuntimeError("the encoder thread has stopped")
        return await asyncio.get_running_loop().run_in_executor(self._pool, encoder.encode, texts)

    def _recall(self, text: str) -> Vectors | None:
        vector = self._cache.get(text)
        if vector is not None:
            self.hits += 1
            self._cache.move_to_end(text)
        return vector

    def _remember(self, text: str, vector: Vectors) -> None:
        if not self._cache_texts:
            return
        kept = vector.copy()
        kept.setflags(write=False)
        self._cache[text] = kept
        if len(self._cache) > self._cache_texts:
            self._cache.popitem(last=False)
