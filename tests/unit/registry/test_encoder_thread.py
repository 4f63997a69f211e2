import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from capability_schemas.errors import ConfigurationError, Overloaded
from registry.encoders import EncoderThread, Vectors
from support.encoders import WordEncoder


class GatedEncoder(WordEncoder):
    """Encodes only while its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.threads: set[int] = set()

    def encode(self, texts: Sequence[str]) -> Vectors:
        if not self.gate.wait(10):
            raise TimeoutError("nobody opened the gate")
        self.threads.add(threading.get_ident())
        return super().encode(texts)


async def test_it_encodes_off_the_loop_on_one_thread() -> None:
    inner = GatedEncoder()
    inner.gate.set()
    async with EncoderThread(encoder=inner) as thread, asyncio.TaskGroup() as group:
        for at in range(5):
            group.create_task(thread.encode([f"text {at}", f"more {at}"]))
    assert len(inner.threads) == 1
    assert threading.get_ident() not in inner.threads


async def test_rows_answer_their_texts_repetitions_included() -> None:
    texts = ["a", "b", "a", "c d", "b"]
    async with EncoderThread(encoder=WordEncoder()) as thread:
        rows = await thread.encode(texts)
        np.testing.assert_array_equal(rows, WordEncoder().encode(texts))
        assert (await thread.encode([])).shape == (0, 64)


async def test_known_texts_come_from_memory() -> None:
    inner = WordEncoder()
    async with EncoderThread(encoder=inner, cache_texts=2) as thread:
        await thread.encode(["a", "b"])
        first = await thread.encode_one("a")
        await thread.encode_one("c")  # pushes b out: a was used after it
        again = await thread.encode_one("a")
        assert inner.encoded == ["a", "b", "c"]
        await thread.encode_one("b")
        assert inner.encoded == ["a", "b", "c", "b"]
        np.testing.assert_array_equal(first, again)
        assert thread.hits == 2
        with pytest.raises(ValueError, match="read-only"):
            again[0] = 0.0


async def test_a_full_queue_refuses() -> None:
    inner = GatedEncoder()
    async with EncoderThread(encoder=inner, queue_texts=2) as thread:
        waiting = asyncio.create_task(thread.encode(["a", "b"]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 texts waiting"):
            await thread.encode_one("c")
        inner.gate.set()
        assert (await waiting).shape == (2, 64)
        assert (await thread.encode_one("c")).shape == (64,)


async def test_a_cancelled_request_gives_its_places_back() -> None:
    inner = GatedEncoder()
    async with EncoderThread(encoder=inner, queue_texts=2) as thread:
        waiting = asyncio.create_task(thread.encode(["a", "b"]))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        inner.gate.set()
        assert (await thread.encode(["c", "d"])).shape == (2, 64)


async def test_loading_happens_on_the_thread_and_its_error_is_told() -> None:
    made_on: list[int] = []

    def make() -> WordEncoder:
        made_on.append(threading.get_ident())
        return WordEncoder()

    async with EncoderThread(encoder=make) as thread:
        assert thread.space.model == "words"
    assert made_on != [threading.get_ident()]

    def fail() -> WordEncoder:
        raise ConfigurationError("no encoder in /nowhere")

    with pytest.raises(ConfigurationError, match="nowhere"):
        async with EncoderThread(encoder=fail):
            pass


async def test_an_encoder_it_loads_has_run_before_it_serves() -> None:
    inner = GatedEncoder()
    inner.gate.set()
    async with EncoderThread(encoder=lambda: inner):
        assert inner.threads, "the slow first run must not fall to the first task"


async def test_it_must_be_entered() -> None:
    thread = EncoderThread(encoder=WordEncoder())
    with pytest.raises(RuntimeError, match="async with"):
        await thread.encode(["a"])
