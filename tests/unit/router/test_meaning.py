"""Encoder and search of a router: records of other spaces, another encoder, an index kept."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import ConfigurationError, Conflict, InvalidTask
from registry.encoders import Encoder, EncoderThread
from registry.search import CapabilitySearch
from router.meaning import Meaning, Query
from support.capabilities import make_record
from support.encoders import WordEncoder

OLD, NEW = WordEncoder(), WordEncoder(revision="2", dimension=48)
TEXTS = {
    "weld": ("join two parts by welding", ("weld the bracket", "make a seam")),
    "paint": ("paint a surface in a colour", ("paint the door red", "a coat of varnish")),
    "measure": ("measure a length", ("how long is the shaft", "measure the gap")),
}


def record(
    function: str, encoder: Encoder = OLD, node: str = "edge-1", **more: Any
) -> CatalogRecord:
    description, examples = TEXTS[function]
    return make_record(encoder, node, function, description=description, examples=examples, **more)


def first(query: Query) -> str:
    return query.search.search(query.text, query.vector, 3)[0].key[1]


class Gate:
    """An encoder that embeds the catalogue only once it is let."""

    def __init__(self, encoder: Encoder) -> None:
        self.space = encoder.space
        self._encoder = encoder
        self._loop = asyncio.get_running_loop()
        self.open = asyncio.Event()
        self.asked = asyncio.Event()

    def encode(self, texts: Any) -> Any:
        if texts != ["warm up"]:
            self._loop.call_soon_threadsafe(self.asked.set)
            asyncio.run_coroutine_threadsafe(self.open.wait(), self._loop).result(20)
        return self._encoder.encode(texts)


@pytest.fixture
async def made() -> dict[str, Encoder]:
    return {"new": NEW}


@pytest.fixture
async def meaning(made: dict[str, Encoder]) -> AsyncIterator[Meaning]:
    def encoders(backend: str, _folder: Path | None) -> EncoderThread:
        def load() -> Encoder:
            if backend not in made:
                raise ConfigurationError(f"unknown encoder {backend!r}")
            return made[backend]

        return EncoderThread(encoder=load)

    async with EncoderThread(encoder=OLD) as thread:
        meaning = Meaning(
            search=CapabilitySearch(space=OLD.space), encoder=thread, encoders=encoders
        )
        yield meaning
        await meaning.close()


async def test_records_of_another_space_are_embedded_from_their_words(meaning: Meaning) -> None:
    meaning.upsert(record("weld"))
    meaning.upsert(record("paint", NEW))
    meaning.upsert(record("paint", NEW, "edge-2"))
    assert meaning.describe()["unembedded"] == 2
    assert await meaning.embed_missing() == 2
    assert meaning.describe()["unembedded"] == 0
    query = await meaning.embed("paint the door red")
    matches = query.search.search(query.text, query.vector, 1)
    assert {match.key for match in matches} == {("edge-1", "paint"), ("edge-2", "paint")}
    assert OLD.encoded.count("paint the door red") <= 2
    meaning.remove(("edge-1", "paint"))
    assert len(meaning.search) == 2


async def test_a_query_is_searched_in_the_space_it_was_embedded_in(meaning: Meaning) -> None:
    records = {one.key: one for one in map(record, TEXTS)}
    for one in records.values():
        meaning.upsert(one)
    before = await meaning.embed("weld the bracket")
    space = await meaning.change("new", None, records)
    assert space == NEW.space == meaning.search.space
    after = await meaning.embed("weld the bracket")
    assert (before.vector.shape, after.vector.shape) == ((64,), (48,))
    assert first(before) == first(after) == "weld"
    assert meaning.describe()["backend"] == "new"
    meaning.upsert(record("weld", NEW, "edge-2"))
    assert len(meaning.search) == 4


async def test_what_changes_meanwhile_is_in_the_new_space(
    meaning: Meaning, made: dict[str, Encoder]
) -> None:
    gate = made["slow"] = Gate(NEW)
    records = {one.key: one for one in (record("weld"), record("paint"))}
    for one in records.values():
        meaning.upsert(one)
    change = asyncio.create_task(meaning.change("slow", None, records))
    await gate.asked.wait()
    assert meaning.search.space == OLD.space
    assert meaning.describe()["changing"]["stage"] == "embedding"
    with pytest.raises(Conflict, match="being changed"):
        await meaning.change("new", None, records)
    assert first(await meaning.embed("weld the bracket")) == "weld"
    gone, come = records.pop(("edge-1", "paint")), record("measure")
    meaning.remove(gone.key)
    records[come.key] = come
    meaning.upsert(come)
    gate.open.set()
    await change
    assert len(meaning.search) == 2
    assert come.key in meaning.search
    assert meaning.describe()["unembedded"] == 0
    assert first(await meaning.embed("how long is the shaft")) == "measure"


@pytest.mark.parametrize(
    ("backend", "reason"), [("nonsense", "unknown encoder"), ("same", "serves already")]
)
async def test_what_fails_leaves_the_old_encoder_in_place(
    meaning: Meaning, made: dict[str, Encoder], backend: str, reason: str
) -> None:
    made["same"] = WordEncoder()
    meaning.upsert(record("weld"))
    with pytest.raises(ConfigurationError, match=reason):
        await meaning.change(backend, None, {})
    told = meaning.describe()
    assert reason in told["failure"]
    assert told["changing"] is None
    assert first(await meaning.embed("weld the bracket")) == "weld"


async def test_a_change_that_is_cancelled_leaves_the_old_encoder_in_place(
    meaning: Meaning, made: dict[str, Encoder]
) -> None:
    gate = made["slow"] = Gate(NEW)
    meaning.upsert(record("weld"))
    change = asyncio.create_task(meaning.change("slow", None, {("edge-1", "weld"): record("weld")}))
    await gate.asked.wait()
    change.cancel()
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await change
    assert meaning.describe()["changing"] is None
    assert first(await meaning.embed("weld the bracket")) == "weld"


async def test_without_a_factory_the_encoder_stays() -> None:
    async with EncoderThread(encoder=OLD) as thread:
        meaning = Meaning(search=CapabilitySearch(space=OLD.space), encoder=thread)
        with pytest.raises(InvalidTask, match="without a way"):
            await meaning.change("new", None, {})


async def test_an_index_that_was_much_work_is_kept_over_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("hnswlib", reason="without it there is no graph to keep")
    caplog.set_level("INFO")
    folder = tmp_path / "index"

    async def life(encoder: WordEncoder) -> Meaning:
        async with EncoderThread(encoder=encoder) as thread:
            search = CapabilitySearch(space=encoder.space, exact_limit=2)
            meaning = Meaning(search=search, encoder=thread, folder=folder)
            await meaning.restore()
            for function in TEXTS:
                meaning.upsert(record(function, encoder))
            await meaning.calibrate()
            assert first(await meaning.embed("weld the bracket")) == "weld"
            await meaning.close()
            return meaning

    await life(OLD)
    assert (folder / "manifest.json").is_file()
    assert "index.restored" not in caplog.text
    assert len((await life(OLD)).search.index) == len(TEXTS)
    assert "index.restored" in caplog.text
    await life(NEW)
    assert "index.not_restored" in caplog.text
